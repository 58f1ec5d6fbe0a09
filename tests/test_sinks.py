"""Sinks: the first keys of a stream, which stay in its window. What they are seen as is in `test_window.py`, where
windows that are longer than a segment have them by default, as in all other tests.
"""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_differ, assert_near, assert_same_stream, feed, host, stream, tokens
from mnemic.host.anatomy import examine
from mnemic.host.turning import movable
from mnemic.state import StateError, from_bytes, to_bytes
from test_ropes import dynamic

CONFIG = CONFIGS["emt-0"]
WINDOW, SINKS, POSITIONS = 2 * SEGMENT, 3, 4 * SEGMENT


def few_positions(name):
    """Settings of a family whose positions soon run out."""
    return {"n_positions" if name in ("gpt2", "gptj") else "max_position_embeddings": POSITIONS}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "smollm3", "gpt2", "gptj"])
@torch.no_grad()
def test_a_row_whose_positions_run_out_goes_on_behind_its_sinks(name):
    """With its window where keys can be turned, else without. One block, whose keys depend on their own token alone."""
    depth = {"n_layer": 1} if name in ("gpt2", "gptj") else {"num_hidden_layers": 1}
    depth |= {"gemma3": {"layer_types": ("full_attention",)}, "smollm3": {"no_rope_layers": (1,)}}.get(name, {})
    model, ids = host(name, CONFIG, **depth, **few_positions(name)), tokens(2, 12 * SEGMENT)
    turns = name not in ("gpt2", "gptj")
    with mnemic.attached(model).disabled():
        logits = feed(model, ids, [5] * 19 + [1], carried=mnemic.memory_cache(model, WINDOW, SINKS))
    bare = make(name, **depth, **few_positions(name))
    seen, position, most = torch.arange(0), torch.arange(0), 0
    for start in range(0, ids.shape[1], SEGMENT):
        first = int(position[-1]) + 1 if len(position) else 0
        seen = torch.cat([seen, torch.arange(start, start + SEGMENT)])
        position = torch.cat([position, torch.arange(first, first + SEGMENT)])
        given = {"position_ids": position.expand(2, -1), "attention_mask": torch.ones(2, len(seen), dtype=torch.long)}
        expected = bare(ids[:, seen], **given).logits[:, -SEGMENT:]
        assert_near(logits[:, start : start + SEGMENT], expected, 1e-4)
        most = max(most, int(position[-1]))
        kept = torch.arange(len(seen))
        if len(seen) > WINDOW - SEGMENT:
            kept = torch.cat([kept[:SINKS], kept[SEGMENT + SINKS - WINDOW :]])
        seen, position = seen[kept], position[kept]
        if int(position[-1]) + 1 + SEGMENT > POSITIONS:
            seen, position = (seen, torch.arange(len(seen))) if turns else (seen[:SINKS], position[:SINKS])
    assert most == POSITIONS - 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2", "bloom"])
@torch.no_grad()
def test_rows_are_apart_and_calls_cut_anywhere_while_positions_run_out(name):
    model, time = host(name, CONFIG, **({} if name == "bloom" else few_positions(name))), 9 * SEGMENT
    ids, mask = tokens(3, time), torch.ones(3, time, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 13:19] = 0
    together = mnemic.memory_cache(model, 3 * SEGMENT, SINKS)
    logits = feed(model, ids, [20, 1, 9, 15, 27], mask, together)
    for row in range(3):
        real = mask[row].bool()
        for lengths in (None, [1] * int(real.sum())):
            cache = mnemic.memory_cache(model, 3 * SEGMENT, SINKS)
            alone = feed(model, ids[row : row + 1, real], lengths, carried=cache)
            assert_near(logits[row, real], alone[0])
            assert_same_stream(stream(together).select([row]), stream(cache))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("keep_keys", [True, False])
@torch.no_grad()
def test_files_forks_and_batches_go_on(name, keep_keys):
    model = host(name, CONFIG, **few_positions(name))

    def begun():
        session = mnemic.Session(model, window=WINDOW, sinks=SINKS, keep_text=True, keep_keys=keep_keys)
        session.read(tokens(1, 5 * SEGMENT + 3))
        return session

    session, more = begun(), tokens(1, 6 * SEGMENT, 5)
    loaded, fork = mnemic.Session.from_bytes(session.to_bytes(), model), session.fork()
    assert loaded.sinks == fork.sinks == SINKS
    first, second = mnemic.batch([begun(), mnemic.Session(model, window=WINDOW, sinks=SINKS)]).forward(
        [more, more[:, :7]]
    )
    expected = session.forward(more).logits
    assert torch.equal(fork.forward(more).logits, expected)
    assert_near(first.logits, expected)
    assert second.logits.shape[1] == 7
    if keep_keys:
        assert torch.equal(loaded.forward(more).logits, expected)
    else:  # read again, with other keys above the first block, where these stood
        there = loaded.cache.window
        assert (there.context, there.position) == (begun().cache.window.context, begun().cache.window.position)


@torch.no_grad()
def test_a_window_read_again_holds_what_it_held():
    """In the first block, whose keys depend on their own token alone."""
    model = make("llama")
    mnemic.attach(model, CONFIG)
    session = mnemic.Session(model, window=WINDOW, keep_text=True, keep_keys=False)
    session.read(tokens(1, 5 * SEGMENT + 3))
    loaded = mnemic.Session.from_bytes(session.to_bytes(), model)
    assert not any(name.startswith("keys.") for name in from_bytes(session.to_bytes())[0])
    assert_near(loaded.cache.layers[0].keys, session.cache.layers[0].keys)


def test_who_has_how_many():
    model = host("llama", CONFIG)
    sinks = [mnemic.memory_cache(model, window).settings[-1] for window in (None, SEGMENT, SEGMENT + 2, 2 * SEGMENT)]
    assert sinks == [0, 0, 2, 4]
    assert mnemic.Session(model, window=2 * SEGMENT).sinks == 4
    for kind in ("recall-0", "several-1"):
        assert mnemic.Session(host("llama", CONFIGS[kind]), window=2 * SEGMENT).sinks == 0
    config = CONFIGS["transformer-xl-0"].replace(same_length=True)
    assert mnemic.Session(host("llama", config), window=2 * SEGMENT).sinks == 0
    assert mnemic.Session(host("bert", CONFIG)).sinks == 0


@torch.no_grad()
def test_a_file_from_before_has_none():
    model = host("llama", CONFIG)
    session = mnemic.Session(model, window=WINDOW, sinks=0)
    session.read(tokens(1, 5 * SEGMENT))
    tensors, meta = from_bytes(session.to_bytes())
    assert "sinks" not in meta
    assert mnemic.Session.from_bytes(session.to_bytes(), model).sinks == 0
    for wrong in (-1, SEGMENT + 1, True, "4"):
        with pytest.raises(StateError, match="sinks"):
            mnemic.Session.from_bytes(to_bytes(tensors, meta | {"sinks": wrong}), model)


def test_what_cannot_be_is_refused():
    model = host("llama", CONFIG)
    room = rf"beside a segment of {SEGMENT} a window of {WINDOW} has room for {SEGMENT}; use 0 to {SEGMENT}, or leave"
    for sinks in (-1, SEGMENT + 1, 2.5):
        with pytest.raises(ValueError, match=rf"sinks is {sinks}, and {room}"):
            mnemic.Session(model, window=WINDOW, sinks=sinks)
    with pytest.raises(ValueError, match=r"sinks is 4, and beside .* room for 0; use 0, or leave it out"):
        mnemic.memory_cache(model, SEGMENT, 4)
    with pytest.raises(ValueError, match=r"sinks is 4, and without a window all keys stay; use 0"):
        mnemic.memory_cache(model, sinks=4)
    with pytest.raises(ValueError, match=r"sinks is 4, and this memory says itself which keys a token sees; use 0"):
        mnemic.memory_cache(host("llama", CONFIGS["recall-0"]), WINDOW, 4)
    model = dynamic()
    mnemic.attach(model, CONFIG)
    with pytest.raises(ValueError, match=r"sinks is 4, and the model's rotary embedding is that of texts of"):
        mnemic.memory_cache(model, WINDOW, 4)
    with pytest.raises(ValueError, match=r"sinks is 4, but BertForMaskedLM is an encoder"):
        mnemic.Session(host("bert", CONFIG), sinks=4)
    model = host("llama", CONFIG)
    one, two = mnemic.Session(model, window=WINDOW), mnemic.Session(model, window=WINDOW, sinks=2)
    with pytest.raises(ValueError, match=r"session 1 keeps 2 sinks in its window, session 0 4; make a batch for each"):
        mnemic.batch([one, two])


@torch.no_grad()
def test_keys_are_moved_only_where_they_can_be():
    """What a cache holds has to be the same but for rotations, the values too."""
    for name, blocks in {"llama": {0, 1}, "gemma3": {0, 1}, "smollm3": {0, 1}, "gpt2": None, "gptj": None}.items():
        model = host(name, CONFIG)
        found = movable(examine(model), mnemic.attached(model).disabled)
        assert (None if found is None else set(found)) == blocks


@torch.no_grad()
def test_they_are_seen():
    model, ids = host("llama", CONFIG), tokens(1, 5 * SEGMENT)
    none, some = (feed(model, ids, carried=mnemic.memory_cache(model, WINDOW, sinks)) for sinks in (0, SINKS))
    assert torch.equal(none[:, :WINDOW], some[:, :WINDOW])
    assert_differ(none[:, WINDOW:], some[:, WINDOW:])


def test_a_look_inside_tells_of_them():
    session = mnemic.Session(host("llama", CONFIG), window=WINDOW, sinks=SINKS)
    session.read(tokens(1, 5 * SEGMENT))
    assert f"tokens' keys, the first {SINKS} for good" in str(mnemic.show(session))
    bare = mnemic.Session(session.model, window=WINDOW, sinks=0)
    bare.read(tokens(1, 5 * SEGMENT))
    assert "for good" not in str(mnemic.show(bare))
