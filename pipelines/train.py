"""The train stage: Photon through its stages, and the text-only baseline, on a preprocessed data folder."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from photon.checkpoint import remove_leftovers, replace_folder, write_model
from photon.device import choose_device
from photon.errors import PhotonError
from photon.ops.backend import Backend, resolve
from photon.training.launch import join
from photon.training.loop import Trainer
from photon.training.parallel import Kind
from photon.training.state import OPTIMISER, PROGRESS
from photon.training.working import take_notes
from pipelines.dataset import LabelledScan, read_split
from pipelines.files import lock_output, prepare_output_folder, write_json
from pipelines.results import TrainRecord
from pipelines.start import Start, start_from_checkpoint, start_from_scratch
from pipelines.text import TOKENIZER, Prompter
from pipelines.tracking import NullTracker, Tracker
from pipelines.train_history import read_history
from pipelines.train_run import Progress, TrainRun, check_switch
from pipelines.train_spec import TrainSpec

PROVENANCE = "provenance.json"
TRAINING = "training.json"
LAST_GOOD = "last_good"
"""Checkpoint beside the state of a run whose loss went wrong."""
_LOG = logging.getLogger("photon")


def train(
    spec: TrainSpec,
    data: Path,
    output: Path,
    *,
    data_version: str,
    start_from: Path | None = None,
    train_blind: bool = True,
    parallel: Kind | None = None,
    device: str = "cpu",
    backend: Backend = "auto",
    checkpoint_activations: bool = False,
    tracker: Tracker | None = None,
    on_progress: Progress | None = None,
) -> TrainRecord:
    """Train Photon and its blind baseline; an interrupted run continues where it stopped.

    Writes ``checkpoint/`` and ``blind/`` (weights, config.json, tokenizer.json, prompt.json, provenance.json; the
    first also training.json, the stages as they came and what ended the warm-up),
    ``history.jsonl`` with one row a step (the first names what a checkpoint to start from did not have), the resumable
    ``state/`` and ``blind_state/``, and ``record.json``. A run whose loss goes wrong stops and leaves ``last_good/``, a
    checkpoint of the last state that was still well.

    Args:
        data: folder with ``volumes/`` and ``questions.jsonl``.
        output: folder of the run; a run with other settings or data is refused, not overwritten.
        data_version: version of ``data``, part of the run's identity.
        start_from: checkpoint folder whose weights and tokenizer both models start with; its content is part of the
            run's identity. None for the tiny model from scratch.
        train_blind: whether the text-only baseline is trained too; no part of the run's identity.
        parallel: "ddp" for whole models, "fsdp" for sharded ones, in every process that torchrun has started; rank 0
            writes. A step then is that of one process but for rounding, so this is no part of the run's identity.
        device: "cpu", "cuda" or "auto"; no part of the run's identity, so it may change from start to start.
        backend: implementation of the pruning operators, "auto", "reference" or "triton"; they agree to rounding, and
            so it is no part of the run's identity.
        checkpoint_activations: compute a layer's inner values again in the backward pass instead of keeping them; less
            memory, more time, the same numbers, and so no part of the run's identity either.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``, ``OUTPUT_BUSY``, ``SPLIT_EMPTY``, ``CHECKPOINT_MISMATCH``,
            ``TRAINING_DIVERGED``, ``TRAINING_FAILED``, ``TRAINING_INVALID``, ``CONFIG_INVALID``, ``GPU_UNAVAILABLE``,
            ``DEVICE_UNKNOWN``, ``BACKEND_UNAVAILABLE``, ``BACKEND_UNKNOWN``
            and whatever reading the data or ``start_from`` raises.
    """
    started = time.perf_counter()
    is_blind_first = check_switch(spec, train_blind)
    place = choose_device(device)
    operators = resolve(backend, place)
    notes = output / "working"
    with join(parallel, place, notes) as ranks, ExitStack() as held:
        with ranks.together():
            if ranks.is_main:
                prepare_output_folder(output)
                held.enter_context(lock_output(output))
                for name in ("state", "blind_state", "checkpoint", "blind", LAST_GOOD):
                    remove_leftovers(output / name)
                for note in take_notes(notes):
                    _LOG.warning("The run before this one was killed: %s.", note)
        tracker = tracker if tracker is not None and ranks.is_main else NullTracker()
        with ranks.together():
            scans, validation = read_split(data, "train"), read_split(data, "val")
            start = _start(spec, scans, start_from)
        identity = {"model": start.config.to_hf(), "data_version": data_version, "start_digest": start.digest}
        where = {"device": place.type, "operators": operators, "processes": ranks.size, "parallel": ranks.kind}
        tracker.log_hyperparameters({**dataclasses.asdict(spec), **identity, **where})
        run = TrainRun(
            spec=spec,
            start=start,
            scans=scans,
            validation=validation,
            data=data,
            output=output,
            tracker=tracker,
            on_progress=on_progress,
            data_version=data_version,
            device=ranks.device or place,
            backend=backend,
            checkpoint_activations=checkpoint_activations,
            has_blind=train_blind,
            ranks=ranks,
        )
        switch, blind = spec.switch, None
        if switch is not None and is_blind_first:
            blind = run.train_blind()
            switch = run.measured(switch, blind)
        origin = {"volume_spec": scans[0].volume.spec.as_dict(), "data_version": data_version}
        try:
            model = run.train_model(switch)
        except PhotonError as error:
            if error.code != "TRAINING_DIVERGED" or not (output / "state" / PROGRESS).is_file():
                raise
            if ranks.is_main:
                _write_last_good(output, start.prompter, origin)
            raise _with_remedy(error, output) from error
        if train_blind and blind is None:
            blind = run.train_blind()
        told = model.curriculum.told(model.num_steps_done)
        _write_checkpoint(model, start.prompter, output / "checkpoint", {PROVENANCE: origin, TRAINING: told})
        if blind is not None:
            _write_checkpoint(blind, start.prompter, output / "blind", {PROVENANCE: origin})
        history = read_history(run.history)
        record = TrainRecord(
            checkpoint=str(output / "checkpoint"),
            blind_checkpoint="" if blind is None else str(output / "blind"),
            history=str(run.history),
            num_steps=model.num_steps_done,
            elapsed_s=time.perf_counter() - started,
            final_loss=float(history[-1]["answer_loss"]),
            kept_fraction=float(history[-1]["kept_fraction"]),
            config_digest=start.config.digest(),
            data_version=data_version,
        )
        if ranks.is_main:
            record.write(output / "record.json")
            tracker.log_summary({"final_loss": record.final_loss, "train_elapsed_s": record.elapsed_s})
            tracker.log_artifact(run.history)
            tracker.log_artifact(output / "checkpoint")
    return record


def _start(spec: TrainSpec, scans: Sequence[LabelledScan], start_from: Path | None) -> Start:
    texts = [text for scan in scans for q in scan.questions for text in (q.question, q.answer)]
    if start_from is None:
        return start_from_scratch(texts, spec.model).with_pruning(spec.pruning)
    if spec.model:
        fact = f"{', '.join(spec.model)} cannot be other than the checkpoint's."
        raise PhotonError("TRAINING_INVALID", start_from, fact, "Leave it out, or train from scratch.")
    return start_from_checkpoint(start_from, texts).with_pruning(spec.pruning)


def _write_last_good(output: Path, prompter: Prompter, origin: dict[str, Any]) -> None:
    """A checkpoint of the last state, whose weights are from before the loss went wrong."""

    def build(temporary: Path) -> None:
        for path in (output / "state").iterdir():
            if path.name not in (OPTIMISER, PROGRESS):
                shutil.copy(path, temporary / path.name)
        prompter.write(temporary / TOKENIZER)
        write_json(temporary / PROVENANCE, origin)

    replace_folder(output / LAST_GOOD, build)


def _with_remedy(error: PhotonError, output: Path) -> PhotonError:
    remedy = (
        f"The weights from before are in {output / LAST_GOOD}: go on from them by --start-from with a lower "
        "--learning-rate and another --output, or start anew with one."
    )
    return type(error)(error.code, error.subject, error.fact, remedy)


def _write_checkpoint(trainer: Trainer, prompter: Prompter, folder: Path, told: dict[str, dict[str, Any]]) -> None:
    """A checkpoint folder, by rank 0; ``told`` has further JSON files by name."""
    weights = trainer.whole_weights()

    def build(temporary: Path) -> None:
        write_model(trainer.model, temporary, weights=weights)
        prompter.write(temporary / TOKENIZER)
        for name, content in told.items():
            write_json(temporary / name, content)

    with trainer.ranks.together():
        if trainer.ranks.is_main:
            replace_folder(folder, build)
