"""Files that are damaged, or made by somebody who writes the checksum too: a clear error, and nothing has changed.

`benchmarks/mutated_files.py` runs ten thousand of them.
"""

from __future__ import annotations

import random

import pytest
import torch
from typer.testing import CliRunner

import mnemic
import mutated_files as mutations
from helpers import CONFIGS, SEGMENT, every_kind, host, tokens
from mnemic.attachment import WEIGHTS_FILE
from mnemic.state import from_bytes
from mutated_files import OF_ADAPTERS, OF_SESSIONS, mutated_files, seal


def test_none_of_many_wrong_files_is_loaded(tmp_path):
    found = mutated_files(360, tmp_path, seed=7)
    assert found.files == sum(found.refused.values()) == 360
    assert (found.loaded, found.crashed, found.changed) == ([], [], [])
    assert found.slowest < 5
    met = {label.split(", ")[1] for label in found.refused}
    assert met == {damage.__name__.replace("_", " ") for damage in (*OF_SESSIONS, *OF_ADAPTERS)} | {"of another"}


def test_the_measurement_finds_what_is_loaded_crashes_or_changes(tmp_path, monkeypatch):
    """Checks that look away: without them, what is counted must not be nothing."""
    monkeypatch.setattr("mnemic.keeping.check_contents", lambda *_: None)
    found = mutated_files(60, tmp_path, seed=1)
    assert found.loaded
    monkeypatch.undo()
    monkeypatch.setattr(mutations, "_adapter", lambda of, *_: torch.nn.init.ones_(of.bare.lm_head.weight))
    found = mutated_files(4, tmp_path, seed=1)
    assert found.changed
    assert len(found.loaded) == 2


@every_kind
@torch.no_grad()
def test_what_a_session_writes_passes_its_own_checks(config):
    model = host("llama", config)
    for read in (0, 3, SEGMENT, 4 * SEGMENT + 5, 30 * SEGMENT):
        session = mnemic.Session(model, window=2 * SEGMENT, keep_text=read == 3)
        if read:
            session.read(tokens(1, read))
        again = mnemic.Session.from_bytes(session.to_bytes(), model)
        question = tokens(1, 5, 3)
        assert torch.equal(again.forward(question).logits, session.forward(question).logits)


# --- what a checksum that fits does not hide --------------------------------------------------------------------------


def told(data, change):
    tensors, meta = from_bytes(data)
    change(tensors, meta)
    return seal(tensors, meta)


def refused(config, change, match, read=5 * SEGMENT + 3, name="llama"):
    model = host(name, config)
    session = mnemic.Session(model, window=2 * SEGMENT if name == "llama" else None)
    session.read(tokens(1, read))
    data = session.to_bytes()
    mnemic.Session.from_bytes(told(data, lambda *_: None), model)
    with pytest.raises(mnemic.StateError, match=match) as error:
        mnemic.Session.from_bytes(told(data, change), model, source="alice.memory")
    assert str(error.value).startswith("alice.memory ")


def put(name, value):
    def change(tensors, _):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def say(part, name, value):
    return lambda _, meta: meta[part].update({name: value}) if part else meta.update({name: value})


EMT = CONFIGS["emt-0"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("state.slots", lambda t: t[..., :-1]), r"state.slots is \[.*\] of torch.float32, here it would be \["),
        (
            put("state.slots", lambda t: t.double()),
            r"state.slots is .* of torch.float64, here it would be .* of torch.float32",
        ),
        (put("state.slots", lambda t: t / 0), "state.slots is NaN or infinite somewhere"),
        (
            put("waiting", lambda t: t[:, :1]),
            r"waiting is \[1, 1, 64\] of torch.float32, here it would be \[1, 3, 64\]",
        ),
        (
            put("keys.0", lambda t: t[:, :1]),
            r"keys.0 is \[1, 1, 11, 16\] of torch.float32, here it would be \[1, 2, 11, 16\]",
        ),
        (put("values.1", lambda t: t.long()), "values.1 is .* of torch.int64, here it would be .* of torch.float32"),
        (put("keys.7", torch.zeros(1, 2, 11, 16)), "nothing here keeps 'keys.7'"),
        (put("../../x", torch.zeros(1)), r"nothing here keeps '\.\./\.\./x'"),
        (put("window.valid", lambda t: t[:, :4]), r"here it would be \[1, 2, 4, 16\]"),
        (put("window.valid", lambda t: ~t), "a window of 11 keys, of which 0 are there"),
        (lambda t, _: t.pop("values.0"), "it lacks values.0"),
        (say("stream", "counts", [SEGMENT]), r"waiting is \[1, 3, 64\] .*, here it would be \[1, 8, 64\]"),
        (say("stream", "seen", [10**6]), "1000000 tokens cannot be 5 segments of at most 8 and 3 that wait"),
        (say("stream", "written", [True]), "has a description of the wrong kind: stream is"),
        (say("running", "position", [2]), "and the next at position 2, cannot be"),
        (say("running", "position", [2**40]), "position 1099511627776 of 256"),
        (say("running", "context", [-1]), "of the wrong kind: running is"),
        (say(None, "window", 3), "has a window that this model cannot have: segment_length 8 is longer"),
        (say(None, "window", None), "its window is None; decoders have one"),
        (
            say(None, "code", "import os"),
            "says 'code', which this release of mnemic does not know: it was written by a later one",
        ),
        (lambda _, meta: meta.pop("base_model"), "does not say base_model, which every session does"),
        (say(None, "keep_text", True), "keep_text is True, and its history has no text"),
        (put("history.text", torch.zeros(3, dtype=torch.int32)), "keep_text is False, and its history has text"),
    ],
)
def test_sessions_that_do_not_fit(change, match):
    refused(EMT, change, match)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("knn-0", put("state.count", lambda t: t + 1000), "count goes from 10.. to 10.., and can be 0 to"),
        ("knn-0", put("state.keys", lambda t: t[:, :-1]), "values goes from"),
        ("compressive-0", put("state.memory_count", lambda t: t + 1000), "memory_count goes from"),
        ("transformer-xl-0", put("state.count", lambda t: -t), "count goes from"),
        ("memory-prompt-0", put("state.count", lambda t: t + 1), "count goes from 6 to 6, and can be 0 to 5"),
        ("infinity-former-0", put("state.written", lambda t: t + 1), "written goes from 6 to 6, and can be 0 to 5"),
        ("memoria-0", put("state.recalled", lambda t: t + 1000), "recalled goes from"),
        ("memoria-0", put("state.levels", lambda t: t + 1000), "levels goes from"),
        ("memoria-0", put("state.step", lambda t: t + 2**40), "step goes from"),
        ("memoria-0", put("state.lifespan", lambda t: t[:, :-1]), "tables of engrams have sizes"),
        ("memoria-0", put("state.levels", lambda t: t * 0 + 1), "working memory has 1 engrams; it has"),
    ],
)
def test_places_that_are_not_there(kind, change, match):
    refused(CONFIGS[kind], change, match)


def test_an_encoder_keeps_no_keys():
    change = say(None, "running", {"context": [0], "running": [0], "position": [0]})
    refused(EMT, change, "is an encoder and keeps no keys", name="bert")


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting", "match"),
    [
        ("emt", {"slots": "8"}, "slots is '8'; use int"),
        ("emt", {"slots": 10**4}, "is .*, by its config it is"),
        ("emt", {"dim": 2**62}, "makes no memory of this model"),
        ("emt", {"stack": 10**9}, "stack is 1000000000; at most 64 memories stand on each other"),
        ("emt", {"read_layers": [0.5]}, "read_layers is .*; use list.int. or None"),
        ("emt", {"feedback": True}, "feedback is True; use float"),
        ("emt", {"segment_length": 10**9}, "is longer than the model's 256 positions"),
        ("emt", {"write": "elsewhere"}, "write is 'elsewhere'; use 'segment' or 'token'"),
        ("emt", {"kind": "os"}, "unknown memory kind 'os'"),
        ("emt", {"kind": ["emt"]}, r"unknown memory kind \['emt'\]"),
        ("titans", {"layers": 10**9}, "layers is 1000000000; the network has at most 64"),
        ("infinity-former", {"bases": 10**7}, "whose memory begins with [0-9,]+ bytes; the most are"),
    ],
)
def test_adapters_whose_config_was_made_by_hand(kind, setting, match, tmp_path):
    of = mutations.subject(CONFIGS[f"{kind}-0"], tmp_path / kind)
    wrong = told(of.weights, lambda _, meta: meta["memory"].update(setting))
    names = list(of.bare.state_dict())
    with pytest.raises(mnemic.StateError, match=match):
        mutations._adapter(of, wrong, tmp_path)
    assert list(of.bare.state_dict()) == names
    assert all(parameter.requires_grad for parameter in of.bare.parameters())
    mutations._adapter(of, told(of.weights, lambda *_: None), tmp_path)


def test_adapters_whose_config_is_no_description(tmp_path):
    of = mutations.subject(EMT, tmp_path / "emt")
    for content, match in {
        "[" * 100_000: "is not JSON",
        '{"memory": 1, "memory": 2}': "a name stands twice",
        '{"memory": NaN}': "not a finite number",
        " " * (9 * 2**20): "has more than 8,388,608 bytes",
        "{}": "it was edited or mixed up",
    }.items():
        (tmp_path / "emt" / "memory_config.json").write_text(content)
        with pytest.raises(mnemic.StateError, match=match):
            mnemic.from_pretrained(of.bare, tmp_path / "emt")
    (tmp_path / "emt" / "memory_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(mnemic.StateError, match="is not JSON"):
        mnemic.from_pretrained(of.bare, tmp_path / "emt")


def test_damage_is_repeatable(tmp_path):
    of = mutations.subject(EMT, tmp_path)
    for damage in OF_SESSIONS:
        for seed in range(5):
            one, two = (damage(random.Random(seed), of.data, of) for _ in range(2))
            assert one == two, damage


def test_the_command(tmp_path):
    found = CliRunner().invoke(mutations.app, ["--files", "24", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "refused with a clear error: 24 of 24" in found.output
    assert (
        "24 of 24 refused with a `StateError`, 0 loaded, 0 crashed, 0 changed"
        in mutations.tables(tmp_path)["mutated-files"]
    )
    assert not (tmp_path / WEIGHTS_FILE).exists()
