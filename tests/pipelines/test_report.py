"""The report of a run: complete, self-contained and escaped, and honest about what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines import summaries
from pipelines.answers import POLICIES, write_answers
from pipelines.files import atomic_path
from pipelines.manifest import write_manifest
from pipelines.page import Markup, definitions, join, row, table, tag
from pipelines.report import build_report
from pipelines.report_evaluation import difference_text, score_cell
from pipelines.results import EvaluateRecord, ExportRecord, ScoreRecord, TrainRecord
from pipelines.scans.scan import Scan
from pipelines.score_store import score_frame
from pipelines.statistics import mean_interval
from pipelines.volumes import VOLUME_SPECS, resample, write_volume

SPEC = VOLUME_SPECS["smoke"]  # 3 x 2 x 2 = 12 tokens
EVIL = "Is 3 < 5 & <script>alert('x')</script>?"


def _write_volume(path: Path) -> str:
    generator = np.random.default_rng(0)
    scan = Scan(
        array=generator.integers(-1000, 400, (56, 56, 42)).astype(np.int16),
        affine=np.diag([-6.0, -6.0, 6.0, 1.0]),
        path=path,
        sha256="0" * 64,
        spacing_mm=(6.0, 6.0, 6.0),
        orientation="LPS",
        notes=(),
    )
    return write_volume(resample(scan, SPEC), path)


def _write_data(data: Path) -> None:
    (data / "volumes").mkdir(parents=True)
    digest = _write_volume(data / "volumes" / "scan-a.safetensors")
    row = {
        "scan_id": "scan-a", "source": "scan-a.nii", "source_sha256": "0" * 64, "status": "ok", "message": "",
        "volume": "scan-a.safetensors", "volume_sha256": digest, "spec_digest": SPEC.digest(),
        "shape": [56, 56, 42], "spacing_mm": [6.0, 6.0, 6.0], "orientation": "LPS", "modality": "ct",
    }  # fmt: skip
    write_manifest([row], data / "volumes" / "manifest.parquet")


def _answer_rows() -> list[dict[str, Any]]:
    rows = []
    for policy in POLICIES:
        for patient in ("secret-1", "secret-2", "secret-3"):
            for name, organ in (("q1", "liver"), ("q2", "spleen")):
                is_right = policy in ("photon", "all_tokens") or organ == "spleen"
                rows.append(
                    {
                        "policy": policy, "question_id": f"{patient}-{name}", "scan_id": "scan-a",
                        "patient_id": patient, "family": "recognition", "subtype": f"{organ} finding",
                        "organ": organ, "kind": "closed", "question": EVIL if name == "q1" else "Spleen?",
                        "gold": "yes" if patient != "secret-2" else "no", "predicted": "yes" if is_right else "no",
                        "score": float(is_right), "is_unparsed": False, "confidence": 0.5,
                        "num_tokens": 12 if policy != "blind" else 0, "num_kept": 3, "kept": [0, 1, 7],
                        "organ_tokens": 4, "organ_tokens_kept": 2, "organ_share_unasked": 0.25, "seconds": 0.1,
                    }
                )  # fmt: skip
    return rows


def _write_evaluation(folder: Path) -> None:
    folder.mkdir(parents=True)
    answers = write_answers(_answer_rows(), folder / "answers.parquet")
    EvaluateRecord(
        accuracy=dict(summaries.accuracy_by_policy(answers)),
        differences=dict(summaries.differences(answers)),
        tokens=summaries.tokens(answers),
        breakdown=summaries.breakdown(answers),
        findings=summaries.findings(answers),
        regions=summaries.regions(answers),
        diagnostics=summaries.diagnostics(answers),
        answers="/a/place/that/moved/answers.parquet",
        num_questions_skipped=4,
        split="test",
        data_version="data-version-1",
    ).write(folder / "evaluation.json")


def _write_training(run: Path) -> None:
    (run / "records").mkdir(exist_ok=True)
    (run / "checkpoint").mkdir()
    lines = [json.dumps({"step": step, "stage": "warm-up", "loss": 1.0, "kept_fraction": 1.0}) for step in range(5)]
    (run / "checkpoint" / "history.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo']))
    TrainRecord(
        checkpoint="", blind_checkpoint="", history="elsewhere.jsonl", num_steps=1234, elapsed_s=75.0,
        final_loss=0.5, kept_fraction=0.4, config_digest="config-1", data_version="data-version-1",
    ).write(run / "records" / "train.json")  # fmt: skip
    ExportRecord(
        folder="", files={"model": "/x/model.onnx"}, max_abs_logit_diff=2e-6, kept_sets_equal=True,
        answers_equal=True, token_counts_checked=[12, 24], config_digest="config-1", data_version="data-version-1",
    ).write(run / "records" / "export.json")  # fmt: skip


def _write_scores(run: Path) -> None:
    (run / "score" / "volumes").mkdir(parents=True)
    _write_volume(run / "score" / "volumes" / "real-mr.safetensors")
    common = {"question_id": "q1", "question": "Any lesion?", "model_version": "photon/7", "data_version": "d"}
    rows = [
        common | {"scan_id": "real-mr", "source": "real-mr.nii.gz", "answer": "no", "confidence": 0.9,
                  "num_tokens": 12, "num_kept": 2, "kept": [3, 4], "seconds": 0.2},
        common | {"scan_id": "torn", "source": "torn.nii.gz", "error": "GZIP_CORRUPT", "message": "bad <crc>"},
    ]  # fmt: skip
    with atomic_path(run / "score" / "scores.parquet") as temporary:
        score_frame(rows).write_parquet(temporary)
    ScoreRecord(
        table="scores.parquet", num_scans=2, rows=2, failed_rows=1, refused_scans=1, resumed_rows=1, seconds=7384.0,
        model_version="photon/7", data_version="data-version-2",
    ).write(run / "score" / "score.json")  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("project")
    run = root / "out" / "trial"
    _write_data(root / "data")
    _write_evaluation(run / "evaluate")
    _write_training(run)
    _write_scores(run)
    (run / "summary.json").write_text(json.dumps({"mlflow": {"parent_run_id": "run-77", "runs": {"train": "t-1"}}}))
    path = build_report(run, root / "data", provenance={"Machine": "a <laptop>"})
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


class _Balance(HTMLParser):
    """Fails on a tag that is closed without being open, or left open."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _text(report: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", report, flags=re.DOTALL).split())


def test_the_page_is_well_formed_and_self_contained(report: str) -> None:
    balance = _Balance()
    balance.feed(report)
    assert not balance.open
    assert not re.search(r"https?:|@import|<link|<iframe", report)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', report))
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", report))
    assert "default-src 'none'" in report


def test_text_is_escaped(report: str) -> None:
    assert "<script" not in report
    assert "Is 3 &lt; 5 &amp; &lt;script&gt;" in report
    assert "bad &lt;crc&gt;" in report
    assert "a &lt;laptop&gt;" in report


def test_every_section_says_what_was_measured(report: str) -> None:
    text = _text(report)
    for expected in (
        "asked 6 questions about scans of 3 patients", "25 % of the visual tokens", "4 further questions",
        "Seeing the scan makes a difference of +50.0 points", "These patients do not tell the two apart.",
        "spleen finding", "1,234", "model.onnx", "2.0e-06", "12, 24", "2 h 3 min", "GZIP_CORRUPT", "real-mr",
        "1 rows were taken over", "run-77", "photon/7", "config-1",
    ):  # fmt: skip
        assert expected in text, expected
    assert "data-version-1, data-version-2 (the stages of this run differ)" in text
    assert report.count("<svg") == 3
    assert report.count("<img") == 2 + 1  # two organs of the held-out scan, one scored scan
    assert "This run shows no" not in text


def test_patients_and_places_stay_out(report: str) -> None:
    assert "secret-" not in report
    assert "/a/place" not in report
    assert "/tmp" not in report


def test_an_empty_run_says_so_section_by_section(tmp_path: Path) -> None:
    text = _text(build_report(tmp_path / "run", tmp_path / "data").read_text())
    for name in ("evaluation", "training", "export", "archive scoring"):
        assert f"This run shows no {name}:" in text
    assert "Code version of this report" in text


def test_broken_parts_cost_only_their_own_section(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write_evaluation(run / "evaluate")
    _write_training(run)
    _write_scores(run)
    (run / "checkpoint" / "history.jsonl").unlink()
    (run / "records" / "export.json").write_text('{"folder": 1}')
    (run / "score" / "scores.parquet").write_bytes(b"torn")
    (run / "summary.json").write_text("[1")
    text = _text(build_report(run, tmp_path / "no-data").read_text())
    assert "asked 6 questions" in text
    assert "This run shows no training: elsewhere.jsonl: it holds no training step." in text
    assert "This run shows no export: export.json: the file is not a ExportRecord." in text
    assert "This run shows no archive scoring: scores.parquet: it is not a table of scores" in text
    assert "This run shows no pictures: manifest.parquet:" in text


def test_a_corrupt_volume_costs_the_pictures_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write_scores(run)
    path = run / "score" / "volumes" / "real-mr.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    text = _text(build_report(run, tmp_path).read_text())
    assert "GZIP_CORRUPT" in text
    assert "This run shows no contact sheet: real-mr.safetensors: it is not a whole volume file" in text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PhotonError) as caught:
        build_report(tmp_path / "file" / "run", tmp_path)
    assert caught.value.code == "OUTPUT_UNWRITABLE"


def test_page_elements_escape_all_but_markup() -> None:
    assert tag("b", "<", Markup("<i>x</i>"), title='"') == '<b title="&quot;">&lt;<i>x</i></b>'
    assert join("&", tag("i", "y")) == "&amp;<i>y</i>"
    assert row("a", "1", class_="k") == '<tr class="k"><td>a</td><td class="number">1</td></tr>'
    assert 'class="number" scope="col">B</th>' in table(["A", "B"], [])
    assert 'class="number"' not in table(["A", "B "], [])
    assert definitions([("k", "<v>")]) == "<dl><dt>k</dt><dd>&lt;v&gt;</dd></dl>"


def test_numbers_read_well() -> None:
    nothing = mean_interval([], [])
    assert "–" in score_cell(nothing)
    score = {"value": -0.046, "low": -0.102, "high": 0.048, "num_questions": 3, "num_patients": 2}
    assert difference_text(score) == "−4.6 points (95 % interval −10.2 to +4.8)"
