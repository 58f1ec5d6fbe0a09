"""A session from a store: what left its window stays there, and is read and checked when it is used."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections import Counter

import pytest
import sqlalchemy
import torch

import mnemic
from helpers import SEGMENT, tokens
from mnemic import chunks, tables
from mnemic.store import SessionStore
from test_chunks import bank, read_on, rows
from test_mapped import QUESTION, reading, recalling, said, small_chunks
from test_packing import assert_same

__all__ = ["small_chunks"]
pytestmark = pytest.mark.small


@pytest.fixture(scope="module")
def model():
    return recalling(stored="int8", search="candidates")


@pytest.fixture
def fetched(monkeypatch):
    """How often each chunk is read for a session, and the bytes of chunks that are made to be written."""
    found, fetch, data = Counter(), SessionStore._fetch, chunks.Units.data

    def counted(store, digests):
        found.update(digests)
        return fetch(store, digests)

    monkeypatch.setattr(SessionStore, "_fetch", counted)
    monkeypatch.setattr(chunks.Units, "data", lambda *args: found.update(["written"]) or data(*args))
    return found


def digests(store, name="alice"):
    """Of the chunks that a session holds."""
    with store.transaction() as connection:
        held = sqlalchemy.select(tables.held.c.digest).where(tables.held.c.name == name)
        return set(connection.execute(held).scalars())


@pytest.mark.parametrize("stored", ["base", "int8"])
def test_nothing_is_read_before_it_is_used_and_then_once(stored, store, fetched, tmp_path):
    model = recalling(stored=stored)
    session = reading(model)
    store.put("alice", session)
    fetched.clear()
    again = store.get("alice", model)
    assert again.nbytes == session.nbytes
    assert repr(again) == repr(session)
    fork = again.fork()
    assert store.put("alice", again) == 2
    assert store.put("bob", fork, overwrite=True) == 1
    assert rows(store)[1] == 2 * rows(store)[0]
    assert not fetched, "a session that was not read moves no chunk"
    assert torch.equal(said(again), said(session))
    assert fetched == Counter(digests(store))
    for each in (again, fork):  # they share what was read
        assert torch.equal(said(each), said(session))
        assert_same(bank(each), bank(session))
        read_on(each)
    store.put("alice", again)
    assert fetched.pop("written") == 1
    assert fetched.total() == len(digests(store, "bob"))


@torch.no_grad()
def test_an_unread_session_goes_elsewhere(file_store, model, tmp_path):
    session = reading(model)
    file_store.put("alice", session)
    expected = said(session)
    with SessionStore(tmp_path / "other.db") as other:
        other.put("alice", file_store.get("alice", model))
        assert torch.equal(said(other.get("alice", model)), expected)
    for path in (f"{tmp_path}/folder/", tmp_path / "one.memory"):
        file_store.get("alice", model).save(path)
        assert torch.equal(said(mnemic.Session.load(path, model)), expected)
    for copied in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        assert_same(copied(bank(file_store.get("alice", model))), bank(session))
    spilled = file_store.get("alice", model)
    spilled.spill_to(tmp_path / "spilled", ram=0)
    assert any(chunk.in_file for chunk in bank(spilled).chunks)
    assert all(chunk.in_file or chunk.used < SEGMENT for chunk in bank(spilled).chunks), "what was unread is no file"
    with torch.inference_mode():
        unread = file_store.get("alice", model)
        assert torch.equal(said(unread), expected)
    for each in (session, spilled, unread):
        each.read(tokens(1, 3 * SEGMENT, 9))
        assert torch.equal(said(each), said(session))
    assert unread.forget(0, 4) == session.forget(0, 4)
    assert_same(bank(unread), bank(session))


def edited(store, way):
    """The second chunk that is there, missing, cut or changed; its digest."""
    with store.transaction() as connection:
        found = connection.execute(sqlalchemy.select(tables.chunks.c.digest, tables.chunks.c.data)).all()
        digest, data = found[1].digest, bytes(found[1].data)
        its = tables.chunks.c.digest == digest
        if way == "missing":
            connection.execute(sqlalchemy.delete(tables.held).where(tables.held.c.digest == digest))
            connection.execute(sqlalchemy.delete(tables.chunks).where(its))
        else:
            wrong = data[:-1] if way == "cut" else data[:-1] + bytes([data[-1] ^ 1])
            connection.execute(sqlalchemy.update(tables.chunks).where(its).values(data=wrong))
    return digest


@pytest.mark.parametrize("way", ["missing", "cut", "changed"])
def test_a_chunk_that_is_not_what_it_was_when_it_is_used(way, store, model, tmp_path):
    session = reading(model)
    store.put("alice", session)
    again, used = store.get("alice", model), store.get("alice", model)
    said(used)
    digest = edited(store, way)
    of = rf"session 'alice' of .* (lacks its chunk {digest}: it was deleted|has a chunk .* {digest})"
    before = again.stream
    for _ in range(2):
        with pytest.raises(mnemic.StateError, match=of):
            again.forward(QUESTION)
        assert again.stream is before
    for path in (f"{tmp_path}/folder/", tmp_path / "one.memory"):
        with pytest.raises(mnemic.StateError, match=of):
            again.save(path)
    assert not (tmp_path / "one.memory").exists()
    with SessionStore(tmp_path / "other.db") as other, pytest.raises(mnemic.StateError, match=of):
        other.put("alice", again, overwrite=True)
    with SessionStore(tmp_path / "other.db") as other:
        assert other.list() == []
    lower = copy.deepcopy(recalling()).to(torch.bfloat16)
    assert torch.equal(said(used), said(session)), "what was read stays"
    if way == "missing":
        assert store.put("alice", used) == 2, "and is written again"
        assert torch.equal(said(again), said(session))
    with pytest.raises(mnemic.StateError):
        store.get("alice", lower, strict=False)


def test_numbers_that_no_session_makes_are_refused_when_they_are_used(store):
    model = recalling()
    session = reading(model)
    bank(session).chunks[0].tensors["values"][0, 0, 0, 0] = torch.nan
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mnemic.keeping.check_kept", lambda _: None)
        store.put("alice", session)
    with pytest.raises(mnemic.StateError, match=r"bank\.values is NaN"):
        store.get("alice", model).forward(QUESTION)
    # in another dtype it goes on as a copy, for which all is read
    with pytest.raises(mnemic.StateError, match=r"bank\.values is NaN"):
        store.get("alice", copy.deepcopy(model).to(torch.bfloat16), strict=False)


@pytest.mark.parametrize("way", ["deleted", "expired", "replaced", "forgotten"])
def test_a_session_that_goes_while_another_is_alive(way, store, url, model, monkeypatch):
    session = reading(model)
    expected = said(session)
    store.put("alice", session, ttl=60)
    unread, used = store.get("alice", model), store.get("alice", model)
    assert torch.equal(said(used), expected)
    with SessionStore(url) as other:
        if way == "deleted":
            other.delete("alice")
        elif way == "expired":
            with monkeypatch.context() as later:
                later.setattr("mnemic.store._now", lambda: 2**62)
                assert len(other.purge()) == 1
        elif way == "replaced":
            other.put("alice", mnemic.Session(model), overwrite=True)
        else:
            mine = other.get("alice", model)
            mine.forget(0, 3)
            other.put("alice", mine)
    there = rows(store)
    with pytest.raises(mnemic.StateError, match=r"session 'alice' of .* lacks its chunk .* deleted or replaced after"):
        unread.forward(QUESTION)
    for each in (unread, used):
        with pytest.raises(mnemic.Conflict):
            store.put("alice", each)
    with pytest.raises(mnemic.StateError, match="lacks its chunk"):
        store.put("bob", unread, overwrite=True)
    assert rows(store) == there, "nothing was written"
    # what was used needs the store no more
    store.put("bob", used, overwrite=True)
    assert torch.equal(said(used), expected)
    assert torch.equal(said(store.get("bob", model)), expected)
    assert torch.equal(said(unread), expected), "the same chunks are there again, whoever holds them"


def test_who_holds_the_same_chunks_keeps_them_for_an_unread_session(store, model):
    session = reading(model)
    store.put("alice", session)
    unread = store.get("alice", model)
    store.put("bob", unread, overwrite=True)
    store.delete("alice")
    read_on(session)
    store.put("carol", session, overwrite=True)
    assert torch.equal(said(unread), said(store.get("bob", model)))


def test_two_threads_read_a_chunk_once(store, model, fetched):
    session = reading(model)
    store.put("alice", session)
    fetched.clear()
    again, together = store.get("alice", model), threading.Barrier(2)
    found = []

    def use(fork):
        together.wait()
        found.append(said(fork))

    threads = [threading.Thread(target=use, args=(again.fork(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(each, said(session)) for each in found)
    assert fetched == Counter(digests(store))


def test_a_store_that_was_closed_is_opened_for_what_is_unread(url, model):
    session = reading(model)
    with SessionStore(url) as store:
        store.put("alice", session)
        again = store.get("alice", model)
    assert torch.equal(said(again), said(session))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_reads_what_its_parent_has_not(store, model):
    session = reading(model)
    store.put("alice", session)
    again, expected = store.get("alice", model), said(session)
    if not (child := os.fork()):
        signal.alarm(60)
        right = False
        try:
            right = torch.equal(said(again), expected)
        finally:
            os._exit(not right)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(said(again), expected)
