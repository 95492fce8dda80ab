"""A piece of work in a process of its own: its memory can be measured, and several run side by side.

The process sends what it would log, and how far it is, to its parent, which alone talks to the tracking store.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from photon.errors import PhotonError
from pipelines.tracking import Tracker

PRELOADED = "pipelines.study.work"
"""Imported once, in the process that all others are copied from."""

EXIT_INTERRUPTED = 130

OnProgress = Callable[[int, int, str], None]
Work = Callable[..., Any]


class Launch(Protocol):
    """Runs a piece of work and returns what it returns."""

    def __call__(
        self, work: Work, arguments: Mapping[str, Any], *, tracker: Tracker, on_progress: OnProgress, threads: int
    ) -> Any:
        """Call ``work(**arguments, tracker=..., on_progress=...)`` with so many threads of computation."""


def launch_here(
    work: Work, arguments: Mapping[str, Any], *, tracker: Tracker, on_progress: OnProgress, threads: int
) -> Any:
    """In this process, with the threads that it has."""
    return work(**arguments, tracker=tracker, on_progress=on_progress)


def launch_in_process(
    work: Work, arguments: Mapping[str, Any], *, tracker: Tracker, on_progress: OnProgress, threads: int
) -> Any:
    """In a fresh process; work, arguments and result are pickled between the two.

    Raises:
        PhotonError: what the work raises; ``WORKER_LOST`` when the process dies without a word.
        RuntimeError: the work raised something else; the message has its traceback.
    """
    # A fork of a process with threads (a tracker, torch) can hang, so workers are copies of a server without any.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, dict(arguments), threads), daemon=True)
    process.start()
    theirs.close()
    try:
        return _listen(ours, tracker, on_progress)
    except EOFError as error:
        process.join()
        fact = f"a process ended without a word (exit code {process.exitcode}); memory may be short."
        raise PhotonError(
            "WORKER_LOST", work.__name__, fact, "Run the same command again, with fewer workers."
        ) from error
    finally:
        if process.is_alive():
            process.join(timeout=5)
        if process.is_alive():  # interrupted here: it must not go on alone
            process.terminate()
            process.join()
        ours.close()


class PipeTracker:
    """Sends every call of :class:`pipelines.tracking.Tracker` through a pipe; ending the run is the parent's."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        self._send("log_hyperparameters", dict(values))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._send("log", dict(metrics), step)

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self._send("log_summary", dict(metrics))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._send("log_artifact", path, folder)

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        self._send("log_table", name, dict(columns))

    def log_dataset(self, name: str, version: str, source: str) -> None:
        self._send("log_dataset", name, version, source)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._send("log_tags", dict(tags))

    def finish(self, status: str = "FINISHED") -> None: ...

    def _send(self, verb: str, *values: Any) -> None:
        self._pipe.send(("track", verb, values))


def _listen(pipe: Connection, tracker: Tracker, on_progress: OnProgress) -> Any:
    while True:
        kind, *content = pipe.recv()
        if kind == "track":
            verb, values = content
            getattr(tracker, verb)(*values)
        elif kind == "progress":
            on_progress(*content)
        elif kind == "error":
            raise content[0]
        elif kind == "fault":
            raise RuntimeError(content[0])
        else:
            return content[0]


def _serve(pipe: Connection, work: Work, arguments: dict[str, Any], threads: int) -> None:
    """What the process does."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def on_progress(done: int, total: int, label: str = "") -> None:
        pipe.send(("progress", done, total, label))

    try:
        pipe.send(("result", work(**arguments, tracker=PipeTracker(pipe), on_progress=on_progress)))
    except PhotonError as error:
        pipe.send(("error", error))
    except KeyboardInterrupt:  # the parent gets the same Ctrl-C, and says so
        os._exit(EXIT_INTERRUPTED)
    except Exception:
        pipe.send(("fault", traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process when its parent is killed; it would train for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
