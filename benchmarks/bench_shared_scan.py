"""Many questions about one scan: encoding it once against encoding it for every question.

Ratio of two runs of the same model on the same machine; the answers' hidden rows are compared first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import best_of, write_results

from photon.config import tiny
from photon.grid import patchify
from photon.model.network import Photon
from photon.model.packing import Branch, Context, pack_batch

SPECIAL_IDS = {"vision_start": 1, "vision_end": 2, "video": 3, "eos": 4}


def main() -> None:
    """Time K = 1, 8, 32 questions and write the results file."""
    torch.manual_seed(0)
    config = tiny(100, special_ids=SPECIAL_IDS)
    model = Photon(config).initialise(0).eval()
    patches, grid = patchify(torch.rand(140, 280, 280), config.vision)
    num_tokens = patches.shape[0] // 4
    context = Context(torch.tensor([5, 1, *[3] * num_tokens, 2]), patches, (grid,))
    questions = [torch.cat([torch.randint(6, 100, (10,)), torch.tensor([4, 6])]) for _ in range(32)]

    def together(count: int) -> torch.Tensor:
        batch = pack_batch([context], [Branch(0, ids) for ids in questions[:count]], config)
        output = model(batch, "hard")
        return output.hidden[output.branch_rows]

    def apart(count: int) -> torch.Tensor:
        parts = []
        for ids in questions[:count]:
            output = model(pack_batch([context], [Branch(0, ids)], config), "hard")
            parts.append(output.hidden[output.branch_rows])
        return torch.cat(parts)

    with torch.no_grad():
        difference = float((together(32) - apart(32)).abs().max())
        assert difference < 1e-4, difference
        rows = []
        for count in (1, 8, 32):
            shared, separate = (best_of(lambda f=f, n=count: f(n), 3) for f in (together, apart))
            rows.append({"num_questions": count, "shared_over_separate": shared / separate})
    write_results(
        "shared_scan", {"num_visual_tokens": num_tokens, "max_abs_hidden_difference": difference, "rows": rows}
    )


if __name__ == "__main__":
    main()
