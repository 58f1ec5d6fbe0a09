"""Sessions whose bank is kept as chunks by what they hold: in a store each of them is there once."""

from __future__ import annotations

import shutil
import sqlite3
import threading

import pytest
import sqlalchemy
import torch
from safetensors.torch import load_file

import mnemic
import mnemic.bank
from helpers import SEGMENT, tokens
from mnemic import chunks, tables
from mnemic.state import from_bytes, to_bytes
from mnemic.store import SessionStore, StoreError
from saved_before import EXPECTED, READ, SAVED, ids
from saved_before import load as saved
from saved_before import said as said_next
from test_mapped import reading, recalling, said, small_chunks
from test_packing import assert_same

__all__ = ["small_chunks"]
pytestmark = pytest.mark.small
CONSTANTS = {name: getattr(mnemic.bank, name) for name in ("CHUNK", "LEAST", "STEP")}
"""As they are, of which `small_chunks` makes others."""
OLD = SAVED / "store-format-1.db"
"""Made by the release before there were chunks: saved sessions of two mechanisms, under the names of their folders, and
one of 300 tokens more."""


@pytest.fixture(scope="module")
def model():
    return recalling(stored="int8", search="candidates")


@pytest.fixture
def work(monkeypatch):
    """Counts the units that are hashed, and those that are sent."""
    counts = {"hashed": 0, "sent": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(chunks, "checksums", counted("hashed", chunks.checksums))
    monkeypatch.setattr(chunks.Units, "data", counted("sent", chunks.Units.data))
    return counts


def done(work):
    found = work["hashed"], work["sent"]
    work.update(hashed=0, sent=0)
    return found


@torch.no_grad()
def read_on(session, seed=1, count=SEGMENT):
    session.read(tokens(1, count, seed))


def bank(session):
    return session.stream.banks[0]


def same(data, other):
    """Whether two files hold the same; the order of words in a header is nobody's."""
    (tensors, meta), (others, other_meta) = from_bytes(data), from_bytes(other)
    same_names = tensors.keys() == others.keys() and meta == other_meta
    return same_names and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def rows(store):
    """The chunks that are there, and how often each is held."""
    with store.transaction() as connection:
        there = set(connection.execute(sqlalchemy.select(tables.chunks.c.digest)).scalars())
        held = list(connection.execute(sqlalchemy.select(tables.held.c.digest)).scalars())
        assert there == set(held), "a chunk is there as long as it is held, and no longer"
        return len(there), len(held)


@pytest.mark.parametrize("stored", ["base", "int8"])
def test_a_session_in_chunks_is_what_it_is_in_one_piece(stored, store, tmp_path):
    model = recalling(stored=stored)
    session = reading(model)
    for version in range(1, 6):
        assert store.put("alice", session) == version
        session.save(tmp_path / "one.memory")
        one, again = mnemic.Session.load(tmp_path / "one.memory", model), store.get("alice", model)
        assert_same(bank(again), bank(one))
        assert torch.equal(said(again), said(one))
        assert same(store.get_bytes("alice")[0], session.to_bytes())
        units = bank(session).length // SEGMENT
        assert rows(store) == (units, units)
        if version == 3:  # goes on from what was read from the store
            session = again
        read_on(session, version, 5)
    store.export("alice", tmp_path / "exported.memory")
    assert same((tmp_path / "exported.memory").read_bytes(), store.get_bytes("alice")[0])
    store.export("alice", f"{tmp_path}/exported/")
    assert torch.equal(said(mnemic.Session.load(tmp_path / "exported", model)), said(store.get("alice", model)))


def test_a_turn_writes_what_is_new(store, model, work):
    session = reading(model, 12 * SEGMENT)
    units = bank(session).length // SEGMENT
    store.put("alice", session)
    assert done(work) == (units, units)
    for _ in range(2):
        before = done(work)[1]
        read_on(session)
        said(session)  # which uses all of it
        used = done(work)
        store.put("alice", session)
        assert (before, used[1], done(work)) == (0, 0, (1, 1)), "what was read from the store is not hashed again"
        session = store.get("alice", model)
        assert done(work) == (1, 0), "the first one tells what all are like"
    fork = session.fork()
    store.put("bob", fork, overwrite=True)
    assert done(work) == (0, 0)
    for each in (session, fork):
        read_on(each, 7, 3 * SEGMENT)
        store.put("alice" if each is session else "bob", each)
    # both have read the same, and the chunk in RAM has grown meanwhile
    assert done(work)[1] == 3
    session.forget(0, 3)
    store.put("alice", session)
    assert done(work)[1] > 3, "what stood behind has moved"


def test_chunks_go_with_the_last_who_holds_them(store, model):
    session = reading(model)
    units = bank(session).length // SEGMENT
    store.put("alice", session)
    store.put("bob", session.fork())
    assert store.put_bytes("carol", session.to_bytes()).version == 1
    assert rows(store) == (units, 3 * units)
    one = store.entry("alice").nbytes
    with store.transaction() as connection:
        total = tables.total(connection)
        (row,) = connection.execute(sqlalchemy.select(sqlalchemy.func.sum(tables.chunks.c.nbytes)))
    shared = int(row[0])
    assert total == 3 * (one - shared) + shared
    gone = store.delete("alice")
    assert (gone.nbytes, gone.freed) == (one, one - shared)
    read_on(session, 5)
    store.put("bob", session, overwrite=True)
    assert rows(store) == (units + 1, 2 * units + 1)
    store.put("bob", mnemic.Session(model), overwrite=True)
    assert rows(store) == (units, units)
    assert store.delete("bob").freed < one - shared
    assert_same(bank(store.get("carol", model)), bank(reading(model)))
    assert store.delete("carol").freed == one
    assert rows(store) == (0, 0)


def test_chunks_that_were_deleted_are_not_in_the_files(file_store, model, tmp_path):
    session = reading(model)
    file_store.put("alice", session)
    mark = bank(session).chunks[0].tensors["keys"][0, 0, : SEGMENT // 2].numpy().tobytes()
    assert any(mark in file.read_bytes() for file in tmp_path.iterdir())
    file_store.put("bob", mnemic.Session(model))
    file_store.delete("alice")
    assert not any(mark in file.read_bytes() for file in tmp_path.iterdir())


def test_expired_sessions_free_their_chunks(store, model, monkeypatch):
    now = [1_700_000_000_000_000]
    monkeypatch.setattr("mnemic.store._now", lambda: now[0])
    session = reading(model)
    for name in ("a", "b"):
        store.put(name, session.fork(), ttl=1)
    store.put("c", reading(model, 4 * SEGMENT), ttl=1)
    now[0] += 2_000_000
    store.put("c", mnemic.Session(model))  # takes the name over, and none of the chunks
    first, second = store.purge()
    assert first.freed < second.freed == second.nbytes
    assert rows(store) == (0, 0)


@pytest.mark.parametrize("way", ["missing", "cut", "changed", "another"])
def test_a_chunk_that_is_not_what_it_was(way, file_store, model, tmp_path):
    file_store.put("alice", reading(model))
    with sqlite3.connect(tmp_path / "store.db") as connection:
        found = connection.execute("SELECT digest, data FROM mnemic_chunks").fetchall()
        (digest, data), (_, other) = found[:2]
        if way == "missing":
            connection.execute("DELETE FROM mnemic_chunks WHERE digest = ?", (digest,))
        else:
            wrong = {"cut": data[:-1], "changed": data[:-1] + bytes([data[-1] ^ 1]), "another": other}[way]
            connection.execute("UPDATE mnemic_chunks SET data = ? WHERE digest = ?", (wrong, digest))
    calls = (
        file_store.get_bytes,
        lambda name: said(file_store.get(name, model)),
        lambda name: file_store.export(name, tmp_path / "x"),
    )
    for call in calls:
        with pytest.raises(mnemic.StateError, match=rf"session 'alice' of .* (lacks its|has a) chunk .*{digest}"):
            call("alice")
    assert not (tmp_path / "x").exists()
    assert file_store.delete("alice").name == "alice"


WRONG = {
    "a unit less": (lambda t: t | {chunks.UNITS: t[chunks.UNITS][:, 1:]}, "it lacks bank.keys"),
    "a unit twice": (
        lambda t: t | {chunks.UNITS: torch.cat([t[chunks.UNITS][:, :1], t[chunks.UNITS]], 1)},
        "a chunk of its bank is",
    ),
    "no positions": (lambda t: {name: t[name] for name in t if name != "bank.positions"}, "where 0 of 0 tokens"),
    "another kind": (lambda t: t | {chunks.UNITS: t[chunks.UNITS].int()}, r"says of its chunks \[.*\] of torch.int32"),
    "other names": (lambda t: t | {chunks.UNITS: t[chunks.UNITS][:, :, :3]}, "has a chunk that was cut or changed"),
    "other checksums": (lambda t: t | {chunks.UNITS: t[chunks.UNITS].flip(2)}, "lacks its chunk"),
}


@pytest.mark.parametrize("way", WRONG)
def test_a_head_that_no_session_makes_is_refused(way, file_store, model):
    session = reading(model, 12 * SEGMENT)
    file_store.put("alice", session)
    with file_store.transaction() as connection:
        data = connection.execute(sqlalchemy.select(tables.sessions.c.data)).scalar()
    tensors, meta = from_bytes(data)
    edit, said = WRONG[way]
    wrong = to_bytes(edit(tensors), meta)
    with file_store.transaction() as connection:
        connection.execute(sqlalchemy.update(tables.sessions).values(data=wrong))
    with pytest.raises(mnemic.StateError, match=said):
        file_store.get("alice", model)
    # a head is no whole session: its chunks are elsewhere
    with pytest.raises(mnemic.StateError, match=r"bank\.units"):
        mnemic.Session.from_bytes(data, model)
    with pytest.raises(mnemic.StateError, match=r"bank\.units"):
        file_store.put_bytes("bob", data)


def test_numbers_that_are_not_finite_are_not_kept(store, model):
    session = reading(recalling())
    store.put("alice", session)
    read_on(session)
    bank(session).chunks[-1].tensors["values"][0, 0, 0, 0] = torch.nan
    bank(session).chunks[-1].made.clear()  # as of tokens that were just read
    with pytest.raises(mnemic.StateError, match=r"bank\.values is NaN"):
        store.put("alice", session)
    assert store.entry("alice").version == 1


def test_limits_of_a_session_and_of_a_store(url, model):
    session = reading(model)
    with SessionStore(url) as store:
        assert store.size_limit is store.total_limit is None, "recall alone has gigabytes soon"
        store.put("alice", session)
        size = store.entry("alice").nbytes
    said = rf"session 'bob' has {size:,} bytes, this store takes {size - 1:,}"
    with SessionStore(url, size_limit=size - 1) as store, pytest.raises(StoreError, match=said):
        store.put("bob", session.fork(), overwrite=True)
    with SessionStore(url, total_limit=2 * size) as store:
        store.put("bob", session.fork(), overwrite=True)  # which shares what is large
        said = rf"with session 'carol' this store would have [\d,]+ bytes, it takes {2 * size:,}"
        with pytest.raises(StoreError, match=said):
            store.put("carol", reading(recalling(), 20 * SEGMENT), overwrite=True)
        assert [entry.name for entry in store.list()] == ["alice", "bob"]
        assert rows(store)[1] == 2 * rows(store)[0]


def test_a_store_of_before_is_brought_up(tmp_path, monkeypatch):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(f"mnemic.bank.{name}", value)
    shutil.copy(OLD, tmp_path / "store.db")
    expected = load_file(EXPECTED)
    for times in range(2):
        with SessionStore(tmp_path / "store.db") as store:
            for name, kind in {"recall-0-llama": "recall", "emt-0-llama": "emt", "long": "recall"}.items():
                host, session = saved(SAVED / f"{kind}-0-llama")
                if name == "long":
                    with torch.no_grad():
                        session.read(ids(READ, 300))
                again = store.get(name, host)
                known = said_next(session) if name == "long" else expected[name]
                torch.testing.assert_close(said_next(again.fork()), known, atol=1e-4, rtol=1e-4)
                assert store.put(name, again) == times + 2
            assert rows(store) == (1, 1), "what lay in a row is a chunk now"
    with sqlite3.connect(tmp_path / "store.db") as connection:  # as an earlier release asks
        assert connection.execute("SELECT format FROM mnemic_store").fetchall() == [(2,)]


# --- several at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["put", "delete"])
def test_what_one_begins_to_hold_another_does_not_remove(first, url, model, monkeypatch):
    """A put of one session and a delete of the other that shares its chunks, of which the second begins when the first
    has done all but the commit.
    """
    session = reading(model)
    with SessionStore(url) as store:
        store.put("bob", session)
        data = session.to_bytes()
        begun, hold = threading.Event(), tables.hold
        actions = {"put": lambda: store.put_bytes("alice", data), "delete": lambda: store.delete("bob")}
        problems = []

        def held(*args):
            found = hold(*args)
            if not begun.is_set():
                begun.set()
                second.join(0.5)  # which waits for this one, in the database
            return found

        def run(action):
            try:
                action()
            except Exception as error:
                problems.append(error)

        monkeypatch.setattr(tables, "hold", held)
        second = threading.Thread(target=lambda: begun.wait(30) and run(actions[({*actions} - {first}).pop()]))
        second.start()
        run(actions[first])
        second.join()
        assert not problems
        assert [entry.name for entry in store.list()] == ["alice"]
        assert same(store.get_bytes("alice")[0], data)
        rows(store)


def test_reading_sees_one_version(store, url, model, monkeypatch):
    session = reading(model)
    store.put("alice", session)
    data, read = session.to_bytes(), tables.data_of

    def replaced_meanwhile(*args):
        monkeypatch.setattr(tables, "data_of", read)
        with SessionStore(url) as other:
            other.put("alice", mnemic.Session(model), overwrite=True)
        return read(*args)

    monkeypatch.setattr(tables, "data_of", replaced_meanwhile)
    assert same(store.get_bytes("alice")[0], data)
    assert rows(store) == (0, 0)


def test_a_transaction_that_was_in_another_s_way_is_tried_again(store, model, monkeypatch):
    session, tried, hold = reading(model), [], tables.hold

    def refused(connection, name, units):
        tried.append(name)
        if len(tried) < 3:  # as where a chunk goes between two steps
            connection.execute(sqlalchemy.insert(tables.held), {"name": name, "digest": "0" * 64})
        return hold(connection, name, units)

    monkeypatch.setattr(tables, "hold", refused)
    assert store.put("alice", session) == 1
    assert len(tried) == 3
    tried[:] = []
    assert store.put("alice", session) == 2, "and no conflict with itself"
    monkeypatch.setattr(tables, "hold", hold)
    assert store.delete("alice").version == 2


@pytest.mark.parametrize("stored", ["base", "int8"])
@torch.no_grad()
def test_a_bank_of_zeros_that_take_no_room_is_kept(stored, file_store, tmp_path):
    model = recalling(stored=stored)
    session = reading(model)
    session._layer.stream = session.stream.with_banks((bank(session).zeroed(),))
    expected = said(session)
    session.save(tmp_path / "one.memory")
    session.save(f"{tmp_path}/folder/")
    file_store.put("alice", session)
    loaded = [mnemic.Session.load(path, model) for path in (tmp_path / "one.memory", f"{tmp_path}/folder/")]
    for each in (*loaded, file_store.get("alice", model)):
        assert torch.equal(said(each), expected)
        assert not bank(each).tensors()["keys"].any()
    read_on(session)
    assert bank(session).length > bank(loaded[0]).length
