"""The parts of a training run: batches, vision pretraining, Photon through its stages, and the text-only baseline."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
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
from photon.training.parallel import ALONE, Ranks
from photon.training.pretrain import pretrain_vision
from photon.training.stages import MODES, Curriculum, Stage, StageSchedule, WarmUpSwitch
from photon.training.step import TrainingBatch
from photon.training.working import write_note
from pipelines.dataset import BatchSource, Draw, LabelledScan
from pipelines.naming import NamingSource
from pipelines.start import Start
from pipelines.tracking import Tracker
from pipelines.train_history import append_row, history_row, truncate_history
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
    ranks: Ranks = ALONE
    num_done: int = dataclasses.field(default=0, init=False)
    """Steps of the parts that are finished, for the progress."""
    num_model_steps: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.num_model_steps = self.spec.schedule.num_steps

    @property
    def history(self) -> Path:
        """One JSON row a step."""
        return self.output / "history.jsonl"

    @property
    def notes(self) -> Path:
        """What each rank is working on."""
        return self.output / "working"

    def train_model(self, switch: WarmUpSwitch | None) -> Trainer:
        """Photon through all its stages.

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
        with self.ranks.together():
            if self.ranks.is_main:
                truncate_history(self.history, trainer.num_steps_done)

        def on_step(report: StepReport) -> None:
            row = history_row(report)
            if report.step == 0 and self.start.folder is not None:
                row["initialised"] = ", ".join(initialised)
            self.tracker.log({k: v for k, v in row.items() if isinstance(v, float)}, step=report.step)
            if self._is_validated(report.step + 1, trainer.curriculum):
                accuracy = validate(trainer, [partial(check.batch, 0, False) for check in checks], report.stage)
                row["validation_accuracy"] = accuracy
                self.tracker.log({"validation_accuracy": accuracy}, step=report.step)
                if (verdict := trainer.validated(accuracy)) is not None:
                    row["evidence"] = verdict
                    self._tell_verdict(verdict, trainer.curriculum, report.step + 1)
            if self.ranks.is_main:
                append_row(self.history, row, is_forced=(report.step + 1) % self.spec.save_every == 0)
            self.num_model_steps = trainer.schedule.num_steps
            self._tell(report.step, f"{report.stage}, loss {report.result.answer_loss:.2f}")

        def batch_at(step: int, with_flips: bool) -> list[TrainingBatch]:
            source = sources[MODES[trainer.schedule.stage_at(step)] != "full"]
            numbers, count = self._noted(source, step)
            return source.parts(step, with_flips, numbers, count)

        trainer.run(batch_at, on_step=on_step, save_to=self.output / "state", save_every=self.spec.save_every)
        self.num_model_steps = trainer.schedule.num_steps
        self.num_done += self.num_model_steps
        return trainer

    def _noted(self, source: BatchSource, step: int) -> tuple[list[int], int]:
        """This rank's micro-batches of a step, of how many, after a note of the scans in them."""
        numbers, count = self.ranks.dealt(self.spec.accumulate)
        write_note(self.notes, self.ranks.rank, step, source.names(step, numbers, count))
        return numbers, count

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

        place = model.visual.vision_patch_embed.proj.weight.device
        model.visual.to(self.device).requires_grad_(True)
        pretrain_vision(
            model.visual,
            lambda step: source.batch(step, self.spec.draw.max_shift),
            self.spec.naming,
            frequencies=source.frequencies(),
            on_step=on_step,
        )
        model.visual.zero_grad(set_to_none=True)  # what is left there would count in the norm of later gradients
        model.visual.to(place).requires_grad_(not self.spec.freeze_vision)

    def train_blind(self) -> Trainer:
        """The same decoder on the same questions without any scan."""
        source = self._source(self.scans, self._draw(self.spec.draw))
        schedule = StageSchedule(alignment=0, warm_up=self.spec.blind_steps, soft=0, hard=0, flip_after=0)
        trainer, _ = self._trainer("blind_state", schedule)
        trainer.run(
            lambda step, _: source.blind_parts(step, *self._noted(source, step)),
            on_step=lambda report: self._tell(report.step, "text-only baseline"),
            save_to=self.output / "blind_state",
            save_every=self.spec.save_every,
        )
        self.num_done += self.spec.blind_steps
        return trainer

    def measured(self, switch: WarmUpSwitch, blind: Trainer) -> WarmUpSwitch:
        """The switch with the validation accuracy of the text-only baseline as its own."""
        checks = [partial(self._source([scan], whole_draw(scan)).blind_batch, 0) for scan in self.validation]
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
        # Shards go to their rank's device one by one, so that no device ever holds the whole model.
        place = torch.device("cpu") if self.ranks.kind == "fsdp" else self.device
        model, initialised = self.start.build_model(self.spec.seed, place)
        model.backend, model.checkpoint_activations = self.backend, self.checkpoint_activations
        model.visual.requires_grad_(not self.spec.freeze_vision)
        trainer = Trainer(model, schedule, self.spec.optimiser, run_digest=digest, switch=switch, ranks=self.ranks)
        trainer.restore(self.output / state)
        return trainer, initialised

    def _tell(self, step: int, label: str) -> None:
        if self.on_progress and self.ranks.is_main:
            total = self.spec.naming.num_steps + self.num_model_steps + (self.spec.blind_steps if self.has_blind else 0)
            self.on_progress(self.num_done + step + 1, total, label)


@torch.no_grad()
def validate(trainer: Trainer, batches: Sequence[Callable[[], TrainingBatch]], stage: Stage) -> float:
    """Share of questions whose every answer token is predicted right, pruned as in ``stage``.

    One batch at a time; the ranks of ``trainer``, which all have to call this, share them out.

    Args:
        batches: what makes each batch.
    """
    mode: Mode = "full" if MODES[stage] == "full" else "hard"
    rank, size = trainer.ranks.rank, trainer.ranks.size
    counts = torch.zeros(2)
    for start in range(0, len(batches), size):
        is_own = start + rank < len(batches)
        # A rank that has run out takes part with the first batch again: shards are gathered by all together.
        batch = batches[start + rank if is_own else 0]().batch.to(trainer.device)
        counts += trainer.call(_num_right, batch, mode) * is_own
    right, asked = trainer.ranks.total(counts)
    return float(right / asked)


def _num_right(model: Photon, batch: PackedBatch, mode: Mode) -> torch.Tensor:
    """Questions answered rightly and questions asked: float32 [2] on the CPU."""
    output = model(batch, mode)
    rows, targets, branch = objectives.answer_targets(batch)
    is_right = model.logits(output.hidden[output.branch_rows[rows]]).argmax(-1) == targets
    all_right = torch.ones(len(batch.branch_lengths), device=branch.device)
    all_right = all_right.scatter_reduce(0, branch, is_right.float(), "amin")
    return torch.stack([all_right.sum(), torch.tensor(float(all_right.numel()), device=branch.device)]).cpu()


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
