"""Multi-query associative recall: pairs, questions, gaps, the variants, and the defects that it must not have."""

from __future__ import annotations

import pytest
import torch

from mnemic.tasks.base import generator
from mnemic.tasks.mqar import MQAR, PUBLISHED

VARIANTS = [
    MQAR(),
    MQAR(length=100, pairs=16, segment_length=6, noise=9),
    MQAR(length=77, pairs=5, segment_length=10, rebound=12, alphabet=40, gaps="uniform"),
    MQAR(length=70, pairs=9, segment_length=9, key_tokens=2, alphabet=64, noise=3),
    MQAR(length=100, pairs=4, segment_length=12, key_tokens=2, alphabet=24, rebound=8),
]


def pairs_of(task, row):
    """Each pair of the opening as (key tokens, value), read one by one."""
    width = task.key_tokens + 1
    slots = [tuple(row[i : i + width]) for i in range(0, width * (task.pairs + task.rebound), width)]
    return [(slot[:-1], slot[-1]) for slot in slots]


@pytest.mark.parametrize("task", VARIANTS, ids=repr)
def test_every_key_is_asked_once_and_its_last_value_is_the_answer(task):
    examples = task.examples(100)
    width, half = task.key_tokens + 1, task.alphabet // 2
    opening = width * (task.pairs + task.rebound)
    assert examples.input_ids.shape[1] == -(-task.length // task.segment_length) * task.segment_length
    for row in range(100):
        ids = examples.input_ids[row].tolist()
        told = pairs_of(task, ids)
        values = [value for _, value in told]
        assert len(set(values)) == len(values)
        assert all(half <= value < task.alphabet for value in values)
        assert len({key for key, _ in told[: task.pairs]}) == len({key for key, _ in told}) == task.pairs
        final = dict(told)
        asked = []
        for number, place in enumerate(examples.place[row].tolist()):
            key = tuple(ids[place - task.key_tokens : place])
            asked.append(key)
            assert examples.labels[row, place] == ids[place] == final[key]
            last = max(i for i, pair in enumerate(told) if pair[0] == key)
            assert examples.evidence[row, number, 0] == last * width
            assert examples.extra["rewrites"][row, number] == sum(pair[0] == key for pair in told) - 1
            assert examples.extra["gap"][row, number] * width + opening == place - task.key_tokens
            between = place // task.segment_length - last * width // task.segment_length
            assert examples.extra["segments"][row, number] == between
            # a question and its answer are not cut
            assert (place - task.key_tokens) // task.segment_length == place // task.segment_length
        assert sorted(asked) == sorted(final)
        assert int(examples.asked[row].sum()) == task.pairs
        rest = torch.ones(len(ids), dtype=torch.bool)
        rest[:opening] = False
        for place in examples.place[row].tolist():
            rest[place - task.key_tokens : place + 1] = False
        filler = examples.input_ids[row][rest & (torch.arange(len(ids)) < task.length)]
        assert bool((filler >= task.alphabet).all() if task.noise else (filler == 0).all())
        assert bool((examples.input_ids[row, task.length :] == 0).all())


def test_two_token_keys_are_cells_of_a_grid_and_neither_token_is_enough():
    task = MQAR(length=70, pairs=9, segment_length=9, key_tokens=2, alphabet=64)
    assert (task.side, task.keys) == (5, 25)
    examples = task.examples(200)
    opening = examples.input_ids[:, :27].unflatten(1, (9, 3))
    row, column = opening[..., 0], opening[..., 1]
    assert (int(row.min()), int(row.max()), int(column.min()), int(column.max())) == (1, 5, 6, 10)
    for part in (row, column):
        assert all(len(set(keys)) < 9 for keys in part.tolist())


def test_gaps_have_the_published_quantiles():
    """Where the questions of streams with 256 tokens and 16 pairs stand: 10, 50 and 90 % before these tokens."""
    examples = MQAR(length=256, pairs=16, alphabet=8192).draw(4000, generator(0))
    place = (examples.place - 1).double().flatten()
    quantiles = place.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert (quantiles - torch.tensor([34, 64, 186])).abs().max() <= 2


@pytest.mark.parametrize("gaps", ["power", "uniform"])
def test_the_first_gap_follows_its_law(gaps):
    """Chi-square over the slots of streams with one pair, below the critical value at p = 0.001 for 14 degrees."""
    task = MQAR(length=32, pairs=1, gaps=gaps)
    count = task.draw(20_000, generator(1)).extra["gap"].flatten().bincount(minlength=15).double()
    weight = torch.arange(1, 16).double() ** (-0.99 if gaps == "power" else 0)
    expected = weight / weight.sum() * 20_000
    assert float(((count - expected) ** 2 / expected).sum()) < 36.12


def test_keys_and_values_are_balanced():
    """Chi-square of 80,000 keys and answers, below the critical values at p = 0.001."""
    task = MQAR(alphabet=32, segment_length=8)
    examples = task.draw(20_000, generator(2))
    answers = (examples.labels[examples.asked] - 16).bincount(minlength=16)
    keys = (examples.input_ids[:, 0:8:2].flatten() - 1).bincount(minlength=15)
    for count, critical in ((answers, 37.70), (keys, 36.12)):
        expected = float(count.sum()) / len(count)
        assert float(((count - expected) ** 2 / expected).sum()) < critical


@pytest.mark.parametrize("key_tokens", [1, 2])
def test_no_filler_equals_a_key_or_a_value_in_10_000(key_tokens):
    """Every token of a key or a value is either told, or asked for: none is filler."""
    task = MQAR(length=120, pairs=8, segment_length=12, key_tokens=key_tokens, noise=16, alphabet=128)
    examples = task.draw(10_000, generator(3))
    ids, width = examples.input_ids, task.width
    meant = (torch.arange(ids.shape[1]) < width * task.pairs).repeat(10_000, 1)
    for step in range(width):
        meant.scatter_(1, examples.place - step, True)
    filler = ids[~meant]
    assert len(filler) == 10_000 * (120 - 2 * 8 * width)
    assert int((filler < task.alphabet).sum()) == 0
    # and the range is used evenly; critical value for 15 degrees at p = 0.001
    count = (filler - task.alphabet).bincount(minlength=16).double()
    expected = len(filler) / 16
    assert float(((count - expected) ** 2 / expected).sum()) < 37.70


def test_a_new_value_never_equals_an_old_one_of_its_key():
    """The tightest case: as many values as pairs. Also, keys are bound again evenly."""
    task = MQAR(length=80, pairs=4, rebound=12, alphabet=32, segment_length=8)
    examples = task.draw(2000, generator(4))
    told = examples.input_ids[:, 1:32:2].sort(1).values
    assert bool((told[:, 1:] > told[:, :-1]).all())
    rewrites = examples.extra["rewrites"]
    assert bool((rewrites.sum(1) == 12).all())
    assert abs(float(rewrites.double().var(correction=0)) - 12 * 0.25 * 0.75) < 0.15
    # an answer that is an older value is counted as such, and only then
    older = examples.input_ids.clone()
    older.scatter_(1, examples.place, torch.zeros_like(examples.place))
    assert task.measures(older, examples)["older value"] == 0
    assert task.measures(examples.input_ids, examples)["older value"] == 0
    key = examples.input_ids.gather(1, examples.place - 1)
    first = (examples.input_ids[:, None, 0:8:2] == key[..., None]).long().argmax(2) * 2 + 1
    older.scatter_(1, examples.place, examples.input_ids.gather(1, first))
    assert task.measures(older, examples)["older value"] == pytest.approx(float((rewrites > 0).double().mean()))


@pytest.mark.parametrize("task", VARIANTS, ids=repr)
def test_the_oracle_is_always_right(task):
    examples = task.examples(300, "test")
    assert task.score(task.solve(examples), examples) == 1


@pytest.mark.parametrize(("length", "pairs"), sorted({*PUBLISHED["train"], *PUBLISHED["test"]}))
def test_published_sizes(length, pairs):
    task = MQAR(length=length, pairs=pairs, alphabet=8192, segment_length=32)
    examples = task.examples(20)
    assert examples.input_ids.shape == (20, length)
    assert (task.keys, task.values, task.vocabulary) == (4095, 4096, 8192)
    assert task.score(task.solve(examples), examples) == 1


def test_floors_are_what_the_rules_give():
    """With uniform gaps and 2 of 4 pairs a segment the closed forms follow from where a question falls."""
    task = MQAR(length=24, pairs=4, segment_length=4, gaps="uniform", alphabet=64)
    floors = task.floors(4000)
    assert abs(floors["own segment"] - 1 / 32) < 0.01
    # segments 0 and 1 tell, 2 .. 5 ask evenly: one back shows half of the pairs to segment 2 and none to the others
    lucky = 1 / 31
    assert abs(floors["last segment"] - (0.25 * 0.5 + (1 - 0.25 * 0.5) * lucky)) < 0.02
    assert abs(floors["last 2 segments"] - (0.375 + 0.625 * lucky)) < 0.02
    # a sample holds 2 slots of the 4, 6, 8 or 10 before
    sample = sum(2 / slots for slots in (4, 6, 8, 10)) / 4
    assert abs(floors["sample of 4 tokens"] - (sample + (1 - sample) * lucky)) < 0.02
    assert floors["a told value at random"] == 0.25
    assert floors["oracle"] == 1


def test_a_question_in_the_segment_of_its_pair_is_told_apart():
    task = MQAR(length=16, pairs=2, segment_length=8, gaps="uniform")
    examples = task.examples(500)
    segments = examples.extra["segments"]
    predicted = task.answered(examples, lambda part: task.last(part, 0))
    right = task.right(predicted, examples).view(500, 2)
    assert bool(right[segments == 0].all())
    assert float(right[segments > 0].double().mean()) < 0.05
    assert task.measures(predicted, examples)["across segments"] < 0.05


def test_an_answer_is_not_given_away_by_others_or_by_what_is_not_seen():
    task = MQAR(length=60, pairs=6, segment_length=10, noise=4, rebound=3, alphabet=32)
    examples = task.examples(300)
    seen = task.sample(examples, generator(1)) & ~examples.asked
    noise = torch.randint(task.vocabulary, examples.input_ids.shape)
    first = task.guess(examples.input_ids, examples.asked, seen, generator(0))
    second = task.guess(torch.where(seen, examples.input_ids, noise), examples.asked, seen, generator(0))
    assert torch.equal(first[examples.asked], second[examples.asked])
    # what is not told is a value that no other pair has
    without = torch.ones_like(seen) & ~examples.asked
    without[:, :2] = False
    said = task.guess(examples.input_ids, examples.asked, without, generator(0))
    hidden = (examples.evidence[..., 0] == 0).nonzero()
    for row, number in hidden.tolist():
        shown = set(examples.input_ids[row, 3:18:2].tolist())
        assert int(said[row, examples.place[row, number]]) not in shown
    assert len(hidden) > 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"pairs": 128}, "127 keys"),
        ({"pairs": 17}, "take 68 tokens"),
        ({"rebound": 30}, "take 76 tokens"),
        ({"alphabet": 32, "rebound": 13}, "raise alphabet="),
        ({"segment_length": 7}, "a multiple of 2"),
        ({"segment_length": 8, "key_tokens": 2}, "a multiple of 3"),
        ({"segment_length": 0}, "segment_length is 0"),
        ({"key_tokens": 3}, "key_tokens is 3"),
        ({"gaps": "even"}, '"power" or "uniform"'),
        ({"power": 0.0}, "power is 0.0"),
        ({"noise": -1}, "noise is -1"),
        ({"rebound": -1}, "rebound is -1"),
        ({"alphabet": 8}, "alphabet is 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**settings)
