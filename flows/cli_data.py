"""Other people's data as commands of `photon`: what becomes a data folder that the stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_support import EXIT_SOME_FAILED, command, show_counts, show_results
from flows.progress import show_progress


@command
def questions(
    images: Annotated[Path, typer.Option(help="Folder of scans, searched with its sub-folders.")],
    masks: Annotated[Path, typer.Option(help="Folder of their segmentations; may be the same.")],
    names: Annotated[Path, typer.Option(help="JSON file: what is outlined, and how the files are named.")],
    output: Annotated[Path, typer.Option(help="Data folder to fill.")],
    val_percent: Annotated[int, typer.Option(min=0, max=99, help="Share of patients for val.")] = 10,
    test_percent: Annotated[int, typer.Option(min=0, max=99, help="Share of patients for test.")] = 20,
    tell_size: Annotated[
        bool, typer.Option("--tell-size", help="Say in questions about mm and cm3 how large the scan is.")
    ] = False,
    drop_same: Annotated[
        bool, typer.Option("--drop-same", help="Leave out questions that have one answer in all of several scans.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one scan each.")] = 1,
) -> None:
    """Compute questions and their answers from segmentations of your own scans.

    The names file maps label values, or names of mask files, to words: `{"1": "liver", "2": "liver tumor"}`.
    README.md tells what else it may hold. Writes raw/ (scans, label maps, scans.csv, not_asked.csv) and
    questions.jsonl; preprocess raw/images next. What an outline does not answer for certain is not asked, and
    not_asked.csv says why. Patients are split by a checksum of their ids. Exit code 3 says that scans were refused.

    Example: `photon questions --images scans --masks masks --names names.json --output mine`
    """
    from pipelines.datasets.splits import SplitRule
    from pipelines.mask_questions.stage import Options, make_questions

    split = SplitRule(val_percent=val_percent, test_percent=test_percent)
    options = Options(split=split, is_size_told=tell_size, drops_same=drop_same)
    with show_progress("questions") as on_progress:
        record = make_questions(images, masks, names, output, options, on_progress=on_progress, num_workers=workers)
    show_counts("scans", {"ok": record.num_scans} | record.refused_by_code)
    show_counts("questions", record.num_questions_by_subtype)
    show_counts("not asked", record.not_asked)
    splits = ", ".join(f"{number} {split}" for split, number in record.num_questions_by_split.items())
    empty = [name for name, number in record.num_questions_by_split.items() if not number]
    show_results(
        questions=f"{record.num_questions} about {record.num_patients} patients ({splits})",
        **{"no_one_in": f"{', '.join(empty)}: too few patients for its share; training needs train and val"}
        if empty
        else {},
        folder=record.folder,
        left_out=Path(record.folder) / "raw" / "not_asked.csv",
    )
    if record.num_refused:
        raise typer.Exit(EXIT_SOME_FAILED)


@command
def import_(
    dataset: Annotated[
        str,
        typer.Option(help="ct-rate, 3d-rad, deeptumorvqa-v1, deeptumorvqa-v2, m3d, abdomenatlas or chat."),
    ],
    input: Annotated[Path, typer.Option(help="Folder of your copy of the dataset, searched with its sub-folders.")],
    output: Annotated[Path, typer.Option(help="Data folder to fill; other datasets in it stay.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the scans, where it is not the input.")] = None,
    scans: Annotated[str, typer.Option(help="link (symbolic links), copy, or none: questions alone.")] = "link",
    val_percent: Annotated[int, typer.Option(min=0, max=99, help="Share of train patients for val.")] = 10,
    test_percent: Annotated[
        int, typer.Option(min=0, max=99, help="Share of patients for test, where the dataset has no splits.")
    ] = 20,
    drop_leaks: Annotated[
        bool, typer.Option("--drop-leaks", help="Leave out of train and val what test has too.")
    ] = False,
    rescale: Annotated[
        str, typer.Option(help="CT-RATE: slope and intercept from the header, the csv, or auto (see above).")
    ] = "auto",
    form: Annotated[str, typer.Option(help="DeepTumorVQA: free text, or multiple choice.")] = "free",
    empty_counts: Annotated[
        str, typer.Option(help="AbdomenAtlas: an empty number of lesions is unknown (not asked) or zero.")
    ] = "unknown",
    nominal_geometry: Annotated[
        bool, typer.Option("--nominal-geometry", help="M3D: take arrays for scans of 1 mm voxels.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Scans read at once.")] = 2,
) -> None:
    """Bring a public dataset that you have downloaded into a data folder.

    Nothing is downloaded. What has to be in the input folder, at any depth and under any folder names:

    * **ct-rate**: `*_labels.csv` (VolumeName and findings), `*vqa*.json`, `*_metadata.csv` and the scans
      (`train_1_a_1.nii.gz`). The original files have blank headers; they get those of the metadata table, in copies.
      Files below `*_fixed` are taken as they are. `--rescale` overrides where slope and intercept come from; a chest
      CT without air near -1000 HU is refused.
    * **3d-rad**: its CSV files; the scans and `*_metadata.csv` are CT-RATE's: `--images CT-RATE`.
    * **deeptumorvqa-v1**, **-v2**: its CSV, JSON or JSONL tables; scans as `BDMAP_00000001/ct.nii.gz`.
    * **m3d**: `M3D_VQA_*.csv`, and the `.npy` arrays with `--nominal-geometry`.
    * **abdomenatlas**: `AbdomenAtlas3.0MiniWithMeta.csv`, `TrainTestIDS/`, `image_only/`.
    * **chat**: `.json` or `.jsonl` of messages and videos, as the public Photon is trained on.

    Writes questions.jsonl, raw/images/ and `import/DATASET/`: report.txt to read first, refused.parquet (every row
    left out, and why), scans.parquet, leaks.parquet. A bad row costs itself alone. Every scan is read once, and not
    again while it is unchanged. Exit code 3 says that rows or scans were refused, or that leaks were found.

    Example: `photon import --dataset 3d-rad --input 3D-RAD --images CT-RATE --output mine`, then
    `photon preprocess --input mine/raw/images --output mine/volumes`
    """
    from pipelines.datasets.base import ImportOptions
    from pipelines.datasets.importing import import_dataset
    from pipelines.datasets.splits import SplitRule

    options = ImportOptions(
        images=images, rescale=rescale, form=form, empty_counts=empty_counts, nominal_geometry=nominal_geometry
    )
    rule = SplitRule(val_percent=val_percent, test_percent=test_percent)
    with show_progress("import") as on_progress:
        record = import_dataset(
            dataset,
            input,
            output,
            scans=scans,
            options=options,
            rule=rule,
            drop_leaks=drop_leaks,
            on_progress=on_progress,
            num_workers=workers,
        )
    show_counts("rows", {"ok": record.num_questions} | record.refused_by_reason)
    show_counts(
        "scans", {"ok": record.num_scans_ok, "not found": record.num_scans_missing} | record.scans_refused_by_code
    )
    show_counts("leaks and giveaways", record.leaks_by_check)
    splits = ", ".join(f"{number} {split}" for split, number in record.num_questions_by_split.items())
    show_results(questions=f"{record.num_questions} ({splits})", folder=record.folder, report=record.report)
    if record.num_rows_refused or record.num_scans_refused or (record.num_leaks and not drop_leaks):
        raise typer.Exit(EXIT_SOME_FAILED)
