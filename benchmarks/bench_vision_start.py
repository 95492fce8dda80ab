"""What the visual tokens of a study's vision start tell: python benchmarks/bench_vision_start.py out/quick [--seed 0].

A linear probe learns from the tokens of training scans which structures lie in each token's box, and names them in test
scans. Of every structure: how well tokens that hold it are told from others (AUC), and how well scans that have it are
told from those that do not, by their best token. What the second cannot tell, no policy on these tokens can learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from common import write_results
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from photon.checkpoint import read_model
from photon.grid import grid_of
from photon.model.network import Photon
from photon.training.pretrain import token_labels
from pipelines.dataset import read_split, volume_patches
from pipelines.naming import NamingSource
from pipelines.volumes import resample_labels

PROBE_STEPS = 400


def main() -> None:
    """Measure and write ``results/vision_start.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=Path("out/quick"), help="folder of `photon study`")
    parser.add_argument("--data", type=Path, default=Path("out/vqa-quick"), help="its data folder")
    parser.add_argument("--seed", type=int, default=0, help="whose vision start")
    parser.add_argument("--train", type=int, default=160, help="training scans that the probe learns from")
    arguments = parser.parse_args()
    start = arguments.study / f"seed-{arguments.seed}" / "vision"
    if not start.is_dir():
        print(f"{start} is no vision start; `photon study --preset quick --output {arguments.study}` makes one.")
        return
    model = read_model(start)
    names = json.loads((arguments.data / "raw" / "labels.json").read_text(encoding="utf-8"))
    num_labels = 1 + max(names.values())
    known = [
        tokens_of(model, arguments.data, split, most, num_labels)
        for split, most in (("train", arguments.train), ("test", None))
    ]
    scores = probe(*known[0], known[1][0])
    rows = {name: told_apart(scores[..., value], known[1][1][..., value]) for name, value in names.items()}
    write_results("vision_start", {"study": arguments.study.name, "seed": arguments.seed, "structures": rows})


@torch.no_grad()
def tokens_of(model: Photon, data: Path, split: str, most: int | None, num_labels: int) -> tuple[Tensor, Tensor]:
    """Visual tokens [S, N, C], by direction alone as the decoder reads them, and what they hold [S, N, K]."""
    vision, tokens, held = model.config.vision, [], []
    for scan in read_split(data, split)[:most]:
        patches, grid = volume_patches(scan.volume, model.config)
        tokens.append(F.rms_norm(model.visual(patches, (grid,)), (vision.out_hidden_size,)))
        path = data / "raw" / "labels" / f"{scan.questions[0].scan_id}.nii"
        labels = torch.from_numpy(resample_labels(path, scan.volume.spec, scan.volume.affine))
        own = grid_of(labels.shape, vision)
        held.append(token_labels(labels, own, vision, num_labels, NamingSource.MIN_FRACTION))
    return torch.stack(tokens), torch.stack(held)


def probe(tokens: Tensor, held: Tensor, others: Tensor) -> Tensor:
    """Scores [S, N, K] of other scans' tokens after logistic regression with rare structures weighted up."""
    torch.manual_seed(0)
    head = torch.nn.Linear(tokens.shape[-1], held.shape[-1])
    optimiser = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-2)
    share = held.mean((0, 1))
    weight = ((1 - share) / share.clamp_min(1e-6)).clamp(4, 60)
    for _ in range(PROBE_STEPS):
        loss = F.binary_cross_entropy_with_logits(head(tokens), held, pos_weight=weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found: Tensor = head(others)
        return found


def told_apart(scores: Tensor, held: Tensor) -> dict[str, Any]:
    """Of one structure, from scores [S, N] and whether tokens hold it [S, N]."""
    return {
        "tokens_with_it": float(held.mean()),
        "token_auc": area(scores.flatten().numpy(), held.flatten().numpy() > 0),
        "scans_with_it": float(held.amax(1).mean()),
        "scan_auc": area(scores.amax(1).numpy(), held.amax(1).numpy() > 0),
    }


def area(scores: np.ndarray, is_there: np.ndarray) -> float | None:
    """Area under the ROC curve: the odds that one with it scores above one without; None where one kind is missing."""
    num_with, num_without = int(is_there.sum()), int((~is_there).sum())
    if not num_with or not num_without:
        return None
    return float((rankdata(scores)[is_there].sum() - num_with * (num_with + 1) / 2) / (num_with * num_without))


if __name__ == "__main__":
    main()
