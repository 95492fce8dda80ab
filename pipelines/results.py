"""The typed records that stages hand each other and write to disk: frozen, plain data, JSON both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

from pipelines.files import read_json, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Base of every stage result. Fields are JSON values, other records aside; paths are strings."""

    def as_dict(self) -> dict[str, Any]:
        """The record as nested plain dictionaries."""
        return dataclasses.asdict(self)

    def write(self, target: Path) -> Path:
        """Write the record as JSON, atomically."""
        write_json(target, self.as_dict())
        return target

    @classmethod
    def read(cls, source: Path) -> Self:
        """Read a record written by :meth:`write`.

        Raises:
            PhotonError: ``RECORD_UNREADABLE`` when the file is missing or is not this record.
        """
        from photon.errors import PhotonError

        remedy = "Run the stage that writes it again."
        content = read_json(source, "RECORD_UNREADABLE", remedy)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise PhotonError("RECORD_UNREADABLE", source, f"the file is not a {cls.__name__}.", remedy)
        return cls(**content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecord(Record):
    """What `generate` made: the raw archive, its questions and their split."""

    folder: str
    num_scans: int
    num_patients: int
    num_questions: int
    num_questions_by_split: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessRecord(Record):
    """What `preprocess` made of a folder of scans.

    `num_new` volumes were made by this run, `num_unchanged` were whole and up to date. `removed` lists scans of the
    last manifest that are gone. `num_without_row` volumes lie in the folder although no row names them.
    """

    folder: str
    manifest: str
    num_ok: int
    num_refused: int
    refused_by_code: dict[str, int]
    spec: dict[str, Any]
    spec_digest: str
    num_new: int
    num_unchanged: int
    removed: list[str]
    num_without_row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContactSheetRecord(Record):
    """Pages that show the scans of a folder of volumes.

    `num_refused` were refused by preprocessing; `unread` has scan_id, volume, code and message of each whose volume
    cannot be read.
    """

    pages: list[str]
    num_shown: int
    num_refused: int
    unread: list[dict[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionRecord(Record):
    """The DVC version of `data/`. `status` is `matches` (the bytes that data.dvc records), `new` (they differ,
    data.dvc now records the new version) or `first` (there was no data.dvc)."""

    data_version: str
    recorded_version: str | None
    status: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """A finished training run. `blind_checkpoint` is "" where no text-only model was trained. `num_steps` were done:
    fewer than planned when evidence ended the warm-up."""

    checkpoint: str
    blind_checkpoint: str
    history: str
    num_steps: int
    elapsed_s: float
    final_loss: float
    kept_fraction: float
    config_digest: str
    data_version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateRecord(Record):
    """Scores of a checkpoint on one split. Each score is {"value", "low", "high", "num_questions", "num_patients"}.

    `accuracy` has the keys photon, all_tokens, blind, majority; `differences` are paired ("photon - blind" ...);
    `breakdown` rows hold policy, group ("family", "subtype" or "kind"), name and a score; `findings` rows hold a yes/no
    subtype, policy, counts and three scores; `regions` rows hold an organ and the shares of its tokens that were kept;
    `diagnostics` has other metrics of the same answers by policy; `answers` names the Parquet file with one row a
    policy and question. Questions about scans that preprocessing refused are skipped and counted. `closed_by` says how
    models answered closed questions: "generation" (in their own words) or "likelihood" (the likeliest option).
    """

    accuracy: dict[str, Any]
    differences: dict[str, Any]
    tokens: dict[str, Any]
    breakdown: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    regions: list[dict[str, Any]]
    diagnostics: dict[str, dict[str, float]]
    answers: str
    num_questions_skipped: int
    split: str
    data_version: str
    closed_by: str = "generation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """An accepted ONNX export and what its gate measured."""

    folder: str
    files: dict[str, str]
    max_abs_logit_diff: float
    kept_sets_equal: bool
    answers_equal: bool
    token_counts_checked: list[int]
    config_digest: str
    data_version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRecord(Record):
    """A finished archive run."""

    table: str
    num_scans: int
    rows: int
    failed_rows: int
    refused_scans: int
    resumed_rows: int
    seconds: float
    model_version: str
    data_version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportRecord(Record):
    """What `photon import` made of a public dataset.

    Counts of questions are of this dataset alone, after `num_dropped` (of all datasets in the folder) were left out
    because of leaks. Scans asked about (0 when none were looked for) are ok, refused when they were read, or missing:
    without a file, or without a known header. `num_leaks` counts what is both learnt and tested, in all questions of
    the folder.
    """

    dataset: str
    folder: str
    report: str
    num_questions: int
    num_questions_by_split: dict[str, int]
    num_questions_by_kind: dict[str, int]
    num_dropped: int
    num_rows_refused: int
    refused_by_reason: dict[str, int]
    num_scans_asked: int
    num_scans_ok: int
    num_scans_refused: int
    num_scans_missing: int
    scans_refused_by_code: dict[str, int]
    num_leaks: int
    leaks_by_check: dict[str, int]
