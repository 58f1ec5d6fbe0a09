"""Sorting by frequency: how prompts are drawn, what the answer is, where it stands, and what needs no memory."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import mnemic
from families import make
from mnemic.tasks import sorting
from mnemic.tasks.base import generator, seed_of
from mnemic.tasks.sorting import PAD, SEPARATOR, SYMBOLS, SortingTask
from mnemic.training import IGNORED, Batch, unroll

SHARE = 0.01


def by_hand(prompt):
    """The answer by the words of the rule."""
    count = Counter(prompt)
    seen = sorted(count, key=lambda symbol: (-count[symbol], prompt.index(symbol)))
    return seen + [symbol for symbol in range(SYMBOLS) if symbol not in count]


def scored_by_hand(order, answer):
    """Teacher-forced accuracy of a ranking, step by step."""
    right = 0
    for place, wanted in enumerate(answer):
        right += next(symbol for symbol in order if symbol not in answer[:place]) == wanted
    return right / len(answer)


# --- prompts and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5, 40, 400])
def test_the_answer_follows_the_rule(tokens):
    prompt = SortingTask(tokens, 1).draw(50, generator(0))
    assert sorting.right_order(prompt).tolist() == [by_hand(row) for row in prompt.tolist()]


def test_a_small_answer():
    prompt = torch.tensor([[7, 3, 3, 9, 7, 1]])
    assert sorting.right_order(prompt)[0, :6].tolist() == [7, 3, 9, 1, 0, 2]
    assert sorting.rank(sorting.counts(prompt))[0, :6].tolist() == [3, 7, 1, 9, 0, 2]
    assert sorting.first_seen(prompt)[0, [7, 3, 9, 1, 0]].tolist() == [0, 1, 3, 5, 6]


def test_the_distribution_drifts_from_one_to_the_other(monkeypatch):
    """With fixed weights the share of each symbol at the first and the last tenth is as the rule says."""
    weights = torch.stack([torch.arange(SYMBOLS) % 9 + 1, (torch.arange(SYMBOLS) + 4) % 9 + 1])
    monkeypatch.setattr(sorting.torch, "randint", lambda *given, **more: weights)
    prompt = SortingTask(1000, 1).draw(400, generator(0))
    early, late = (weights / weights.sum(1, keepdim=True)).double()
    for tenth in range(10):
        part = prompt[:, 100 * tenth : 100 * (tenth + 1)]
        r = (100 * tenth + 50.5) / 1000
        share = sorting.counts(part).sum(0) / part.numel()
        assert (share - ((1 - r) * early + r * late)).abs().max() < 5 * (0.1 * 0.9 / part.numel()) ** 0.5


def test_weights_are_one_to_nine_and_differ_between_streams():
    prompt = SortingTask(4000, 1).draw(100, generator(0))
    share = sorting.counts(prompt[:, :400]).sum(0) / (400 * 100)
    assert (share - 1 / SYMBOLS).abs().max() < SHARE
    single = sorting.counts(prompt) / 4000
    assert single.std(0).min() > 0.01
    assert prompt.min() == 0
    assert prompt.max() == SYMBOLS - 1


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "segments", "segment_length"), [(32, 4, None), (32, 4, 64), (8, 12, 24), (21, 1, 21)]
)
def test_layout(length, segments, segment_length):
    task = SortingTask(length, segments)
    batch = task.batch(3, 0, segment_length)
    last, tokens = segment_length or length, length * segments
    assert isinstance(batch, Batch)
    assert batch.input_ids.shape == batch.labels.shape == (3, tokens + last)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape[1] % last == 0
    padding = [PAD] * (last - 1 - SYMBOLS)
    for row in range(3):
        prompt, answer = batch.prompt[row].tolist(), batch.answer[row].tolist()
        assert len(prompt) == tokens
        assert answer == by_hand(prompt)
        assert batch.input_ids[row].tolist() == [*prompt, SEPARATOR, *answer, *padding]
        assert batch.labels[row].tolist() == [IGNORED] * (tokens + 1) + answer + [IGNORED] * len(padding)


def test_seeds():
    task = SortingTask(32, 2)
    first, again, other = (task.batch(4, seed) for seed in (5, 5, 6))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert torch.equal(task.batch(2, 5).input_ids, first.input_ids[:2])
    assert len({tuple(row) for row in first.prompt.tolist()}) == 4


def test_every_machine_draws_the_same():
    assert SortingTask(32, 2).batch(2, 7).prompt[:, :16].tolist() == [
        [0, 15, 7, 13, 4, 5, 7, 6, 4, 7, 7, 8, 13, 18, 6, 2],
        [10, 6, 5, 6, 11, 2, 16, 13, 8, 12, 9, 1, 8, 9, 16, 6],
    ]


def test_a_memory_can_be_trained_on_it():
    config = mnemic.EMTConfig(slots=4, dim=16, heads=2, segment_length=24)
    attachment = mnemic.attach(make("gpt2"), config)
    batch = SortingTask(24, 3).batch(2, 0)
    unrolled = unroll(attachment.model, batch.input_ids, batch.labels)
    assert torch.equal(unrolled.targets.view(2, SYMBOLS), batch.answer)
    assert unrolled.stream.seen == (4 * 24,) * 2


def test_splits_do_not_meet():
    edges = [(seed_of(name, 0), seed_of(name, 499_999_999)) for name in ("train", "validation", "test")]
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(edges))
    with pytest.raises(ValueError, match="'dev'; choose one of train, validation, test"):
        seed_of("dev", 0)
    for number in (-1, 500_000_000):
        with pytest.raises(ValueError, match=f"number is {number}; a split has"):
            seed_of("train", number)


def test_bad_sizes():
    with pytest.raises(ValueError, match="segment_length is 20; separator and answer need segments of 21 tokens"):
        SortingTask(20, 4).batch(1, 0)
    with pytest.raises(ValueError, match="96 tokens of prompt are not whole segments of 64"):
        SortingTask(32, 3).batch(1, 0, 64)
    with pytest.raises(ValueError, match="segments is 0"):
        SortingTask(32, 0)


# --- counting --------------------------------------------------------------------------------------------------------


def test_counts_of_parts():
    prompt = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3]])
    assert sorting.counts(prompt)[0, :4].tolist() == [2, 2, 3, 1]
    assert sorting.last_counts(prompt, 3)[0, :4].tolist() == [0, 0, 2, 1]
    assert torch.equal(sorting.last_counts(prompt, 99), sorting.counts(prompt))
    assert sorting.decayed_counts(prompt, 0.5, 4)[0, :4].tolist() == [1, 1, 3, 1]
    assert torch.equal(sorting.decayed_counts(prompt, 1.0, 4), sorting.counts(prompt))
    assert torch.equal(sorting.sample_counts(prompt, 8, generator(0)), sorting.counts(prompt))


def test_a_sample_is_unbiased():
    prompt = SortingTask(64, 4).draw(1, generator(0)).expand(2000, -1)
    sample = sorting.sample_counts(prompt, 64, generator(1))
    assert (sample.sum(1) == 64).all()
    assert (sample <= sorting.counts(prompt)).all()
    assert (sample.mean(0) - sorting.counts(prompt)[0] / 4).abs().max() < 0.25


# --- floors ----------------------------------------------------------------------------------------------------------

MEASURED = {
    (1024, 4): (37.1, 45.2, 54.5, 90.2, 98.3),
    (1024, 8): (34.5, 37.8, 52.6, 82.9, 99.2),
    (1024, 16): (33.6, 35.4, 51.9, 72.0, 99.6),
    (1024, 32): (33.0, 34.2, 51.3, 59.4, 99.8),
    (256, 32): (30.6, 32.3, 38.4, 58.9, 99.1),
}
"""Floors in percent over 4000 prompts (2000 for the last), good to 0.3."""


@pytest.mark.parametrize(
    ("size", "rows"), [((1024, 4), 1000), ((1024, 8), 600), ((1024, 16), 400), ((1024, 32), 400), ((256, 32), 600)]
)
def test_floors(size, rows):
    length = size[0]
    floors = SortingTask(*size).floors(rows)
    names = ["last segment", "last 2 segments", f"sample of {length} tokens", "decay 0.95 a segment", "all tokens"]
    assert list(floors) == ["uniform", *names, "oracle"]
    for name, wanted in zip(names, MEASURED[size], strict=True):
        # prompts differ by about 11 points from each other
        assert floors[name] == pytest.approx(wanted / 100, abs=4 * 0.11 / rows**0.5), name
    assert floors["oracle"] == 1
    assert floors["uniform"] == pytest.approx(0.17989, abs=1e-5)


def test_a_guess_is_at_the_uniform_floor():
    answer = torch.stack([torch.randperm(SYMBOLS, generator=generator(s)) for s in range(2000)])
    order = torch.arange(SYMBOLS).expand_as(answer)
    assert sorting.teacher_forced(order, answer) == pytest.approx(sorting.uniform_floor(), abs=SHARE)


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_teacher_forced_step_by_step():
    prompt = SortingTask(50, 2).draw(40, generator(0))
    answer, order = sorting.right_order(prompt), sorting.rank(sorting.last_counts(prompt, 50))
    scores = [scored_by_hand(*pair) for pair in zip(order.tolist(), answer.tolist(), strict=True)]
    assert sorting.teacher_forced(order, answer) == pytest.approx(sum(scores) / 40)
    assert 0.2 < sum(scores) / 40 < 0.9


def test_accuracy_and_exact_order():
    answer = torch.arange(SYMBOLS).expand(4, -1)
    predicted = answer.clone()
    predicted[0, :2] = predicted[0, :2].flip(0)
    predicted[1, 5] = SEPARATOR
    assert sorting.token_accuracy(predicted, answer) == pytest.approx(1 - 3 / 80)
    assert sorting.exact_order(predicted, answer) == 0.5


def test_kendall_tau():
    answer = torch.stack([torch.randperm(SYMBOLS, generator=generator(seed)) for seed in range(50)])
    assert sorting.kendall_tau(answer, answer) == 1
    assert sorting.kendall_tau(answer.flip(1), answer) == -1
    swapped = answer.clone()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    assert sorting.kendall_tau(swapped, answer) == pytest.approx(1 - 2 / 190)
    assert abs(sorting.kendall_tau(answer.roll(1, 0), answer)) < 0.1


def test_kendall_tau_of_what_is_no_order():
    answer = torch.arange(SYMBOLS)[None]
    nothing = torch.full((1, SYMBOLS), PAD)
    assert sorting.kendall_tau(nothing, answer) == 0
    one = nothing.clone()
    one[0, 3] = 0
    assert sorting.kendall_tau(one, answer) == pytest.approx(19 / 190)
    last = nothing.clone()
    last[0, 0] = 19
    assert sorting.kendall_tau(last, answer) == pytest.approx(-19 / 190)
    twice = torch.tensor([[0, 0, 1, 0, 2, *[PAD] * 3, *range(3, SYMBOLS), 0, 1]])
    assert sorting.kendall_tau(twice, answer) == 1
