"""What reading leaves behind in Memoria, and its encoders, which read what their own segment wrote."""

from __future__ import annotations

import pytest
import torch

import mnemic
from engram_streams import SMALL, WIDTH, built, ids_of, steps
from families import ENCODERS, make
from helpers import CONFIGS, SEGMENT, assert_differ, assert_near, call, carrier, feed, host, shake, stream, tokens
from mnemic.memories.memoria import MemoriaConfig
from mnemic.memories.memoria.graph import counts
from mnemic.memory import Site

# --- what reading leaves behind --------------------------------------------------------------------------------------


def recorded(monkeypatch, memory, name):
    """What a method of the memory is given and gives, in order."""
    calls, method = [], getattr(type(memory), name)

    def recording(self, *given):
        result = method(self, *given)
        calls.append((given, result))
        return result

    monkeypatch.setattr(type(memory), name, recording)
    return calls


@pytest.mark.parametrize("config", MemoriaConfig.tiny())
@torch.no_grad()
def test_use_is_the_attention_of_all_tokens_so_far(config, monkeypatch):
    model, ids = host("llama", config), tokens(2, 4 * SEGMENT + 5)
    memory, mask = mnemic.attached(model).memory, torch.ones(2, 4 * SEGMENT + 5, dtype=torch.long)
    mask[0, :6] = 0
    cache = carrier(model)
    feed(model, ids[:, : 4 * SEGMENT], [4 * SEGMENT], mask[:, : 4 * SEGMENT], cache)
    before = stream(cache)
    assert before.counts == (2, 0)
    assert not before.state["use"][1].any()
    reads = recorded(monkeypatch, memory, "read_and_trace")
    call(model, ids[:, 4 * SEGMENT :], cache, mask)
    after = stream(cache)
    assert after.counts == (7, 5)
    assert [given[0] for given, _ in reads] == list(memory.reads)
    traces = [trace["use"] for _, (_, trace) in reads]
    assert [tuple(trace.shape) for trace in traces] == [(2, 5, 5)] * len(traces)
    assert_near(after.state["use"], before.state["use"] + sum(trace.sum(1) for trace in traces), 1e-6)
    # attention sums to 1: one for each real token of the segment and each layer, if all of it goes to engrams
    assert (after.state["recalled"] >= 0).any(1).all()
    most = len(memory.reads) * torch.tensor([7.0, 5.0])
    if config.reservoir:
        assert (after.state["use"].sum(1) < most).all()
    else:
        assert_near(after.state["use"].sum(1), most, 1e-4)
    # nothing else of the state moves before the segment ends
    for name, tensor in before.state.items():
        if name != "use":
            assert torch.equal(after.state[name], tensor)


@torch.no_grad()
def test_padding_leaves_no_use():
    model, ids = host("gpt2", CONFIGS["memoria-0"]), tokens(2, 4 * SEGMENT)
    cache, mask = mnemic.memory_cache(model, SEGMENT), torch.ones(2, 6, dtype=torch.long)
    feed(model, ids, carried=cache)
    mask[0, 2:] = 0
    call(model, tokens(2, 6, 3), cache, mask)
    assert_near(stream(cache).state["use"].sum(1), 2 * torch.tensor([2.0, 6.0]), 1e-4)


@torch.no_grad()
def test_use_however_calls_are_cut():
    model, ids = host("gpt2", CONFIGS["memoria-0"]), tokens(2, 6 * SEGMENT + 7)
    found = []
    for lengths in ([55], [1] * 55, [48, 7], [50, 3, 2]):
        cache = carrier(model)
        feed(model, ids, lengths, carried=cache)
        found.append(stream(cache).state)
    assert (found[0]["use"].sum(1) > 6 * 2).all()
    for state in found[1:]:
        assert torch.equal(state["recalled"], found[0]["recalled"])
        assert_near(state["use"], found[0]["use"])
        assert_near(state["lifespan"], found[0]["lifespan"])


@torch.no_grad()
def test_tokens_taken_back_leave_no_use():
    model, ids = host("gpt2", CONFIGS["memoria-0"]), tokens(2, 5 * SEGMENT + 6)
    short, long = carrier(model), carrier(model)
    feed(model, ids[:, :-3], [5 * SEGMENT, 3], carried=short)
    feed(model, ids, [5 * SEGMENT, 6], carried=long)
    assert_differ(stream(long).state["use"], stream(short).state["use"], 0.1)
    long.crop(-3)
    assert_near(stream(long).state["use"], stream(short).state["use"], 1e-5)
    assert stream(long).counts == (3, 3)


@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_a_row_without_engrams_reads_nothing(heads):
    memory = built(SMALL.replace(heads=heads))
    (*_, state) = steps(memory, 6)
    both = mnemic.state.concatenate([state, memory.init_state(1)])
    hidden = torch.randn(2, 3, WIDTH)
    read, trace = memory.read_and_trace(Site(1), hidden, both)
    assert torch.equal(read[1], hidden[1])
    assert not trace["use"][1].any()
    assert_differ(read[0], hidden[0])
    assert_near(read[:1], memory.read(Site(1), hidden[:1], state), 1e-6)


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_reads_what_its_own_segment_wrote(name, monkeypatch):
    model = make(name, num_hidden_layers=4)
    torch.manual_seed(0)
    memory = mnemic.attach(model, CONFIGS["memoria-0"]).memory
    shake(memory)
    assert (memory.writes, memory.reads) == ((Site(2),), (Site(3),))
    writes, reads = recorded(monkeypatch, memory, "write"), recorded(monkeypatch, memory, "read_and_trace")
    session, parts = mnemic.Session(model), tokens(1, 6 * SEGMENT + 3).split(SEGMENT, 1)
    left = memory.init_state(1)
    for number, part in enumerate(parts):
        session.read(part)
        (_, given, *_), after = writes[number]
        _, hidden, seen = reads[number][0]
        assert hidden.shape[1] == part.shape[1]
        # a segment's write sees the state with what the one before left behind, its read what that write gave
        for name, tensor in left.items():
            assert torch.equal(given[name], tensor)
            assert torch.equal(seen[name], after[name])
        assert int(after["step"][0]) == number + 1
        # the step that this segment began is not finished: its engrams have not fired, nor grown older
        working = after["levels"][0, 2]
        assert working == 2
        taken = len(ids_of(after))
        assert after["lifespan"][0, taken - 2 : taken].tolist() == [4.0, 4.0]
        assert not counts(after)[0, taken - 2 : taken].any()
        left = session.stream.state
        trace = reads[number][1][1]["use"]
        assert_near(left["use"], after["use"] + trace.sum(1), 1e-6)
        assert all(torch.equal(left[name], after[name]) for name in after if name != "use")
    assert len(writes) == len(reads) == 7
    assert left["levels"][0].min() > 0
    assert_near(left["use"].sum(), torch.tensor(3.0), 1e-5)
    # the first segment already reads its own working memory
    expected = mnemic.Session(model).forward(parts[0]).logits
    with mnemic.attached(model).disabled():
        assert_differ(model(parts[0]).logits, expected)


@torch.no_grad()
def test_what_an_encoder_read_lengthens_lives_in_the_next_segment():
    model = host("bert", CONFIGS["memoria-0"])
    session, ids = mnemic.Session(model), tokens(1, 5 * SEGMENT)
    session.read(ids)
    before = session.stream.state
    real = before["recalled"][0] >= 0
    share = before["use"][0] / before["use"][0].sum() * real.sum() * 3.0
    session.read(tokens(1, SEGMENT, 3))
    after = session.stream.state
    alive = dict(zip(ids_of(after), after["lifespan"][0].tolist(), strict=False))
    seen = 0
    for place, slot in enumerate(before["recalled"][0].tolist()):
        if slot >= 0 and (number := int(before["id"][0, slot])) in alive:
            expected = float(before["lifespan"][0, slot] + share[place]) - 1
            assert alive[number] == pytest.approx(expected, abs=1e-4)
            seen += 1
    assert seen >= 2
