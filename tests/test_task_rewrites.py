"""Associative retrieval with rewrites, and pairs embedded in random characters."""

from __future__ import annotations

import pytest
import torch

from mnemic.tasks import rewrites
from mnemic.tasks.base import generator
from mnemic.tasks.rewrites import (
    ASK,
    BANG,
    BAR,
    COLON,
    CURRICULUM,
    EOS,
    GEN,
    SEP,
    EmbeddedTask,
    RewritesTask,
    distinct,
)
from task_checks import chi_square, critical


def parsed(task, examples):
    """Each stream by hand: the pairs as key and value, the key that is asked, its answer."""
    k, v, length = task.key_length, task.value_length, task.segment_length
    for row in examples.input_ids.tolist():
        cut = [row[start : start + length] for start in range(0, len(row), length)]
        assert all(len(each) == k + v + 2 and each[-1] == EOS for each in cut)
        assert [each[k] for each in cut] == [SEP] * task.pairs + [GEN]
        assert all(token < 16 for each in cut for token in each[:k] + each[k + 1 : -1])
        yield [(tuple(each[:k]), tuple(each[k + 1 : -1])) for each in cut[:-1]], tuple(cut[-1][:k]), cut[-1][k + 1 : -1]


# --- rewrites --------------------------------------------------------------------------------------------------------

UNIQUE = {"rewrite": False, "key_length": 2}

SETTINGS = [
    {},
    UNIQUE,
    {"pairs": 1, "value_length": 1},
    {"pairs": 16, "rewrite": False, "value_length": 3},
    UNIQUE | {"pairs": 256},
    UNIQUE | {"pairs": 40, "key_length": 5},
    {"pairs": 30, "key_length": 2},
    {"pairs": 30, "key_length": 2, "keys": 4},
    {"pairs": 5, "keys": 1},
    {"pairs": 100},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rules(settings):
    task = RewritesTask(**settings)
    examples = task.examples(50, "test", 3)
    most, length = 0, task.segment_length
    assert examples.input_ids.shape == (50, (task.pairs + 1) * length)
    for row, (pairs, key, answer) in enumerate(parsed(task, examples)):
        named = [each for each, _ in pairs]
        most = max(most, len(set(named)))
        last = max(place for place, each in enumerate(named) if each == key)
        assert answer == list(pairs[last][1])
        assert examples.evidence[row].tolist() == [[last * length]]
        assert examples.extra["age"][row].item() == task.pairs - last
        assert examples.extra["rewrites"][row].item() == named.count(key) - 1
        if not task.rewrite:
            assert len(set(named)) == task.pairs
    assert most <= (task.keys or 16**task.key_length)
    here = torch.zeros_like(examples.asked)
    here[:, -task.value_length - 1 : -1] = True
    assert torch.equal(examples.asked, here)
    assert torch.equal(examples.answer == 0, here)
    assert torch.equal(examples.labels[here], examples.input_ids[here])
    assert task.score(task.solve(examples), examples) == 1


def test_last_value_counts():
    task = RewritesTask(pairs=3, key_length=1, value_length=1, rewrite=True)
    ids = torch.tensor([[5, SEP, 1, EOS, 5, SEP, 2, EOS, 7, SEP, 3, EOS, 5, GEN, 0, EOS]])
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[0, -2] = True
    assert task.guess(ids, asked, ~asked, generator(0))[0, -2] == 2
    # the rewriting is not seen: the older value is the best guess; nor is that: any
    seen = ~asked
    seen[0, 4:8] = False
    assert task.guess(ids, asked, seen, generator(0))[0, -2] == 1
    seen[0, :4] = False
    said = {task.guess(ids, asked, seen, generator(seed))[0, -2].item() for seed in range(200)}
    assert said == set(range(16))


@pytest.mark.parametrize(("size", "count"), [(20, 20), (500, 10), (20, 2)])
def test_distinct_is_uniform(size, count):
    drawn = distinct(4000, count, size, generator(1))
    assert all(len(set(row)) == count for row in drawn.tolist())
    for place in (0, count - 1):
        assert chi_square(drawn[:, place].bincount(minlength=size)) < critical(size - 1)


def test_distinct_pairs_of_places_are_uniform():
    drawn = distinct(20000, 2, 20, generator(2))
    assert chi_square((drawn[:, 0] * 19 + drawn[:, 1] - (drawn[:, 1] > drawn[:, 0]).long()).bincount()) < critical(379)


@pytest.mark.parametrize("rewrite", [False, True])
def test_balance(rewrite):
    task = RewritesTask(pairs=8, key_length=1, value_length=1, rewrite=rewrite)
    examples = task.examples(6000)
    values = examples.labels[examples.asked]
    keys = examples.input_ids[:, -4]
    assert chi_square(values.bincount(minlength=16)) < critical(15)
    assert chi_square(keys.bincount(minlength=16)) < critical(15)
    assert chi_square((keys * 16 + values).bincount(minlength=256)) < critical(255)


def test_every_age_is_as_likely():
    examples = RewritesTask(pairs=20, **UNIQUE).examples(8000)
    assert chi_square(examples.extra["age"].flatten().bincount(minlength=21)[1:]) < critical(19)


def test_every_key_that_came_is_asked_as_often():
    # two keys, one came once and the other four times: half of the questions are for each
    task = RewritesTask(pairs=5, key_length=1, value_length=1, rewrite=True, keys=2)
    examples = task.examples(6000)
    key = examples.input_ids[:, :-4:4]
    came = (key == key[:, :1]).sum(1)
    uneven = (came == 1) | (came == 4)
    once = examples.extra["rewrites"][uneven, 0] == 0
    assert chi_square([once.sum(), (~once).sum()]) < critical(1)


def test_rewrites_happen_as_often_as_by_chance():
    task = RewritesTask(pairs=10, key_length=2, keys=16)
    keys = torch.stack(
        [torch.tensor([16 * a + b for (a, b), _ in pairs]) for pairs, _, _ in parsed(task, task.examples(2000))]
    )
    different = sum(len(set(row)) for row in keys.tolist()) / 2000
    # 16 (1 - (15/16)^10) = 7.609 keys come at least once; the mean of 2,000 is within .1 of it
    assert abs(different - 16 * (1 - (15 / 16) ** 10)) < 0.1


def test_no_answer_outside_the_evidence():
    # with the pair that counts taken away nothing tells the answer: what is said then is right as often as a guess
    task = RewritesTask(pairs=10, value_length=1, rewrite=False)
    examples = task.examples(10_000)
    seen = ~examples.asked
    for offset in range(task.segment_length):
        seen.scatter_(1, examples.evidence[:, 0] + offset, False)
    score = task.score(task.solve(examples, seen), examples)
    assert abs(score - 1 / 16) < 0.01  # 4 standard deviations
    # and no other segment names the key
    keys = examples.input_ids[:, :-4:4]
    assert int((keys == examples.input_ids[:, -4:-3]).sum()) == 10_000


def test_floors():
    floors = RewritesTask(pairs=10, value_length=1, **UNIQUE).floors(3000)
    assert floors["uniform"] == 1 / 16
    assert abs(floors["majority"] - 1 / 16) < 0.02
    assert floors["oracle"] == 1
    # what is remembered is right, all else a guess
    for name, known in (
        ("last segment", 0.1),
        ("last 2 segments", 0.2),
        ("sample of 5 tokens", 0.1),
        ("a told value", 0.1),
    ):
        assert abs(floors[name] - (known + (1 - known) / 16)) < 0.025, name
    assert list(floors)[-1] == "oracle"


def test_floors_of_rewriting():
    # one key only: a value that it had is right once in 5, or by chance, and the first value by chance only
    floors = RewritesTask(pairs=5, value_length=1, rewrite=True, keys=1).floors(3000)
    assert floors["last segment"] == 1
    assert abs(floors["a value of the key"] - (0.2 + 0.8 / 16)) < 0.03
    assert abs(floors["first value of the key"] - 1 / 16) < 0.02
    assert floors["a value of the key"] == pytest.approx(floors["a told value"], abs=0.03)


def test_measures():
    task = RewritesTask(pairs=3, key_length=1, value_length=1, rewrite=True)
    ids = torch.tensor([[5, SEP, 1, EOS, 5, SEP, 2, EOS, 7, SEP, 3, EOS, 5, GEN, 2, EOS]]).repeat(4, 1)
    like = task.examples(4)
    examples = type(like)(
        input_ids=ids,
        labels=torch.where(like.asked, ids, -100),
        answer=like.answer,
        evidence=torch.full((4, 1, 1), 4),
        facts=like.facts,
        extra={"age": torch.full((4, 1), 2), "rewrites": torch.ones(4, 1, dtype=torch.long)},
    )
    predicted = ids.clone()
    predicted[:, -2] = torch.tensor([2, 1, 3, 9])
    found = task.measures(predicted, examples)
    assert [found[name] for name in ("last", "earlier", "another", "never")] == [0.25] * 4
    assert found["exact match, rewritten"] == found["exact match, older half"] == 0.25
    assert "exact match, written once" not in found


def test_right_by_age():
    task = RewritesTask(pairs=4, rewrite=False)
    examples = task.examples(200)
    found = task.right_by(task.solve(examples, task.last(examples, 2)), examples)
    assert list(found) == [1, 2, 3, 4]
    assert found[1][0] == found[2][0] == 1
    assert found[3][0] < 0.2 > found[4][0]
    assert sum(count for _, count in found.values()) == 200
    assert list(task.right_by(examples.input_ids, examples, "rewrites")) == [0]
    with pytest.raises(ValueError, match="does not note 'colour'"):
        task.right_by(examples.input_ids, examples, "colour")


def test_curriculum():
    assert CURRICULUM == (1, 2, 3, 5, 10, 20, 30, 40, 50)
    for pairs in CURRICULUM:
        assert RewritesTask(pairs=pairs, **UNIQUE).examples(2).input_ids.shape[1] == (pairs + 1) * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"key_length": 0}, "key_length is 0"),
        ({"value_length": 9}, "value_length 9"),
        ({"pairs": 17, "rewrite": False}, "there are 16 keys"),
        ({"keys": 4, "rewrite": False}, "set rewrite=True"),
        ({"keys": 17}, r"1 \.\. 16"),
        ({"keys": 0}, "keys is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RewritesTask(**settings)


# --- embedded --------------------------------------------------------------------------------------------------------

EMBEDDED = [
    {},
    {"pairs": 96},
    {"pairs": 18, "segments": 2},
    {"pairs": 7, "key_length": 1, "value_length": 3, "segments": 2, "segment_length": 30},
    {"pairs": 1, "key_length": 3, "value_length": 1, "segments": 5, "segment_length": 32},
    {"pairs": 480, "segments": 60},
]


@pytest.mark.parametrize("settings", EMBEDDED, ids=str)
def test_embedded_rules(settings):
    task = EmbeddedTask(**settings)
    examples = task.examples(20, "test", 3)
    length, count = task.segment_length, task.segment_count
    assert examples.input_ids.shape == (20, (count + 1) * length)
    for row, ids in enumerate(examples.input_ids.tolist()):
        text = "".join(task.text(ids)).replace("<pad>", "")
        segments = [text[start : start + length] for start in range(0, len(text), length)]
        assert all(each[-1] == "|" and each.count("|") == 1 for each in segments)
        pairs, filler = {}, []
        for number, each in enumerate(segments[:-1]):
            # pairs open and close with the same mark, so every second piece is one
            pieces = each[:-1].split("!")
            assert len(pieces) % 2 == 1
            assert all(piece.isalnum() or not piece for piece in pieces[::2])
            for piece in pieces[1::2]:
                key, value = piece.split(":")
                assert (len(key), len(value)) == (task.key_length, task.value_length)
                assert key not in pairs
                pairs[key] = value, number, number * length + each.index(f"!{key}:")
            filler += pieces[::2]
        assert len(pairs) == task.pairs
        joined = "|".join(filler)
        assert not any(key in joined for key in pairs)
        key = segments[-1][2 : 2 + task.key_length]
        value, number, place = pairs[key]
        assert segments[-1] == f"?!{key}:{value}!|"
        assert examples.evidence[row].tolist() == [[place]]
        assert examples.extra["age"][row].item() == count - number
        assert "".join(task.text(examples.labels[row][examples.asked[row]].tolist())) == value
    assert task.score(task.solve(examples), examples) == 1


def test_no_filler_spells_a_key():
    task = EmbeddedTask(pairs=60, segments=8)
    for number in range(10):
        ids = task.examples(1000, "train", number).input_ids
        context = ids[:, : -task.segment_length]
        # filler is what is neither a mark nor in a pair: the marks open and close by turns
        opened = (context == BANG).cumsum(1) % 2 == 1
        filler = ~opened & (context < 62)
        named = torch.zeros(1000, 62 * 62, dtype=torch.bool)
        starts = (context == COLON).nonzero(as_tuple=True)
        named[starts[0], context[starts[0], starts[1] - 2] * 62 + context[starts[0], starts[1] - 1]] = True
        assert int(named.sum()) == 60_000
        spelt = (context[:, :-1] * 62 + context[:, 1:]).clamp(max=62 * 62 - 1)
        assert int((named.gather(1, spelt) & filler[:, :-1] & filler[:, 1:]).sum()) == 0


def test_embedded_balance():
    task = EmbeddedTask(pairs=8, segments=4, segment_length=40)
    examples = task.examples(6000)
    first = examples.labels[examples.asked].view(-1, 2)
    for place in (0, 1):
        assert chi_square(first[:, place].bincount(minlength=62)) < critical(61)
    assert chi_square(examples.extra["age"].flatten().bincount(minlength=5)[1:]) < critical(3)
    key = examples.input_ids[:, -38]
    assert chi_square(key.bincount(minlength=62)) < critical(61)
    # characters between the pairs, after the few that are drawn anew
    ids = examples.input_ids[:1000, :-40]
    filler = ids[((ids == BANG).cumsum(1) % 2 == 0) & (ids < 62)]
    assert chi_square(filler.bincount(minlength=62)) < critical(61)


def test_embedded_places_are_uniform():
    # one pair of 7 in a segment of 20: it begins at one of 13 places
    examples = EmbeddedTask(pairs=1, segments=1, segment_length=20).examples(6000)
    counts = examples.evidence.flatten().bincount(minlength=13)
    assert len(counts) == 13
    assert chi_square(counts) < critical(12)
    # two pairs: 5 characters and 2 pairs are 21 orders, each as likely
    ids = EmbeddedTask(pairs=2, segments=1, segment_length=20).examples(6000).input_ids[:, :20]
    opened = (ids == BANG).nonzero(as_tuple=True)[1].view(6000, 4)[:, ::2]
    counts = (opened[:, 0] * 20 + opened[:, 1]).bincount()
    assert len(counts[counts > 0]) == 21
    assert chi_square(counts[counts > 0]) < critical(20)


def test_embedded_solver_reads_only_what_is_seen():
    task = EmbeddedTask(pairs=16)
    examples = task.examples(200)
    ids, asked = examples.input_ids.masked_fill(examples.asked, 0), examples.asked
    seen = ~asked
    seen[:, -task.segment_length + 2] = False  # a character of the key
    assert task.score(task.guess(ids, asked, seen, generator(0)), examples) < 0.05
    seen = ~asked
    seen.scatter_(1, examples.evidence[:, 0] + 5, False)  # the last character of the value
    said = task.guess(ids, asked, seen, generator(0))
    right = (said == examples.labels)[asked].view(200, 2).double().mean(0)
    assert right[0] == 1
    assert right[1] < 0.1
    # the question itself does not tell its answer
    assert int((examples.input_ids[:, -task.segment_length :] == ASK).sum()) == 200
    assert bool((examples.input_ids[:, task.segment_length - 1] == BAR).all())


def test_embedded_floors():
    task = EmbeddedTask(pairs=16, value_length=1)
    floors = task.floors(2000)
    assert floors["uniform"] == 1 / 62
    assert floors["a told value"] == pytest.approx(1 / 16 + 15 / 16 / 62)
    # 4 segments, and every pair in any of them as likely
    for name, known in (("last segment", 0.25), ("last 2 segments", 0.5), ("sample of 64 tokens", 0.25)):
        assert abs(floors[name] - (known + (1 - known) / 62)) < 0.04, name
    assert floors["oracle"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"segments": 0}, "segments is 0"),
        ({"pairs": 481}, r"1 \.\. 480, or a key_length above 2"),
        ({"segment_length": 8}, "question needs 9"),
        ({"pairs": 19, "segments": 2}, "hold 18"),
        ({"key_length": 9}, "key_length is 9"),
    ],
)
def test_embedded_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedTask(**settings)


def test_readable():
    assert "".join(RewritesTask().text([0, 15, SEP, 10, EOS, GEN])) == "0fSEPaEOSGEN"
    assert "".join(EmbeddedTask().text([0, 61, BANG, COLON, BAR, ASK, rewrites.PAD])) == "A9!:|?<pad>"
