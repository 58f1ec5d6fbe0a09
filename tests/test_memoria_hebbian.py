"""The six Hebbian attributes of Memoria's counts (paper, appendix A), over random streams."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_streams import SMALL, WIDTH, built, fired_in, ids_of, pairs, steps
from mnemic.memories.memoria.graph import counts

RULES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "correlation": st.sampled_from(["exp", "distance"]),
        "edges": st.sampled_from(["conditional", "lift"]),
        "ties": st.sampled_from(["random", "oldest"]),
        "positive_edges": st.booleans(),
        "random_ltm_seeds": st.integers(0, 2),
        "working": st.integers(1, 3),
        "stm_capacity": st.integers(1, 5),
        "depth": st.integers(0, 3),
        "alpha": st.sampled_from([2.0, 4.0]),
    }
)


@dataclasses.dataclass
class Event:
    """One step among the engrams that live through it: counts before and after, and which of them fired."""

    before: np.ndarray
    after: np.ndarray
    fired: np.ndarray

    @staticmethod
    def edges(table: np.ndarray) -> np.ndarray:
        """E_ij = Count_ij / Count_ii, 0 for what never fired."""
        return table / np.maximum(1, table.diagonal())[:, None]

    @property
    def change(self) -> np.ndarray:
        """By how much each edge changed."""
        return self.edges(self.after) - self.edges(self.before)


def events(rules, count=24):
    memory = built(SMALL.replace(**rules))
    for before, after in pairs(steps(memory, count, seed=rules["seed"])):
        yield event(before, after)


def event(before, after):
    old, new = ids_of(before), ids_of(after)
    both = [number for number in new if number in set(old)]
    mine, its = ([ids.index(number) for number in both] for ids in (old, new))
    fired = fired_in(before)
    return Event(
        counts(before)[0].numpy()[np.ix_(mine, mine)].astype(np.int64),
        counts(after)[0].numpy()[np.ix_(its, its)].astype(np.int64),
        np.array([number in fired for number in both], bool),
    )


hebbian = settings(max_examples=10, deadline=None, derandomize=True)


@given(RULES)
@hebbian
def test_locality(rules):
    """An edge changes only by what its two engrams did: those silent keep it, and a third one's firing is nothing to
    it.
    """
    memory, quiet = built(SMALL.replace(**rules)), 0
    compared = 0
    for state in steps(memory, 16, seed=rules["seed"]):
        hidden = torch.randn(1, 4, WIDTH)
        after = memory.write(hidden, state)
        this = event(state, after)
        silent = ~this.fired[:, None] & ~this.fired[None]
        quiet += silent.sum()
        assert (this.change[silent] == 0).all()
        # the same step without one of those that fired
        slots = state["recalled"][0]
        if not bool((slots >= 0).any()):
            continue
        third = int(slots[slots >= 0][0])
        without = memory.write(hidden, {**state, "recalled": state["recalled"].masked_fill(slots == third, -1)})
        both = sorted({*ids_of(after)} & {*ids_of(without)} - {int(state["id"][0, third])})
        tables = [
            counts(each)[0].numpy()[np.ix_(*[[ids_of(each).index(number) for number in both]] * 2)]
            for each in (after, without)
        ]
        assert (tables[0] == tables[1]).all()
        compared += len(both)
    assert quiet
    assert compared


@given(RULES)
@hebbian
def test_cooperativity(rules):
    """Both must fire for their tie to strengthen, and if both do it does."""
    grown = 0
    for this in events(rules):
        together = this.fired[:, None] & this.fired[None]
        assert (this.after - this.before == together).all()
        grown += together.sum()
        assert (this.change[~together] <= 0).all()
    assert grown


@given(RULES)
@hebbian
def test_depression(rules):
    """What fires without an engram loosens its tie to it."""
    seen = 0
    for this in events(rules):
        alone = this.fired[:, None] & ~this.fired[None] & (this.before > 0)
        assert (this.change[alone] < 0).all()
        seen += alone.sum()
    assert seen


@given(RULES)
@hebbian
def test_boundedness(rules):
    for this in events(rules):
        edges = Event.edges(this.after)
        assert ((edges >= 0) & (edges <= 1)).all()
        assert (this.after == this.after.T).all()
        assert (edges.diagonal() == (this.after.diagonal() > 0)).all()


@given(RULES)
@hebbian
def test_competition(rules):
    """Firing with one strengthens that tie at the cost of those to others."""
    seen = 0
    for this in events(rules):
        for i in np.flatnonzero(this.fired):
            change, full = this.change[i], this.before[i] == this.before[i, i]
            assert (change[this.fired & ~full] > 0).all()
            assert (change[this.fired] >= 0).all()
            losers = ~this.fired & (this.before[i] > 0)
            assert (change[losers] < 0).all()
            seen += losers.sum() * (this.fired & ~full).sum()
        # nothing else makes a tie grow
        assert (this.change[~this.fired] == 0).all()
    assert seen


@given(RULES)
@hebbian
def test_long_term_stability(rules):
    """No count ever falls, and the more an engram has fired the less one event moves its ties."""
    seen = 0
    for this in events(rules):
        assert (this.after >= this.before).all()
        often = this.before.diagonal()
        assert (np.abs(this.change) <= (1 / (often + 1))[:, None] + 1e-12).all()
        seen += int((this.change != 0).sum())
    assert seen
