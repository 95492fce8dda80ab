"""M3D: multiple choice questions about images of Radiopaedia, as 8-bit slices or as arrays made of them.

The images have lost what makes a scan: HU (8 bits of a window that nobody wrote down), spacing, and orientation. So
questions are imported, and images only on demand and as what they are: arrays (.npy) with assumed geometry.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipelines.datasets.base import Draft, ImportOptions, Place, Refusal, RowError, ScanFile
from pipelines.datasets.splits import split_in_name
from pipelines.datasets.tables import Row, csv_rows, files_below, header_of, nothing_found, words
from pipelines.datasets.texts import yes_no_options

TYPES = {
    "1": ("plane", "recognition"),
    "2": ("phase", "recognition"),
    "3": ("organ", "recognition"),
    "4": ("abnormality", "recognition"),
    "5": ("location", "visual reasoning"),
}
"""Question type -> our subtype and family."""

_NEEDED = {"image path", "question", "answer", "question type"}
_LETTERS = "abcd"
_SUBSET = "test5k"


class M3D:
    """Reader of M3D-VQA."""

    name = "m3d"
    title = "M3D-VQA, multiple choice questions about CT pictures of Radiopaedia"
    notes: tuple[str, ...] = (
        "The images hold neither HU nor spacing nor orientation. Nothing in HU, in millimetres or about left and right "
        "can be asked of them, and no millimetre grid can be made. So scans are left out, unless nominal geometry is "
        "asked for: then arrays (.npy) become scans of 1 mm voxels, slices taken to be axial from foot to head. "
        "Preprocess those with --preset photon (which stretches every scan) and --modality mr (values have no unit).",
        "Folders of .png or .jpeg slices are not read: make arrays of them by the dataset's own preparation.",
        "A case is a patient; test5k is part of test and passed over where test is there.",
        "Images are Radiopaedia's.",
    )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Rows of every CSV with the dataset's columns."""
        tables = [path for path in files_below(folder, ".csv") if set(header_of(path)) >= _NEEDED]
        if not tables:
            raise nothing_found(folder, "no CSV with Image Path, Question Type, Question, Answer ...")
        has_test = any(words(path.stem).split()[-1] == "test" for path in tables)
        for path in tables:
            if has_test and _SUBSET in path.stem:
                continue
            for row in csv_rows(path, folder):
                if isinstance(row, Refusal):
                    yield row
                    continue
                try:
                    yield _draft(row, path)
                except RowError as error:
                    yield Refusal(place=row.place, reason=error.reason, detail=error.detail)

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """Arrays of the wanted images; refused one by one unless nominal geometry is asked for."""
        images = options.images or folder
        for path in files_below(images, ".npy"):
            relative = path.relative_to(images).as_posix()
            try:
                scan_id = _scan_name(relative)[0]
            except RowError:
                continue
            if scan_id not in wanted:
                continue
            if options.nominal_geometry:
                yield ScanFile(scan_id=scan_id, path=path, nominal_spacing=True)
            else:
                detail = "only with nominal geometry"
                reason = "the image has neither HU nor spacing"
                yield Refusal(place=Place(file=relative, row=0), reason=reason, detail=detail)


def _scan_name(image_path: str) -> tuple[str, str]:
    """Scan id and patient id of a path such as ``M3D_Cap/ct_case/000012/Axial_bone_window.npy``."""
    parts = PurePosixPath(image_path.replace("\\", "/")).parts
    start = next((index for index, part in enumerate(parts) if part.startswith("ct_")), None)
    if start is None or len(parts) - start < 3:
        raise RowError("the image path names no case", repr(image_path))
    case, series = parts[start : start + 2], parts[start + 2].removesuffix(".npy")
    return "_".join((*case, series)).replace(" ", "_"), "/".join(case)


def _draft(row: Row, path: Path) -> Draft:
    scan_id, patient_id = _scan_name(row.text("image path"))
    number = row.text("question type").removesuffix(".0")
    if number not in TYPES:
        raise RowError("the question type is not one of 1 to 5", repr(number))
    subtype, family = TYPES[number]
    answer, question = row.text("answer"), row.text("question")
    choices = {letter: row.optional(f"choice {letter}") for letter in _LETTERS}
    choices = {letter: choice for letter, choice in choices.items() if choice}
    letter = row.optional("answer choice").casefold()
    if choices and choices.get(letter) != answer:
        detail = f"{letter.upper()} is {choices.get(letter)!r}, the answer is {answer!r}"
        raise RowError("the answer is not the text of its choice", detail)
    options = tuple(choices.values()) or yes_no_options(answer) or ()
    return Draft(
        place=row.place,
        identity=(scan_id, question, *([] if options else [answer])),
        scan_id=scan_id,
        patient_id=patient_id,
        split=_split(path),
        family=family,
        subtype=subtype,
        kind="closed" if options else "text",
        question=question,
        options=options,
        answer=answer,
    )


def _split(path: Path) -> str:
    split = split_in_name(path.stem)
    if not split:
        raise RowError("neither the row nor the file's name says the split", path.name)
    return split
