"""Short associative retrieval: what is told where, what is asked, and what may stand between."""

from __future__ import annotations

import pytest
import torch

from mnemic.tasks.base import generator
from mnemic.tasks.retrieval import BLANK, DIGITS, FIRST_LETTER, FIRST_NOISE, LETTERS, SEPARATOR, Retrieval

VARIANTS = [
    Retrieval(),
    Retrieval(pairs=1, segment_length=8),
    Retrieval(pairs=26, segment_length=6, fillers=3, noise=4),
    Retrieval(pairs=7, segment_length=10, fillers=1),
]


def test_published_tokens():
    assert (SEPARATOR, FIRST_LETTER, FIRST_LETTER + LETTERS - 1) == (10, 11, 36)
    task = Retrieval()
    assert (task.pairs, task.vocabulary, task.uniform) == (4, 38, 0.1)
    assert task.text([3, 10, 11, 36, 37, 38]) == ["3", "?", "a", "z", "_", "."]


@pytest.mark.parametrize("task", VARIANTS, ids=repr)
def test_pairs_then_fillers_then_a_question_of_its_own(task):
    examples = task.examples(400)
    ids, size = examples.input_ids, task.segment_length
    end = 2 * task.pairs
    told = -(-end // size)
    assert ids.shape == (400, (told + task.fillers + 1) * size)
    letters, digits = ids[:, 0:end:2], ids[:, 1:end:2]
    assert bool(((letters >= FIRST_LETTER) & (letters < FIRST_LETTER + LETTERS)).all())
    assert bool((digits < DIGITS).all())
    assert all(len(set(row)) == task.pairs for row in letters.tolist())
    between, question = ids[:, end:-size], ids[:, -size:]
    assert bool((between >= FIRST_NOISE).all() if task.noise else (between == BLANK).all())
    assert bool((question[:, 1] == SEPARATOR).all())
    assert bool((question[:, 3:] == BLANK).all())
    asked = letters == question[:, :1]
    assert bool((asked.sum(1) == 1).all())
    assert torch.equal(digits[asked], question[:, 2])
    assert torch.equal(examples.evidence[:, 0, 0], 2 * asked.long().argmax(1))
    assert torch.equal(examples.labels[examples.asked], question[:, 2])
    assert torch.equal(examples.place, torch.full((400, 1), ids.shape[1] - size + 2))
    # the question's segment tells nothing: no pair lies in it
    assert int(examples.lag.min()) > 2


def test_letters_digits_and_asked_pairs_are_balanced():
    """Chi-square with 20,000 streams, below the critical values at p = 0.001."""
    examples = Retrieval().draw(20_000, generator(5))
    counts = {
        27.88: examples.labels[examples.asked].bincount(minlength=10),
        52.62: (examples.input_ids[:, 0:8:2] - 11).flatten().bincount(minlength=26),
        16.27: (examples.evidence.flatten() // 2).bincount(minlength=4),
    }
    for critical, count in counts.items():
        expected = float(count.sum()) / len(count)
        assert float(((count - expected) ** 2 / expected).sum()) < critical


def test_no_filler_is_a_letter_or_a_digit_in_10_000():
    task = Retrieval(pairs=3, segment_length=8, fillers=3, noise=20)
    examples = task.draw(10_000, generator(6))
    filler = examples.input_ids[:, 6:-8]
    assert int((filler < FIRST_NOISE).sum()) == 0
    assert len(filler.unique()) == 20


@pytest.mark.parametrize("task", VARIANTS, ids=repr)
def test_the_oracle_is_always_right(task):
    examples = task.examples(500, "test")
    assert task.score(task.solve(examples), examples) == 1


@pytest.mark.parametrize(("pairs", "shown"), [(4, 2), (8, 2), (3, 1)])
def test_floors_are_what_the_rules_give(pairs, shown):
    floors = Retrieval(pairs=pairs).floors(4000)
    assert abs(floors["last segment"] - (shown / pairs + (1 - shown / pairs) / 10)) < 0.025
    assert abs(floors["majority"] - 0.1) < 0.02
    # two pairs' worth of tokens; a third segment is only half filled, and as probable
    expected = 2 / (2 * -(-pairs // 2))
    assert abs(floors["sample of 4 tokens"] - (expected + (1 - expected) / 10)) < 0.025
    assert floors["a told digit at random"] == pytest.approx(1 / pairs + (1 - 1 / pairs) / 10)
    assert floors["oracle"] == 1


def test_fillers_take_the_pairs_out_of_sight():
    floors = Retrieval(fillers=2).floors(4000)
    assert abs(floors["last segment"] - 0.1) < 0.02
    assert abs(floors["last 2 segments"] - 0.1) < 0.02


def test_the_solver_reads_nothing_that_is_not_seen():
    task = Retrieval(pairs=6, noise=3, fillers=1)
    examples = task.examples(200)
    seen = task.sample(examples, generator(1)) & ~examples.asked
    noise = torch.randint(task.vocabulary, examples.input_ids.shape)
    first = task.guess(examples.input_ids, examples.asked, seen, generator(0))
    second = task.guess(torch.where(seen, examples.input_ids, noise), examples.asked, seen, generator(0))
    assert torch.equal(first[examples.asked], second[examples.asked])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"pairs": 27}, "26 letters"),
        ({"segment_length": 5}, "segment_length is 5"),
        ({"segment_length": 2}, "segment_length is 2"),
        ({"fillers": -1}, "fillers is -1"),
        ({"noise": -1}, "noise is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Retrieval(**settings)
