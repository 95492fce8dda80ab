"""Notes of what a process is working on, so that its sudden end can be told with the scans it was busy with."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_note(folder: Path, rank: int, step: int, scans: Sequence[str]) -> None:
    """Note the step and the scans that a rank begins to work on.

    A reader sees the old note or the whole new one. It is not forced to the disk: a killed process loses nothing that
    it has handed to the system, and a step may be short.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = {"rank": rank, "step": step, "scans": list(scans), "pid": os.getpid(), "host": socket.gethostname()}
    temporary = folder / f".rank-{rank}.tmp"
    temporary.write_text(json.dumps(note), encoding="utf-8")
    temporary.replace(_path(folder, rank))


def read_note(folder: Path, rank: int) -> dict[str, Any] | None:
    """The last note of a rank; None when it has left none, or none that can be read."""
    try:
        note = json.loads(_path(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"step", "scans"} <= note.keys() else None


def told(note: dict[str, Any] | None) -> str:
    """A note as words."""
    if note is None:
        return "before its first step"
    return f"in step {note['step']}, working on scans {', '.join(note['scans'])}"


def remove_note(folder: Path, rank: int) -> None:
    """Forget this process's note, as it ends by itself, and the folder after the last."""
    note = read_note(folder, rank)
    if note is not None and note.get("pid") == os.getpid():
        with suppress(OSError):
            _path(folder, rank).unlink(missing_ok=True)
            folder.rmdir()


def take_notes(folder: Path) -> list[str]:
    """What an earlier run's ranks were working on when they were killed, as words; the notes are removed."""
    found = []
    for path in sorted(folder.glob("rank-*.json")) if folder.is_dir() else []:
        rank = path.stem.removeprefix("rank-")
        found.append(f"rank {rank} ended without a message {told(read_note(folder, int(rank)))}")
        path.unlink()
    return found


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"
