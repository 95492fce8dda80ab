"""What a checkpoint folder holds: tensors by their public names, in one safetensors file or in shards with an index.

Everything is judged by headers; a tensor's numbers are read when asked for. Two generations of names are known:

* public: `model.layers...`, `model.embed_tokens...`, `visual...`, `lm_head.weight`. Photon's own, and always written.
* newer: `model.language_model.layers...`, `model.visual...`, `lm_head.weight`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from photon.errors import PhotonError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_FLOATING = ("F64", "F32", "F16", "BF16")
_NUM_SHOWN_PER_KIND = 50
_VERDICTS = {
    "CHECKPOINT_MISSING": ("the checkpoint is not whole", "Copy the whole folder."),
    "CHECKPOINT_CORRUPT": ("its files contradict each other or are damaged", "Copy the folder again from its source."),
    "CHECKPOINT_MISMATCH": (
        "the weights are of another configuration",
        "Use the config.json that belongs to these weights.",
    ),
}
"""What an error of each code says, the gravest first."""


def public_name(name: str) -> str:
    """A parameter's public name, given its name in either generation."""
    for newer, public in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(newer):
            return public + name.removeprefix(newer)
    return name


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file as the library's reader.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING`` or ``CHECKPOINT_CORRUPT``.
    """
    remedy = "Point to a checkpoint folder that `photon train` wrote, or copy it again."
    if not path.is_file():
        raise PhotonError("CHECKPOINT_MISSING", path, "the file does not exist.", remedy)
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        fact = f"it is not a whole safetensors file ({error})."
        raise PhotonError("CHECKPOINT_CORRUPT", path, fact, remedy) from error


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    name: str
    """In the file; perhaps of the newer generation."""
    shape: tuple[int, ...]
    dtype: str
    """In the letters of the format, e.g. "BF16"."""

    def read(self) -> Tensor:
        """The tensor, backed by a private mapping of its file: copy what is to stay.

        The file is opened anew each time: a mapping keeps every page that was read through it, and one that is held
        from tensor to tensor grows to a second copy of the weights.
        """
        with open_tensors(self.path) as reader:
            tensor: Tensor = reader.get_tensor(self.name)
        return tensor

    def equals(self, other: StoredTensor) -> bool:
        """Whether both hold the same numbers in the same form."""
        same_form = (self.shape, self.dtype) == (other.shape, other.dtype)
        return same_form and torch.equal(self.read(), other.read())


class Problems:
    """What is wrong with a checkpoint, collected so that one error tells all of it.

    However many facts there are of one kind (missing, extra, ...), those of the others are told too.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, list[str]]] = {code: {} for code in _VERDICTS}

    def add(self, code: str, kind: str, *facts: str) -> None:
        """Note facts of one kind under an error code."""
        self.facts[code].setdefault(kind, []).extend(facts)

    def refuse(self, source: object) -> None:
        """Raise one error for all that was noted, with the gravest code; nothing noted, nothing raised."""
        shown: list[str] = []
        for kind, facts in ((kind, facts) for kinds in self.facts.values() for kind, facts in kinds.items()):
            shown += facts[:_NUM_SHOWN_PER_KIND]
            if (num_more := len(facts) - _NUM_SHOWN_PER_KIND) > 0:
                shown.append(f"and {num_more} more {kind}")
        for code, (verdict, remedy) in _VERDICTS.items():
            if any(self.facts[code].values()):
                raise PhotonError(code, source, f"{verdict} ({'; '.join(shown)}).", remedy)


class Inventory:
    """The tensors of a checkpoint folder by public name, as its headers tell.

    Attributes:
        tensors: of readable files. Names that the index promises and no file holds are in `lost`.
        problems: what was wrong with files and names.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of `model.safetensors`, or of the shards that the index names.

        Raises:
            PhotonError: ``CHECKPOINT_MISSING`` when there is neither, ``CHECKPOINT_CORRUPT`` when there are both, or
                when the one file or the index is damaged. Faults of single shards and names go to `problems`.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.lost: set[str] = set()
        self.problems = Problems()
        if not (folder / INDEX).is_file():
            for tensor in _read_header(folder / WEIGHTS).values():
                self._add_tensor(tensor)
            return
        if (folder / WEIGHTS).is_file():
            fact = f"there are two sets of weights, {WEIGHTS} and {INDEX}."
            raise PhotonError("CHECKPOINT_CORRUPT", folder, fact, "Remove the one that does not belong there.")
        places = _read_index(folder / INDEX)
        for file in sorted(set(places.values())):
            self._add_shard(file, {name for name, place in places.items() if place == file})

    def expect(self, shapes: Mapping[str, tuple[int, ...]], *, optional: Collection[str] = ()) -> None:
        """Note tensors that are missing, extra, misshapen or no floating-point numbers.

        Args:
            shapes: of the parameters, by public name.
            optional: names that may be there without being a parameter. An output projection among them has to repeat
                the token embedding.
        """
        mismatch, lenient = "CHECKPOINT_MISMATCH", {*optional, *self.lost}
        held = {name: tensor.shape for name, tensor in self.tensors.items()}
        missing, extra = (sorted(names - lenient) for names in (shapes.keys() - held, held.keys() - shapes))
        self.problems.add(mismatch, "missing", *(f"missing {name}" for name in missing))
        self.problems.add(mismatch, "extra", *(f"extra {name}" for name in extra))
        for name in sorted(held.keys() & shapes):
            shape, dtype = held[name], self.tensors[name].dtype
            if shape != tuple(shapes[name]):
                self.problems.add(mismatch, "misshapen", f"{name} is {shape}, not {tuple(shapes[name])}")
            if dtype not in _FLOATING:
                self.problems.add(mismatch, "mistyped", f"{name} is of type {dtype}, no floating-point numbers")
        head, embedding = self.tensors.get(HEAD), self.tensors.get(EMBEDDING)
        if HEAD in optional and head and embedding and not head.equals(embedding):
            fact = f"{HEAD} differs from {EMBEDDING}, to which the configuration ties it"
            self.problems.add(mismatch, "untied", fact)

    def _add_shard(self, file: str, promised: set[str]) -> None:
        self.lost.update(map(public_name, promised))
        # Only a plain name is followed: a path could lead anywhere.
        if Path(file).name != file:
            self.problems.add(
                "CHECKPOINT_CORRUPT", "misplaced", f"the index names {file!r}, which is no file of this folder"
            )
            return
        try:
            held = _read_header(self.folder / file)
        except PhotonError as error:
            self.problems.add(error.code, "unreadable", f"{file}: {error.fact.rstrip('.')}")
            return
        for name in sorted(promised - held.keys()):
            self.problems.add("CHECKPOINT_CORRUPT", "lacking", f"{file} lacks {name}, which the index promises")
        for name in sorted(held.keys() - promised):
            self.problems.add(
                "CHECKPOINT_CORRUPT", "unplaced", f"{file} holds {name}, which the index does not place there"
            )
        for name in sorted(held.keys() & promised):
            self._add_tensor(held[name])

    def _add_tensor(self, tensor: StoredTensor) -> None:
        name = public_name(tensor.name)
        self.lost.discard(name)
        first = self.tensors.setdefault(name, tensor)
        if first is not tensor:
            self.problems.add("CHECKPOINT_MISMATCH", "twice", f"{first.name} and {tensor.name} are both {name}")


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Share tensors out among files of at most ``max_bytes``, in order; a larger tensor has a file to itself.

    Args:
        sizes: bytes of each tensor by name.

    Returns:
        Names by file: one `model.safetensors`, or `model-00001-of-0000n.safetensors` and so on.
    """
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, start=1)}


def index_of(shards: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
    """The index file of shards, as JSON."""
    places = {name: file for file, names in shards.items() for name in names}
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with open_tensors(path) as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping
        return {
            name: StoredTensor(path=path, name=name, shape=tuple(part.get_shape()), dtype=part.get_dtype())
            for name, part in slices.items()
        }


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor, by the tensor's name."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        fact = f"it is no index of weights ({type(error).__name__}: {error})."
        raise PhotonError("CHECKPOINT_CORRUPT", path, fact, _VERDICTS["CHECKPOINT_CORRUPT"][1]) from error
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        fact = "its `weight_map` does not give a file for each tensor."
        raise PhotonError("CHECKPOINT_CORRUPT", path, fact, _VERDICTS["CHECKPOINT_CORRUPT"][1])
    return places
