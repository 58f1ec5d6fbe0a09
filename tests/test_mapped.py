"""A session's file is mapped: what left the window stays in it, and is read and checked when it is used."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, tokens
from mnemic.mapping import map_file
from mnemic.memories.recall import RecallConfig
from mnemic.state import APART, from_bytes
from test_packing import assert_same
from test_recall_choice import SMALL

QUESTION = tokens(1, 5, 3)


def recalling(**settings):
    model = make("llama")
    mnemic.attach(model, RecallConfig(**{**SMALL, "budget": 8, **settings}))
    return model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name, value in {"CHUNK": 4 * SEGMENT, "LEAST": SEGMENT, "STEP": 2 * SEGMENT}.items():
        monkeypatch.setattr(f"mnemic.bank.{name}", value)


def reading(model, count=12 * SEGMENT + 3, **settings):
    session = mnemic.Session(model, **settings)
    with torch.no_grad():
        session.read(tokens(1, count))
    return session


def said(session):
    with torch.no_grad():
        return session.fork().forward(QUESTION).logits


def changed(path, name):
    """One byte of a tensor in a file, changed where it lies."""
    data = bytearray(path.read_bytes())
    tensors, _, _ = map_file(path)
    part = tensors[name].view(torch.uint8).flatten()[-64:].numpy().tobytes()
    place = data.find(part)
    assert data.count(part) == 1
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stored", ["base", "int8"])
def test_loading_reads_nothing_of_what_is_mapped(stored, tmp_path, monkeypatch):
    model = recalling(stored=stored, search="candidates")
    session = reading(model)
    session.save(tmp_path / "s.memory")
    checked = []
    monkeypatch.setattr("mnemic.keeping.check_kept", lambda tensors: checked.extend(tensors))
    again = mnemic.Session.load(tmp_path / "s.memory", model)
    assert again.nbytes == session.nbytes
    assert str(session.nbytes // 1000) in repr(again).replace(",", "")
    (chunk,) = again.stream.banks[0].chunks
    assert chunk.sealed
    fork = again.fork()
    assert not checked
    for _ in range(2):
        assert torch.equal(said(fork), said(session))
        assert sorted(checked) == sorted(f"bank.{name}" for name in chunk.tensors)
    assert_same(again.stream.banks[0], session.stream.banks[0])


@pytest.mark.parametrize("forgotten", [0, 3])
@pytest.mark.parametrize("stored", ["base", "fp8"])
@torch.no_grad()
def test_what_is_read_after_loading_is_kept_as_if_it_had_not_been_saved(stored, forgotten, tmp_path):
    model = recalling(stored=stored)
    session = reading(model)
    if forgotten:  # what is left does not fill its last chunk
        session.forget(0, forgotten - 1)
    session.save(tmp_path / "s.memory")
    again = mnemic.Session.load(tmp_path / "s.memory", model)
    mapped, fork = again.stream.banks[0].chunks[0], again.fork()
    for seed in range(2):
        for each in (again, session):
            each.read(tokens(1, 3 * SEGMENT, 20 + seed))
        assert_same(again.stream.banks[0], session.stream.banks[0])
        assert torch.equal(said(again), said(session))
        # nothing of it was copied but the tokens that do not fill its last chunk
        assert again.stream.banks[0].chunks[0] is mapped
        assert again.stream.banks[0].counts[0] == mapped.room - (SEGMENT if forgotten else 0)
    assert fork.stream.banks[0].chunks == (mapped,)
    fork.read(tokens(1, 3 * SEGMENT, 20))
    again.save(tmp_path / "s.memory")
    third = mnemic.Session.load(tmp_path / "s.memory", model)
    assert_same(third.stream.banks[0], session.stream.banks[0])
    assert torch.equal(said(third), said(session))
    assert third.forget(forgotten, forgotten + 4) == session.forget(forgotten, forgotten + 4) == 5
    assert_same(third.stream.banks[0], session.stream.banks[0])


@torch.no_grad()
def test_a_mapped_file_may_be_replaced_or_deleted(tmp_path):
    model, path = recalling(), tmp_path / "s.memory"
    session = reading(model)
    session.save(path)
    expected, one = said(session), mnemic.Session.load(path, model)
    one.save(path)
    two = mnemic.Session.load(path, model)
    reading(model, 9 * SEGMENT).save(path)  # another session's
    three = mnemic.Session.load(path, model)
    path.unlink()
    assert torch.equal(said(one), expected)
    assert torch.equal(said(two), expected)
    assert three.stream.banks[0].length < session.stream.banks[0].length
    two.save(path)
    assert torch.equal(said(mnemic.Session.load(path, model)), expected)


@torch.no_grad()
def test_copies_of_a_mapped_bank_hold_their_own(tmp_path):
    model = recalling()
    session = reading(model)
    session.save(tmp_path / "s.memory")
    bank = mnemic.Session.load(tmp_path / "s.memory", model).stream.banks[0]
    for each in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert not any(chunk.sealed for chunk in each.chunks)
        assert each.length == bank.length == bank.zeroed().length
    assert not any(chunk.check for chunk in bank.zeroed().chunks)
    assert_same(pickle.loads(pickle.dumps(bank)), bank)
    with torch.inference_mode():
        again = mnemic.Session.load(tmp_path / "s.memory", model)
        assert torch.equal(said(again), said(session))
    assert torch.equal(said(again), said(session))
    lower = copy.deepcopy(model).to(torch.bfloat16)
    assert not mnemic.Session.load(tmp_path / "s.memory", lower, strict=False).stream.banks[0].chunks[0].sealed


@pytest.mark.parametrize("name", ["bank.keys", "bank.values"])
def test_what_was_changed_is_refused_when_it_is_used(name, tmp_path):
    model, path = recalling(), tmp_path / "s.memory"
    session = reading(model)
    session.save(path)
    changed(path, name)
    again = mnemic.Session.load(path, model)
    before = again.stream
    for _ in range(2):
        with pytest.raises(mnemic.StateError, match=rf"s\.memory was changed .* the checksum of {name} differs"):
            again.forward(QUESTION)
    assert again.stream is before
    with pytest.raises(mnemic.StateError, match=name):
        again.save(tmp_path / "other.memory")
    assert not (tmp_path / "other.memory").exists()
    with pytest.raises(mnemic.StateError, match=name):
        mnemic.Session.from_bytes(path.read_bytes(), model)
    with pytest.raises(mnemic.StateError, match=name):  # it goes on in another dtype, for which it is read
        mnemic.Session.load(path, copy.deepcopy(model).to(torch.bfloat16), strict=False)


def test_a_file_that_is_cut_while_it_is_mapped_is_refused_when_it_is_used(tmp_path):
    model, path = recalling(), tmp_path / "s.memory"
    session = reading(model)
    session.save(path)
    again = mnemic.Session.load(path, model)
    assert torch.equal(said(again), said(session))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(mnemic.StateError, match=r"s\.memory was cut to .* bytes while it was in use"):
        again.forward(QUESTION)


def test_numbers_that_no_session_makes_are_refused_when_they_are_used(tmp_path):
    model, path = recalling(), tmp_path / "s.memory"
    tensors, meta = reading(model).contents()
    mnemic.state.write_file(path, tensors | {"bank.values": tensors["bank.values"] * torch.nan}, meta)
    again = mnemic.Session.load(path, model)
    with pytest.raises(mnemic.StateError, match=r"bank\.values is NaN"):
        again.forward(QUESTION)


@pytest.mark.parametrize("length", [0, 5, 200, 5000, -1])
def test_a_file_that_was_cut_is_refused(length, tmp_path):
    model, path = recalling(), tmp_path / "s.memory"
    reading(model).save(path)
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    with pytest.raises(mnemic.StateError, match="not a whole safetensors file"):
        mnemic.Session.load(path, model)


def test_a_file_of_before_is_read_whole(tmp_path, monkeypatch):
    model, path = recalling(), tmp_path / "s.memory"
    session = reading(model)
    with monkeypatch.context() as patched:
        patched.setattr("mnemic.state.APART", ("no such name",))
        session.save(path)
    again = mnemic.Session.load(path, model)
    assert not again.stream.banks[0].chunks[0].sealed
    assert torch.equal(said(again), said(session))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(mnemic.StateError, match="checksum"):
        mnemic.Session.load(path, model)


def test_what_says_nothing_of_checksums_is_refused(tmp_path):
    data = bytearray(reading(recalling()).to_bytes())
    for name in APART:
        wrong = data.replace(f'\\"{name}\\":'.encode(), f'\\"{name[:-1]}_\\":'.encode())
        assert wrong != data
        with pytest.raises(mnemic.StateError, match="no checksum for each"):
            from_bytes(bytes(wrong))
