"""What recall chooses, as its equations say: fast equals naive."""

from __future__ import annotations

import pytest
import torch

from helpers import SEGMENT, assert_near
from mnemic.bank import Bank
from mnemic.memories.recall import RecallConfig
from mnemic.memories.recall_naive import naive
from mnemic.memory import Asked, Site

SMALL = {"segment_length": SEGMENT, "window": 2 * SEGMENT, "sinks": 4, "unit": 4, "recall_in_reading": True}


def asked_of(
    kept: int, heads: int = 2, group: int = 3, time: int = 4, reading: bool = False, number: int = 0, stored="base"
) -> Asked:
    generator = torch.Generator().manual_seed(kept)
    keys, values = torch.randn(2, 1, heads, kept, 8, generator=generator)
    query, position = torch.randn(heads * group, time, 8, generator=generator), torch.arange(70, 70 + time)

    def turn(x, at, back=False):  # a rotation of channel pairs
        angle = (-at if back else at)[:, None].float() / torch.tensor([1.0, 3.0, 9.0, 27.0])
        one, two = x[..., :4], x[..., 4:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    bank = Bank(stored=stored).append(keys, values)
    return Asked(query, position, 60, 0.4, bank, 0, turn, 16, range(number, number + time), reading)


@pytest.mark.parametrize("kept", [40, 41, 47])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("by", ["head", "layer"])
@pytest.mark.parametrize("search", ["exact", "candidates"])
@pytest.mark.parametrize("least", [0.0, 0.15, 0.9])
def test_least_equals_naive(least, search, by, sinks, kept, monkeypatch):
    monkeypatch.setattr("mnemic.bank.LEAST", 8)
    settings = {**SMALL, "sinks": sinks, "budget": 12, "by": by, "search": search, "least": least}
    memory, asked = RecallConfig(**settings).build(64, 1), asked_of(kept)
    assert_equals_naive(memory, asked)
    seen = memory.further(Site(0, "attention"), asked).keys_ktms.shape[2]
    assert seen == {0.0: sinks + 12, 0.9: sinks or 4}.get(least, seen)
    # 0.15 leaves out some, and not the same everywhere
    lengths = {len(seen) for row in naive(memory, asked) for seen in row}
    assert least != 0.15 or len(lengths) > 1 or by == "layer"


@pytest.mark.parametrize("kept", [40, 41, 47])
@pytest.mark.parametrize("by", ["head", "layer"])
@pytest.mark.parametrize("wider", [1, 2])
def test_candidates_equal_naive(wider, by, kept, monkeypatch):
    monkeypatch.setattr("mnemic.bank.LEAST", 8)
    memory, asked = (
        RecallConfig(**SMALL, budget=12, by=by, search="candidates", wider=wider).build(64, 1),
        asked_of(kept),
    )
    assert_equals_naive(memory, asked)
    if (by, wider, kept) == ("head", 1, 40):
        few = memory.further(Site(0, "attention"), asked).keys_ktms
        memory.config = memory.config.replace(search="exact", wider=4)
        assert not torch.equal(few, memory.further(Site(0, "attention"), asked).keys_ktms)


def test_where_all_are_candidates_the_choice_is_exact():
    asked = asked_of(48)
    found, exact = (
        RecallConfig(**SMALL, budget=12, search=search).build(64, 1).further(Site(0, "attention"), asked)
        for search in ("candidates", "exact")
    )
    assert torch.equal(found.keys_ktms, exact.keys_ktms)


@pytest.mark.parametrize("kept", [40, 41, 47])
@pytest.mark.parametrize("layout", ["line", "capped"])
@pytest.mark.parametrize("by", ["head", "layer"])
@pytest.mark.parametrize("choice", ["mass", "mean", "bounds"])
def test_fast_equals_naive(choice, by, layout, kept):
    memory = RecallConfig(**SMALL, budget=12, choice=choice, by=by, layout=layout).build(64, 1)
    assert_equals_naive(memory, asked_of(kept))


def assert_equals_naive(memory, asked):
    more = memory.further(Site(0, "attention"), asked)
    for head, row in enumerate(naive(memory, asked)):
        for t, seen in enumerate(row):
            there = slice(None) if more.keep_ktm is None else more.keep_ktm[head, t]
            assert_near(more.keys_ktms[head, t][there], torch.stack([key for _, key, _ in seen]), 1e-5)
            assert_near(more.values_ktmv[head, t][there], torch.stack([value for *_, value in seen]), 1e-6)
            assert more.keys_ktms[head, t][there].shape[0] == len(seen)


def test_what_is_chosen_holds_the_sinks_and_the_budget():
    memory, asked = RecallConfig(**SMALL, budget=12).build(64, 1), asked_of(48)
    for row in naive(memory, asked):
        for seen in row:
            numbers = [number for number, *_ in seen]
            assert numbers[:4] == [0, 1, 2, 3]
            assert len(numbers) == 4 + 12
            assert numbers == sorted(numbers)
    # another choice for another query
    assert len({tuple(n for n, *_ in seen) for row in naive(memory, asked) for seen in row}) > 1


def test_many_tokens_are_scored_in_parts(monkeypatch):
    memory, asked = RecallConfig(**SMALL, budget=12).build(64, 1), asked_of(48, time=9)
    expected = memory.further(Site(0, "attention"), asked)
    monkeypatch.setattr("mnemic.memories.recall.SCORES_AT_ONCE", 1)
    found = memory.further(Site(0, "attention"), asked)
    assert torch.equal(found.keys_ktms, expected.keys_ktms)
