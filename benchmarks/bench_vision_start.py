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
from photon.model.network import Photon
from pipelines.dataset import LabelledScan, read_split, volume_patches
from pipelines.naming import NamingSource

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
    train = read_split(arguments.data, "train")[: arguments.train]
    scans = [*train, *read_split(arguments.data, "test")]
    source = NamingSource(scans, arguments.data / "raw" / "labels", model.config, scans_per_step=1, seed=0)
    tokens = torch.stack([tokens_of(model, scan) for scan in scans])
    held = torch.stack([source.held(index) for index in range(len(scans))])
    scores = probe(tokens[: len(train)], held[: len(train)], tokens[len(train) :])
    rows = {
        name: told_apart(scores[..., k], held[len(train) :, :, k]) for name, k in names.items() if k < held.shape[2]
    }
    write_results("vision_start", {"study": arguments.study.name, "seed": arguments.seed, "structures": rows})


@torch.no_grad()
def tokens_of(model: Photon, scan: LabelledScan) -> Tensor:
    """Visual tokens [N, C] of a scan, by direction alone as the decoder reads them."""
    patches, grid = volume_patches(scan.volume, model.config)
    return F.rms_norm(model.visual(patches, (grid,)), (model.config.vision.out_hidden_size,))


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
