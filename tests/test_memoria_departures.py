"""The 17 places where the published code departs from Memoria's paper, each with what we do instead.

Some are in the published experiments, which are not in the package; there only our side is tested, and the docstring
says so. The other tests assert our side before they need the package, so they can fail without it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_near, feed, host, shake, tokens, trained
from helpers import stream as stream_of
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.memoria import Memoria, MemoriaConfig, engrams
from mnemic.memories.memoria.graph import counts
from mnemic.memories.memoria.remind import advance, correlate, remind
from mnemic.memory import Site
from mnemic.state import State, concatenate, select
from mnemic.stream import Stream
from published_memoria import (
    LONG,
    SHORT,
    Row,
    long_of,
    ours,
    package_of,
    published,
    row,
    settings,
    state_of,
    theirs,
)


def test_departure_1_searches_start_at_random():
    """Engrams of short-term memory that are not reminded start a search too, each at a random long-term engram."""
    # of two short-term engrams the one in slot 8 is reminded; it fired with slot 3
    case, config = [row([0.0] * 8, [1.0, 5.0], [1.0], {(8, 3): 5})], settings(reminded_stm=1, reminded_ltm=8)
    assert [ours(case, config, step) for step in range(200, 230)] == [[{3, 8}]] * 30
    seeded = config.replace(random_ltm_seeds=1)
    starts = [long_of(case[0], ours(case, seeded, step)[0]) for step in range(200, 230)]
    assert starts == [long_of(case[0], ours(case, seeded, step)[0]) for step in range(200, 230)]
    assert all(3 in found and len(found) <= 2 for found in starts)
    assert len(set.union(*starts)) >= 5
    found = []
    for seed in range(30):
        torch.manual_seed(seed)
        found.append(theirs(case, config)[0])
    assert all({3, 8} <= slots and len(slots) <= 3 for slots in found)
    assert len(set.union(*found)) >= 6


def test_departure_2_nothing_found_without_long_term_memory():
    """With no long-term memory the package reminds the oldest short-term engram as if it were a long-term one."""
    case, config = [row([], [9.0, 5.0, 1.0], [1.0])], settings(reminded_stm=1, reminded_ltm=2, depth=2)
    assert ours(case, config) == [{2}]
    assert ours(case, config.replace(random_ltm_seeds=2)) == [{2}]
    assert theirs(case, config) == [{0, 2}]


def test_departure_3_null_engrams_take_part():
    """A row that has fewer engrams than its batch mate has null ones, zero vectors, and is reminded of those."""
    # nothing is nearer to working memory at 1 than a zero vector, but for the batch mate's own
    small, large = row([0.0], [4.0], [1.0], {(1, 0): 1}), row([0.0], [4.0, 1.0], [1.0], {(2, 0): 1})
    config = settings(reminded_stm=1, reminded_ltm=3)
    assert ours([small], config) == [{0, 1}]
    assert ours([small, large], config) == ours([small], config) + ours([large], config) == [{0, 1}, {0, 2}]
    assert theirs([small], config) == [{0, 1}]
    alone, beside = theirs([small], config)[0], theirs([small, large], config)[0]
    assert 1 in alone
    assert 1 not in beside


def test_departure_4_dead_chains_stop():
    """A path that does not exist goes on from the last long-term engram, which nobody else can then reach."""
    # both short-term engrams of the first row fired with slot 0, and that with slot 2, the last long-term one; in the
    # second row they start two paths, so the first has a path too many
    narrow = row([0.0] * 3, [1.0, 2.0], [1.0], {(3, 0): 3, (4, 0): 3, (0, 2): 5, (0, 1): 1, (1, 1): 9})
    wide = row([0.0] * 3, [1.0, 2.0], [1.0], {(3, 0): 3, (4, 1): 3, (0, 2): 5})
    config = settings(reminded_stm=2, reminded_ltm=4, depth=1)
    assert [ours([narrow, wide], config, step)[0] for step in range(200, 220)] == [{0, 2, 3, 4}] * 20
    assert ours([narrow], config) == [{0, 2, 3, 4}]
    assert theirs([narrow], config) == [{0, 2, 3, 4}]
    assert theirs([narrow, wide], config)[0] == {0, 1, 3, 4}


def test_departure_5_the_right_engrams_are_reminded():
    """Places within long-term memory are taken for slots; they differ where short-term memory is unevenly full."""
    small = row([0.0, 0.0], [1.0], [1.0], {(2, 1): 5})
    large = row([0.0, 0.0], [1.0, 1.5], [1.0], {(2, 1): 5, (3, 1): 5})
    config = settings(reminded_stm=2, reminded_ltm=4)
    assert ours([small, large], config) == [{1, 2}, {1, 2, 3}]
    assert theirs([small], config) == [{1, 2}]
    assert theirs([small, large], config) == [{0, 2}, {1, 2, 3}]


def test_departure_6_the_dead_make_room():
    """Short-term memory that holds two, of which one dies as working memory joins it: the other is promoted early."""
    case = row([], [1.0, 2.0], [3.0], lifespan=[9.0, 1.0, 9.0])
    full = row([], [1.0, 2.0], [3.0], lifespan=[9.0, 9.0, 9.0])
    config = settings(reminded_stm=1, reminded_ltm=1, stm_capacity=2)
    after = advance(state_of([case, full, case], config), torch.ones(3, 1, 2), config)
    assert after["levels"].tolist() == [[0, 2, 1], [1, 2, 1], [0, 2, 1]]
    assert after["engram"][0, :3, 0].tolist() == [1.0, 3.0, 1.0]
    types = {}
    for name, given in (("dies", case), ("full", full)):
        memory = package_of([given], config)
        memory.adjust_lifespan_and_memories(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0))
        types[name] = memory.engrams.engrams_types[0].tolist()
    assert types == {"dies": [LONG, SHORT], "full": [LONG, SHORT, SHORT]}


def test_departure_7_mean_of_exponentials():
    """An engram equal to one of working memory is the nearest by the paper, that in the middle by the package.

    Distances of 768 numbers are such that their exponentials are 0 in float32; their logarithms keep the order.
    """
    case, config = [row([0.0], [3.0, 0.0], [-3.0, 3.0])], settings(working=2, reminded_stm=1, reminded_ltm=1)
    assert ours(case, config.replace(correlation="exp")) == [{0, 1}]
    assert ours(case, config) == [{0, 2}]
    stored, working = torch.randn(1, 50, 768), torch.randn(1, 8, 768)
    squares = (stored.double()[:, :, None] - working.double()[:, None]).square().sum(-1)
    exact = squares.neg().logsumexp(-1) - torch.tensor(8.0).log()
    assert not squares.float().neg().exp().any()
    found = correlate(stored, working, "exp")
    assert found.dtype == torch.float32
    assert_near(found.double(), exact, 1e-2)
    assert torch.equal(found.argsort(1), exact.argsort(1))
    # nor by size, which the centroid's rule prefers
    assert not torch.equal(found.argsort(1), squares.mean(-1).neg().argsort(1))
    assert theirs(case, config) == [{0, 2}]


def test_departure_8_ties_have_a_generator_of_their_own():
    """The package's first picks among equals hang on the global generator, its others fall on the oldest."""
    case = [row([0.0] * 6, [1.0], [1.0], {(6, j): 1 for j in range(6)})]
    first, second = settings(reminded_stm=1, reminded_ltm=6), settings(reminded_stm=1, reminded_ltm=6, depth=1)
    # slot 6 fired once with each long-term engram; in the other case with slot 5, and that once with every other
    chain = [row([0.0] * 6, [1.0], [1.0], {(6, 5): 2, **{(5, j): 1 for j in range(5)}})]

    def picked(config: MemoriaConfig, rows: list[Row], step: int = 200) -> list[int]:
        return sorted(ours(rows, config, step)[0] - {6})

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    picks = [picked(first, case, step) for step in range(200, 240)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert picks == [picked(first, case, step) for step in range(200, 240)]
    assert all(len(pick) == 1 for pick in picks)
    assert len({pick[0] for pick in picks}) >= 4
    assert picks != [picked(first.replace(seed=1), case, step) for step in range(200, 240)]
    assert ours(chain + case, first)[1] == ours(case, first)[0]
    followed = {tuple(picked(second, chain, step)) for step in range(200, 240)}
    assert all(pick[1] == 5 and len(pick) == 2 for pick in followed)
    assert len(followed) >= 4
    assert picked(first.replace(ties="oldest"), case) == [0]
    assert picked(second.replace(ties="oldest"), chain) == [0, 5]
    found: dict[str, set[int]] = {"first": set(), "second": set()}
    for seed in range(40):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found["first"] |= theirs(case, first)[0] - {6}
        assert not torch.equal(torch.random.get_rng_state(), before)
        found["second"] |= theirs(chain, second)[0] - {5, 6}
    assert len(found["first"]) >= 4
    assert found["second"] == {0}


def test_departure_9_edges_of_count_zero():
    """By the letter an arg max over all long-term memory follows edges that never were; not with `positive_edges`."""
    case, config = [row([0.0] * 3, [1.0], [1.0], {(3, 1): 2})], settings(reminded_stm=1, reminded_ltm=3, depth=1)
    found = [ours(case, config, step)[0] for step in range(200, 220)]
    assert all(len(slots) == 3 and {1, 3} < slots for slots in found)
    assert ours(case, config.replace(ties="oldest")) == [{0, 1, 3}]
    alone = config.replace(positive_edges=True)
    assert [ours(case, alone, step) for step in range(200, 220)] == [[{1, 3}]] * 20
    assert ours([row([0.0] * 3, [1.0], [1.0])], alone) == [{3}]
    assert theirs(case, config) == [{0, 1, 3}]


def used(state: State, uses: list[list[float]]) -> State:
    """A state that recalled its first engrams, row by row, and gave them this attention."""
    recalled, use = state["recalled"].clone(), state["use"].clone()
    for b, given in enumerate(uses):
        recalled[b, : len(given)], use[b, : len(given)] = torch.arange(len(given)), torch.tensor(given)
    return {**state, "recalled": recalled, "use": use}


def test_departure_10_increments_by_the_row_s_own_number_reminded():
    """Published experiments multiply by the batch's padded width; our side only."""
    many, few = row([0.0] * 5, [1.0], [1.0]), row([0.0, 0.0], [1.0], [1.0])
    config = settings(reminded_stm=3, reminded_ltm=5, alpha=2.0)
    uses = [[1.0, 1.0, 1.0, 1.0, 6.0], [1.0, 3.0]]
    after = engrams.finish(used(state_of([many, few], config), uses), config.alpha, 400)
    # 9 at first, 1 less with every step, and of alpha = 2 for each of five (two) reminded a share
    assert_near(after["lifespan"][0], torch.tensor([9.0, 9.0, 9.0, 9.0, 14.0, 8.0, 8.0]), 1e-5)
    assert_near(after["lifespan"][1], torch.tensor([9.0, 11.0, 8.0, 8.0, 0.0, 0.0, 0.0]), 1e-5)
    alone = engrams.finish(used(state_of([few], config), uses[1:]), config.alpha, 400)
    assert torch.equal(alone["lifespan"][0], after["lifespan"][1, :4])


def test_departure_11_shares_of_attention():
    """Published experiments divide by no sum, and count what padding attends to and dropout leaves; our side only."""
    config = settings(reminded_stm=2, reminded_ltm=2, alpha=2.0, heads=2, working=2)
    memory = config.build(8, depth=1)
    shake(memory, scale=0.5)
    assert not [module for module in memory.modules() if "dropout" in type(module).__name__.lower()]
    stream = Stream.new(memory, 1, torch.zeros(1, 0, 8))
    for _ in range(3):
        stream = stream.append(torch.randn(1, 4, 8), None).commit(memory, [0])
    hidden, keep = torch.randn(1, 6, 8), torch.tensor([[False, True, True, False, True, False]])
    lifespans = []
    for padding in (0.0, 5.0):
        given = torch.where(keep[..., None], hidden, padding + torch.randn(1, 6, 8))
        _, traces = memory.read_and_trace(Site(0), given, stream.state)
        left = stream.leave(traces, keep)
        lifespans.append(engrams.finish(left.state, config.alpha, 400)["lifespan"])
    _, traces = memory.read_and_trace(Site(0), hidden[keep][None], stream.state)
    bare = stream.leave(traces, None)
    assert_near(left.state["use"], bare.state["use"], 1e-5)
    # each real token pays one unit of attention in all, an average over heads
    assert_near(bare.state["use"].sum(1), torch.tensor([3.0]), 1e-5)
    lifespans.append(engrams.finish(bare.state, config.alpha, 400)["lifespan"])
    # it is shares that count, so ten times the attention is no more
    many = {**bare.state, "use": 10 * bare.state["use"]}
    lifespans.append(engrams.finish(many, config.alpha, 400)["lifespan"])
    for lifespan in lifespans[1:]:
        assert_near(lifespan, lifespans[0], 1e-5)
    reminded = int((stream.state["recalled"] >= 0).sum())
    assert reminded == 2
    gained = lifespans[0] + 1 - stream.state["lifespan"]
    gained = gained[stream.state["id"] > 0]
    assert_near(gained.sum(), torch.tensor(reminded * config.alpha), 1e-4)
    assert (gained > 1e-3).sum() == reminded
    assert gained.max() - gained[gained > 1e-3].min() > 1e-3
    # and the abstractor sees no padding
    full = memory.write(hidden, stream.state, keep)
    cut = memory.write(hidden[keep][None], stream.state)
    assert_near(full["engram"], cut["engram"], 1e-5)


@torch.no_grad()
def test_departure_12_the_feed_forward_has_an_activation():
    """Two linear maps in a row are one: where attention is even, the package's engrams are affine in the tokens."""

    def bend(abstract: Any) -> Tensor:
        """How far `abstract` is from affine."""
        torch.manual_seed(3)
        one, two = torch.randn(2, 1, 5, 16)
        return (abstract(one + two) - abstract(one) - abstract(two) + abstract(torch.zeros(1, 5, 16))).abs().max()

    abstractor = settings(working=3, heads=2).build(16, depth=1).abstractor
    shake(abstractor, scale=0.3)
    abstractor.key.weight.zero_()
    abstractor.norm = torch.nn.Identity()
    assert bend(lambda hidden: abstractor(hidden, None)) > 0.1
    peer = published().Abstractor(3, 16, 64)
    shake(peer, scale=0.3)
    peer.key_transform.weight.zero_()
    assert peer(torch.randn(1, 5, 16)).abs().max() > 0.1
    assert bend(peer) < 1e-3


def test_departure_13_stored_engrams_are_constants():
    """No gradient reaches the abstractor through what is stored; we keep that, say so, and have `grad_segments`."""
    config = settings(working=2, heads=2, reminded_stm=2, reminded_ltm=2)
    reached = {}
    for grad_segments in (0, 1):
        memory = config.replace(grad_segments=grad_segments).build(8, depth=1)
        hidden, state = torch.randn(3, 1, 4, 8, requires_grad=True), memory.init_state(1)
        for segment in hidden:
            state = memory.write(segment, state)
        assert state["levels"].tolist() == [[0, 4, 2]]
        reached[grad_segments] = []
        for age in range(3):
            engram = state["engram"][:, 2 * age : 2 * age + 2].square().sum()
            (gradient,) = torch.autograd.grad(engram, memory.abstractor.query, retain_graph=True, allow_unused=True)
            reached[grad_segments].append(gradient is not None and bool(gradient.any()))
    assert reached == {0: [False, False, True], 1: [False, True, True]}
    memory = published().Memoria(2, 4, 1, 9, 2)
    for _ in range(2):
        memory.add_working_memory(torch.randn(1, 2, 8, requires_grad=True))
        assert not memory.remind()[0].requires_grad
        memory.adjust_lifespan_and_memories(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0))
    assert not memory.engrams.data.requires_grad


@torch.no_grad()
def test_departure_14_a_step_is_a_segment():
    """Published experiments make a step of every forward, so of each token in `generate`; here of every segment.

    In the package it is `remind` that counts: asking twice fires twice.
    """
    model, ids = host("gpt2", CONFIGS["memoria-0"]), tokens(2, 11)
    cache = DynamicCache(config=model.config)
    model.generate(ids, **{CACHE: cache}, max_new_tokens=15, min_new_tokens=15, do_sample=False)
    stream = stream_of(cache)
    # the last token is said, but not read
    assert stream.seen == (25, 25)
    assert stream.written == (25 // SEGMENT,) * 2
    assert stream.state["step"].tolist() == [3, 3]
    for lengths in ([25], [1] * 25, [7, 9, 9]):
        again = DynamicCache(config=model.config)
        feed(model, tokens(2, 25), lengths, carried=again)
        assert stream_of(again).state["step"].tolist() == [3, 3]
        fired = counts(stream_of(again).state).diagonal(dim1=1, dim2=2)
        # engrams of the first segment fired with the second as it began, at most twice since
        assert int(fired.max()) <= 2
    case, config = [row([0.0], [1.0], [1.0], {(1, 0): 1})], settings(reminded_stm=1, reminded_ltm=1)
    state = state_of(case, config)
    once = remind(state, config)
    twice = remind(once, config)
    assert torch.equal(counts(twice), counts(state))
    assert torch.equal(twice["step"], state["step"])
    memory = package_of(case, config)
    memory.remind()
    memory.remind()
    assert (memory.engrams.induce_counts[0] - case[0].counts).tolist() == [[2] * 3] * 3


def test_departure_15_gradient_checkpointing():
    """Published models pass the wrong arguments when recomputing; our side only: the same gradients either way."""
    gradients, ids = [], tokens(2, 3 * SEGMENT)
    for checkpointing in (False, True):
        model = make("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        attachment, ran = trained(model, CONFIGS["memoria-0"]), Counter()
        model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.update(["forward"]))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        cache = mnemic.memory_cache(model, SEGMENT)
        loss = sum(model(part, labels=part, **{CACHE: cache}).loss for part in ids.split(SEGMENT, 1))
        loss.backward()
        gradients.append([parameter.grad for parameter in attachment.parameters()])
        assert ran["forward"] == (6 if checkpointing else 3)
        assert stream_of(cache).state["step"].tolist() == [3, 3]
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        assert_near(again, plain, 1e-5, size=float(plain.abs().max()))


@torch.no_grad()
def test_departure_16_reset_per_sequence():
    """Published experiments reset all rows every so many steps, in training only; our side only: a row when it ends."""
    memory = MemoriaConfig.tiny()[0].build(8, depth=1)
    shake(memory, scale=0.5)
    hidden = torch.randn(9, 2, 8, 8)
    stream = Stream.new(memory, 2, hidden)
    for segment in hidden[:6]:
        stream = stream.append(segment, None).commit(memory, [0, 1])
    stream = stream.append(hidden[0, :, :3], None)
    reset = stream.reset(memory, [0])
    assert (reset.counts, reset.written, reset.seen) == ((0, 3), (0, 6), (0, 51))
    assert not any(tensor[0].any() for name, tensor in reset.state.items() if name != "recalled")
    assert reset.state["recalled"][0].eq(-1).all()
    assert not reset.waiting[0].any()
    assert all(torch.equal(tensor[1], stream.state[name][1]) for name, tensor in reset.state.items())
    # and goes on like a stream that never was anything else
    fresh = Stream.new(memory, 1, hidden)
    for segment in hidden[6:]:
        reset = reset.append(segment, torch.tensor([[True], [False]]).expand(2, 8)).commit(memory, [0])
        fresh = fresh.append(segment[:1], None).commit(memory, [0])
    for name, tensor in fresh.state.items():
        found = reset.state[name][:1][tuple(slice(size) for size in (1, *tensor.shape[1:]))]
        assert_near(found, tensor, 1e-5)


def grown(memory: Memoria, hidden: Tensor, state: State) -> State:
    """The state after some segments `[s, b, t, d]`."""
    for segment in hidden:
        output, traces = memory.read_and_trace(Site(0), segment, state)
        assert output.shape == segment.shape
        if traces:
            state = {**state, "use": state["use"] + traces["use"].sum(1)}
        state = memory.write(segment, state)
    return state


@torch.no_grad()
def test_departure_17_a_module_over_explicit_state():
    """No module, a fixed batch size, float32 out whatever came in, arguments overwritten, an error when empty."""
    memory = MemoriaConfig.tiny()[0].build(8, depth=1)
    shake(memory, scale=0.5)
    assert isinstance(memory, torch.nn.Module)
    again = MemoriaConfig.tiny()[0].build(8, depth=1)
    again.load_state_dict(memory.state_dict())
    hidden = torch.randn(8, 3, 8, 8)
    # an empty memory adds nothing, alone and beside one that is not
    empty = memory.init_state(3)
    assert torch.equal(memory.read(Site(0), hidden[0], empty), hidden[0])
    state = grown(memory, hidden[:5], empty)
    beside = concatenate([memory.init_state(1), select(state, torch.tensor([1]))])
    output = memory.read(Site(0), hidden[5, :2], beside)
    assert torch.equal(output[0], hidden[5, 0])
    assert_near(output[1], memory.read(Site(0), hidden[5], state)[1], 1e-5)
    assert not torch.equal(memory.read(Site(0), hidden[5], state), hidden[5])
    assert torch.equal(again.read(Site(0), hidden[5], state), memory.read(Site(0), hidden[5], state))
    # the batch may change between calls
    chosen = torch.tensor([2, 0])
    some = grown(memory, hidden[5:, chosen], select(state, chosen))
    apart = [grown(memory, hidden[5:, [b]], select(state, torch.tensor([b]))) for b in (2, 0)]
    joined = concatenate([*apart, memory.init_state(1)])
    for name, tensor in concatenate([some, memory.init_state(1)]).items():
        assert_near(joined[name], tensor, 1e-5)
    mixed = grown(memory, torch.cat([hidden[:2, chosen], hidden[:2, 1:2]], 1), joined)
    assert_near(mixed["levels"][2], grown(memory, hidden[:2, 1:2], memory.init_state(1))["levels"][0])
    # what came in bfloat16 goes out so; the memory stays in float32
    half, wide = hidden[5].bfloat16(), {name: tensor.clone() for name, tensor in state.items()}
    assert memory.read(Site(0), half, state).dtype == torch.bfloat16
    assert memory.write(half, state)["engram"].dtype == torch.float32
    narrow = MemoriaConfig.tiny()[0].build(8, depth=1).bfloat16()
    narrow.load_state_dict(memory.state_dict())
    output = narrow.read(Site(0), half, state)
    assert output.dtype == torch.bfloat16
    wanted = memory.read(Site(0), half.float(), state)
    assert (output.float() - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    assert narrow.write(half, state)["engram"].dtype == torch.float32
    # and nothing that was passed was changed
    assert all(torch.equal(tensor, wide[name]) for name, tensor in state.items())
    assert torch.equal(half, hidden[5].bfloat16())

    def new() -> Any:
        return published().Memoria(2, 4, 1, 9, 2)

    peer = new()
    assert not isinstance(peer, torch.nn.Module)
    assert not hasattr(peer, "state_dict")
    with pytest.raises((RuntimeError, IndexError)):
        peer.remind()
    peer.add_working_memory(torch.randn(2, 2, 8, dtype=torch.bfloat16))
    peer.remind()
    indices = torch.tensor([[0, -5], [1, -5]])
    peer.adjust_lifespan_and_memories(indices, torch.ones(2, 2))
    assert indices.tolist() == [[0, -1], [1, -1]]
    peer.add_working_memory(torch.randn(2, 2, 8, dtype=torch.bfloat16))
    assert peer.remind()[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"[Ss]ize"):
        peer.add_working_memory(torch.randn(1, 2, 8))
