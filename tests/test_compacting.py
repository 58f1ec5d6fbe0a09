"""`Session.compact`: a window's keys become fewer on demand, and what follows attends to these."""

from __future__ import annotations

import math

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_equal_stream, assert_near, random_cuts, tokens
from mnemic.compacting import NEWEST
from mnemic.memories.compact import Compact, CompactConfig

WINDOW, READ = 8 * SEGMENT, 6 * SEGMENT + 5


def session(name="llama", window=WINDOW, **settings):
    """One that has read more than stays, and less than its window."""
    model = make(name)
    mnemic.attach(model, CompactConfig(**{"segment_length": SEGMENT, "window": window, "keys": 64, **settings}))
    made = mnemic.Session(model)
    made.read(tokens(1, READ))
    return made


def logits(read, ids):
    return read.forward(ids).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_where_all_keys_are_kept_nothing_changes(name):
    whole, ids = session(name), tokens(1, 2 * SEGMENT, 3)
    short = whole.fork()
    assert short.compact(1.001) == READ - NEWEST
    assert short.cache.window.kept == NEWEST
    assert short.cache.layers[0].keys.shape[2] == NEWEST
    assert_near(logits(short, ids), logits(whole, ids), 1e-4)


@torch.no_grad()
def test_it_is_the_memory_s_own_matching_with_the_queries_that_wait(monkeypatch):
    made, given, write = session(), [], Compact.write

    def noted(self, *args, **kwargs):
        given.append((args, kwargs))
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Compact, "write", noted)
    waiting = made.stream.waiting
    made.compact(4)
    ((args, kwargs),) = given
    assert torch.equal(args[0], waiting)
    _, expected = mnemic.attached(made.model).memory.naive(*args, **kwargs)
    for name, tensor in made.stream.state.items():
        assert_near(tensor, expected[name], 1e-4)
    assert int((made.stream.state["mass"][0, 0, 0] > 0).sum()) == math.ceil((READ - NEWEST) / 4)
    assert bool((made.stream.state["mass"][0, :, :, : READ // 8] != 1).any())


@torch.no_grad()
def test_fewer_keys_are_further_from_all_and_nothing_else_changes():
    whole, ids = session(), tokens(1, SEGMENT - 5, 3)
    expected, far = logits(whole.fork(), ids), []
    for ratio in (1.5, 4, 20):
        short = whole.fork()
        short.compact(ratio)
        for name in ("counts", "written", "seen"):
            assert getattr(short.stream, name) == getattr(whole.stream, name)
        assert torch.equal(short.stream.waiting, whole.stream.waiting)
        assert short.nbytes < whole.nbytes
        far.append(float((logits(short, ids) - expected).abs().mean()))
    assert far[0] < far[1] < far[2]
    assert whole.cache.window.kept == READ


@torch.no_grad()
def test_what_was_kept_before_counts_and_room_is_what_the_config_says():
    made = session(window=4 * SEGMENT, keys=40)
    kept = int((made.stream.state["mass"][0, 0, 0] > 0).sum())
    held = made.cache.window.context[0]
    assert kept == READ - held > 0
    made.compact(2)
    assert int((made.stream.state["mass"][0, 0, 0] > 0).sum()) == kept + math.ceil((held - NEWEST) / 2)
    made.read(tokens(1, 3 * SEGMENT, 5))
    made.compact(1.1)
    assert int((made.stream.state["mass"][0, 0, 0] > 0).sum()) == 40


@torch.no_grad()
def test_a_text_that_asks_is_not_taken_in(monkeypatch):
    made, asked, given, write = session(), tokens(1, 7, 4), [], Compact.write
    made.read(tokens(1, SEGMENT - 5, 2))
    assert made.stream.counts == (0,)
    reading = made.fork()
    reading.read(asked)
    monkeypatch.setattr(Compact, "write", lambda self, *a, **k: given.append(a[0]) or write(self, *a, **k))
    before = made.stream
    made.compact(4, asked)
    assert_near(given[0], reading.stream.waiting, 1e-5)
    assert (made.stream.seen, made.stream.counts) == (before.seen, before.counts)
    assert made.stream.logs == before.logs
    # in the middle of a segment too, where text and what waits would be more than one
    other = session()
    found = other.fork()
    other.compact(4, asked)
    found.compact(4)
    assert not torch.equal(other.stream.state["values"], found.stream.state["values"])
    assert torch.equal(other.stream.waiting, found.stream.waiting)


@torch.no_grad()
def test_a_reservoir_asks_where_nothing_waits():
    made = session(reservoir=6)
    made.flush()
    before = made.stream.state
    assert made.compact(4) == READ - NEWEST
    assert int((made.stream.state["mass"][0, 0, 0] > 0).sum()) == math.ceil((READ - NEWEST) / 4)
    for name in ("asked", "when", "read"):
        assert torch.equal(made.stream.state[name], before[name])


@pytest.mark.parametrize("by", ["recent", "norm", "merged", "random"])
@torch.no_grad()
def test_what_asks_nothing_needs_no_queries(by):
    made = session(by=by)
    made.flush()
    assert made.compact(4) == READ - NEWEST
    assert int((made.stream.state["mass"][0, 0, 0] > 0).sum()) == math.ceil((READ - NEWEST) / 4)
    assert bool(logits(made, tokens(1, SEGMENT, 3)).isfinite().all())


@torch.no_grad()
def test_any_cut_of_what_follows_is_the_same_and_files_go_on(tmp_path):
    made, ids = session(), tokens(1, 13 * SEGMENT, 6)
    made.compact(4)
    made.save(tmp_path / "one.memory")
    again = mnemic.Session.load(tmp_path / "one.memory", made.model)
    assert_equal_stream(again.stream, made.stream)
    expected = logits(made, ids)
    assert torch.equal(logits(again, ids), expected)
    cut = mnemic.Session.load(tmp_path / "one.memory", made.model)
    parts = [logits(cut, part) for part in ids.split(random_cuts(13 * SEGMENT, 1), 1)]
    assert_near(torch.cat(parts, 1), expected)
    # what comes later changes nothing before it
    changed = mnemic.Session.load(tmp_path / "one.memory", made.model)
    assert_near(logits(changed, torch.cat([ids[:, :20], tokens(1, 30, 7)], 1))[:, :20], expected[:, :20])


@torch.no_grad()
def test_in_a_batch_it_is_as_alone():
    one = session()
    two = mnemic.Session(one.model)
    two.read(tokens(1, 3 * SEGMENT, 8))
    one.compact(3)
    texts = [tokens(1, 3 * SEGMENT, 1), tokens(1, 2 * SEGMENT + 3, 2)]
    alone = [logits(each.fork(), text) for each, text in zip((one, two), texts, strict=True)]
    found = mnemic.batch([one, two]).forward(texts)
    for its, expected in zip(found, alone, strict=True):
        assert_near(its.logits, expected, 1e-4)


@torch.no_grad()
def test_keys_that_are_made_again_from_the_text_are_those_that_stayed(tmp_path):
    model = session().model
    made = mnemic.Session(model, keep_text=True, keep_keys=False)
    made.read(tokens(1, READ))
    made.compact(4)
    made.save(tmp_path / "one.memory")
    again = mnemic.Session.load(tmp_path / "one.memory", model)
    assert_equal_stream(again.stream, made.stream)
    assert again.cache.window.context == (NEWEST,)
    assert_near(again.cache.layers[0].keys, made.cache.layers[0].keys, 1e-5)


@torch.no_grad()
def test_sinks_stay():
    made = session(read_layers=[0])
    assert made.sinks == 4
    keys = made.cache.layers[0].keys
    assert made.compact(4) == READ - NEWEST - 4
    assert torch.equal(made.cache.layers[0].keys, torch.cat([keys[:, :, :4], keys[:, :, -NEWEST:]], 2))


@torch.no_grad()
def test_one_that_fails_leaves_the_session_as_it_was(monkeypatch):
    made, ids = session(), tokens(1, SEGMENT, 3)
    expected, state = logits(made.fork(), ids), made.stream

    def fails(self, *_):
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(mnemic.host.cache.MemoryCache, "pack", fails)
        with pytest.raises(RuntimeError, match="no room"):
            made.compact(4)
    assert made.stream is state
    assert torch.equal(logits(made, ids), expected)


@pytest.mark.parametrize("ratio", [1, 0, -2, math.nan, math.inf])
def test_ratios_that_cannot_be(ratio):
    with pytest.raises(ValueError, match=f"ratio is {ratio}; use a number above 1"):
        session().compact(ratio)


@torch.no_grad()
def test_what_cannot_be_compacted_is_refused():
    made = session()
    with pytest.raises(ValueError, match=f"has {SEGMENT} tokens; use {SEGMENT - 1} at most"):
        made.compact(4, tokens(1, SEGMENT))
    with pytest.raises(ValueError, match="the input is empty"):
        made.compact(4, [])
    made.compact(4)
    with pytest.raises(ValueError, match=f"holds {NEWEST} keys, of which {NEWEST} stay"):
        made.compact(4)
    with pytest.raises(ValueError, match="holds 0 keys"):
        mnemic.Session(made.model).compact(4)
    made = session()
    made.flush()
    with pytest.raises(ValueError, match="pass a text that asks"):
        made.compact(4)
    with mnemic.attached(made.model).disabled(), pytest.raises(ValueError, match="the memory is off"):
        made.compact(4, [1, 2])
    model = make("llama")
    mnemic.attach(model, mnemic.RecallConfig(segment_length=SEGMENT, window=2 * SEGMENT))
    with pytest.raises(ValueError, match="of kind 'recall' makes nothing of the window's keys"):
        mnemic.Session(model).compact(4)
