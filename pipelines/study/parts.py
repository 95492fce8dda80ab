"""The parts of a study: its starts, and the variants trained from them; each a stage with a run and a record."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.results import Record
from pipelines.stages import Job, content_digest
from pipelines.study import work
from pipelines.study.processes import Launch
from pipelines.study.records import RegionsRecord, RunRecord, VisionRecord, WarmUpRecord
from pipelines.study.region_table import REGIONS
from pipelines.study.schedule import WHOLE, Part, SharedProgress, Span
from pipelines.study.spec import StudySpec
from pipelines.study.starts import write_with_threshold_bias
from pipelines.study.variants import Variant
from pipelines.tracking import Tracker
from pipelines.train_history import read_history
from pipelines.train_spec import TrainSpec

ANSWERS = "answers.parquet"
OTHER_CODE = tuple(
    f"pipelines/study/{name}.py"
    for name in ("variants", "analysis", "report", "sections", "looking_sections", "cells", "figures")
)
"""Settings, whose values are among a part's inputs, and what is made of finished parts: a change redoes no part."""
log = logging.getLogger("photon.study")


@dataclasses.dataclass(kw_only=True)
class StudyParts:
    """The parts of a study and what they share."""

    spec: StudySpec
    data: Path
    output: Path
    version: str
    """Version of the data."""
    device: str
    launch: Launch
    threads: int
    """Of computation, for each part."""
    job: Job
    progress: SharedProgress = dataclasses.field(default_factory=lambda: SharedProgress(None, {}))

    def parts(self) -> list[Part]:
        """All of them, each after those that it needs."""
        steps = self.spec.lengths
        width = -(-self._start_threads // self.threads)
        parts = [Part("regions", (), 5, self.regions)]
        for seed in self.spec.seeds:
            vision, warm_up = f"vision-seed-{seed}", f"warm-up-seed-{seed}"
            parts += [
                Part(vision, (), steps.naming, functools.partial(self.vision, vision, seed), width),
                Part(
                    warm_up,
                    ("regions", vision),
                    steps.warm_up + steps.blind,
                    functools.partial(self.warm_up, warm_up, vision, seed),
                    width,
                ),
            ]
            for variant in self.spec.variants:
                name = f"{variant.name}-seed-{seed}"
                own = steps.warm_up if variant.has_own_warm_up else 0
                run = functools.partial(self.variant, name, vision, warm_up, variant, seed)
                parts.append(Part(name, ("regions", vision, warm_up), own + steps.soft + steps.hard, run))
        return parts

    @property
    def _start_threads(self) -> int:
        return max(self.threads, self.spec.start_threads)

    def regions(self, _known: Mapping[str, Record]) -> RegionsRecord:
        """What the questions ask about."""
        target = self.output / REGIONS

        def make(tracker: Tracker) -> RegionsRecord:
            arguments = {
                "data": self.data,
                "target": target,
                "split": self.spec.split,
                "max_scans": self.spec.max_scans,
            }
            found = self._compute("regions", WHOLE, work.find_regions, arguments, tracker)
            return RegionsRecord(table=str(target), **found)

        return self._stage("regions", RegionsRecord, make, self._asked(()), [target], target)

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
                is_start=True,
            )
            return VisionRecord(seed=seed, checkpoint=str(folder), num_steps=self.spec.lengths.naming, **found)

        inputs = {
            "seed": seed,
            "model": self.spec.model,
            "naming": dataclasses.asdict(self.spec.naming),
            "naming_scans_per_step": self.spec.naming_scans_per_step,
            "pruning": self.spec.pruning,
            "max_shift": self.spec.draw.max_shift,
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
            rows = read_history(Path(trained["history"]))
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
            other_code=OTHER_CODE,
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
        # The shared warm-up is what the text-only model is trained beside.
        return self._compute(name, span, work.train_model, arguments, tracker, is_start=train_blind)

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
            "regions": self.output / REGIONS,
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
        self,
        name: str,
        span: Span,
        function: Any,
        arguments: dict[str, Any],
        tracker: Tracker,
        *,
        is_start: bool = False,
    ) -> dict[str, Any]:
        on_progress = self.progress.of(name, span)
        threads = self._start_threads if is_start else self.threads
        found: dict[str, Any] = self.launch(
            function, arguments, tracker=tracker, on_progress=on_progress, threads=threads
        )
        return found


def _vision(record: Record) -> VisionRecord:
    assert isinstance(record, VisionRecord)
    return record
