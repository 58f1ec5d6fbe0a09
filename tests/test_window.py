"""The window of a `MemoryCache`: what the base sees, against the base itself; how much is held; where positions go."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import DECODERS, make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_differ,
    assert_near,
    assert_same_stream,
    every_kind,
    feed,
    host,
    other,
    stream,
    tokens,
    trained,
)
from mnemic.host.cache import Window

CONFIG = CONFIGS["emt-0"]


def window_start(segment: int, window: int) -> int:
    """The first token that segment `segment` sees: the window moves a segment at a time."""
    return max(0, (segment + 1) * SEGMENT - window)


@pytest.mark.parametrize(("window", "sinks"), [(SEGMENT, 0), (2 * SEGMENT, 3), (3 * SEGMENT, 0)])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_the_base_sees_its_window_and_nothing_else(name, window, sinks):
    # One block: its keys depend on their own token alone, so the window equals the base run on what is visible. (With
    # more blocks old keys know of tokens that left, as in every sliding window; see the next test.)
    depth = {"n_layer": 1} if name in ("gpt2", "gptj", "bloom") else {"num_hidden_layers": 1}
    layers = {"layer_types": ("sliding_attention",)} if name == "gemma3" else {}
    model, ids = make(name, **depth, **layers), tokens(2, 5 * SEGMENT)
    attachment = trained(model, CONFIG)
    with attachment.disabled():
        logits = feed(model, ids, carried=mnemic.memory_cache(model, window, sinks))
    bare = make(name, **depth, **layers)
    for segment in range(5):
        start, stop = window_start(segment, window), (segment + 1) * SEGMENT
        first = start + sinks if start else 0
        seen, more = torch.cat([torch.arange(min(sinks, first)), torch.arange(first, stop)]), {}
        if window > SEGMENT and DECODERS[name].positions != "alibi":
            # positions go on through the stream while keys of it are kept
            more = {"position_ids": seen.expand(2, -1), "attention_mask": torch.ones(2, len(seen), dtype=torch.long)}
        expected = bare(ids[:, seen], **more).logits[:, -SEGMENT:]
        assert_near(logits[:, stop - SEGMENT : stop], expected, 1e-4)
        if start:
            everything = bare(ids[:, :stop]).logits[:, -SEGMENT:]
            if DECODERS[name].sliding is None:
                assert_differ(everything, expected)


@pytest.mark.parametrize(("window", "sinks"), [(SEGMENT, 0), (2 * SEGMENT, 0), (2 * SEGMENT, 3), (3 * SEGMENT, 4)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt", "qwen3"])
@torch.no_grad()
def test_deep_windows_equal_a_banded_mask(name, window, sinks):
    time = 5 * SEGMENT
    model, ids = host(name, CONFIG), tokens(2, time)
    t = torch.arange(time)
    first = torch.tensor([window_start(segment, window) for segment in range(5)]).repeat_interleave(SEGMENT)
    begin = torch.where(first > 0, first + sinks, 0)
    band = (t[None] <= t[:, None]) & ((t[None] >= begin[:, None]) | (t[None] < sinks))
    mask = torch.zeros(1, 1, time, time).masked_fill(~band, torch.finfo(torch.float32).min)
    # a window of one segment is empty at each segment's start, where positions begin again
    positions = (t % SEGMENT if window == SEGMENT else t).expand(2, -1)
    expected = make(name)(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with mnemic.attached(model).disabled():
        for lengths in ([time], [SEGMENT] * 5, [1] * time):
            logits = feed(model, ids, lengths, carried=mnemic.memory_cache(model, window, sinks))
            assert_near(logits, expected, 1e-4)


@pytest.mark.parametrize("window", [SEGMENT, 2 * SEGMENT])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_memory_stays_constant_over_fifty_windows(name, window):
    model = host(name, CONFIG)
    session = mnemic.Session(model, window=window)
    sizes = []
    for part in tokens(1, 50 * window).split(10 * SEGMENT - 3, 1):
        session.read(part)
        session.fork().flush()
        sizes.append(session.nbytes)
        assert session.cache.window.kept <= window
    per_token = 2 * 2 * make(name).config.hidden_size * 4  # two blocks, keys and values, at most as wide as the model
    state = mnemic.attached(model).memory.init_state(1)["slots"].numel() * 4
    assert max(sizes) <= state + window * per_token + SEGMENT * 64 * 4


@pytest.mark.parametrize("name", [name for name, family in DECODERS.items() if family.positions == "learned"])
@pytest.mark.parametrize("window", [SEGMENT, 2 * SEGMENT])
@torch.no_grad()
def test_positions_never_leave_the_table(name, window):
    key = "max_position_embeddings" if name == "opt" else "n_positions"
    model = host(name, CONFIG, **{key: 20})
    seen = []
    trunk = mnemic.attached(model).anatomy.trunk
    guard = vars(trunk)["forward"]
    base = guard.forward

    def watched(**kwargs):
        seen.append(kwargs["position_ids"])
        return base(**kwargs)

    guard.inner = watched
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :5] = 0
    feed(model, tokens(2, 100), [7] * 14 + [2], mask, mnemic.memory_cache(model, window))
    assert max(int(position.max()) for position in seen) < 20
    assert min(int(position.min()) for position in seen) == 0


@torch.no_grad()
def test_without_a_window_positions_run_out_with_an_error():
    model = host("gpt2", CONFIG, n_positions=20)
    cache = mnemic.memory_cache(model)
    feed(model, tokens(1, 20), carried=cache)
    with pytest.raises(ValueError, match=r"position 20 is beyond the model's 20; .*window="):
        feed(model, tokens(1, 1), carried=cache)


# every family with one mechanism, every mechanism with one family
RAGGED = [(CONFIG, name) for name in DECODERS]
RAGGED += [(CONFIGS[f"{kind}-0"], "llama") for kind in mnemic.CONFIGS if CONFIGS[f"{kind}-0"] is not CONFIG]


@pytest.mark.parametrize(("config", "name"), RAGGED, ids=[f"{config.kind}-{name}" for config, name in RAGGED])
@pytest.mark.parametrize("window", [SEGMENT, 3 * SEGMENT])
@torch.no_grad()
def test_ragged_rows_equal_each_alone(config, name, window):
    model, time = host(name, config), 45
    ids, mask = tokens(3, time), torch.ones(3, time, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 13:19] = 0  # a pause in the middle, as when one of several users types nothing
    mask[2, 40:] = 0
    together = mnemic.memory_cache(model, window)
    logits = feed(model, ids, [20, 1, 9, 15], mask, together)
    for row in range(3):
        real, cache = mask[row].bool(), mnemic.memory_cache(model, window)
        alone = feed(model, ids[row : row + 1, real], carried=cache)
        assert_near(logits[row, real], alone[0])
        assert_same_stream(stream(together).select([row]), stream(cache))


@every_kind
@torch.no_grad()
def test_cache_operations_keep_rows_together(config):
    model, ids = host("llama", config), tokens(3, 21)
    more = tokens(3, 11, 4)

    def after(operation, rows):
        cache = mnemic.memory_cache(model, 2 * SEGMENT)
        feed(model, ids, carried=cache)
        operation(cache)
        logits = feed(model, more[rows], carried=cache)
        expected = mnemic.memory_cache(model, 2 * SEGMENT)
        feed(model, ids[rows], carried=expected)
        assert_near(logits, feed(model, more[rows], carried=expected), 2e-5)

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2])


@every_kind
@torch.no_grad()
def test_reset_and_fork_of_a_cache(config):
    model, ids = host("llama", config), tokens(2, 21)
    cache = mnemic.memory_cache(model, 2 * SEGMENT)
    first = feed(model, ids, carried=cache)
    fork = cache.fork()
    more = feed(model, ids, carried=fork)
    feed(model, other(ids), carried=cache)
    cache.reset()
    assert cache.memory.stream is None
    assert torch.equal(feed(model, ids, carried=cache), first)
    assert torch.equal(feed(model, ids, carried=cache), more)
    assert_differ(first, more)


def test_a_memory_cache_takes_nothing_back():
    cache = mnemic.memory_cache(host("llama", CONFIG), SEGMENT)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)


def test_window_is_immutable():
    window = Window.new(2 * SEGMENT, SEGMENT, None, 0, 0, 2, torch.device("cpu"))
    after = window.advance(None, SEGMENT)
    closed = after.advance(None, SEGMENT).close_segment([0])
    assert (window.context, after.context, closed.context) == ((0, 0), (8, 8), (8, 16))
    assert closed.valid[0].tolist() == [False] * 8 + [True] * 8
    assert closed.valid[1].all()
    assert closed.position == (16, 16)
