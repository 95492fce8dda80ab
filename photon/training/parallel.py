"""Training on several processes that torchrun starts: data-parallel (DDP) or with sharded parameters (FSDP2).

Every rank takes its share of a step's scans. Gradients are added up, not averaged: each branch is already weighted by
1 / (branches of all ranks), and the surrogate gradient of hard pruning, which is standardised, does not follow a factor
on the loss. So a step equals that of one process up to the order of additions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from photon.errors import PhotonError
from photon.model.network import Photon

# What shards tensors is imported where it is used: that takes half a second, and most runs have one process.

Kind = Literal["ddp", "fsdp"]
T = TypeVar("T")


AGAIN = "Run the same command again; it goes on from its last state."


class SharedError(PhotonError):
    """An error that every rank raises."""


class Shell(nn.Module):
    """Calls any function with the model, inside one forward pass.

    Data-parallel and sharded modules do their communication around the forward of the module that they wrap, and the
    loss needs the model twice: for the hidden rows and for the logits of some of them.
    """

    def __init__(self, model: Photon) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(self.model, *arguments)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a training, seen from one of them. With ``kind`` None there is one, and nothing is exchanged."""

    rank: int = 0
    size: int = 1
    kind: Kind | None = None
    device: torch.device | None = None
    """Where this rank computes; None: where the model is."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and tells."""
        return self.rank == 0

    def dealt(self, accumulate: int) -> tuple[list[int], int]:
        """Numbers of this rank's micro-batches in a step, and the number of those of all ranks."""
        return [self.rank + self.size * i for i in range(accumulate)], self.size * accumulate

    def gathered(self, values: Sequence[int]) -> list[list[int]]:
        """The whole numbers of every rank, in order of ranks."""
        if self.kind is None:
            return [list(values)]
        table = torch.zeros(self.size, len(values), dtype=torch.int64)
        table[self.rank] = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(table)
        return table.tolist()

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks of a tensor on the CPU."""
        if self.kind is not None:
            values = values.clone()
            dist.all_reduce(values)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank in this block fails on all, with the first such rank's error.

        Raises:
            PhotonError: of the first rank that failed; ``TRAINING_FAILED`` where its error had no code.
        """
        if self.kind is None:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = [rank for rank, (is_failed,) in enumerate(self.gathered([failure is not None])) if is_failed]
        if failed:
            own = "" if failure is None else json.dumps(dict(coded(failure).as_row()))
            raise SharedError(**json.loads(self.texts(own)[failed[0]])) from failure

    def texts(self, own: str) -> list[str]:
        """A text of every rank, in order of ranks."""
        if self.kind is None:
            return [own]
        texts = []
        for source, (length,) in enumerate(self.gathered([len(own.encode())])):
            content = list(own.encode()) if source == self.rank else [0] * length
            text = torch.tensor(content, dtype=torch.uint8)
            if length:
                dist.broadcast(text, source)
            texts.append(bytes(text.tolist()).decode())
        return texts

    def distributed(self, model: Photon) -> nn.Module:
        """The shell around the model that a step calls; parameters become those of rank 0, and shards for "fsdp".

        Args:
            model: equal on all ranks but for rounding; on the CPU for "fsdp", which moves shard by shard to
                ``device``. Parameters that need no gradient are left whole.
        """
        if self.kind is None:
            return Shell(model)
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        if self.kind == "fsdp":
            return self._sharded(model)
        assert self.device is not None
        shell = DistributedDataParallel(
            Shell(model),
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=True,  # the vision tower of the text-only model, the threshold network in warm-up
        )
        shell.register_comm_hook(None, lambda _, bucket: _added_up(bucket))
        return shell

    def _sharded(self, model: Photon) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        assert self.device is not None
        # Keys and values of a layer are views, which nothing here changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        whole = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        if whole:
            model.visual.to(self.device)
        shell = Shell(model)
        mesh = init_device_mesh(self.device.type, (self.size,))
        # The threshold network is called apart from its layer.
        units = [model.model.predictor, *model.visual.blocks, *model.model.layers, shell]
        for unit in units:
            if any(parameter.requires_grad for parameter in unit.parameters()):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        for module in shell.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        return shell

    def accumulating(self, shell: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: DDP exchanges gradients once a step; shards are added up after each."""
        return shell.no_sync() if isinstance(shell, DistributedDataParallel) and not is_last else nullcontext()

    def whole(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors, gathered one by one; only rank 0 keeps them, shards on the CPU. Every rank has to call it."""
        kept = {}
        for name, tensor in named:
            full = tensor.full_tensor().cpu() if is_split(tensor) else tensor  # type: ignore[attr-defined]
            if self.is_main:
                kept[name] = full
        return kept


ALONE = Ranks()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor placed, and split where it is split, as a parameter of its shape."""
    if not is_split(parameter):
        return value.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    placed = value.to(parameter.device)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_split(tensor: Tensor) -> bool:
    """Whether every rank holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def coded(error: BaseException) -> PhotonError:
    """The error itself, or one with a code that quotes it."""
    if isinstance(error, PhotonError):
        return error
    fact = " ".join(f"{type(error).__name__}: {error}".split()) + "."
    return PhotonError(
        "TRAINING_FAILED", "training", fact, "Run the same command again; it goes on from its last state."
    )


def _added_up(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Gradients summed over ranks, where DDP by itself takes their mean."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])
