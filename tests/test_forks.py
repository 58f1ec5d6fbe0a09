"""Stores across a fork: no connection is in two processes, and what either writes is there for the other."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from mnemic import connections
from mnemic.forking import Lock
from mnemic.store import SessionStore
from store import counts_of, tally

pytestmark = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system does not fork")


@contextlib.contextmanager
def child(work: Callable[[Callable[[], None]], str]):
    """A forked process that runs `work`, which may wait for the parent; yields what lets it go on.

    In the end, what it returned must have been "done". Whatever happens in it, it must leave by `_exit`.
    """
    back, told = os.pipe()
    wait, go = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(told, work(lambda: os.read(wait, 1) and None).encode())
        except BaseException as error:
            os.write(told, repr(error).encode()[:4096])
        finally:
            os._exit(0)
    os.close(told)
    try:
        yield lambda: os.write(go, b"1")
        assert os.read(back, 4096) == b"done"
    finally:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
        for end in (back, wait, go):
            os.close(end)


def opened(store: SessionStore) -> int:
    """Connections that are open in this process."""
    pool = store._connections.engine.pool
    return pool.checkedin() + pool.checkedout()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_lock_that_another_thread_held_is_free_in_a_child():
    """Whoever held it is not there, so nobody else would release it."""
    lock, held, go = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            go.wait(60)

    def work(wait):
        signal.alarm(60)
        with lock:
            return "done"

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        with child(work):
            pass
    finally:
        go.set()
        thread.join()
    with lock:
        pass


def test_what_a_child_writes_stays_when_its_parent_closes(url):
    with SessionStore(url) as store:
        store.put_bytes("a", tally([1]))

        def work(wait):
            stored = store.put_bytes("b", tally([2]))
            wait()
            store.put_bytes("b", tally([3]), stored)
            return "done"

        with child(work) as go:
            until = time.monotonic() + 30
            while not any(entry.name == "b" for entry in store.list()) and time.monotonic() < until:
                time.sleep(0.01)
            store.close()
            go()
        assert counts_of(store.get_bytes("b")[0]) == [3]
        assert counts_of(store.get_bytes("a")[0]) == [1]


def test_no_connection_is_inherited(url):
    with SessionStore(url) as store:
        store.put_bytes("a", tally([1]))
        assert opened(store) == 1
        engine = store._connections.engine

        def work(_):
            assert opened(store) == 0
            assert store._connections.engine is not engine
            # neither use nor end of the parent's touches its connections
            store.close()
            assert counts_of(store.get_bytes("a")[0]) == [1]
            store.delete("a")
            gc.collect()
            return "done"

        with child(work):
            pass
        assert store.list() == []
        store.put_bytes("a", tally([2]))
        assert counts_of(store.get_bytes("a")[0]) == [2]


def test_a_fork_waits_for_the_transactions_of_other_threads(url):
    with SessionStore(url) as store:
        store.put_bytes("a", tally([0]))
        begun, order = threading.Event(), []

        def slow():
            with store.transaction() as connection:
                connection.exec_driver_sql("DELETE FROM mnemic_sessions")
                begun.set()
                time.sleep(0.3)
                order.append("committed")

        thread = threading.Thread(target=slow)
        thread.start()
        assert begun.wait(30)

        def work(_):
            # the lock of a thread that is not here would be held for ever
            store.put_bytes("child", tally([1]))
            return "done"

        with child(work):
            order.append("forked")
        thread.join()
        assert order == ["committed", "forked"]
        assert [entry.name for entry in store.list()] == ["child"]


def test_a_transaction_that_does_not_end_holds_up_no_fork_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS_BUSY", 0.2)
    with SessionStore(tmp_path / "s.db") as store:
        store.put_bytes("a", tally([1]))
        begun, end = threading.Event(), threading.Event()

        def endless():
            with store.transaction():
                begun.set()
                end.wait(30)

        thread = threading.Thread(target=endless)
        thread.start()
        assert begun.wait(30)

        def work(_):
            assert counts_of(store.get_bytes("a")[0]) == [1]
            return "done"

        with child(work):
            pass
        end.set()
        thread.join()
        assert counts_of(store.get_bytes("a")[0]) == [1]


def test_children_of_children_and_many_stores(tmp_path):
    stores = [SessionStore(tmp_path / f"{number}.db") for number in range(3)]

    def write(name):
        for number, store in enumerate(stores):
            store.put_bytes(name, tally([number]))

    def work(_):
        def inner(_):
            write("grandchild")
            return "done"

        write("child")
        with child(inner):
            pass
        return "done"

    with child(work):
        write("parent")
    for number, store in enumerate(stores):
        assert [entry.name for entry in store.list()] == ["child", "grandchild", "parent"]
        assert {counts_of(store.get_bytes(entry.name)[0])[0] for entry in store.list()} == {number}
        store.close()


def test_a_store_goes_with_its_last_user(tmp_path):
    """What is registered for forks keeps no store open."""
    before = len(connections._all)
    store = SessionStore(tmp_path / "s.db")
    assert len(connections._all) == before + 1
    store.close()
    del store
    gc.collect()
    assert len(connections._all) <= before


def test_a_relative_path_is_the_same_file_wherever_a_process_goes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with SessionStore("memories.db") as store:
        store.put_bytes("a", tally([1]))

        def work(_):
            os.chdir(tmp_path / "elsewhere")
            store.put_bytes("b", tally([2]))
            return "done"

        with child(work):
            pass
        assert [entry.name for entry in store.list()] == ["a", "b"]
        assert not (tmp_path / "elsewhere" / "memories.db").exists()
