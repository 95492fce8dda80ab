"""Everything on a GPU gives what it gives on the CPU, and nothing is forgotten on the wrong one.

Without a GPU there is a pretended one: tensors that say they are on it, and complain when an operation mixes them with
others. It computes on the CPU, so its results are equal to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from photon.checkpoint import WEIGHTS, load_tensors, read_model, read_pretrained, save_tensors, write_model
from photon.decoding import build_cache, decode_step
from photon.device import choose_device, column
from photon.errors import PhotonError
from photon.generate import ask, decode, encode_scan, generate, last_rows
from photon.likelihood import option_log_likelihoods
from photon.model.contexts import without_empty_tokens
from photon.model.network import Photon
from photon.model.pruning import Mode
from photon.ops import compaction, saliency, schedule, selection
from photon.sampling import Generated, Sampling
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.loop import StepReport, Trainer
from photon.training.optimiser import OptimiserConfig
from photon.training.perturb import KINDS, perturb
from photon.training.pretrain import NamingBatch, NamingConfig, pretrain_vision
from photon.training.stages import Stage, StageSchedule
from photon.training.step import StepResult, TrainingBatch, compute_loss

GPU = torch.device("cuda", 0)
FACTORIES = (
    *(torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint),
    *(torch.randn, torch.randperm, torch.tensor, torch.zeros),
    *(torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.zeros_like),
    *(Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros),
)


WAITING = (
    *(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default),
    *(torch.ops.aten.masked_select.default, torch.ops.aten.unique_consecutive.default, torch.ops.aten._unique2.default),
    torch.ops.aten.repeat_interleave.Tensor,
)
"""Operations whose result, or its size, has to be known by the host."""
waits: list[str] = []
"""What made the host wait for the pretended GPU."""


class Pretended(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        wrapper: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING and (kwargs or {}).get("output_size") is None:
            waits.append(str(func))
        indices = args[1] if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default) else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            waits.append(str(func))
        return run_held(func, args, kwargs or {})


def held_by(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def run_held(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what its tensors hold; refuse tensors of two devices, numbers on the CPU excepted."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.ndim]
    if strangers and func is not torch.ops.aten.copy_.default:
        raise AssertionError(f"{func} mixes devices: {[(type(t).__name__, tuple(t.shape)) for t in tensors]}")
    out = func(*tree_map(held_by, args), **tree_map(held_by, kwargs))
    if func._schema.is_mutable:
        return args[0]
    return tree_map(lambda value: Pretended(value) if isinstance(value, Tensor) else value, out)


class PretendGPU(TorchFunctionMode):
    """While active there seems to be a GPU: `device="cuda"` and `.to("cuda")` give pretended tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        is_pretended = isinstance(first, Pretended)
        if func == Tensor.device.__get__ and is_pretended:  # type: ignore[attr-defined]
            return GPU
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return is_pretended
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return not is_pretended
        if func == Tensor.tolist and is_pretended:
            waits.append("tolist")
            return first.held.tolist()
        if func == Tensor.pin_memory:
            return first
        if func == Tensor.cpu:
            return self._moved(first, "cpu")
        if func == Tensor.to:
            return self._moved(first, *args[1:], **kwargs)
        if kwargs.get("device") is not None and func in FACTORIES:
            device = torch.device(kwargs.pop("device"))
            if device.type == "cuda" and func == torch.tensor:
                waits.append("torch.tensor")
            made = func(*tree_map(held_by, args), **kwargs)
            return Pretended(made) if device.type == "cuda" else made
        return func(*args, **kwargs)

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` with its device, its type and a like tensor wherever they stand."""
        copy, is_waiting = bool(kwargs.pop("copy", False)), not kwargs.pop("non_blocking", False)
        is_on_gpu = isinstance(tensor, Pretended)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                is_on_gpu, tensor = isinstance(value, Pretended), tensor.type(value.dtype)
            elif isinstance(value, torch.dtype):
                tensor = tensor.type(value)
            elif isinstance(value, str | torch.device):
                is_on_gpu = torch.device(value).type == "cuda"
        tensor = tensor.clone() if copy else tensor
        if is_on_gpu == isinstance(tensor, Pretended):
            return tensor
        if is_waiting or not is_on_gpu:
            waits.append("copy")
        return Transfer.apply(tensor)


class Transfer(torch.autograd.Function):
    """To the other device, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.held.clone() if isinstance(tensor, Pretended) else Pretended(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].held.clone() if isinstance(grads[0], Pretended) else Pretended(grads[0])


@dataclasses.dataclass(frozen=True)
class Place:
    """A GPU, real or pretended, and how far results on it may be from the CPU's."""

    is_pretended: bool

    def has(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Pretended) if self.is_pretended else tensor.is_cuda

    def put(self, model: Photon) -> Photon:
        """The model there."""
        if not self.is_pretended:
            return model.to(GPU)
        # `Module.to` would keep the parameters, which are of the wrong class.
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(parameter.detach().to("cuda")))
        return model

    def agree(self, found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
        """Equal; on a real GPU within a share of the largest number."""
        found, expected = (x.detach().cpu() for x in (found, expected))
        if self.is_pretended or expected.dtype in (torch.bool, torch.long):
            return torch.equal(found, expected)
        return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()) + 1e-12

    def equals(self, expected: float, tolerance: float = 1e-4) -> Any:
        return expected if self.is_pretended else pytest.approx(expected, rel=tolerance)


needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.fixture(params=["pretended", pytest.param("real", marks=needs_gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "real":
        yield Place(is_pretended=False)
        return
    with warnings.catch_warnings(), PretendGPU():
        # torch.autocast("cuda") says that there is none.
        warnings.simplefilter("ignore")
        yield Place(is_pretended=True)


CONFIG = micro_config(vision={"empty_below": 0.02}, pruning={"min_tokens": 2})
MODES: tuple[Mode, ...] = ("full", "soft", "hard")
STAGES: tuple[Stage, ...] = ("alignment", "warm-up", "soft", "hard")


def mixed_item(*, num_answer: int = 2) -> TrainingBatch:
    """Two volumes, one volume with air that is left out, and no volume; questions of several lengths."""
    contexts = [
        random_context(CONFIG, grids, seed=n) for n, grids in enumerate(([(1, 4, 4), (2, 2, 4)], [(2, 4, 6)], []))
    ]
    contexts[1].patches[8:20] = 0.0
    contexts[1] = without_empty_tokens(contexts[1], CONFIG)
    assert contexts[1].present is not None
    places = [(0, 5), (1, 2), (1, 7), (2, 3)]
    branches = [
        random_branch(CONFIG, context, num_question=length, num_answer=num_answer, seed=length)
        for context, length in places
    ]
    return training_batch(contexts, branches, CONFIG, perturbed=[0], flipped=[2])


def test_the_pretended_gpu_notices() -> None:
    with PretendGPU():
        x = torch.arange(3, device="cuda")
        assert isinstance(x, Pretended) and x.device == GPU and x.is_cuda and not torch.arange(3).is_cuda
        assert isinstance(x + 1, Pretended) and isinstance(x.new_zeros(2), Pretended) and isinstance(x[1:], Pretended)
        assert (x.tolist(), int(x.max()), (x > 1).nonzero().tolist()) == ([0, 1, 2], 2, [[2]])
        assert (x + torch.tensor(1)).tolist() == [1, 2, 3], "a number on the CPU is allowed"
        assert type(x.cpu()) is Tensor and isinstance(torch.ones(2).to(x.device), Pretended)
        assert isinstance(torch.ones(2).to(x.float()), Pretended) and type(x.to(torch.ones(2))) is Tensor
        mistakes: tuple[Callable[[], object], ...] = (
            lambda: x + torch.arange(3),
            lambda: x[torch.tensor([0, 1])],
            lambda: torch.arange(3)[x],
            lambda: torch.cat([x, torch.zeros(1)]),
            lambda: torch.where(torch.ones(3, dtype=torch.bool), x, 0),
        )
        for mistake in mistakes:
            with pytest.raises(AssertionError, match="mixes devices"):
                mistake()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_layers", [False, True])
def test_forward(place: Place, mode: Mode, with_layers: bool) -> None:
    item = mixed_item()
    moved = item.to("cuda")
    theirs, ours = micro_model(CONFIG), place.put(micro_model(CONFIG))
    expected, found = (
        model(each.batch, mode, flip=each.is_flipped, detach=each.is_perturbed, with_layers=with_layers)
        for model, each in ((theirs, item), (ours, moved))
    )
    assert place.has(found.hidden)
    assert place.agree(found.hidden, expected.hidden)
    assert place.agree(ours.logits(found.hidden), theirs.logits(expected.hidden))
    assert place.agree(found.schedule.keep, expected.schedule.keep)
    assert place.agree(found.schedule.theta, expected.schedule.theta)
    if with_layers:
        assert all(place.agree(a.k, b.k) for a, b in zip(found.layers, expected.layers, strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_loss_and_gradients(place: Place, stage: Stage, is_checkpointed: bool) -> None:
    item, theirs, ours = mixed_item(), micro_model(CONFIG), place.put(micro_model(CONFIG))
    ours.checkpoint_activations = is_checkpointed
    expected, found = compute_loss(theirs, item, stage), compute_loss(ours, item.to("cuda"), stage)
    expected.loss.backward()
    found.loss.backward()
    for name, value in dataclasses.asdict(dataclasses.replace(found, loss=found.loss.detach().cpu())).items():
        assert float(value) == place.equals(float(getattr(expected, name))), name
    for (name, mine), parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (parameter.grad is None), name
        assert mine.grad is None or parameter.grad is None or place.agree(mine.grad, parameter.grad, 1e-3), name


@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.7, top_k=8, top_p=0.9)])
def test_answers(place: Place, keep_all: bool, sampling: Sampling | None) -> None:
    item, theirs, ours = mixed_item(num_answer=0), micro_model(CONFIG), place.put(micro_model(CONFIG))
    context = random_context(CONFIG, [(2, 4, 4)], seed=0)
    questions = [random_branch(CONFIG, 0, num_question=n, seed=n).input_ids for n in (2, 6)]
    options = [[torch.tensor([1, 39]), torch.tensor([39])], [torch.tensor([5, 6, 39])]]

    def results(model: Photon) -> tuple[list[Generated], list[Tensor]]:
        answers, _ = generate(
            model, item.batch, keep_all=keep_all, max_new_tokens=5, sampling=sampling, seeds=[3, 1, 4, 1]
        )
        prompted = ask(model, encode_scan(model, context), questions, keep_all=keep_all)
        answers += decode(model, prompted, max_new_tokens=4)
        return answers, option_log_likelihoods(model, prompted, options)

    (found, sums), (expected, expected_sums) = results(ours), results(theirs)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    for answer, other in zip(found, expected, strict=True):
        assert answer.confidence == place.equals(other.confidence, 1e-3)
    assert all(place.agree(a, b, 1e-3) for a, b in zip(sums, expected_sums, strict=True))


def test_reading_and_filling_weights(place: Place, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
        write_model(micro_model(CONFIG), folder)
    tensors = load_tensors(part / WEIGHTS)
    save_tensors({name: tensor for name, tensor in tensors.items() if ".atp." not in name}, part / WEIGHTS)
    pairs = [
        (read_model(whole, device="cuda"), micro_model(CONFIG)),
        (read_pretrained(part, seed=5, device="cuda")[0], read_pretrained(part, seed=5)[0]),
        (place.put(micro_model(CONFIG)).initialise(7), micro_model(CONFIG).initialise(7)),
    ]
    for found, expected in pairs:
        for parameter, other in zip(found.parameters(), expected.parameters(), strict=True):
            assert place.has(parameter) and place.agree(parameter, other)


class Stop(Exception):
    """Stands for a kill."""


def train(model: Photon, folder: Path | None = None, *, stop: int = 99) -> tuple[Trainer, list[float]]:
    """A trainer that went on from ``folder`` to the end, or to a kill before step ``stop`` was noted; its losses."""
    losses: list[float] = []

    def on_step(report: StepReport) -> None:
        if report.step == stop:
            raise Stop
        losses.append(float(report.result.loss.detach()))

    schedule = StageSchedule(alignment=1, warm_up=1, soft=1, hard=3, flip_after=1)
    rates = OptimiserConfig(learning_rate=2e-3, vision_learning_rate=1e-3, alignment_learning_rate=5e-3)
    trainer = Trainer(model, schedule, rates, run_digest="run")
    if folder is not None:
        trainer.restore(folder)
    with contextlib.suppress(Stop):
        trainer.run(lambda step, with_flips: mixed_item(), on_step=on_step, save_to=folder, save_every=1)
    return trainer, losses


@pytest.mark.parametrize("starts_on_gpu", [False, True])
def test_training_goes_on_on_the_other_device(place: Place, tmp_path: Path, starts_on_gpu: bool) -> None:
    theirs, expected = train(micro_model(CONFIG))
    first, second = micro_model(CONFIG), micro_model(CONFIG)
    place.put(first if starts_on_gpu else second)
    _, losses = train(first, tmp_path / "state", stop=4)
    trainer, more = train(second, tmp_path / "state")
    assert len(losses) == 4 and losses + more == [place.equals(loss, 1e-2) for loss in expected]
    for mine, parameter in zip(trainer.model.parameters(), theirs.model.parameters(), strict=True):
        assert place.has(mine) != starts_on_gpu
        # AdamW divides by the size of a gradient: where that is rounding alone, devices may step in opposite ways.
        assert not place.is_pretended or place.agree(mine, parameter)
        for key, value in trainer.optimiser.state[mine].items():
            assert place.has(value) == (key != "step" and not starts_on_gpu), key


def test_vision_pretraining(place: Place) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(28, CONFIG.vision.patch_voxels, generator=generator)
    targets = (torch.rand(7, 3, generator=generator) > 0.5).float()
    batch = NamingBatch(patches, ((2, 4, 4),), targets, present=torch.arange(7))
    losses: list[list[float]] = [[], []]
    for model, noted in zip((micro_model(CONFIG), place.put(micro_model(CONFIG))), losses, strict=True):
        pretrain_vision(
            model.visual,
            lambda _: batch,
            NamingConfig(num_steps=3),
            frequencies=torch.full((3,), 0.5),
            on_step=lambda _, loss, to=noted: to.append(loss),  # type: ignore[misc]
        )
    assert losses[1] == [place.equals(loss, 1e-2) for loss in losses[0]]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_scans(place: Place, kind: str) -> None:
    patches = torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    found = perturb(patches.to("cuda"), kind, torch.Generator().manual_seed(1))
    assert place.has(found) and place.agree(found, perturb(patches, kind, torch.Generator().manual_seed(1)))


def test_scores_alone(place: Place) -> None:
    u, lengths, branch = torch.tensor([[0.1, 0.4, -0.2], [1.0, 0.0, 0.0]]), torch.tensor([3, 1]), torch.tensor([0, 1])
    theirs, ours = micro_model(CONFIG).model.predictor, place.put(micro_model(CONFIG)).model.predictor
    expected, found = theirs(u, lengths, branch), ours(u.to("cuda"), lengths.to("cuda"), branch.to("cuda"))
    assert place.has(found.keep) and place.agree(found.keep, expected.keep) and place.agree(found.p, expected.p)


@contextlib.contextmanager
def counted(place: Place) -> Iterator[list[str]]:
    """What made the host wait for the GPU inside the block."""
    found: list[str] = []
    if place.is_pretended:
        waits.clear()
        yield found
        found += waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


def test_waiting_is_noticed(place: Place) -> None:
    x = torch.arange(3).to("cuda")
    actions: tuple[Callable[[], object], ...] = (
        lambda: int(x.max()),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: torch.repeat_interleave(x, x),
        lambda: x.cpu(),
        lambda: torch.arange(3).to("cuda"),
        lambda: torch.tensor([1, 2], device="cuda"),
    )
    for number, action in enumerate(actions):
        with counted(place) as found:
            action()
        assert len(found) >= 1, number
    with counted(place) as found:
        column([1, 2], x.device) + x[:2] + torch.arange(2, device="cuda")
        torch.repeat_interleave(x, x, output_size=3)
    assert not found


@pytest.mark.parametrize("with_layers", [False, True])
def test_pruning_waits_once_and_decoding_never(place: Place, with_layers: bool) -> None:
    """Once: how many rows each branch keeps is the size of all that follows."""
    model, item = place.put(micro_model(CONFIG)), mixed_item(num_answer=0).to("cuda")
    with torch.no_grad():
        context = model.encode_contexts(item.batch, CONFIG.pruning.layer + 1)
        model.run_branches(item.batch, context, "hard", with_layers=with_layers)  # kernels are built in a first run
        with counted(place) as found:
            output = model.run_branches(item.batch, context, "hard", with_layers=with_layers)
        assert len(found) == 1, found
        if not with_layers:
            return
        assert output.layers is not None and output.layer_lengths is not None
        with counted(place) as found:
            cache = build_cache(output.layers, output.layer_lengths, room=2)
            logits = model.logits(output.hidden[last_rows(item.batch, output)])
            ids, positions = logits.argmax(-1), item.batch.branch_positions[0, :4]
            for _ in range(2):
                logits, cache = decode_step(model, ids, positions, cache)
        assert not found, found


def test_a_training_step_waits_once_for_pruning(place: Place) -> None:
    """Forward through the pruned layers, and backward through all."""
    model, item = place.put(micro_model(CONFIG)), mixed_item().to("cuda")
    context = model.encode_contexts(item.batch, CONFIG.pruning.layer + 1)
    flags = {"flip": item.is_flipped, "detach": item.is_perturbed}
    model.run_branches(item.batch, context, "hard", **flags).hidden.square().sum().backward(retain_graph=True)
    with counted(place) as found:
        output = model.run_branches(item.batch, context, "hard", **flags)
        output.hidden.square().sum().backward(retain_graph=True)
    assert len(found) == 1, found


def test_the_plain_operators_do_not_wait(place: Place) -> None:
    """The references themselves, beside the kernels: only the number of rows is asked for, by `select_rows`."""
    batch = mixed_item().to("cuda").batch
    layout, num_rows = batch.layout, (batch.context_ids.shape[0], batch.branch_ids.shape[0])
    q, k, keys = (
        torch.randn(shape).to("cuda") for shape in ((num_rows[1], 4, 8), (num_rows[1], 2, 8), (num_rows[0], 2, 8))
    )
    hidden, own = torch.randn(num_rows[0], 8).to("cuda"), torch.randn(num_rows[1], 8).to("cuda")
    weights = place.put(micro_model(CONFIG)).model.predictor.weights
    with torch.no_grad(), counted(place) as found:
        asked = saliency.reference.Places(*(getattr(layout, name) for name in saliency.reference.Places._fields))
        u = saliency.reference.saliency(q, k, keys, asked, layout.num_columns, layout.longest_question)
        decision, _ = schedule.reference.schedule(u, layout.pair_lengths, weights, 0.9, 0.2, 2)
        places = selection.reference.Places(*(getattr(layout, name) for name in selection.reference.Places._fields))
        rows, *_ = selection.reference.select_rows(decision.keep, places, layout.num_entries)
        compaction.reference.compact([hidden], [own], rows)
    assert not found, found


def kernel_on_the_cpu(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, *_: int, **how: Any
) -> Tensor:
    """What the variable-length kernel computes, in float32: segment after segment."""
    assert all(isinstance(tensor, Pretended) for tensor in (q, k, v, q_bounds, k_bounds))
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    bounds = zip(*(pair for x in (q_bounds, k_bounds) for pair in (x.tolist()[:-1], x.tolist()[1:])), strict=True)
    outputs = []
    for start, end, first, last in bounds:
        mask = torch.ones(end - start, last - first, dtype=torch.bool, device=q.device)
        if how["window_size"] == (-1, 0):
            mask = mask.tril(last - first - (end - start))
        heads = [x.float().transpose(0, 1) for x in (q[start:end], k[first:last], v[first:last])]
        outputs.append(
            F.scaled_dot_product_attention(*heads, mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(0, 1)
        )
    return torch.cat(outputs).to(q.dtype)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_half_precision_takes_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, stage: Stage, is_mixed: bool) -> None:
    """Loss and gradients as the blocks give them on the CPU, but for rounding; weights in bfloat16 or autocast."""
    calls: list[Tensor] = []

    def kernel(*arguments: Any, **how: Any) -> Tensor:
        calls.append(arguments[0])
        return kernel_on_the_cpu(*arguments, **how)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    autocast = torch.autocast
    monkeypatch.setattr("torch.autocast", lambda device_type, *how, **more: autocast("cpu", *how, **more))
    item, place = mixed_item(), Place(is_pretended=True)
    dtype = torch.float32 if is_mixed else torch.bfloat16

    def run(model: Photon, device: str) -> StepResult:
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            result = compute_loss(model, item.to(device), stage)
        result.loss.backward()
        return result

    theirs = micro_model(CONFIG).to(dtype)
    expected = run(theirs, "cpu")
    with warnings.catch_warnings(), PretendGPU():
        warnings.simplefilter("ignore")
        ours = place.put(micro_model(CONFIG).to(dtype))
        found = run(ours, "cuda")
    assert len(calls) >= CONFIG.vision.depth + CONFIG.num_hidden_layers
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=2e-2)
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    a, b = (torch.cat([held_by(pair[i]).float().flatten() for pair in pairs if pair[i] is not None]) for i in (0, 1))
    assert float((a - b).norm() / b.norm()) < 5e-2


def test_choosing_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    for name, code in (("cuda", "GPU_UNAVAILABLE"), ("tpu", "DEVICE_UNKNOWN")):
        with pytest.raises(PhotonError) as caught:
            choose_device(name)
        assert caught.value.code == code and name in str(caught.value)
