"""The pictures of a run's report: kept tokens for questions about one scan, and every scan of an archive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from photon.errors import PhotonError
from pipelines.figures import planes_picture
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.page import Markup, join, picture, tag
from pipelines.regions import kept_mask, read_organ_masks, voxel_mask
from pipelines.slices import make_planes, middle_of
from pipelines.volumes import Volume, read_volume

MAX_QUESTIONS = 6
MAX_SHEET_SCANS = 60
SHEET_PLANE_IN = 2.3
CONVENTION = "The patient's left is on the right of the image: L left, R right, A front, P back, S head, I feet."


def question_gallery(answers: pl.DataFrame, data: Path) -> Markup:
    """Kept tokens for several questions about one scan, each about another organ.

    The scan is the one with the most organs asked about, the first by name if several; of each organ the
    first question is shown. Right and wrong answers are not told apart in choosing.

    Args:
        answers: table of :data:`pipelines.answers.ANSWER_SCHEMA`.
        data: folder with ``volumes/`` and, for the outlines, ``raw/labels/``.

    Raises:
        PhotonError: what reading the manifest, the volume or the label map raises.
    """
    photon = answers.filter((pl.col("policy") == "photon") & (pl.col("num_tokens") > 0))
    asked = photon.sort("question_id").unique(["scan_id", "organ"], keep="first", maintain_order=True)
    if asked.is_empty():
        return tag("p", "No question was answered from a scan.", class_="note")
    per_scan = asked.group_by("scan_id").len().sort("len", "scan_id", descending=[True, False])
    scan_id = per_scan["scan_id"][0]
    rows = asked.filter(scan_id=scan_id).sort(pl.col("organ") == "", "question_id").head(MAX_QUESTIONS).to_dicts()
    manifest = read_manifest(data / "volumes" / MANIFEST_NAME).filter(scan_id=scan_id, status="ok")
    if manifest.is_empty():
        raise PhotonError(
            "VOLUME_MISSING",
            data / "volumes",
            f"its manifest has no volume of scan {scan_id}.",
            "Give the data folder that the evaluation used.",
        )
    volume = read_volume(data / "volumes" / manifest["volume"][0])
    masks = read_organ_masks(data, scan_id, volume.spec, [row["organ"] for row in rows])
    figures = []
    for row in rows:
        kept, organ = kept_mask(row["kept"], row["num_tokens"]), masks.get(row["organ"])
        centre = middle_of(voxel_mask(kept, volume.voxels.shape) if organ is None else organ)
        planes = make_planes(volume.voxels, centre=centre, spacing_mm=volume_spacing_mm(volume), kept=kept, organ=organ)
        is_right = row["score"] == 1.0
        figures.append(
            picture(
                planes_picture(planes),
                f"Slices of scan {scan_id} with the tokens kept for: {row['question']}",
                tag("strong", row["question"]),
                f" Answer: {row['predicted'] or '(none)'} ",
                tag("span", "✓" if is_right else f"(truth: {row['gold']}, score {row['score']:.1f})",
                    class_="right" if is_right else "wrong"),
                f" · {row['num_kept']} of {row['num_tokens']} tokens kept",
            )
        )  # fmt: skip
    words = join(
        f"Scan {scan_id}, {len(rows)} questions. Tokens that a question keeps are bright and ",
        Markup('<span class="swatch" style="border-color:#ffb81a"></span>outlined in amber'),
        ", those it drops are dimmed; the organ asked about is ",
        Markup('<span class="swatch" style="border-color:#40e6f2"></span>outlined in cyan'),
        ". The slices run through the middle of the organ, or of the kept tokens where its place is not known. ",
        CONVENTION,
    )
    return join(tag("p", words, class_="soft"), tag("div", *figures, class_="gallery"))


def contact_sheet(scores: pl.DataFrame, volumes: Path) -> Markup:
    """The middle slices of every scored scan, with the tokens kept for the first question it was asked.

    Args:
        scores: table of :data:`pipelines.score_store.SCORE_SCHEMA`; rows with an error are passed over.
        volumes: folder with ``<scan_id>.safetensors``.

    Raises:
        PhotonError: what reading a volume raises.
    """
    first = scores.filter(pl.col("error").is_null()).unique("scan_id", keep="first", maintain_order=True)
    figures = [_sheet_figure(row, volumes) for row in first.head(MAX_SHEET_SCANS).iter_rows(named=True)]
    words = f"The tokens drawn are those kept for the first question each scan was asked. {CONVENTION}"
    if len(first) > MAX_SHEET_SCANS:
        words += f" {len(first) - MAX_SHEET_SCANS} further scans are not shown."
    return join(tag("p", words, class_="soft"), tag("div", *figures, class_="sheet"))


def volume_spacing_mm(volume: Volume) -> tuple[float, float, float]:
    """Voxel edges along z, y and x, from the volume's affine (whose columns are X, Y, Z)."""
    x, y, z = (float(sum(volume.affine[row, column] ** 2 for row in range(3)) ** 0.5) for column in range(3))
    return (z, y, x)


def _sheet_figure(row: dict[str, object], volumes: Path) -> Markup:
    volume = read_volume(volumes / f"{row['scan_id']}.safetensors")
    kept = kept_mask(_ints(row["kept"]), int(str(row["num_tokens"])))
    middle = tuple(side // 2 for side in volume.voxels.shape)
    planes = make_planes(
        volume.voxels,
        centre=(middle[0], middle[1], middle[2]),
        spacing_mm=volume_spacing_mm(volume),
        kept=kept,
    )
    shape, spacing = volume.metadata["shape"], volume.metadata["spacing_mm"]
    return picture(
        planes_picture(planes[:2], SHEET_PLANE_IN),
        f"Axial and coronal slice of scan {row['scan_id']}",
        tag("strong", str(row["scan_id"])),
        f" {volume.metadata['modality'].upper()}, {_times(shape)} at {_times(round(s, 2) for s in spacing)} mm",
        Markup("<br>"),
        f"{row['question']} {row['answer']} · {row['num_kept']} of {row['num_tokens']} tokens",
    )


def _ints(values: object) -> Sequence[int]:
    return [int(value) for value in values] if isinstance(values, Iterable) else []


def _times(values: Iterable[float]) -> str:
    return " × ".join(f"{value:g}" for value in values)
