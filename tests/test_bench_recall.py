"""Recall measured: what counts as an answer, places, controls and margins."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from helpers import trained
from mnemic.bench import recall as bench
from mnemic.tasks.base import TEST_SEEDS, generator
from mnemic.tasks.facts import Question, SymbolRecall
from mnemic.unrolling import IGNORED
from recalls import CONTROLS, every_task

# --- what counts as an answer ----------------------------------------------------------------------------------------


def oracle(question, vocabulary=97):
    """Logits that answer everything right."""
    targets = F.pad(question.labels[:, 1:], (0, 1), value=0).clamp_min(0)
    return F.one_hot(targets, vocabulary).float()


@every_task
def test_an_oracle_has_answered(task):
    episode = task.tell(8, generator(0))
    question = task.ask(episode, torch.zeros(8, 1, dtype=torch.long), generator(1))
    assert bench.answered(oracle(question), question).tolist() == [True] * 8


@every_task
def test_one_wrong_token_is_no_answer(task):
    episode = task.tell(4, generator(0))
    question = task.ask(episode, torch.zeros(4, 1, dtype=torch.long), generator(1))
    for row in range(4):
        for place in (question.labels[row] != IGNORED).nonzero().flatten().tolist():
            logits = oracle(question)
            logits[row, place - 1, (question.labels[row, place] + 1) % 97] = 2
            assert bench.answered(logits, question).tolist() == [other != row for other in range(4)]


def test_what_is_not_asked_does_not_count():
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    question = Question(labels.clamp_min(0), labels, labels)
    logits = oracle(question)
    for place in (0, 3, 4):
        logits[0, place, 9] = 2
    assert bench.answered(logits, question).tolist() == [True]


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    return SymbolRecall(segment_length=16, pairs=2)


@pytest.fixture
def config():
    return mnemic.EMTConfig(slots=4, dim=16, heads=2, segment_length=16)


def test_an_untrained_memory_scores_at_chance(task, config):
    attachment = mnemic.attach(make("gpt2"), config)
    seen = []
    (score,) = bench.evaluate(attachment, task, bench.Places(1, 0, 2), rows=48, batch=32, progress=seen.append)
    assert (score.length, score.tokens, score.examples) == (3, 64, 96)
    assert set(score.controls) == CONTROLS
    assert set(score.outcomes) == {"memory", *CONTROLS}
    assert sum(seen) == 48 * 4
    for name, outcome in score.outcomes.items():
        assert len(outcome) == 96
        assert set(outcome) <= {"0", "1"}
        share = score.score if name == "memory" else score.controls[name]
        assert share == pytest.approx(outcome.count("1") / 96)
        assert share < 0.25, f"{name} answers without a memory"
        assert outcome == score.outcomes["memory"], "an untrained memory changes nothing"
    assert score.details["state_bytes"] == 4 * 16 * 4
    assert 0 <= score.ceiling < 0.25
    assert {"margin_nats", "found_in_8_tokens", "tokens_until_value"} < set(score.details)
    assert bench.beyond_chance([score]) == {}


def test_a_seed_numbers_a_test(task, config):
    attachment, places = trained(make("gpt2"), config), bench.Places(after=2)
    scores = [bench.evaluate(attachment, task, places, rows=8, seed=seed, detail=False) for seed in (0, 0, 1)]
    assert scores[0] == scores[1]
    told = [task.tell(8, generator(TEST_SEEDS + 10_007 * seed)).told for seed in (0, 1)]
    assert not torch.equal(told[0], told[1])
    assert "margin_nats" not in scores[0][0].details


def test_every_kind_of_question_has_a_score(task, config):
    attachment = mnemic.attach(make("gpt2"), config)
    places = bench.Places(1, 2, 0, segments=2, corrected=1)
    scores = bench.evaluate(attachment, task, places, rows=12, batch=8)
    kinds = [bench.asked_for(score) for score in scores]
    assert kinds == ["first facts, beside corrected", "second facts, beside corrected", "corrected facts"]
    assert [score.examples for score in scores] == [12] * 3, "of two and two facts one is corrected"
    assert all(bench.places_of(score) == places for score in scores)
    assert ["old" in score.details for score in scores] == [False, False, True]
    plain = bench.evaluate(attachment, task, bench.Places(segments=2), rows=4, detail=False)
    assert [bench.asked_for(score) for score in plain] == ["first facts", "second facts"]


@pytest.mark.parametrize("anywhere", [False, True])
def test_places(anywhere):
    places = bench.Places(2, 3, 1, segments=2, anywhere=anywhere)
    assert (places.fillers, places.total) == (6, 8)
    drawn = places.draw(200, generator(0))
    assert (drawn[:, 0] < drawn[:, 1]).all()
    if anywhere:
        assert len(drawn.unique(dim=0)) == 28, "all pairs of eight places"
    else:
        assert drawn.unique(dim=0).tolist() == [[2, 6]]


def test_bad_places():
    with pytest.raises(ValueError, match="after is -1"):
        bench.Places(after=-1)
    with pytest.raises(ValueError, match="segments is 3"):
        bench.Places(segments=3)


def test_the_places_of_a_test_are_all_different():
    places = bench.test_places((0, 1, 8), 100, 2)
    assert len(set(places)) == len(places) == 14
    assert {each.before for each in places} == {each.after for each in places} == {0, 1, 8, 100}
    assert sum(each.anywhere for each in places) == 3


@every_task
def test_without_binding_the_values_are_known_and_not_whose(task):
    """Guessing by the told segments alone is right as often as the floor says."""
    episode = task.tell(400, generator(0), segments=2, corrected=1)
    for which in range(episode.keys.shape[1]):
        floors = bench.unbound(task, episode, which)
        assert floors["chance"].mean() == pytest.approx(1 / len(task.candidates))
        guessed = []
        for row in range(400):
            said = episode.said[row, episode.since[row, which]].tolist()
            best = [value for value in set(said) if said.count(value) == max(map(said.count, said))]
            guessed.append((int(episode.values[row, which]) in best) / len(best))
        assert floors[bench.UNBOUND].tolist() == pytest.approx(guessed)
        told = (episode.said.flatten(1) == episode.values[:, which, None]).float().mean(1)
        assert torch.equal(floors["a told value at random"], told)
        assert floors[bench.UNBOUND].mean() > told.mean() > 2 / len(task.candidates)


def test_a_control_above_chance_is_named(task, config):
    (score,) = bench.evaluate(mnemic.attach(make("gpt2"), config), task, bench.Places(), rows=32, detail=False)
    score.controls |= {"zeroed": 1 / 16 + 0.01, "fresh": 1 / 16 + 0.2}
    assert set(bench.beyond_chance([score])) == {"fresh"}


def test_conditions(task, config):
    attachment = trained(make("gpt2"), config)
    episode = task.tell(4, generator(0))
    laid = task.lay(episode, bench.Places(after=3).draw(4, generator(1)), 4, generator(1))
    stream = bench.read_stream(attachment, laid, lambda segments: None)
    assert stream.written == (4,) * 4
    states = bench.conditions(attachment, stream.state)
    own = stream.state["slots"]
    assert list(states) == list(bench.CONDITIONS)
    assert states["no memory"] is None
    assert torch.equal(states["memory"]["slots"], own)
    assert not states["zeroed"]["slots"].any()
    assert torch.equal(states["fresh"]["slots"], attachment.memory.init_state(4)["slots"])
    for row in range(4):
        assert torch.equal(states["other stream"]["slots"][row], own[row - 1])
    ids = task.ask(episode, torch.zeros(4, 1, dtype=torch.long), generator(2)).ids
    logits = [bench.logits_of(attachment, ids, state) for state in states.values()]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(logits, 2)), "two conditions are one"
    with attachment.disabled(), torch.no_grad():
        torch.testing.assert_close(logits[-1], attachment.model(ids).logits)


def test_reading_in_parts_reads_the_same_number(task, config):
    attachment = trained(make("gpt2"), config)
    seen = []
    stream = bench.read_stream(attachment, task.filler(3, 8, generator(0)), seen.append, part=3)
    assert seen == [9, 9, 6]
    assert stream.seen == (8 * 16,) * 3


def test_every_condition_is_scored_under_its_own_name(task, config, monkeypatch):
    """Only one condition at a time is given an oracle: it alone must score."""
    attachment = mnemic.attach(make("gpt2"), config)
    asked = []
    ask = task.ask
    monkeypatch.setattr(task, "ask", lambda *given: asked.append(ask(*given)) or asked[-1])
    names = [name for name in bench.CONDITIONS if name != "no memory"]
    monkeypatch.setattr(
        bench, "conditions", lambda attachment, state, order: {**{n: n for n in names}, "no memory": None}
    )
    for right in names:

        def logits_of(attachment, ids, state, right=right):
            good = oracle(asked[-1]) if asked and asked[-1].ids.shape == ids.shape else torch.zeros(*ids.shape, 97)
            return good if state == right else torch.zeros_like(good)

        monkeypatch.setattr(bench, "logits_of", logits_of)
        (score,) = bench.evaluate(attachment, task, bench.Places(after=1), rows=8, batch=4, detail=False)
        shares = {"memory": score.score, **score.controls}
        assert shares == {name: float(name == right) for name in bench.CONDITIONS}
        assert score.ceiling == 0


@every_task
@pytest.mark.parametrize("sign", [1, -1])
def test_margins(task, sign, monkeypatch):
    """Every token of the right answer lies 30 nats above or below all others."""
    episode = task.tell(4, generator(0))
    question = task.ask(episode, torch.zeros(4, 1, dtype=torch.long), generator(1))
    place = (question.labels != IGNORED).long().argmax(1)
    given = []

    def logits_of(attachment, ids, state):
        given.append(ids)
        logits = torch.zeros(*ids.shape, 97)
        for row in range(4):
            for offset, token in enumerate(task.candidates[int(episode.values[row, 0])]):
                logits[row, place[row] + offset - 1, token] = 30 * sign
        return logits

    monkeypatch.setattr(bench, "logits_of", logits_of)
    margins = bench.margins(SimpleNamespace(), task, question, episode.values[:, 0], {})
    assert margins.shape == (4,)
    # answers that begin alike differ in fewer tokens; all differ in one
    assert (sign * margins > 20).all()
    if len(task.candidates[0]) == 1:
        torch.testing.assert_close(margins, torch.full((4,), 30.0 * sign))
    for candidate, ids in zip(task.candidates, given, strict=True):
        for row in range(4):
            assert ids[row, place[row] : place[row] + len(candidate)].tolist() == candidate
            assert torch.equal(ids[row, : place[row]], question.ids[row, : place[row]])


@pytest.mark.parametrize("knows", ["the new value", "the old value"])
def test_old_values_are_told_from_new_ones(knows, task, config, monkeypatch):
    """A memory that has one of both is right where it should be, and the old value is counted as such."""
    attachment = mnemic.attach(make("gpt2"), config)
    new, questions, ask = knows == "the new value", [], task.ask

    def asked(episode, facts, source):
        questions.append(facts)
        return ask(episode, facts, source)

    def logits_of(attachment, ids, state):
        logits = torch.zeros(*ids.shape, 97)
        old = torch.where(first.before < 0, first.values, first.before)
        wanted = (first.values if new else old).gather(1, questions[-1])
        logits.scatter_(2, (wanted + task.first_value)[:, None].expand(-1, ids.shape[1], -1), 5.0)
        return logits

    first = task.tell(6, generator(TEST_SEEDS), segments=2, corrected=2)
    monkeypatch.setattr(task, "ask", asked)
    monkeypatch.setattr(bench, "logits_of", logits_of)
    (score,) = bench.evaluate(attachment, task, bench.Places(segments=2, corrected=2), rows=6, detail=False)
    assert bench.asked_for(score) == "corrected facts"
    assert (score.score, score.details["old"]) == ((1, 0) if new else (0, 1))
