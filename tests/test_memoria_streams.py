"""Memoria's fast path and its plain loops over random streams: after every write the same memory, engram by engram.

The two share only the hash that breaks ties. Each row of the fast batch starts when it likes, writes when it likes, has
segments of its own length, and must fare as it does alone.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helpers import shake
from mnemic.memories.memoria import Memoria, MemoriaConfig
from mnemic.memories.memoria.graph import counts
from mnemic.memories.memoria.naive import Mind, minds_from_state, naive_read, naive_write, state_from_minds, write_row
from mnemic.state import State, concatenate, select

WIDTH, TIME = 6, 4


def draw(dice: random.Random) -> MemoriaConfig:
    """Small settings, in which every rule comes into play within 20 writes."""
    return MemoriaConfig(
        segment_length=TIME,
        working=dice.randint(1, 5),
        reminded_stm=dice.choice([0, 1, 2, 3, 5]),
        reminded_ltm=dice.choice([1, 2, 3, 6]),
        stm_capacity=dice.choice([1, 2, 4, 7]),
        depth=dice.randint(0, 4),
        lifespan=dice.choice([1.0, 2.0, 2.5, 3.0, 4.0, 6.0]),
        # no sum of lifespans gained and steps lost is 0 but for rounding
        alpha=1.0317 * dice.choice([0.0, 0.5, 1.0, 2.0, 4.0, 8.0]),
        heads=2,
        dim=dice.choice([None, 4]),
        read_layers=dice.choice([[0], [1], [0, 1]]),
        correlation=dice.choice(["exp", "distance"]),
        edges=dice.choice(["conditional", "lift"]),
        positive_edges=dice.random() < 0.3,
        random_ltm_seeds=dice.choice([0, 0, 1, 3]),
        ties=dice.choice(["random", "random", "oldest"]),
        seed=dice.randint(0, 2**31),
    )


def row(state: State, b: int) -> State:
    return select(state, torch.tensor([b]))


def advance(memory: Memoria, hidden: Tensor, state: State, keep: Tensor) -> tuple[State, Tensor]:
    """One segment by the fast path: read at every site, note what was used, write."""
    output = hidden
    for site in memory.reads:
        output, trace = memory.read_and_trace(site, hidden, state)
        if trace:
            state = {**state, "use": state["use"] + (trace["use"] * keep[..., None]).sum(1)}
    return memory.write(hidden, state, keep), output


def advance_mind(memory: Memoria, hidden: Tensor, mind: Mind, keep: Tensor) -> Tensor:
    """The same for one row by the loops, in place."""
    output, state = hidden, state_from_minds([mind], memory.config, WIDTH)
    places = [k for k, slot in enumerate(state["recalled"][0].tolist()) if slot >= 0]
    for site in memory.reads:
        output, trace = naive_read(memory, site.layer, hidden[None], state, keep[None])
        for i, k in zip(mind.recalled, places, strict=True):
            mind.use[i] += float(trace["use"][0, k])
    write_row(memory, mind, hidden[keep])
    return output[0]


def assert_same_memory(state: State, mind: Mind) -> None:
    """A state of one row is this memory: levels, ids and counts exactly, vectors and lifespans nearly."""
    slots, ids = len(mind.engrams), [engram.id for engram in mind.engrams]
    assert ids == sorted(ids)
    assert [engram.level for engram in mind.engrams] == sorted(engram.level for engram in mind.engrams)
    assert state["levels"][0].tolist() == [len(mind.at(level)) for level in ("long", "short", "working")]
    assert state["id"][0].tolist() == ids + [0] * (state["id"].shape[1] - slots)
    assert int(state["step"]) == mind.step
    assert not state["use"].any()
    found = counts(state)[0].long()
    assert found[:slots, :slots].tolist() == [[mind.counts.get((i, j), 0) for j in ids] for i in ids]
    assert int(found.sum()) == sum(mind.counts.values())
    vectors, lifespans = torch.stack([e.vector for e in mind.engrams]), torch.tensor([e.lifespan for e in mind.engrams])
    torch.testing.assert_close(state["engram"][0, :slots], vectors, atol=1e-5, rtol=1e-5)
    # a step may add N_rem * alpha, of which float32 keeps seven digits
    torch.testing.assert_close(state["lifespan"][0, :slots], lifespans, atol=1e-5 * max(1, max(lifespans)), rtol=0)
    for name in ("engram", "lifespan", "fired"):
        assert not state[name][0, slots:].any()


def recalled(state: State) -> list[int]:
    """The ids of what a state of one row recalls, in its order."""
    return [int(state["id"][0, slot]) for slot in state["recalled"][0].tolist() if slot >= 0]


def near_tie(mind: Mind) -> bool:
    """Two engrams of one level correlate so nearly alike with working memory that float32 may order them otherwise."""
    rounding = 1e-6 * (1 + max(float(engram.vector.square().sum()) for engram in mind.engrams))
    for level in ("short", "long"):
        scores = sorted(mind.score[engram.id] for engram in mind.at(level))
        if any(high - low < rounding for low, high in pairwise(scores)):
            return True
    return False


@torch.no_grad()
def compare(seed: int, config: MemoriaConfig, steps: int, batch: int) -> Counter[str]:
    """Runs one batch of ragged streams both ways and compares every row after every write; counts what happened."""
    dice, seen = random.Random(seed), Counter()
    torch.manual_seed(seed)
    memory = config.build(WIDTH, depth=2).to(dice.choice([torch.float32, torch.float64]))
    shake(memory, seed, scale=dice.choice([0.2, 0.5]))
    noise = dice.choice([0.1, 0.5])
    minds = [Mind(config) for _ in range(batch)]
    states = [row(memory.init_state(batch), b) for b in range(batch)]
    alone, means = states[0], torch.randn(batch, WIDTH)
    starts, paces = [dice.randint(0, 8) for _ in range(batch)], [dice.choice([0.7, 0.9, 1.0]) for _ in range(batch)]
    for step in range(steps):
        writers = [b for b in range(batch) if step >= starts[b] and dice.random() < paces[b]]
        if not writers:
            continue
        means = 0.95 * means + 0.15 * torch.randn(batch, WIDTH)
        hidden = (means[:, None] + noise * torch.randn(batch, TIME, WIDTH))[writers]
        # at least two real tokens: with one all of working memory is equal
        keep = torch.rand(len(writers), TIME) < 0.6
        keep[:, -2:] |= keep.sum(1, keepdim=True) < 2
        state, output = advance(memory, hidden, concatenate([states[b] for b in writers]), keep)
        for n, b in enumerate(writers):
            before = {engram.id for engram in minds[b].engrams}
            expected = advance_mind(memory, hidden[n], minds[b], keep[n])
            states[b] = row(state, n)
            found = [(states[b], output[n])]
            if b == 0:
                alone, output_alone = advance(memory, hidden[n : n + 1], alone, keep[n : n + 1])
                found.append((alone, output_alone[0]))
            for state_b, output_b in found:
                torch.testing.assert_close(output_b, expected, atol=1e-4, rtol=1e-4)
                assert_same_memory(state_b, minds[b])
            if any(recalled(state_b) != minds[b].recalled for state_b, _ in found):
                assert near_tie(minds[b]), (recalled(states[b]), minds[b].recalled)
                seen["near ties"] += 1
                minds[b] = minds_from_state(states[b], config)[0]
                alone = states[b] if b == 0 else alone
                continue
            long = {engram.id for engram in minds[b].at("long")}
            seen["writes"] += 1
            seen["folded"] += len(minds[b].folded)
            seen["deaths"] += len(before - set(minds[b].score) - {e.id for e in minds[b].at("working")})
            seen["long recalled"] += len(long & set(minds[b].recalled))
            seen["long left"] += len(long - set(minds[b].recalled))
            if dice.random() < 0.05:
                # what either side knows is in the state
                minds[b], states[b] = (
                    minds_from_state(states[b], config)[0],
                    state_from_minds([minds[b]], config, WIDTH),
                )
    return seen


@pytest.mark.parametrize("chunk", range(2))
def test_random_streams(chunk):
    seen = Counter()
    for seed in range(10 * chunk, 10 * chunk + 10):
        dice = random.Random(-1 - seed)
        seen += compare(seed, draw(dice), steps=dice.randint(15, 40), batch=dice.randint(1, 4))
    assert seen["long recalled"] > 100
    assert seen["long left"] > 100
    assert seen["deaths"] > 100
    assert seen["near ties"] <= 5


def test_streams_past_the_ring_of_columns():
    """Longer than the 128 steps that are kept bit by bit, so counts of older ones are folded into sums."""
    seed = 0
    config = draw(random.Random(1000 + seed)).replace(
        working=1, lifespan=60.0, alpha=8.0, stm_capacity=3, reminded_stm=2, reminded_ltm=4
    )
    seen = compare(1000 + seed, config, steps=200, batch=2)
    assert seen["folded"] > 100
    assert seen["deaths"] > 10
    assert seen["long recalled"] > 100


def whole_numbers(memory: Memoria) -> None:
    """Makes the abstractor pass on the mean of its segment unchanged, in whole numbers exactly."""
    abstractor = memory.abstractor
    abstractor.norm = torch.nn.Identity()
    for parameter in abstractor.parameters():
        parameter.zero_()
    for linear, bias in ((abstractor.value, 0), (abstractor.expand, 100), (abstractor.contract, -100)):
        linear.weight.copy_(torch.eye(WIDTH))
        linear.bias.fill_(bias)  # where GELU is the identity


@torch.no_grad()
@pytest.mark.parametrize("seed", range(20))
def test_equal_engrams(seed):
    """Engrams on a small grid, most of them equal: every choice is a tie, and the oldest of the best is taken."""
    dice = random.Random(seed)
    config = draw(dice).replace(feed_forward=WIDTH)
    torch.manual_seed(seed)
    memory = config.build(WIDTH, depth=2)
    shake(memory, seed)
    whole_numbers(memory)
    mind, state, keep = Mind(config), memory.init_state(1), torch.ones(1, 1, dtype=torch.bool)
    for _ in range(25):
        hidden = torch.zeros(1, 1, WIDTH)
        hidden[..., :2] = torch.randint(-1, 2, (2,))
        state, _ = advance(memory, hidden, state, keep)
        advance_mind(memory, hidden[0], mind, keep[0])
        assert_same_memory(state, mind)
        assert recalled(state) == mind.recalled
        assert torch.equal(mind.at("working")[0].vector, hidden[0, 0])


@pytest.mark.parametrize("grad_segments", [0, 1, 3])
def test_gradients(grad_segments):
    """Through working memory, and through the engrams of as many segments before it as were asked for."""
    config = MemoriaConfig(
        segment_length=TIME, working=2, reminded_stm=3, reminded_ltm=3, stm_capacity=3, depth=2, lifespan=5.0, heads=2
    ).replace(grad_segments=grad_segments)
    memory = config.build(WIDTH, depth=1).double()
    shake(memory, scale=0.5)
    hidden = torch.randn(7, 2, TIME, WIDTH, dtype=torch.double, requires_grad=True)
    keep = torch.rand(7, 2, TIME) < 0.7
    keep[:, :, 0] = True
    weights = torch.randn(2, TIME, WIDTH, dtype=torch.double)
    gradients, reached = [], []
    for naive in (False, True):
        state, losses, engrams = memory.init_state(2), [], []
        for segment, kept in zip(hidden, keep, strict=True):
            if naive:
                output, trace = naive_read(memory, 0, segment, state, kept)
                state = naive_write(memory, segment, {**state, "use": state["use"] + trace["use"]}, kept)
            else:
                state, output = advance(memory, segment, state, kept)
            losses.append((output * weights).sum())
            engrams.append(state["engram"])
        assert int(state["levels"][:, 0].min()) > 0
        wanted = [hidden, *memory.parameters()]
        gradients.append(torch.autograd.grad(losses[-1], wanted, allow_unused=True, retain_graph=True))
        through = torch.autograd.grad(losses[-1], engrams[:-1], allow_unused=True)
        reached.append([gradient is not None and bool(gradient.any()) for gradient in through])
    for fast, slow in zip(*gradients, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    # the last segment reads what the one before it wrote, and what `grad_segments` more did
    assert reached[0] == reached[1] == [n >= 5 - grad_segments for n in range(6)]
    # hidden states are constants to what is made of them, unless a gradient was asked for
    through = [grad_segments > 0 and n >= 5 - grad_segments for n in range(6)]
    assert [bool(segment.any()) for segment in gradients[0][0]] == [*through, True]
