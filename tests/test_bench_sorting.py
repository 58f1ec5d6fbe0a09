"""The sorting experiment: what its batches ask, where training begins, what the ablations leave, and its record."""

import contextlib
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import mnemic
import sorting
from mnemic.bench.results import Record
from mnemic.tasks.sorting import SYMBOLS, SortingTask
from sorting import Recipe, SortingExperiment, Stages, sorting_config

LENGTH = 32
RECIPE = Recipe(naming=2, stages=((1, 1, 2), (2, 2, 2)))
CONTROLS = {"other stream", "zeroed", "fresh", "no memory", "working memory", "working and short-term memory"}


def experiment(rule="paper", lengths=(2,), **changes):
    return SortingExperiment(sorting_config(LENGTH, rule), RECIPE, lengths, width=16, rows=4, batch=3, **changes)


def begun(read=True):
    """A base and a memory where training begins; with readers that write something, if asked."""
    torch.manual_seed(0)
    model = sorting.make_base(LENGTH, 16, 2, RECIPE)
    attachment = mnemic.attach(model, sorting_config(LENGTH), freeze=False)
    sorting.begin(attachment, SortingTask(LENGTH, 1), RECIPE, 0)
    if read:
        for reader in attachment.memory.readers.values():
            torch.nn.init.normal_(reader.output.weight)
    return attachment


def streams(rows, segments):
    """Prompts and their answers."""
    task = SortingTask(LENGTH, segments)
    examples = task.examples(rows)
    return task.prompt(examples), task.order(examples)


def test_the_papers_sizes_and_the_three_rules():
    config = sorting_config(256)
    sizes = (
        config.working,
        config.reminded_stm,
        config.reminded_ltm,
        config.stm_capacity,
        config.lifespan,
        config.alpha,
    )
    assert sizes == (32, 64, 160, 128, 5.0, 8.0)
    assert (config.random_ltm_seeds, config.edges) == (0, "conditional")
    assert sorting_config(256, "seeds").random_ltm_seeds == 128 - 64
    assert sorting_config(256, "lift").edges == "lift"


def test_naming_has_no_prompt():
    batch, whole = sorting.naming(SortingTask(LENGTH, 1), 3, 5), SortingTask(LENGTH, 1).examples(3, "train", 5)
    assert torch.equal(batch.input_ids, whole.input_ids[:, LENGTH:])
    assert torch.equal(batch.labels, whole.labels[:, LENGTH:])


def test_stages_follow_the_plan():
    stages = Stages(LENGTH, RECIPE, seed=3)
    assert RECIPE.steps == 3
    assert [stages.batch(step).input_ids.shape for step in range(3)] == [
        (2, 2 * LENGTH),
        (2, 3 * LENGTH),
        (2, 3 * LENGTH),
    ]
    assert torch.equal(stages.batch(2).input_ids, Stages(LENGTH, RECIPE, seed=3).batch(2).input_ids)
    assert not torch.equal(stages.batch(2).input_ids, stages.batch(1).input_ids)
    assert not torch.equal(stages.batch(2).input_ids, Stages(LENGTH, RECIPE, seed=4).batch(2).input_ids)


def test_what_lies_before_the_memory_does_not_train():
    torch.manual_seed(0)
    model = sorting.make_base(LENGTH, 16, 3, RECIPE)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attachment, _ = experiment().run()
    for name, parameter in attachment.model.named_parameters():
        if name in before:
            first = any(part in name for part in (".wte.", ".wpe.", ".h.0."))
            assert torch.equal(parameter, before[name]) == first, name


def test_the_rate_rises_holds_and_falls():
    rates = [RECIPE.rate(progress) for progress in (0.0, RECIPE.warm / 2, RECIPE.warm, RECIPE.hold, 0.65, 1.0)]
    assert rates[0] < 0.01
    assert rates[1] == pytest.approx(0.5, abs=0.01)
    assert rates[2] == rates[3] == 1.0
    assert rates[4] == pytest.approx(0.5, abs=0.01)
    assert rates[5] == pytest.approx(0.0, abs=1e-6)


def test_where_training_begins_values_vary_between_streams_as_asked_and_nothing_is_read():
    attachment = begun(read=False)
    ids = SortingTask(LENGTH, 1).examples(128, "train", 400_000_000).input_ids[:, :LENGTH]
    with torch.no_grad():
        hidden = attachment.router.record(attachment.model.transformer, ids)
        engram = attachment.memory.abstractor(hidden, None)
        (reader,) = attachment.memory.readers.values()
        value = reader.value(engram.mean(1))
    assert value.std(0).mean() == pytest.approx(RECIPE.value, rel=0.3)
    assert value.mean(0).abs().max() < 0.1 * RECIPE.value
    assert (engram - engram.mean(0)).std() == pytest.approx(RECIPE.engram, rel=0.3)
    assert not reader.output.weight.any()


def test_conditions_differ_only_in_what_they_take_away():
    attachment = begun()
    prompt, answer = streams(4, 2)
    state = sorting.read_prompt(attachment, prompt)
    assert state["step"].tolist() == [2] * 4
    asked = sorting.conditions(attachment, state)
    assert torch.equal(asked["other stream"]["engram"][1], state["engram"][0])
    assert not asked["zeroed"]["engram"].any()
    assert torch.equal(asked["zeroed"]["recalled"], state["recalled"])
    right, written = {}, {}
    for name, its in asked.items():
        with attachment.disabled() if its is None else contextlib.nullcontext():
            right[name], written[name] = sorting.answers(attachment, answer, its)
    assert all(each.shape == (4, SYMBOLS) for each in (*right.values(), *written.values()))
    assert torch.equal(written["fresh"], written["no memory"])
    assert not torch.equal(written["memory"], written["no memory"])
    assert not torch.equal(written["memory"], written["other stream"])


def test_given_symbols_and_greedy_writing_agree_on_the_first_symbol():
    attachment = begun()
    prompt, answer = streams(8, 2)
    right, written = sorting.answers(attachment, answer, sorting.read_prompt(attachment, prompt))
    assert torch.equal(right[:, 0], written[:, 0] == answer[:, 0])


def test_a_variant_has_the_same_weights_and_leaves_the_first_alone():
    attachment = begun()
    prompt, _ = streams(4, 3)
    before = sorting.read_prompt(attachment, prompt)
    alone = sorting.variant(attachment, sorting_config(LENGTH, reminded_stm=0, reminded_ltm=0))
    for name, tensor in attachment.model.state_dict().items():
        assert torch.equal(alone.model.state_dict()[name], tensor)
    state = sorting.read_prompt(alone, prompt)
    assert state["recalled"].shape[1] == 0
    assert sorting.reminded_segments(state, LENGTH // 8, 3) == [0.0] * 3
    after = sorting.read_prompt(attachment, prompt)
    assert all(torch.equal(after[name], before[name]) for name in before)
    counted = sorting.reminded_segments(after, LENGTH // 8, 3)
    assert sum(counted) == pytest.approx(float((after["recalled"] >= 0).sum(1).float().mean()))
    assert counted[2] == 0, "the last segment is working memory"


def test_an_experiment_makes_a_record_and_goes_on_where_it_stopped(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    attachment, made = experiment(lengths=(1, 2)).run(None, checkpoint)
    assert (made.task, made.mechanism, made.seed) == ("sorting", "memoria", 0)
    assert [(score.length, score.tokens, score.examples) for score in made.scores] == [(1, 32, 80), (2, 64, 80)]
    for score in made.scores:
        assert set(score.controls) == CONTROLS | {"rule seeds", "rule lift"}
        assert score.score == score.outcomes["memory"].count("1") / 80
        assert all(len(outcome) == 80 for outcome in score.outcomes.values())
        assert {"memory: exact order", "no memory: Kendall tau"} <= set(score.details)
        assert score.floors == SortingTask(LENGTH, score.length).floors(4)
    assert set(made.seconds) == {"base", "training", "evaluation"}
    loaded = Record.load(made.save(tmp_path))
    assert [score.outcomes for score in loaded.scores] == [score.outcomes for score in made.scores]
    # a finished training is not trained again, and measures the same
    again, second = experiment(lengths=(1, 2)).run(None, checkpoint)
    for name, tensor in attachment.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    assert [score.outcomes for score in second.scores] == [score.outcomes for score in made.scores]


def test_the_rule_that_was_trained_with_is_not_measured_twice():
    _, made = experiment("lift").run()
    assert made.config["memory"]["edges"] == "lift"
    assert set(made.scores[0].controls) == CONTROLS | {"rule paper", "rule seeds"}


def test_the_command_writes_a_result(tmp_path, monkeypatch):
    def small(seed, rule, lengths, rows):
        return replace(experiment(rule, tuple(lengths), seed=seed), rows=rows)

    monkeypatch.setattr(sorting, "published", small)
    arguments = ["--segments", "1,2", "--seed", "1", "--rule", "seeds", "--rows", "3"]
    result = CliRunner().invoke(sorting.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for text in ("right symbols", "last 2 segments", "rule paper", "2 segments"):
        assert text in result.output
    made = Record.load(tmp_path / "sorting-memoria-seeds-seed1.json")
    assert (made.seed, [score.length for score in made.scores]) == (1, [1, 2])


def test_the_published_settings_are_the_papers_rule_at_256():
    published = sorting.published(2, "paper", [4, 8], 256)
    assert (published.config, published.lengths, published.seed) == (sorting_config(256), (4, 8), 2)
