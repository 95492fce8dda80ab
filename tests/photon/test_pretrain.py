"""Vision pretraining: which label lies in which token's box, and that the tower learns to tell."""

from __future__ import annotations

import math

import pytest
import torch

from photon.grid import patchify, token_boxes
from photon.testing import micro_config, micro_model
from photon.training.pretrain import NamingBatch, NamingConfig, pretrain_vision, token_labels

VISION = micro_config().vision  # tokens of 2 x 4 x 4 voxels


@pytest.mark.parametrize("fraction", [0.01, 0.2, 1.0])
def test_labels_of_a_token_are_those_in_its_box(fraction: float) -> None:
    labels = torch.randint(4, (4, 8, 12), generator=torch.Generator().manual_seed(0))
    labels[:2, :4, :4] = 2
    _, grid = patchify(labels.float(), VISION)
    found = token_labels(labels, grid, VISION, 5, fraction)
    assert found.shape == (12, 5) and not found[:, 4].any()
    for row, ((z0, z1), (y0, y1), (x0, x1)) in zip(found, token_boxes(grid, VISION).tolist(), strict=True):
        box = labels[z0:z1, y0:y1, x0:x1]
        assert row.tolist() == [float((box == label).float().mean() >= fraction) for label in range(5)]
    assert found[0].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_the_tower_learns_to_name_what_a_token_holds() -> None:
    """Label 1 is bright: the loss falls well below its start, and nothing but the tower changes."""

    def batch_at(step: int) -> NamingBatch:
        generator = torch.Generator().manual_seed(step)
        labels = torch.zeros(4, 8, 8, dtype=torch.long)
        _, grid = patchify(labels.float(), VISION)
        for (z0, z1), (y0, y1), (x0, x1) in token_boxes(grid, VISION).tolist():
            labels[z0:z1, y0:y1, x0:x1] = int(torch.randint(2, (), generator=generator))
        volume = 0.3 + 0.5 * labels + 0.1 * torch.rand(labels.shape, generator=generator)
        return NamingBatch(patchify(volume, VISION)[0], (grid,), token_labels(labels, grid, VISION, 2, 0.01))

    model, losses = micro_model(), []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = NamingConfig(num_steps=60)
    pretrain_vision(
        model.visual,
        batch_at,
        config,
        frequencies=torch.tensor([0.9, 0.1]),
        on_step=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 60
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.startswith("visual.")}


def test_pretraining_depends_on_its_input_alone() -> None:
    def trained(noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        model = micro_model()
        patches, grid = patchify(torch.rand(2, 4, 8, generator=torch.Generator().manual_seed(0)), VISION)
        batch = NamingBatch(patches, (grid,), torch.eye(2))
        config = NamingConfig(num_steps=3)
        pretrain_vision(
            model.visual,
            lambda step: batch,
            config,
            frequencies=torch.tensor([0.9, 0.1]),
            on_step=lambda step, loss: None,
        )
        return torch.cat([parameter.detach().flatten() for parameter in model.visual.parameters()])

    assert torch.equal(trained(1), trained(2))


def test_rare_structures_weigh_more_within_limits() -> None:
    """The naming head starts at zero, so the first loss of a presence is its weight times log 2."""
    patches, grid = patchify(torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)), VISION)
    batch = NamingBatch(patches, (grid,), torch.ones(1, 3))
    losses: list[float] = []
    pretrain_vision(
        micro_model().visual,
        lambda step: batch,
        NamingConfig(num_steps=1, positive_weight=2.0, largest_positive_weight=20.0),
        frequencies=torch.tensor([0.5, 0.1, 0.0]),
        on_step=lambda step, loss: losses.append(loss),
    )
    assert losses[0] == pytest.approx((2.0 + 9.0 + 20.0) / 3 * math.log(2), rel=1e-5)
