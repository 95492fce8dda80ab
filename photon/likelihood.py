"""How likely given answers are: options of closed questions, compared instead of generated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from photon.decoding import run_rows
from photon.errors import PhotonError
from photon.generate import Prompted
from photon.model.attention import BlockAttention
from photon.model.network import Photon
from photon.sampling import require_finite

MAX_LOGIT_ROWS = 256
"""Rows that are projected onto the vocabulary at a time."""


@torch.no_grad()
def option_log_likelihoods(model: Photon, prompted: Prompted, options: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sum of log p over the tokens of every option, each given those before it, on the pruned cache.

    This is how likely :func:`photon.generate.decode` is to draw the option. What is kept depends on the question alone.

    Args:
        prompted: the questions, B of them.
        options: for each question the token ids int64 [n] of its options, on the CPU, each with its end token
            (n >= 1). Numbers and lengths may differ; a question may have none.

    Returns:
        float64 [options] for each question, on the CPU.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when there is not one list of options a question or an option has no tokens,
            ``ANSWER_NOT_FINITE`` with the branches concerned when a likelihood is not finite.
    """
    _check(options, prompted.logits.shape[0])
    device = prompted.logits.device
    branch = [number for number, given in enumerate(options) for _ in given]
    first = [int(option[0]) for given in options for option in given]
    start = torch.tensor([branch, first], dtype=torch.long, device=device)
    total = prompted.logits.double().log_softmax(-1)[start[0], start[1]]
    if any(option.numel() > 1 for given in options for option in given):
        total = total + _later_tokens(model, prompted, options)
    sums = total.cpu().split([len(given) for given in options])
    require_finite([number for number, each in enumerate(sums) if not bool(torch.isfinite(each).all())])
    return list(sums)


def _later_tokens(model: Photon, prompted: Prompted, options: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sum of log p over all but the first token of every option, float64 [options of all questions].

    One pass for all: the options of a question lie one after another, T tokens at most, and each token sees the rows
    that the question kept and its own option's tokens up to itself. So the cache is not copied for every option.
    """
    device, cache = prompted.logits.device, prompted.cache
    counts = [len(given) for given in options]
    numbered = [
        list(enumerate(given, start=end - count))
        for given, count, end in zip(options, counts, accumulate(counts), strict=True)
    ]
    ids = _side_by_side([[option[:-1] for option in given] for given in options]).to(device)
    targets = _side_by_side([[option[1:] for option in given] for given in options]).to(device)
    places = _side_by_side([[torch.arange(option.numel() - 1) for option in given] for given in options]).to(device)
    owner = _side_by_side([[torch.full_like(option[1:], n) for n, option in given] for given in numbered], fill=-1)
    owner = owner.to(device)

    own = (owner[:, :, None] == owner[:, None, :]).tril()
    mask = torch.cat([cache.mask[:, None].expand(-1, owner.shape[1], -1), own], dim=2)
    attends = [BlockAttention(mask, *cache.used(index)) for index in range(cache.k.shape[0])]
    positions = prompted.positions[:, None] + 1 + places
    x, _ = run_rows(model, ids.flatten(), positions.flatten(), attends)

    real = (owner >= 0).flatten().nonzero().flatten()
    log_p = [
        model.logits(x[rows]).double().log_softmax(-1).gather(-1, targets.flatten()[rows, None]).squeeze(-1)
        for rows in real.split(MAX_LOGIT_ROWS)
    ]
    total = torch.zeros(sum(counts), dtype=torch.float64, device=device)
    return total.index_add(0, owner.flatten()[real], torch.cat(log_p))


def _side_by_side(pieces: Sequence[Sequence[Tensor]], *, fill: int = 0) -> Tensor:
    """Pieces of each question one after another, int64 [B, T], filled up at the end."""
    nothing = torch.zeros(0, dtype=torch.long)
    return pad_sequence([torch.cat([nothing, *given]) for given in pieces], batch_first=True, padding_value=fill)


def _check(options: Sequence[Sequence[Tensor]], num_branches: int) -> None:
    if len(options) != num_branches:
        fact = f"there are {len(options)} lists of options for {num_branches} questions."
        raise PhotonError("PROMPT_INVALID", "options", fact, "Give every question its own list, which may be empty.")
    if any(option.numel() == 0 for given in options for option in given):
        raise PhotonError("PROMPT_INVALID", "options", "one has no tokens.", "Give every option its end token.")
