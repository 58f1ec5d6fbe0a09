"""Tables and pictures of suites: the numbers are those of the records."""

from __future__ import annotations

import pytest

from mnemic.analysis.suite_pictures import colours, depth_tasks, draw_suite
from mnemic.analysis.suite_tables import CONTROLS, by_case, floor, mechanisms_of, tables
from mnemic.bench.results import Record, Score


def record(task, mechanism, seed, scores, metric="%"):
    found = [
        Score(
            length=length,
            tokens=64,
            examples=8,
            score=score,
            controls={} if mechanism == "none" else dict.fromkeys(CONTROLS, score / 2),
            floors={"uniform": 0.1, "own segment": 0.125, "last segment": 0.25, "sample of 8 tokens": 0.375},
            ceiling=1.0,
            details={f"depth from {start}": score * start / 80 for start in (0, 40, 80)} if task == "echo" else {},
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
    assert row(table, "echo", " 4 ")[2:6] == ["25.0 (20.0-30.0)", "75.0 (70.0-80.0)", "50.0 (45.0-55.0)", "12.5"]
    assert row(table, "echo", " 8 ")[2:5] == ["20.0", "45.0", "32.5"]
    assert row(table, "speech (bits per byte)")[2:4] == ["", "1.375 (1.250-1.500)"]
    assert "seeds 0, 1" in table
    assert "8 runs" in table


def test_controls_and_cost(folder):
    made = tables(folder)
    assert row(made["suite-mine-controls"], "echo", " 4 ", "`emt`")[3:5] == ["**75.0 (70.0-80.0)**", "37.5 (35.0-40.0)"]
    assert "`none`" not in made["suite-mine-controls"]
    assert row(made["suite-mine-cost"], "echo", "`emt`")[2:] == ["70", "61", "12,345", "4,096", "7.2", "1.50 |"]


def test_a_suite_that_was_not_run(tmp_path):
    made = tables(tmp_path)
    assert "Not measured yet" in made["suite-cpu"]
    assert "Not measured yet" in made["suite-cpu-controls"]


def test_floors_by_what_tasks_call_them():
    score = record("a", "emt", 0, {1: 0.5}).scores[0]
    assert [floor(score, name) for name in ("own segment", "last segment", "last 2 segments", "sample")] == [
        0.125,
        0.25,
        None,
        0.375,
    ]


def test_pictures(folder, tmp_path):
    from mnemic.bench.results import records

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
    assert head[2:6] == ["`none`", "`emt slots 16, steps 70`", "`emt slots 16, steps 90`", "`emt slots 8, steps 70`"]
    assert line[2:6] == ["12.5", "50.0", "75.0", "25.0"]
