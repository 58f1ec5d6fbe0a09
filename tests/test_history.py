"""What was written when: positions and shares are right on every path, and follow the session wherever it goes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import mnemic
from families import WIDTH
from helpers import CONFIGS, SEGMENT, TRAINED, assert_near, every_config, host, known, other, tokens
from mnemic import history
from mnemic.history import ENTRIES, PER_PLACE, SHARED, TOKENS, WRITES, Log, Told
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.state import read_file, write_file

STAR = 7
"""The token that slots look for."""
WINDOW = 2 * SEGMENT
TELLING = ["emt-0", "emt-1", "emt-3", "emt-4", "memoria-0", "memoria-1"]
TELLING += ["fast-weights-0", "fast-weights-1", "fast-weights-2"]
TELLING += ["titans-0", "titans-1", "titans-2", "persistent-0", "persistent-1", "persistent-2", "persistent-4"]
TELLING += ["several-0", "several-1"]


def starry(name: str = "llama", **changes):
    """A model whose slots give nearly all of the attention of a write to the token `STAR`, wherever it stands."""
    model = host(name, mnemic.EMTConfig(segment_length=SEGMENT, slots=3, dim=16, heads=2, write_layer=0, **changes))
    towards = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)), dim=0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[STAR] = 40 * towards
        for writer in mnemic.attached(model).memory.writers:
            writer.norm_hidden.weight.fill_(1)
            writer.norm_hidden.bias.zero_()
            writer.query.weight.zero_()
            writer.query.bias.copy_(torch.eye(16)[0])
            writer.key.weight.zero_()
            writer.key.weight[0] = 20 * towards
    return model


def with_stars(places, time):
    """Ids of `time` tokens in which `STAR` stands at these positions and nowhere else."""
    ids = tokens(1, time).masked_fill(tokens(1, time) == STAR, STAR + 1)
    ids[0, list(places)] = STAR
    return ids


def told(session):
    """Of every write its number, positions, and the token that weighed most in its first place."""
    return [(each["number"], each["first"], each["last"], each["places"][0]["tokens"][0]) for each in session.history]


STARS = (3, 8, 23, 27, 36)
EXPECTED = [(1, 0, 7, 3), (2, 8, 15, 8), (3, 16, 23, 23), (4, 24, 31, 27), (5, 32, 38, 36)]


def in_one(session, ids):
    session.read(ids)


def token_by_token(session, ids):
    for position in range(ids.shape[1]):
        session.forward(ids[:, position : position + 1])


def in_parts(session, ids):
    for part in ids.split(13, 1):
        session.forward(part)


def generating(session, ids):
    session.read(ids[:, :20])
    # what is said is what comes next in the ids, so that all paths read the same
    answer = session.generate(
        ids[:, 20:21],
        max_new_tokens=5,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, said: [int(ids[0, 20 + len(said)])],
    )
    assert torch.equal(answer, ids[:, 21:26])
    session.read(ids[:, 26:])


def in_a_batch(session, ids):
    beside = mnemic.Session(session.model, window=session.window)
    together = mnemic.batch([beside, session])
    together.read([other(ids[:, :11]), ids[:, :29]])
    together.read([other(ids), ids[:, 29:]])
    assert [each["number"] for each in beside.history] == list(range(1, len(beside.history) + 1))


def saved_on_the_way(session, ids):
    session.read(ids[:, :21])
    again = mnemic.Session.from_bytes(session.to_bytes(), session.model)
    again.read(ids[:, 21:])
    session._adopt(again.cache)


@pytest.mark.parametrize("window", [SEGMENT, WINDOW])
@pytest.mark.parametrize(
    "path", [in_one, token_by_token, in_parts, generating, in_a_batch, saved_on_the_way], ids=lambda path: path.__name__
)
@torch.no_grad()
def test_positions_are_right_on_every_path(path, window):
    session = mnemic.Session(starry(), window=window)
    path(session, with_stars(STARS, 39))
    session.flush()
    assert told(session) == EXPECTED
    for record in session.history:
        for place in record["places"]:
            assert place["weights"][0] > 0.99
            assert len(place["tokens"]) <= TOKENS


@torch.no_grad()
def test_positions_are_right_with_reads_below_the_write_and_in_an_encoder():
    for model in (starry(read_layers=[0, 1]), starry("bert")):
        session = mnemic.Session(model)
        session.read(with_stars(STARS, 39))
        session.flush()
        assert told(session) == EXPECTED


@torch.no_grad()
def test_shares_are_the_gates_and_what_is_left_of_them():
    model = starry()
    for writer in mnemic.attached(model).memory.writers:
        writer.gate.weight.zero_()
        writer.gate.bias.fill_(np.log(0.3 / 0.7))
    session = mnemic.Session(model)
    session.read(tokens(1, 4 * SEGMENT))
    for record in session.history:
        assert {place["place"] for place in record["places"]} == {0, 1, 2}
        for place in record["places"]:
            assert place["share"] == pytest.approx(0.3, abs=1e-4)
            assert place["left"] == pytest.approx(0.3 * 0.7 ** (4 - record["number"]), abs=1e-4)


@every_config
@torch.no_grad()
def test_what_every_mechanism_tells(config):
    label = next(name for name, each in CONFIGS.items() if each is config)
    memory = mnemic.attached(host("llama", config)).memory
    width = len(memory.writes) * WIDTH
    hidden, keep = torch.randn(3, 6, width), torch.ones(3, 6, dtype=torch.bool)
    keep[1, 2:4], keep[2, 5] = False, False
    state = memory.init_state(3)
    state, ids = memory.write(torch.randn(3, SEGMENT, width), state, **known(memory, 3, SEGMENT)), known(memory, 3, 6)
    before = {name: tensor.clone() for name, tensor in state.items()}
    after, found = memory.write_and_tell(hidden, state, keep, **ids)
    written = memory.write(hidden, state, keep, **ids)
    assert all(torch.equal(tensor, written[name]) for name, tensor in after.items())
    assert after.keys() == written.keys()
    assert (found is not None) == (label in TELLING)
    if found is None:
        return
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())
    batch, places, time = found.weight.shape
    assert (batch, time) == (3, 6)
    assert found.place.shape == found.share.shape == (3, places)
    assert all(len(set(row)) == places for row in found.place.tolist())
    assert ((found.share >= 0) & (found.share <= 1)).all()
    assert (found.weight >= 0).all()
    assert not found.weight[~keep[:, None].expand_as(found.weight)].any()
    assert_near(found.weight.sum(-1), torch.ones(3, places), 1e-5)
    # rows are apart: each alone, without its padding, tells the same
    for row in range(3):
        kept = hidden[row : row + 1, keep[row]]
        _, lone = memory.write_and_tell(kept, {name: tensor[row : row + 1] for name, tensor in state.items()})
        assert_near(lone.weight, found.weight[row : row + 1, :, keep[row]], 1e-5)
        assert_near(lone.share, found.share[row : row + 1], 1e-5)
    if found.alive is not None:
        assert all(
            set(row) <= set(alive) for row, alive in zip(found.place.tolist(), found.alive.tolist(), strict=True)
        )


@pytest.mark.parametrize("label", [f"{kind}-0" for kind in TRAINED])
@torch.no_grad()
def test_a_history_changes_no_number(label):
    model = host("llama", CONFIGS[label])
    session, without = mnemic.Session(model, keep_text=True), mnemic.Session(model)
    without._layer.log = None
    for part in tokens(1, 50).split(11, 1):
        assert torch.equal(session.forward(part).logits, without.forward(part).logits)
    assert len(session.history) == 6
    assert without.history == []
    json.dumps(session.history)


@torch.no_grad()
def test_a_history_follows_its_session(monkeypatch):
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(history.time, "time", lambda: next(clock))
    model = host("llama", CONFIGS["emt-0"])
    session = mnemic.Session(model)
    assert session.history == []
    session.read(tokens(1, 3 * SEGMENT + 2))
    assert [each["time"] for each in session.history] == [1000, 1001, 1002]
    fork, before = session.fork(), session.history
    session.read(tokens(1, SEGMENT, 1))
    assert fork.history == before
    assert session.history != before
    assert len(session.history) == 4
    fork.read(tokens(1, SEGMENT, 2))
    assert fork.history[-1]["time"] != session.history[-1]["time"]

    standing = session.history
    bad = tokens(1, 200)
    bad[0, 150] = 10_000
    with pytest.raises(ValueError, match="token 10000 is none of the model's"):
        session.read(bad)
    assert session.history == standing

    session.reset()
    assert session.history == []
    session.read(tokens(1, SEGMENT))
    assert [each["number"] for each in session.history] == [1]


@torch.no_grad()
def test_only_rows_that_keep_a_log_are_asked_about():
    model = starry()
    memory, router = mnemic.attached(model).memory, mnemic.attached(model).router
    towards = model.get_input_embeddings().weight[STAR]
    stream = dataclasses.replace(router.new_stream(3), logs=(None, Log(), Log()))
    hidden = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    hidden[0, 1] = hidden[1, 2] = hidden[2, 4] = towards
    stream = stream.append(hidden, torch.arange(6) < torch.tensor([[6], [5], [6]]))
    stream = stream.commit(memory, [0, 2])
    assert stream.logs[0] is None
    assert stream.logs[1].records() == []
    assert [each["places"][0]["tokens"][0] for each in stream.logs[2].records()] == [4]
    both = stream.append(hidden[:, :2], None).commit(memory, [1, 2])
    assert [each["first"] for each in both.logs[1].records()] == [0]
    assert [each["places"][0]["tokens"][0] for each in both.logs[1].records()] == [2]
    assert [(each["first"], each["last"]) for each in both.logs[2].records()] == [(0, 5), (6, 7)]
    turned = both.select([2, 0, 1, 1]).repeat(2)
    assert [log and len(log.writes) for log in turned.logs] == [2, 2, None, None, 1, 1, 1, 1]
    begun = both.reset(memory, [2])
    assert [log and len(log.writes) for log in begun.logs] == [None, 1, 0]


@torch.no_grad()
def test_beams_leave_one_history():
    session = mnemic.Session(starry(), keep_text=True)
    session.read(with_stars((3,), 12))
    answer = session.generate(tokens(1, 5, 3), num_beams=3, max_new_tokens=9, min_new_tokens=9)
    assert [each["last"] for each in session.history] == [7, 15, 23]
    assert session._log.ids == [*with_stars((3,), 12)[0].tolist(), *tokens(1, 5, 3)[0].tolist(), *answer[0].tolist()]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [in_one, token_by_token, in_parts, generating, in_a_batch, saved_on_the_way])
@torch.no_grad()
def test_text_is_kept_where_it_is_asked_for(path):
    ids = with_stars(STARS, 39)
    session = mnemic.Session(starry(), keep_text=True)
    path(session, ids)
    assert session._log.ids == ids[0].tolist()
    assert session.fork()._log.ids == ids[0].tolist()
    session.reset()
    session.read(ids[:, :3])
    assert session._log.ids == ids[0, :3].tolist()


@torch.no_grad()
def test_text_is_not_kept_unless_it_is_asked_for(tmp_path):
    session = mnemic.Session(starry())
    session.read(tokens(1, 30))
    session.save(tmp_path / "a.memory")
    found, meta = read_file(tmp_path / "a.memory")
    assert "history.writes" in found
    assert "history.text" not in found
    assert meta["keep_text"] is False
    assert session._log.ids is None


@torch.no_grad()
def test_tokens_that_came_as_embeddings_are_marked_unknown():
    model = starry()
    session = mnemic.Session(model, keep_text=True)
    session.read([11, 12])
    embedded = model.get_input_embeddings()(tokens(1, 3))
    model(inputs_embeds=embedded, **{CACHE: session.cache})
    assert session._log.ids == [11, 12]
    session.read([13])
    assert session._log.ids == [11, 12, -1, -1, -1, 13]


def test_a_long_text_is_kept_in_pieces():
    log, ids = Log(text=()), np.arange(5000)
    for position in range(5000):
        log = log.read(position, ids[position : position + 1])
    assert log.ids == ids.tolist()
    assert max(map(len, log.text)) <= history.CHUNK


# --- bounds ----------------------------------------------------------------------------------------------------------


def taken(places, share, alive=None):
    """A write of all of `places`, by tokens 0 and 1 of its segment."""
    places = np.asarray(places)
    count = len(places)
    weight = np.tile(np.array([[0.75, 0.25]], np.float32), (count, 1))
    return Told(places, np.full(count, share), np.tile([[0, 1]], (count, 1)), weight, alive)


def test_a_log_is_bounded_and_spans_the_stream():
    log = Log()
    for number in range(1, 3001):
        log = log.note(number, 8 * number, 8 * number + 7)
        assert len(log.writes) <= WRITES
    numbers = log.writes[:, 0].tolist()
    assert numbers[0] == 1
    assert numbers[-WRITES // 3 :] == list(range(3001 - WRITES // 3 - 1, 3001))[-len(numbers[-WRITES // 3 :]) :]
    assert numbers == sorted(set(numbers))


def test_a_log_keeps_of_each_place_what_most_is_left_of():
    log = Log()
    shares = [0.9, 0.02, 0.005, 0.05, 0.03, 0.04]
    for number, share in enumerate(shares, 1):
        log = log.note(number, 0, 1, taken(range(40), share))
    kept = {each["number"]: each["places"] for each in log.records() if each["places"]}
    assert set(kept) == {1, 4, 6}, "0.005 is too little for an entry, and of the others three are less"
    left = 0.9 * np.prod([1 - share for share in shares[1:]])
    assert kept[1][0] == {
        "place": 0, "share": 0.9, "left": pytest.approx(left, abs=1e-3), "tokens": [0, 1], "weights": [0.75, 0.25]
    }  # fmt: skip
    assert {len(places) for places in kept.values()} == {40}
    few = Log()
    for number in range(1, 101):
        few = few.note(number, 0, 1, taken(range(2), 0.03))
    assert len(few.entries) == 2 * (SHARED // 2) > 2 * PER_PLACE


def test_a_write_that_some_place_holds_is_never_dropped():
    log = Log().note(1, 0, 7, taken([5], 1.0))
    for number in range(2, 500):
        log = log.note(number, 8 * number, 8 * number + 7, taken([6], 0.5))
    (first,) = [each for each in log.records() if each["number"] == 1]
    assert first["places"][0]["place"] == 5
    assert first["places"][0]["left"] == 1
    assert len(log.writes) <= WRITES + len(log.entries)


def test_places_that_are_gone_leave_the_log():
    log = Log().note(1, 0, 7, taken([1, 2], 1.0, np.array([1, 2, -1])))
    log = log.note(2, 8, 15, taken([3, 4], 1.0, np.array([2, 3, 4])))
    assert [[place["place"] for place in each["places"]] for each in log.records()] == [[2], [3, 4]]
    assert [each["alive"] for each in log.records()] == [2, 3]
    for number in range(3, 200):
        new = np.arange(30 * number, 30 * number + 30)
        log = log.note(number, 0, 1, taken(new, 1.0, np.arange(30 * number + 30)))
    assert len(log.entries) == ENTRIES
    assert log.entries[:, 1].min() > 3000, "of what is equally there the older goes"


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_log_survives_a_file():
    log = Log(text=())
    for number in range(1, 9):
        log = log.note(number, 8 * number - 8, 8 * number - 1, taken([0, 1], 0.4)).read(8 * number - 8, np.arange(8))
    again = Log.of(log.tensors())
    assert again.records() == log.records()
    assert again.ids == log.ids
    assert Log.of(Log().tensors()).records() == []


def broken(name, change):
    def spoil(found):
        found[name] = change(found[name])

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.pop("writes"),
        broken("writes", lambda tensor: tensor[:, :3]),
        broken("writes", lambda tensor: tensor.float()),
        broken("writes", lambda tensor: tensor.flip(0)),
        broken("writes", lambda tensor: -tensor),
        broken("writes", lambda tensor: tensor[:0]),
        broken("entries", lambda tensor: tensor[:1]),
        broken("entries", lambda tensor: tensor - 2),
        broken("entries", lambda tensor: tensor.repeat(600, 1)),
        broken("weights", lambda tensor: tensor * torch.nan),
        broken("weights", lambda tensor: tensor.double()),
        broken("text", lambda tensor: tensor.long()),
        broken("text", lambda tensor: tensor[None]),
    ],
)
def test_a_spoilt_history_is_refused_and_nothing_is_loaded(spoil, tmp_path):
    model = host("llama", CONFIGS["emt-0"])
    session = mnemic.Session(model, keep_text=True)
    session.read(tokens(1, 3 * SEGMENT))
    session.save(tmp_path / "a.memory")
    tensors, meta = read_file(tmp_path / "a.memory")
    found = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("history.")}
    spoil(found)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("history.")}
    write_file(tmp_path / "a.memory", rest | {f"history.{name}": tensor for name, tensor in found.items()}, meta)
    with pytest.raises(mnemic.StateError, match="history"):
        mnemic.Session.load(tmp_path / "a.memory", model)


def test_a_file_without_a_history_still_loads(tmp_path):
    model = host("llama", CONFIGS["emt-0"])
    session = mnemic.Session(model)
    session.read(tokens(1, 3 * SEGMENT + 1))
    session.save(tmp_path / "a.memory")
    tensors, meta = read_file(tmp_path / "a.memory")
    del meta["keep_text"]
    write_file(
        tmp_path / "a.memory", {name: each for name, each in tensors.items() if not name.startswith("history.")}, meta
    )
    again = mnemic.Session.load(tmp_path / "a.memory", model)
    assert again.history == []
    question = tokens(1, SEGMENT, 3)
    assert torch.equal(again.forward(question).logits, session.forward(question).logits)
    assert [each["number"] for each in again.history] == [4]


@torch.no_grad()
def test_streams_without_a_session_have_none():
    model = host("llama", CONFIGS["emt-0"])
    cache = mnemic.memory_cache(model, SEGMENT)
    model(input_ids=tokens(2, 2 * SEGMENT), **{CACHE: cache})
    assert cache.memory.stream.logs == (None, None)
    assert mnemic.unroll(model, tokens(2, 2 * SEGMENT), tokens(2, 2 * SEGMENT)).stream.logs == (None, None)
