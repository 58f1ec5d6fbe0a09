"""What is written can be read: writers check what readers check, and leave what is there where it fails."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_equal_stream, every_kind, host, tokens
from mnemic.attachment import CONFIG_FILE, WEIGHTS_FILE
from mnemic.state import META_LIMIT, from_bytes, to_bytes
from store import tally

EMT = CONFIGS["emt-0"]


def session_of(model: torch.nn.Module, read: int = 21) -> mnemic.Session:
    session = mnemic.Session(model, window=2 * SEGMENT)
    session.read(tokens(1, read))
    return session


# --- sessions --------------------------------------------------------------------------------------------------------


def in_state(session: mnemic.Session) -> None:
    stream = session.stream
    assert stream is not None
    session._layer.stream = replace(stream, state={name: each * torch.nan for name, each in stream.state.items()})


def in_waiting(session: mnemic.Session) -> None:
    assert session.stream is not None
    session._layer.stream = replace(session.stream, waiting=session.stream.waiting / 0)


def in_keys(session: mnemic.Session) -> None:
    session.cache.layers[1].values[0, 0, 3] = torch.inf  # pyright: ignore


def in_counts(session: mnemic.Session) -> None:
    assert session.stream is not None
    session._layer.stream = replace(session.stream, seen=(3,))


def in_window(session: mnemic.Session) -> None:
    session.window = SEGMENT - 1


def in_text(session: mnemic.Session) -> None:
    session.keep_text = True


def in_base(session: mnemic.Session) -> None:
    session.model.config._name_or_path = "x" * (META_LIMIT + 1)  # pyright: ignore


def in_config(session: mnemic.Session) -> None:
    mnemic.attached(session.model).config.segment_length = 16


WRONG = {
    in_state: r"state\.slots is NaN or infinite somewhere",
    in_waiting: "waiting is NaN or infinite somewhere",
    in_keys: r"values\.1 is NaN or infinite somewhere",
    in_counts: "3 tokens cannot be 2 segments of at most 8 and 5 that wait",
    in_window: "longer than the window of 7",
    in_text: "keep_text is True, and its history has no text",
    in_base: "the description has 8,[0-9,]* bytes, a file holds 8,388,608",
    in_config: r"edited after it was attached \(segment_length 8 then, 16 now\), which changes no memory; detach, and",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_session_that_cannot_be_read_is_not_written(spoil, tmp_path):
    model = host("llama", EMT)
    good, bad = session_of(model), session_of(model)
    path = tmp_path / "one.memory"
    with mnemic.SessionStore(tmp_path / "s.db") as store:
        store.put("one", good)
        good.save(path)
        bad.stored = good.stored
        spoil(bad)
        for write in (lambda: store.put("one", bad), lambda: bad.save(path), bad.to_bytes):
            with pytest.raises(mnemic.StateError, match=WRONG[spoil]):
                write()
        assert bad.stored is good.stored
        model.config._name_or_path = ""
        mnemic.attached(model).config.segment_length = SEGMENT
        assert store.entry("one").version == 1
        for again in (store.get("one", model), mnemic.Session.load(path, model)):
            assert_equal_stream(again.stream, good.stream)
    assert sorted(each.name for each in tmp_path.glob("*.memory*")) == ["one.memory"]


def test_bytes_that_no_model_could_take_are_not_put(tmp_path):
    model = host("llama", EMT)
    data = session_of(model).to_bytes()

    def changed(change) -> bytes:
        tensors, meta = from_bytes(data)
        change(tensors, meta)
        return to_bytes(tensors, meta)

    wrong = {
        "state.slots is NaN": lambda t, _: t["state.slots"].fill_(torch.nan),
        "keys.0 is NaN": lambda t, _: t["keys.0"].fill_(torch.inf),
        "nothing here keeps 'strange'": lambda t, _: t.update(strange=torch.zeros(1)),
        "nothing here keeps 'keys.0": lambda _, m: m.update(running=None),
        "3 tokens cannot be 2 segments": lambda _, m: m["stream"].update(seen=[3]),
        "a window of 3 keys, of which": lambda _, m: m["running"].update(context=[3]),
        "history's writes should be": lambda t, _: t.update({"history.writes": torch.zeros(2, 2)}),
        "slots is 0; it must be at least 1": lambda _, m: m["memory"].update(slots=0),
        "unknown memory kind 'elephant'": lambda _, m: m["memory"].update(kind="elephant"),
        "written by a later release": lambda _, m: m["memory"].update(colour=1),
    }
    with mnemic.SessionStore(tmp_path / "s.db") as store:
        stored = store.put_bytes("one", data)
        for match, change in wrong.items():
            with pytest.raises(mnemic.StateError, match=match):
                store.put_bytes("one", changed(change), stored)
        assert store.get_bytes("one")[1] == stored
        with pytest.raises(mnemic.StoreError, match="has a NUL or half a character in its base_model"):
            store.put_bytes("one", changed(lambda _, m: m.update(base_model="a\0b")), stored)
        assert store.put_bytes("tally", tally([1])).version == 1


def test_a_description_is_plain_json():
    for meta in ({"a": float("nan")}, {"a": {1, 2}}, {"a": torch.zeros(1)}, {1: 0, "1": 1}):
        with pytest.raises(mnemic.StateError, match="the description is not plain JSON"):
            to_bytes({}, meta)


# --- weights ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@every_kind
def test_a_memory_that_cannot_be_loaded_is_not_saved(config, tmp_path):
    model = host("llama", config)
    attachment = mnemic.attached(model)
    attachment.save_pretrained(tmp_path)
    before = contents(tmp_path)
    attachment.config.segment_length = 4
    with pytest.raises(mnemic.StateError, match=r"edited after it was attached \(segment_length 8 then, 4 now\)"):
        attachment.save_pretrained(tmp_path)
    attachment.config.segment_length = SEGMENT
    if parameters := attachment.parameters():
        with torch.no_grad():
            parameters[0].view(-1)[0] = torch.nan
        for save in (attachment.save_pretrained, model.save_pretrained):
            with pytest.raises(mnemic.StateError, match="is NaN or infinite somewhere"):
                save(tmp_path)
    assert contents(tmp_path) == before
    assert mnemic.from_pretrained(make("llama"), tmp_path).config == config


def test_two_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    model = host("llama", EMT)
    attachment = mnemic.attached(model)
    attachment.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.config._name_or_path = "another name"
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mnemic.state.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        attachment.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_what_the_caller_does_to_a_config_is_none_of_the_memory_s(tmp_path):
    config, model = EMT.replace(read_layers=[0]), make("llama")
    attachment = mnemic.attach(model, config)
    config.slots = 8
    assert config.read_layers is not None
    config.read_layers.append(1)
    attachment.save_pretrained(tmp_path)
    assert mnemic.from_pretrained(make("llama"), tmp_path).config == attachment.config == EMT.replace(read_layers=[0])


# --- the base alone --------------------------------------------------------------------------------------------------


@every_kind
def test_the_base_is_saved_alone_and_the_memory_beside_it(config, tmp_path):
    model = host("llama", config)
    bare, own = set(make("llama").state_dict()), model.state_dict()
    for part, folder in ((model, tmp_path / "whole"), (model.model, tmp_path / "trunk")):
        part.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() <= bare | {name.removeprefix("model.") for name in bare}
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    mnemic.from_pretrained(again, tmp_path / "whole")
    assert again.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_whose_state_is_given_is_not_mixed_either(tmp_path):
    model = host("llama", EMT)
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict=dict(state))
    assert load_file(tmp_path / "model.safetensors").keys() <= set(make("llama").state_dict())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(again, tmp_path):
    model = host("llama", EMT)
    other = again(model)
    with torch.no_grad():
        other.lm_head.weight.fill_(2)
    other.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["lm_head.weight"].eq(2).all()
    assert not any("mnemic" in name for name in saved)
    mnemic.attached(other).detach()
    (tmp_path / WEIGHTS_FILE).unlink()
    other.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS_FILE).exists()
    assert "save_pretrained" not in vars(other)
    assert other._keys_to_ignore_on_save == make("llama")._keys_to_ignore_on_save


def test_a_trainer_s_folder_keeps_the_good_version(tmp_path):
    model = make("llama")
    attachment = mnemic.attach(model, EMT, freeze=False)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = mnemic.Trainer(model, arguments)
    trainer.save_model(str(tmp_path / "best"))
    before = contents(tmp_path / "best")
    assert {"model.safetensors", WEIGHTS_FILE, CONFIG_FILE} <= before.keys()
    with torch.no_grad():
        attachment.parameters()[0].fill_(torch.nan)
        model.lm_head.weight.add_(1)
    with pytest.raises(mnemic.StateError, match="NaN"):
        trainer.save_model(str(tmp_path / "best"))
    assert contents(tmp_path / "best") == before
    assert json.loads(before[CONFIG_FILE])["memory"] == EMT.to_dict()
