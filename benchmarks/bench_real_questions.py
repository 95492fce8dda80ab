"""Questions computed from real scans with segmentations, checked against other programs and used end to end.

`python benchmarks/bench_real_questions.py --scans FOLDER` (or PHOTON_REAL_SCANS). The folder holds two public sets:

* `theibsi+data_sets`: soft-tissue sarcoma, CT, T1 MR and PET of each patient with the tumour outlined by experts
  (github.com/theibsi/data_sets, ibsi_validation; CC BY 3.0; doi:10.7937/K9/TCIA.2015.7GO2GSKS);
* `wasserth+TotalSegmentator`: abdominal CT and MR and cropped chest CT with organs outlined by a model, not by people
  (github.com/wasserth/TotalSegmentator, tests/reference_files; Apache-2.0).

Nothing of the scans is kept: what is written are counts, differences and the scores of a smoke training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from common import write_results

from pipelines.datasets.splits import SplitRule
from pipelines.evaluate import evaluate
from pipelines.mask_questions.stage import Options, make_questions
from pipelines.preprocess import preprocess
from pipelines.questions import Question, read_questions
from pipelines.train import train
from pipelines.train_spec import TrainSpec
from pipelines.volumes import VOLUME_SPECS

SARCOMA = Path("theibsi+data_sets/ibsi_validation/nifti")
ORGANS = Path("wasserth+TotalSegmentator")
REFERENCE = ORGANS / "tests" / "reference_files"
SARCOMA_NAMES = {
    "structures": {"1": {"name": "tumour", "kind": "lesion"}},
    "image": "{patient}/{modality}_image",
    "mask": "{patient}/{modality}_mask",
    "modality": {"CT": "ct", "MR_T1": "mr", "PET": "pt"},
    "pet_unit": "SUV",
}
SPLIT = SplitRule(val_percent=20, test_percent=30)

ORGAN_SCANS = {
    "organs CT": {
        "example/full": ("example_ct.nii.gz", "example_seg_fast_force_split.nii.gz"),
        "example/crop": ("example_ct_sm.nii.gz", "example_seg_fast.nii.gz"),
        "series/series": ("../../derived/example_ct_dicom_stripped", "example_seg_dicom.nii.gz"),
    },
    "organs MR": {"example/mr": ("example_mr_sm.nii.gz", "example_seg_mr.nii.gz")},
    "vessels CT": {
        "aorta/aorta": (
            "aorta_report/test_result/models/ct_cropped.nii.gz",
            {
                name: f"aorta_report/test_result/models/{name}.nii.gz"
                for name in ("aorta", "aorta_true_lumen", "aorta_false_lumen")
            },
        ),
        "lung/lung": (
            "pulmonary_report/models/ct_cropped.nii.gz",
            {"pulmonary_artery": "pulmonary_report/models/pulmonary_artery.nii.gz"},
        ),
    },
}
"""Data set -> scan `patient/scan` -> image and masks below the folder of reference files."""


def main() -> None:
    """Run and write `results/real_questions.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scans", type=Path, default=os.environ.get("PHOTON_REAL_SCANS"))
    parser.add_argument("--keep", type=Path, help="Folder for the data folders; by default they are thrown away.")
    arguments = parser.parse_args()
    if arguments.scans is None:
        parser.error("give --scans or PHOTON_REAL_SCANS")
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.keep or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        write_results("real_questions", measure(arguments.scans.resolve(), work))


def measure(scans: Path, work: Path) -> dict[str, Any]:
    """Questions of every data set, their checks, and a smoke training on the sarcoma scans."""
    sets = {"sarcoma": asked(scans / SARCOMA, scans / SARCOMA, SARCOMA_NAMES, work / "sarcoma")}
    labels = json.loads((scans / ORGANS / "label_names.json").read_text())
    names = {
        "organs CT": {"structures": labels["total"], "modality": "ct"},
        "organs MR": {"structures": labels["total_mr"], "modality": "mr"},
        "vessels CT": {
            "structures": {key: key for key in ("aorta", "aorta_true_lumen", "aorta_false_lumen", "pulmonary_artery")},
            "mask": "{patient}/{scan}/{structure}",
            "modality": "ct",
        },
    }
    for name, pairs in ORGAN_SCANS.items():
        source = work / f"{name} source"
        lay_out(scans / REFERENCE, pairs, source)
        patterns = {"image": "{patient}/{scan}", "mask": "{patient}/{scan}"} | names[name]
        sets[name] = asked(source / "images", source / "masks", patterns, work / name)
    return {
        "sets": sets,
        "checks": {
            "sarcoma": check_sarcoma(scans / SARCOMA, work / "sarcoma"),
            "organs CT against the statistics that TotalSegmentator wrote": check_statistics(
                scans / REFERENCE / "example_seg_fast" / "statistics.json", labels["total"], work / "organs CT"
            ),
        },
        "end_to_end": end_to_end(work / "sarcoma", work / "sarcoma run"),
    }


def lay_out(source: Path, pairs: dict[str, Any], target: Path) -> None:
    """Copy images and masks to `images/<patient>/<scan>` and `masks/<patient>/<scan>`."""
    for place, (image, masks) in pairs.items():
        by_target = {f"images/{place}": image}
        by_target |= {f"masks/{place}/{key}": mask for key, mask in masks.items()} if isinstance(masks, dict) else {}
        by_target |= {f"masks/{place}": masks} if isinstance(masks, str) else {}
        for name, file in by_target.items():
            path = target / (name if (source / file).is_dir() else f"{name}.nii.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            if (source / file).is_dir():
                shutil.copytree(source / file, path, dirs_exist_ok=True)
            else:
                shutil.copyfile(source / file, path)


def asked(images: Path, masks: Path, names: dict[str, Any], output: Path) -> dict[str, Any]:
    """Make the data folder `output`; what came out, by kind."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "names.json").write_text(json.dumps(names))
    started = time.perf_counter()
    record = make_questions(images, masks, output / "names.json", output, Options(split=SPLIT))
    elapsed_s = time.perf_counter() - started
    content = {key: value for key, value in record.as_dict().items() if key != "folder"}
    answers = Counter((q.subtype, q.answer) for q in read_questions(output / "questions.jsonl") if q.kind == "closed")
    existence = {answer: number for (subtype, answer), number in answers.items() if subtype == "existence"}
    return content | {"existence_answers": dict(sorted(existence.items())), "elapsed_s": round(elapsed_s, 2)}


def check_sarcoma(scans: Path, data: Path) -> dict[str, Any]:
    """Largest differences from what nibabel, numpy and SimpleITK say of the same masks."""
    questions = by_scan_and_subtype(data)
    volume, mean, feret, counts = [], [], [], 0
    for scan_id, found in questions.items():
        patient, kind = scan_id[:7], scan_id[8:]
        image, mask = (nibabel.load(scans / patient / f"{kind}_{what}.nii.gz") for what in ("image", "mask"))
        inside = np.asarray(mask.dataobj) > 0
        cm3 = inside.sum() * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
        volume.append(abs(found["volume"].value / cm3 - 1))
        for subtype in ("mean HU", "mean SUV"):
            if subtype in found:
                mean.append(abs(found[subtype].value - image.get_fdata()[inside].mean()))
        array = SimpleITK.ReadImage(str(scans / patient / f"{kind}_mask.nii.gz")) > 0
        parts = SimpleITK.ConnectedComponent(array)
        shapes = SimpleITK.LabelShapeStatisticsImageFilter()
        shapes.ComputeFeretDiameterOn()
        shapes.Execute(parts)
        counts += found["count"].value == shapes.GetNumberOfLabels()
        largest = max(shapes.GetLabels(), key=shapes.GetNumberOfPixels)
        diagonal = math.hypot(*array.GetSpacing())
        feret.append((found["largest diameter"].value - shapes.GetFeretDiameter(largest)) / diagonal)
    return {
        "scans": len(questions),
        "volume_largest_relative_difference": max(volume),
        "mean_value_largest_difference": max(mean),
        "counts_equal": counts,
        "diameter_minus_feret_between_voxel_centres_in_voxel_diagonals": [min(feret), max(feret)],
    }


def check_statistics(path: Path, labels: dict[str, str], data: Path) -> dict[str, Any]:
    """Differences from volumes and mean HU that the segmenting program wrote for the cropped scan."""
    told = json.loads(path.read_text())
    by_name = {q.question_id: q for q in read_questions(data / "questions.jsonl") if q.scan_id == "example_crop"}
    from pipelines.mask_questions.names import plain_name

    volume, mean = [], []
    for label in labels.values():
        name = plain_name(label).replace(" ", "-")
        if question := by_name.get(f"example_crop.volume-{name}"):
            volume.append(abs(float(question.value or 0) * 1000 / told[label]["volume"] - 1))
        if question := by_name.get(f"example_crop.mean-HU-{name}"):
            mean.append(abs(float(question.value or 0) - told[label]["intensity"]))
    return {
        "volumes": len(volume),
        "volume_largest_relative_difference": max(volume, default=None),
        "means": len(mean),
        "mean_largest_difference_hu": max(mean, default=None),
    }


def end_to_end(data: Path, output: Path) -> dict[str, Any]:
    """Preprocess, train and evaluate a smoke model on a data folder; tells that it runs, not how good a model gets."""
    prepared = preprocess(data / "raw" / "images", data / "volumes", VOLUME_SPECS["smoke"], num_workers=1)
    trained = train(TrainSpec.preset("smoke"), data, output / "train", data_version="unversioned")
    record = evaluate(
        Path(trained.checkpoint),
        data,
        output / "evaluate",
        blind_checkpoint=Path(trained.blind_checkpoint),
        data_version="unversioned",
    )
    return {
        "volumes": prepared.num_ok,
        "refused": prepared.refused_by_code,
        "training_steps": trained.num_steps,
        "test_questions_skipped": record.num_questions_skipped,
        "score": {policy: round(score["value"], 3) for policy, score in record.accuracy.items()},
        "organs_in_regions": [row["organ"] for row in record.regions],
    }


def by_scan_and_subtype(data: Path) -> dict[str, dict[str, Question]]:
    """Questions about the one structure of every scan."""
    found: dict[str, dict[str, Question]] = {}
    for question in read_questions(data / "questions.jsonl"):
        found.setdefault(question.scan_id, {})[question.subtype] = question
    return found


if __name__ == "__main__":
    main()
