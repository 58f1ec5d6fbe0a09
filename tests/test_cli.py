"""The command line, the tables and the pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import pytest
import typer
from typer.testing import CliRunner

import mnemic
import recall_facts
import registered
import report
from mnemic.analysis.curves import recall_curve
from mnemic.analysis.markdown import markdown
from mnemic.bench.recall import UNBOUND, Places, asked_for, places_of
from mnemic.bench.results import Record, Score
from mnemic.checkpoints import FetchError
from mnemic.cli import app, models
from mnemic.cli.show import Table, console
from mnemic.tasks import TASKS

pytestmark = pytest.mark.small  # what is tested of the oldest and newest typer, rich and matplotlib

CONTROLS = ("zeroed", "other stream", "fresh", "no memory")


def mnemic_command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def report_command(*words):
    return CliRunner().invoke(report.app, [str(word) for word in words])


QUESTIONS = 400


def score(places, asked, share, old=None):
    details = {"margin_nats": 1.0, "found_in_8_tokens": share, "tokens_until_value": 1.0, "state_bytes": 256}
    details |= {"asked": asked, **asdict(places)} | ({} if old is None else {"old": old})
    controls = {**dict.fromkeys(CONTROLS, 0.0625), "fresh": 0.07 + places.before / 400}
    floors = {"chance": 0.0625, UNBOUND: 0.3}
    outcomes = {name: right(each) for name, each in {"memory": share, **controls}.items()}
    return Score(places.fillers, 32 * places.total, QUESTIONS, share, controls, floors, 0.995, details, outcomes)


def right(share):
    """Outcomes of which so many are right."""
    count = round(QUESTIONS * share)
    return "1" * count + "0" * (QUESTIONS - count)


def record(seed=0, less=0.0):
    """Every kind of question at two amounts of filler, and one in any order; the more filler, the less is right."""
    scores = []
    for count, share in ((4, 0.9), (16, 0.8)):
        share -= less
        scores.append(score(Places(count, count, count), 0, share))
        scores += [score(Places(count, count, count, 2), asked, share - 0.1) for asked in (1, 2)]
        scores += [score(Places(count, count, count, 2, 2), asked, share - 0.2) for asked in (1, 2)]
        scores.append(score(Places(count, count, count, 2, 2), 3, share - 0.3, old=0.15))
    scores.append(score(Places(16, 16, 16, anywhere=True), 0, 0.7))
    return Record("recall-symbols", "emt", "tiny", seed, {}, scores, seconds={"training": 90.0}, command="mnemic demo")


@pytest.fixture
def root(tmp_path):
    """A tree with pages to fill and one result."""
    record().save(tmp_path / "results")
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- table:recall-symbols -->\n<!-- /table -->\n")
    (tmp_path / "docs" / "deep" / "page.md").write_text("<!-- table:mechanisms -->\nold\n<!-- /table -->\n")
    (tmp_path / "docs" / "plain.md").write_text("no table\n")
    return tmp_path


# --- pictures and tables ---------------------------------------------------------------------------------------------


def test_a_recall_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    one = recall_curve([record()], tmp_path / "new" / "one.png", "title")
    two = recall_curve([record(), record(1, 0.2)], tmp_path / "two.png", "title")
    for path in (one, two):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) > 10_000
        assert int.from_bytes(data[16:20], "big") > 900
    assert one.read_bytes() != two.read_bytes()
    assert recall_curve([record()], tmp_path / "again.png", "title").read_bytes() == one.read_bytes()


def test_fill_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table:a-b -->\nold\n<!-- /table -->\nmiddle\n<!-- table:c -->\n<!-- /table -->\nafter\n"
    )
    made = {"a-b": "| new |", "c": "| other \\1 |", "unused": "x"}
    assert report.fill(page, made) is True
    assert page.read_text() == (
        "before\n<!-- table:a-b -->\n\n| new |\n\n<!-- /table -->\nmiddle\n"
        "<!-- table:c -->\n\n| other \\1 |\n\n<!-- /table -->\nafter\n"
    )
    assert report.fill(page, made) is False, "filling again changes nothing"


def test_fill_without_write_leaves_the_file_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table:a -->\nold\n<!-- /table -->\n")
    assert report.fill(page, {"a": "new"}, write=False) is True
    assert page.read_text() == "<!-- table:a -->\nold\n<!-- /table -->\n"


def test_fill_with_a_table_that_nobody_makes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table:known -->\nold\n<!-- /table -->\n<!-- table:unknown -->\n<!-- /table -->\n")
    before = page.read_text()
    with pytest.raises(KeyError, match="unknown"):
        report.fill(page, {"known": "new"})
    assert page.read_text() == before


def test_tables_tell_the_numbers(tmp_path):
    for number in (record(0), record(1, 0.2)):
        number.save(tmp_path)
    made = recall_facts.tables(tmp_path) | registered.tables(tmp_path)
    short, full = made["recall-symbols"], made["recall-symbols-full"]
    four, sixteen = "80.0 (70.0-90.0)", "70.0 (60.0-80.0)"
    two, corrected = "70.0 (60.0-80.0)", "50.0 (40.0-60.0)"
    assert f"| 4 | 4 | **{four}** | **{two}** | **{two}** | **{corrected}** | 15.0 | 8.0 |" in short
    assert "| any | any | **70.0** | - | - | - | - | 11.0 |" in short
    assert "| zeroed, other stream, no memory | fresh |" in full, "what never differs is one column"
    assert f"| facts | 4 | - | 4 | 288 | **{four}** | 6.2 | 8.0 | 30.0 |" in full
    assert f"| facts | 16 | - | 16 | 1,056 | **{sixteen}** | 6.2 | 11.0 | 30.0 |" in full
    assert f"| corrected facts | 4 | 4 | 4 | 448 | **{corrected}** | 6.2 |" in full
    assert "| first facts, beside corrected | 4 | 4 | 4 |" in full
    for table in (short, full):
        assert f"Floors: chance 6.2; {UNBOUND} 30.0. Ceiling, everything in one window without a memory: 99.5." in table
        assert "Training: 1.5 minutes" in table
        assert "seeds 0, 1" in table
    assert "| 4 | 4 | 80.0 (70.0-90.0) | 1.00 |" in made["recall-symbols-claims"]
    assert "the score moves by 15.0 (10.0-20.0) points" in made["recall-symbols-claims"]
    assert "Not measured yet" in made["recall-language"]
    assert all(f"`{kind}`" in made["mechanisms"] for kind in mnemic.CONFIGS)


def test_recall_marks_what_is_evidence_and_prints_no_row_twice(tmp_path):
    made = record()
    for each in made.scores:
        each.floors[UNBOUND] = 0.62
        if places_of(each).before == 16 and asked_for(each) == "facts" and not places_of(each).anywhere:
            each.score, each.outcomes["memory"] = 0.9, right(0.9)  # as with 4
    made.save(tmp_path)
    found = recall_facts.tables(tmp_path)
    assert "| 4 | 4 | **90.0** | **80.0** | **80.0** | 60.0 | 15.0 | 8.0 |" in found["recall-symbols"]
    assert "| facts | 16 | - |" not in found["recall-symbols-full"]
    assert "that of a row above: facts with 16 of filler before and 16 after." in found["recall-symbols-full"]


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


# --- commands --------------------------------------------------------------------------------------------------------


def test_help_names_every_command():
    result = mnemic_command("--help")
    assert result.exit_code == 0
    assert all(word in result.output for word in ("demo", "list", "bench", "report"))
    result = mnemic_command("bench", "--help")
    assert result.exit_code == 0
    assert all(word in result.output for word in ("SUITE", "--memory", "--workers"))


def test_help_has_what_users_need_before_what_research_needs():
    output = mnemic_command("--help").output
    places = [output.index(f" {name} ") for name in ("chat", "train", "inspect", "demo", "list", "store")]
    research = output.index(" Research ")
    assert max(places) < research < min(output.index(f" {name} ", research) for name in ("bench", "tasks", "report"))


def test_help_and_list_do_not_wait_for_pytorch():
    code = "import json, sys\nfrom mnemic.cli import app\nfor words in {}: app(words, standalone_mode=False)\n"
    code = code.format([["--help"], ["bench", "--help"], ["chat", "--help"], ["store", "--help"], ["list"]])
    code += "print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "jaxtyping", "sqlalchemy", "matplotlib"}
    assert not heavy & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("width", [80, 40])
def test_lists_cut_nothing_off_in_a_narrow_terminal(monkeypatch, width):
    monkeypatch.setattr(console, "width", width)
    for command, kinds in (["list"], mnemic.CONFIGS), (["tasks", "list"], TASKS):
        result = mnemic_command(*command)
        assert result.exit_code == 0, result.output
        assert max(map(len, result.output.splitlines())) <= width
        whole = "".join(result.output.split())  # a word that is longer than its column goes on in the next line
        for name, kind in kinds.items():
            for text in (name, kind.card.title, kind.card.paper):
                assert "".join(text.split()) in whole, name


def test_a_table_folds_what_is_too_long(monkeypatch):
    monkeypatch.setattr(console, "width", 30)
    table = Table("name", "source")
    table.add_row("x" * 20, "y" * 20)
    with console.capture() as captured:
        console.print(table)
    assert (captured.get().count("x"), captured.get().count("y")) == (20, 20)


def test_report_fills_and_check_tells_what_is_stale(root):
    pytest.importorskip("matplotlib")
    options = ("--results", root / "results", "--root", root)
    before = (root / "README.md").read_text()
    result = report_command("--check", *options)
    assert result.exit_code == 1
    output = result.output.replace("\n", "")
    assert output.count("stale: ") == 2
    assert "README.md" in output
    assert (root / "README.md").read_text() == before
    assert not (root / "docs" / "images").exists(), "a check draws nothing"
    result = report_command(*options)
    assert result.exit_code == 0
    assert result.output.count("wrote: ") == 2
    assert "**90.0**" in (root / "README.md").read_text()
    assert "`emt`" in (root / "docs" / "deep" / "page.md").read_text()
    assert (root / "docs" / "images" / "recall.png").stat().st_size > 10_000
    assert not (root / "docs" / "images" / "recall-language.png").exists()
    result = report_command("--check", *options)
    assert (result.exit_code, result.output.strip()) == (0, "")
    record(0, 0.4).save(root / "results")
    assert report_command("--check", *options).exit_code == 1, "new results are not noticed"


def test_report_of_a_folder_prints_scores_beside_their_controls_and_writes_nothing(root, monkeypatch):
    monkeypatch.chdir(root)
    mine = root / "mine"
    record().save(mine / "deep")
    (mine / "other.json").write_text("[1]")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    result = mnemic_command("report", mine)
    assert result.exit_code == 0, result.output
    for words in ("recall-symbols, emt on tiny, seed 0, %", "memory", *CONTROLS, "floor: chance", "ceiling", "90.0"):
        assert all(word in result.output for word in words.split()), words
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    [path] = (mine / "deep").glob("*.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    result = mnemic_command("report", mine)
    assert result.exit_code == 1
    assert "edited: " in result.output
    path.unlink()
    result = mnemic_command("report", mine)
    assert result.exit_code == 2
    assert "holds no result file" in " ".join(result.output.replace("│", " ").split())


def test_report_of_no_checkout_says_what_it_wants(tmp_path):
    result = report_command("--root", tmp_path, "--results", tmp_path / "results")
    assert result.exit_code == 2
    assert "name others with --root" in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_two_files_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(registered, "tables", lambda results: {"recall-symbols": "another"})
    with pytest.raises(ValueError, match=r"registered.py makes the table 'recall-symbols', which another file makes"):
        report.every_table(tmp_path)


@pytest.mark.parametrize("command", [partial(mnemic_command, "demo"), partial(report_command, "--root", ".")])
def test_without_matplotlib_the_extra_is_named_before_anything_is_done(command, root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = sorted(root.rglob("*"))
    result = command()
    assert result.exit_code == 2
    assert "this needs matplotlib: pip install 'mnemic[plot]'" in result.output
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("option", ["--seeds", "--lengths"])
@pytest.mark.parametrize("value", ["one", "0,", "1.5", "0;1"])
def test_no_list_of_numbers(option, value, tmp_path):
    result = CliRunner().invoke(recall_facts.app, ["symbols", option, value, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "whole numbers" in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command():
    assert mnemic_command("forget").exit_code == 2


def test_every_command_takes_a_causal_model_by_the_name_that_fetch_knows(monkeypatch):
    def none(model):
        raise FetchError(f"nothing brings {model}")

    monkeypatch.setattr(models, "folder_of", none)
    found, apps = {}, {each.__name__: each.app for each in report.slices() if hasattr(each, "app")}
    for file, its in {"": app, **apps}.items():
        group = typer.main.get_command(its)
        for path, command in {(): group, **dict(commands(group))}.items():
            for parameter in command.params:
                if parameter.name == "model" and "encoder" not in (parameter.help or ""):
                    words = ["smollm2"] if parameter.param_type_name == "argument" else ["--model", "smollm2"]
                    result = CliRunner().invoke(its, [*path, *words])
                    found[" ".join((file, *path))] = result.exit_code == 2 and "nothing brings smollm2" in result.output
    assert {" chat", " train", "recall_facts language", "zero_shot", "language", "memoria_engrams"} <= found.keys()
    assert all(found.values()), found


def commands(group, path=()):
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from commands(command, (*path, name))


def test_a_refused_server_leaves_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mnemic_command("serve", tmp_path / "nowhere", "--memory", "recall")
    assert result.exit_code == 1, result.output
    assert list(tmp_path.iterdir()) == []
