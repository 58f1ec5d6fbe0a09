"""Invariant 8 beyond the round trip of `test_matrix`: a new process, and everything that must be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mnemic
from families import DECODERS, ENCODERS, VOCABULARY, make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_equal_stream,
    first_forms,
    host,
    matrix,
    refusal,
    tokens,
    trained,
    trains,
)
from mnemic.host.anatomy import fingerprints
from mnemic.state import StateError, from_bytes, to_bytes

FAMILIES = ["gpt2", "llama", "bert"]


def session_of(model, name, read=21):
    session = mnemic.Session(model, window=None if name in ENCODERS else 2 * SEGMENT)
    session.read(tokens(1, read))
    return session


@torch.no_grad()
def test_a_new_process_continues_bit_exactly(tmp_path):
    # one process for all: to start one takes longer than all that it does
    jobs, expected, question = [], {}, tokens(1, SEGMENT, 5)
    for place, (label, config) in enumerate(CONFIGS.items()):
        for name in [name for name in FAMILIES if refusal(label, name) is None][place % 4 :: 4]:
            job = f"{label}-{name}"
            model = host(name, config)
            mnemic.attached(model).save_pretrained(tmp_path / job)
            session = session_of(model, name)
            session.save(tmp_path / f"{job}.memory")
            expected[job] = session.forward(question).logits
            jobs.append({"id": job, "family": name, "ids": question.tolist()})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    subprocess.run([sys.executable, here / "reload.py", tmp_path], env=environment, check=True)
    for job, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{job}.logits"), logits), job


# --- what must be refused --------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def replace_by_another(path):
    save_file({"weight": torch.zeros(2)}, path)


def retell(path):
    """The same tensors under a description that says something else."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(
        load_file(path), path, header | {"meta": header["meta"].replace('"segment_length": 8', '"segment_length": 9')}
    )


SPOILS = {
    truncate: "not a whole safetensors file",
    edit: "changed after it was written",
    replace_by_another: "has format None",
    retell: "changed after it was written",
}


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
@first_forms(FAMILIES)
def test_a_spoilt_adapter_is_refused(config, name, spoil, tmp_path):
    model = host(name, config)
    if spoil is edit and not trains(model):
        pytest.skip("this memory has no weights that could be edited")
    mnemic.attached(model).save_pretrained(tmp_path)
    spoil(tmp_path / "memory_model.safetensors")
    assert_refused(make(name), tmp_path, SPOILS[spoil])


def assert_refused(model, folder, match, error=mnemic.StateError):
    """The error, and a model in which nothing was attached, frozen or changed."""
    names, wants = list(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        expected = model(tokens(2, SEGMENT)).logits
    with pytest.raises(error, match=match):
        mnemic.from_pretrained(model, folder)
    assert list(model.state_dict()) == names
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    with torch.no_grad():
        assert torch.equal(model(tokens(2, SEGMENT)).logits, expected)


@first_forms(FAMILIES)
def test_an_adapter_of_another_base_is_refused(config, name, tmp_path):
    attachment = mnemic.attached(host(name, config))
    attachment.save_pretrained(tmp_path)
    assert_refused(make(name, seed=1), tmp_path, r"was written for base model .*; load the base it was trained on")
    another = mnemic.from_pretrained(make(name, seed=1), tmp_path, strict=False)
    assert another.config == config


@matrix(["llama"])
def test_an_adapter_with_an_edited_config_is_refused(config, name, tmp_path):
    mnemic.attached(host(name, config)).save_pretrained(tmp_path)
    path = tmp_path / "memory_config.json"
    description = json.loads(path.read_text())
    for setting, value in {"segment_length": 4, "kind": "unheard-of"}.items():
        path.write_text(json.dumps({**description, "memory": {**description["memory"], setting: value}}))
        assert_refused(make(name), tmp_path, "it was edited or mixed up")
    path.write_text("{")
    assert_refused(make(name), tmp_path, "is not JSON")
    path.unlink()
    assert_refused(make(name), tmp_path, r"no memory_config\.json in", FileNotFoundError)
    (tmp_path / "memory_model.safetensors").unlink()
    assert_refused(make(name), tmp_path, "no memory file at", FileNotFoundError)


def test_a_session_is_no_adapter_and_an_adapter_no_session(tmp_path):
    model = host("llama", CONFIGS["emt-0"])
    mnemic.attached(model).save_pretrained(tmp_path)
    with pytest.raises(mnemic.StateError, match=r"holds None, not a session"):
        mnemic.Session.load(tmp_path / "memory_model.safetensors", model)
    session_of(model, "llama").save(tmp_path / "memory_model.safetensors")
    assert_refused(make("llama"), tmp_path, "")


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
@first_forms(FAMILIES)
def test_a_spoilt_session_is_refused(config, name, spoil, tmp_path):
    model = host(name, config)
    session = session_of(model, name)
    session.save(tmp_path / "one.memory")
    spoil(tmp_path / "one.memory")
    with pytest.raises(mnemic.StateError, match=SPOILS[spoil]):
        mnemic.Session.load(tmp_path / "one.memory", model)
    assert_equal_stream(session.stream, session_of(model, name).stream)


@first_forms(FAMILIES)
def test_a_session_of_another_model_or_memory_is_refused(config, name, tmp_path):
    path = tmp_path / "one.memory"
    session_of(host(name, config), name).save(path)
    another_base = make(name, seed=1)
    trained(another_base, config)
    with pytest.raises(mnemic.StateError, match="was written for base model"):
        mnemic.Session.load(path, another_base)
    another_config = host(name, config.replace(segment_length=4))
    with pytest.raises(mnemic.StateError, match=r"another memory \(.*segment_length 8 there, 4 here\)"):
        mnemic.Session.load(path, another_config)
    another_memory = make(name)
    trained(another_memory, config, seed=1)
    if trains(another_memory):
        with pytest.raises(mnemic.StateError, match=r"another memory \(other weights\)"):
            mnemic.Session.load(path, another_memory)
    with pytest.raises(RuntimeError, match="has no memory; attach one"):
        mnemic.Session.load(path, make(name))
    with pytest.raises(FileNotFoundError, match="no memory file"):
        mnemic.Session.load(tmp_path / "none", another_memory)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_base_with_tokens_added_is_the_same_base(name, tmp_path):
    model, config = make(name), CONFIGS["emt-0"]
    told = fingerprints(model)
    attachment = trained(model, config)
    session = mnemic.Session(model)
    session.read(tokens(1, 20))
    session.save(tmp_path / "a.memory")
    attachment.save_pretrained(tmp_path)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert fingerprints(model)[0] == told[0]
    assert fingerprints(model)[1] != told[1]
    assert_equal_stream(mnemic.Session.load(tmp_path / "a.memory", model).stream, session.stream)
    larger = make(name)
    larger.resize_token_embeddings(VOCABULARY + 3)
    mnemic.from_pretrained(larger, tmp_path)
    assert_equal_stream(mnemic.Session.load(tmp_path / "a.memory", larger).stream, session.stream)
    # other values in the rows that were there make another base
    with torch.no_grad():
        larger.get_input_embeddings().weight[:32] += 1
    with pytest.raises(StateError, match="was written for base model"):
        mnemic.Session.load(tmp_path / "a.memory", larger)


def test_a_file_that_counts_every_row_of_the_embeddings_is_read():
    model = host("llama", CONFIGS["emt-0"])
    session = mnemic.Session(model)
    session.read(tokens(1, 20))
    tensors, meta = from_bytes(session.to_bytes(), "a session")
    meta["base_fingerprint"] = fingerprints(model)[1]
    assert mnemic.Session.from_bytes(to_bytes(tensors, meta), model).stream.seen == (20,)
