"""The measurements: records, curricula, an experiment from beginning to end, and what a stream without end holds."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

import endless_stream
import mnemic
import report
import timing
from families import make
from mnemic.bench import results
from mnemic.bench.experiments import Curriculum, Experiment, LanguageCurriculum, Recipe
from mnemic.bench.recall import Places, asked_for
from mnemic.bench.results import Record, Score, digest, problems, records
from mnemic.tasks.base import generator
from mnemic.tasks.facts import SymbolRecall
from mnemic.training import Step
from mnemic.unrolling import IGNORED
from recalls import language

CONTROLS = {"zeroed", "other stream", "fresh", "no memory"}
TASK = SymbolRecall(segment_length=16, pairs=2)
CONFIG = mnemic.EMTConfig(slots=4, dim=16, heads=2, segment_length=16)
RECIPE = Recipe(steps=5, rows=8, pool=32)


def step(*right, rows=None):
    """A step whose labelled tokens were right or wrong."""
    correct = torch.tensor(right, dtype=torch.bool)
    rows = torch.arange(len(right)) if rows is None else torch.tensor(rows)
    return Step(0, 1.0, correct.float().mean().item(), 0.1, 1.0, correct, rows)


# --- records ---------------------------------------------------------------------------------------------------------


def record(seed=3, task="recall-symbols"):
    outcomes = {"memory": "1110111111", "zeroed": "0100000000"}
    score = Score(4, 128, 10, 0.9, {"zeroed": 0.1}, {"chance": 0.1}, 1.0, {"margin_nats": 2.5}, outcomes)
    return Record(task, "emt", "tiny", seed, {"slots": 4}, [score], {"a": [1, 2]}, 256, {"training": 1.5})


def test_a_record_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnemic", "demo"])
    saved = record()
    path = saved.save(tmp_path / "new")
    assert path == tmp_path / "new" / "recall-symbols-emt-seed3.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name], "something temporary was left"
    loaded = Record.load(path)
    assert loaded == saved
    assert isinstance(loaded.scores[0], Score)
    assert loaded.command == "mnemic demo"
    assert loaded.versions["torch"] == torch.__version__.split("+")[0] or loaded.versions["torch"] in torch.__version__
    assert loaded.machine["torch_threads"] == torch.get_num_threads()
    assert loaded.written.endswith("Z")


def test_records_of_one_task(tmp_path):
    for seed, task in ((2, "b"), (1, "b"), (0, "a")):
        record(seed, task).save(tmp_path)
    record(7, "b").save(tmp_path, "named.json")
    assert [found.seed for found in records(tmp_path)] == [0, 1, 2, 7]
    assert [found.seed for found in records(tmp_path, "b")] == [1, 2, 7]
    assert records(tmp_path / "none") == []


def test_the_command_names_no_folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("x")
    typed = ["/usr/bin/mnemic", "bench", "stream", "--out", str(tmp_path), str(tmp_path / "text.txt"), "--tokens", "9"]
    monkeypatch.setattr(sys, "argv", typed)
    assert results.command() == f"mnemic bench stream --out {tmp_path.name} text.txt --tokens 9"


@pytest.mark.parametrize("form", ["--out={}/new", "--out={}", "{}/new"])
def test_the_command_names_no_folder_in_any_form(form, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnemic", "bench", "stream", form.format(tmp_path)])
    assert str(tmp_path.parent) not in results.command()


# --- curricula -------------------------------------------------------------------------------------------------------


def test_streams_grow_only_above_the_pass_mark():
    recipe = Recipe(steps=1, pass_mark=0.9, longest=5, growth=2.0, pool=8)
    curriculum, grown = Curriculum(TASK, recipe, 0), []
    for _ in range(44):
        curriculum.advance(step(True, True))
    assert curriculum.notes["longest"] == 0, "1 - 0.95^44 lies below 0.9"
    curriculum.advance(step(True, True))
    assert curriculum.notes == {"longest": 1.0, "accuracy": pytest.approx(0.85)}
    for _ in range(200):
        curriculum.advance(step(True, True))
        grown.append(curriculum.notes["longest"])
    assert sorted(set(grown)) == [1, 2, 4, 5]
    stuck = Curriculum(TASK, recipe, 0)
    for _ in range(500):
        stuck.advance(step(*[True] * 8, *[False] * 2))
    assert stuck.notes["longest"] == 0
    assert stuck.notes["accuracy"] == pytest.approx(0.8)


def test_a_step_has_the_same_batch_again():
    recipe = Recipe(steps=1, rows=8, pool=8)
    one, same, third = (Curriculum(TASK, recipe, seed) for seed in (0, 0, 1))
    for number in (0, 1):
        assert torch.equal(one.batch(number).input_ids, same.batch(number).input_ids)
        assert not torch.equal(one.batch(number).input_ids, third.batch(number).input_ids)
    assert not torch.equal(one.batch(0).input_ids, one.batch(1).input_ids)


def test_long_streams_come_in_smaller_batches():
    curriculum = Curriculum(TASK, Recipe(steps=1, rows=8, longest=30, several=0.0, segments=24, pool=8), 0)
    curriculum.notes["longest"] = 30.0
    seen = {}
    for number in range(60):
        rows, width = curriculum.batch(number).input_ids.shape
        seen[width // 16 - 2] = rows
    assert min(seen) == 0
    assert 20 < max(seen) <= 30
    assert seen == {count: max(2, min(8, 24 // (count + 1))) for count in seen}


def test_facts_lie_in_two_segments_once_one_is_remembered():
    curriculum = Curriculum(TASK, Recipe(steps=1, pool=8), 0)
    source = generator(1)
    assert {curriculum.told(source) for _ in range(40)} == {(1, 0)}
    curriculum.notes["longest"] = 1.0
    drawn = Counter(curriculum.told(source) for _ in range(400))
    assert set(drawn) == {(1, 0), (2, 0), (2, 1), (2, 2)}
    assert drawn[1, 0] == pytest.approx(200, abs=40)
    assert drawn[2, 0] == pytest.approx(100, abs=35)


def test_sentences_go_through_three_stages():
    task = language()
    curriculum = LanguageCurriculum(task, Recipe(steps=1, rows=12, pass_mark=0.9, pool=8), 0)
    notes = curriculum.notes
    batch = curriculum.batch(0)
    assert batch.input_ids.shape == (4, 128), "recitations alone, a third of the rows"
    assert ((batch.labels != IGNORED).sum(1) == 4).all(), "two names and two things each"
    for _ in range(49):
        curriculum.advance(step(True))
    assert notes["stage"] == 0
    curriculum.advance(step(True))
    assert (notes["stage"], notes["names"], notes["accuracy"]) == (1, 0, 0.5)
    batch = curriculum.batch(1)
    assert batch.input_ids.shape == (12, 128), "facts and question"
    assert (batch.labels != IGNORED).sum(1).tolist() == [1] * 10 + [4] * 2
    for _ in range(300):
        curriculum.advance(step(False, True, rows=[9, 10]))
    assert (notes["stage"], notes["names"]) == (1, 0), "a recitation counted as an answer"
    for _ in range(300):
        curriculum.advance(step(True, False, rows=[9, 10]))
        if notes["stage"] == 2:
            break
    assert (notes["stage"], notes["names"], notes["longest"]) == (2, 5, 0)
    for _ in range(60):
        curriculum.batch(2)
        curriculum.advance(step(True))
    assert notes["longest"] >= 1
    asked = [curriculum.batch(number) for number in range(3, 30)]
    assert {batch.input_ids.shape[1] // 64 for batch in asked} >= {2, 3, 4}, "one or two segments of facts, and filler"
    assert {int((batch.labels != IGNORED).sum()) for batch in asked} == {12, 10 + 2 * 4}, "two segments are not recited"


# --- from beginning to end -------------------------------------------------------------------------------------------


class Heard:
    """A reporter that remembers."""

    def __init__(self):
        self.phases, self.steps, self.scores = [], [], []

    def phase(self, name, total):
        self.phases.append((name, total))
        self.steps.append(0)

    def advance(self, steps, **values):
        self.steps[-1] += steps

    def score(self, score):
        self.scores.append(score)


def test_an_experiment_makes_a_record(tmp_path):
    heard, model = Heard(), make("gpt2")
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    experiment = Experiment(TASK, CONFIG, RECIPE, (Places(), Places(2, 0, 1, segments=2)), rows=8, batch=5, seed=4)
    attachment, made = experiment.run(model, "tiny GPT-2", heard, tmp_path / "run.safetensors")
    assert (made.task, made.mechanism, made.host, made.seed) == ("recall-symbols", "emt", "tiny GPT-2", 4)
    assert made.config["memory"] == CONFIG.to_dict()
    assert made.config["recipe"]["steps"] == 5
    assert made.state_bytes == 4 * 16 * 4
    assert [asked_for(score) for score in made.scores] == ["facts", "first facts", "second facts"]
    assert [(score.length, score.tokens, score.examples) for score in made.scores] == [(0, 16, 16), *[(3, 80, 16)] * 2]
    for score in made.scores:
        assert set(score.controls) == CONTROLS
        assert score.score == score.outcomes["memory"].count("1") / 16
        assert all(len(outcome) == 16 for outcome in score.outcomes.values())
    assert set(made.seconds) == {"training", "evaluation"}
    assert min(made.seconds.values()) > 0
    assert heard.phases == [("train the memory", 5), ("ask", 8 * 6)]
    assert heard.steps == [5, 48]
    assert heard.scores == made.scores
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])
    torch.manual_seed(4)
    untrained = mnemic.attach(make("gpt2"), CONFIG).memory.state_dict()
    assert any(not torch.equal(t, untrained[name]) for name, t in attachment.memory.state_dict().items())
    loaded = Record.load(made.save(tmp_path))
    assert [score.outcomes for score in loaded.scores] == [score.outcomes for score in made.scores]
    # what was finished is measured again to the same outcomes
    _, again = experiment.run(make("gpt2"), "tiny GPT-2", None, tmp_path / "run.safetensors")
    assert [score.outcomes for score in again.scores] == [score.outcomes for score in made.scores]


def test_an_experiment_is_reproducible():
    pairs = [
        Experiment(TASK, CONFIG, RECIPE, (Places(after=1),), rows=4, seed=2).run(make("gpt2"), "tiny") for _ in range(2)
    ]
    (one, first), (two, second) = pairs
    for name, tensor in one.memory.state_dict().items():
        assert torch.equal(tensor, two.memory.state_dict()[name]), name
    assert first.scores[0].outcomes == second.scores[0].outcomes


def test_an_experiment_tests_on_the_test_task():
    asked = []

    class Watched(SymbolRecall):
        def tell(self, rows, *given, **more):
            asked.append(rows)
            return super().tell(rows, *given, **more)

    experiment = Experiment(TASK, CONFIG, RECIPE, (Places(),), rows=4, test_task=Watched(16, 2))
    experiment.run(make("gpt2"), "tiny")
    assert asked == [4, 4], "once for the streams, once for the ceiling"


# --- cost ------------------------------------------------------------------------------------------------------------


def test_ratio_pairs_runs():
    times = {"memory": [2.0, 3.0, 10.0], "base": [1.0, 2.0, 2.0]}
    assert timing.ratio(times, "memory", "base") == {"median": 2.0, "least": 1.5, "most": 5.0}
    with pytest.raises(ValueError, match="shorter"):
        timing.ratio({"memory": [1.0, 2.0], "base": [1.0]}, "memory", "base")


def test_alternate_takes_turns(monkeypatch):
    called = []
    monkeypatch.setattr(timing, "seconds_of", lambda function: function() or float(len(called)))
    times = timing.alternate({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert "".join(called) == "ab" + "ababab", "one call each that is not counted, then turns"
    assert times == {"a": [3, 5, 7], "b": [4, 6, 8]}


def test_an_endless_stream_holds_no_more():
    advanced = []
    made = endless_stream.endless(4000, window=64, progress=advanced.append)
    measures = made.measures
    assert (measures["tokens"], sum(advanced)) == (4000, 4000)
    assert measures["calls"] == measures["calls with finite logits"] == len(advanced) == math.ceil(4000 / 101)
    assert measures["state finite"] is True
    assert made.state_bytes == 64 * 256 * 4
    trail = [(point["tokens"], point["session_bytes"]) for point in measures["trail"]]
    assert trail[-1][0] == 4000
    assert len(trail) >= 15
    # where a segment stands decides what waits and which keys are kept; how much was read before does not
    by_place = {}
    for seen, size in trail:
        by_place.setdefault(seen % 16, set()).add(size)
    assert 1 < len(by_place) < len(trail)
    assert all(len(sizes) == 1 for sizes in by_place.values())
    most = made.state_bytes + 16 * 64 * 4 + 3 * 2 * 64 * (64 + 16) * 4
    assert max(size for _, size in trail) <= most


def test_resident_bytes():
    held = timing.resident_bytes()
    assert held is None or held > 10_000_000


def test_a_result_that_was_edited(tmp_path):
    """By its digest, and by its own outcomes where somebody made the digest anew."""
    score = Score(4, 64, 4, 0.75, {"zeroed": 0.25}, {}, None, {}, {"memory": "1101", "zeroed": "1000"})
    path = Record("a", "emt", "tiny", 0, {}, [score]).save(tmp_path)
    assert problems(path) == []
    values = json.loads(path.read_text())
    values["scores"][0]["controls"]["zeroed"] = 0.0
    path.write_text(json.dumps(values))
    assert [problem.split(" says")[0] for problem in problems(path)] == ["the digest does not fit", "zeroed at 4"]
    values["digest"] = digest(values)
    path.write_text(json.dumps(values))
    assert problems(path) == ["zeroed at 4 says 0.0000, its outcomes come to 0.2500"]
    values["scores"][0]["controls"]["zeroed"] = 0.25
    values["seconds"] = {"training": 1.0}
    path.write_text(json.dumps(values))
    assert problems(path) == ["the digest does not fit"]
    (tmp_path / "docs").mkdir()
    result = CliRunner().invoke(report.app, ["--check", "--results", str(tmp_path), "--root", str(tmp_path)])
    assert result.exit_code == 1
    assert "edited" in result.output


def test_scores_that_are_no_shares(tmp_path):
    bits = Score(8, 64, 2, 1.5 / math.log(2) / 4, {}, {}, None, {"bytes a labelled token": 4.0}, {"memory": "1.0 2.0"})
    assert problems(Record("a", "emt", "tiny", 0, {}, [bits]).save(tmp_path)) == []
    f1 = Score(8, 64, 4, (2 / 3 + 4 / 5) / 2, {}, {}, None, {}, {"memory": "1101"})
    made = Record("b", "emt", "tiny", 0, {}, [f1], {"classes": "0011"})
    assert problems(made.save(tmp_path)) == []
    made.scores[0].score = 0.75
    assert "memory at 8" in problems(made.save(tmp_path))[0]


def test_outcomes_that_are_cut_or_missing(tmp_path):
    """With a digest that fits, and a score that they still come to."""

    def made(**changes):
        outcomes = {"memory": "1100", "zeroed": "1000"}
        score = Score(4, 64, 4, 0.5, {"zeroed": 0.25}, {}, None, {}, outcomes)
        for name, value in changes.items():
            setattr(score, name, value)
        return problems(Record("a", "emt", "tiny", 0, {}, [score]).save(tmp_path))

    assert made() == made(outcomes={}) == []
    assert made(outcomes={"memory": "10", "zeroed": "1000"}) == ["memory at 4 has 2 outcomes, where there are 4"]
    assert made(outcomes={"memory": "1100"}) == ["zeroed at 4 has a score and no outcomes"]
    nats = {
        "details": {"bytes a labelled token": 1.0},
        "score": 1 / math.log(2),
        "controls": {"zeroed": 1 / math.log(2)},
    }
    assert made(**nats, outcomes={"memory": "1.0 1.0", "zeroed": "1.0 1.0"}) == []
    found = made(**nats, outcomes={"memory": "1.0 1.0", "zeroed": "1.0"})
    assert found == ["zeroed at 4 has 1 outcomes, where there are 2"]
    assert made(**nats, outcomes={"memory": "1.0 1.0 1.0", "zeroed": "1.0 1.0 1.0"})


def test_records_of_changed_sources_are_refused_for_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "checkout", lambda: tmp_path)
    monkeypatch.delenv("MNEMIC_DIRTY", raising=False)
    made = record()
    made.commit = "123456789abc+changes"
    with pytest.raises(ValueError, match=r"not committed.*--dirty; this one is kept as") as refused:
        made.save(tmp_path / "results" / "suite-mine")
    [kept] = (tmp_path / "runs").rglob("*.json")
    assert str(kept) in str(refused.value)
    assert Record.load(kept).commit == "123456789abc+changes"
    assert not (tmp_path / "results").exists()
    assert made.save(tmp_path / "elsewhere").is_file()
    monkeypatch.setenv("MNEMIC_DIRTY", "1")
    assert made.save(tmp_path / "results").is_file()
    monkeypatch.delenv("MNEMIC_DIRTY")
    made.commit = "123456789abc"
    assert made.save(tmp_path / "results").is_file()


def test_the_commit_is_that_of_the_sources_as_they_were_at_first(tmp_path):
    """A tree of its own, with a change before the first record of a process and one after."""
    import shutil
    import subprocess
    import sys

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    bench = tmp_path / "src" / "mnemic" / "bench"
    bench.mkdir(parents=True)
    shutil.copy(results.__file__, bench / "results.py")
    (bench.parent / "__init__.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    code = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('copied', {str(bench / 'results.py')!r})\n"
        "copied = importlib.util.module_from_spec(spec)\n"
        "sys.modules['copied'] = copied\n"
        "spec.loader.exec_module(copied)\n"
        "first = copied.Record('a', 'b', 'c', 0, {}).commit\n"
        f"pathlib.Path({str(bench / 'other.py')!r}).write_text('')\n"
        "again = copied.Record('a', 'b', 'c', 0, {}).commit\n"
        "copied.commit.cache_clear()\n"
        "print(first, again == first, copied.commit() == first + '+changes')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, *rest = done.stdout.split()
    assert len(first) == 12, done.stderr
    assert rest == ["True", "True"]


def test_earlier_records_are_read(tmp_path):
    path = record().save(tmp_path)
    values = json.loads(path.read_text())
    for name in ("commit", "digests"):
        del values[name]
    for score in values["scores"]:
        del score["streams"], score["questions"]
    path.write_text(json.dumps(values))
    loaded = Record.load(path)
    assert (loaded.commit, loaded.digests, loaded.scores[0].streams) == (None, {}, None)
    values["config"]["test rows"] = 5
    path.write_text(json.dumps(values))
    assert Record.load(path).scores[0].streams == 5


def test_digests_of_numbers():
    numbers = torch.arange(6)
    assert results.digest_of(numbers) == results.digest_of(numbers.clone())
    others = (numbers.view(2, 3), numbers.float(), numbers + 1, numbers.bfloat16())
    assert len({results.digest_of(each) for each in (numbers, *others)}) == 5
    assert len(results.code()) == 16
