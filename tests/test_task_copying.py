"""Copying and reversing: what is repeated, where it is asked, and what each reach of a memory is worth."""

from __future__ import annotations

import pytest
import torch

from mnemic.tasks.base import TASKS, generator
from mnemic.tasks.copying import FIRST, SYMBOLS, Copy, Reverse
from mnemic.unrolling import IGNORED

TASKS_HERE = [Reverse(), Reverse(12, 12), Reverse(24, 4), Copy(), Copy(24, 6), Copy(5, 1), Reverse(1, 1)]
GOLDEN = [[9, 6, 3, 8, 5, 5, 9, 9, 6, 3, 8, 9, 9, 8, 3, 6, 9, 9, 5, 5, 8, 3, 6, 9]]
"""Row 0 of `Reverse()` from seed 7."""

every_task = pytest.mark.parametrize("task", TASKS_HERE, ids=str)


def wanted(task, prompt):
    """The answer by the words of the rule."""
    return prompt[::-1] if task.name == "reverse" else prompt + prompt


@every_task
def test_streams_follow_the_rule(task):
    examples = task.examples(20)
    count, total = task.count, task.segments * task.segment_length
    assert examples.input_ids.shape == (20, total)
    assert examples.input_ids.dtype == examples.labels.dtype == torch.int64
    for ids, labels in zip(examples.input_ids.tolist(), examples.labels.tolist(), strict=True):
        assert ids == ids[:count] + wanted(task, ids[:count])
        assert labels == [IGNORED] * count + ids[count:]
    assert examples.facts.tolist() == [count] * 20


@every_task
def test_evidence_is_the_place_in_the_prompt(task):
    examples = task.examples(20)
    assert (examples.evidence < task.count).all()
    told = examples.input_ids.gather(1, examples.evidence[..., 0])
    assert torch.equal(told, examples.labels[:, task.count :])
    assert examples.place.tolist() == [list(range(task.count, examples.input_ids.shape[1]))] * 20
    lags = [2 * i + 1 for i in range(task.count)] if task.name == "reverse" else None
    assert examples.lag[0].tolist() == (lags or [task.count] * task.count + [2 * task.count] * task.count)


@pytest.mark.parametrize("task", [Reverse(), Copy()], ids=str)
def test_symbols_are_drawn_evenly(task):
    prompt = task.examples(5000).input_ids[:, : task.count]
    assert prompt.min() == FIRST
    assert prompt.max() == FIRST + SYMBOLS - 1 == task.vocabulary - 1
    for place in range(task.count):
        share = (prompt[:, place] - FIRST).bincount(minlength=SYMBOLS).double() / 5000
        # chi-square with 7 degrees of freedom: 1 in 10,000 above 29.9
        assert 5000 * ((share - 1 / SYMBOLS) ** 2 * SYMBOLS).sum() < 29.9
    pairs = ((prompt[:, :-1] - FIRST) * SYMBOLS + prompt[:, 1:] - FIRST).flatten().bincount(minlength=SYMBOLS**2)
    expected = pairs.sum() / SYMBOLS**2
    # 63 degrees of freedom: 1 in 10,000 above 113
    assert ((pairs - expected) ** 2 / expected).sum() < 113


def test_every_machine_draws_the_same():
    assert Reverse().draw(1, generator(7)).input_ids.tolist() == GOLDEN
    assert torch.equal(Copy(12, 12).draw(1, generator(7)).input_ids[:, :12], torch.tensor(GOLDEN)[:, :12])


@every_task
def test_the_oracle_reads_it_all_and_no_answer(task):
    examples = task.examples(50, "test")
    assert task.score(task.solve(examples), examples) == 1
    assert task.measures(task.solve(examples), examples) == {"whole answers": 1.0}
    nonsense = examples.input_ids.masked_fill(examples.asked, 1)
    assert torch.equal(
        task.guess(nonsense, examples.asked, ~examples.asked, generator(0))[examples.asked],
        examples.labels[examples.asked],
    )


def test_a_wrong_symbol_is_one_of_many():
    task = Reverse()
    examples = task.examples(4)
    predicted = task.solve(examples)
    predicted[1, 15] = 0
    assert task.score(predicted, examples) == pytest.approx(1 - 1 / 48)
    assert task.measures(predicted, examples) == {"whole answers": 0.75}


# --- floors ----------------------------------------------------------------------------------------------------------


def test_four_segments_tell_recurrence_from_reach():
    floors = Reverse(12, 6).floors()
    names = ["uniform", "majority", "no memory", "last segment", "last 2 segments", "sample of 6 tokens", "oracle"]
    assert list(floors) == names
    assert floors["uniform"] == 1 / 8
    assert floors["no memory"] == pytest.approx((1 + 11 / 8) / 12)
    assert floors["last segment"] == pytest.approx(6 / 12 + 6 / 12 / 8) == 0.5625
    # one more: the first symbol of the last half is asked for in the third segment
    assert floors["last 2 segments"] == pytest.approx(7 / 12 + 5 / 12 / 8)
    assert floors["sample of 6 tokens"] == pytest.approx(1 / 12 + 11 / 12 * (1 / 2 + 1 / 2 / 8))
    assert floors["oracle"] == 1


def test_two_segments_and_three_do_not():
    two, three = Reverse(12, 12).floors(), Copy(8, 8).floors()
    assert two["no memory"] == pytest.approx((1 + 11 / 8) / 12)
    # the first symbol of each copy is asked for where the prompt, or the first copy, stands
    assert three["no memory"] == pytest.approx((2 + 14 / 8) / 16)
    assert two["last segment"] == three["last segment"] == 1


@pytest.mark.parametrize("task", [Reverse(), Reverse(24, 4), Reverse(12, 12), Copy(), Copy(24, 6), Copy(6, 3)], ids=str)
def test_floors_are_what_the_solver_reaches_when_it_is_asked_segment_by_segment(task):
    rows, length = 1500, task.segment_length
    examples = task.examples(rows, "test")
    place = torch.arange(examples.input_ids.shape[1])
    asks = (place - 1) // length
    floors = task.floors()
    for name, reach in (("no memory", 0), ("last segment", 1), ("last 2 segments", 2)):
        predicted = torch.zeros_like(examples.input_ids)
        for segment in range(task.segments):
            here = examples.asked & (asks == segment)
            # teacher-forced: of this segment only the first token is known before all that is asked in it
            seen = (place // length >= segment - reach) & (place // length <= segment) & ~here
            blanked = examples.input_ids.masked_fill(~seen, 0)
            solved = task.guess(blanked, here, seen, generator(segment))
            predicted = torch.where(here, solved, predicted)
        # standard error of a guess's share, four of them
        error = 4 * (0.11 / (rows * (place >= task.count).sum().item())) ** 0.5
        assert task.score(predicted, examples) == pytest.approx(floors[name], abs=error), name


@pytest.mark.parametrize("task", [Reverse(12, 6), Copy(24, 6)], ids=str)
def test_a_sample_of_the_prompt(task):
    """The sample by drawing it: as many places of the prompt, and the segment that is asked."""
    hits, source = [], generator(5)
    places = task.places()
    asks = (torch.arange(len(places)) + task.count - 1) // task.segment_length
    for _ in range(4000):
        kept = torch.randperm(task.count, generator=source)[: task.segment_length]
        told = torch.isin(places[:, 0], kept) | (places >= asks[:, None] * task.segment_length).any(1)
        hits.append(told.double())
    share = torch.stack(hits).mean().item()
    name = f"sample of {task.segment_length} tokens"
    assert task.floors(20)[name] == pytest.approx(share + (1 - share) / 8, abs=0.01)


def test_majority_is_a_guess():
    assert Reverse(24, 4).floors(500)["majority"] == pytest.approx(1 / 8, abs=0.015)


# --- settings --------------------------------------------------------------------------------------------------------


def test_both_are_registered_and_shared_settings_are_not_a_task():
    assert (TASKS["copy"], TASKS["reverse"]) == (Copy, Reverse)
    assert "Copying" not in {task.__name__ for task in TASKS.values()}
    assert (Reverse().segments, Reverse(12, 12).segments, Copy().segments, Copy(120, 120).segments) == (4, 2, 3, 3)


def test_bad_settings():
    with pytest.raises(
        ValueError, match="12 symbols are not whole segments of 5; choose a segment_length of 1, 2, 3, 4"
    ):
        Reverse(12, 5)
    with pytest.raises(ValueError, match="8 symbols are not whole segments of 16"):
        Copy(8, 16)
    for count, length in ((0, 4), (4, 0), (-1, 1)):
        with pytest.raises(ValueError, match=f"count is {count} and segment_length {length}; use 1 or more"):
            Copy(count, length)


def test_text():
    assert Reverse().text([2, 9, 0]) == ["a", "h", "-"]
