"""Suites: what is compared, on equal terms, with controls; resumed, matched in bytes, and refused when wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mnemic.attachment import attach
from mnemic.bench import asking, compare, workers
from mnemic.bench.asking import CONDITIONS, predict
from mnemic.bench.compare import NONE, Recipe, Run, match_bytes, most_bytes
from mnemic.bench.hosts import Host, tiny_gpt2
from mnemic.bench.results import Record, records
from mnemic.bench.suite import file_name, finished, limited, load, names, parse
from mnemic.bench.workers import perform
from mnemic.cli import app
from mnemic.cli.suite import matched
from mnemic.memories import CONFIGS
from mnemic.training import train
from mnemic.unrolling import unroll

QUICK = Recipe(steps=12, rows=8, warm=4)
REVERSE = Run("reverse", "emt", settings={"count": 12, "segment_length": 12}, recipe=QUICK, test_rows=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_memory_that_is_needed_is_learned():
    """Reverse over two segments: beyond the floor with the own memory, at the floor with any other."""
    recipe = Recipe(steps=150, rows=48, learning_rate=4e-3, warm=20)
    score = replace(REVERSE, recipe=recipe, test_rows=128).run().scores[0]
    assert score.score > 0.5, score
    assert score.floors["no memory"] == pytest.approx(0.198, abs=0.001)
    for name in CONDITIONS[1:]:
        assert score.controls[name] < 0.3, (name, score.controls)
    assert set(score.outcomes) == set(CONDITIONS)
    assert score.outcomes["memory"].count("1") / len(score.outcomes["memory"]) == pytest.approx(score.score)


@pytest.mark.parametrize("mechanism", [NONE, *sorted(CONFIGS)])
def test_every_mechanism_by_existing(mechanism):
    record = replace(REVERSE, mechanism=mechanism, test_rows=8).run()
    assert record.mechanism == mechanism
    assert (record.config["memory"] is None) == (mechanism == NONE)
    assert (record.state_bytes == 0) == (mechanism == NONE)
    assert set(record.scores[0].controls) == (set() if mechanism == NONE else set(CONDITIONS[1:]))
    assert record.seconds["training"] > 0
    assert record.measures["cost"]["with memory / base"] > 0
    json.dumps(record.config)


def test_equal_terms():
    """First weights of the host, streams and steps are the same whatever the memory."""
    seen = []

    class Stop(Exception):
        pass

    def spy(model, batches, **settings):
        base = [p.clone() for n, p in model.named_parameters() if "mnemic" not in n]
        seen.append((base, batches(0).input_ids, batches(5).input_ids, settings["steps"]))
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train", spy)
        for mechanism in (NONE, *sorted(CONFIGS)):
            with pytest.raises(Stop):
                replace(REVERSE, mechanism=mechanism).run()
    for other in seen[1:]:
        # a table of positions may go on for memory tokens
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(seen[0][0], other[0], strict=True))
        assert torch.equal(seen[0][1], other[1])
        assert torch.equal(seen[0][2], other[2])
        assert seen[0][3] == other[3]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_predictions_are_those_of_training(name):
    """What is asked under "memory" is what a plain pass over the stream gives, wherever labels lie."""
    task = replace(REVERSE, settings={"count": 12, "segment_length": 6}).make_task()
    torch.manual_seed(0)
    config = CONFIGS[name].small(6, 64)
    model = Host().make(task.vocabulary, 6 + config.build(64, 2).beside).eval()
    attachment = attach(model, config)
    with torch.no_grad():
        for parameter in attachment.memory.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    examples = task.examples(4, "test")
    predicted = predict(attachment, examples.input_ids, examples.labels)
    with torch.no_grad():
        unrolled = unroll(model, examples.input_ids, examples.labels, parallel=False)
    assert torch.equal(predicted.tokens["memory"][examples.asked], unrolled.logits.argmax(-1))
    assert predicted.nats["memory"][examples.asked].mean() == pytest.approx(unrolled.loss.item(), rel=1e-4)
    assert not torch.equal(predicted.nats["memory"], predicted.nats["no memory"])


def test_a_host_that_learned_alone(tmp_path):
    """With whole streams in its window a host learns what it can; every mechanism then begins from the same weights."""
    recipe = replace(QUICK, rows=48, alone=150, alone_rate=4e-3, alone_mix=({}, {"count": 12}))
    run = replace(REVERSE, recipe=recipe)
    first, alone = run.make_host(1, compare.Silent(), tmp_path / "a.safetensors")
    assert alone["in its window"] > 0.5, alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "learn_alone", None)  # it is not done again
        second, known = replace(run, mechanism=NONE).make_host(1, compare.Silent(), tmp_path / "b.safetensors")
        assert known == alone
        assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
        with pytest.raises(TypeError):
            replace(run, seed=1).make_host(1, compare.Silent(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("freeze", [False, True])
def test_freezing_a_host(freeze):
    recipe = replace(QUICK, freeze=freeze)
    moved = []

    def spy(model, *args, **settings):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield from train(model, *args, **settings)
        after = model.state_dict()
        moved.extend(name for name, tensor in before.items() if not torch.equal(tensor, after[name]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train", spy)
        replace(REVERSE, recipe=recipe).run()
    assert any("mnemic" in name for name in moved)
    assert any("mnemic" not in name for name in moved) != freeze


def test_by_depth_and_age():
    task = Run("needle", NONE, settings={"length": 256, "segment_length": 64}).make_task()
    test = task.examples(64, "test")
    right = torch.where((test.extra["depth"] >= 40) & (test.extra["depth"] < 60), 1, 0)
    predicted = torch.where(right[:, :1] == 1, test.labels, -1)
    found = asking.profile(task, predicted, test)
    assert found == {f"depth from {start}": float(start == 40) for start in asking.DEPTHS}
    task = Run("rewrites", NONE, settings={"pairs": 5}).make_task()
    test = task.examples(200, "test")
    found = asking.profile(task, task.solve(test, task.last(test, 1)), test)
    assert list(found) == ["age from 1", "age from 2", "age from 4"]
    assert found["age from 1"] == 1
    assert found["age from 4"] < 0.1


# --- stages and bytes ------------------------------------------------------------------------------------------------


def test_stages():
    recipe = Recipe(steps=10, stages=({"share": 0.2, "count": 3}, {"share": 0.5, "count": 6}))
    assert recipe.settings() == [{"count": 3}] * 2 + [{"count": 6}] * 5 + [{}] * 3
    for wrong in (({"share": 1.0, "count": 3},), ({"count": 3},), ({"share": 0.6}, {"share": 0.6})):
        with pytest.raises(ValueError, match=r"share|stages"):
            Recipe(steps=10, stages=wrong).settings()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_equal_bytes(name):
    run = replace(REVERSE, mechanism=name)
    (matched,) = match_bytes([run], 40_000)
    if matched.size is None:
        pytest.skip(f"{name} has no size to choose")
    assert most_bytes(matched) <= 40_000
    more = [most_bytes(replace(matched, size=factor * matched.size + 1)) for factor in (1, 2)]
    assert more[0] > 40_000 or more == [most_bytes(matched)] * 2, "more would fit, and it would hold more"
    with pytest.raises(ValueError, match="at its smallest"):
        match_bytes([run], 1)


def test_matching_bytes_of_a_whole_suite():
    """Every mechanism gets no more bytes than the smallest has, or than asked for, task by task."""
    runs = parse("mine", {"task": [{"name": "reverse"}, {"name": "copy"}]}).runs()
    for word, most in (("bytes", None), ("bytes=60000", 60_000)):
        found = matched(runs, word, most_bytes, match_bytes)
        assert [replace(run, size=None) for run in found] == runs
        for task in ("reverse", "copy"):
            sizes = {run.mechanism: most_bytes(run) for run in found if run.task == task and run.mechanism != NONE}
            mine = [run for run in runs if run.task == task and run.mechanism != NONE]
            # all can be as small as the smallest is, but those that hold more at their smallest
            least = max(most_bytes(replace(run, size=1)) for run in mine)
            limit = most or max(least, min(map(most_bytes, mine)))
            assert all(size <= limit for size in sizes.values()), sizes
            assert max(sizes.values()) > 0.4 * limit


# --- suites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_suites_that_come_with_the_package(name):
    suite = load(name)
    runs = suite.runs(seeds=2)
    assert {run.mechanism for run in runs} == {NONE, *(suite.mechanisms or CONFIGS)}
    assert len({file_name(run) for run in runs}) == len(runs)
    for run in suite.runs([NONE]):
        for length, task in run.tests():
            if not isinstance(length, int) or length <= 10_000:
                assert task.examples(1, "test").input_ids.shape[1] % task.segment_length == 0
        assert len(run.recipe.settings()) == run.recipe.steps
        for changes in run.recipe.stages:
            run.make_task(**{key: value for key, value in changes.items() if key != "share"})


TASK = {"name": "reverse"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "no \\[\\[task\\]\\]"),
        ({"task": [TASK], "hosts": {}}, "hosts"),
        ({"task": [{"name": "reverze"}]}, "reverze.*known: .*reverse"),
        ({"task": [{**TASK, "settings": {"cont": 3}}]}, "cont.*known: .*count"),
        ({"task": [{**TASK, "recipe": {"step": 3}}]}, "step.*known: .*steps"),
        ({"task": [{**TASK, "memory": {"emtt": {}}}]}, "emtt.*known: .*emt"),
        ({"task": [TASK], "host": {"size": 3}}, "size.*known: .*width"),
    ],
)
def test_wrong_suites(values, said):
    with pytest.raises(ValueError, match=said):
        parse("mine", values)


def test_wrong_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a file nor .*smoke"):
        load("smokey")
    (tmp_path / "a.toml").write_text("title = ")
    with pytest.raises(ValueError, match="not TOML"):
        load(tmp_path / "a.toml")
    suite = parse("mine", {"task": [TASK]})
    with pytest.raises(ValueError, match=r"unknown memory emtt"):
        suite.runs(["emtt"])
    with pytest.raises(ValueError, match="seeds is 0"):
        suite.runs(seeds=0)
    with pytest.raises(ValueError, match=r"no task sorting; it has reverse"):
        limited(suite, ["sorting"])
    with pytest.raises(ValueError, match="count"):
        Run("reverse", "emt", settings={"counter": 3}).make_task()


def test_the_smoke_suite(tmp_path):
    """What a user tries first: every condition, every floor."""
    few = {"emt", "fast-weights"}
    result = bench("smoke", "--memory", ",".join(few), "--seeds", 1, "--workers", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = records(tmp_path / "suite-smoke")
    assert {record.mechanism for record in found} == {NONE, *few}
    assert {record.task for record in found} == {"reverse", "rewrites"}
    for record in found:
        for score in record.scores:
            assert {"uniform", "majority", "last segment", "oracle"} <= set(score.floors)
            assert len(score.outcomes["memory"]) == score.examples
            assert set(score.controls) == (set() if record.mechanism == NONE else set(CONDITIONS[1:]))


def test_a_pretrained_host(tmp_path):
    """Any causal model in a folder, frozen; its tokenizer makes the tokens, its width the memory's size."""
    torch.manual_seed(0)
    tiny_gpt2(80, 64, width=32, depth=2, heads=2).save_pretrained(tmp_path / "model")
    host = Host(str(tmp_path / "model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "tokenizer", lambda self: None)
        record = replace(REVERSE, host=host).run()
        with pytest.raises(ValueError, match="has 80 tokens, the task needs"):
            replace(REVERSE, host=host, task="mqar", settings={}).run()
    assert record.host == "model"
    assert record.config["host"] == {"name": "model", "width": 32, "depth": 2}
    assert record.config["memory"]["dim"] == 32
    assert str(tmp_path) not in json.dumps(record.config)


SUITE = """
title = "Two"
test_rows = 16
[recipe]
steps = 6
rows = 4
[[task]]
name = "reverse"
settings = { count = 12, segment_length = 12 }
"""


def bench(*words):
    return CliRunner().invoke(app, ["bench", *(str(word) for word in words)])


def test_the_command_and_what_is_finished(tmp_path):
    (tmp_path / "two.toml").write_text(SUITE)
    words = (tmp_path / "two.toml", "--memory", "emt", "--seeds", 1, "--workers", 1, "--out", tmp_path / "out")
    result = bench(*words)
    assert result.exit_code == 0, result.output
    found = records(tmp_path / "out" / "suite-two")
    assert [record.mechanism for record in found] == ["emt", NONE]
    assert not list((tmp_path / "out" / "suite-two" / ".checkpoints").glob("*"))
    for record in found:
        assert f"{100 * record.scores[0].score:.1f}" in result.output
    written = [record.written for record in found]
    assert bench(*words).exit_code == 0
    assert [record.written for record in records(tmp_path / "out" / "suite-two")] == written, "run again for nothing"
    (tmp_path / "two.toml").write_text(SUITE.replace("steps = 6", "steps = 7"))
    assert bench(*words).exit_code == 0
    assert all(record.config["recipe"]["steps"] == 7 for record in records(tmp_path / "out" / "suite-two"))


@pytest.mark.parametrize("mechanism", ["emt", NONE])
def test_a_killed_run_goes_on(tmp_path, mechanism):
    """The checkpoint of a run that was stopped is where the next one begins, and the result is that of one go."""

    class Killed(Exception):
        pass

    class Killer(compare.Silent):
        def __init__(self):
            self.steps = 0

        def advance(self, steps, **values):
            self.steps += steps
            if self.steps >= 8 and "loss" in values:
                raise Killed

    run = replace(REVERSE, mechanism=mechanism)
    whole = run.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(Killed):
            run.run(Killer(), tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").is_file()
    told = []

    class Teller(compare.Silent):
        def advance(self, steps, **values):
            told.append(steps)

    again = run.run(Teller(), tmp_path / "a.safetensors")
    assert told[0] >= 7, "it began anew"
    assert again.scores[0].outcomes == whole.scores[0].outcomes
    assert again.scores[0].details["nats a labelled token"] == whole.scores[0].details["nats a labelled token"]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_fails_says_so_and_the_others_go_on(tmp_path, count):
    wrong, events = replace(REVERSE, recipe=replace(QUICK, learning_rate=1e30)), []
    perform([wrong, replace(REVERSE, seed=1)], tmp_path, "mnemic bench", count, events.append)
    errors = {event.number: event.error for event in events if event.error}
    assert set(errors) == {0}
    assert "NaN" in errors[0]
    assert finished(replace(REVERSE, seed=1), tmp_path) is not None
    assert finished(wrong, tmp_path) is None
    phases = {event.phase for event in events if event.number == 1 and not event.record}
    assert phases == {"train", "ask at count 12"}
    assert isinstance(next(event.record for event in events if event.record), Record)


def test_runs_of_a_killed_process_go_on_alone(tmp_path, monkeypatch):
    """Of three runs the second is finished when a process dies; of the two others one had begun, and dies again."""
    groups, events = [], []
    answers = iter([([0], [2]), ([0], []), ([], [])])

    def pooled(runs, *rest):
        groups.append(list(runs))
        return next(answers)

    monkeypatch.setattr(workers, "_pooled", pooled)
    perform([replace(REVERSE, seed=seed) for seed in range(3)], tmp_path, "mnemic bench", 2, events.append)
    assert groups == [[0, 1, 2], [0], [2]]
    assert [(event.number, event.error.split(",")[0]) for event in events] == [(0, "its process was killed")]


@pytest.mark.long
def test_a_killed_process_loses_nothing(tmp_path, monkeypatch):
    """One of two workers is killed while it trains: both runs come to what they come to in one process. Workers are
    forked here, which spares them the imports.
    """
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: forking)
    runs = [replace(REVERSE, seed=seed, recipe=replace(QUICK, steps=20)) for seed in (0, 1)]
    whole = [run.run().scores[0].outcomes for run in runs]
    events = []

    def tell(event):
        events.append(event)
        if event.phase == "train" and event.done >= 3 and not killed:
            children = [each for each in multiprocessing.active_children() if "Manager" not in each.name]
            killed.append(children[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    killed = []
    perform(runs, tmp_path, "mnemic bench", 2, tell)
    assert killed
    assert [event.error for event in events if event.error] == []
    assert [finished(run, tmp_path).scores[0].outcomes for run in runs] == whole


def test_refusals_of_the_command(tmp_path):
    for words, said in (
        (("smokey",), "neither a file"),
        (("smoke", "--memory", "emtt"), "unknown memory"),
        (("smoke", "--match", "byte"), "bytes=65536"),
        (("smoke", "--task", "nothing"), "no task"),
        (("smoke", "--seeds", 0), "seeds is 0"),
    ):
        result = bench(*words, "--out", tmp_path)
        assert result.exit_code == 2, result.output
        assert said.split()[0] in result.output


def test_matching_ends_where_a_memory_holds_all_there_is():
    run = Run(task="reverse", mechanism="transformer-xl", settings={"count": 12, "segment_length": 6})
    (found,) = match_bytes([run], 10**9)
    # three segments of six tokens are written before the last one asks
    assert most_bytes(found) == 3 * 6 * 2 * 64 * 4 + 8
