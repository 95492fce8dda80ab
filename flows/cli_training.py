"""Training and evaluation as commands of `photon`: what runs a checkpoint with PyTorch, on a GPU if there is one."""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli_support import (
    Checkpoint,
    Data,
    command,
    show_log,
    show_results,
    show_table,
    tracked,
)
from flows.progress import show_progress

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where models run; auto: a GPU if there is one.")]
Precision = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Of the arithmetic; bfloat16 is faster on a GPU.")
]
Backend = Annotated[
    Literal["auto", "reference", "triton"],
    typer.Option(help="Pruning operators: fused kernels or plain PyTorch; auto: kernels on a GPU that runs them."),
]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Log the run to MLflow.")]


@command
def train(
    data: Data = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and history.")] = Path("out/train"),
    preset: Annotated[
        str, typer.Option(help="Length and batches of the training, and the model's size from scratch: demo or smoke.")
    ] = "demo",
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint folder to start from, with its tokenizer; default: from scratch.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the training; the preset's stages grow or shrink with it.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Length of each stage: in steps, alignment=100,warm-up=1000,soft=400,hard=500,flip-after=100, or as "
            "fractions of the run, alignment=0.05,warm-up=0.5,soft=0.2,flip-after=0.05, where hard gets the rest."
        ),
    ] = None,
    evidence_margin: Annotated[
        float | None,
        typer.Option(
            help="End the warm-up as soon as validation accuracy is above that of the text-only model by this much "
            "(0.02: two points); its planned length is then the longest. Default: the planned length."
        ),
    ] = None,
    evidence_patience: Annotated[
        int, typer.Option(min=1, help="Validations in a row that have to show it; with --evidence-margin.")
    ] = 1,
    naming_steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps of vision pretraining on label maps; default the preset's, 0 from a checkpoint."
        ),
    ] = None,
    scans_per_step: Annotated[
        int | None, typer.Option(min=1, help="Scans in a batch, in every stage; default the preset's.")
    ] = None,
    questions_per_scan: Annotated[
        int | None, typer.Option(min=1, help="Questions about each scan of a batch; default the preset's.")
    ] = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches a step, to save memory: same batch, same gradient.")
    ] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the decoder; the others keep their ratio to it. Default the preset's.")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Steps; default the preset's.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps; default the preset's.")] = None,
    freeze_vision: Annotated[
        bool,
        typer.Option(
            "--freeze-vision/--train-vision",
            help="Keep the vision tower as its pretraining or the checkpoint left it; scans are encoded once.",
        ),
    ] = False,
    method: Annotated[
        Literal["learnt", "published"] | None,
        typer.Option(
            help="learnt: attention of later layers teaches scores where to look (docs/evidence.md); published: as in "
            "the paper. Default learnt; published with --start-from and for policies without a threshold."
        ),
    ] = None,
    pruning: Annotated[
        list[str] | None,
        typer.Option(help="Setting of the pruning, name=value, e.g. policy=fixed or keep_ratio=0.35; repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Size of the model from scratch, e.g. hidden_size=128 or vision.depth=6; repeatable."),
    ] = None,
    parallel: Annotated[
        Literal["ddp", "fsdp"] | None,
        typer.Option(
            help="Share every step among the processes of torchrun: ddp, a whole model each, or fsdp, sharded. "
            "Default under torchrun: ddp."
        ),
    ] = None,
    blind: Annotated[bool, typer.Option("--blind/--no-blind", help="Train the text-only model too.")] = True,
    device: Device = "auto",
    precision: Precision = "float32",
    backend: Backend = "auto",
    recompute: Annotated[
        bool,
        typer.Option("--recompute/--no-recompute", help="Compute activations twice to save memory; same results."),
    ] = False,
    track: Track = True,
) -> None:
    """Train Photon, and the text-only model it has to beat.

    Reads questions.jsonl and volumes/ of the data folder; writes checkpoints (safetensors and JSON). After an
    interruption the same command goes on from the last checkpoint. `--start-from` takes a checkpoint of Photon or a
    plain Qwen2.5-VL; the size is the checkpoint's, and the learning rates are the published training's. A plain
    Qwen2.5-VL has no pruning parameters and no patch embedding for volumes: these start from the seed, all else from
    the checkpoint. What started from the seed, and what of the checkpoint is not used, is printed.

    On several GPUs, or CPU processes: `torchrun --nproc-per-node 2 -m flows.cli train --parallel fsdp ...`. A step is
    that of one process; rank 0 writes.

    Example: `photon train --data data --output out/train --preset demo`
    """
    from photon.training.launch import num_processes
    from photon.training.stages import WarmUpSwitch
    from pipelines.train import train as run_stage
    from pipelines.train_options import parse_settings, parse_stages
    from pipelines.train_spec import TrainSpec
    from pipelines.versioning import folder_version

    switch = None
    if evidence_margin is not None:
        switch = WarmUpSwitch(margin=evidence_margin, patience=evidence_patience)
    is_planned = steps is not None or stages is not None
    settings = parse_settings(pruning or [])
    plain = TrainSpec.preset(preset, freeze_vision=freeze_vision)
    spec = TrainSpec.preset(
        preset,
        seed=seed,
        is_pretrained=start_from is not None,
        naming_steps=naming_steps,
        precision=precision,
        scans_per_step=scans_per_step,
        questions_per_scan=questions_per_scan,
        schedule=parse_stages(stages, steps, plain.schedule) if is_planned else None,
        learning_rate=learning_rate,
        freeze_vision=freeze_vision,
        method=method,
        pruning=settings,
    )
    spec = dataclasses.replace(
        spec,
        model=parse_settings(model or []),
        switch=switch,
        accumulate=accumulate,
        validate_every=validate_every or spec.validate_every,
        save_every=save_every or spec.save_every,
    )
    parallel = parallel or ("ddp" if num_processes() > 1 else None)
    is_main = parallel is None or os.environ.get("RANK", "0") == "0"
    version = folder_version(data)
    with (
        tracked("train", track and is_main, version) as tracker,
        show_progress("train") if is_main else nullcontext() as on_progress,
        show_log() if is_main else nullcontext(),
    ):
        record = run_stage(
            spec,
            data,
            output,
            data_version=version,
            start_from=start_from,
            train_blind=blind,
            parallel=parallel,
            device=device,
            backend=backend,
            checkpoint_activations=recompute,
            tracker=tracker,
            on_progress=on_progress,
        )
    if not is_main:
        return
    show_results(
        checkpoint=record.checkpoint,
        blind_checkpoint=record.blind_checkpoint or "none",
        history=record.history,
        final_loss=f"{record.final_loss:.4f} after {record.num_steps} steps",
    )


@command
def evaluate(
    checkpoint: Checkpoint = Path("out/train/checkpoint"),
    blind_checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of the text-only model; default: blind/ beside the other.")
    ] = None,
    data: Data = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder for answers and scores.")] = Path("out/evaluate"),
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    closed_by: Annotated[
        Literal["generation", "likelihood"],
        typer.Option(help="Answer closed questions in the model's own words, or by the likeliest option."),
    ] = "generation",
    device: Device = "auto",
    precision: Precision = "float32",
    backend: Backend = "auto",
    track: Track = True,
) -> None:
    """Score a checkpoint beside all tokens, text alone and the majority answer.

    Writes answers.parquet (one row a policy and question) and evaluation.json; every score has its
    patient-level 95 % interval.

    Example: `photon evaluate --checkpoint out/train/checkpoint --data data --output out/evaluate`
    """
    from pipelines.evaluate import evaluate as run_stage
    from pipelines.versioning import folder_version

    version = folder_version(data)
    with tracked("evaluate", track, version) as tracker, show_progress("evaluate") as on_progress:
        record = run_stage(
            checkpoint,
            data,
            output,
            blind_checkpoint=blind_checkpoint or checkpoint.with_name("blind"),
            split=split,
            data_version=version,
            closed_by=closed_by,
            device=device,
            precision=precision,
            backend=backend,
            tracker=tracker,
            on_progress=on_progress,
        )
    rows = [
        (name, f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}")
        for name, score in record.accuracy.items()
    ]
    show_table(f"accuracy on {split}", ("policy", "accuracy", "95 % interval"), rows)
    show_results(answers=record.answers, scores=output / "evaluation.json")
