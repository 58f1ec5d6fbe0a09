"""Random streams through a small Memoria, and what its tests read off a state."""

from __future__ import annotations

import torch

from helpers import shake
from mnemic.memories.memoria import MemoriaConfig

WIDTH = 8
SMALL = MemoriaConfig(
    segment_length=4,
    working=2,
    reminded_stm=2,
    reminded_ltm=3,
    stm_capacity=4,
    depth=2,
    lifespan=4.0,
    alpha=3.0,
    heads=2,
)


def built(config=SMALL, seed=0, depth=2, causal=True):
    torch.manual_seed(seed)
    memory = config.build(WIDTH, depth, causal)
    shake(memory, seed)
    return memory.requires_grad_(False)


def steps(memory, count, rows=1, seed=0, state=None):
    """States of a random stream: each segment's hidden states and the use of what was reminded are random."""
    source = torch.Generator().manual_seed(seed)
    state = memory.init_state(rows) if state is None else state
    for _ in range(count):
        state = {**state, "use": torch.rand(state["use"].shape, generator=source) * (state["recalled"] >= 0)}
        state = memory.write(torch.randn(rows, 4, WIDTH, generator=source), state)
        yield state


def ids_of(state, row=0):
    """The ids of a row's engrams, in order of birth."""
    ids = state["id"][row]
    return ids[ids > 0].tolist()


def fired_in(state, row=0):
    """The ids that fire together when this step ends: working memory and what is reminded."""
    ids, working = ids_of(state, row), int(state["levels"][row, 2])
    recalled = [int(state["id"][row, slot]) for slot in state["recalled"][row].tolist() if slot >= 0]
    return {*ids[len(ids) - working :], *recalled}


def pairs(states):
    """Each state with the one before it."""
    before = None
    for state in states:
        if before is not None:
            yield before, state
        before = state
