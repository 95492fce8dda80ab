"""A scan and the structures outlined in it, all on the scan's own voxels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from photon.errors import PhotonError
from pipelines.grids import Frame, frame_of
from pipelines.mask_questions.names import Description, Structure
from pipelines.scans.scan import Scan
from pipelines.shapes import label_boxes, rim

BoolArray = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

MIN_SHARE_INSIDE = 0.5
"""A mask of which less lies inside the scan belongs to another scan or has a wrong header."""

PADDING_HU = -1500
"""CT values below are filling outside what the scanner saw, neither tissue nor air."""

_SAME_VOXEL = 0.01
_NOWHERE = (slice(0, 0),) * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """One structure in one scan.

    Args:
        box: where it lies in the scan's [Z, Y, X]; of no size where the structure is absent.
        mask: bool, of the box's shape.
        is_cut: whether it reaches an edge of the scan, of its mask or of what the scanner saw.
        is_covered: whether its mask reaches over the whole scan, so that what it does not show is not there.
    """

    structure: Structure
    box: Box
    mask: BoolArray
    is_cut: bool
    is_covered: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """A scan and its structures; other arrays are [Z, Y, X] along the scan's axes nearest to head, back and left.

    Args:
        values: the scan's values.
        frame: how these axes lie in the patient.
        matrix: float64 [4, 4], index (Z, Y, X) to world RAS millimetres.
        regions: every structure that was looked for, found or not, in the order of the names file.
        labels: uint8 [i, j, k] in the scan's own axes: at every voxel the value of the last of its structures, as in
            :func:`label_values`.
        notes: what was unusual but acceptable.
    """

    values: np.ndarray
    frame: Frame
    matrix: np.ndarray
    regions: tuple[Region, ...]
    labels: np.ndarray
    notes: tuple[str, ...]


def label_values(description: Description) -> dict[str, int]:
    """Name of every structure to its value in the label maps that are written: its own, or its place."""
    places = enumerate(description.structures, start=1)
    return {s.name: int(s.key) if description.is_label_map else place for place, s in places}


def combine(scan: Scan, masks: Iterable[tuple[str, Scan]], description: Description, *, is_ct: bool) -> Segmentation:
    """Bring the masks of a scan onto its voxels: as they are where the grids agree, else by the nearest neighbour
    in the patient.

    Args:
        masks: the label map under "", or the mask of every structure that has one under its key, in the order of
            the names file; taken one by one.
        is_ct: whether values far below air are filling.

    Raises:
        PhotonError: ``LABELS_INVALID`` when a mask holds other values than whole numbers 0 to 255;
            ``MASK_OUTSIDE_SCAN`` when it lies elsewhere.
    """
    frame = frame_of(scan.array.shape, scan.affine)
    values = frame.canonical(scan.array)
    codes = label_values(description)
    by_key = {structure.key: structure for structure in description.structures}
    own = np.zeros(scan.array.shape, np.uint8)
    labels = frame.canonical(own)
    regions, notes = [], []
    for key, mask in masks:
        array, cut, is_covered = _on_scan(mask, scan)
        if not is_covered:
            notes.append(f"the mask{f' of {by_key[key].name}' if key else ''} leaves out a part of the scan")
        found = np.ascontiguousarray(frame.canonical(array))
        if description.is_label_map:
            boxes = label_boxes(found)
            for structure in description.structures:
                value = codes[structure.name]
                box = boxes.get(value, _NOWHERE)
                regions.append(_region(structure, box, found[box] == value, values, value in cut, is_covered, is_ct))
            if nameless := sorted(set(boxes) - set(codes.values())):
                notes.append(f"values without a name, left out: {', '.join(map(str, nameless))}")
                found[np.isin(found, nameless)] = 0
            labels[...] = found
        else:
            box = label_boxes((found > 0).view(np.uint8)).get(1, _NOWHERE)
            regions.append(_region(by_key[key], box, found[box] > 0, values, bool(cut), is_covered, is_ct))
            labels[box][found[box] > 0] = codes[by_key[key].name]
    return Segmentation(
        values=values,
        frame=frame,
        matrix=_canonical_matrix(frame, scan),
        regions=tuple(regions),
        labels=own,
        notes=tuple(notes),
    )


def label_array(scan: Scan) -> np.ndarray:
    """The voxels of a mask as uint8, in its own axes.

    Raises:
        PhotonError: ``LABELS_INVALID``.
    """
    whole = np.rint(scan.array)
    if scan.array.min() < 0 or scan.array.max() > 255 or not np.array_equal(whole, scan.array):
        raise PhotonError("LABELS_INVALID", scan.path, "its values are not whole numbers 0..255.", "Use a label map.")
    return whole.astype(np.uint8)


def _on_scan(mask: Scan, scan: Scan) -> tuple[np.ndarray, set[int], bool]:
    """Labels uint8 [i, j, k] on the scan's voxels, the values that the mask's own edge or the scan's cuts, and whether
    the mask reaches over the scan."""
    labels = label_array(mask)
    to_mask = np.linalg.inv(mask.affine) @ scan.affine
    if labels.shape == scan.array.shape and _moves_less(to_mask - np.eye(4), labels.shape):
        return labels, set(), True
    is_covered = _reaches_over(to_mask, labels.shape, scan.array.shape)
    where = np.argwhere(labels)
    if not len(where):
        return np.zeros(scan.array.shape, np.uint8), set(), is_covered
    to_scan = np.linalg.inv(to_mask)
    place = where @ to_scan[:3, :3].T + to_scan[:3, 3]
    is_inside = ((place >= -0.5) & (place < np.array(scan.array.shape) - 0.5)).all(axis=1)
    if is_inside.mean() < MIN_SHARE_INSIDE:
        fact = f"{100 * (1 - is_inside.mean()):.0f} % of its labelled voxels lie outside {scan.path.name}."
        remedy = "Check that both belong together and that neither header was lost."
        raise PhotonError("MASK_OUTSIDE_SCAN", mask.path, fact, remedy)
    at_edge = ((where == 0) | (where == np.array(labels.shape) - 1)).any(axis=1)
    cut = np.unique(labels[tuple(where[at_edge | ~is_inside].T)])
    return sample_nearest(labels, to_mask, scan.array.shape), {int(value) for value in cut}, is_covered


def sample_nearest(labels: np.ndarray, to_labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Label map of ``shape``, same dtype, read at the nearest voxel; 0 outside.

    Args:
        to_labels: [4, 4], index of the result to index of ``labels``.
    """
    out = np.zeros(tuple(shape), labels.dtype)
    j, k = (np.arange(n, dtype=np.float64) for n in shape[1:])
    for i in range(shape[0]):
        places = [
            np.floor((row[0] * i + row[3] + 0.5) + (row[1] * j)[:, None] + (row[2] * k)[None, :]).astype(np.int64)
            for row in to_labels[:3]
        ]
        is_inside = np.logical_and.reduce([(p >= 0) & (p < n) for p, n in zip(places, labels.shape, strict=True)])
        out[i][is_inside] = labels[tuple(place[is_inside] for place in places)]
    return out


def _moves_less(difference: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether no corner of the array moves by a hundredth of a voxel."""
    return bool(np.abs(_corners(difference, shape)).max() < _SAME_VOXEL)


def _reaches_over(to_mask: np.ndarray, mask_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether all corner voxels of an array lie in the mask's, or no more than one of its voxels beside it."""
    corners = _corners(to_mask, shape)
    return bool(((corners > -1.5) & (corners < np.array(mask_shape)[:, None] + 0.5)).all())


def _corners(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Where a matrix [4, 4] maps the centres of an array's corner voxels: [3, 8]."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    return np.asarray(matrix[:3, :3] @ corners + matrix[:3, 3:])


def _region(
    structure: Structure, box: Box, mask: BoolArray, values: np.ndarray, is_cut: bool, is_covered: bool, is_ct: bool
) -> Region:
    sides = list(zip(box, values.shape, strict=True))
    is_there = bool(mask.size)
    is_cut |= is_there and any(part.start == 0 or part.stop == n for part, n in sides)
    if is_there and is_ct and not is_cut:
        around = tuple(slice(part.start - 1, part.stop + 1) for part in box)
        is_cut = bool((values[around][rim(np.pad(mask, 1))] < PADDING_HU).any())
    return Region(structure=structure, box=box, mask=mask, is_cut=is_cut, is_covered=is_covered)


def _canonical_matrix(frame: Frame, scan: Scan) -> np.ndarray:
    """Index (Z, Y, X) to RAS millimetres."""
    matrix = np.eye(4)
    matrix[:3, 3] = scan.affine[:3, 3]
    for axis, (own, is_flipped) in enumerate(zip(frame.axes, frame.is_flipped, strict=True)):
        column = scan.affine[:3, own]
        matrix[:3, axis] = -column if is_flipped else column
        matrix[:3, 3] += column * (scan.array.shape[own] - 1) if is_flipped else 0.0
    return matrix
