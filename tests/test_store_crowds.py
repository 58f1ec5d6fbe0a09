"""Sessions in a database, many at once: threads, processes, forks, writers that are killed, and their measurement."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

import store as bench
from families import make
from mnemic import tables
from mnemic.store import Conflict, SessionStore
from store import children, counts_of, crowd, kill_while_putting, kill_while_saving, tally, thousand

pytestmark = pytest.mark.small  # what is tested of the oldest and newest SQLAlchemy and psycopg


def test_eight_threads_of_one_store(store):
    names = [f"thread {number}" for number in range(8)]
    store.put_bytes("shared", tally([0]))

    def work(name):
        stored, accepted = store.put_bytes(name, tally([0])), 0
        for turn in range(1, 6):
            stored = store.put_bytes(name, tally([turn]), stored)
            assert counts_of(store.get_bytes(name)[0]) == [turn]
            while True:
                data, shared = store.get_bytes("shared")
                try:
                    store.put_bytes("shared", tally([counts_of(data)[0] + 1]), shared)
                    break
                except Conflict:
                    continue
            accepted += 1
        return accepted

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, names)) == 40
    assert counts_of(store.get_bytes("shared")[0]) == [40]
    assert store.entry("shared").version == 41


def test_one_of_many_who_make_a_session_makes_it(url):
    with SessionStore(url) as store, ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)

        def make_it(number):
            barrier.wait(30)
            try:
                return store.put_bytes("new", tally([number])).version
            except Conflict as conflict:
                return -conflict.found

        assert sorted(pool.map(make_it, range(8))) == [-1] * 7 + [1]

        def over_it(number):
            barrier.wait(30)
            return store.put_bytes("over", tally([number]), overwrite=True).version

        assert sorted(pool.map(over_it, range(8))) == list(range(1, 9))


def test_many_who_share_chunks(url):
    """Sessions of the same chunks are put and deleted by several at once: whoever is there is whole."""

    def work(number):
        with SessionStore(url) as store:
            for turn in range(6):
                store.put_bytes(f"of {number}", tally([turn % 3]), overwrite=True)
                assert counts_of(store.get_bytes(f"of {number}")[0]) == [turn % 3]
                if turn % 2:
                    store.delete(f"of {number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    with SessionStore(url) as store, store.transaction() as connection:
        assert tables.total(connection) == 0


def test_eight_processes(url):
    found = crowd(url, writers=8, rounds=4)
    assert (found.missing, found.wrong) == (0, 0)
    assert found.accepted + found.refused == 32
    assert found.accepted >= 4


def test_processes_that_open_a_new_store_at_once(url):
    # all of them make its tables, and all must find the same
    processes = [children().Process(target=SessionStore, args=(url,), daemon=True) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with SessionStore(url) as store, store._connections.engine.connect() as connection:
        assert len(connection.exec_driver_sql("SELECT * FROM mnemic_store").all()) == 1


def test_a_store_in_a_forked_process(store):
    stored = store.put_bytes("alice", tally([1]))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no assert here: whatever happens, this process must end
        try:
            store.put_bytes("alice", tally([2]), stored)
            os.write(writing, b"done")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 4) == b"done"
    os.close(reading)
    assert counts_of(store.get_bytes("alice")[0]) == [2]
    assert store.put_bytes("alice", tally([3]), store.get_bytes("alice")[1]).version == 3


def test_writers_that_are_killed(url):
    kills = 25 if url.startswith("sqlite") else 8
    found = kill_while_putting(url, kills)
    assert (found.kills, found.lost, found.half_written, found.left) == (kills, 0, 0, 0)
    assert found.versions > kills


def test_savers_that_are_killed(tmp_path):
    found = kill_while_saving(str(tmp_path / "me"), 5)
    assert (found.kills, found.lost, found.half_written, found.left) == (5, 0, 0, 0)


def test_what_shows_a_lost_or_half_written_session(file_store):
    """The measurement finds what it looks for."""
    file_store.put_bytes("killed", tally([7]))
    data, _ = file_store.get_bytes("killed")
    half = data[: len(data) // 2] + tally([12])[len(data) // 2 :]  # of the same length
    with pytest.raises(ValueError, match="checksum differs"):
        counts_of(half)


def test_the_measurement(tmp_path, monkeypatch):
    """The benchmark at its smallest: what it writes is what the tables are made of."""
    monkeypatch.setattr(bench, "gpt2_small", lambda: make("gpt2"))
    cost = thousand(f"sqlite:///{tmp_path / 'cost.db'}", 3)
    assert cost["bytes of the state"] == 64 * 256 * 4
    assert cost["bytes of a session"] > cost["bytes of the state"]
    assert 0 < cost["load ms"]["median"] < cost["load and save ms"]["median"]
    monkeypatch.setattr(bench, "thousand", lambda *_, **__: cost)
    words = ["--kills", "1", "--writers", "2", "--rounds", "2", "--out", str(tmp_path / "results")]
    found = CliRunner().invoke(bench.app, words)
    assert found.exit_code == 0, found.output
    made = bench.tables(tmp_path / "results")
    assert "3 sessions of a memory of 64 slots of 256" in made["store-cost"]
    assert "| SQLite | 1 | 0 | 0 | 0 | 2 x 2 |" in made["store-crowds"]
