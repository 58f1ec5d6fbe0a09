"""Memoria takes the same step as its authors' package, memoria-pytorch 1.1.0, where that keeps to the paper."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from mnemic.memories.memoria import MemoriaConfig, engrams
from mnemic.memories.memoria.graph import COLUMNS, counts
from mnemic.memories.memoria.remind import advance, remind
from published_memoria import (
    LONG,
    SHORT,
    Row,
    package_of,
    state_of,
)


def walk(row: Row, depth: int) -> tuple[set[int], bool] | None:
    """The long-term engrams to be found from all of short-term memory, and whether a path ended for want of any.

    None if somewhere the highest count is not the only one of its size.
    """
    table, (long, short, _) = row.counts.tolist(), row.levels
    found: set[int] = set()
    ends, ended = set(range(long, long + short)), False
    for _ in range(depth + 1):
        left, new = [j for j in range(long) if j not in found], set()
        for i in ends:
            if not left:
                ended = True
                continue
            highest = max(table[i][j] for j in left)
            best = [j for j in left if table[i][j] == highest]
            if len(best) > 1:
                return None
            new |= set(best)
        found, ends = found | new, new
    return found, ended


def draw_table(dice: random.Random, slots: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random table of what fired when: its counts, and what we keep: bits of the last steps and sums of before."""
    rate = torch.rand(slots, 1) * 0.8 + 0.1
    ring = (torch.rand(slots, COLUMNS) < rate).long()
    now = (step - 1) % COLUMNS
    if now % 8:  # of the byte that the running step is in, only bits before it are written
        ring[:, now : now // 8 * 8 + 8] = 0
    old, known = (torch.rand(slots, 200) < rate).long(), dice.randint(0, slots)
    old[known:] = 0
    fired = (ring.view(slots, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    return (ring @ ring.T + old @ old.T).int(), fired, (old[:known] @ old[:known].T).int()


def draw(dice: random.Random) -> tuple[Row, MemoriaConfig, int]:
    """A memory in which departures 1 to 6 do nothing, and no arg max is tied."""
    while True:
        levels = dice.randint(1, 14), dice.randint(0, 6), dice.randint(1, 4)
        slots, width, step = sum(levels), dice.randint(3, 8), dice.randint(150, 500)
        long, short, working = levels
        depth = dice.randint(0, 4)
        table, fired, elders = draw_table(dice, slots, step)
        config = MemoriaConfig(
            working=working,
            reminded_stm=short + dice.randint(0, 2),  # 1: all of it
            reminded_ltm=dice.randint(1, 8),
            stm_capacity=dice.randint(1, short + working + 2),
            depth=depth,
            correlation="distance",
            seed=dice.randint(0, 99),
            alpha=dice.choice([0.3, 1.1, 4.3]),
        )
        lifespan = torch.rand(slots) * 3
        if short + working > config.stm_capacity:
            lifespan[long:] += 1  # 6: no death where short-term memory overflows
        row = Row(torch.randn(slots, width), levels, table, lifespan, fired, elders)
        walked = walk(row, depth)
        if walked is not None:
            found, ended = walked
            # 3, 4: a path that ended leaves a null engram, which must have room
            return row, config.replace(reminded_ltm=len(found) + 1) if ended else config, step


@pytest.mark.parametrize("chunk", range(4))
def test_the_same_step_where_departures_do_nothing(chunk, monkeypatch):
    """Reminded, counted, forgotten and promoted alike: one row, all short-term memory reminded, arg maxes unique."""
    # the package's random numbers are float16, some of them 0: then it takes slot 0, however unique the arg max
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    seen = Counter()
    for seed in range(60 * chunk, 60 * chunk + 60):
        torch.manual_seed(seed)
        dice = random.Random(seed)
        row, config, step = draw(dice)
        long, short, working = row.levels
        package = package_of([row], config)
        assert torch.equal(package.engrams.induce_counts[0], row.counts)
        state = state_of([row], config, step)
        assert torch.equal(counts(state)[0], row.counts)

        indices = package.remind()[1]
        state = remind(state, config)
        reminded = [slot for slot in state["recalled"][0].tolist() if slot >= 0]
        assert len(reminded) == len(set(reminded))
        assert set(reminded) == set(indices[0].tolist()) - {-1}
        walked = walk(row, config.depth)
        assert walked is not None
        found = walked[0]
        assert len(reminded) == short + min(config.reminded_ltm, len(found))

        # both fire: the package as it reminds, we when the step is finished
        use = torch.rand(state["use"].shape) * (state["recalled"] >= 0)
        finished = engrams.finish({**state, "use": use}, config.alpha, config.stm_capacity)
        assert torch.equal(counts(finished)[0], package.engrams.induce_counts[0])
        assert not torch.equal(counts(finished)[0], row.counts)

        gain = (use / use.sum() * len(reminded) * config.alpha)[0].tolist()
        gains = dict(zip(state["recalled"][0].tolist(), gain, strict=True)) | {-1: 0.0}
        increments = torch.tensor([[gains[i] for i in indices[0].tolist()]])
        package.adjust_lifespan_and_memories(indices, increments)
        new = torch.randn(1, working, row.vectors.shape[1])
        after = advance({**state, "use": use}, new, config)
        alive = package.engrams.data.shape[1]
        types = package.engrams.engrams_types[0].tolist()
        assert after["levels"][0].tolist() == [types.count(LONG), types.count(SHORT), working]
        assert torch.equal(after["engram"][0, :alive], package.engrams.data[0])
        assert torch.equal(after["engram"][0, alive : alive + working], new[0])
        assert torch.equal(counts(after)[0, :alive, :alive], package.engrams.induce_counts[0])
        torch.testing.assert_close(after["lifespan"][0, :alive], package.engrams.lifespan[0], atol=1e-5, rtol=1e-5)

        seen["cases"] += 1
        seen["died"] += alive < row.slots
        seen["promoted"] += types.count(LONG) > long
        seen["not all of the found reminded"] += len(found) > config.reminded_ltm
        seen["not all found"] += len(found) < long
        seen["deep"] += config.depth > 1 and len(found) > short
        seen["folded"] += len(row.elders) > 0
        seen["folds now"] += (step - 1) % 8 == 0
    for what, number in seen.items():
        assert number >= 5, (what, seen)
