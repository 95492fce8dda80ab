"""Batches drawn from the seed and the step; volumes moved; splits read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from photon.config import POLICIES, PhotonConfig, tiny
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.model.packing import IGNORE_INDEX
from photon.model.vision import VisionTower
from photon.training.step import TrainingBatch, compute_loss
from pipelines import dataset
from pipelines.dataset import (
    BatchSource,
    Draw,
    LabelledScan,
    draw_shift,
    read_split,
    scan_context,
    shifted,
    volume_patches,
)
from pipelines.naming import NamingSource
from pipelines.text import Prompter, build_tokenizer

DRAW = Draw(scans_per_step=2, questions_per_scan=3, max_shift=(2, 3, 4), robust_probability=0.5, flip_probability=0.5)


@pytest.fixture(scope="module")
def scans(smoke_data: Path) -> list[LabelledScan]:
    return read_split(smoke_data, "train")


@pytest.fixture(scope="module")
def prompter(scans: list[LabelledScan]) -> Prompter:
    return Prompter(build_tokenizer(t for scan in scans for q in scan.questions for t in (q.question, q.answer)))


@pytest.fixture(scope="module")
def config(prompter: Prompter) -> PhotonConfig:
    return tiny(prompter.vocab_size, special_ids=prompter.special_ids)


def source(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig, seed: int = 0, **changes: object
) -> BatchSource:
    return BatchSource(scans, prompter, config, dataclasses.replace(DRAW, **changes), seed)  # type: ignore[arg-type]


def same(first: TrainingBatch, second: TrainingBatch) -> bool:
    def values(item: TrainingBatch) -> list[object]:
        """Everything in it, tensors as lists."""
        parts = (item, item.batch, item.batch.layout)
        found = [getattr(part, f.name) for part in parts for f in dataclasses.fields(part)]
        return [x.tolist() if isinstance(x, torch.Tensor) else x for x in found if not dataclasses.is_dataclass(x)]

    return values(first) == values(second)


def test_a_batch_depends_on_the_seed_and_the_step_alone(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig
) -> None:
    first, again = source(scans, prompter, config), source(scans, prompter, config)
    again.batch(0, True)  # batches drawn before must not matter
    assert same(first.batch(5, True), again.batch(5, True))
    assert not same(first.batch(5, True), first.batch(6, True))
    assert not same(first.batch(5, True), source(scans, prompter, config, seed=1).batch(5, True))
    assert same(first.blind_batch(5), again.blind_batch(5))


def test_what_a_batch_holds(scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig) -> None:
    item = source(scans, prompter, config).batch(0, False)
    batch = item.batch
    assert len(batch.context_lengths) == 2 and list(batch.branch_context) == [0] * 3 + [1] * 3
    assert not item.is_flipped.any()
    texts = {(q.question, q.answer) for scan in scans for q in scan.questions}
    branches = batch.branch_ids.split(batch.branch_lengths)
    labels = batch.labels.split(batch.branch_lengths)
    for ids, label in zip(branches, labels, strict=True):
        start = int((label != IGNORE_INDEX).nonzero()[0])
        question = prompter.text(ids[: int((ids == config.eos_token_id).nonzero()[0])].tolist())
        assert (question, prompter.text(label[start:].tolist())) in texts
        assert bool((label[start:] == ids[start:]).all())
        assert prompter.branch_ids(question).tolist() == ids[:start].tolist()


def test_disturbed_branches(scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig) -> None:
    drawn = source(scans, prompter, config)
    items = [drawn.batch(step, True) for step in range(20)]
    perturbed = torch.stack([item.is_perturbed for item in items])
    flipped = torch.stack([item.is_flipped for item in items])
    assert not any(bool(item.is_whole.any()) for item in items if item.is_whole is not None)
    assert torch.equal(perturbed[:, 0], perturbed[:, 2]), "a spoilt scan is spoilt for all its questions"
    assert 0 < int(perturbed.sum()) < perturbed.numel() and bool(flipped.any())
    assert not bool((perturbed & flipped).any())
    calm = source(scans, prompter, config, robust_probability=0.0)
    assert not any(bool(calm.batch(step, True).is_perturbed.any()) for step in range(10))


def test_some_branches_keep_everything(scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig) -> None:
    without = source(scans, prompter, config)
    drawn = source(scans, prompter, config, whole_probability=0.5)
    wholes, others = [], []
    for step in range(12):
        item = drawn.batch(step, with_flips=True)
        assert item.is_whole is not None
        wholes.append(item.is_whole)
        others.append(item.is_perturbed | item.is_flipped)
        assert same(
            dataclasses.replace(item, is_whole=None), dataclasses.replace(without.batch(step, True), is_whole=None)
        )
    whole, other = torch.stack(wholes), torch.stack(others)
    assert 0.2 < float(whole[~other].float().mean()) < 0.8
    assert not bool((whole & other).any())


@pytest.mark.parametrize(("per_step", "num_steps"), [(1, 8), (2, 4), (4, 2), (8, 1), (99, 1)])
def test_an_epoch_visits_every_scan_once(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig, per_step: int, num_steps: int
) -> None:
    eight = source(scans[:8], prompter, config, scans_per_step=per_step)
    epochs = [[i for step in range(num_steps) for i in eight._scan_order(e * num_steps + step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_epoch_that_does_not_divide_visits_no_scan_twice(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig
) -> None:
    drawn = source(scans[:8], prompter, config, scans_per_step=3)
    visited = [i for step in range(2) for i in drawn._scan_order(step)]
    assert len(visited) == len(set(visited)) == 6
    assert {i for step in range(12) for i in drawn._scan_order(step)} == set(range(8)), "left out once, not for ever"


def test_blind_batch_has_no_scan(scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig) -> None:
    item = source(scans, prompter, config).blind_batch(3)
    assert item.batch.visual_rows.numel() == item.batch.patches.numel() == item.batch.context_ids.numel() == 0
    assert len(item.batch.branch_lengths) == 6
    assert not item.is_perturbed.any() and not item.is_flipped.any()


def test_patches_are_the_volume_in_zero_to_one(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig
) -> None:
    volume = scans[0].volume
    patches, grid = volume_patches(volume, config)
    low, high = volume.spec.window_hu
    corner = (volume.voxels[:14, :14, :14].astype(np.float32) - low) / (high - low)
    np.testing.assert_allclose(patches[0].reshape(14, 14, 14).numpy(), corner, atol=1e-6)
    assert grid == (3, 4, 4) and float(patches.min()) >= 0.0 and float(patches.max()) <= 1.0
    context = scan_context(volume, prompter, config)
    assert int((context.input_ids == config.video_token_id).sum()) == 12


def half_air(scan: LabelledScan) -> LabelledScan:
    """The scan with nothing in its first 28 voxels along x: the even ones of its 3 x 2 x 2 tokens."""
    voxels = scan.volume.voxels.copy()
    voxels[:, :, :28] = scan.volume.spec.window_hu[0]
    return dataclasses.replace(scan, volume=dataclasses.replace(scan.volume, voxels=voxels))


def skipping(config: PhotonConfig) -> PhotonConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, empty_below=0.0))


def test_empty_tokens_have_no_part_in_a_context(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig
) -> None:
    volume = half_air(scans[0]).volume
    context = scan_context(volume, prompter, skipping(config))
    assert context.present is not None and context.present.tolist() == [1, 3, 5, 7, 9, 11]
    assert context.input_ids.tolist() == prompter.context_ids([6]).tolist()
    patches, _ = volume_patches(volume, config)
    assert torch.equal(context.patches.view(6, -1), patches.view(12, -1)[1::2])
    assert scan_context(volume, prompter, config).present is None


def test_what_is_empty_is_decided_after_a_scan_was_spoilt(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise fills the air, blanking leaves nothing to tell air from: either way all tokens are there."""
    aired = [half_air(scan) for scan in scans]
    for kind, count in (("noise", 12), ("blank", 12), ("drop_voxels", 6)):
        monkeypatch.setattr(dataset, "draw_kind", lambda generator, kind=kind: kind)
        item = source(aired, prompter, skipping(config), max_shift=(0, 0, 0), robust_probability=1.0).batch(0, False)
        assert set(item.batch.layout.pair_lengths.tolist()) == {count}, kind
    calm = source(aired, prompter, skipping(config), max_shift=(0, 0, 0), robust_probability=0.0).batch(0, False)
    assert calm.batch.present.tolist() == list(range(1, 24, 2))


def test_naming_leaves_out_what_the_model_will_not_see(
    smoke_data: Path, scans: list[LabelledScan], config: PhotonConfig
) -> None:
    aired, labels = [half_air(scan) for scan in scans[:3]], smoke_data / "raw" / "labels"
    whole, less = (
        NamingSource(aired, labels, changed, scans_per_step=2, seed=0).batch(1, (0, 0, 0))
        for changed in (config, skipping(config))
    )
    assert less.present is not None and less.present.tolist() == list(range(1, 24, 2))
    assert torch.equal(less.targets, whole.targets[1::2])
    assert torch.equal(less.patches.view(12, -1), whole.patches.view(24, -1)[1::2])
    tower = VisionTower(config.vision)
    assert tower(less.patches, less.grids, less.present).shape[0] == less.targets.shape[0]


def test_shifted() -> None:
    voxels = np.arange(24).reshape(2, 3, 4)
    moved = shifted(voxels, (1, -1, 2), -7)
    assert moved.shape == voxels.shape
    for z, y, x in np.ndindex(2, 3, 4):
        came_from = (z - 1, y + 1, x - 2)
        is_inside = all(0 <= i < n for i, n in zip(came_from, voxels.shape, strict=True))
        assert moved[z, y, x] == (voxels[came_from] if is_inside else -7)
    assert np.array_equal(shifted(voxels, (0, 0, 0), -7), voxels)


@pytest.mark.parametrize("shift", [(2, 0, 0), (0, -5, 0), (9, -9, 9)])
def test_a_volume_moved_out_of_sight_is_empty(shift: tuple[int, int, int]) -> None:
    assert (shifted(np.ones((2, 3, 4)), shift, -7) == -7).all()


def test_draw_shift_reaches_every_voxel_of_its_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_shift((0, 1, 3), generator) for _ in range(300)]
    assert [set(axis) for axis in zip(*drawn, strict=True)] == [{0}, {-1, 0, 1}, set(range(-3, 4))]


def test_naming_batches(smoke_data: Path, scans: list[LabelledScan], config: PhotonConfig) -> None:
    source = NamingSource(scans[:4], smoke_data / "raw" / "labels", config, scans_per_step=3, seed=0)
    batch, again = source.batch(7, (2, 2, 2)), source.batch(7, (2, 2, 2))
    assert torch.equal(batch.patches, again.patches) and torch.equal(batch.targets, again.targets)
    assert batch.grids == ((3, 4, 4),) * 3 and batch.targets.shape == (3 * 12, source.num_labels)
    assert not torch.equal(batch.patches, source.batch(8, (2, 2, 2)).patches)
    assert 0.05 < float(batch.targets.mean()) < 0.95
    still = source.batch(7, (0, 0, 0))
    assert any(torch.equal(still.patches[:48], volume_patches(scan.volume, config)[0]) for scan in scans[:4])


def test_splits_have_their_own_scans(smoke_data: Path) -> None:
    found = {split: read_split(smoke_data, split) for split in ("train", "val", "test")}
    ids = {split: {q.scan_id for scan in scans for q in scan.questions} for split, scans in found.items()}
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["val"]
    for scans in found.values():
        for scan in scans:
            assert len({q.scan_id for q in scan.questions}) == 1 and len(scan.questions) >= 10


def test_a_split_nobody_asks_about_is_refused(smoke_data: Path) -> None:
    with pytest.raises(PhotonError, match="'holdout'") as caught:
        read_split(smoke_data, "holdout")
    assert caught.value.code == "SPLIT_EMPTY"


# A vision tower that learns no more

STILL = {"max_shift": (0, 0, 0)}


def tower_of(config: PhotonConfig) -> VisionTower:
    return Photon(config).initialise(0).visual


@pytest.mark.parametrize("policy", POLICIES)
def test_a_frozen_tower_changes_batches_in_nothing_but_their_form(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig, policy: str
) -> None:
    """Scan by scan, spoilt or not, the same questions and the same loss to the last bit."""
    config = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, policy=policy))
    model = Photon(config).initialise(0)
    draw = dataclasses.replace(DRAW, scans_per_step=1, **STILL)  # type: ignore[arg-type]
    plain = BatchSource(scans, prompter, config, draw, 0)
    frozen = BatchSource(scans, prompter, config, draw, 0, tower=model.visual)
    seen = set()
    for step in range(12):  # fewer scans, so some come a second time
        expected, found = plain.batch(step, True), frozen.batch(step, True)
        assert found.batch.tokens is not None and found.batch.patches.numel() == 0 and expected.batch.tokens is None
        assert torch.equal(found.batch.branch_ids, expected.batch.branch_ids)
        assert torch.equal(found.is_perturbed, expected.is_perturbed)
        assert torch.equal(found.is_flipped, expected.is_flipped)
        with torch.no_grad():
            assert torch.equal(*(compute_loss(model, item, "hard").loss for item in (expected, found)))
        seen.add(bool(found.is_perturbed[0]))
    assert seen == {True, False}


def test_clean_scans_are_encoded_once_and_spoilt_ones_whenever_drawn(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig
) -> None:
    tower, calls = tower_of(config), []
    tower.register_forward_hook(lambda *call: calls.append(1))
    draw = dataclasses.replace(DRAW, robust_probability=0.0, **STILL)  # type: ignore[arg-type]
    first = BatchSource(scans, prompter, config, draw, 0, tower=tower)
    batches = [first.batch(step, False) for step in range(12)]
    assert len(calls) == len(scans) < 24
    for step, expected in enumerate(batches):
        assert same(first.batch(step, False), expected), "the batch of a step does not depend on what came before"
    other = first.with_draw(dataclasses.replace(draw, questions_per_scan=1))
    assert len(other.batch(0, False).batch.branch_lengths) == 2 and len(calls) == len(scans)
    assert len(first.batch(0, False).batch.branch_lengths) == 6
    spoilt = first.with_draw(dataclasses.replace(draw, robust_probability=1.0))
    assert same(spoilt.batch(0, False), spoilt.batch(0, False)) and len(calls) == len(scans) + 4
    assert same(first.batch(0, False), batches[0]), "what was spoilt is not kept"


def test_scans_that_move_cannot_be_encoded_once(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig
) -> None:
    with pytest.raises(PhotonError, match="max_shift") as caught:
        BatchSource(scans, prompter, config, DRAW, 0, tower=tower_of(config))
    assert caught.value.code == "CONFIG_INVALID"
    still = BatchSource(scans, prompter, config, dataclasses.replace(DRAW, **STILL), 0, tower=tower_of(config))  # type: ignore[arg-type]
    with pytest.raises(PhotonError, match="max_shift"):
        still.with_draw(DRAW)


@pytest.mark.parametrize(("policy", "num_tokens"), [("slices", 4), ("pooled", 4), ("fixed", 12)])
def test_the_configuration_says_which_tokens_enter(
    scans: list[LabelledScan], prompter: Prompter, config: PhotonConfig, policy: str, num_tokens: int
) -> None:
    """In training as in inference; 12 tokens in three slabs."""
    config = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, policy=policy))
    context = scan_context(scans[0].volume, prompter, config)
    assert int((context.input_ids == config.video_token_id).sum()) == num_tokens
    item = source(scans, prompter, config).batch(0, False)
    assert item.batch.visual_rows.numel() == 2 * num_tokens
