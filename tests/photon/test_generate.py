"""Greedy decoding from the cache against running the whole prompt again for every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.generate import generate
from photon.model.attention import BlockAttention
from photon.model.network import Photon
from photon.model.packing import Branch, Context, PackedBatch, pack_batch
from photon.sampling import Generated
from photon.testing import micro_config, micro_model, random_branch, random_context

CONFIG = micro_config()
MAX_NEW = 6


@torch.no_grad()
def naive(model: Photon, context: Context, ids: Tensor, *, keep_all: bool) -> Generated:
    """No cache and nothing removed: for every token the whole prompt and all that was said runs again, and masks
    hide dropped tokens - from every row after the pruning layer, and from what was said everywhere."""
    keep = model(pack_batch([context], [Branch(0, ids)], model.config), "hard").schedule
    said: list[int] = []
    confidence = 1.0
    for _ in range(MAX_NEW):
        whole = Branch(0, torch.cat([ids, torch.tensor(said, dtype=torch.long)]))
        batch = pack_batch([context], [whole], model.config)
        size, prompt = context.input_ids.numel() + whole.input_ids.numel(), context.input_ids.numel() + ids.numel()
        is_dropped = torch.zeros(size, dtype=torch.bool)
        if keep is not None and not keep_all:
            is_dropped[batch.visual_rows] = ~keep.keep[0]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        is_said = torch.arange(size) >= prompt
        early = causal & ~(is_said[:, None] & is_dropped)
        late = causal & (~is_dropped | torch.eye(size, dtype=torch.bool))
        x = model.model.embed_tokens(torch.cat([context.input_ids, whole.input_ids]))
        if batch.visual_rows.numel():
            x = x.index_copy(0, batch.visual_rows, model.visual(context.patches, context.grids))
        table = model.model.rotary(torch.cat([batch.context_positions, batch.branch_positions], dim=1))
        for index, layer in enumerate(model.model.layers):
            mask = early if index <= model.config.pruning.layer else late
            x, _ = layer(x, table, BlockAttention(mask[None]))
        p = model.logits(x[-1]).double().softmax(-1)
        confidence *= float(p.max())
        token = int(p.argmax())
        if token == model.config.eos_token_id:
            break
        said.append(token)
    return Generated(tuple(said), confidence)


def prompts(config: PhotonConfig = CONFIG) -> tuple[list[Context], list[Branch]]:
    contexts = [random_context(config, grids, seed=n) for n, grids in enumerate(([(2, 4, 6)], [], [(1, 2, 4)]))]
    places = [(0, 5), (2, 2), (0, 1), (1, 4), (0, 8)]
    return contexts, [random_branch(config, c, num_question=n, seed=7 * n + c) for c, n in places]


@pytest.mark.parametrize("keep_all", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batch_of_unequal_prompts_equals_running_everything_again(keep_all: bool, seed: int) -> None:
    model = micro_model(seed=seed)
    contexts, branches = prompts()
    answers, output = generate(model, pack_batch(contexts, branches, CONFIG), keep_all=keep_all, max_new_tokens=MAX_NEW)
    if not keep_all:
        decision = output.schedule
        assert decision is not None and 0 < int(decision.keep.sum()) < int(decision.valid.sum())
    for answer, branch in zip(answers, branches, strict=True):
        expected = naive(model, contexts[branch.context], branch.input_ids, keep_all=keep_all)
        assert answer.ids == expected.ids
        assert answer.confidence == pytest.approx(expected.confidence, rel=1e-3)
    assert max(len(answer.ids) for answer in answers) > 2
    assert len({answer.ids for answer in answers}) > 1


def test_pruning_changes_what_is_seen() -> None:
    model = micro_model()
    contexts, branches = prompts()
    batch = pack_batch(contexts, branches, CONFIG)
    pruned, full = (generate(model, batch, keep_all=k, max_new_tokens=MAX_NEW)[0] for k in (False, True))
    assert [a.confidence for a in pruned] != [a.confidence for a in full]
    assert pruned[3].ids == full[3].ids, "a question without a scan has nothing to prune"


def test_answers_stop_at_the_limit() -> None:
    model = micro_model()
    contexts, branches = prompts()
    answers, _ = generate(model, pack_batch(contexts, branches, CONFIG), keep_all=True, max_new_tokens=1)
    assert all(len(answer.ids) <= 1 for answer in answers)


@pytest.mark.parametrize("keep_all", [True, False])
def test_a_scan_of_nan_gives_no_answer(keep_all: bool) -> None:
    context = random_context(CONFIG, [(1, 4, 4)], seed=0)
    context.patches[3, 2] = torch.nan
    batch: PackedBatch = pack_batch([context], [random_branch(CONFIG, 0, num_question=3)], CONFIG)
    with pytest.raises(PhotonError) as caught:
        generate(micro_model(), batch, keep_all=keep_all, max_new_tokens=2)
    assert caught.value.code == "ANSWER_NOT_FINITE"
