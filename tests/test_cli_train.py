"""`mnemic train`: from text to a memory and the drift of its base, on a tiny model and small texts."""

from __future__ import annotations

import json
import math
import re
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mnemic
from helpers import SEGMENT, feed
from mnemic.bench.drift import hold_out
from mnemic.bench.results import Record, problems
from mnemic.cli import app
from mnemic.tasks import corpora
from mnemic.tasks.documents import tokenize
from runs import assert_same_memory, characters, cli_run, cli_words, finish, kill_until_done, prose, tiny_host
from trained import tables, told


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory):
    """A tiny model with a tokenizer of characters."""
    return tiny_host(tmp_path_factory.mktemp("host"))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose(4000))
    return path


def train(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_memory_is_trained_and_the_base_measured(host_folder, book, tmp_path):
    result = train(*cli_words(host_folder, book, tmp_path / "out"), "--results", tmp_path / "results")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "drift-emt-book-the-end-of-book-seed0.json"
    assert problems(path) == []
    record = Record.load(path)
    found = record.measures["perplexity"]
    assert list(found) == ["disabled", "untrained", "trained", "trained, zeroed", "trained, another stream's"]
    assert found["untrained"] == pytest.approx(found["disabled"], rel=1e-6), "a new memory changes nothing"
    assert len({round(value, 6) for name, value in found.items() if name != "untrained"}) == 4
    for name, value in found.items():
        assert f"{value:.3f}" in result.output, name
    assert f"{100 * (found['trained'] / found['disabled'] - 1):+.2f} %" in result.output
    assert record.measures["verdict"] in result.output
    assert [step for step, _ in record.measures["loss"]] == [1, 2, 3, 4, 5, 6]
    # the same numbers by hand: the end of the book in rows of two segments, each segment on its own
    _, ((_, text),) = hold_out([("book", prose(4000))])
    tokenizer = AutoTokenizer.from_pretrained(host_folder)
    known = tokenize(text, tokenizer)
    rows, sizes = (
        list(values[: len(known) // SEGMENT * SEGMENT].split(2 * SEGMENT)) for values in (known.ids, known.lengths)
    )
    places = range(len(rows) - (len(rows) % 4 == 1))  # the last would be alone in its batch
    model = AutoModelForCausalLM.from_pretrained(host_folder).eval()
    mnemic.from_pretrained(model, tmp_path / "out")
    for name, cache in (("trained", True), ("disabled", False)):
        nats = []
        for place in places:
            row = rows[place][None]
            if cache:
                logits = feed(
                    model, row, [SEGMENT] * (row.shape[1] // SEGMENT), carried=mnemic.memory_cache(model, SEGMENT)
                )
            else:
                with mnemic.attached(model).disabled(), torch.no_grad():
                    logits = torch.cat([model(part, use_cache=False).logits for part in row.split(SEGMENT, 1)], 1)
            nats.append(F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="none"))
        mean = torch.cat(nats).double().mean().item()
        assert found[name] == pytest.approx(math.exp(mean), rel=1e-5)
        scored = sum(int(sizes[place][1:].sum()) for place in places)
        bits = mean * len(torch.cat(nats)) / math.log(2) / scored
        assert record.measures["bits per byte"][name] == pytest.approx(bits, rel=1e-5)
    # and the documentation's table is made of it
    table = tables(tmp_path / "results")["drift"]
    assert f"| emt on {host_folder.name}, frozen | book | the end of book | {found['disabled']:.2f} |" in table


def test_a_base_that_trains_is_written_too(host_folder, book, tmp_path):
    words = cli_words(host_folder, book, tmp_path / "out", steps=1)
    assert train(*words, "--train-base", "--curriculum", "0:1,1:2", "--bf16").exit_code == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mnemic.from_pretrained(again, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(host_folder)
    assert not torch.equal(again.lm_head.weight, plain.lm_head.weight)
    described = Record.load(tmp_path / "out" / "drift.json").config
    assert (described["freeze"], described["stages"], described["bf16"]) == (False, [[0, 1], [1, 2]], True)


@pytest.mark.long
def test_a_killed_command_goes_on(tmp_path):
    """SIGKILL at random moments: the same curve, the same weights, the same drift."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(cli_run, straight)
    assert kill_until_done(cli_run, broken, kills=2) >= 1
    one, two = (json.loads((folder / "out" / "drift.json").read_text()) for folder in (straight, broken))
    assert len(one["measures"]["loss"]) == 8
    assert one["measures"] == two["measures"]
    assert_same_memory(broken / "out", straight / "out")


def test_a_run_that_is_there_is_not_written_over(host_folder, book, tmp_path):
    words = cli_words(host_folder, book, tmp_path / "out", steps=2)
    assert train(*words).exit_code == 0
    before = Record.load(tmp_path / "out" / "drift.json").measures
    result = train(*words)
    assert result.exit_code == 2
    assert "holds a run at step 2; resume it, or give another folder" in " ".join(
        result.output.replace("│", "").split()
    )
    result = train(*words, "--resume", "--segments", 3)
    assert result.exit_code == 2
    assert "was begun with segments 2, not 3" in " ".join(result.output.replace("│", "").split())
    # a finished run has nothing left to do
    assert train(*words, "--resume").exit_code == 0
    assert Record.load(tmp_path / "out" / "drift.json").measures == before


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_is_stopped_says_how_it_goes_on(host_folder, book, tmp_path, monkeypatch, saved):
    out = tmp_path / "out"

    def stop(*words, **more):
        if saved:
            (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(mnemic.Trainer, "train", stop)
    result = train(*cli_words(host_folder, book, out))
    assert result.exit_code == 130
    told = "the same command with --resume goes on" if saved else "stopped; nothing is saved yet"
    assert told in result.output


# --- texts -----------------------------------------------------------------------------------------------------------


def test_held_out_text():
    texts = [(str(number), "text") for number in range(20)]
    assert hold_out(texts) == (texts[:18], texts[18:])
    assert hold_out(texts[:3]) == (texts[:2], texts[2:3])
    assert hold_out([("one", "a" * 85 + "\n" + "b" * 7 + "\nc\nd")]) == (
        [("one", "a" * 85 + "\n" + "b" * 7)],
        [("the end of one", "\nc\nd")],
    )
    with pytest.raises(ValueError, match="one has no line end in its last 10%"):
        hold_out([("one", "a" * 100 + "\n")])


@pytest.mark.small
def test_datasets_on_the_disk(host_folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": [prose(400, seed) for seed in range(5)]})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "parted")
    (tmp_path / "lines").mkdir()
    rows.to_json(tmp_path / "lines" / "train.jsonl")
    wanted = [prose(400, seed) for seed in range(5)]
    for name in ("saved", "parted", "lines"):
        assert [text for _, text in corpora.published(str(tmp_path / name))] == wanted
        assert [text for _, text in corpora.published(str(tmp_path / name), documents=2)] == wanted[:2]
    with pytest.raises(ValueError, match="no split 'test'; choose one of train"):
        corpora.published(str(tmp_path / "parted"), "test")
    words = cli_words(host_folder, None, tmp_path / "out", steps=1)
    result = train(*words, "--dataset", tmp_path / "saved", "--documents", 3)
    assert result.exit_code == 0, result.output
    assert Record.load(tmp_path / "out" / "drift.json").measures["tokens"] > 200


def test_enwik8_from_where_it_is_published(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", "a" * 90 + "b" * 5 + "c" * 5)
    monkeypatch.setattr(corpora, "ENWIK8", str(tmp_path / "enwik8.zip"))
    assert corpora.published("enwik8") == [("enwik8 train", "a" * 90)]
    assert corpora.published("enwik8", "test") == [("enwik8 test", "c" * 5)]
    monkeypatch.setattr(corpora, "ENWIK8", str(tmp_path / "nothing.zip"))
    with pytest.raises(ConnectionError, match=r"cannot fetch .*get it by hand"):
        corpora.published("enwik8")


def test_where_the_usual_corpora_are(monkeypatch):
    asked = []
    monkeypatch.setattr(corpora, "from_hub", lambda *words, **more: asked.append((*words, more["documents"])) or [])
    for name in ("wikitext", "pg19", "some/set:part"):
        corpora.published(name, "train", 3)
    assert asked == [
        ("Salesforce/wikitext", "train", "wikitext-2-raw-v1", 3),
        ("emozilla/pg19", "train", None, 3),
        ("some/set", "train", "part", 3),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "wikitext"], "cannot load Salesforce/wikitext .* or give local text files"),
        ([], "give --data, a local text, or --dataset"),
        (["--data", "BOOK", "--dataset", "pg19"], "give --data, a local text, or --dataset"),
        (["--data", "BOOK", "--documents", "3"], "--documents counts those of a --dataset"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "BOOK", "--held-out", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--data", "BOOK", "--memory", "none"], "unknown memory kind 'none'; known: armt"),
        (["--data", "BOOK", "--set", "slot=3"], "EMTConfig has no setting slot"),
        (["--data", "BOOK", "--set", "slots"], "--set slots: write NAME=VALUE"),
        (["--data", "BOOK", "--curriculum", "0-1"], "--curriculum 0-1: write STEP:SEGMENTS"),
        (["--data", "BOOK", "--curriculum", "5:1"], r"give pairs of a step and a number of segments"),
        (["--data", "BOOK", "--set", "segment_length=5000"], "no document fills a segment of 5000 tokens"),
    ],
)
def test_what_cannot_be_run(host_folder, book, tmp_path, words, message):
    pytest.importorskip("datasets")
    words = [book if word == "BOOK" else word for word in words]
    result = train("train", host_folder, "--set", "segment_length=8", "--out", tmp_path / "out", *words)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", "").split())
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists(), "something was written"


def test_no_such_model(book, tmp_path):
    result = train("train", "no/such-model", "--data", book, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no/such-model" in result.output


def test_without_accelerate_the_error_names_the_extra(book, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = train("train", "model", "--data", book)
    assert result.exit_code == 2
    assert "mnemic[train]" in result.output


def test_tokenizing_tells_how_far_it_is():
    told: list[int] = []
    tokenize(prose(1000), characters(), chunk=300, advance=told.append)
    assert sum(told) == 1000
    assert len(told) > 1


def test_held_out_text_of_one_row_is_refused_before_the_run(host_folder, book, tmp_path):
    """Nothing could be compared with another stream's memory."""
    few = tmp_path / "few.txt"
    few.write_text(prose(SEGMENT * 2))
    result = train(*cli_words(host_folder, book, tmp_path / "out"), "--held-out", few)
    assert result.exit_code == 2
    assert "give more of it (--held-out)" in " ".join(result.output.replace("│", "").split())
    assert not (tmp_path / "out").exists()


def test_what_a_run_will_cost_is_said_at_its_start(host_folder, book, tmp_path):
    result = train(*cli_words(host_folder, book, tmp_path / "out", steps=1))
    assert result.output.startswith("1 steps of 4 rows of 2 segments of 8 tokens: at most 64 tokens")


def test_lessons(host_folder, tmp_path):
    """Copying and told things from the command line: what is remembered, under every control, and going on."""
    text = tmp_path / "book.txt"
    text.write_text(prose(60_000))
    words = ["train", host_folder, "--memory", "fast-weights", "--set", "segment_length=160", "--set", "dim=16"]
    words += ["--lessons", "copying:2,1x2:2", "--rows", 2, "--test-rows", 4, "--data", text, "--out", tmp_path / "out"]
    result = train(*words, "--until", 1)
    assert result.exit_code == 0, result.output
    assert [place for place, *_ in Record.load(tmp_path / "out" / "told.json").measures["loss"]] == [1]
    result = train(*words, "--resume")
    assert result.exit_code == 0, result.output
    record = Record.load(tmp_path / "out" / "told.json")
    assert [score.details["facts"] for score in record.scores] == [1, 4, 4, 1]
    assert set(record.scores[0].controls) == {
        *("other stream", "zeroed", "fresh", "no memory"),
        "everything in the window",
        "text retrieval",
    }
    assert [score.floors for score in record.scores[:2]] == [
        {"a told value at random": 1.0},
        {"a told value at random": 0.25},
    ]
    assert [place for place, *_ in record.measures["loss"]] == [1, 2, 3, 4]
    assert problems(tmp_path / "out" / "told.json") == []
    more = [*words[:-1], tmp_path / "more", "--begin", tmp_path / "out", "--questions", 2, "--until", 1]
    result = train(*more)
    assert result.exit_code == 0, result.output
    begun = Record.load(tmp_path / "more" / "told.json")
    assert begun.config["begin"] | {"test_rows": 4} == record.config
    assert "| 4 + 1 |" in told([begun])
    changed = {"dim=16": "dim=32", tmp_path / "more": tmp_path / "other"}
    result = train(*[changed.get(each, each) for each in more])
    assert "begin with the settings that shape them" in " ".join(result.output.replace("│", "").split())
    assert "resume it, or give another folder" in " ".join(train(*words).output.replace("│", "").split())
    assert train(*words, "--resume").exit_code == 0
    assert Record.load(tmp_path / "out" / "told.json").measures == record.measures
    changed = train(*words, "--resume", "--rows", 4)
    assert "was begun with rows 2, not 4" in " ".join(changed.output.replace("│", "").split())
