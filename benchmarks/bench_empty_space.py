"""What leaving out empty visual tokens saves, and what it changes: with against without, one run, the same weights.

Shares, times and changes for a phantom with random weights (where nothing is skipped both sides are the same, and the
ratio of times says how calm the machine was); shares for the CTs of folders (--scans); answers to the
test questions of a finished run, not trained again (--checkpoint and --data).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import best_of, write_results

from photon.config import PhotonConfig, tiny
from photon.errors import PhotonError
from photon.grid import Grid, num_visual_tokens, occupied_tokens
from photon.model.contexts import without_empty_tokens
from photon.model.network import Photon
from photon.model.packing import Branch, Context, pack_batch
from pipelines.dataset import read_split, volume_patches
from pipelines.metrics import score_answer
from pipelines.phantoms import PhantomSpec, make_phantom, plan_visits
from pipelines.predict import TorchAnswerer
from pipelines.resample import VOLUME_SPECS, VolumeSpec
from pipelines.scans.find import find_scans
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import Scan, read_scan
from pipelines.statistics import mean_interval, paired_difference_interval
from pipelines.volumes import Volume, resample

CT_WINDOW = (-1000, 1000)
AIR_HU = -900
"""A scan without values this low has no air around the patient, or is no CT."""
CASES: dict[str, tuple[VolumeSpec, tuple[int, ...]]] = {
    "demo grid, demo window": (VOLUME_SPECS["demo"], (-200,)),
    "demo grid, CT window": (dataclasses.replace(VOLUME_SPECS["demo"], window_hu=CT_WINDOW), (-1000, -900, -800)),
    "140x280x280, CT window": (VOLUME_SPECS["photon"], (-1000, -900, -800)),
}
"""Grid and window, and the highest HU that counts as empty. The lowest of each is exactly 0 to the model."""
ISOTROPIC = VOLUME_SPECS["iso1mm"]
"""Counted for scans only: where the scan ends, this grid is filled with air."""
NUM_QUESTIONS, NUM_TURNS = 8, 6


def main() -> None:
    """Measure what the arguments ask for and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=Path, nargs="*", default=[], help="folders with CTs; others are passed over")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder of a finished run")
    parser.add_argument("--data", type=Path, default=Path("data"), help="data folder of that run")
    arguments = parser.parse_args()
    phantom = phantom_scan()
    content: dict[str, Any] = {
        "phantom": [
            {"grid": name, "empty_up_to_hu": hu, **with_and_without(resample(phantom, spec, "ct"), hu)}
            for name, (spec, thresholds) in CASES.items()
            for hu in thresholds
        ]
    }
    if arguments.scans:
        content["scans"] = [row for folder in arguments.scans for row in scan_rows(folder)]
    if arguments.checkpoint:
        content["answers"] = answers(arguments.checkpoint, arguments.data)
    write_results("empty_space", content)


def phantom_scan() -> Scan:
    """The first phantom of the demonstration."""
    made = make_phantom(plan_visits(PhantomSpec())[0], PhantomSpec().seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantom.nii"
        write_scan(made.hu, made.affine, path)
        return read_scan(path)


def skipping(config: PhotonConfig, empty_up_to_hu: int, window_hu: tuple[int, int]) -> PhotonConfig:
    """The configuration with a threshold in HU."""
    low, high = window_hu
    value = (empty_up_to_hu - low) / (high - low)
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, empty_below=value))


def share_skipped(volume: Volume, empty_up_to_hu: int) -> float:
    """Share of the visual tokens of a volume that would be left out."""
    config = skipping(random_model().config, empty_up_to_hu, volume.spec.window_hu)
    patches, grid = volume_patches(volume, config)
    return 1 - occupied_tokens(patches, config.vision).numel() / num_visual_tokens(grid, config.vision)


def random_model() -> Photon:
    """The demonstration's architecture with fresh weights."""
    ids = {"vision_start": 1, "vision_end": 2, "video": 3, "eos": 4}
    return Photon(tiny(100, special_ids=ids)).initialise(0).eval()


@torch.no_grad()
def with_and_without(volume: Volume, empty_up_to_hu: int) -> dict[str, Any]:
    """Time and outputs of the vision tower and of a forward pass with pruning, over those with every token."""
    model = random_model()
    config = skipping(model.config, empty_up_to_hu, volume.spec.window_hu)
    patches, grid = volume_patches(volume, config)
    whole = context_of(patches, grid, config)
    less = without_empty_tokens(whole, config)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(6, 100, (NUM_QUESTIONS, 10), generator=generator)
    branches = [Branch(0, torch.cat([row, torch.tensor([config.eos_token_id, 6])])) for row in words]

    def tower(context: Context) -> Tensor:
        return model.visual(context.patches, context.grids, context.present)

    def forward(context: Context) -> tuple[Tensor, list[set[int]]]:
        output = model(pack_batch([context], branches, config), "hard")
        assert output.schedule is not None
        kept = [context.grid_tokens(output.schedule.kept_tokens(n)).tolist() for n in range(NUM_QUESTIONS)]
        return model.logits(output.hidden[output.branch_rows]), [set(tokens) for tokens in kept]

    (logits, kept), (logits_less, kept_less) = forward(whole), forward(less)
    air = set(range(num_visual_tokens(grid, config.vision))) - set(less.grid_tokens(torch.arange(count(less))).tolist())
    return {
        "num_tokens": count(whole),
        "share_skipped": 1 - count(less) / count(whole),
        "tower_time_ratio": time_ratio(lambda: tower(less), lambda: tower(whole)),
        "forward_time_ratio": time_ratio(lambda: forward(less), lambda: forward(whole)),
        "max_logit_change_over_range": float((logits - logits_less).abs().max() / (logits.max() - logits.min())),
        "kept_overlap": mean(len(a & b) / len(a | b) for a, b in zip(kept, kept_less, strict=True)),
        "kept_overlap_outside_air": mean(len(a & b) / len((a - air) | b) for a, b in zip(kept, kept_less, strict=True)),
        "air_share_of_kept_without_skipping": mean(len(tokens & air) / len(tokens) for tokens in kept),
    }


def time_ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Shortest time of the first over that of the second, in turns, so that other work on the machine meets both."""
    times = [(best_of(first, 2), best_of(second, 2)) for _ in range(NUM_TURNS)]
    return min(a for a, _ in times) / min(b for _, b in times)


def context_of(patches: Tensor, grid: Grid, config: PhotonConfig) -> Context:
    """A prompt of one word and a volume with all its tokens."""
    placeholders = [config.video_token_id] * num_visual_tokens(grid, config.vision)
    ids = [5, config.vision_start_token_id, *placeholders, config.vision_end_token_id]
    return Context(torch.tensor(ids), patches, (grid,))


def count(context: Context) -> int:
    """Visual tokens of a context."""
    return context.patches.shape[0] // 4


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    listed = list(values)
    return float(sum(listed) / len(listed))


def scan_rows(folder: Path) -> list[dict[str, Any]]:
    """Share of empty tokens of every CT below a folder, on every grid; scans are not named."""
    rows = []
    for source in find_scans(folder):
        try:
            scan = read_scan(source.path)
        except PhotonError:
            continue
        if float(scan.array.min()) > AIR_HU:
            continue
        extent = [round(n * step) for n, step in zip(scan.array.shape, scan.spacing_mm, strict=True)]
        shares = {
            f"{name}, up to {hu} HU": share_skipped(resample(scan, spec, "ct"), hu)
            for name, (spec, thresholds) in {
                **CASES,
                "364x364x364 of 1 mm, CT window": (ISOTROPIC, (-1000, -900)),
            }.items()
            for hu in thresholds
        }
        rows.append({"field_of_view_mm": extent, "orientation": scan.orientation, "share_skipped": shares})
    return rows


def answers(checkpoint: Path, data: Path) -> dict[str, Any]:
    """Score of the test questions with and without skipping what is exactly 0 to the model, weights as they are."""
    without, with_ = TorchAnswerer(checkpoint), TorchAnswerer(checkpoint)
    scores: list[tuple[float, float]] = []
    patients, is_equal, shares = [], [], []
    for scan in read_split(data, "test"):
        low = scan.volume.spec.window_hu[0]
        with_.model.config = skipping(without.model.config, low, scan.volume.spec.window_hu)
        shares.append(share_skipped(scan.volume, low))
        pairs = zip(*(each.answer(scan.volume, scan.questions) for each in (without, with_)), strict=True)
        for question, (plain, less) in zip(scan.questions, pairs, strict=True):
            scores.append((score_answer(question, plain.text), score_answer(question, less.text)))
            is_equal.append(plain.text == less.text)
            patients.append(question.patient_id)
    plain_scores, less_scores = (list(each) for each in zip(*scores, strict=True))
    return {
        "num_scans": len(shares),
        "share_skipped_mean": mean(shares),
        "score_without_skipping": mean_interval(plain_scores, patients),
        "score_with_skipping": mean_interval(less_scores, patients),
        "with_minus_without": paired_difference_interval(less_scores, plain_scores, patients),
        "equal_answers": mean(is_equal),
    }


if __name__ == "__main__":
    main()
