"""kNN-LM: what a read means, pairs across borders, the mixture as logits, and its place beside other memories."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import DEPTH, VOCABULARY, WIDTH, make
from helpers import SEGMENT, assert_differ, assert_near, feed, stream, tokens
from mnemic.memories.knn_lm import KNNLMConfig
from mnemic.memories.knn_lm_naive import naive_mix
from mnemic.memory import Site
from mnemic.state import StateError

HEAD = Site(DEPTH - 1, "logits")
FORMS = KNNLMConfig.tiny()
SETTINGS = {"segment_length": SEGMENT, "temperature": 0.5, "rate": 0.5, "top_k": 4}


def built(config=FORMS[0]):
    return config.build(WIDTH, DEPTH)


def written(memory, segments, batch=2, seed=0):
    """The state after so many segments, and the hidden states and ids that it is of."""
    torch.manual_seed(seed)
    hidden, ids = torch.randn(batch, segments * SEGMENT, WIDTH), tokens(batch, segments * SEGMENT, seed)
    state = memory.init_state(batch)
    for part, its in zip(hidden.split(SEGMENT, 1), ids.split(SEGMENT, 1), strict=True):
        state = memory.write(part, state, ids_bt=its)
    return state, hidden, ids


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("segments", [0, 1, 3, 6])
def test_the_logits_are_those_of_the_mixture(config, segments):
    memory = built(config).double()
    state, *_ = written(memory, segments)
    state["count"] = state["count"] - torch.tensor([0, min(3, int(state["count"][0]))])  # of unequal length
    logits, hidden = torch.randn(2, 5, VOCABULARY, dtype=torch.float64) * 3, torch.randn(2, 5, WIDTH).double()
    mixed = memory.mix(HEAD, logits, hidden, state)
    assert_near(mixed.softmax(-1), naive_mix(config, logits, hidden, state), 1e-9)
    # of no more tokens than there are neighbours, and the others bit by bit
    changed = (mixed != logits).sum(-1)
    assert bool((changed <= config.top_k).all())
    assert bool((changed > 0).all()) == (segments > 0)


def test_gradients_of_the_mixture():
    memory = built(FORMS[1]).double()
    state, *_ = written(memory, 2)
    logits, hidden = torch.randn(2, 3, VOCABULARY).double(), torch.randn(2, 3, WIDTH).double()
    state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
    leaves = [each.requires_grad_() for each in (logits, hidden, state["keys"])]
    weights = torch.randn(2, 3, VOCABULARY).double()
    mixed = memory.mix(HEAD, logits, hidden, state).softmax(-1)
    found = torch.autograd.grad((mixed * weights).sum(), leaves)
    wanted = torch.autograd.grad((naive_mix(FORMS[1], logits, hidden, state) * weights).sum(), leaves)
    for mine, its in zip(found, wanted, strict=True):
        assert mine.abs().max() > 1e-4
        torch.testing.assert_close(mine, its, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("keep", [None, torch.tensor([[1] * 8, [0, 1, 1, 0, 1, 0, 0, 0], [0] * 8]).bool()])
def test_pairs_of_a_state_and_what_followed(keep):
    # oldest first, the border between two segments among them; what is padding is not there
    memory = built(KNNLMConfig(segment_length=SEGMENT, size=100))
    hidden, ids, state = torch.randn(3, 3 * SEGMENT, WIDTH), tokens(3, 3 * SEGMENT), memory.init_state(3)
    for part, its in zip(hidden.split(SEGMENT, 1), ids.split(SEGMENT, 1), strict=True):
        state = memory.write(part, state, keep, its)
    for row in range(3):
        real = torch.ones(24).bool() if keep is None else keep[row].repeat(3)
        its, known = hidden[row, real], ids[row, real]
        count = max(0, len(its) - 1)
        assert state["count"][row] == count
        assert torch.equal(state["tokens"][row, :count] - 1, known[1:])
        assert torch.equal(state["keys"][row, :count, :-1], its[:-1])
        assert not state["tokens"][row, count:].any()
        assert not state["keys"][row, count:].any()
        assert int(state["waits"][row]) == (len(its) > 0)
        assert torch.equal(state["last"][row], its[-1] if len(its) else torch.zeros(WIDTH))


def test_the_oldest_leave():
    memory = built(KNNLMConfig(segment_length=SEGMENT, size=10))
    state, hidden, ids = written(memory, 3)
    assert torch.equal(state["tokens"] - 1, ids[:, -10:])
    assert torch.equal(state["keys"][..., :-1], hidden[:, -11:-1])


@torch.no_grad()
def test_what_was_read_is_expected_again():
    # a text that comes again: the model alone does not know how it goes on, the memory does
    model = make("llama")
    config = KNNLMConfig(**SETTINGS | {"rate": 0.9, "temperature": 0.01, "top_k": 1})
    attachment = mnemic.attach(model, config)
    ids = tokens(1, 2 * SEGMENT).repeat(1, 2)
    cache = mnemic.memory_cache(model, SEGMENT)
    logits = feed(model, ids, carried=cache)
    share = logits[0, 2 * SEGMENT : -1].softmax(-1).gather(-1, ids[0, 2 * SEGMENT + 1 :, None])
    assert bool((share[:-1] > 0.89).all())
    with attachment.disabled():
        plain = feed(model, ids, carried=mnemic.memory_cache(model, SEGMENT))
    assert_differ(plain[:, 2 * SEGMENT :], logits[:, 2 * SEGMENT :])
    assert torch.equal(plain[:, :SEGMENT], logits[:, :SEGMENT])
    assert stream(cache).state["tokens"][0, :31].tolist() == (ids[0, 1:] + 1).tolist()


def test_a_sentinel_counts_far_entries_for_less():
    memory, hidden = built(KNNLMConfig(**SETTINGS, sentinel=0.1)), torch.randn(1, 1, WIDTH)
    plain, logits = built(KNNLMConfig(**SETTINGS)), torch.zeros(1, 1, VOCABULARY)
    shares = []
    for away in (0.01, 0.5, 2.0):
        key = hidden + away**0.5 * hidden.norm() * torch.nn.functional.normalize(torch.randn(1, 1, WIDTH), dim=-1)
        entries = {"keys": torch.cat([key, -key.square().sum(-1, keepdim=True) / 2], -1), "count": torch.tensor([1])}
        state = memory.init_state(1) | entries | {"tokens": torch.tensor([[6]])}
        shares.append([float(each.mix(HEAD, logits, hidden, state).softmax(-1)[0, 0, 5]) for each in (memory, plain)])
    (near, at), (middle, _), (far, same) = shares
    assert at == pytest.approx(same) == pytest.approx(0.5 + 0.5 / VOCABULARY, abs=1e-4)
    assert at > near > middle > far
    distance = torch.tensor([0.01, 0.5, 2.0])
    expected = 0.5 * torch.sigmoid((0.1 - distance) / 0.5)
    assert_near(torch.tensor([near, middle, far]), expected + (1 - expected) / VOCABULARY, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "beside",
    [
        mnemic.RecallConfig(segment_length=8, window=16, budget=8, sinks=4, unit=4, recall_in_reading=True),
        mnemic.EMTConfig(segment_length=8, window=16, slots=4, dim=16),
        mnemic.MemoryPromptConfig(segment_length=8, window=16, tokens=2),
    ],
)
def test_beside_another_memory(beside, tmp_path):
    model, config = make("llama"), KNNLMConfig(**SETTINGS, window=16)
    mnemic.attach(model, [config, beside])
    session, ids, more = mnemic.Session(model), tokens(1, 45), tokens(1, 13, 1)
    session.read(ids)
    assert torch.equal(session.stream.state["0.tokens"][0] - 1, ids[0, 1:40])
    session.save(tmp_path / "both.memory")
    again, cut = mnemic.Session.load(tmp_path / "both.memory", model), session.fork()
    logits = session.forward(more).logits
    assert torch.equal(again.forward(more).logits, logits)
    assert_near(torch.cat([cut.forward(part).logits for part in more.split(5, 1)], 1), logits)
    mnemic.attached(model).detach()
    mnemic.attach(model, beside)
    alone = mnemic.Session(model)
    alone.read(ids)
    assert_differ(alone.forward(more).logits, logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 1.0}, r"rate is 1.0; .* lies between 0 and 1"),
        ({"temperature": 0.0}, r"temperature is 0.0; a distance is above 0"),
        ({"sentinel": 0.0}, r"sentinel is 0.0; a distance is above 0"),
        ({"top_k": 0}, r"top_k is 0; it must be at least 1"),
        ({"size": 0}, r"size is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        KNNLMConfig(**wrong)


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [("count", 99, "count goes from 99"), ("waits", 2, "waits goes from 2"), ("tokens", 0, "tokens goes from 0")],
)
def test_states_that_no_writes_make(name, number, message):
    memory = built()
    state, *_ = written(memory, 2, batch=1)
    memory.check_state(state, 2)
    with pytest.raises(StateError, match=message):
        memory.check_state(state | {name: torch.full_like(state[name], number)}, 2)
    with pytest.raises(StateError, match="keys goes from"):
        memory.check_state(state | {"keys": state["keys"][:, 1:]}, 2)


def test_tokens_that_the_head_does_not_know_say_nothing():
    memory, logits, hidden = built(), torch.randn(1, 2, 5), torch.randn(1, 2, WIDTH)
    state, *_ = written(memory, 2, batch=1)
    state["tokens"] = state["tokens"] + 10
    assert torch.equal(memory.mix(HEAD, logits, hidden, state), logits)


@torch.no_grad()
def test_many_tokens_at_once_are_as_few(monkeypatch):
    memory = built()
    state, *_ = written(memory, 3)
    logits, hidden = torch.randn(2, 7, VOCABULARY), torch.randn(2, 7, WIDTH)
    expected = memory.mix(HEAD, logits, hidden, state)
    monkeypatch.setattr("mnemic.memories.knn_lm.SCORES_AT_ONCE", 3 * 2 * WIDTH * memory.config.top_k)
    assert_near(memory.mix(HEAD, logits, hidden, state), expected, 1e-5)
