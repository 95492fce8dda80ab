"""A whole study at its smallest size: interrupted, gone on with, extended, and with nothing left to do."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from photon.checkpoint import WEIGHTS, load_tensors, read_config
from pipelines.study.answer_table import TRAINED, read_study_answers
from pipelines.study.processes import launch_here
from pipelines.study.records import RunRecord, WarmUpRecord
from pipelines.study.run import run_study
from pipelines.study.spec import StudySpec
from pipelines.tracking import open_store

SPEC = StudySpec.preset("smoke", variants=["photon", "slices"])


class Killed(BaseException):
    """Not caught by anything on the way."""


def run(data: Path, output: Path, spec: StudySpec = SPEC, on_progress: Any = None) -> Path:
    uri = f"sqlite:///{output.parent / 'mlflow.db'}"
    return run_study(spec, data, output, launch=launch_here, tracking_uri=uri, on_progress=on_progress)


@pytest.fixture(scope="module")
def whole(smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole") / "study"
    assert run(smoke_data, output) == output / "study.json"
    return output


def test_what_a_study_leaves(whole: Path) -> None:
    content = json.loads((whole / "study.json").read_text())
    assert content["variants"] == ["photon", "slices"]
    assert set(content["accuracy"]) == {"photon", "slices", "blind", "majority"}
    assert 0 < content["tokens"]["photon"]["mean"] <= content["tokens"]["photon"]["of"] == 12
    assert set(content["what_if"]["photon"]) == {TRAINED, *SPEC.variants[0].conditions}
    page = (whole / "study.html").read_text()
    for heading in ("In short", "Policies", "Where it looks", "What if it looked elsewhere", "Findings"):
        assert f">{heading}</h2>" in page
    assert page.count("<img ") >= 3, "kept tokens in slices"
    assert str(whole) not in page and "http://" not in page.replace("http://www.w3.org", "")


def test_starts_have_at_least_the_threads_that_the_spec_says(smoke_data: Path, tmp_path: Path) -> None:
    given: dict[str, int] = {}

    def launch(work: Any, arguments: Any, *, tracker: Any, on_progress: Any, threads: int) -> Any:
        given[work.__name__] = threads
        if work.__name__ == "train_model":
            raise Killed
        return launch_here(work, arguments, tracker=tracker, on_progress=on_progress, threads=threads)

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    spec = dataclasses.replace(SPEC, start_threads=2)
    for threads, of_starts in ((1, 2), (3, 3)):
        with pytest.raises(Killed):
            run_study(spec, smoke_data, tmp_path / f"{threads}", threads=threads, launch=launch, tracking_uri=uri)
        assert given == {"find_regions": threads, "make_vision_start": of_starts, "train_model": of_starts}


def test_variants_share_what_is_the_same_and_nothing_else(whole: Path) -> None:
    start = load_tensors(whole / "seed-0" / "vision" / WEIGHTS)
    shared, photon, slices = (
        load_tensors(whole / "seed-0" / place / "checkpoint" / WEIGHTS)
        for place in ("warm-up", "photon/train", "slices/train")
    )
    for name in start:
        if name.startswith("visual."):
            assert (start[name] == photon[name]).all() and (start[name] == slices[name]).all(), "the tower is frozen"
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert (start[moved] != shared[moved]).any() and (shared[moved] != photon[moved]).any()
    policies = {
        place: read_config(whole / "seed-0" / place / "checkpoint").pruning.policy
        for place in ("warm-up", "photon/train", "slices/warm-up", "slices/train")
    }
    assert policies == {
        "warm-up": "photon",
        "photon/train": "photon",
        "slices/warm-up": "slices",
        "slices/train": "slices",
    }
    warm_up = WarmUpRecord.read(whole / "records" / "warm-up-seed-0.json")
    steps = {place: len((whole / "seed-0" / place / "history.jsonl").read_text().splitlines())
             for place in ("warm-up", "photon/train", "slices/warm-up", "slices/train")}  # fmt: skip
    assert steps["warm-up"] == steps["slices/warm-up"] == warm_up.num_steps
    assert steps["photon/train"] == steps["slices/train"] == SPEC.lengths.soft + SPEC.lengths.hard


def test_slices_answer_from_fewer_tokens(whole: Path) -> None:
    table = read_study_answers(whole / "seed-0" / "slices" / "answers.parquet")
    assert set(table["num_tokens"]) == {12} and table["num_kept"].n_unique() == 1
    assert table["num_kept"][0] == 4  # one of three slabs
    assert table["kept"].n_unique() == 1


def test_records_say_what_was_found(whole: Path) -> None:
    record = RunRecord.read(whole / "records" / "photon-seed-0.json")
    table = read_study_answers(whole / "seed-0" / "photon" / "answers.parquet").filter(condition=TRAINED)
    assert record.accuracy == pytest.approx(table["score"].mean())
    assert record.num_kept == pytest.approx(table["num_kept"].mean())
    assert record.questions_per_second == pytest.approx(8 / record.step_seconds)
    assert record.train_peak_mib > 50 and record.answer_peak_mib > 50


def test_every_part_is_a_run_under_one_parent(whole: Path) -> None:
    store = open_store(f"sqlite:///{whole.parent / 'mlflow.db'}", "photon-study")
    parent = json.loads((whole / "records" / "run.json").read_text())["run_id"]
    runs = store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    by_name = {run.info.run_name: run for run in runs}
    assert set(by_name) == {"vision-seed-0", "warm-up-seed-0", "photon-seed-0", "slices-seed-0", "regions", "analysis"}
    photon = by_name["photon-seed-0"].data
    assert photon.metrics["accuracy"] == pytest.approx(
        RunRecord.read(whole / "records" / "photon-seed-0.json").accuracy
    )
    assert "accuracy/recognition" in photon.metrics and "what_if/removed" in photon.metrics
    steps = store.client.get_metric_history(by_name["photon-seed-0"].info.run_id, "loss")
    assert [entry.step for entry in steps] == list(range(SPEC.lengths.soft + SPEC.lengths.hard))


def test_an_interrupted_study_ends_where_an_unbroken_one_does(smoke_data: Path, tmp_path: Path, whole: Path) -> None:
    """Killed in the second variant's hard stage, after its last saved state."""
    seen: list[str] = []

    def kill(_done: int, _total: int, label: str) -> None:
        seen.append(label)
        if len([each for each in seen if each.startswith("slices-seed-0: hard")]) == 3:
            raise Killed

    with pytest.raises(Killed):
        run(smoke_data, tmp_path / "study", on_progress=kill)
    assert not (tmp_path / "study" / "study.json").exists()
    again: list[str] = []
    run(smoke_data, tmp_path / "study", on_progress=lambda _done, _total, label: again.append(label))
    assert not [label for label in again if re.match("(regions|(vision|warm-up|photon)-seed-0): (?!done)", label)]
    assert 0 < len([label for label in again if label.startswith("slices-seed-0: hard")]) < SPEC.lengths.hard
    assert not [label for label in again if label.startswith("slices-seed-0: warm-up")]
    for variant in ("photon", "slices"):
        ours, theirs = (
            read_study_answers(folder / "seed-0" / variant / "answers.parquet").drop("seconds", "encode_seconds")
            for folder in (whole, tmp_path / "study")
        )
        assert ours.equals(theirs)


def test_one_more_variant_is_all_that_is_trained(smoke_data: Path, whole: Path) -> None:
    labels: list[str] = []
    spec = StudySpec.preset("smoke", variants=["photon", "slices", "fixed"])
    before = (whole / "seed-0" / "photon" / "answers.parquet").read_bytes()
    result = run(smoke_data, whole, spec, lambda _done, _total, label: labels.append(label))
    assert {label.split(":")[0] for label in labels if not label.endswith(": done")} == {"fixed-seed-0"}
    assert (whole / "seed-0" / "photon" / "answers.parquet").read_bytes() == before
    assert json.loads(result.read_text())["variants"] == ["photon", "fixed", "slices"]


def test_a_threshold_that_starts_elsewhere(smoke_data: Path, whole: Path, tmp_path: Path) -> None:
    from pipelines.study.starts import write_with_threshold_bias

    start = whole / "seed-0" / "warm-up" / "checkpoint"
    moved = write_with_threshold_bias(start, tmp_path / "start", -5.0)
    before, after = load_tensors(start / WEIGHTS), load_tensors(moved / WEIGHTS)
    changed = [name for name in before if (before[name] != after[name]).any()]
    assert changed == ["model.layers.1.atp.predictor.mlp.2.bias"] and float(after[changed[0]]) == -5.0
    assert read_config(moved) == dataclasses.replace(
        read_config(start), pruning=dataclasses.replace(read_config(start).pruning, threshold_bias_init=-5.0)
    )
