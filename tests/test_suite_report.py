"""Tables and pictures of suites: the numbers are those of the records."""

from __future__ import annotations

import pytest

from mnemic.analysis.markdown import chance, merged, provenance
from mnemic.analysis.suite_pictures import colours, depth_tasks, draw_suite
from mnemic.analysis.suite_tables import by_case, floor, mechanisms_of, suites, tables
from mnemic.bench.results import Record, Score, records
from mnemic.controls import CONDITIONS
from mnemic.tasks.base import UNBOUND

QUESTIONS = 40


def outcomes(score, mechanism, metric):
    """Half as many questions are right with every control."""
    if metric != "%":
        nats = {"memory": score, **({} if mechanism == "none" else dict.fromkeys(CONDITIONS[1:], score + 1))}
        return {name: " ".join([f"{each:.6f}"] * QUESTIONS) for name, each in nats.items()}
    shares = {"memory": score, **({} if mechanism == "none" else dict.fromkeys(CONDITIONS[1:], score / 2))}
    right = {name: round(QUESTIONS * share) for name, share in shares.items()}
    return {name: "1" * count + "0" * (QUESTIONS - count) for name, count in right.items()}


def record(task, mechanism, seed, scores, metric="%"):
    found = [
        Score(
            length=length,
            tokens=64,
            examples=QUESTIONS,
            score=score,
            controls={} if mechanism == "none" else dict.fromkeys(CONDITIONS[1:], score / 2),
            floors={"uniform": 0.1, "own segment": 0.125, "last segment": 0.25, "sample of 8 tokens": 0.375},
            ceiling=1.0,
            details={f"depth from {start}": score * start / 80 for start in (0, 40, 80)} if task == "echo" else {},
            outcomes=outcomes(score, mechanism, metric),
        )
        for length, score in scores.items()
    ]
    made = Record(task, mechanism, "tiny", seed, {"task": {"n": 3, "along": 9}, "recipe": {"steps": 70}}, found)
    made.measures = {"axis": "along", "metric": metric, "parameters": 12_345}
    made.measures["cost"] = {"microseconds a token": 7.25, "with memory / base": 1.5}
    made.seconds = {"training": 61.0, "all": 72.0}
    made.state_bytes = 0 if mechanism == "none" else 4_096
    return made


@pytest.fixture
def folder(tmp_path):
    suite = tmp_path / "suite-mine"
    for seed in (0, 1):
        for mechanism, gain in (("none", 0.0), ("emt", 0.5), ("other", 0.25)):
            made = record("echo", mechanism, seed, {4: 0.2 + gain + 0.1 * seed, 8: 0.2 + gain / 2})
            made.save(suite, f"echo-{mechanism}-{seed}.json")
        record("speech", "emt", seed, {8: 1.25 + 0.25 * seed}, "bits per byte").save(suite, f"speech-{seed}.json")
    return tmp_path


def row(table, *words):
    return next(line for line in table.splitlines() if all(word in line for word in words)).split(" | ")


def test_scores(folder):
    table = tables(folder)["suite-mine"]
    own = ["25.0 (20.0-30.0)", "**75.0 (70.0-80.0)**", "**50.0 (45.0-55.0)**", "", "12.5"]
    assert row(table, "echo", " 4 ")[2:8] == ["2", *own]
    assert row(table, "echo", " 8 ")[3:6] == ["20.0", "**45.0**", "**32.5**"]
    assert "seeds 0, 1" in table
    assert "8 runs" in table


def test_rows_without_evidence_are_a_line(folder):
    """Speech is far above its floor in bits; with a floor of 40 % nothing of echo at 8 is more than a guess."""
    table = tables(folder)["suite-mine"]
    assert "| speech" not in table
    assert "Left out: 1 row without evidence in any cell, speech at 8. Of 1 scores there" in table
    for path in (folder / "suite-mine").glob("*.json"):
        made = Record.load(path)
        for score in made.scores:
            score.floors[UNBOUND] = 0.4
        made.save(path.parent, path.name)
    table = tables(folder)["suite-mine"]
    assert row(table, "echo", " 4 ")[5] == "50.0 (45.0-55.0)", "not at 1 %: 40 of 80 with a floor of 40 %"
    assert row(table, "echo", " 4 ")[6] == "40.0"
    assert "Left out: 2 rows without evidence in any cell, echo at 8; speech at 8. Of 3 scores there" in table
    assert "0 are no better than with another stream's memory, 3 no better than the best floor" in table


def test_both_tests_and_cost(folder):
    made = tables(folder)
    line = row(made["suite-mine-evidence"], "echo", " 4 ")
    assert line[2:4] == ["own segment, 12.5", "**<1e-9; <1e-9**"]
    assert row(made["suite-mine-evidence"], "speech")[3] == "<1e-9; -"
    assert "`none`" not in made["suite-mine-evidence"]
    assert row(made["suite-mine-cost"], "`emt`")[1:] == ["70", "61", "12,345", "4,096", "7.2", "1.50 |"]


def test_outcomes_that_are_not_known_are_no_evidence(folder):
    for path in (folder / "suite-mine").glob("echo-emt-*.json"):
        made = Record.load(path)
        for score in made.scores:
            score.outcomes = {}
        made.save(path.parent, path.name)
    made = tables(folder)
    assert row(made["suite-mine"], "echo", " 4 ")[4] == "75.0 (70.0-80.0)"
    assert row(made["suite-mine-evidence"], "echo", " 4 ")[3] == "not known"


def test_a_cell_of_fewer_seeds_says_so(folder):
    (folder / "suite-mine" / "echo-other-1.json").unlink()
    assert row(tables(folder)["suite-mine"], "echo", " 4 ")[5] == "**45.0, 1 seed**"


def test_floors_that_earlier_records_lack_are_counted(tmp_path):
    made = record("retrieval", "emt", 0, {4: 0.5, 1: 0.5})
    made.config |= {"task": {"pairs": 4}, "lengths": [4, 1]}
    made.measures["axis"] = "pairs"
    made.save(tmp_path / "suite-old")
    four, one = suites(tmp_path)["old"][0].scores
    assert four.floors[UNBOUND] == pytest.approx(0.383, abs=0.02)
    assert UNBOUND not in one.floors, "a single value"


def test_columns_that_are_equal_are_one():
    assert merged({"a": ["1", "2"], "b": ["1", "3"], "c": ["1", "2"]}) == {"a, c": ["1", "2"], "b": ["1", "3"]}
    assert [chance(each) for each in (1, 0.5, 0.0123, 1e-8, 1e-12)] == ["1.00", "0.50", "0.01", "1e-08", "<1e-9"]


def test_what_records_lack_is_said():
    old, new = Record("a", "b", "c", 0, {}, commit="1+changes"), Record("a", "b", "c", 0, {}, commit="1")
    new.digests = {"model": "x"}
    assert provenance([new]) == "All records are of committed code, and name model and texts by digests."
    assert provenance([old, new]) == (
        "1 of 2 records are from source trees with changes that were not committed. 1 of 2 records are earlier ones, "
        "which name no model and no texts by a digest."
    )


def test_a_suite_that_was_not_run(tmp_path):
    made = tables(tmp_path)
    assert "Not measured yet" in made["suite-cpu"]
    assert "Not measured yet" in made["suite-cpu-evidence"]


def test_floors_by_what_tasks_call_them():
    score = record("a", "emt", 0, {1: 0.5}).scores[0]
    assert [floor(score, name) for name in ("own segment", "last segment", "last 2 segments", "sample")] == [
        0.125,
        0.25,
        None,
        0.375,
    ]
    assert floor(score, "without binding") is None


def test_pictures(folder, tmp_path):
    found = records(folder / "suite-mine")
    assert mechanisms_of(found) == ["none", "emt", "other"]
    assert len(set(colours(found).values())) == 3
    assert len(by_case(found)) == 3
    assert depth_tasks(found) == ["echo"]
    first = draw_suite(found, tmp_path / "a", "mine")
    assert [path.name for path in first] == ["suite-mine.png", "suite-mine-pareto.png", "suite-mine-echo.png"]
    for path, again in zip(first, draw_suite(found, tmp_path / "b", "mine"), strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert path.stat().st_size > 10_000
    assert draw_suite([], tmp_path, "mine") == []


def test_one_mechanism_with_several_settings_has_a_column_for_each(tmp_path):
    suite = tmp_path / "suite-sizes"
    for size, steps, score in ((8, 70, 0.25), (16, 70, 0.5), (16, 90, 0.75)):
        made = record("echo", "emt", 0, {4: score})
        made.config |= {"memory": {"slots": size, "heads": 2}, "recipe": {"steps": steps}}
        made.save(suite, f"{size}-{steps}.json")
    plain = record("echo", "none", 0, {4: 0.125})
    plain.save(suite, "none.json")
    head, line = (row(tables(tmp_path)["suite-sizes"], *words) for words in (("task", "`none`"), ("echo", " 4 ")))
    assert head[3:7] == ["`none`", "`emt slots 16, steps 70`", "`emt slots 16, steps 90`", "`emt slots 8, steps 70`"]
    assert line[3:7] == ["12.5", "**50.0**", "**75.0**", "25.0"]
