"""Run a study: starts, variants and answers of every seed, in parallel where nothing waits for the other.

The output folder::

    seed-0/vision/            checkpoint of the vision start
    seed-0/warm-up/           checkpoint/, blind/, history.jsonl, blind.parquet
    seed-0/<variant>/         train/ (and warm-up/, start/ where it has its own), answers.parquet
    records/                  what every part found, and from which inputs
    study.json  study.html    the analysis
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from photon.device import choose_device
from photon.training.loop import Precision
from pipelines.results import Record
from pipelines.stages import Job, OnProgress, content_digest, open_job
from pipelines.study import work
from pipelines.study.processes import Launch, launch_in_process
from pipelines.study.records import RunRecord, VisionRecord, WarmUpRecord
from pipelines.study.schedule import WHOLE, Part, SharedProgress, Span, run_parts
from pipelines.study.spec import StudySpec
from pipelines.study.starts import write_with_threshold_bias
from pipelines.study.variants import Variant
from pipelines.tracking import Tracker, open_store
from pipelines.train_spec import TrainSpec
from pipelines.versioning import folder_version
from pipelines.workers import default_num_workers

ANSWERS = "answers.parquet"
log = logging.getLogger("photon.study")


def run_study(
    spec: StudySpec,
    data: Path,
    output: Path,
    *,
    workers: int = 1,
    threads: int = 1,
    device: str = "cpu",
    launch: Launch = launch_in_process,
    on_progress: OnProgress | None = None,
    tracking_uri: str | None = None,
    is_fresh: bool = False,
) -> Path:
    """Train and question every variant from every seed, and write ``study.json`` and ``study.html``.

    Run again after an interruption, it skips the parts that are finished and unchanged, and goes on with those it was
    in the middle of from their last saved step.

    Args:
        data: preprocessed data folder with questions in the splits train, val and ``spec.split``.
        workers: parts that run at a time, each in a process of its own.
        threads: of computation, for each part.
        launch: how a part's computation is run.
        on_progress: called with steps done, steps in all and what is going on.
        tracking_uri: MLflow store; None is the environment's.
        is_fresh: do finished parts again.

    Returns:
        Path of ``study.json``.

    Raises:
        PhotonError: whatever a part finds wrong; the parts that run beside it are finished first.
    """
    from pipelines.study.report import write_study

    store = open_store(tracking_uri, "photon-study")
    version = folder_version(data)
    settings = {**dataclasses.asdict(spec), "data_version": version}
    with open_job(output, store, name=f"study-{spec.name}", settings=settings, is_fresh=is_fresh) as job:
        job.tag_all({"data_version": version})
        study = _Study(spec, data.resolve(), output.resolve(), version, device, launch, threads, job)
        parts = study.parts()
        study.progress = SharedProgress(on_progress, {part.name: part.num_units for part in parts})
        records = run_parts(parts, workers)
        with job.open_stage("analysis") as tracker:
            target = write_study(spec, study.data, study.output, records, data_version=version)
            tracker.log_artifact(target)
            tracker.log_artifact(target.with_suffix(".html"))
        job.parent.log_summary(_headline(records))
        return target


def run_preset(
    preset: str,
    data: Path,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    variants: Collection[str] | None = None,
    keep_ratio: float | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    is_fresh: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """:func:`run_study` of a preset, with as many processes and threads as fit this machine.

    Args:
        seeds, variants, keep_ratio, precision: as :meth:`StudySpec.preset` has them.
        workers: parts that run at a time; default two on a CPU with two cores, one on a GPU.
        device: "cpu", "cuda" or "auto".

    Raises:
        PhotonError: as :func:`run_study`; ``PRESET_UNKNOWN``, ``VARIANT_UNKNOWN``.
    """
    spec = StudySpec.preset(preset, seeds=seeds, variants=variants, keep_ratio=keep_ratio, precision=precision)
    place, cores = choose_device(device).type, default_num_workers()
    num_workers = workers or (min(2, cores) if place == "cpu" else 1)
    return run_study(
        spec,
        data,
        output,
        workers=num_workers,
        threads=max(1, cores // num_workers),
        device=place,
        on_progress=on_progress,
        is_fresh=is_fresh,
    )


class _Study:
    """The parts of a study and what they share."""

    def __init__(
        self,
        spec: StudySpec,
        data: Path,
        output: Path,
        version: str,
        device: str,
        launch: Launch,
        threads: int,
        job: Job,
    ) -> None:
        self.spec, self.data, self.output, self.version = spec, data, output, version
        self.device, self.launch, self.threads, self.job = device, launch, threads, job
        self.progress = SharedProgress(None, {})

    def parts(self) -> list[Part]:
        """All of them, each after those that it needs."""
        steps, parts = self.spec.lengths, []
        for seed in self.spec.seeds:
            vision, warm_up = f"vision-seed-{seed}", f"warm-up-seed-{seed}"
            parts += [
                Part(vision, (), steps.naming, functools.partial(self.vision, vision, seed)),
                Part(
                    warm_up,
                    (vision,),
                    steps.warm_up + steps.blind,
                    functools.partial(self.warm_up, warm_up, vision, seed),
                ),
            ]
            for variant in self.spec.variants:
                name = f"{variant.name}-seed-{seed}"
                own = steps.warm_up if variant.has_own_warm_up else 0
                run = functools.partial(self.variant, name, vision, warm_up, variant, seed)
                parts.append(Part(name, (vision, warm_up), own + steps.soft + steps.hard, run))
        return parts

    def vision(self, name: str, seed: int, _known: Mapping[str, Record]) -> VisionRecord:
        """The vision start."""
        folder = self.output / f"seed-{seed}" / "vision"
        spec = dataclasses.replace(self.spec, variants=())

        def make(tracker: Tracker) -> VisionRecord:
            found = self._compute(
                name,
                WHOLE,
                work.make_vision_start,
                {"spec": spec, "data": self.data, "folder": folder, "seed": seed, "device": self.device},
                tracker,
            )
            return VisionRecord(seed=seed, checkpoint=str(folder), num_steps=self.spec.lengths.naming, **found)

        inputs = {
            "seed": seed,
            "model": self.spec.model,
            "naming": dataclasses.asdict(self.spec.naming),
            "naming_scans_per_step": self.spec.naming_scans_per_step,
        }
        return self._stage(name, VisionRecord, make, inputs, [folder], folder)

    def warm_up(self, name: str, vision: str, seed: int, known: Mapping[str, Record]) -> WarmUpRecord:
        """The shared warm-up, the text-only model and its answers."""
        start, folder = Path(_vision(known[vision]).checkpoint), self.output / f"seed-{seed}" / "warm-up"
        training, answers = self.spec.warm_up(seed), folder / "blind.parquet"

        def make(tracker: Tracker) -> WarmUpRecord:
            trained = self._train(name, (0.0, 0.95), training, folder, start, tracker, train_blind=True)
            checkpoint = Path(trained["blind_checkpoint"])
            blind = self._answer(name, checkpoint, answers, "blind", seed, (), tracker, has_volume=False)
            rows = work.read_history(Path(trained["history"]))
            validated = [row["validation_accuracy"] for row in rows if "validation_accuracy" in row]
            return WarmUpRecord(
                seed=seed,
                checkpoint=trained["checkpoint"],
                blind_checkpoint=trained["blind_checkpoint"],
                history=trained["history"],
                answers=str(answers),
                num_steps=trained["num_steps"],
                validation_accuracy=float(validated[-1]),
                blind_accuracy=blind["accuracy"],
                seconds=trained["train_seconds"],
            )

        inputs = {"training": dataclasses.asdict(training), "start": content_digest(start), **self._asked(())}
        outputs = [folder / "checkpoint", folder / "blind", folder / "history.jsonl", answers]
        return self._stage(name, WarmUpRecord, make, inputs, outputs, folder)

    def variant(
        self, name: str, vision: str, warm_up: str, variant: Variant, seed: int, known: Mapping[str, Record]
    ) -> RunRecord:
        """A variant's training and answers."""
        shared, folder = known[warm_up], self.output / f"seed-{seed}" / variant.name
        assert isinstance(shared, WarmUpRecord)
        num_steps = shared.num_steps
        start = Path(_vision(known[vision]).checkpoint if variant.has_own_warm_up else shared.checkpoint)
        before, training = self.spec.own_warm_up(variant, seed, num_steps), self.spec.training(variant, seed)

        def make(tracker: Tracker) -> RunRecord:
            begin, middle = start, 0.0
            if variant.has_own_warm_up:
                middle = 0.6
                own = self._train(name, (0.0, middle), before, folder / "warm-up", begin, tracker)
                begin = Path(own["checkpoint"])
            if "threshold_bias_init" in variant.pruning:
                bias = float(variant.pruning["threshold_bias_init"])
                begin = write_with_threshold_bias(begin, folder / "start", bias)
            trained = self._train(name, (middle, 0.9), training, folder / "train", begin, tracker)
            checkpoint = Path(trained["checkpoint"])
            said = self._answer(name, checkpoint, folder / ANSWERS, variant.name, seed, variant.conditions, tracker)
            names = {field.name for field in dataclasses.fields(RunRecord)}
            found = {key: value for key, value in (trained | said).items() if key in names}
            record = RunRecord(
                variant=variant.name,
                seed=seed,
                answers=str(folder / ANSWERS),
                num_warm_up_steps=num_steps,
                **found,
            )
            log.info(
                "%s, seed %d: %.1f %% right from %.0f of %.0f tokens.",
                variant.name, seed, 100 * record.accuracy, record.num_kept, record.num_tokens,
            )  # fmt: skip
            return record

        inputs = {
            "training": dataclasses.asdict(training),
            "own_warm_up": dataclasses.asdict(before) if variant.has_own_warm_up else None,
            "start": content_digest(start),
            **self._asked(variant.conditions),
        }
        outputs = [folder / "train" / "checkpoint", folder / "train" / "history.jsonl", folder / ANSWERS]
        return self._stage(name, RunRecord, make, inputs, outputs, folder)

    def _asked(self, conditions: tuple[str, ...]) -> dict[str, Any]:
        return {"conditions": conditions, "split": self.spec.split, "max_scans": self.spec.max_scans}

    def _stage(self, name: str, kind: Any, make: Any, inputs: dict[str, Any], outputs: list[Path], folder: Path) -> Any:
        record = self.job.run_stage(
            name,
            kind,
            lambda tracker, _: make(tracker),
            inputs={**inputs, "data_version": self.version},
            outputs=outputs,
            scratch=[folder],
        )
        self.progress.finish(name)
        return record

    def _train(
        self,
        name: str,
        span: Span,
        training: TrainSpec,
        output: Path,
        start: Path,
        tracker: Tracker,
        *,
        train_blind: bool = False,
    ) -> dict[str, Any]:
        arguments = {
            "training": training,
            "data": self.data,
            "output": output,
            "data_version": self.version,
            "start_from": start,
            "train_blind": train_blind,
            "device": self.device,
        }
        return self._compute(name, span, work.train_model, arguments, tracker)

    def _answer(
        self,
        name: str,
        checkpoint: Path,
        target: Path,
        variant: str,
        seed: int,
        conditions: tuple[str, ...],
        tracker: Tracker,
        *,
        has_volume: bool = True,
    ) -> dict[str, Any]:
        arguments = {
            "checkpoint": checkpoint,
            "data": self.data,
            "target": target,
            "variant": variant,
            "seed": seed,
            "conditions": conditions,
            "split": self.spec.split,
            "has_volume": has_volume,
            "max_scans": self.spec.max_scans,
            "device": self.device,
        }
        return self._compute(name, (0.95, 1.0), work.answer_questions, arguments, tracker)

    def _compute(
        self, name: str, span: Span, function: Any, arguments: dict[str, Any], tracker: Tracker
    ) -> dict[str, Any]:
        on_progress = self.progress.of(name, span)
        found: dict[str, Any] = self.launch(
            function, arguments, tracker=tracker, on_progress=on_progress, threads=self.threads
        )
        return found


def _vision(record: Record) -> VisionRecord:
    assert isinstance(record, VisionRecord)
    return record


def _headline(records: Mapping[str, Record]) -> dict[str, float]:
    """Mean accuracy and tokens of every variant, for comparing studies."""
    runs = [record for record in records.values() if isinstance(record, RunRecord)]
    found = {}
    for variant in {run.variant for run in runs}:
        mine = [run for run in runs if run.variant == variant]
        found[f"accuracy/{variant}"] = sum(run.accuracy for run in mine) / len(mine)
        found[f"tokens/{variant}"] = sum(run.num_kept for run in mine) / len(mine)
    return found
