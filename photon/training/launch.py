"""Joining the processes that torchrun starts, and what is told when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from photon.errors import PhotonError
from photon.training.parallel import AGAIN, ALONE, Kind, Ranks, SharedError, coded
from photon.training.working import read_note, remove_note, told

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_WAIT = timedelta(hours=2)
"""For the others, while one rank writes or reads."""
_GRACE_S = 1.5
"""How long a rank whose connection broke looks for the reason."""


def num_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Processes that torchrun has started, by the variables that it sets; 1 without it."""
    return int(environment["WORLD_SIZE"]) if all(name in environment for name in _VARIABLES) else 1


@contextmanager
def join(kind: Kind | None, device: torch.device, notes: Path) -> Iterator[Ranks]:
    """Be one of torchrun's processes for the length of the block.

    An error of one rank ends all, with its message where that can still be learnt: the others notice when its process
    is gone, so let the error end it. A rank that was killed is named, with what its note says it was working on.

    Args:
        kind: "ddp", "fsdp", or None for a process of its own.
        device: of the kind that is used; each rank takes the GPU of its number on its machine.
        notes: folder of :func:`photon.training.working.write_note`.

    Raises:
        PhotonError: ``TRAINING_INVALID`` without torchrun; ``GPU_UNAVAILABLE`` when there are fewer GPUs than ranks on
            a machine; what a rank failed with; ``TRAINING_FAILED`` when one was killed.
    """
    if kind is None:
        try:
            yield ALONE
        finally:
            remove_note(notes, 0)  # only what cannot clean up leaves one
        return
    if any(name not in os.environ for name in _VARIABLES):
        fact = f"{kind} needs the processes of torchrun, and this is a process of its own."
        raise PhotonError("TRAINING_INVALID", "parallel", fact, "Start it by torchrun --nproc-per-node N -m flows.cli.")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = _own_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    store = dist.distributed_c10d._get_default_store()
    store.set(f"photon/process/{rank}", f"{socket.gethostname()} {os.getpid()}")
    dist.barrier()
    processes = [store.get(f"photon/process/{other}").decode() for other in range(size)]
    before = _on_sigterm(_end)
    try:
        yield Ranks(rank=rank, size=size, kind=kind, device=own)
        remove_note(notes, rank)
        _on_sigterm(before)
    except BaseException as error:
        # For good: torchrun ends the ranks that are left, and this one has yet to find and tell the reason.
        _on_sigterm(signal.SIG_IGN)
        reason = _reason(error, store, rank, processes, notes)
        remove_note(notes, rank)
        if own.type == "cuda":
            dist.distributed_c10d._abort_process_group()  # to destroy it would wait for what never comes
        if reason is None:
            raise
        raise reason from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Terminated(BaseException):
    """SIGTERM: torchrun ends the ranks that are left when one has ended."""


def _end(number: int, frame: FrameType | None) -> None:
    _on_sigterm(signal.SIG_IGN)
    raise Terminated


def _on_sigterm(handler: Any) -> Any:
    """Set what SIGTERM does, where a thread may, and return what it did."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGTERM, handler)
    return None


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= available:
        fact = f"rank {local} of this machine needs a GPU of its own, and there are {available}."
        raise PhotonError("GPU_UNAVAILABLE", "cuda", fact, "Start as many processes as there are GPUs, or use the CPU.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _reason(error: BaseException, store: Any, rank: int, processes: Sequence[str], notes: Path) -> PhotonError | None:
    """Why the run ends: another rank's error or death if that came first, else None, and the others can read it.

    When a rank ends, the connections of the others break, in the middle of whatever they do.
    """
    if isinstance(error, SharedError):
        return None
    is_fault = isinstance(error, Exception) and coded(error).code == "TRAINING_FAILED"
    is_broken = is_fault or isinstance(error, Terminated)
    others = [other for other in range(len(processes)) if other != rank]
    end = time.monotonic() + (_GRACE_S if is_broken else 0)
    while is_broken:
        for other in others:
            if told_by := _posted(store, other):
                return told_by
        if dead := [other for other in others if _is_dead(processes[other])]:
            return _killed(dead, notes)
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    if isinstance(error, Exception):
        with suppress(RuntimeError):  # the store is gone with the process that held it
            store.set(f"photon/error/{rank}", json.dumps(dict(coded(error).as_row())))
    elif isinstance(error, Terminated):
        return PhotonError("TRAINING_FAILED", f"rank {rank}", "it was told to end (SIGTERM).", AGAIN)
    return None


def _posted(store: Any, rank: int) -> PhotonError | None:
    """The error with which a rank says that it ended."""
    try:
        is_there = store.check([f"photon/error/{rank}"])
        return PhotonError(**json.loads(store.get(f"photon/error/{rank}"))) if is_there else None
    except RuntimeError:  # the store is gone with the process that held it
        return None


def _killed(dead: list[int], notes: Path) -> PhotonError:
    told_by = "; ".join(f"rank {rank} ended without a message {told(read_note(notes, rank))}" for rank in dead)
    return PhotonError("TRAINING_FAILED", "training", f"{told_by}.", f"Was memory short? {AGAIN}")


def _is_dead(process: str) -> bool:
    """Whether a process of this machine is no more, or waits only to be buried; False for another machine's."""
    host, _, number = process.rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return Path("/proc/self/stat").exists()
    return state in "ZX"
