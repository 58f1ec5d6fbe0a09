"""Sessions in a database: versions, conflicts, lives, names, many writers, kills, and what a damaged row becomes."""

from __future__ import annotations

import os
import sqlite3
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_equal_stream, host, shake, tokens, trained
from mnemic.cli import app
from mnemic.store import LONGEST_NAME, Conflict, NotStored, SessionStore, StoreError
from store import counts_of, tally

pytestmark = pytest.mark.small  # what is tested of the oldest and newest SQLAlchemy and psycopg


@pytest.fixture(scope="module")
def model():
    return host("llama", CONFIGS["emt-0"])


def session_of(model, read=21, seed=0):
    session = mnemic.Session(model, window=2 * SEGMENT)
    session.read(tokens(1, read, seed))
    return session


# --- put, get, list, delete -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_was_put_comes_back(store, model):
    session, question = session_of(model), tokens(1, 5, 3)
    assert store.put("alice", session) == 1
    again = store.get("alice", model, "a tokenizer")
    assert_equal_stream(again.stream, session.stream)
    assert again.tokenizer == "a tokenizer"
    assert torch.equal(again.forward(question).logits, session.forward(question).logits)


def test_an_empty_session_and_an_encoder_s(store, model):
    store.put("empty", mnemic.Session(model))
    assert store.get("empty", model).stream is None
    encoder = host("bert", CONFIGS["emt-0"])
    session = mnemic.Session(encoder)
    session.read(tokens(1, 20))
    store.put("encoder", session)
    assert_equal_stream(store.get("encoder", encoder).stream, session.stream)


def test_the_list_tells_what_is_there(store, model):
    before = datetime.now(UTC)
    session = session_of(model)
    store.put("b", session, ttl=60)
    store.put("a", session_of(model))
    store.put("b", session, ttl=60)
    one, two = store.list()
    assert (one.name, one.version, two.name, two.version) == ("a", 1, "b", 2)
    assert one == store.entry("a")
    assert one.expires is None
    assert two.expires - two.updated == timedelta(seconds=60)
    assert before - timedelta(seconds=1) < two.created < two.updated < datetime.now(UTC) + timedelta(seconds=1)
    meta = session.contents()[1]
    assert (two.memory, two.memory_fingerprint) == ("emt", meta["memory_fingerprint"])
    assert (two.base_model, two.base_fingerprint) == (None, meta["base_fingerprint"])
    assert two.nbytes == len(store.get_bytes("b")[0])


def test_delete_removes_it_and_says_what(store, model):
    store.put("alice", session_of(model))
    entry = store.entry("alice")
    assert store.delete("alice") == replace(entry, freed=entry.nbytes)
    assert store.list() == []
    for call in (store.delete, store.entry, store.get_bytes, lambda name: store.get(name, model)):
        with pytest.raises(NotStored, match=r"there is no session 'alice' in "):
            call("alice")
    assert issubclass(NotStored, LookupError)


def test_what_was_deleted_is_not_in_the_files(tmp_path, model):
    with SessionStore(f"sqlite:///{tmp_path / 'store.db'}") as store:
        session = session_of(model)
        store.put("a very private name", session)
        mark = session.stream.waiting.numpy().tobytes()
        assert any(mark in file.read_bytes() for file in tmp_path.iterdir())
        store.put("another", mnemic.Session(model))
        store.delete("a very private name")
        for file in tmp_path.iterdir():
            assert mark not in file.read_bytes(), file
            assert b"a very private name" not in file.read_bytes(), file
        assert [entry.name for entry in store.list()] == ["another"]


def test_export_is_a_file_that_load_reads(store, model, tmp_path):
    session = session_of(model)
    store.put("alice", session)
    store.export("alice", tmp_path / "alice.memory")
    assert_equal_stream(mnemic.Session.load(tmp_path / "alice.memory", model).stream, session.stream)
    stored = store.put_bytes("bob", (tmp_path / "alice.memory").read_bytes())
    assert stored.version == 1
    assert_equal_stream(store.get("bob", model).stream, session.stream)
    with pytest.raises(NotStored):
        store.export("carol", tmp_path / "carol.memory")
    assert not (tmp_path / "carol.memory").exists()


# --- versions ---------------------------------------------------------------------------------------------------------


def test_the_second_of_two_writers_gets_a_conflict(store, model):
    store.put("alice", session_of(model))
    one, two = store.get("alice", model), store.get("alice", model)
    one.read(tokens(1, 5))
    two.read(tokens(1, 7))
    assert store.put("alice", one) == 2
    kept = two.stream
    with pytest.raises(Conflict, match="'alice': this one was loaded from version 1, the store has version 2") as told:
        store.put("alice", two)
    assert (told.value.name, told.value.expected, told.value.found) == ("alice", 1, 2)
    assert "get() it again" in str(told.value)
    assert two.stream is kept
    assert_equal_stream(store.get("alice", model).stream, one.stream)
    # the mend: again from what is there, or knowingly over it
    assert store.put("alice", two, overwrite=True) == 3
    assert store.put("alice", two) == 4
    with pytest.raises(Conflict, match="from version 2, the store has version 4"):
        store.put("alice", one)


def test_a_session_of_its_own_needs_a_free_name(store, model):
    store.put("alice", session_of(model))
    with pytest.raises(Conflict, match="this one was never in the store, the store has version 1") as told:
        store.put("alice", session_of(model, 5))
    assert (told.value.expected, told.value.found) == (0, 1)
    assert store.put("bob", session_of(model, 5)) == 1
    assert store.put("carol", session_of(model, 5), overwrite=True) == 1


def test_a_version_belongs_to_a_name_and_a_store(store, model, tmp_path):
    store.put("bob", session_of(model))
    store.put("alice", session_of(model))
    alice = store.get("alice", model)
    with pytest.raises(Conflict, match="'bob': this one was never in the store"):
        store.put("bob", alice)
    with SessionStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        other.put("alice", session_of(model))
        with pytest.raises(Conflict, match="was never in the store"):
            other.put("alice", alice)
    assert store.put("alice", alice) == 2


def test_a_fork_knows_its_version_too(store, model):
    store.put("alice", session_of(model))
    session = store.get("alice", model)
    fork = session.fork()
    assert store.put("alice", fork) == 2
    with pytest.raises(Conflict, match="from version 1, the store has version 2"):
        store.put("alice", session)


def test_deleted_is_a_conflict_and_so_is_made_anew(store, model):
    session = session_of(model)
    store.put("alice", session)
    store.delete("alice")
    with pytest.raises(Conflict, match="from version 1, the store has none: it was deleted or has expired"):
        store.put("alice", session)
    store.put("alice", session_of(model, 5))  # version 1 again, but another
    with pytest.raises(Conflict, match="the store has version 1 of a new one, made after it was deleted"):
        store.put("alice", session)
    assert store.get("alice", model).stream.seen == (5,)


def test_a_failed_put_changes_nothing(store, model, monkeypatch):
    session = session_of(model)
    store.put("alice", session)
    stored = session.stored
    monkeypatch.setattr(store, "size_limit", 1000)
    session.read(tokens(1, 5))
    with pytest.raises(StoreError, match=r"session 'alice' has [\d,]+ bytes, this store takes 1,000; flush\(\)"):
        store.put("alice", session)
    assert session.stored == stored
    assert store.entry("alice").version == 1


# --- how long they live -----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Time that the test moves."""
    now = [1_700_000_000]
    monkeypatch.setattr("mnemic.store._now", lambda: now[0] * 1_000_000)
    return now


def test_an_expired_session_is_gone(url, model, clock):
    with SessionStore(url, ttl=10) as store:
        session = session_of(model)
        store.put("short", session)
        store.put("long", session_of(model), ttl=100)
        clock[0] += 9
        store.put("short", session)  # lives from its last put
        clock[0] += 9
        assert store.get("short", model).stored.version == 2
        assert len(store.list()) == 2
        clock[0] += 1
        assert [entry.name for entry in store.list()] == ["long"]
        for call in (store.get_bytes, store.entry):
            with pytest.raises(NotStored):
                call("short")
        with pytest.raises(Conflict, match="from version 2, the store has none: it was deleted or has expired"):
            store.put("short", session)
        assert [entry.name for entry in store.purge()] == ["short"]
        assert store.purge() == []
        assert [entry.name for entry in store.list()] == ["long"]


def test_an_expired_session_leaves_its_name_free_and_can_be_deleted(url, model, clock):
    with SessionStore(url) as store:
        for name in ("again", "over", "gone"):
            store.put(name, session_of(model), ttl=1)
        old = store.get("again", model)
        clock[0] += 2
        assert store.put("again", session_of(model, 5)) == 1
        assert store.put("over", session_of(model, 5), overwrite=True) == 1
        assert store.get("over", model).stream.seen == (5,)
        with pytest.raises(Conflict, match="version 1 of a new one"):
            store.put("again", old)
        assert store.delete("gone").name == "gone"
        assert store.purge() == []


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_life_that_is_none(file_store, model, ttl):
    with pytest.raises(ValueError, match=r"ttl is .*; a session lives for more than 0 and at most 3,153,600,0"):
        file_store.put("a", session_of(model), ttl=ttl)
    with pytest.raises(ValueError, match="ttl is"):
        SessionStore("sqlite:///unused.db", ttl=ttl)
    assert not os.path.exists("unused.db")


# --- names ------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd", "/", "'; DROP TABLE mnemic_sessions; --", "%", "_", "a\nb", " ", "\x1b[2J", "e\u0301", "\u00e9",
    "\U0001d518" * LONGEST_NAME, "NULL", "alice", "Alice", "ALICE ", "\u202eevil",
]  # fmt: skip


def test_names_are_data(store):
    for number, name in enumerate(HOSTILE):
        store.put_bytes(name, tally([number]))
    assert [entry.name for entry in store.list()] == sorted(HOSTILE)
    for number, name in enumerate(HOSTILE):
        assert counts_of(store.get_bytes(name)[0]) == [number]
    for name in HOSTILE:
        assert store.delete(name).name == name
    assert store.list() == []


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), max_size=4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), unique=True)
)
def test_any_text_is_a_name(file_store, names):
    names = [name[:LONGEST_NAME] for name in names]
    for name in names:
        file_store.put_bytes(name, tally([len(name)]), overwrite=True)
        assert counts_of(file_store.get_bytes(name)[0]) == [len(name)]
    for name in names:
        file_store.delete(name)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "text of 1 to 512 characters, this is 0 characters"),
        ("x" * 513, "this is 513 characters"),
        (None, "this is NoneType"),
        (b"alice", "this is bytes"),
        ("a\0b", r"'a\\x00b' has a NUL or half a character"),
        ("\ud800", "has a NUL or half a character"),
    ],
)
def test_names_that_cannot_be(store, model, name, match):
    session = session_of(model)
    calls = (store.get_bytes, store.delete, store.entry, lambda name: store.put(name, session))
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call(name)
    assert session.stored is None


# --- what must be refused ---------------------------------------------------------------------------------------------


def test_a_session_of_another_base_or_memory_is_refused(store, model):
    store.put("alice", session_of(model))
    other = make("llama", seed=1)
    trained(other, CONFIGS["emt-0"])
    with pytest.raises(mnemic.StateError, match=r"session 'alice' of .* was written for base model"):
        store.get("alice", other)
    other = make("llama")
    trained(other, CONFIGS["emt-0"], seed=1)
    with pytest.raises(mnemic.StateError, match=r"session 'alice' of .* was written with another memory"):
        store.get("alice", other)
    assert store.get("alice", other, strict=False).stream.seen == (21,)


@pytest.mark.parametrize("way", ["version", "data"])
def test_weights_that_changed_are_noticed(file_store, way):
    """Fingerprints are remembered while weights stay the same; writes through `.data` do not count as versions."""
    model = host("llama", CONFIGS["emt-0"])
    file_store.put("alice", session_of(model))
    file_store.get("alice", model)
    memory, base = mnemic.attached(model).memory, model.model.layers[0].mlp.up_proj.weight
    change = (lambda weight: weight.add_(1)) if way == "version" else (lambda weight: weight.data.add_(1))
    with torch.no_grad():
        change(base)
        with pytest.raises(mnemic.StateError, match="was written for base model"):
            file_store.get("alice", model)
        base.sub_(1)
        kept = base.clone()
        base.copy_(make("llama").model.layers[0].mlp.up_proj.weight)
        file_store.get("alice", model)
        assert torch.allclose(kept, base, atol=1e-6)
        for parameter in memory.parameters():
            change(parameter)
    with pytest.raises(mnemic.StateError, match="another memory"):
        file_store.get("alice", model)


def test_a_replaced_tensor_is_noticed(file_store):
    model = host("llama", CONFIGS["emt-0"])
    file_store.put("alice", session_of(model))
    layer = model.model.layers[1].self_attn.o_proj
    before = layer.weight
    layer.weight = torch.nn.Parameter(before.detach() + 1)
    with pytest.raises(mnemic.StateError, match="was written for base model"):
        file_store.get("alice", model)
    layer.weight = before
    assert file_store.get("alice", model).stream.seen == (21,)


def test_a_row_that_was_edited_is_refused(tmp_path, model):
    path = tmp_path / "store.db"
    with SessionStore(f"sqlite:///{path}") as store:
        store.put("alice", session_of(model))
        data = bytearray(store.get_bytes("alice")[0])
        data[-3] ^= 1
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE mnemic_sessions SET data = ?", (bytes(data),))
        for call in (
            store.get_bytes,
            lambda name: store.get(name, model),
            lambda name: store.export(name, tmp_path / "x"),
        ):
            with pytest.raises(
                mnemic.StateError, match=r"session 'alice' of .* was changed after it was written: its checksum"
            ):
                call("alice")
        assert not (tmp_path / "x").exists()


def test_bytes_that_are_no_session_are_refused(store, model, tmp_path):
    with pytest.raises(mnemic.StateError, match="what is to be session 'x' is not a whole safetensors file"):
        store.put_bytes("x", b"hello")
    mnemic.attached(model).save_pretrained(tmp_path)
    with pytest.raises(mnemic.StateError, match="holds None, not a session"):
        store.put_bytes("x", (tmp_path / "memory_model.safetensors").read_bytes())
    assert store.list() == []


def test_databases_that_cannot_be(tmp_path, monkeypatch):
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ValueError, match="a store in SQLite needs a file"):
            SessionStore(url)
    for url in ("", "sqlite:memories.db", "postgresql:/host/x"):
        with pytest.raises(ValueError, match=r"no database's URL; use a path such as memories\.db"):
            SessionStore(url)
    with pytest.raises(ValueError, match=r"mysql://user:\*\*\*@host/x names mysql; use sqlite:///file.db or"):
        SessionStore("mysql://user:secret@host/x")
    with pytest.raises(StoreError, match=r"there is no store at .*none\.db"):
        SessionStore(f"sqlite:///{tmp_path / 'none.db'}", create=False)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(StoreError, match="cannot be opened: No such file or directory"):
        SessionStore(f"sqlite:///{tmp_path / 'no' / 'folder.db'}")
    (tmp_path / "text.db").write_text("hello, this is no database " * 99)
    with pytest.raises(StoreError, match=r"text\.db: file is not a database"):
        SessionStore(f"sqlite:///{tmp_path / 'text.db'}")
    with SessionStore(f"sqlite:///{tmp_path / 'later.db'}"), sqlite3.connect(tmp_path / "later.db") as connection:
        connection.execute("UPDATE mnemic_store SET format = 3")
    with pytest.raises(StoreError, match=r"later\.db has format 3, this version of mnemic reads 2"):
        SessionStore(f"sqlite:///{tmp_path / 'later.db'}")


def test_a_server_that_is_not_there():
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x: connection failed") as told:
        SessionStore("postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(told.value)


def test_a_writer_that_does_not_end_is_told_of(tmp_path, monkeypatch, model):
    monkeypatch.setattr("mnemic.databases.SECONDS_BUSY", 0.2)
    path = tmp_path / "store.db"
    with SessionStore(f"sqlite:///{path}") as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="database is locked; another process has been writing for too long"):
            store.put("alice", session_of(model))
        assert store.list() == []  # readers do not wait
        other.close()
        store.put("alice", session_of(model))


def test_a_table_of_another_make_is_told_of(file_store, tmp_path, model):
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute(
            "CREATE TRIGGER never BEFORE INSERT ON mnemic_sessions BEGIN SELECT RAISE(ABORT, 'not here'); END"
        )
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"session 'alice' cannot be put into .*: not here; nothing"):
            file_store.put("alice", session_of(model), overwrite=overwrite)


def test_the_file_is_its_owner_s_alone(file_store, tmp_path, model):
    file_store.put("alice", session_of(model))
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    with file_store._connections.engine.connect() as connection:
        told = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")}
        assert told == {"journal_mode": "wal", "synchronous": 1}
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == 1


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_weights_are_hashed_once(file_store, monkeypatch):
    """What makes a session cheap to load: hashing the weights is most of it, and is not repeated."""
    model = host("llama", CONFIGS["emt-0"])
    hashed = []
    original = mnemic.keeping._hash
    monkeypatch.setattr("mnemic.keeping._hash", lambda memory: hashed.append(1) or original(memory))
    session = session_of(model)
    for version in range(1, 4):
        assert file_store.put("alice", session) == version
        session = file_store.get("alice", model)
    assert len(hashed) == 1
    shake(mnemic.attached(model).memory)
    file_store.put("alice", session)
    assert len(hashed) == 2


# --- from the terminal ------------------------------------------------------------------------------------------------


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_the_command(tmp_path, model):
    url = f"sqlite:///{tmp_path / 'store.db'}"
    session = session_of(model)
    with SessionStore(url) as store:
        store.put("alice", session)
        store.put("\x1b[31mred", session_of(model))
        store.put("brief", session_of(model), ttl=1e-6)
    listed = command("store", "list", "--store", url)
    assert listed.exit_code == 0, listed.output
    assert "alice" in listed.output
    assert "2 sessions" in listed.output
    assert r"\x1b[31mred" in listed.output
    assert "\x1b[31mred" not in listed.output
    shown = command("store", "show", "alice", "--store", url)
    assert session.contents()[1]["base_fingerprint"] in shown.output
    exported = command("store", "export", "alice", tmp_path / "a.memory", "--store", url)
    assert exported.exit_code == 0
    assert_equal_stream(mnemic.Session.load(tmp_path / "a.memory", model).stream, session.stream)
    purged = command("store", "purge", "--store", url)
    assert "removed brief, version 1" in purged.output
    refused = CliRunner().invoke(app, ["store", "delete", "alice", "--store", url], input="n\n")
    assert refused.exit_code == 1
    assert "alice" in command("store", "list", "--store", url).output
    deleted = command("store", "delete", "alice", "--store", url, "--yes")
    assert "removed alice, version 1" in deleted.output
    assert "alice" not in command("store", "list", "--store", url).output


def test_the_command_says_what_is_wrong(tmp_path):
    url = f"sqlite:///{tmp_path / 'store.db'}"
    missing = command("store", "list", "--store", url)
    assert missing.exit_code == 1
    assert "there is no store at" in missing.output
    assert not (tmp_path / "store.db").exists()
    SessionStore(url).close()
    for words in (["show", "alice"], ["export", "alice", tmp_path / "x"], ["delete", "alice", "--yes"]):
        found = command("store", *words, "--store", url)
        assert found.exit_code == 1
        assert "there is no session 'alice'" in found.output
