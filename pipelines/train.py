"""The train stage: Photon through its stages, and the text-only baseline, on a preprocessed data folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from photon import objectives
from photon.checkpoint import replace_folder, write_model
from photon.device import choose_device
from photon.model.network import Photon
from photon.model.pruning import Mode
from photon.ops.backend import Backend, resolve
from photon.training.loop import StepReport, Trainer
from photon.training.pretrain import pretrain_vision
from photon.training.stages import MODES, Stage, StageSchedule
from photon.training.step import TrainingBatch
from pipelines.dataset import BatchSource, Draw, LabelledScan, NamingSource, read_split
from pipelines.files import lock_output, prepare_output_folder, write_json
from pipelines.results import TrainRecord
from pipelines.start import Start, start_from_checkpoint, start_from_scratch
from pipelines.text import TOKENIZER, Prompter
from pipelines.tracking import NullTracker, Tracker
from pipelines.train_spec import TrainSpec

PROVENANCE = "provenance.json"
Progress = Callable[[int, int, str], None]


def train(
    spec: TrainSpec,
    data: Path,
    output: Path,
    *,
    data_version: str,
    start_from: Path | None = None,
    device: str = "cpu",
    backend: Backend = "auto",
    checkpoint_activations: bool = False,
    tracker: Tracker | None = None,
    on_progress: Progress | None = None,
) -> TrainRecord:
    """Train Photon and its blind baseline; an interrupted run continues where it stopped.

    Writes ``checkpoint/`` and ``blind/`` (weights, config.json, tokenizer.json, prompt.json, provenance.json),
    ``history.jsonl`` with one row a step (the first names what a checkpoint to start from did not have), the resumable
    ``state/`` and ``blind_state/``, and ``record.json``.

    Args:
        data: folder with ``volumes/`` and ``questions.jsonl``.
        output: folder of the run; a run with other settings or data is refused, not overwritten.
        data_version: version of ``data``, part of the run's identity.
        start_from: checkpoint folder whose weights and tokenizer both models start with; its content is part of the
            run's identity. None for the tiny model from scratch.
        device: "cpu", "cuda" or "auto"; no part of the run's identity, so it may change from start to start.
        backend: implementation of the pruning operators, "auto", "reference" or "triton"; they agree to rounding, and
            so it is no part of the run's identity.
        checkpoint_activations: compute a layer's inner values again in the backward pass instead of keeping them; less
            memory, more time, the same numbers, and so no part of the run's identity either.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``, ``OUTPUT_BUSY``, ``SPLIT_EMPTY``, ``CHECKPOINT_MISMATCH``,
            ``TRAINING_DIVERGED``, ``GPU_UNAVAILABLE``, ``DEVICE_UNKNOWN``, ``BACKEND_UNAVAILABLE``, ``BACKEND_UNKNOWN``
            and whatever reading the data or ``start_from`` raises.
    """
    started = time.perf_counter()
    place = choose_device(device)
    operators = resolve(backend, place)
    prepare_output_folder(output)
    with lock_output(output):
        tracker = tracker or NullTracker()
        scans, validation = read_split(data, "train"), read_split(data, "val")
        texts = _texts(scans)
        start = start_from_scratch(texts) if start_from is None else start_from_checkpoint(start_from, texts)
        identity = {"model": start.config.to_hf(), "data_version": data_version, "start_digest": start.digest}
        tracker.log_hyperparameters(
            {**dataclasses.asdict(spec), **identity, "device": place.type, "operators": operators}
        )
        run = _Run(
            spec,
            start,
            scans,
            validation,
            data,
            output,
            tracker,
            on_progress,
            data_version,
            place,
            backend,
            checkpoint_activations,
        )
        model = run.train_model()
        blind = run.train_blind()
        volume_spec = scans[0].volume.spec.as_dict()
        for name, trained in (("checkpoint", model), ("blind", blind)):
            _write_checkpoint(trained, start.prompter, output / name, volume_spec, data_version)
        history = _read_history(run.history)
        record = TrainRecord(
            checkpoint=str(output / "checkpoint"),
            blind_checkpoint=str(output / "blind"),
            history=str(run.history),
            num_steps=spec.schedule.num_steps,
            elapsed_s=time.perf_counter() - started,
            final_loss=float(history[-1]["answer_loss"]),
            kept_fraction=float(history[-1]["kept_fraction"]),
            config_digest=start.config.digest(),
            data_version=data_version,
        )
        record.write(output / "record.json")
        tracker.log_summary({"final_loss": record.final_loss, "train_elapsed_s": record.elapsed_s})
        tracker.log_artifact(run.history)
        tracker.log_artifact(output / "checkpoint")
    return record


@dataclasses.dataclass
class _Run:
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

    @property
    def history(self) -> Path:
        """One JSON row a step."""
        return self.output / "history.jsonl"

    def train_model(self) -> Photon:
        """Photon through all its stages."""
        sources = {
            is_pruned: self._source(self.scans, draw)
            for is_pruned, draw in ((False, self.spec.draw), (True, self.spec.pruned_draw))
        }
        checks = [self._source([scan], _whole(scan)) for scan in self.validation]
        trainer, initialised = self._trainer("state", self.spec.schedule)
        if trainer.num_steps_done == 0:
            self._pretrain_vision(trainer.model)
        _truncate_history(self.history, trainer.num_steps_done)

        def on_step(report: StepReport) -> None:
            row = _history_row(report)
            if report.step == 0 and self.start.folder is not None:
                row["initialised"] = ", ".join(initialised)
            self.tracker.log({k: v for k, v in row.items() if isinstance(v, float)}, step=report.step)
            is_last = report.step + 1 == self.spec.schedule.num_steps
            if is_last or (report.step + 1) % self.spec.validate_every == 0:
                row["validation_accuracy"] = validate(trainer.model, checks, report.stage)
                self.tracker.log({"validation_accuracy": float(row["validation_accuracy"])}, step=report.step)
            with self.history.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            done = self.spec.naming.num_steps + report.step
            self._tell(done, f"{report.stage}, loss {report.result.answer_loss:.2f}")

        def batch_at(step: int, with_flips: bool) -> TrainingBatch:
            is_pruned = MODES[self.spec.schedule.stage_at(step)] != "full"
            return sources[is_pruned].batch(step, with_flips)

        trainer.run(batch_at, on_step=on_step, save_to=self.output / "state", save_every=self.spec.save_every)
        return trainer.model.eval()

    def _pretrain_vision(self, model: Photon) -> None:
        """Teach the vision tower to name structures, where the data folder has label maps."""
        folder = self.data / "raw" / "labels"
        if self.spec.naming.num_steps == 0 or not folder.is_dir():
            return
        source = NamingSource(
            self.scans, folder, self.start.config, scans_per_step=self.spec.naming_scans_per_step, seed=self.spec.seed
        )
        config = self.spec.naming

        def on_step(step: int, loss: float) -> None:
            self.tracker.log({"naming_loss": loss}, step=step)
            self._tell(step, f"vision pretraining, loss {loss:.3f}")

        pretrain_vision(
            model.visual,
            lambda step: source.batch(step, self.spec.draw.max_shift),
            config,
            frequencies=source.frequencies(),
            on_step=on_step,
        )

    def train_blind(self) -> Photon:
        """The same decoder on the same questions without any scan."""
        source = self._source(self.scans, self.spec.draw)
        before = self.spec.naming.num_steps + self.spec.schedule.num_steps
        schedule = StageSchedule(alignment=0, warm_up=self.spec.blind_steps, soft=0, hard=0, flip_after=0)
        trainer, _ = self._trainer("blind_state", schedule)
        trainer.run(
            lambda step, _: source.blind_batch(step),
            on_step=lambda report: self._tell(before + report.step, "text-only baseline"),
            save_to=self.output / "blind_state",
            save_every=self.spec.save_every,
        )
        return trainer.model.eval()

    def _source(self, scans: Sequence[LabelledScan], draw: Draw) -> BatchSource:
        return BatchSource(scans, self.start.prompter, self.start.config, draw, self.spec.seed)

    def _trainer(self, state: str, schedule: StageSchedule) -> tuple[Trainer, tuple[str, ...]]:
        """A trainer where it last stopped, and the parameters that started without a checkpoint's."""
        parts = (self.spec.digest(), self.start.config.digest(), self.data_version, state, self.start.digest)
        digest = hashlib.sha256(" ".join(filter(None, parts)).encode()).hexdigest()[:12]
        model, initialised = self.start.build_model(self.spec.seed, self.device)
        model.backend, model.checkpoint_activations = self.backend, self.checkpoint_activations
        trainer = Trainer(model, schedule, self.spec.optimiser, run_digest=digest)
        trainer.restore(self.output / state)
        return trainer, initialised

    def _tell(self, num_done: int, label: str) -> None:
        if self.on_progress:
            spec = self.spec
            total = spec.naming.num_steps + spec.schedule.num_steps + spec.blind_steps
            self.on_progress(num_done + 1, total, label)


@torch.no_grad()
def validate(model: Photon, sources: Sequence[BatchSource], stage: Stage) -> float:
    """Share of questions whose every answer token is predicted right, pruned as in ``stage``, a source at a time."""
    device = model.model.embed_tokens.weight.device
    mode: Mode = "full" if MODES[stage] == "full" else "hard"
    all_right = []
    for source in sources:
        batch = source.batch(0, False).batch.to(device)
        output = model(batch, mode)
        rows, targets, branch = objectives.answer_targets(batch)
        is_right = model.logits(output.hidden[output.branch_rows[rows]]).argmax(-1) == targets
        ones = torch.ones(len(batch.branch_lengths), device=device)
        all_right.append(ones.scatter_reduce(0, branch, is_right.float(), "amin"))
    return float(torch.cat(all_right).mean())


def _whole(scan: LabelledScan) -> Draw:
    """Every question of a scan, undisturbed."""
    return Draw(
        scans_per_step=1,
        questions_per_scan=len(scan.questions),
        max_shift=(0, 0, 0),
        robust_probability=0.0,
        flip_probability=0.0,
    )


def _texts(scans: Sequence[LabelledScan]) -> list[str]:
    return [text for scan in scans for q in scan.questions for text in (q.question, q.answer)]


def _history_row(report: StepReport) -> dict[str, float | int | str]:
    return {
        "step": report.step,
        "stage": report.stage,
        "loss": float(report.result.loss.detach()),
        "answer_loss": report.result.answer_loss,
        "band_loss": report.result.band_loss,
        "kept_fraction": report.result.kept_fraction,
        "tokens_per_sample": report.result.tokens_per_branch,
        "answer_token_accuracy": report.result.correct,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "elapsed_s": report.elapsed_s,
    }


def _read_history(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _truncate_history(path: Path, num_steps: int) -> None:
    """Drop rows of steps that were done after the state a resumed run continues from."""
    lines = path.read_text(encoding="utf-8").splitlines()[:num_steps] if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_checkpoint(
    model: Photon, prompter: Prompter, folder: Path, volume_spec: dict[str, object], data_version: str
) -> None:
    def build(temporary: Path) -> None:
        write_model(model, temporary)
        prompter.write(temporary / TOKENIZER)
        write_json(temporary / PROVENANCE, {"volume_spec": volume_spec, "data_version": data_version})

    replace_folder(folder, build)
