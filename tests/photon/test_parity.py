"""`photon.parity`: on folders of other sizes and on the published numbers with one of them wrong.

Folders of other sizes are computed by `Dense`: one prompt at a time, every mask written out, nothing shared with
the model but its weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from photon.checkpoint import load_tensors, read_model, write_model
from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.grid import Grid
from photon.parity import KEPT_SET, ParityRow, check_parity, largest_errors
from photon.testing import micro_config, micro_model
from photon.weights import INDEX

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = "cases.safetensors"
MODES = ("eval", "warmup", "soft", "hard", "hard_strict", "robust", "flip")
NAN = torch.tensor(math.nan)


class Dense:
    """The published method on one prompt, written plainly over a model's weights."""

    def __init__(self, config: PhotonConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.w = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(gate, f"{name}.down_proj")

    @staticmethod
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        """x [T, H, d] by angles [T, d/2]; dimensions i and i + d/2 make a pair."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """[T, H, d] each, mask [T, T]."""
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -math.inf).softmax(-1), v).flatten(1)

    def vision(self, patches: Tensor, grid: Grid) -> Tensor:
        vision, (gz, gy, gx) = self.config.vision, grid
        places = torch.tensor(
            [
                (z, 2 * by + dy, 2 * bx + dx)
                for z in range(gz)
                for by in range(gy // 2)
                for bx in range(gx // 2)
                for dy in range(2)
                for dx in range(2)
            ]
        )
        side = 2 * (vision.window_size // (2 * vision.patch_size))
        windows = places // torch.tensor([1, side, side])
        masks = [(part[:, None] == part[None]).all(-1) for part in (windows, places[:, :1])]
        heads, width = vision.num_heads, vision.hidden_size
        quarter = width // heads // 4
        frequency = 10000.0 ** -(torch.arange(quarter) / quarter)
        angles = torch.cat([places[:, 1:2] * frequency, places[:, 2:] * frequency], dim=1)
        x = (patches - vision.intensity_mean) / vision.intensity_std
        x = x @ self.w["visual.vision_patch_embed.proj.weight"].flatten(1).T
        for index in range(vision.depth):
            name = f"visual.blocks.{index}"
            qkv = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            q, k, v = qkv.view(len(x), 3, heads, -1).unbind(1)
            mask = masks[index in vision.fullatt_block_indexes]
            out = self.attend(self.rotate(q, angles), self.rotate(k, angles), v, mask)
            x = x + self.linear(out, f"{name}.attn.proj")
            x = x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")
        x = self.norm(x, "visual.merger.ln_q").reshape(-1, 4 * width)
        return self.linear(F.gelu(self.linear(x, "visual.merger.mlp.0")), "visual.merger.mlp.2")

    def layer(self, x: Tensor, index: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output of a decoder layer, and its rotated queries and repeated keys [T, H, d]."""
        config, name = self.config, f"model.layers.{index}"
        half = config.head_dim // 2
        axis = [a for a, pairs in enumerate(config.mrope_section) for _ in range(pairs)]
        angles = positions[axis].T * config.rope_theta ** -(torch.arange(half) / half)
        normed = self.norm(x, f"{name}.input_layernorm", config.rms_norm_eps)
        q, k, v = (
            self.linear(normed, f"{name}.self_attn.{part}_proj").unflatten(-1, (-1, config.head_dim)) for part in "qkv"
        )
        share = config.num_attention_heads // config.num_key_value_heads
        q, k, v = (
            self.rotate(q, angles),
            self.rotate(k, angles).repeat_interleave(share, 1),
            v.repeat_interleave(share, 1),
        )
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        x = x + self.linear(self.attend(q, k, v, mask), f"{name}.self_attn.o_proj")
        normed = self.norm(x, f"{name}.post_attention_layernorm", config.rms_norm_eps)
        return x + self.mlp(normed, f"{name}.mlp"), q, k

    def positions(self, ids: Tensor, grid: Grid, seconds: float) -> Tensor:
        """[3, T] positions of a prompt with one volume."""
        gz, gy, gx = grid
        step = seconds * self.config.vision.tokens_per_second
        first = int((ids == self.config.video_token_id).nonzero()[0])
        visual = [
            (int(z * step) + first, y + first, x + first)
            for z in range(gz)
            for y in range(gy // 2)
            for x in range(gx // 2)
        ]
        start = max(max(place) for place in visual) + 1
        rest = len(ids) - first - len(visual)
        return torch.tensor([(i,) * 3 for i in range(first)] + visual + [(start + i,) * 3 for i in range(rest)]).T

    def scores(self, q: Tensor, k: Tensor, asked: Tensor, is_visual: Tensor) -> Tensor:
        """Scores of the visual tokens [N], head by head as the paper writes them."""
        scale = q.shape[-1] ** 0.5
        centrality, heads = torch.zeros(int(asked.sum())), q.shape[1]
        for head in range(heads):
            products = (q[asked, head] @ k[asked, head].T / scale).clamp_min(0)
            centrality = centrality + (products - products.diag().diag()).sum(1) / heads
        weights = centrality / centrality.sum().clamp_min(1.0)
        per_head = [weights @ (q[asked, head] @ k[is_visual, head].T) / scale for head in range(heads)]
        return torch.stack(per_head).mean(0)

    def threshold(self, u: Tensor, rho: Tensor) -> Tensor:
        squashed = u.sign() * u.abs().log1p()
        descriptor = [rho.mean(), rho.std(correction=0), rho.min(), rho.max(), rho.quantile(0.25), rho.quantile(0.5)]
        descriptor += [u.mean(), u.std(correction=0), u.min(), u.max(), squashed.mean(), squashed.max()]
        name = f"model.layers.{self.config.pruning.layer}.atp.predictor.mlp"
        return 0.9 * self.linear(F.gelu(self.linear(torch.stack(descriptor), f"{name}.0")), f"{name}.2").sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return self.norm(x, "model.norm", self.config.rms_norm_eps) @ head.T

    def run(self, inputs: dict[str, Tensor], mode: str, seconds: float, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        """Everything a golden folder holds of a mode; ``wanted`` are the weights whose gradients it holds."""
        config, ids = self.config, inputs["input_ids"][0]
        grid: Grid = tuple(inputs["grid_thw"][0].tolist())
        is_visual, asked = inputs["vision_mask"][0].bool(), inputs["question_mask"][0].bool()
        positions, visual = self.positions(ids, grid, seconds), self.vision(inputs["pixel_values"], grid)
        embedded = self.w["model.embed_tokens.weight"][ids].masked_scatter(is_visual[:, None], visual)
        h = embedded
        for index in range(config.pruning.layer + 1):
            h, q, k = self.layer(h, index, positions)
        u = self.scores(q, k, asked, is_visual).detach()
        rho = (u - u.min()) / (u.max() - u.min() + 1e-8)
        theta = self.threshold(u, rho)
        p = torch.sigmoid((rho - theta) / 0.2)
        is_kept = (rho > theta) ^ (mode == "flip") if mode not in ("warmup", "soft") else torch.ones_like(u).bool()
        rows = ~is_visual
        rows[is_visual.nonzero().flatten()[is_kept]] = True
        scale = torch.ones(len(ids)).masked_scatter(is_visual, p) if mode == "soft" else torch.ones(len(ids))
        # The packed rows are a leaf of their own, so that the gradient that arrives there can be looked at.
        packed_in = (h * scale[:, None])[rows]
        packed = packed_in.detach().requires_grad_()
        x, at = packed, positions[:, rows]
        for index in range(config.pruning.layer + 1, config.num_hidden_layers):
            x, _, _ = self.layer(x, index, at)
        logits = self.logits(x)
        labels = inputs["labels"][0][rows]
        predicted, targets = logits[:-1][labels[1:] >= 0], labels[1:][labels[1:] >= 0]
        answer = F.cross_entropy(predicted, targets)
        band = (0.3 - p.mean()).clamp_min(0) + (p.mean() - 0.8).clamp_min(0)
        log_p = predicted.log_softmax(-1)
        own = answer
        if mode == "robust":
            own = (log_p.exp() * log_p).sum(-1).mean()
        if mode == "flip":
            own = -(1 - log_p.exp()[torch.arange(len(targets)), targets] + 1e-6).log().mean()
        has_band, has_answer = mode in ("soft", "hard", "hard_strict"), mode not in ("robust", "flip")
        result = {
            "position_ids": positions[:, None],
            "visual_embeds": visual,
            "q": q.transpose(0, 1)[None],
            "k": k.transpose(0, 1)[None],
            "u": u[None],
            "theta": theta[None],
            "delta": (rho - theta)[None],
            "p_full": torch.zeros(len(ids)).masked_scatter(is_visual, p)[None],
            "h": h[None],
            "logits": logits[None],
            "loss": own + band if has_band else own,
            "mllm_loss": answer if has_answer else NAN,
            "band_loss": band if has_band else NAN,
        }
        if mode == "eval":
            return result
        (g,) = torch.autograd.grad(own, packed, retain_graph=True)
        sources = {"inputs_embeds": embedded} | {name: self.w[name] for name in wanted}
        outputs, arriving = [own, packed_in], [torch.ones(()), g]
        if has_band:
            outputs, arriving = [*outputs, band], [*arriving, torch.ones(())]
        if mode in ("hard", "hard_strict"):
            surrogate = surrogate_gradient(
                h[is_visual], g, is_visual[rows], is_kept, p, "paper" if mode == "hard" else ""
            )
            outputs, arriving = [*outputs, p], [*arriving, surrogate]
        found = torch.autograd.grad(outputs, list(sources.values()), arriving, allow_unused=True)
        for (name, source), gradient in zip(sources.items(), found, strict=True):
            lifted = torch.full_like(source, math.nan) if gradient is None else gradient
            result[f"grad.{name}"] = lifted[None] if name == "inputs_embeds" else lifted
        return result


def surrogate_gradient(x: Tensor, g: Tensor, is_visual: Tensor, is_kept: Tensor, p: Tensor, rule: str) -> Tensor:
    """The surrogate gradient [N] token by token: x [N, D] visual rows, g [R, D] gradient of the packed rows."""
    arrived = torch.zeros_like(x)
    arrived[is_kept] = g[is_visual]
    a, m = (x * arrived).sum(1), (x * arrived).abs().sum(1)
    a = a if rule == "paper" else -a
    z = ((a - a.mean()) / a.std(correction=0).clamp_min(3e-3)).clamp(-1.5, 1.5)
    direction = 0.5 - (0.5 + 0.5 * z.tanh())
    if rule == "paper":
        direction = direction - direction.mean()
    size = (m / m.mean().clamp_min(1e-6)).clamp(0.5, 2.0)
    return (0.8 * direction * size * (p * (1 - p)).clamp_min(5e-3)).detach()


def prompt(config: PhotonConfig, grid: Grid, num_question: int, num_answer: int, seed: int) -> dict[str, Tensor]:
    """Inputs of a sample: a system turn, a volume, a question and its answer."""
    generator = torch.Generator().manual_seed(seed)
    num_visual = grid[0] * grid[1] * grid[2] // 4

    def words(count: int) -> list[int]:
        return torch.randint(36, (count,), generator=generator).tolist()

    end, answer = config.eos_token_id, words(num_answer)
    before = [*words(3), end, *words(2), config.vision_start_token_id]
    visual = [config.video_token_id] * num_visual
    asked, after = words(num_question), [end, *words(2)]
    ids = [*before, *visual, config.vision_end_token_id, *asked, *after, *answer, end]
    labels = [-100] * (len(ids) - num_answer - 1) + [*answer, end]
    first = len(before) + num_visual + 1
    places = torch.arange(len(ids))
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "pixel_values": torch.rand(num_visual * 4, config.vision.patch_voxels, generator=generator),
        "grid_thw": torch.tensor([grid]),
        "vision_mask": (torch.tensor([ids]) == config.video_token_id).byte(),
        "question_mask": ((places >= first) & (places < first + num_question))[None].byte(),
    }


@dataclasses.dataclass(frozen=True)
class Folder:
    """A golden folder of a random model."""

    config: PhotonConfig
    grids: tuple[Grid, ...]
    seconds: float = 1.0
    modes: tuple[str, ...] = MODES

    def write(self, path: Path) -> Path:
        model = micro_model(self.config, seed=3)
        with torch.no_grad():  # far from its start, or hardly a gradient arrives at the threshold network
            for name, parameter in model.model.predictor.named_parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        write_model(model, path)
        dense = Dense(self.config, dict(model.named_parameters()))
        layer = self.config.pruning.layer
        wanted = (
            "visual.vision_patch_embed.proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.embed_tokens.weight",
            f"model.layers.{layer}.atp.predictor.mlp.0.weight",
            f"model.layers.{layer}.atp.predictor.mlp.2.bias",
            f"model.layers.{self.config.num_hidden_layers - 1}.mlp.down_proj.weight",
        ) + (() if self.config.tie_word_embeddings else ("lm_head.weight",))
        tensors: dict[str, Tensor] = {}
        for number, grid in enumerate(self.grids):
            name = f"patient.{number}"
            inputs = prompt(self.config, grid, 4 + number, 2 + number, seed=number)
            tensors |= {f"{name}.{key}": value for key, value in inputs.items()}
            for mode in self.modes:
                values = dense.run(inputs, mode, self.seconds, wanted)
                tensors |= {f"{name}.{mode}.{key}": value for key, value in values.items()}
        save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, path / CASES)
        return path


def sizes(heads: int, key_heads: int, *, pruning: dict[str, object] | None = None, **changes: object) -> PhotonConfig:
    """A configuration of other head counts: 8 numbers a head in decoder and tower."""
    width = 8 * heads
    vision = {"hidden_size": 24, "num_heads": 3, "out_hidden_size": width}
    heads_of = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    return micro_config(vision=vision, pruning=pruning, **heads_of | changes)


# Windows are 4 x 4 patches: grids of 6 x 10 and 4 x 6 patches cut them short.
FOLDERS = {
    "six heads, untied": Folder(sizes(6, 3, tie_word_embeddings=False), ((2, 6, 10), (1, 4, 6), (3, 4, 4))),
    "one key head": Folder(sizes(4, 1, pruning={"layer": 2}, num_hidden_layers=8), ((2, 6, 6),)),
    "no shared keys, other seconds": Folder(sizes(2, 2, pruning={"layer": 0}), ((3, 2, 6),), seconds=14.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: folder.write(tmp_path_factory.mktemp("golden")) for name, folder in FOLDERS.items()}


def failed(rows: list[ParityRow]) -> list[tuple[str, str, str]]:
    return [(row.sample, row.mode, row.quantity) for row in rows if not row.holds]


@pytest.mark.parametrize("name", FOLDERS)
def test_any_folder_of_the_layout_holds(folders: dict[str, Path], name: str) -> None:
    folder, path = FOLDERS[name], folders[name]
    rows = check_parity(path, path / CASES, seconds_per_grid=folder.seconds)
    assert not failed(rows)
    tensors = load_tensors(path / CASES)
    num_inputs = 4 * len(folder.grids)
    assert len(rows) == len(tensors) - num_inputs + len(MODES) * len(folder.grids)
    errors = largest_errors(rows)
    assert 0 < errors["forward"] < 2e-5 and 0 < errors["gradient"] < 2e-4
    kept = [tensors[f"patient.{number}.hard.delta"] > 0 for number in range(len(folder.grids))]
    assert any(0 < int(part.sum()) < part.numel() for part in kept)


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A cases file with something changed."""
    tensors = {name: value.clone() for name, value in load_tensors(folder / CASES).items()}
    change(tensors)
    save_file(tensors, target / CASES)
    return target / CASES


def without(*keep: str) -> Callable[[dict[str, Tensor]], None]:
    """Drop every output but those whose name contains one of ``keep``."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            is_input = name.count(".") == 2
            if not is_input and not any(part in name for part in keep):
                del tensors[name]

    return change


def test_shards_under_the_newer_names_hold_too(tmp_path: Path) -> None:
    def newer(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    write_model(read_model(GOLDEN), tmp_path, max_shard_bytes=2**20)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 2
    for file in set(index["weight_map"].values()):
        save_file({newer(name): value for name, value in load_tensors(tmp_path / file).items()}, tmp_path / file)
    index["weight_map"] = {newer(name): file for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    cases = {}
    for name, value in load_tensors(GOLDEN / CASES).items():
        before, is_gradient, weight = name.partition(".grad.")
        is_weight = is_gradient and weight != "inputs_embeds"
        cases[f"{before}.grad.{newer(weight)}" if is_weight else name] = value
    assert any("grad.model.visual." in name for name in cases)
    save_file(cases, tmp_path / CASES)
    assert not failed(check_parity(tmp_path, tmp_path / CASES))


def test_seconds_per_grid_may_stand_in_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    path = folders["no shared keys, other seconds"]
    wrong = failed(check_parity(path, path / CASES))
    assert ("patient.0", "eval", "position_ids") in wrong
    seconds = torch.tensor([14.0])
    cases = changed(path, tmp_path, lambda tensors: tensors.update({"patient.0.second_per_grid_ts": seconds}))
    assert not failed(check_parity(path, cases))


def test_samples_may_have_some_modes_and_modes_some_quantities(folders: dict[str, Path], tmp_path: Path) -> None:
    path = folders["six heads, untied"]
    keep = ("patient.0.soft.u", "patient.1.hard.grad.lm_head", "patient.1.eval.loss", "patient.2.eval.delta")
    rows = check_parity(path, changed(path, tmp_path, without(*keep)))
    assert not failed(rows)
    assert {(row.sample, row.mode, row.quantity) for row in rows if row.mode} == {
        ("patient.0", "soft", "u"),
        ("patient.1", "hard", "grad.lm_head.weight"),
        ("patient.1", "eval", "loss"),
        ("patient.2", "eval", "delta"),
        ("patient.2", "eval", KEPT_SET),  # the others have no delta, which alone tells a kept set
    }


@pytest.mark.parametrize(
    "name",
    ["patient.0.eval.attention", "patient.0.eval.grad.lm_head.weight", "patient.0.shout.u", "patient.0.hard.grad.none",
     "patient.0.note", "other.u", "sgp.more", "band.delta2.0", "bandwidth"],
)  # fmt: skip
def test_what_nobody_knows_is_not_skipped(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = folders["one key head"]
    operator = {key: value for key, value in load_tensors(GOLDEN / CASES).items() if key.startswith("sgp.")}
    extra = {name: torch.ones(2, 2)} | (operator if name.startswith("sgp.") else {})

    def change(tensors: dict[str, Tensor]) -> None:
        without("patient.0.eval.u")(tensors)
        tensors |= extra

    rows = [row for row in check_parity(path, changed(path, tmp_path, change)) if not row.holds]
    assert len(rows) == 1 and name.endswith(rows[0].quantity) and rows[0].note.startswith("not checked")


def golden_with(tmp_path: Path, name: str, place: int, value: Callable[[Tensor], object]) -> list[ParityRow]:
    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[place] = value(flat[place])

    return [row for row in check_parity(GOLDEN, changed(GOLDEN, tmp_path, change)) if not row.holds]


@pytest.mark.parametrize(
    "name",
    ["s0.eval.u", "s1.hard.logits", "s0.soft.grad.inputs_embeds", "s1.flip.loss", "s0.robust.h", "s0.warmup.q",
     "s0.hard_strict.grad.model.layers.1.atp.predictor.mlp.2.bias", "s1.soft.band_loss", "s0.eval.position_ids",
     "s0.question_mask", "s1.vision_mask", "sgp.y", "sgp.grad_p", "sgp_strict.grad_x", "band.loss1.0"],
)  # fmt: skip
def test_one_wrong_number_fails_its_row_alone(tmp_path: Path, name: str) -> None:
    largest = float(load_tensors(GOLDEN / CASES)[name].double().abs().max())
    is_mask = name.endswith("mask")
    step = 1 if is_mask or "position" in name else 0.02 * largest + 1e-4
    rows = golden_with(tmp_path, name, -1, lambda value: value + step)
    assert [f"{r.sample}.{r.mode}.{r.quantity}".replace("..", ".") for r in rows] == [name]
    assert rows[0].tolerance is None if is_mask else rows[0].error > rows[0].tolerance


def test_a_token_on_the_other_side_of_the_threshold_is_another_kept_set(tmp_path: Path) -> None:
    delta = load_tensors(GOLDEN / CASES)["s0.hard.delta"]
    place = int(delta.abs().argmin())
    rows = golden_with(tmp_path, "s0.hard.delta", place, lambda value: -value)
    assert (KEPT_SET, None) in [(row.quantity, row.error) for row in rows]
    assert {(row.sample, row.mode) for row in rows} == {("s0", "hard")}


@pytest.mark.parametrize(
    ("name", "holds"),
    [("s0.robust.mllm_loss", True), ("s0.hard.mllm_loss", False), ("s0.hard.band_loss", False),
     ("s0.eval.loss", False), ("s0.flip.u", False), ("s0.soft.grad.model.layers.1.atp.predictor.mlp.2.bias", False),
     ("s0.flip.grad.model.layers.1.atp.predictor.mlp.2.bias", True), ("sgp.y", False), ("band.loss0.0", False)],
)  # fmt: skip
def test_nan_is_accepted_where_there_is_no_number_and_only_there(tmp_path: Path, name: str, holds: bool) -> None:
    cases = changed(GOLDEN, tmp_path, lambda tensors: tensors[name].fill_(math.nan))
    assert failed(check_parity(GOLDEN, cases)) == ([] if holds else [tuple_of(name)])


def tuple_of(name: str) -> tuple[str, str, str]:
    sample, rest = name.split(".", 1)
    if sample not in ("s0", "s1"):
        return sample, "", rest
    mode, quantity = rest.split(".", 1)
    return sample, mode, quantity


def test_one_nan_among_numbers_fails(tmp_path: Path) -> None:
    rows = golden_with(tmp_path, "s0.flip.grad.inputs_embeds", 7, lambda value: value * math.nan)
    assert [(row.quantity, row.error) for row in rows] == [("grad.inputs_embeds", math.inf)]


def test_another_shape_is_told(tmp_path: Path) -> None:
    cases = changed(GOLDEN, tmp_path, lambda t: t.update({"s0.eval.logits": t["s0.eval.logits"][:, 1:].clone()}))
    (row,) = [row for row in check_parity(GOLDEN, cases) if not row.holds]
    assert row.error == math.inf and row.note == "shape (1, 59, 320), not (1, 58, 320)"


def wrong_files(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        "no sample": {"weight": torch.ones(2)},
        "has no pixel_values": {n: t for n, t in tensors.items() if n != "s0.pixel_values"},
        "has patches": tensors | {"s0.pixel_values": tensors["s0.pixel_values"][1:]},
        "token ids": tensors | {"s1.input_ids": tensors["s1.input_ids"] + 1000},
        "fit neither": tensors | {"s1.labels": tensors["s1.labels"][:, 1:]},
        "operator sgp has no p": {n: t for n, t in tensors.items() if n != "sgp.p"},
        "operator sgp do not fit": tensors | {"sgp.p": tensors["sgp.p"][:, 1:]},
        "grad_out": tensors | {"sgp.grad_out": tensors["sgp.grad_out"][:, 1:]},
        "second_per_grid_ts of the sample s0 is not one number": tensors
        | {"s0.second_per_grid_ts": torch.tensor([1.0, 2.0])},
        "sample s1 has no output": {n: t for n, t in tensors.items() if not n.startswith("s1.") or n.count(".") == 1},
        "operator sgp has no output": {
            n: t for n, t in tensors.items() if n not in ("sgp.y", "sgp.grad_x", "sgp.grad_p")
        },
    }


@pytest.mark.parametrize("fact", list(wrong_files(load_tensors(GOLDEN / CASES))))
def test_cases_that_cannot_be_run_are_refused(tmp_path: Path, fact: str) -> None:
    content = wrong_files(load_tensors(GOLDEN / CASES))[fact]
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, tmp_path / CASES)
    with pytest.raises(PhotonError, match=fact) as caught:
        check_parity(GOLDEN, tmp_path / CASES)
    assert caught.value.code == "CASES_INVALID" and str(tmp_path / CASES) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("grid_thw", torch.tensor(grid)) for grid in (1, [2, 6, 4], [[2, 6]], [[2, 6, 4, 1]], [[[2, 6, 4]]])),
        *(
            ("grid_thw", torch.tensor(grid))
            for grid in ([[2, 6, -4]], [[0, 6, 4]], [[2.0, 6.0, 4.0]], [[math.nan] * 3])
        ),
        *(("second_per_grid_ts", torch.tensor(seconds)) for seconds in ([math.nan], [math.inf], -math.inf, [-1.0], [])),
    ],
)
def test_malformed_sizes_and_seconds_are_refused(tmp_path: Path, name: str, value: Tensor) -> None:
    cases = changed(GOLDEN, tmp_path, lambda tensors: tensors.update({f"s0.{name}": value}))
    with pytest.raises(PhotonError, match=f"{name} of the sample s0 is no") as caught:
        check_parity(GOLDEN, cases)
    assert caught.value.code == "CASES_INVALID"


@pytest.mark.parametrize("content", [None, b"", b"half a file"])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / CASES).write_bytes(content)
    with pytest.raises(PhotonError) as caught:
        check_parity(GOLDEN, tmp_path / CASES)
    assert caught.value.code == "CASES_INVALID"
    with pytest.raises(PhotonError) as caught:
        check_parity(tmp_path, GOLDEN / CASES)
    assert caught.value.code == "CHECKPOINT_MISSING"


def test_the_checkpoint_decides(tmp_path: Path) -> None:
    """Another weight, other numbers: nothing is read from the golden side that should be computed."""
    content = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content))
    weights = load_tensors(GOLDEN / "model.safetensors")
    weights["model.layers.5.mlp.up_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "model.safetensors")
    wrong = failed(check_parity(tmp_path, GOLDEN / CASES))
    assert ("s0", "eval", "logits") in wrong and ("s0", "eval", "u") not in wrong
