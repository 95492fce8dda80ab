"""One scan, many questions: against separate runs from scratch, with nothing computed twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.decoding import Cache, build_cache, decode_step, decode_step_functional
from photon.errors import PhotonError
from photon.generate import EncodedScan, Prompted, answer, ask, decode, encode_scan, generate, last_rows
from photon.model.decoder import KeyValue
from photon.model.network import Photon
from photon.model.packing import Branch, Context, pack_batch
from photon.sampling import Generated, Sampling
from photon.testing import micro_config, micro_model, random_branch, random_context

CONFIG = micro_config()
SCANS = {"one volume": [(2, 4, 6)], "two volumes": [(1, 4, 4), (2, 2, 4)], "no volume": []}
LIMIT = 6


def scan_of(name: str) -> Context:
    return random_context(CONFIG, SCANS[name], seed=3)


def questions(config: PhotonConfig = CONFIG) -> list[Tensor]:
    """Of unequal and of equal lengths."""
    return [random_branch(config, 0, num_question=n, seed=7 * n + s).input_ids for n, s in enumerate([4, 1, 9, 2], 1)]


def from_scratch(
    model: Photon, context: Context, ids: Tensor, *, keep_all: bool, sampling: Sampling | None
) -> tuple[Generated, Tensor, list[int]]:
    """Answer, logits of its first token and kept tokens of one question, the scan encoded for it alone."""
    batch = pack_batch([context], [Branch(0, ids)], model.config)
    answers, _ = generate(model, batch, keep_all=keep_all, max_new_tokens=LIMIT, sampling=sampling)
    with torch.no_grad():
        output = model(batch, "full" if keep_all else "hard")
        logits = model.logits(output.hidden[last_rows(batch, output)])
    return answers[0], logits[0], kept_tokens(output.schedule, 0)


def kept_tokens(schedule: object, branch: int) -> list[int]:
    return schedule.kept_tokens(branch).tolist() if schedule is not None else []  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep_all", [True, False])
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=8.0, seed=11)])
def test_questions_in_any_order_and_batch_equal_separate_runs(
    name: str, keep_all: bool, sampling: Sampling | None
) -> None:
    """Several times each, so that a question leaves no trace in the scan."""
    model, context, asked = micro_model(), scan_of(name), questions()
    expected = [from_scratch(model, context, ids, keep_all=keep_all, sampling=sampling) for ids in asked]
    assert len({answer.ids for answer, _, _ in expected}) > 1
    scan = encode_scan(model, context)
    for places in ([0, 1, 2, 3], [3, 1], [2], [1, 1, 0, 3, 2], [0]):
        chosen = [asked[place] for place in places]
        prompted = ask(model, scan, chosen, keep_all=keep_all, room=LIMIT)
        answers = decode(model, prompted, max_new_tokens=LIMIT, sampling=sampling)
        again = answer(model, scan, chosen, keep_all=keep_all, max_new_tokens=LIMIT, sampling=sampling)
        assert again == answers
        for branch, place in enumerate(places):
            said, logits, kept = expected[place]
            assert answers[branch].ids == said.ids
            assert answers[branch].confidence == pytest.approx(said.confidence, rel=1e-3)
            torch.testing.assert_close(prompted.logits[branch], logits, atol=1e-5, rtol=0)
            assert kept_tokens(prompted.output.schedule, branch) == kept


def test_nothing_of_the_scan_is_computed_again() -> None:
    model, context, asked = micro_model(), scan_of("one volume"), questions()
    num_encoded = 0
    rows: list[int] = []

    def count(*_: object) -> None:
        nonlocal num_encoded
        num_encoded += 1

    model.visual.register_forward_hook(count)
    layers = model.model.layers[: CONFIG.pruning.layer + 1]
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, _: rows.append(inputs[0].shape[0]))
    scan = encode_scan(model, context)
    assert num_encoded == 1 and rows == [context.input_ids.numel()] * len(layers)
    for chosen in (asked, asked[1:2], asked[::-1]):
        rows.clear()
        answer(model, scan, chosen, max_new_tokens=3)
        own = sum(ids.numel() for ids in chosen)
        assert rows[: len(layers)] == [own] * len(layers)
        assert set(rows[len(layers) :]) <= {len(chosen)}, "one row a question and token"
    assert num_encoded == 1


def test_a_scan_holds_what_questions_need_and_no_more() -> None:
    model, context = micro_model(), scan_of("two volumes")
    scan = encode_scan(model, context)
    rows, layers = context.input_ids.numel(), CONFIG.pruning.layer + 1
    numbers = CONFIG.hidden_size + 2 * layers * CONFIG.num_key_value_heads * CONFIG.head_dim
    tensors = [scan.context.patches, scan.state.hidden, *(t for layer in scan.state.layers for t in layer)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    assert sum(held.values()) <= 4 * (rows * numbers + layers)
    assert len(scan.state.layers) == layers and scan.context.patches.numel() == 0
    assert context.patches.numel() > 0, "the caller's context stays"
    assert not any(t.requires_grad for t in tensors)


def test_no_question_no_answer() -> None:
    model = micro_model()
    scan = encode_scan(model, scan_of("one volume"))
    assert answer(model, scan, [], max_new_tokens=3) == []
    with pytest.raises(PhotonError) as caught:
        ask(model, scan, [])
    assert caught.value.code == "PROMPT_INVALID"
    with pytest.raises(PhotonError) as caught:
        ask(model, scan, [questions()[0], torch.zeros(0, dtype=torch.long)])
    assert caught.value.code == "PROMPT_INVALID"


def test_a_prompt_that_does_not_fit_its_volume() -> None:
    context = scan_of("one volume")
    wrong = Context(context.input_ids, context.patches, ((2, 4, 4),))
    with pytest.raises(PhotonError) as caught:
        encode_scan(micro_model(), wrong)
    assert caught.value.code == "PROMPT_INVALID"


def test_questions_read_once_are_decoded_again_and_further() -> None:
    """In the room that was left, beyond it, drawn, and greedily again."""
    model = micro_model()
    scan = encode_scan(model, scan_of("one volume"))
    prompted = ask(model, scan, questions(), room=3)
    short = decode(model, prompted, max_new_tokens=3)
    long = decode(model, prompted, max_new_tokens=LIMIT)
    drawn = decode(model, prompted, max_new_tokens=3, sampling=Sampling(temperature=8.0, seed=1))
    assert [each.ids for each in drawn] != [each.ids for each in short]
    assert decode(model, prompted, max_new_tokens=3) == short
    assert [each.ids[:3] for each in long] == [each.ids for each in short]
    assert [each.ids for each in long] == [
        each.ids for each in decode(model, ask(model, scan, questions()), max_new_tokens=LIMIT)
    ]


def follow(model: Photon, prompted: Prompted, tokens: Sequence[Tensor], *, is_functional: bool) -> list[Tensor]:
    """Logits after each of the given tokens [B]."""
    step = decode_step_functional if is_functional else decode_step
    cache = prompted.cache if is_functional else prompted.cache.with_room(len(tokens))
    found = []
    with torch.no_grad():
        for number, ids in enumerate(tokens, start=1):
            logits, cache = step(model, ids, prompted.positions + number, cache)
            found.append(logits)
    return found


def test_both_forms_of_a_step_agree() -> None:
    model = micro_model()
    scan = encode_scan(model, scan_of("one volume"))
    prompted = ask(model, scan, questions())
    tokens = torch.randint(30, (5, 4), generator=torch.Generator().manual_seed(0)).unbind()
    pairs = zip(*(follow(model, prompted, tokens, is_functional=form) for form in (True, False)), strict=True)
    for functional, in_place in pairs:
        torch.testing.assert_close(functional, in_place, atol=1e-5, rtol=0)


def test_columns_without_a_row_do_not_matter() -> None:
    """Whatever a branch's neighbours kept fills its masked columns, even NaN."""
    lengths = [2, 4, 1]
    packed = torch.arange(7.0)[:, None, None].expand(7, 2, 3).clone()
    packed[2:6] = torch.nan
    cache = build_cache([KeyValue(packed, -packed)] * 2, lengths, room=2)
    assert cache.k.shape == cache.v.shape == (2, 3, 6, 2, 3) and cache.num_columns == 4
    assert cache.mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert cache.k[:, [0, 2]].isfinite().all() and cache.v[:, [0, 2]].isfinite().all()
    assert cache.k[0, 0, :2, 0, 0].tolist() == [0.0, 1.0] and cache.v[1, 2, 0, 1, 2] == -6.0
    assert cache.k[:, :, 4:].eq(0).all()


def test_room_is_made_once() -> None:
    k = torch.randn(2, 3, 4, 2, 3)
    cache = Cache(k, k + 1, torch.ones(3, 4, dtype=torch.bool))
    roomy = cache.with_room(2)
    assert roomy.k.shape[2] == 6 and roomy.num_columns == 4
    assert roomy.with_room(2) is roomy and roomy.with_room(0) is roomy and cache.with_room(0) is cache
    for layer in range(2):
        assert all(torch.equal(*pair) for pair in zip(roomy.used(layer), cache.used(layer), strict=True))


def test_the_scan_is_not_changed_by_its_questions() -> None:
    model = micro_model()
    scan: EncodedScan = encode_scan(model, scan_of("one volume"))
    before = [scan.state.hidden.clone(), *(t.clone() for layer in scan.state.layers for t in (layer.k, layer.v))]
    answer(model, scan, questions(), max_new_tokens=LIMIT)
    after = [scan.state.hidden, *(t for layer in scan.state.layers for t in (layer.k, layer.v))]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
