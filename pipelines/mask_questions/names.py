"""What a folder of masks holds: names of structures, and how the files of images and masks are named."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

from photon.errors import PhotonError
from pipelines.files import read_json

Kind = Literal["organ", "lesion"]

MODALITIES = ("ct", "mr", "pt")
PLACEHOLDERS = ("scan", "patient", "modality", "structure")
MAX_STRUCTURES = 255

_REMEDY = 'README.md, "Questions from masks", describes the file.'
_SIDES = ("left", "right")
_LESION_WORDS = frozenset(
    ("cyst", "cysts", "gtv", "lesion", "lesions", "mass", "metastases", "metastasis", "nodule", "nodules")
    + ("tumor", "tumors", "tumour", "tumours")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """One thing that is outlined.

    Args:
        key: its value in a label map as text, or the name of its file without ending.
        name: in words, as questions use it, e.g. ``left kidney``.
        kind: of an organ there is one; of a lesion any number, and it lies somewhere.
    """

    key: str
    name: str
    kind: Kind

    @property
    def side(self) -> str:
        """``left`` or ``right`` where the name says it, else ""."""
        return next((side for side in _SIDES if side in self.name.split()), "")

    @property
    def of_other_side(self) -> str:
        """The name with left and right exchanged; the same name where it has no side."""
        swapped = {"left": "right", "right": "left"}
        return " ".join(swapped.get(word, word) for word in self.name.split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A data set of images and masks.

    Args:
        structures: in the order of the file; where masks overlap, later ones lie on top in the label map written.
        is_label_map: one file holds all structures of a scan; otherwise each has a file of its own.
        image, mask: patterns of paths below the two folders, without endings, with placeholders in braces.
        modality: from what ``{modality}`` stands for to ``ct``, ``mr`` or ``pt``; key "" where the pattern has no
            such placeholder and all scans are alike; empty where nothing is known.
        pet_unit: ``SUV`` where PET images are told to hold it, else "".
    """

    structures: tuple[Structure, ...]
    is_label_map: bool
    image: str
    mask: str
    modality: dict[str, str]
    pet_unit: str


def read_description(path: Path) -> Description:
    """Read a names file: either the map of names alone, or an object with it under ``structures``.

    Raises:
        PhotonError: ``NAMES_INVALID``.
    """
    content = read_json(path, "NAMES_INVALID", _REMEDY)
    if not isinstance(content, dict):
        raise _invalid(path, "it is not a JSON object.")
    settings = content if isinstance(content.get("structures"), dict) else {"structures": content}
    unknown = sorted(set(settings) - {"structures", "image", "mask", "modality", "pet_unit"})
    if unknown:
        raise _invalid(path, f"it has the unknown keys {', '.join(unknown)}.")
    structures, is_label_map = _structures(settings["structures"], path)
    image = _text(settings, "image", "{scan}", path)
    mask = _text(settings, "mask", "{scan}" if is_label_map else "{scan}/{structure}", path)
    _check_patterns(image, mask, is_label_map, path)
    pet_unit = _text(settings, "pet_unit", "", path)
    if pet_unit not in ("", "SUV"):
        raise _invalid(path, f"pet_unit is {pet_unit!r}; only SUV is known.")
    return Description(
        structures=structures,
        is_label_map=is_label_map,
        image=image,
        mask=mask,
        modality=_modality(settings.get("modality", {}), path),
        pet_unit=pet_unit,
    )


def plain_name(name: str) -> str:
    """A label's name in words, its side first: ``kidney_cyst_left`` becomes ``left kidney cyst``."""
    words = re.sub(r"[\s_-]+", " ", name).strip().split(" ")
    words = [word.lower() if word.lower() in _SIDES else word for word in words]
    words = ["vertebra" if word == "vertebrae" and len(words) > 1 else word for word in words]
    return " ".join([word for word in words if word in _SIDES] + [word for word in words if word not in _SIDES])


def _structures(names: dict[str, Any], path: Path) -> tuple[tuple[Structure, ...], bool]:
    if names and all(isinstance(value, int) and not isinstance(value, bool) for value in names.values()):
        names = {str(value): name for name, value in names.items()}  # name -> value, as raw/labels.json has it
    found = tuple(_structure(str(key), value, path) for key, value in names.items())
    is_number = [structure.key.isdecimal() for structure in found]
    if not found or any(is_number) != all(is_number):
        raise _invalid(path, "its keys must all be label values, or all names of files; at least one.")
    if all(is_number) and any(not 0 < int(structure.key) <= MAX_STRUCTURES for structure in found):
        raise _invalid(path, f"label values must be 1 to {MAX_STRUCTURES}.")
    for what, all_of in (("name", [s.name.casefold() for s in found]), ("key", [s.key for s in found])):
        repeated = sorted({one for one in all_of if all_of.count(one) > 1})
        if repeated:
            raise _invalid(path, f"the {what} {repeated[0]!r} comes twice.")
    if len(found) > MAX_STRUCTURES:
        raise _invalid(path, f"it has {len(found)} structures; at most {MAX_STRUCTURES} fit.")
    return found, all(is_number)


def _structure(key: str, value: Any, path: Path) -> Structure:
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or set(fields) - {"name", "kind"} or not isinstance(fields.get("name"), str):
        raise _invalid(path, f"the entry of {key!r} is no name and no object with `name` and `kind`.")
    name = plain_name(fields["name"])
    is_lesion = not _LESION_WORDS.isdisjoint(name.lower().split())
    kind = fields.get("kind", "lesion" if is_lesion else "organ")
    if not name or kind not in ("organ", "lesion"):
        raise _invalid(path, f"the entry of {key!r} has no name, or its kind is not organ or lesion.")
    return Structure(key=str(int(key)) if key.isdecimal() else key, name=name, kind=kind)


def _check_patterns(image: str, mask: str, is_label_map: bool, path: Path) -> None:
    used = {}
    for what, pattern in (("image", image), ("mask", mask)):
        names = re.findall(r"\{([^{}]*)\}", pattern)
        if set(names) - set(PLACEHOLDERS) or len(names) != len(set(names)) or not names:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise _invalid(path, f"the pattern of {what}s {pattern!r} must hold some of {known}, each once.")
        used[what] = set(names)
    if "structure" in used["image"] or ("structure" in used["mask"]) == is_label_map:
        fact = "masks must have the placeholder {structure} if and only if each structure has its own file."
        raise _invalid(path, fact)
    if not used["mask"] - {"structure"} <= used["image"]:
        raise _invalid(path, "the pattern of masks has placeholders that the pattern of images lacks.")


def _modality(value: Any, path: Path) -> dict[str, str]:
    words = {"": value} if isinstance(value, str) else value
    if not isinstance(words, dict) or not all(word in MODALITIES for word in words.values()):
        raise _invalid(path, f"modality must be one of {', '.join(MODALITIES)}, or an object with such values.")
    return dict(words)


def _text(settings: dict[str, Any], key: str, default: str, path: Path) -> str:
    value = settings.get(key, default)
    if not isinstance(value, str):
        raise _invalid(path, f"{key} is not a text.")
    return value


def _invalid(path: Path, fact: str) -> PhotonError:
    return PhotonError("NAMES_INVALID", path, fact, _REMEDY)
