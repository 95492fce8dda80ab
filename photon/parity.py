"""Parity: the model against the numbers of a golden folder, quantity by quantity.

Every tensor of the folder's cases becomes a row of the result. One that nobody here knows becomes a row that does not
hold, so nothing goes unchecked unnoticed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from photon import golden, objectives
from photon.checkpoint import read_model
from photon.golden import MODES, GoldenSample, Tensors, invalid_cases
from photon.model.decoder import QueryKeyValue
from photon.model.network import Output, Photon
from photon.model.packing import PackedBatch
from photon.model.pruning import EncodedRows
from photon.ops.layout import Layout
from photon.ops.selection.op import select_rows
from photon.ops.surrogate.op import pack
from photon.scheduling import Schedule
from photon.training.step import TrainingBatch, compute_loss
from photon.weights import public_name

FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
LOSS_FLOOR = 1e-2
"""A loss below this is measured against it: it is the difference of numbers near one, known to their rounding."""
LOSSES = ("loss", "mllm_loss", "band_loss")
KEPT_SET = "kept set"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One golden quantity and how far ours is from it.

    Attributes:
        sample: name of the sample; "sgp", "sgp_strict" or "band" for the operator and the keep band.
        mode: one of :data:`photon.golden.MODES`; "" for what belongs to no mode.
        quantity: name of the tensor, or :data:`KEPT_SET`.
        error: largest difference over the largest golden number (of a loss, over at least :data:`LOSS_FLOOR`),
            infinite where shapes differ or a number is not finite; None for what is equal or is not.
        tolerance: how large the error may be, 0 for whole numbers; None where there is no error.
        holds: whether ours is the golden one.
        note: what else a reader has to know; mostly "".
    """

    sample: str
    mode: str
    quantity: str
    holds: bool
    error: float | None = None
    tolerance: float | None = None
    note: str = ""


def check_parity(folder: Path, cases: Path, *, seconds_per_grid: float = 1.0) -> list[ParityRow]:
    """Run the model of a golden folder on its cases, in float32 on the CPU.

    Args:
        folder: checkpoint folder (config.json and weights).
        cases: safetensors file of inputs and golden outputs.
        seconds_per_grid: depth positions advance by tokens_per_second times this, unless a sample has its own
            ``second_per_grid_ts``.

    Returns:
        A row for every golden tensor that is no input or that is a mask, and one for the kept set of every mode that
        has a ``delta``: its signs are the kept set, and without it there is none to compare.

    Raises:
        PhotonError: ``CASES_INVALID`` when the cases are missing, damaged, of another layout or for another model, or
            when a sample has nothing to compare; whatever reading the checkpoint raises.
    """
    content = golden.read_cases(cases)
    model = read_model(folder).float().requires_grad_(True)
    rows = [_unchecked(sample, "", name) for sample, name in content.unknown]
    for sample in content.samples:
        seconds = golden.seconds_per_grid(sample, seconds_per_grid, cases)
        rows += _sample_rows(_with_pruning(model, seconds_per_grid=seconds), sample, cases)
    for name, tensors in content.operators.items():
        rows += _operator_rows(name, tensors, cases)
    rows += _band_rows(model, content.band)
    return rows


def largest_errors(rows: Sequence[ParityRow]) -> dict[str, float]:
    """Largest error of the forward values and of the gradients; 0 where there is none."""
    return {
        kind: max((row.error for row in rows if row.error is not None and row.tolerance == tolerance), default=0.0)
        for kind, tolerance in (("forward", FORWARD_TOLERANCE), ("gradient", GRADIENT_TOLERANCE))
    }


def _with_pruning(model: Photon, **changes: float | str) -> Photon:
    """The model, with the same parameters, under a changed pruning configuration."""
    pruning = dataclasses.replace(model.config.pruning, **changes)  # type: ignore[arg-type]
    with torch.device("meta"):
        twin = Photon(dataclasses.replace(model.config, pruning=pruning))
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return twin.eval()


def _sample_rows(model: Photon, sample: GoldenSample, path: Path) -> Iterator[ParityRow]:
    batch = golden.batch_of(sample, model.config, path)
    yield from _mask_rows(sample, batch)
    visual = [torch.zeros(0, model.config.hidden_size)]
    states: list[QueryKeyValue] = []
    attention = model.model.layers[model.config.pruning.layer].get_submodule("self_attn")
    hooks = [
        model.visual.register_forward_hook(lambda _module, _arguments, tokens: visual.append(tokens)),
        attention.register_forward_hook(lambda _module, _arguments, result: states.append(result[1])),
    ]
    with torch.no_grad():
        early = model.encode_contexts(batch, model.config.pruning.layer + 1)
    for hook in hooks:
        hook.remove()
    for mode in MODES:
        if mode not in sample.outputs:
            continue
        theirs = sample.outputs[mode]
        output = _forward(model, batch, early, mode)
        ours = {"visual_embeds": visual[-1], **_forward_values(model, batch, early, states[0], output)}
        if MODES[mode].stage is not None:
            ours |= _training_values(model, batch, mode, theirs)
        yield from _mode_rows(sample.name, mode, theirs, ours)
        if "delta" in theirs and output.schedule is not None:
            yield _kept_row(sample.name, mode, theirs["delta"].flatten() > 0, output, output.schedule)


def _mask_rows(sample: GoldenSample, batch: PackedBatch) -> Iterator[ParityRow]:
    """Where the visual and the question tokens are. A prompt without a volume asks no volume."""
    before = torch.zeros(batch.context_ids.shape[0], dtype=torch.bool)
    place = torch.arange(batch.branch_ids.shape[0])
    is_question = (place < batch.layout.question_lengths[0]) & bool(batch.grids)
    ours = {
        "vision_mask": torch.cat([before.index_fill(0, batch.visual_rows, True), is_question & False]),
        "question_mask": torch.cat([before, is_question]),
    }
    for name in golden.MASKS:
        if name in sample.inputs:
            holds = torch.equal(ours[name], sample.inputs[name].flatten().bool())
            yield ParityRow(sample=sample.name, mode="", quantity=name, holds=holds)


@torch.no_grad()
def _forward(model: Photon, batch: PackedBatch, early: EncodedRows, mode: str) -> Output:
    if MODES[mode].forward == "full":
        return model(batch, "full")
    flip = torch.tensor([True]) if mode == "flip" else None
    return model.run_branches(batch, early, MODES[mode].forward, flip=flip)


@torch.no_grad()
def _forward_values(
    model: Photon, batch: PackedBatch, early: EncodedRows, shared: QueryKeyValue, output: Output
) -> dict[str, Tensor]:
    """Our numbers in the golden layout, as far as they need no training; ``shared`` is of the pruning layer."""
    is_shared = output.selection is None
    hidden = torch.cat([output.context.hidden, output.hidden]) if is_shared else output.hidden
    rows, targets, branch = objectives.answer_targets(batch)
    answer = objectives.answer_loss(model.logits(output.hidden[output.branch_rows[rows]]), targets)
    answer = objectives.mean_by_branch(answer, branch, 1)[0]
    own_hidden, own = output.pruning_layer
    share = model.config.num_attention_heads // model.config.num_key_value_heads
    values = {
        "position_ids": torch.cat([batch.context_positions, batch.branch_positions], dim=1)[:, None],
        "q": torch.cat([shared.q, own.q]).transpose(0, 1)[None],
        "k": torch.cat([shared.k, own.k]).repeat_interleave(share, 1).transpose(0, 1)[None],
        "h": torch.cat([early.hidden, own_hidden])[None],
        "logits": model.logits(hidden)[None],
        "mllm_loss": answer,
        "loss": answer,
    }
    decision = output.schedule
    if decision is None:
        return values
    p = torch.zeros(batch.context_ids.shape[0] + batch.branch_ids.shape[0])
    return values | {
        "u": decision.u[decision.valid][None],
        "theta": decision.theta[None],
        "delta": (decision.rho - decision.theta[:, None])[decision.valid][None],
        "p_full": p.index_copy(0, batch.visual_rows, decision.p[decision.valid])[None],
        "band_loss": objectives.keep_band_loss(decision, model.config.pruning.keep_band).mean(),
    }


def _training_values(model: Photon, batch: PackedBatch, mode: str, theirs: Tensors) -> dict[str, Tensor]:
    """The training loss of a mode and those of its gradients that are asked for; zeros where nothing arrives."""
    stage = MODES[mode].stage
    assert stage is not None
    model = _with_pruning(model, sgp_rule=MODES[mode].rule)
    inputs: list[Tensor] = []

    def keep_inputs(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])

    model.model.layers[0].register_forward_pre_hook(keep_inputs)
    item = TrainingBatch(batch, torch.tensor([mode == "robust"]), torch.tensor([mode == "flip"]))
    loss = compute_loss(model, item, stage).loss
    parameters = {f"grad.{name}": parameter for name, parameter in model.named_parameters()}
    names = {name: f"grad.{public_name(name.removeprefix('grad.'))}" for name in theirs if name.startswith("grad.")}
    names = {name: public for name, public in names.items() if public in parameters}
    sources = [*(parameters[public] for public in names.values()), *inputs]
    found = torch.autograd.grad(loss, sources, allow_unused=True)
    arrived = [torch.zeros_like(x) if g is None else g for x, g in zip(sources, found, strict=True)]
    of_inputs = torch.cat(arrived[len(names) :])[None]
    return {"loss": loss.detach(), "grad.inputs_embeds": of_inputs, **dict(zip(names, arrived, strict=False))}


def _mode_rows(sample: str, mode: str, theirs: Tensors, ours: Tensors) -> Iterator[ParityRow]:
    for name, value in theirs.items():
        is_gradient = name.startswith("grad.")
        if name not in ours:
            yield _unchecked(sample, mode, name)
        elif value.numel() and value.isnan().all():
            # The layout writes NaN for a loss that a mode does not have and for a tensor that gets no gradient.
            holds = name in MODES[mode].absent or (is_gradient and not bool(ours[name].any()))
            note = "none" if holds else "none there, but here is one"
            yield ParityRow(sample=sample, mode=mode, quantity=name, holds=holds, note=note)
        else:
            tolerance = GRADIENT_TOLERANCE if is_gradient else FORWARD_TOLERANCE
            floor = LOSS_FLOOR if name in LOSSES else 0.0
            yield _distance_row(sample, mode, name, ours[name], value, tolerance=tolerance, floor=floor)


def _kept_row(sample: str, mode: str, kept: Tensor, output: Output, decision: Schedule) -> ParityRow:
    """Whether the tokens decided for, and those that went on to the later layers, are the golden ones [N]."""
    holds = torch.equal(decision.keep[decision.valid], kept)
    if output.selection is not None and MODES[mode].forward == "hard":
        slots = output.selection.slots
        gone_on = torch.zeros(decision.valid.numel(), dtype=torch.bool).index_fill(0, slots[slots >= 0], True)
        gone_on = gone_on.view_as(decision.valid)[decision.valid]
        holds = holds and torch.equal(gone_on, ~kept if mode == "flip" else kept)
    note = f"{int(kept.sum())} of {kept.numel()}"
    return ParityRow(sample=sample, mode=mode, quantity=KEPT_SET, holds=holds, note=note)


def _operator_rows(name: str, tensors: dict[str, Tensor], path: Path) -> Iterator[ParityRow]:
    """The packing operator alone on ragged rows: x [B, L, D]; p and masks [B, L]; y and grad_out [B, R, D]."""
    x, p, grad_out = (tensors[key].float() for key in ("x", "p", "grad_out"))
    is_visual, presence = tensors["vision_mask"].bool(), tensors["presence"].bool()
    if not x.shape[:2] == p.shape == is_visual.shape == presence.shape:
        raise invalid_cases(path, f"the inputs of the operator {name} do not fit together.")
    taken = presence | ~is_visual
    if grad_out.shape != (len(x), int(taken.sum(1).max()), x.shape[-1]):
        raise invalid_cases(path, f"grad_out of the operator {name} does not fit what is kept.")
    # Each row of the cases is a context. Its visual tokens may stand anywhere between the text, and ours in one piece:
    # rows change places on the way in and back on the way out.
    order = torch.cat([torch.argsort(~row, stable=True) + n * x.shape[1] for n, row in enumerate(is_visual)])
    nothing = [0] * len(x)
    volumes = [[(0, count)] for count in is_visual.sum(1).tolist()]
    layout = Layout.build([x.shape[1]] * len(x), volumes, nothing, nothing, range(len(x)))
    valid = torch.arange(layout.num_columns) < layout.pair_lengths[:, None]
    dense = torch.zeros(valid.shape).masked_scatter(valid, p[is_visual]).requires_grad_()
    keep = torch.zeros(valid.shape, dtype=torch.bool).masked_scatter(valid, presence[is_visual])
    selection = select_rows(keep, layout)
    back = torch.argsort(order[selection.rows])
    is_real = torch.arange(grad_out.shape[1]) < selection.lengths[:, None]

    flat = x.flatten(0, 1).requires_grad_()
    nobody = flat.new_zeros(0, x.shape[-1])
    out = pack(flat[order], nobody, dense, selection, layout, rule=golden.OPERATORS[name])[back]
    grad_x, grad_p = torch.autograd.grad(out, (flat, dense), grad_out[is_real])
    ours = {
        "y": torch.zeros(grad_out.shape).masked_scatter(is_real[:, :, None], out.detach()),
        "grad_x": grad_x.view_as(x),
        "grad_p": torch.zeros(p.shape).masked_scatter(is_visual, grad_p[valid]),
    }
    for quantity in sorted(tensors.keys() - set(golden.OPERATOR_INPUTS)):
        if quantity in ours:
            tolerance = FORWARD_TOLERANCE if quantity == "y" else GRADIENT_TOLERANCE
            yield _distance_row(name, "", quantity, ours[quantity], tensors[quantity], tolerance=tolerance)
        else:
            yield _unchecked(name, "", quantity)


def _band_rows(model: Photon, tensors: dict[str, Tensor]) -> Iterator[ParityRow]:
    """The keep band of probabilities made from given differences ``rho - theta`` [B, N]."""
    pruning = model.config.pruning
    for name, delta in tensors.items():
        is_delta = name.startswith(golden.BAND_DELTA)
        partner = name.replace(golden.BAND_DELTA, golden.BAND_LOSS) if is_delta else ""
        if is_delta and partner in tensors:
            p, zero = torch.sigmoid(delta / pruning.temperature), torch.zeros(len(delta))
            everywhere = torch.ones_like(delta, dtype=torch.bool)
            decision = Schedule(delta, delta, zero, p, delta > 0, everywhere, torch.arange(len(delta)))
            ours = objectives.keep_band_loss(decision, pruning.keep_band).mean()
            quantity = partner.removeprefix("band.")
            yield _distance_row(
                "band", "", quantity, ours, tensors[partner], tolerance=FORWARD_TOLERANCE, floor=LOSS_FLOOR
            )
        elif is_delta or name.replace(golden.BAND_LOSS, golden.BAND_DELTA) not in tensors:
            yield _unchecked("band", "", name.removeprefix("band."))


def _distance_row(
    sample: str, mode: str, quantity: str, ours: Tensor, theirs: Tensor, *, tolerance: float, floor: float = 0.0
) -> ParityRow:
    note, error = "", math.inf
    tolerance = tolerance if theirs.is_floating_point() else 0.0
    if ours.shape != theirs.shape:
        note = f"shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    elif theirs.numel() == 0:
        error = 0.0
    else:
        scale = theirs.double().abs().max().clamp_min(max(floor, 1e-12))
        error = float((ours.double() - theirs.double()).abs().max() / scale)
        if not math.isfinite(error):
            note, error = "a number is not finite", math.inf
    holds = error <= tolerance
    return ParityRow(
        sample=sample, mode=mode, quantity=quantity, holds=holds, error=error, tolerance=tolerance, note=note
    )


def _unchecked(sample: str, mode: str, quantity: str) -> ParityRow:
    return ParityRow(sample=sample, mode=mode, quantity=quantity, holds=False, note="not checked: unknown here")
