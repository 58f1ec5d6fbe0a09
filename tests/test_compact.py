"""Compact: what leaves the window becomes a few keys with a mass each, as its equations say, on any family."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mnemic
from families import DECODERS, make
from helpers import SEGMENT, assert_near, assert_same_stream, feed, random_cuts, refusal, stream, tokens
from mnemic.host.sites import check
from mnemic.memories.compact import MATCHED, CompactConfig, here
from mnemic.memories.compact_presses import PRESSES, Kept, Seen
from mnemic.memory import Inside, Leaving, Site
from mnemic.state import StateError, nbytes

SERVED = [name for name in DECODERS if refusal("compact-0", name) is None]
SMALL = {"segment_length": SEGMENT, "window": 2 * SEGMENT, "keys": 12}


def compacting(name="llama", **settings):
    model = make(name)
    mnemic.attach(model, CompactConfig(**{**SMALL, **settings}))
    return model


# --- in attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_as_long_as_all_fits_it_is_the_base_with_everything_in_its_window(name, implementation):
    model, ids = make(name), tokens(2, 7 * SEGMENT)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{name} has no sdpa")
    model.set_attn_implementation(implementation)
    expected = model(ids).logits
    # a window in which sliding layers see all that they ever see
    window = (DECODERS[name].sliding or 0) + 2 * SEGMENT
    attachment = mnemic.attach(model, CompactConfig(segment_length=SEGMENT, window=window, keys=128))
    cache = mnemic.memory_cache(model, window)
    assert_near(feed(model, ids, random_cuts(7 * SEGMENT, 1), carried=cache), expected, 1e-4)
    assert cache.window.kept < 7 * SEGMENT
    with attachment.disabled():
        cut_off = feed(model, ids, carried=mnemic.memory_cache(model, window))
    assert (cut_off - expected).abs().max() > 1e-2


@pytest.mark.parametrize("by", [*MATCHED, *PRESSES])
@torch.no_grad()
def test_cuts_rows_and_padding_change_nothing(by):
    model, ids = compacting(by=by), tokens(3, 7 * SEGMENT)
    whole, cut, alone = (mnemic.memory_cache(model, 2 * SEGMENT) for _ in range(3))
    expected = feed(model, ids, carried=whole)
    assert_near(feed(model, ids, random_cuts(7 * SEGMENT, 2), carried=cut), expected)
    assert_same_stream(stream(cut), stream(whole))
    assert_near(feed(model, ids[1:2], carried=alone), expected[1:2])
    # row 0 begins three tokens later, behind padding
    mask = torch.ones(2, 7 * SEGMENT + 3, dtype=torch.long)
    mask[0, :3] = 0
    padded = torch.cat([torch.cat([ids.new_zeros(1, 3), ids[:1]], 1), torch.cat([ids[1:2], ids[1:2, :3]], 1)])
    found = feed(model, padded, [20, 39], mask, mnemic.memory_cache(model, 2 * SEGMENT))
    assert_near(found[0, 3:], expected[0])
    assert_near(found[1, :-3], expected[1])


@torch.no_grad()
def test_its_bytes_are_constant_and_files_go_on_to_the_bit(tmp_path):
    model, ids = compacting(), tokens(1, 12 * SEGMENT + 3)
    session = mnemic.Session(model)
    sizes = []
    for part in ids.split(3 * SEGMENT, 1):
        session.read(part)
        sizes.append(nbytes(session.stream.state))
    config = model.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert set(sizes) == {config.num_hidden_layers * heads * 12 * (2 * width + 2) * 4}
    assert session.stream.banks == (None,)
    session.save(tmp_path / "one.memory")
    again, more = mnemic.Session.load(tmp_path / "one.memory", model), tokens(1, 2 * SEGMENT, 5)
    assert torch.equal(again.forward(more).logits, session.forward(more).logits)


@torch.no_grad()
def test_another_stream_has_another_memory():
    model, ids, asked = compacting(), tokens(2, 6 * SEGMENT), tokens(1, SEGMENT, 3)
    found = []
    for row in ids:
        session = mnemic.Session(model)
        session.read(row[None])
        found.append(session.forward(asked).logits)
    assert (found[0] - found[1]).abs().max() > 1e-2


@torch.no_grad()
def test_queries_wait_without_positions():
    model = compacting()
    router, ids = mnemic.attached(model).router, tokens(1, SEGMENT - 1)
    cache = mnemic.memory_cache(model, 2 * SEGMENT)
    feed(model, ids, carried=cache)
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    width = router.memory.inside.queries * router.memory.inside.key_width
    assert_near(stream(cache).waiting[..., :width], attention.q_proj(hidden), 1e-5)


# --- the equations ---------------------------------------------------------------------------------------------------


def case(kept: int, **settings):
    """A memory as it stands in two blocks with 4 heads of queries and 2 of keys, queries and what leaves."""
    source = torch.Generator().manual_seed(kept)
    memory = CompactConfig(**{**SMALL, **settings}).build(32, 2)
    memory.inside = Inside(2, 4, 2, 8, 8, (0.4, 0.3))

    def turn(x, at, back=False):  # a rotation of channel pairs
        angle = (-at if back else at)[:, None].float() / torch.tensor([1.0, 3.0, 9.0, 27.0])
        one, two = x[..., :4], x[..., 4:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    def leaving(count: int, first: int) -> Leaving:
        keys, values = 1.5 * torch.randn(2, 2, 2, count, 8, generator=source)
        stays = torch.randn(2, 2, 5, 8, generator=source)
        return Leaving(keys, values, first, first + count, (turn, turn), stays)

    def queries() -> torch.Tensor:
        return torch.randn(1, SEGMENT, 2 * 4 * 8, generator=source)

    return SimpleNamespace(memory=memory, leaving=leaving, queries=queries)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"queries": 2},
        {"farthest": 20},
        {"keys": 20},
        {"reservoir": 6},
        {"reservoir": 80},
        {"by": "pursuit"},
        {"by": "pursuit", "queries": 2},
    ],
)
def test_fast_equals_naive(settings):
    made = case(1, **settings)
    state, first = made.memory.init_state(1), 0
    keep = torch.arange(SEGMENT)[None] < SEGMENT - 1
    for count, ratio in ((5, None), (8, None), (3, None), (8, None), (8, 2.5)):
        query, left = made.queries(), [replace(made.leaving(count, first), ratio=ratio)]
        _, expected = made.memory.naive(query, state, keep, left)
        after = made.memory.write(query, state, keep, left)
        for name, tensor in after.items():
            assert_near(tensor, expected[name], 1e-4)
        made.memory.check_state(after, 5)
        state, first = after, first + count
    assert not torch.equal(after["mass"], torch.ones_like(after["mass"]))


def error(made, state, left, query) -> tuple[float, float]:
    """How far what is kept is from all of it, to the queries that it was made for: their mass, and what they read."""
    wrong = torch.zeros(2)
    query_lhts = query[0].unflatten(-1, (2, 4, 8)).permute(1, 2, 0, 3)
    count = left.keys_lkns.shape[2]
    for place, turn in enumerate(left.turns):
        kept = here(state, 0, place)
        q = turn(query_lhts[place], left.begins + torch.arange(SEGMENT)) * made.memory.inside.scales[place]
        for head in range(2):
            asking = q[2 * head : 2 * head + 2].flatten(0, 1)
            every = turn(left.keys_lkns[place, head], left.first + torch.arange(count))
            few = turn(kept.keys_kns[head], left.first + count - kept.behind_kn[head])
            all_of_it, some = (asking @ every.T).exp(), (asking @ few.T).exp() * kept.mass_kn[head]
            wrong[0] += (some.sum(1) / all_of_it.sum(1)).log().square().mean()
            outputs = (
                weight @ values / weight.sum(1, keepdim=True)
                for weight, values in ((all_of_it, left.values_lknv[place, head]), (some, kept.value_knv[head]))
            )
            wrong[1] += torch.dist(*outputs).square()
    return tuple(wrong.tolist())


@pytest.mark.parametrize("kept", [40, 60])
def test_matching_keeps_mass_and_output_better_than_all_others(kept):
    found = {}
    for by in (*MATCHED, *PRESSES):
        made = case(kept, by=by)
        query, left = made.queries(), made.leaving(kept, 0)
        state = made.memory.write(query, made.memory.init_state(1), None, [left])
        found[by] = error(made, state, left, query)
    for by in MATCHED:
        mass, output = found.pop(by)
        assert mass < min(found[other][0] for other in PRESSES)
        assert output < min(found[other][1] for other in PRESSES)


def test_what_each_press_keeps():
    source = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 9, 4, generator=source)
    old = Kept(keys, values, torch.ones(1, 9), torch.arange(9, 0, -1)[None])
    share = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0]).expand(1, 3, 9)
    seen = Seen(share, torch.ones(1, 3, 1))
    found = {name: press(old, seen, 6) for name, press in PRESSES.items()}
    assert found["recent"].behind_kn.tolist() == [[9, 8, 7, 6, 2, 1]]
    assert {8, 6, 4, 2} < set(found["heavy"].behind_kn[0].tolist())
    lengths = keys[0].norm(dim=-1)
    assert found["norm"].keys_kns.norm(dim=-1).amax() == lengths.sort().values[5]
    assert torch.equal(found["random"].behind_kn, PRESSES["random"](old, seen, 6).behind_kn)
    assert found["merged"].mass_kn.sum() == 9
    assert_near((found["merged"].value_knv * found["merged"].mass_kn[..., None]).sum(1), values.sum(1), 1e-5)
    for name, kept in found.items():
        assert kept.mass_kn.shape == (1, 6)
        assert bool((kept.behind_kn.diff() <= 0).all()), name


def test_a_reservoir_is_spread_evenly_over_all_that_came():
    made, size = case(1, reservoir=6), 6
    state, came = made.memory.init_state(1), []
    for number in range(25):
        came.append(made.queries())
        state = made.memory.write(came[-1], state, None, [made.leaving(0, 0)])
        # a window made short in between draws nothing: its tokens come again
        short = made.memory.write(came[-1], state, None, [replace(made.leaving(0, 0), ratio=2.0)])
        assert torch.equal(short["when"], state["when"])
        made.memory.check_state(state, number + 1)
    when, count = state["when"][0], 25 * SEGMENT
    fraction = torch.frac(torch.arange(1, count + 1).double() * (5**0.5 - 1) / 2 + 0.5)
    assert when.tolist() == (fraction.topk(size).indices + 1).tolist()
    assert torch.equal(state["asked"], torch.cat(came, 1)[:, when - 1])
    ends = torch.cat([when.sort().values, torch.tensor([count])])
    assert int(ends.diff(prepend=torch.tensor([0])).max()) < 2.7 * count / size


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["mass"].mul_(-1), "masses are 0 or more"),
        (lambda state: state["behind"].fill_(5000), "can be 0 to 4096"),
        (lambda state: state["mass"][0, 0, 0, 2].fill_(0), "the same keys for each head"),
        (lambda state: state["behind"][0, 1, 1].fill_(0), "the same keys for each head"),
        (lambda state: state["when"][0, 1].fill_(1000), f"when goes from .* to 1000, and can be 0 to {SEGMENT}"),
        (lambda state: state["when"][0, 1].fill_(0), "an empty place before others"),
        (lambda state: state["read"].fill_(1000), f"read goes from 1000 to 1000, and can be 0 to {SEGMENT}"),
    ],
    ids=["negative", "far", "hole", "lost", "unread", "between", "many"],
)
def test_a_state_that_no_writes_make_is_refused(change, said):
    made = case(8, reservoir=4)
    state = made.memory.write(made.queries(), made.memory.init_state(1), None, [made.leaving(8, 0)])
    made.memory.check_state(state, 1)
    change(state)
    with pytest.raises(StateError, match=said):
        made.memory.check_state(state, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keys": 0}, "keys is 0; use 1 or more"),
        ({"queries": 0}, "queries is 0"),
        ({"farthest": 0}, "farthest is 0"),
        ({"reservoir": -1}, "reservoir is -1; use 0 or more tokens"),
        ({"reservoir": 4, "by": "norm"}, "reservoir is 4, but nothing here uses it"),
        ({"by": "luck"}, "by is 'luck'"),
        ({"read_layers": []}, "read_layers is empty"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        CompactConfig(**settings)


@torch.no_grad()
def test_what_needs_tokens_apart_is_refused(tmp_path):
    session = mnemic.Session(compacting())
    session.read(tokens(1, 5 * SEGMENT))
    for ask in (
        lambda: session.forget(0, 3),
        lambda: session.spill_to(tmp_path),
        lambda: session.sources().__enter__(),
    ):
        with pytest.raises(ValueError, match="keeps no"):
            ask()


def test_inside_attention_it_stands_alone():
    memory = CompactConfig(**SMALL).build(64, 2)
    memory.writes = (*memory.writes, Site(1))
    with pytest.raises(ValueError, match="writes inside attention"):
        check(memory, 2)
    recall = mnemic.RecallConfig(segment_length=SEGMENT, window=2 * SEGMENT)
    with pytest.raises(ValueError, match="stands alone"):
        mnemic.attach(make("llama"), [CompactConfig(**SMALL), recall])
