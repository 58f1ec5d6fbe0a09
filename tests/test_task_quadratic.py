"""Quadratic equations: what is written, how equations are distributed, and what each field tells of the others."""

from __future__ import annotations

import re

import pytest
import torch

from mnemic.tasks.base import generator
from mnemic.tasks.quadratic import END, FIELDS, FIRST_SIGN, PAD, SIGNS, Quadratic, _coefficients, _equation

VARIANTS = [Quadratic(canonical=canonical, discriminant=step) for canonical in (True, False) for step in (True, False)]


def written(task, examples):
    """Each row's fields as strings."""
    pieces = examples.input_ids.unflatten(1, (-1, task.segment_length))
    return [[task.decode(piece) for piece in row] for row in pieces.tolist()]


def value_of(polynomial: str, x: int) -> int:
    # an independent reading of what is written, by Python itself
    python = re.sub(r"\^", "**", polynomial.removesuffix("=0"))
    return eval(python, {"__builtins__": {}}, {"x": x})


def test_published_tokens_and_sizes():
    task = Quadratic()
    assert len(SIGNS) == 22
    assert (task.encode("0")[0], task.encode(";")[0], task.encode(",")[0]) == (2, 22, 23)
    assert task.fields == FIELDS
    assert task.examples(3).input_ids.shape == (3, 180)
    assert [len(each.fields) for each in VARIANTS] == [6, 5, 5, 4]


def test_every_step_is_true_and_follows_from_the_problem():
    task = Quadratic()
    examples = task.examples(600)
    kinds = set()
    for row, kind in zip(written(task, examples), examples.extra["roots"][:, 0].tolist(), strict=True):
        problem, canonical, discriminant, smaller, larger, roots = row
        # equal up to a factor at three points: the same equation
        factor = (value_of(problem, 1) + value_of(problem, -1)) / 2 - value_of(problem, 0)
        assert 1 <= abs(factor) <= 10
        assert all(value_of(problem, x) == factor * value_of(canonical, x) for x in (-1, 0, 1))
        sides = discriminant.removeprefix("D=").replace("^", "**").split("=")
        assert len({eval(side) for side in sides}) == 1
        square = eval(sides[1])
        kinds.add(kind)
        assert kind == (0 if square < 0 else 1 if square == 0 else 2)
        if square < 0:
            assert (smaller, larger, roots, len(sides)) == ("", "", "", 2)
            continue
        assert len(sides) == 3
        found = [int(root) for root in roots.split(",")]
        assert len(found) == kind
        assert found == sorted(set(found))
        assert all(value_of(problem, root) == 0 for root in found)
        for step, root in ((smaller, found[0]), (larger, found[-1])):
            left, right = step.removeprefix("x=").split("=")
            assert int(right) == eval(left) == root
        assert "-" in smaller.split("(")[1][1:]
    assert kinds == {0, 1, 2}


@pytest.mark.parametrize(
    ("factors", "text"),
    [
        ((1, -1, 0), "x^2-x=0"),
        ((-1, 0, 4), "-x^2+4=0"),
        ((3, 1, -1), "3*x^2+x-1=0"),
        ((-10, -1, 1), "-10*x^2-x+1=0"),
        ((2, 0, 0), "2*x^2=0"),
        ((1, 11, 10), "x^2+11*x+10=0"),
    ],
)
def test_monomials_leave_out_zeros_and_ones(factors, text):
    assert _equation(*factors) == text
    assert _coefficients(text) == factors


def test_labels_are_the_characters_and_the_end_of_every_field_but_the_first():
    task = Quadratic()
    examples = task.examples(50)
    ids, size = examples.input_ids, task.segment_length
    for field, (row_ids, asked) in enumerate(zip(ids.split(size, 1), examples.asked.split(size, 1), strict=True)):
        assert torch.equal(asked, (row_ids != PAD) & (field > 0))
        ends = row_ids == SIGNS.index(END) + FIRST_SIGN
        assert bool((ends.sum(1) == 1).all())
        # the end is the last that is not padding
        assert torch.equal(ends.long().argmax(1), (row_ids != PAD).sum(1) - 1)
    assert torch.equal(examples.place, torch.arange(1, 6).mul(size).expand(50, -1))
    assert torch.equal(examples.lag, examples.place)


def test_roots_kinds_and_multipliers_are_distributed_as_published():
    """Chi-square against trunc(U(-5, 5)), 4 : 1 and round(U(1, 10)), below the critical values at p = 0.001."""
    task, rows = Quadratic(bound=5), 20_000
    b, c = task._equations(rows, generator(3)).T
    square = b**2 - 4 * c
    solvable = square >= 0
    assert abs(float(solvable.double().mean()) - 0.8) < 0.01
    root = square[solvable].double().sqrt().round().long()
    assert torch.equal(root**2, square[solvable])
    both = torch.stack([(-b[solvable] - root) // 2, (-b[solvable] + root) // 2]).flatten()
    seen = (both + 4).bincount(minlength=9).double()
    expected = torch.tensor([1, 1, 1, 1, 2, 1, 1, 1, 1]) / 10 * len(both)
    assert float(((seen - expected) ** 2 / expected).sum()) < 26.12  # 8 degrees of freedom
    seen = b[~solvable].bincount(minlength=10).double()
    expected = len(b[~solvable]) / 10
    assert float(((seen - expected) ** 2 / expected).sum()) < 27.88  # 9 degrees of freedom
    shown = [_coefficients(row[0])[0] for row in written(task, task.examples(4000))]
    seen = torch.tensor(shown).add(10).bincount(minlength=21).double()
    halves = torch.tensor([1, *[2] * 8, 1, 0, 1, *[2] * 8, 1])
    expected = halves / halves.sum() * len(shown)
    used = halves > 0
    assert float(seen[~used].sum()) == 0
    assert float(((seen - expected)[used] ** 2 / expected[used]).sum()) < 43.82  # 19 degrees of freedom


def test_without_real_root_the_discriminant_is_below_zero_at_both_ends():
    task = Quadratic()
    b, c = task._unsolvable(100_000, generator(0)).T
    assert int((b**2 - 4 * c).max()) < 0
    assert int(c.max()) <= task.bound**2 - 1
    assert (int(b.min()), int(b.max())) == (0, 2 * task.bound - 1)
    # even at the narrowest every c is reached
    narrow = Quadratic(bound=3)
    b, c = narrow._unsolvable(5000, generator(0)).T
    assert set(c[b == 5].tolist()) == {7, 8}
    assert set(c[b == 4].tolist()) == {5, 6, 7, 8}


@pytest.mark.parametrize("task", [*VARIANTS, Quadratic(bound=2), Quadratic(bound=1000, segment_length=41)], ids=repr)
def test_the_oracle_is_always_right(task):
    examples = task.examples(300, "test")
    assert task.score(task.solve(examples), examples) == 1
    assert set(task.measures(task.solve(examples), examples).values()) == {1.0}


@pytest.mark.parametrize("field", range(5))
def test_what_a_single_field_tells(field):
    """Each field alone gives all the others, but the discriminant without the sign of b."""
    task = Quadratic()
    examples = task.examples(300)
    # only what has a real root, and a middle that is not 0
    equations = torch.tensor([_coefficients(row[0]) for row in written(task, examples)])
    examples = examples.take((examples.extra["roots"][:, 0] > 0) & (equations[:, 1] != 0))
    seen = torch.zeros_like(examples.asked)
    seen[:, field * 30 : field * 30 + 30] = True
    asked = ~seen & (torch.arange(180) >= 30) & (examples.input_ids != PAD)
    said = task.guess(examples.input_ids.masked_fill(~seen, 0), asked, seen, generator(0))
    right = ((said == examples.input_ids) | ~asked).all(1).double().mean()
    assert float(right) == 1 if FIELDS[field] != "discriminant" else 0.4 < float(right) < 0.6


def test_the_solver_reads_nothing_that_is_not_seen():
    task = Quadratic()
    examples = task.examples(40)
    seen = task.last(examples, 2) & ~examples.asked
    asked = examples.asked & (torch.arange(180) >= 150)
    noise = torch.randint(2, 24, examples.input_ids.shape)
    first = task.guess(examples.input_ids, asked, seen, generator(0))
    second = task.guess(torch.where(seen, examples.input_ids, noise), asked, seen, generator(0))
    assert torch.equal(first[asked], second[asked])


def test_floors_are_what_the_rules_give():
    floors = Quadratic().floors(1000)
    # nothing but empty fields, of three in five, for one equation in five
    assert abs(floors["own segment"] - 0.2 * 3 / 5) < 0.03
    assert abs(floors["majority"] - 0.2 * 3 / 5) < 0.03
    # all steps follow from the one before, but the smaller root: the sign of b is not in a discriminant
    zero = (4 + 198) / 200**2
    sign = 0.2 + 0.8 * (zero + (1 - zero) / 2)
    assert abs(floors["last segment"] - (4 + sign) / 5) < 0.015
    assert floors["last 2 segments"] == floors["oracle"] == 1
    assert Quadratic(discriminant=False).floors(200)["last segment"] == 1


@pytest.mark.parametrize("canonical", [True, False])
def test_uniform_counts_the_texts_that_are_possible(canonical):
    task = Quadratic(bound=4, canonical=canonical)
    texts = [set() for _ in task.fields[1:]]
    equations = {(-p - q, p * q) for p in range(-3, 4) for q in range(-3, 4)}
    equations |= {(b, c) for b in range(8) for c in range(16) if b * b < 4 * c}
    for b, c in equations:
        for known, text in zip(texts, task._texts(b, c, 1)[1:], strict=True):
            known.add(text)
    assert task.uniform == pytest.approx(sum(1 / len(known) for known in texts) / len(texts))


@pytest.mark.parametrize("bound", [2, 10, 31, 100, 317, 1000])
def test_no_field_is_longer_than_promised(bound):
    task = Quadratic(bound=bound, segment_length=60)
    examples = task.examples(1500)
    assert int((examples.input_ids != PAD).unflatten(1, (-1, 60)).sum(2).max()) <= task.longest
    extremes = [(-p - q, p * q) for p in (1 - bound, bound - 1) for q in (1 - bound, bound - 1)]
    extremes += [(2 * bound - 1, bound**2 - 1), (0, bound**2 - 1)]
    assert max(len(text) for b, c in extremes for text in task._texts(b, c, -10)) + 1 <= task.longest


def test_thirty_tokens_are_enough_for_the_published_bound():
    assert Quadratic().longest == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bound": 1}, "bound is 1"), ({"segment_length": 29}, "30 tokens"), ({"bound": 1000}, "segment_length is 30")],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Quadratic(**settings)
