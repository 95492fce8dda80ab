"""Do the surrogate gradients push the right way? Leave-one-out losses of a trained study against both rules.

    python benchmarks/bench_surrogate.py out/quick --data out/vqa-quick --seeds 0,1,2

For a sample of test questions, in hard mode as in training: by how much the loss of the answer really changes when one
kept token is removed or one dropped token is added, and what gradient each rule gives that token's keep probability.
``wish`` is minus that gradient: how strongly a step of gradient descent would raise the probability. A right rule
wishes most for the tokens whose removal hurts most.

As published p moves through the threshold alone, so the gradient of the threshold is held against the truth too: the
loss with a tenth of the tokens more, and with a tenth fewer, by score.

Gradients are those of one question's own loss ("question"), and those of a batch of 64, where the same loss weighs a
64th and the floor under the standard deviation comes into play ("batch of 64").
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from common import write_results
from scipy.stats import rankdata
from torch import Tensor

from photon import objectives
from photon.checkpoint import read_model
from photon.config import SGP_RULES
from photon.model.network import Photon
from photon.model.packing import IGNORE_INDEX, Branch, Context, PackedBatch, pack_batch
from photon.model.pruning import EncodedRows
from pipelines.dataset import LabelledScan, read_split, scan_context
from pipelines.questions import Question
from pipelines.statistics import mean_interval
from pipelines.text import TOKENIZER, Prompter

SCALES = {"question": 1.0, "batch of 64": 1 / 64}
NOISE = 1e-5
"""Changes of the loss smaller than this have no sign."""
BRANCHES = 64


def main() -> None:
    """Measure and write ``results/surrogate.json``."""
    arguments = parse()
    if not (arguments.study / "study.json").exists():
        print(f"{arguments.study} holds no study; `photon study --preset quick --output {arguments.study}` makes one.")
        return
    scans, started = read_split(arguments.data, "test"), time.perf_counter()
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        folder = arguments.study / f"seed-{seed}"
        model = read_model(folder / arguments.variant / "train" / "checkpoint")
        prompter = Prompter.read(folder / "vision" / TOKENIZER)
        by_seed[seed] = [
            measure_question(model, prompter, scan, question, arguments.tokens)
            for scan, question in sample(scans, arguments.questions)
        ]
        print(f"seed {seed}: {len(by_seed[seed])} questions measured", flush=True)
    write_results(
        arguments.name,
        {
            "study": arguments.study.name,
            "variant": arguments.variant,
            "trained_with_rule": model.config.pruning.sgp_rule,
            **summarise([row for rows in by_seed.values() for row in rows]),
            "by_seed": {seed: summarise(rows) for seed, rows in by_seed.items()},
            "seconds": time.perf_counter() - started,
        },
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", type=Path, nargs="?", default=Path("out/quick"), help="output folder of `photon study`"
    )
    parser.add_argument("--data", type=Path, default=Path("out/vqa-quick"), help="the study's data folder")
    parser.add_argument("--variant", default="photon")
    parser.add_argument("--seeds", type=numbers, default=[0], help="whose models, e.g. 0,1,2; together and each alone")
    parser.add_argument("--questions", type=int, default=240, help="how many test questions, of each model")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens removed, and most added, of each")
    parser.add_argument("--name", default="surrogate", help="of the results file")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def sample(scans: list[LabelledScan], count: int) -> list[tuple[LabelledScan, Question]]:
    """Questions drawn from a seed, all scans together."""
    everything = [(scan, question) for scan in scans for question in scan.questions]
    order = np.random.default_rng(0).permutation(len(everything))[:count]
    return [everything[place] for place in sorted(order)]


def measure_question(
    model: Photon, prompter: Prompter, scan: LabelledScan, question: Question, most: int
) -> dict[str, Any]:
    """True loss changes of one question, and each rule's wishes for the same tokens."""
    context = scan_context(scan.volume, prompter, model.config)
    asked, answer = prompter.branch_ids(question.question), prompter.answer_ids(question.answer)
    branch = Branch(0, torch.cat([asked, answer]), torch.cat([torch.full_like(asked, IGNORE_INDEX), answer]))
    one = pack_batch([context], [branch], model.config)
    with torch.no_grad():
        state = model.encode_contexts(one, model.config.pruning.layer + 1)
        decision = model.run_branches(one, state, "hard").schedule
    assert decision is not None
    keep, rho = decision.keep[0], decision.rho[0]
    generator = torch.Generator().manual_seed(0)
    kept, dropped = (drawn(mask.nonzero().flatten(), most, generator) for mask in (keep, ~keep))
    tenth = max(round(keep.numel() / 10), 1)
    more, fewer = (top(rho, int(keep.sum()) + step) for step in (tenth, -tenth))
    masks = [keep, more, fewer, *(toggled(keep, int(token)) for token in torch.cat([kept, dropped]))]
    losses = losses_of(model, context, branch, state, torch.stack(masks))
    base, with_more, with_fewer, changed = losses[0], losses[1], losses[2], losses[3:]
    return {
        "patient": question.patient_id,
        "loss": float(base),
        "removal": (changed[: len(kept)] - base).numpy(),  # above 0: the token is needed
        "addition": (base - changed[len(kept) :]).numpy(),  # above 0: the token is missed
        "more_is_better": float(with_fewer - with_more),
        "wishes": {
            (rule, scale): wishes(model, one, state, rule, factor, kept, dropped)
            for rule in SGP_RULES
            for scale, factor in SCALES.items()
        },
    }


def drawn(tokens: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of the tokens [n]."""
    return tokens[torch.randperm(tokens.numel(), generator=generator)[:most]]


def top(rho: Tensor, count: int) -> Tensor:
    """Bool [N]: the ``count`` highest scores, at least one and at most all."""
    mask = torch.zeros_like(rho, dtype=torch.bool)
    mask[rho.argsort(descending=True, stable=True)[: min(max(count, 1), rho.numel())]] = True
    return mask


def toggled(keep: Tensor, token: int) -> Tensor:
    """The keep flags [N] with one turned over."""
    other = keep.clone()
    other[token] = ~other[token]
    return other


@torch.no_grad()
def losses_of(model: Photon, context: Context, branch: Branch, state: EncodedRows, masks: Tensor) -> Tensor:
    """Mean cross-entropy of the answer's tokens for every row of keep flags [M, N]: float64 [M]."""
    found = []
    for rows in masks.split(BRANCHES):
        batch = pack_batch([context], [branch] * len(rows), model.config)
        output = model.run_branches(batch, state, "hard", keep=rows)
        found.append(answer_losses(model, batch, output))
    return torch.cat(found).double()


def answer_losses(model: Photon, batch: PackedBatch, output: Any) -> Tensor:
    """Loss of each branch [B], as training has it for undisturbed ones."""
    rows, targets, branch = objectives.answer_targets(batch)
    losses = objectives.answer_loss(model.logits(output.hidden[output.branch_rows[rows]]), targets)
    return objectives.mean_by_branch(losses, branch, len(batch.branch_lengths))


def wishes(
    model: Photon, batch: PackedBatch, state: EncodedRows, rule: str, factor: float, kept: Tensor, dropped: Tensor
) -> dict[str, Any]:
    """Minus the gradient of p of the kept and of the dropped tokens, and of the threshold, by a rule."""
    config = model.config
    model.config = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, sgp_rule=rule))
    try:
        output = model.run_branches(batch, state, "hard")
        decision = output.schedule
        assert decision is not None
        decision.p.retain_grad()
        (factor * answer_losses(model, batch, output).sum()).backward()
        gradient = decision.p.grad
        assert gradient is not None
        # p falls where the threshold rises, so wishing for a lower threshold is wishing for more tokens.
        slope = decision.p * (1 - decision.p)
        return {
            "kept": -gradient[0, kept].double().numpy(),
            "dropped": -gradient[0, dropped].double().numpy(),
            "more": float(-(gradient * slope.detach()).sum()),
        }
    finally:
        model.config = config
        model.zero_grad(set_to_none=True)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation and sign agreement of each rule, means over questions with patient-level intervals."""
    found: dict[str, Any] = {}
    for rule in SGP_RULES:
        for scale in SCALES:
            wish = [row["wishes"][rule, scale] for row in rows]
            patients = [row["patient"] for row in rows]
            kept = [(row["removal"], each["kept"]) for row, each in zip(rows, wish, strict=True)]
            dropped = [(row["addition"], each["dropped"]) for row, each in zip(rows, wish, strict=True)]
            more = [
                (np.array([row["more_is_better"]]), np.array([each["more"]]))
                for row, each in zip(rows, wish, strict=True)
            ]
            found.setdefault(rule, {})[scale] = {
                "kept_rank_correlation": mean_of(spearman, kept, patients, (-1.0, 1.0)),
                "kept_sign_agreement": mean_of(sign_agreement, kept, patients, (0.0, 1.0)),
                "dropped_rank_correlation": mean_of(spearman, dropped, patients, (-1.0, 1.0)),
                "dropped_sign_agreement": mean_of(sign_agreement, dropped, patients, (0.0, 1.0)),
                "threshold_sign_agreement": mean_of(sign_agreement, more, patients, (0.0, 1.0)),
                "wishes_for_more": float(np.mean([each["more"] > 0 for each in wish])),
            }
    truth = np.array([row["more_is_better"] for row in rows])
    return {
        "num_questions": len(rows),
        "tokens_removed": int(sum(len(row["removal"]) for row in rows)),
        "tokens_added": int(sum(len(row["addition"]) for row in rows)),
        "mean_loss": float(np.mean([row["loss"] for row in rows])),
        "rules": found,
        "share_of_kept_tokens_needed": float(np.mean(np.concatenate([row["removal"] for row in rows]) > NOISE)),
        "share_of_dropped_tokens_missed": float(np.mean(np.concatenate([row["addition"] for row in rows]) > NOISE)),
        "share_of_questions_better_with_more": float(np.mean(truth[np.abs(truth) > NOISE] > 0)),
    }


def mean_of(measure: Any, pairs: list[Any], patients: list[str], bounds: tuple[float, float]) -> dict[str, Any]:
    """Mean over the questions where a measure is defined."""
    values = [measure(truth, wish) for truth, wish in pairs]
    known = [(value, patient) for value, patient in zip(values, patients, strict=True) if value is not None]
    return dict(mean_interval([value for value, _ in known], [patient for _, patient in known], bounds=bounds))


def spearman(truth: np.ndarray, wish: np.ndarray) -> float | None:
    """Rank correlation; None for fewer than three tokens or where one side does not vary."""
    if len(truth) < 3 or np.ptp(truth) == 0 or np.ptp(wish) == 0:
        return None
    return float(np.corrcoef(rankdata(truth), rankdata(wish))[0, 1])


def sign_agreement(truth: np.ndarray, wish: np.ndarray) -> float | None:
    """Share of tokens whose true change has the sign of the wish; changes without a sign do not count."""
    counts = np.abs(truth) > NOISE
    return float((np.sign(truth[counts]) == np.sign(wish[counts])).mean()) if counts.any() else None


if __name__ == "__main__":
    main()
