"""The study's last part: ``study.json`` and the page ``study.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.baselines import MajorityAnswerer
from pipelines.files import write_json, write_text
from pipelines.metrics import score_answer
from pipelines.page import join, page, tag
from pipelines.provenance import code_version, environment_tags
from pipelines.questions import read_questions
from pipelines.report_pictures import question_gallery
from pipelines.results import Record
from pipelines.study import looking_sections, sections
from pipelines.study.analysis import BASELINES, analyse
from pipelines.study.answer_table import STUDY_SCHEMA, TRAINED, asked_columns, read_study_answers
from pipelines.study.cells import Content, region_of
from pipelines.study.records import RunRecord, WarmUpRecord
from pipelines.study.region_table import REGIONS, read_regions
from pipelines.study.spec import StudySpec
from pipelines.train_history import read_history

RESULT = "study.json"


def write_study(spec: StudySpec, data: Path, output: Path, records: Mapping[str, Record], *, data_version: str) -> Path:
    """Analyse the tables of all parts, and write ``study.json`` and ``study.html``; returns the first's path.

    Raises:
        PhotonError: what reading tables, questions or volumes raises.
    """
    order = [variant.name for variant in spec.variants]
    runs = [record for record in records.values() if isinstance(record, RunRecord)]
    runs.sort(key=lambda run: (order.index(run.variant), run.seed))
    warm_ups = [record for record in records.values() if isinstance(record, WarmUpRecord)]
    tables = [*(record.answers for record in runs), *(record.answers for record in warm_ups)]
    answers = read_study_answers(*map(Path, tables))
    asked = set(answers["question_id"].unique().to_list())
    answers = pl.concat([answers, majority_answers(data, asked, seed=spec.seeds[0])])
    answers = answers.join(read_regions(output / REGIONS), on="question_id", how="left")
    content: dict[str, Any] = {
        "study": spec.name,
        "data_version": data_version,
        "code_version": code_version(),
        "environment": environment_tags(),
        "warm_up": [
            {
                "seed": record.seed,
                "num_steps": record.num_steps,
                "validation_accuracy": record.validation_accuracy,
                "blind_test_accuracy": record.blind_accuracy,
            }
            for record in warm_ups
        ],
        **analyse(answers, runs, rare_subtypes=spec.rare_subtypes),
    }
    target = output / RESULT
    write_json(target, content)
    write_text(target.with_suffix(".html"), _page(content, answers, _histories(runs, warm_ups), data))
    return target


def _page(content: Content, answers: pl.DataFrame, histories: Mapping[str, list[sections.History]], data: Path) -> str:
    own = answers.filter(variant=content["main"], seed=content["questions"]["seeds"][0], condition=TRAINED)
    # The gallery knows the table of an evaluation, where the policy that prunes is called so.
    pictures = question_gallery(own.filter(pl.col("kept").is_not_null()).with_columns(policy=pl.lit("photon")), data)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = (
        f"Ways of choosing visual tokens, trained side by side. Data version {content['data_version'][:12]}, {made}."
    )
    header = join(tag("h1", f"Photon study “{content['study']}”"), tag("p", subtitle, class_="soft"))
    body = [
        ("In short", sections.headline(content)),
        ("Policies", sections.policies(content)),
        ("Where it looks", looking_sections.looking(content)),
        ("What if it looked elsewhere", looking_sections.what_if(content)),
        ("The same scan, several questions", pictures),
        ("Tokens by question", sections.amounts(content, answers)),
        ("Findings", sections.findings(content)),
        ("Training and cost", sections.training(content, histories)),
        ("Provenance", sections.provenance(content)),
    ]
    footer = tag("span", "For research. Not a medical device; not for use in diagnosis or treatment.")
    return page(f"Photon study {content['study']}", header, body, footer)


def _histories(runs: Sequence[RunRecord], warm_ups: Sequence[WarmUpRecord]) -> dict[str, list[sections.History]]:
    """Every variant's steps counted through from its warm-up's first."""
    found: dict[str, list[sections.History]] = {}
    for record in warm_ups:
        found.setdefault("warm-up", []).append(read_history(Path(record.history)))
    for run in runs:
        before = Path(run.history).parents[1] / "warm-up" / "history.jsonl"
        first = read_history(before) if before.exists() else []
        later = [{**row, "step": row["step"] + run.num_warm_up_steps} for row in read_history(Path(run.history))]
        found.setdefault(run.variant, []).append([*first, *later])
    return found


def table_of(content: Content) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The result in short, for people: a heading and one row a policy."""
    header = ("policy", "right, %", "95 % interval", "tokens", "of the region asked about, %", "of all, %")
    rows: list[tuple[str, ...]] = []
    for name in [*content["variants"], *(name for name in BASELINES if name in content["accuracy"])]:
        score = content["accuracy"][name]["all"]
        tokens = content["tokens"].get(name)
        region = region_of(content, name)
        rows.append(
            (
                name,
                f"{100 * score['value']:.1f}",
                f"{100 * score['low']:.1f} to {100 * score['high']:.1f}",
                f"{tokens['mean']:.0f} of {tokens['of']:.0f}" if tokens else "-",
                f"{100 * region['asked_share']['value']:.0f}" if region else "-",
                f"{100 * region['overall_share']['value']:.0f}" if region else "-",
            )
        )
    return header, rows


def majority_answers(data: Path, question_ids: set[str], *, seed: int) -> pl.DataFrame:
    """Answers to these questions by what most training answers said, as a variant "majority" of one seed."""
    questions = read_questions(data / "questions.jsonl")
    asked = [question for question in questions if question.question_id in question_ids]
    said = MajorityAnswerer([question for question in questions if question.split == "train"]).answer(None, asked)
    rows = [
        {
            "variant": "majority",
            "seed": seed,
            "condition": TRAINED,
            **asked_columns(question),
            "predicted": answer.text,
            "score": score_answer(question, answer.text),
            "confidence": answer.confidence,
            "num_tokens": 0,
            "num_kept": 0,
            "seconds": 0.0,
            "encode_seconds": 0.0,
        }
        for question, answer in zip(asked, said, strict=True)
    ]
    return pl.DataFrame(rows, schema=STUDY_SCHEMA, orient="row")
