"""The analyses of Memoria: against histories made by hand, against the counts, and on a small model."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mnemic
from families import make
from helpers import SEGMENT, host, shake, tokens
from memoria_engrams import app
from memoria_engrams_history import History, ages, autocorrelation, compare_readings, observe, seen_twice, summary
from mnemic.inspect import engrams as memoria
from mnemic.inspect.engrams import Moment, engram_graph
from mnemic.memories.memoria import MemoriaConfig
from mnemic.memories.memoria.graph import counts
from mnemic.memories.memoria.naive import minds_from_state
from mnemic.state import concatenate

TINY: MemoriaConfig = MemoriaConfig.tiny()[0]  # pyright: ignore


def moment(step, long=(), short=(), *, alive_long=None, alive_short=None):
    """Two engrams a segment: those of segment s are 2 s + 1 and 2 s + 2."""
    alive_long = sorted(long if alive_long is None else alive_long)
    alive_short = sorted(short if alive_short is None else alive_short)
    ids = [*alive_long, *alive_short, 2 * step - 1, 2 * step]
    levels = len(alive_long), len(alive_short), 2
    return Moment(step, np.array(ids), np.ones(len(ids)), levels, np.array(short, int), np.array(long, int))


@pytest.fixture(scope="module")
def model():
    return host("gpt2", TINY)


@pytest.fixture(scope="module")
def watched(model):
    return observe(model, tokens(2, 30 * SEGMENT), keep=[12, 30])


# --- ages and autocorrelation, by hand -------------------------------------------------------------------------------


def test_ages_by_hand():
    history = History(
        [
            [moment(8), moment(9, long=[1, 4], alive_long=[1, 2, 3, 4]), moment(10, long=[1])],
            [moment(9, long=[9], alive_long=[9])],
        ]
    )
    found = ages(history)
    assert found.step.tolist() == [8, 9, 10]
    # engrams 1, 4 and 9 were made of segments 0, 1 and 4
    assert math.isnan(found.mean[0])
    assert found.mean[1] == pytest.approx((9 + 8 + 5) / 3)
    assert found.mean[2] == 10
    assert found.alive[1] == pytest.approx((9 + 9 + 8 + 8 + 5) / 5)
    assert (found.low[1], found.high[1]) == pytest.approx((5.6, 8.8))
    assert moment(9).ages(moment(9).alive("working")).tolist() == [1, 1], "working memory is of the segment before"


def test_autocorrelation_by_hand():
    history = History(
        [
            [
                moment(10, long=[1, 2, 3]),
                moment(11, long=[2, 3, 4, 5], short=[17]),
                moment(12, long=[1, 2], short=[17, 18], alive_long=[1, 2, 9, 10]),
                moment(13),
            ]
        ]
    )
    found = autocorrelation(history, "long", (1, 2, 5))
    # of {2, 3, 4, 5} two were there before, of {1, 2} one; step 13 reminds nobody
    assert found[1] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert found[2] == pytest.approx(2 / 2)
    assert math.isnan(found[5])
    assert autocorrelation(history, "long", (1,), since=12) == {1: 0.5}
    # at 11 nobody else is alive; at 12 one of the four alive was reminded at 11
    assert autocorrelation(history, "long", (1,), chance=True) == {1: pytest.approx((2 / 4 + 1 / 4) / 2)}
    assert autocorrelation(history, "short", (1,)) == {1: pytest.approx((0 + 1 / 2) / 2)}, "nobody before is a 0"


def test_a_lag_is_counted_in_steps_not_in_moments():
    history = History([[moment(10, long=[1]), moment(12, long=[1]), moment(14, long=[2])]])
    found = autocorrelation(history, "long", (1, 2, 4))
    assert math.isnan(found[1])
    assert (found[2], found[4]) == (0.5, 0.0)


def test_streams_do_not_answer_for_each_other():
    history = History([[moment(10, long=[1]), moment(11, long=[2])], [moment(10, long=[2]), moment(11, long=[1])]])
    assert autocorrelation(history, "long", (1,)) == {1: 0.0}


def test_seen_twice_by_hand():
    # two segments, one between, the two again: engrams 1 to 4, 5 and 6, then those of the second reading
    first = moment(4, long=[1, 5], alive_long=[1, 2, 3, 4, 5, 6])
    second = moment(5, long=[3, 4], alive_long=[1, 3, 4, 6])
    found = compare_readings(History([[moment(1), moment(2), moment(3, long=[1]), first, second]]), 2, 1)
    assert found.first.tolist() == [1 / 2, 1.0]
    assert found.first_by_chance.tolist() == [4 / 6, 3 / 4]
    # in its first segment 1 of {1, 2} and of the next one's {3, 4} none; in the second {3, 4}, and not 1
    assert found.counts_by_offset == {-1: (0, 1), 0: (3, 4), 1: (0, 2)}
    assert found.by_offset == {-1: 0.0, 0: 0.75, 1: 0.0}
    assert found.other_offsets == 0.0
    assert found.any_engram == 4 / 10


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_moment_tells_what_the_plain_loops_tell(watched):
    for (row, step), state in watched.kept.items():
        mind = minds_from_state(state, TINY)[0]
        found = next(moment for moment in watched.rows[row] if moment.step == step)
        assert (found.step, found.ids.tolist()) == (mind.step, [engram.id for engram in mind.engrams])
        assert [*found.short.tolist(), *found.long.tolist()] == mind.recalled
        assert found.lifespans.tolist() == pytest.approx([engram.lifespan for engram in mind.engrams])
        for level in memoria.LEVELS:
            assert found.alive(level).tolist() == [engram.id for engram in mind.at(level)]
        assert set(found.long.tolist()) <= set(found.alive("long").tolist())


def test_both_levels_are_reminded_here(watched):
    late = [moment for row in watched.rows for moment in row[10:]]
    assert all(len(moment.short) == 2 for moment in late)
    assert sum(len(moment.long) for moment in late) > len(late)


def test_rows_of_a_batch_are_told_apart(watched):
    states = [watched.kept[row, 12] for row in (0, 1)]
    history = History()
    history.record(concatenate(states), TINY)
    for row in (0, 1):
        alone = watched.rows[row][11]
        assert history.rows[row][0].ids.tolist() == alone.ids.tolist()
        assert history.rows[row][0].long.tolist() == alone.long.tolist()
        assert history.rows[row][0].found == alone.found


def test_the_search_is_counted_as_it_was(watched):
    for moment in (moment for row in watched.rows for moment in row):
        assert moment.starts <= len(moment.short)
        assert moment.starts <= moment.found <= moment.starts * (1 + TINY.depth)
        assert len(moment.long) == min(moment.found, TINY.reminded_ltm)


def test_edges_are_those_of_the_counts(watched):
    network = pytest.importorskip("networkx")
    state = concatenate([watched.kept[0, 30], watched.kept[1, 30]])
    for row in (0, 1):
        directed = engram_graph(state, row)
        assert isinstance(directed, network.DiGraph)
        ids = state["id"][row].tolist()
        count = counts(state)[row]
        edges = 0
        for (i, one), (j, other) in product(enumerate(ids), enumerate(ids)):
            if one and other and i != j and count[i, j]:
                edges += 1
                about = directed.edges[one, other]
                assert about["count"] == int(count[i, j])
                assert about["weight"] == pytest.approx(int(count[i, j]) / int(count[i, i]))
        assert directed.number_of_edges() == edges > 0
        seen = watched.rows[row][29]
        assert sorted(directed) == seen.ids.tolist()
        oldest = directed.nodes[int(seen.ids[0])]
        assert oldest["level"] == "long"
        assert oldest["born"] == (seen.ids[0] - 1) // TINY.working
        assert oldest["age"] == 30 - oldest["born"]
        assert oldest["fires"] == int(count[0, 0])
        now = {engram for engram, about in directed.nodes(data=True) if about["reminded"]}
        assert now == {*seen.short.tolist(), *seen.long.tolist()}


def test_edges_that_are_left_out(watched):
    pytest.importorskip("networkx")
    state = watched.kept[0, 30]
    whole = engram_graph(state)
    strong = engram_graph(state, least=0.7)
    assert 0 < strong.number_of_edges() < whole.number_of_edges()
    assert all(weight >= 0.7 for *_, weight in strong.edges(data="weight"))
    apart = engram_graph(state, strongest=1, within=False)
    assert max(degree for _, degree in apart.out_degree()) == 1
    for i, j, weight in apart.edges(data="weight"):
        assert whole.nodes[i]["born"] != whole.nodes[j]["born"]
        others = [
            w for _, k, w in whole.out_edges(i, data="weight") if whole.nodes[k]["born"] != whole.nodes[i]["born"]
        ]
        assert weight == max(others)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_observing_changes_nothing(model, watched):
    ids = tokens(2, 30 * SEGMENT)
    session = mnemic.Session(model, window=SEGMENT)
    session.read(ids[1:])
    assert session.stream is not None
    for name, tensor in session.stream.state.items():
        assert torch.equal(tensor, watched.kept[1, 30][name])


def test_a_session_goes_on_where_it_stands(model, watched):
    ids = tokens(2, 30 * SEGMENT)[0]
    session = mnemic.Session(model, window=SEGMENT)
    session.read(ids[: 3 * SEGMENT + 5][None])
    history = observe(session, ids[3 * SEGMENT + 5 :])
    assert history.steps == list(range(4, 31))
    for seen, alone in zip(history.rows[0], watched.rows[0][3:], strict=True):
        assert seen.ids.tolist() == alone.ids.tolist()
        assert seen.long.tolist() == alone.long.tolist()


def test_an_encoder():
    history = observe(host("bert", TINY), tokens(1, 12 * SEGMENT))
    assert history.steps == list(range(1, 13))
    assert len(history.rows[0][-1].long) > 0


def test_seen_twice_reads_a_b_a(model):
    text, between = tokens(1, 4 * SEGMENT), tokens(1, 3 * SEGMENT, seed=1)
    found = seen_twice(model, text, between, keep=[11])
    assert (found.segments, found.between, found.history.steps[-1]) == (4, 3, 11)
    straight = observe(model, torch.cat([text, between, text], 1))
    assert [m.long.tolist() for m in found.history.rows[0]] == [m.long.tolist() for m in straight.rows[0]]
    with pytest.raises(ValueError, match="not whole segments"):
        seen_twice(model, text[:, 1:], between)


def test_identical_text_is_reminded_first_where_the_search_looks_everywhere():
    # untrained: nothing is added to the hidden states, so the same text makes the same engrams
    torch.manual_seed(0)
    model = make("gpt2")
    config = TINY.replace(lifespan=40.0, random_ltm_seeds=1000)
    shake(mnemic.attach(model, config).memory.abstractor, scale=0.5)  # pyright: ignore
    found = seen_twice(model, tokens(1, 4 * SEGMENT), tokens(1, 6 * SEGMENT, seed=1))
    reminded, alive = found.counts_by_offset[0]
    assert alive == reminded == 8
    assert found.other_offsets < found.by_offset[0]
    assert np.nanmean(found.first) > np.nanmean(found.first_by_chance)


def test_the_rules():
    assert TINY.with_rule("paper") == TINY
    assert TINY.with_rule("seeds").random_ltm_seeds == TINY.stm_capacity - TINY.reminded_stm
    assert TINY.with_rule("lift").edges == "lift"
    with pytest.raises(ValueError, match="'other'; use paper, seeds, lift"):
        TINY.with_rule("other")


def test_summary_is_of_the_later_half(watched):
    line = summary(watched)
    late = [moment for row in watched.rows for moment in row if moment.step > 15]
    assert line["LTM reminded"] == pytest.approx(np.mean([len(moment.long) for moment in late]))
    assert line["found"] == pytest.approx(np.mean([moment.found for moment in late]))
    assert line["LTM again at 1"] == autocorrelation(watched, "long", (1,), since=16)[1]


def test_what_is_no_memoria(model):
    other = host("gpt2", mnemic.EMTConfig.tiny()[0])
    with pytest.raises(ValueError, match="the model's memory is 'emt'"):
        observe(other, tokens(1, SEGMENT))
    session = mnemic.Session(other)
    session.read(tokens(1, SEGMENT))
    assert session.stream is not None
    with pytest.raises(ValueError, match="not a state of Memoria"):
        Moment.of(session.stream.state)
    with pytest.raises(ValueError, match="one stream, got 2 rows"):
        observe(mnemic.Session(model), tokens(2, SEGMENT))


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r"needs nobody_has_this.*mnemic\[plot\]"):
        memoria.require("nobody_has_this")


# --- pictures and the command ----------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("networkx")
    import transformers

    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    model, text = make("gpt2"), tmp_path / "text.txt"
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Tokenizer())
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    mnemic.attach(model, TINY).save_pretrained(tmp_path / "memory")
    mnemic.attached(model).detach()

    def run(*more, segments="24"):
        words = ["--model", "tiny", "--text", str(text), "--memory", str(tmp_path / "memory")]
        words += ["--segments", segments, "--twice", "6", "--steps", "12,24", "--out", str(tmp_path / "out"), *more]
        return CliRunner().invoke(app, words)

    result = run("--rule", "paper", "--rule", "lift")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "memoria-engrams-seed0.json").read_text(), parse_constant=pytest.fail)
    assert str(tmp_path) not in json.dumps(record)
    measures = record["measures"]
    assert list(measures["rules"]) == ["paper", "lift"]
    assert [step["step"] for step in measures["steps"]["lift"]] == list(range(1, 25))
    attachment = mnemic.from_pretrained(model, tmp_path / "memory")
    ids = Tokenizer()(text.read_text())["input_ids"][: 24 * SEGMENT]
    again = observe(model, ids)
    attachment.detach()
    assert measures["rules"]["paper"]["LTM again at 1"] == autocorrelation(again, "long", (1,), since=12)[1]
    told = [step["LTM reminded"] for step in measures["steps"]["paper"]]
    assert told == [" ".join(map(str, moment.long)) for moment in again.rows[0]]
    names = ("ages", "autocorrelation", "seen-twice", "graph-paper", "graph-lift", "graph-seen-twice")
    for name in names:
        data = (tmp_path / "out" / f"memoria-{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) > 10_000
    assert not (tmp_path / "out" / "memoria-graph-seeds.png").exists()

    for more, segments, words in (
        (("--rule", "best"), "24", "unknown rule 'best'"),
        ((), "9999", "has 79 segments of 8 tokens"),
        (("--steps", "one"), "24", "whole numbers"),
        ((), "10", "need 12 segments"),
    ):
        result = run(*more, segments=segments)
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("│", " ").split())
    assert not hasattr(model.transformer, "mnemic"), "a failed run leaves no memory on the model"
