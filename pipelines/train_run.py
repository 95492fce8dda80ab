"""The parts of a training run: batches, vision pretraining, Photon through its stages, and the text-only baseline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from photon import objectives
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.model.packing import PackedBatch
from photon.model.pruning import Mode
from photon.model.vision import VisionTower
from photon.ops.backend import Backend
from photon.training.loop import StepReport, Trainer
from photon.training.pretrain import pretrain_vision
from photon.training.stages import MODES, Curriculum, Stage, StageSchedule, WarmUpSwitch
from photon.training.step import TrainingBatch
from pipelines.dataset import BatchSource, Draw, LabelledScan, NamingSource
from pipelines.start import Start
from pipelines.tracking import Tracker
from pipelines.train_history import history_row, truncate_history
from pipelines.train_spec import TrainSpec

Progress = Callable[[int, int, str], None]
_LOG = logging.getLogger("photon")


@dataclasses.dataclass(kw_only=True)
class TrainRun:
    """What both models of a run are trained from, and how far the run is."""

    spec: TrainSpec
    start: Start
    scans: Sequence[LabelledScan]
    validation: Sequence[LabelledScan]
    data: Path
    output: Path
    tracker: Tracker
    on_progress: Progress | None
    data_version: str
    device: torch.device
    backend: Backend
    checkpoint_activations: bool
    has_blind: bool
    num_done: int = dataclasses.field(default=0, init=False)
    """Steps of the parts that are finished, for the progress."""
    num_model_steps: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.num_model_steps = self.spec.schedule.num_steps

    @property
    def history(self) -> Path:
        """One JSON row a step."""
        return self.output / "history.jsonl"

    def train_model(self, switch: WarmUpSwitch | None) -> tuple[Photon, Curriculum]:
        """Photon through all its stages, and the stages as they came.

        Args:
            switch: what ends the warm-up, its baseline known.
        """
        trainer, initialised = self._trainer("state", self.spec.schedule, switch)
        if trainer.num_steps_done == 0:
            self._pretrain_vision(trainer.model)
        self.num_done += self.spec.naming.num_steps
        tower = trainer.model.visual if self.spec.freeze_vision else None
        draws = [self._draw(draw) for draw in (self.spec.draw, self.spec.pruned_draw)]
        whole = self._source(self.scans, draws[0], tower)
        sources = {False: whole, True: whole.with_draw(draws[1])}
        checks = [self._source([scan], whole_draw(scan), tower) for scan in self.validation]
        truncate_history(self.history, trainer.num_steps_done)

        def on_step(report: StepReport) -> None:
            row = history_row(report)
            if report.step == 0 and self.start.folder is not None:
                row["initialised"] = ", ".join(initialised)
            self.tracker.log({k: v for k, v in row.items() if isinstance(v, float)}, step=report.step)
            if self._is_validated(report.step + 1, trainer.curriculum):
                accuracy = validate(trainer.model, (check.batch(0, False).batch for check in checks), report.stage)
                row["validation_accuracy"] = accuracy
                self.tracker.log({"validation_accuracy": accuracy}, step=report.step)
                if (verdict := trainer.validated(accuracy)) is not None:
                    row["evidence"] = verdict
                    self._tell_verdict(verdict, trainer.curriculum, report.step + 1)
            with self.history.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            self.num_model_steps = trainer.schedule.num_steps
            self._tell(report.step, f"{report.stage}, loss {report.result.answer_loss:.2f}")

        def batch_at(step: int, with_flips: bool) -> list[TrainingBatch]:
            is_pruned = MODES[trainer.schedule.stage_at(step)] != "full"
            return sources[is_pruned].parts(step, with_flips, range(self.spec.accumulate), self.spec.accumulate)

        trainer.run(batch_at, on_step=on_step, save_to=self.output / "state", save_every=self.spec.save_every)
        self.num_model_steps = trainer.schedule.num_steps
        self.num_done += self.num_model_steps
        return trainer.model.eval(), trainer.curriculum

    def _is_validated(self, num_done: int, curriculum: Curriculum) -> bool:
        is_last = num_done == curriculum.schedule.num_steps
        is_last_chance = curriculum.switch is not None and num_done == curriculum.warm_up_end
        return is_last or is_last_chance or num_done % self.spec.validate_every == 0

    def _tell_verdict(self, is_evidence: bool, curriculum: Curriculum, num_done: int) -> None:
        switch, accuracy = curriculum.switch, curriculum.accuracy
        assert switch is not None and switch.baseline is not None and accuracy is not None
        found = f"validation accuracy {accuracy:.3f}, without the scan {switch.baseline:.3f}, margin {switch.margin:g}"
        if is_evidence:
            _LOG.info("Warm-up ended on evidence after %d steps: %s.", num_done, found)
        else:
            _LOG.warning("Warm-up ended after %d steps, its longest, without evidence: %s.", num_done, found)

    def _pretrain_vision(self, model: Photon) -> None:
        """Teach the vision tower to name structures, where the data folder has label maps."""
        folder = self.data / "raw" / "labels"
        if self.spec.naming.num_steps == 0 or not folder.is_dir():
            return
        source = NamingSource(
            self.scans, folder, self.start.config, scans_per_step=self.spec.naming_scans_per_step, seed=self.spec.seed
        )

        def on_step(step: int, loss: float) -> None:
            self.tracker.log({"naming_loss": loss}, step=step)
            self._tell(step, f"vision pretraining, loss {loss:.3f}")

        model.visual.requires_grad_(True)
        pretrain_vision(
            model.visual,
            lambda step: source.batch(step, self.spec.draw.max_shift),
            self.spec.naming,
            frequencies=source.frequencies(),
            on_step=on_step,
        )
        model.visual.requires_grad_(not self.spec.freeze_vision)
        model.visual.zero_grad(set_to_none=True)  # what is left there would count in the norm of later gradients

    def train_blind(self) -> Photon:
        """The same decoder on the same questions without any scan."""
        source = self._source(self.scans, self._draw(self.spec.draw))
        schedule = StageSchedule(alignment=0, warm_up=self.spec.blind_steps, soft=0, hard=0, flip_after=0)
        trainer, _ = self._trainer("blind_state", schedule)
        trainer.run(
            lambda step, _: source.blind_parts(step, range(self.spec.accumulate), self.spec.accumulate),
            on_step=lambda report: self._tell(report.step, "text-only baseline"),
            save_to=self.output / "blind_state",
            save_every=self.spec.save_every,
        )
        self.num_done += self.spec.blind_steps
        return trainer.model.eval()

    def measured(self, switch: WarmUpSwitch, blind: Photon) -> WarmUpSwitch:
        """The switch with the validation accuracy of the text-only baseline as its own."""
        checks = (self._source([scan], whole_draw(scan)).blind_batch(0).batch for scan in self.validation)
        baseline = validate(blind, checks, "warm-up")
        _LOG.info("Validation accuracy without the scan: %.3f.", baseline)
        return dataclasses.replace(switch, baseline=baseline)

    def _draw(self, draw: Draw) -> Draw:
        """A frozen tower encodes a scan once, so that scan stays where it is."""
        return dataclasses.replace(draw, max_shift=(0, 0, 0)) if self.spec.freeze_vision else draw

    def _source(self, scans: Sequence[LabelledScan], draw: Draw, tower: VisionTower | None = None) -> BatchSource:
        return BatchSource(scans, self.start.prompter, self.start.config, draw, self.spec.seed, tower)

    def _trainer(
        self, state: str, schedule: StageSchedule, switch: WarmUpSwitch | None = None
    ) -> tuple[Trainer, tuple[str, ...]]:
        """A trainer where it last stopped, and the parameters that started without a checkpoint's."""
        parts = (self.spec.digest(), self.start.config.digest(), self.data_version, state, self.start.digest)
        digest = hashlib.sha256(" ".join(filter(None, parts)).encode()).hexdigest()[:12]
        model, initialised = self.start.build_model(self.spec.seed, self.device)
        model.backend, model.checkpoint_activations = self.backend, self.checkpoint_activations
        model.visual.requires_grad_(not self.spec.freeze_vision)
        trainer = Trainer(model, schedule, self.spec.optimiser, run_digest=digest, switch=switch)
        trainer.restore(self.output / state)
        return trainer, initialised

    def _tell(self, step: int, label: str) -> None:
        if self.on_progress:
            total = self.spec.naming.num_steps + self.num_model_steps + (self.spec.blind_steps if self.has_blind else 0)
            self.on_progress(self.num_done + step + 1, total, label)


@torch.no_grad()
def validate(model: Photon, batches: Iterable[PackedBatch], stage: Stage) -> float:
    """Share of questions whose every answer token is predicted right, pruned as in ``stage``, a batch at a time."""
    device = model.model.embed_tokens.weight.device
    mode: Mode = "full" if MODES[stage] == "full" else "hard"
    all_right = []
    for batch in (batch.to(device) for batch in batches):
        output = model(batch, mode)
        rows, targets, branch = objectives.answer_targets(batch)
        is_right = model.logits(output.hidden[output.branch_rows[rows]]).argmax(-1) == targets
        ones = torch.ones(len(batch.branch_lengths), device=device)
        all_right.append(ones.scatter_reduce(0, branch, is_right.float(), "amin"))
    return float(torch.cat(all_right).mean())


def whole_draw(scan: LabelledScan) -> Draw:
    """Every question of a scan, undisturbed."""
    return Draw(
        scans_per_step=1,
        questions_per_scan=len(scan.questions),
        max_shift=(0, 0, 0),
        robust_probability=0.0,
        flip_probability=0.0,
    )


def check_switch(spec: TrainSpec, train_blind: bool) -> bool:
    """Whether the text-only baseline is to be trained first, as what the model has to beat.

    Raises:
        PhotonError: ``TRAINING_INVALID`` when it would be needed and is not to be trained.
    """
    is_needed = spec.switch is not None and spec.switch.baseline is None
    if is_needed and not train_blind:
        fact = "it compares with the text-only baseline, which is not to be trained."
        raise PhotonError("TRAINING_INVALID", "switch", fact, "Train the baseline, or give the accuracy to beat.")
    return is_needed
