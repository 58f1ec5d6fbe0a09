"""`mnemic tasks`, the pictures of examples and the tables of floors, on a task that is made for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import typer
from typer.testing import CliRunner

import generators
from mnemic.analysis.examples import COLUMNS, LINES, SEGMENTS, layout, picture, summary
from mnemic.bench.floors import measure
from mnemic.bench.results import Record
from mnemic.cli import app
from mnemic.cli.tasks import made, parsed
from mnemic.tasks import TASKS, Examples, Task, TaskCard
from mnemic.unrolling import IGNORED
from registered import floors, tables
from report import fill


@dataclass(frozen=True)
class Digit(Task):
    """A digit is told in the first segments and asked for in the last."""

    segments: int = 3
    segment_length: int = 6
    kind: Literal["plain", "odd"] = "plain"
    sizes: tuple[int, ...] = (1, 2)
    path: str | None = None

    axis = "segments"
    card = TaskCard("One digit", "Keep one digit.", "nobody, https://example.org")
    vocabulary = 12
    uniform = 0.1

    def __post_init__(self) -> None:
        if self.segments < 2:
            raise ValueError(f"segments is {self.segments}; use 2 or more")

    def draw(self, rows, generator, split="train"):
        asks = self.segment_length * (self.segments - 1)
        place = torch.randint(asks, (rows, 1), generator=generator)
        digit = torch.randint(10, (rows, 1), generator=generator)
        ids = torch.full((rows, asks + self.segment_length), 10).scatter_(1, place, digit)
        ids[:, asks], ids[:, asks + 1] = 11, digit[:, 0]
        labels, answer = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        labels[:, asks + 1], answer[:, asks + 1] = digit[:, 0], 0
        extra = {"place": place}
        return Examples(ids, labels, answer, place[:, None], torch.ones(rows, dtype=torch.long), extra)

    def guess(self, ids, asked, seen, generator):
        luck = torch.randint(10, ids.shape, generator=generator)
        told = torch.where(seen & (ids < 10), ids, -1).amax(1, keepdim=True)
        return torch.where(told >= 0, told, luck)

    def text(self, ids):
        return ["?" if each == 11 else "~" if each == 10 else str(each) for each in ids]


@pytest.fixture(autouse=True)
def digit(monkeypatch):
    monkeypatch.setattr(Digit, "name", "digit", raising=False)
    monkeypatch.setitem(TASKS, "digit", Digit)


def run(*words):
    return CliRunner().invoke(app, ["tasks", *map(str, words)], env={"COLUMNS": "120"})


# --- commands --------------------------------------------------------------------------------------------------------


def test_every_task_is_listed():
    found = run("list")
    assert found.exit_code == 0
    assert all(name in found.output for name in TASKS)
    assert "Keep one digit." in found.output


def test_an_example_is_shown_with_what_is_known_of_it():
    found = run("show", "digit", "--set", "segments=5", "--seed", 3)
    assert found.exit_code == 0, found.output
    examples = Digit(5).examples(1, "train", 3)
    told = f"{int(examples.evidence)}"
    for part in (
        "One digit (digit)",
        "5 segments of 6 tokens",
        "segment 4",
        "segments 5",
        told,
        f"{int(examples.lag)}",
    ):
        assert part in found.output
    assert f"? {int(examples.labels.max())}" in found.output
    assert run("show", "digit").output != found.output


def test_an_example_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = run("show", "digit", "--out", tmp_path / "new" / "digit.png")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "new" / "digit.png").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "nothing"), "choose one of"),
        (("show", "digit", "--set", "segmens=4"), "known are segments, segment_length, kind"),
        (("show", "digit", "--set", "segments"), "known are"),
        (("show", "digit", "--set", "segments=four"), "no whole number"),
        (("show", "digit", "--set", "segments=1"), "use 2 or more"),
        (("show", "digit", "--set", "kind=even"), "none of plain, odd"),
        (("floors", "digit", "--set", "segments=2,"), "no whole number"),
        (("floors", "nothing"), "choose one of"),
    ],
)
def test_what_cannot_be_is_refused(words, says):
    found = run(*words)
    assert found.exit_code == 2
    assert says in " ".join(found.output.replace("│", " ").split())


def test_floors_are_written_where_a_folder_is_named_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("floors", "digit", "--rows", 5).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_floors_are_printed_and_written(tmp_path):
    found = run("floors", "digit", "--rows", 50, "--set", "segments=2,40", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    assert "oracle" in found.output
    record = Record.load(tmp_path / "floors-digit.json")
    assert record.task == "floors-digit"
    assert [score.length for score in record.scores] == [2, 40]
    assert [score.tokens for score in record.scores] == [12, 240]
    assert [each["segments"] for each in record.config["settings"]] == [2, 40]
    near, far = record.scores
    assert near.ceiling == far.ceiling == 1.0
    assert near.floors["last segment"] == 1.0
    assert far.floors["last segment"] < 0.3
    assert near.floors["uniform"] == 0.1
    assert "oracle" not in near.floors


# --- settings from words ---------------------------------------------------------------------------------------------


def test_words_become_what_their_fields_are():
    assert parsed(int, "1_000") == 1000
    assert parsed(float, "0.5") == 0.5
    assert parsed(bool, "False") is False
    assert parsed(str, "7") == "7"
    assert parsed(Any, "bytes") == "bytes"
    assert parsed(int | None, "none") is None
    assert parsed(int | None, "7") == 7
    assert parsed(str | None, "seven") == "seven"
    assert parsed(int | str, "7") == 7
    assert parsed(tuple[int, ...], "1,2,3") == (1, 2, 3)
    assert parsed(tuple[float, float], "(0, 100)") == (0, 100)
    assert parsed(list[str], "a,b") == ["a", "b"]
    for kind, text in ((int, "1.5"), (float, "x"), (bool, "1"), (int | None, "x"), (Literal["a"], "b")):
        with pytest.raises(ValueError, match=text):
            parsed(kind, text)


def test_values_with_commas_are_all_combinations():
    tasks = made(Digit, ["segments=2,3", "segment_length=6,8", "sizes=4,5"], many=True)
    assert [(task.segments, task.segment_length) for task in tasks] == [(2, 6), (2, 8), (3, 6), (3, 8)]
    assert {task.sizes for task in tasks} == {(4, 5)}
    with pytest.raises(typer.BadParameter):
        made(Digit, ["segments=2,3"])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_made_from_its_settings_as_words(name):
    task = TASKS[name]()
    words = [f"{key}={value}" for key, value in task.settings().items()]
    assert made(TASKS[name], words) == [task]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_short_stream_is_laid_out_whole():
    task = Digit(4)
    examples = task.examples(1)
    rows = layout(task, examples)
    assert [row.title for row in rows] == ["segment 0", "segment 1", "segment 2", "segment 3"]
    cells = [cell for row in rows for cell in row.cells]
    assert [cell.text for cell in cells] == task.text(examples.input_ids[0].tolist())
    marks = [cell.mark for cell in cells]
    assert marks.index("evidence") == int(examples.evidence)
    assert marks.index("answer") == int(examples.place)
    assert marks.count("evidence") == marks.count("answer") == 1
    assert marks.count("padding") == 4
    assert "1 fact, 1 answer, lag" in summary(task, examples)


def test_of_a_long_stream_the_marked_places_are_laid_out():
    task = Digit(90, 1024)
    for number in range(5):
        examples = task.examples(1, number=number)
        rows = layout(task, examples)
        shown = [row for row in rows if row.cells]
        assert len(shown) <= SEGMENTS
        marks = [cell.mark for row in shown for cell in row.cells]
        assert {"evidence", "answer", "left out"} <= set(marks)
        assert marks.count("evidence") == marks.count("answer") == 1
        for row in shown:
            assert sum(cell.width + 1 for cell in row.cells) <= COLUMNS * LINES[True]
        # what is shown and what is said to be left out make the whole
        kept = sum(cell.mark != "left out" for row in shown for cell in row.cells)
        notes = [cell.text for row in shown for cell in row.cells if cell.mark == "left out"]
        missing = sum(int(note.strip(". ").replace(",", "")) for note in notes)
        assert kept + missing == 1024 * len(shown)
        segments = [int(row.title.strip(". ").split()[0]) for row in rows if not row.cells]
        assert sum(segments) + len(shown) == 90


def test_pictures_are_the_same_again(tmp_path):
    pytest.importorskip("matplotlib")
    one, two = (picture(Digit(), tmp_path / name) for name in ("new/one.png", "two.png"))
    data = one.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data == two.read_bytes()
    assert int.from_bytes(data[16:20], "big") >= 900
    assert picture(Digit(), tmp_path / "other.png", number=1).read_bytes() != data


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_can_be_laid_out(name):
    task = TASKS[name]()
    examples = task.examples(1)
    cells = [cell for row in layout(task, examples) for cell in row.cells]
    assert {"evidence", "answer"} <= {cell.mark for cell in cells}
    assert all(cell.text and "\n" not in cell.text for cell in cells)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_are_made_of_records_and_name_what_is_missing(tmp_path):
    record = measure([Digit(2), Digit(40)], rows=20)
    record.command = "mnemic tasks floors digit --out results"
    made_tables = tables(tmp_path)
    assert "no result file" in made_tables["floors-digit"]
    assert "| [`digit`](test_cli_tasks.md) | One digit | Keep one digit. | `segments` |" in made_tables["tasks"]
    record.save(tmp_path, "floors-digit.json")
    found = tables(tmp_path)["floors-digit"]
    assert "| `segments` | 2 | 40 |" in found
    assert "| tokens | 12 | 240 |" in found
    assert "| uniform | 10.0 | 10.0 |" in found
    assert "| oracle | 100.0 | 100.0 |" in found
    assert "In %, 20 test streams; `segment_length` 6, `kind` plain" in found
    assert found.endswith("Made by `mnemic tasks floors digit`.")
    page = tmp_path / "page.md"
    page.write_text("<!-- table:tasks -->\n<!-- /table -->\n<!-- table:floors-digit -->\n<!-- /table -->\n")
    assert fill(page, tables(tmp_path))
    assert not fill(page, tables(tmp_path), write=False)


def test_many_settings_are_rows():
    tasks = [Digit(segments, length) for length in (6, 8) for segments in (2, 3)]
    found = floors(measure(tasks, rows=20))
    assert found.startswith("| `segments` | `segment_length` | tokens | uniform | majority |")
    assert "\n| 3 | 8 | 24 | 10.0 |" in found


def test_one_setting_is_a_table_of_floors():
    found = floors(measure([Digit()], rows=20))
    assert found.startswith("| tokens | 18 |\n| --- | --- |\n| uniform | 10.0 |\n")


def test_a_record_holds_one_task():
    with pytest.raises(ValueError, match="none"):
        measure([])
    with pytest.raises(ValueError, match="digit, "):
        measure([Digit(), TASKS["retrieval"]()], rows=5)


def test_the_documentations_example_of_a_task_is_one(monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "tasks" / "index.md"
    first, own = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(first, {})
    # registered for the time of this test
    monkeypatch.setitem(TASKS, "first-token", Digit)
    exec(compile(own, "page", "exec", dont_inherit=True), {"__name__": "example"})
    task = TASKS["first-token"](segments=5)
    assert task.floors(rows=50)["oracle"] == 1.0
    assert task.floors(rows=50)["last segment"] < 0.4


def test_how_fast_streams_are_made(tmp_path, monkeypatch):
    """Every task is measured, against a model that is trained; the table gives what the record says."""
    monkeypatch.setattr(generators, "TASKS", {name: TASKS[name] for name in ("reverse", "rewrites")})
    told = {}
    record = generators.throughput(told.__setitem__, rows=4, runs=1, threads=1)
    assert set(told) == {"a model in training", "reverse", "rewrites"}
    speeds, model = record.measures["tokens a second"], record.measures["model, tokens a second"]
    assert all(speed > 0 for speed in (model, *speeds.values()))
    assert record.measures["generator / model"] == {name: speed / model for name, speed in speeds.items()}
    record.command = "mnemic --threads 2 bench generators --out results"
    record.save(tmp_path, "generators.json")
    table = generators.tables(tmp_path)["generators"]
    assert "Made by `python benchmarks/generators.py --out results`." in table
    assert f"| `reverse` | {speeds['reverse']:,.0f} | {speeds['reverse'] / model:,.0f} |" in table
