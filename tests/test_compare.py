"""Two mechanisms compared over the same questions: the numbers, the sentence, and what is refused."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from mnemic.analysis.comparison import compared, concluded, paired, terms
from mnemic.bench.results import Record, Score
from mnemic.bench.significance import differ, interval
from mnemic.cli import app


def record(mechanism, right, *, seed=0, count=100, task="reverse", length=4, streams=None, **config):
    """A record whose first `right` of so many questions are right."""
    outcomes = {"memory": "1" * right + "0" * (count - right), "other stream": "0" * count}
    score = Score(length, 8, count, right / count, {"other stream": 0.0}, {"uniform": 0.1}, None, {}, outcomes, streams)
    made = Record(task, mechanism, "tiny", seed, {"task": {"n": 3}, "test rows": count, "lengths": [length], **config})
    made.scores, made.measures = [score], {"axis": "length"}
    return made


def test_the_same_questions():
    found = compared([(record("a", 90), record("b", 70)), (record("a", 80, seed=1), record("b", 75, seed=1))])
    [only] = found
    assert (only.length, only.streams, only.seeds, only.gained, only.lost) == (4, 200, 2, 25, 0)
    assert only.p == differ(25, 0)
    assert only.scores == pytest.approx((0.85, 0.725))
    assert only.difference == pytest.approx(0.125)
    low, high = only.interval
    assert 0.06 < low < 0.125 < high < 0.19
    assert only.evidence == (True, True)
    assert concluded(("a", "b"), found).startswith(
        "a answers these questions better than b, by 12.5 points (a less b, 95 %"
    )


def test_the_interval_of_a_difference():
    """Agresti and Min: half a question is added to either kind that differ, one to those that do not."""
    gained, lost, count = 25, 5, 100
    differences = [1.0] * gained + [-1.0] * lost + [0.0] * (count - gained - lost)
    mean = (gained - lost) / (count + 2)
    error = ((gained + lost + 1) - (gained - lost) ** 2 / (count + 2)) ** 0.5 / (count + 2)
    assert interval(differences, shares=True) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error))
    low, high = interval([0.0] * 100, shares=True)
    assert low == -high < 0
    assert interval([0.5, 0.5], shares=False) == (0.5, 0.5)


def test_no_difference_is_not_called_one():
    found = compared([(record("a", 52), record("b", 50))])
    assert concluded(("a", "b"), found).startswith("No difference is shown between a and b: 2.0 points")
    weak = compared([(record("a", 9, count=400), record("b", 0, count=400))])
    assert weak[0].p < 0.01
    assert concluded(("a", "b"), weak).endswith("But neither score is evidence of a memory.")


def test_several_lengths_are_tested_more_strictly():
    one, other = record("a", 90), record("b", 82)
    for made, right in ((one, 40), (other, 90)):
        made.scores += record("", right, length=8).scores
    found = compared([(one, other)])
    assert found[0].p < 0.01
    assert found[0].p > 0.005
    assert (
        concluded(("a", "b"), found) == "b is better than a at 8; no difference is shown at 4 (2 tests, each at 0.005)."
    )


def test_streams_with_several_questions_are_one_each():
    [only] = compared([(record("a", 100, streams=25), record("b", 50, streams=25))])
    assert (only.streams, only.gained, only.lost) == (25, 13, 0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"task": "copy"}, "tasks reverse and copy"),
        ({"seed": 1}, "seeds 0 and 1"),
        ({"config": {"task": {"n": 4}}}, "n 3 and 4"),
        ({"config": {"test rows": 50}}, "100 and 50 streams"),
        ({"length": 8}, "no length in common"),
    ],
)
def test_other_questions_are_refused(other, said):
    theirs = record("b", 70, **{name: value for name, value in other.items() if name != "config"})
    theirs.config |= other.get("config", {})
    with pytest.raises(ValueError, match=said):
        compared([(record("a", 90), theirs)])


def test_other_questions_are_refused_by_their_digest():
    one, other = record("a", 90), record("b", 70)
    one.scores[0].questions, other.scores[0].questions = "12", "34"
    with pytest.raises(ValueError, match="did not answer the same questions at 4: digests 12 and 34"):
        compared([(one, other)])
    other.scores[0].questions = ""
    assert compared([(one, other)]), "an earlier record names none"
    other.scores[0].outcomes = {}
    with pytest.raises(ValueError, match="no outcomes"):
        compared([(one, other)])
    with pytest.raises(ValueError, match="nothing to compare"):
        compared([])


def test_mechanisms_of_a_suite():
    found = [record(name, 50, seed=seed) for name, seed in (("a", 0), ("a", 1), ("b", 1), ("c", 2))]
    assert {task: len(each) for task, each in paired(found, "a", "b").items()} == {"reverse": 1}
    assert paired(found, "a", "c") == {}
    with pytest.raises(ValueError, match="no 'd' among these records; there are a, b, c"):
        paired(found, "a", "d")
    other = record("b", 5, recipe={"steps": 2}, host={"width": 64})
    assert terms(record("a", 5, recipe={"steps": 1}, host={"width": 64}), other) == ["recipe: steps"]


def test_the_command(tmp_path):
    def run(*words):
        result = CliRunner().invoke(app, ["compare", *map(str, words)], env={"COLUMNS": "200"})
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    one, other = (record(name, right).save(tmp_path) for name, right in (("emt", 90), ("rmt", 70)))
    for words in ((one, other), (tmp_path, "emt", "rmt"), (tmp_path, "emt", "rmt", "--task", "reverse")):
        code, said = run(*words)
        assert code == 0, said
        assert "emt answers these questions better than rmt, by 20.0 points" in said
    for words, said in (
        ((one,), "name two files"),
        ((one, tmp_path / "no.json"), "name two files"),
        ((one, "emt", "rmt"), "is no folder"),
        ((tmp_path, "emt", "armt"), "no 'armt'"),
        ((tmp_path, "emt", "rmt", "--task", "copy"), "no task and seed in common"),
        ((one, record("emt", 90, seed=3).save(tmp_path)), "seeds 0 and 3"),
    ):
        code, output = run(*words)
        assert code == 2
        assert said in output
