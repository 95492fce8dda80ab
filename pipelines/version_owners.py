"""Which data folder a version belongs to: folders side by side share one DVC project, and DVC's cache does not tell.

Noted beside the cache, so on this machine alone, a line a version and folder; a pointer tells of its present version
too. A version may belong to several folders of equal bytes. One of which nothing is known, as it was recorded before
there were notes or came by `dvc fetch`, is nobody's: anybody may have it, and having it makes it nobody else's less.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from photon.errors import PhotonError
from pipelines.versioning import cache_folder, read_version

NOTES = "photon-versions.jsonl"
ANYBODY = ""
"""The owner of a version that was restored while it was nobody's."""


def note_versions(data: Path, *versions: str | None, is_anybodys: bool = False) -> None:
    """Note that these versions are of this data folder, or are anybody's; None is none. Where the cache cannot be
    written to, they stay nobody's."""
    data = data.resolve()
    path, owner = _notes_path(data.parent), ANYBODY if is_anybodys else data.name
    known = _noted(data.parent)
    new = [version for version in versions if version and owner not in known.get(version, ())]
    lines = "".join(json.dumps({"version": version, "folder": owner}) + "\n" for version in new)
    if not lines:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # One short write at the end of the file: two processes do not mix their lines. The first newline ends a line
        # that a killed one left unfinished.
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n" + lines)


def owners_of(project: Path) -> dict[str, set[str]]:
    """The names of the data folders of every version of a project of which they are known; folders that are gone, or
    have another name now, do not count."""
    owners = _noted(project)
    for pointer in project.glob("*.dvc"):
        with contextlib.suppress(PhotonError, OSError):  # of a single file, or damaged
            owners.setdefault(read_version(pointer), set()).add(pointer.name.removesuffix(".dvc"))
    there = {name for names in owners.values() for name in names if _is_there(project, name)}
    return {version: set() if ANYBODY in names else names & there for version, names in owners.items()}


def _is_there(project: Path, name: str) -> bool:
    return name != ANYBODY and ((project / name).exists() or (project / f"{name}.dvc").exists())


def _noted(project: Path) -> dict[str, set[str]]:
    try:
        lines = _notes_path(project).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    owners: dict[str, set[str]] = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            note = json.loads(line)
            owners.setdefault(str(note["version"]), set()).add(str(note["folder"]))
    return owners


def _notes_path(project: Path) -> Path:
    return cache_folder(project).parents[1] / NOTES
