"""Sessions as folders: a save writes what is new, the head comes last, and nothing is read before it is used."""

from __future__ import annotations

import copy
import math
import os
import resource

import pytest
import torch

import mnemic
from helpers import SEGMENT, tokens
from mnemic import bank, chunks, folders
from mnemic.inspect.inside import open_session
from mnemic.state import read_file, write_file
from mnemic.store import SessionStore
from test_chunks import read_on
from test_mapped import QUESTION, reading, recalling, said, small_chunks
from test_packing import assert_same

__all__ = ["small_chunks"]


def names(folder):
    return {path.name for path in folder.iterdir()} - {folders.HEAD, folders.LOCK}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder, model=None):
    return mnemic.Session.load(folder, model or recalling())


@pytest.mark.parametrize("stored", ["base", "fp8"])
def test_a_folder_is_what_a_file_is_and_grows_by_what_is_new(stored, tmp_path):
    model, folder = recalling(stored=stored, search="candidates"), tmp_path / "me"
    session, before, written = reading(model), set(), 0
    for turn in range(17):
        session.save(f"{folder}/" if not turn else folder)
        length = session.stream.banks[0].length // SEGMENT
        new = names(folder) - before
        written += sum((folder / name).stat().st_size for name in new)
        # as many as a binary counter of so many units has digits, and those that are full
        assert len(names(folder)) <= length // 4 + math.log2(4) + 1
        assert len(new) <= 2 or not turn
        before = names(folder)
        if turn % 8 == 7:
            session.save(tmp_path / "one.memory")
            again, one = load(folder, model), load(tmp_path / "one.memory", model)
            assert_same(again.stream.banks[0], one.stream.banks[0])
            assert torch.equal(said(again), said(one))
            session = again  # what goes on from files writes the same ones
        read_on(session, turn, 5)
    held = sum((folder / name).stat().st_size for name in before)
    assert held < written < (1 + math.log2(4)) * held


def test_loading_reads_nothing_and_saving_again_reads_nothing(tmp_path, monkeypatch):
    model = recalling(stored="int8", search="candidates")
    session = reading(model, 12 * SEGMENT)
    session.save(f"{tmp_path}/me/")
    checked, hashed, laid = [], [], []
    monkeypatch.setattr("mnemic.keeping.check_kept", lambda tensors: checked.extend(tensors))
    checksums, lay = chunks.checksums, folders.laid
    monkeypatch.setattr(chunks, "checksums", lambda parts: hashed.append(parts) or checksums(parts))
    monkeypatch.setattr(folders, "laid", lambda parts: laid.append(parts) or lay(parts))
    again = load(tmp_path / "me", model)
    assert again.nbytes == session.nbytes
    assert all(chunk.sealed for chunk in again.stream.banks[0].chunks)
    for name in ("me", "other"):
        again.fork().save(f"{tmp_path}/{name}/")
        assert not hashed
        assert not laid or name == "other"
    checked.clear()
    # into a store as well: what it was is known, and what is sent is checked
    with SessionStore(tmp_path / "store.db") as store:
        store.put("me", again)
        assert not hashed
        assert store.get("me", model).stream.banks[0].length == session.stream.banks[0].length
    assert torch.equal(said(again), said(session))
    assert names(tmp_path / "me") == names(tmp_path / "other")


@torch.no_grad()
def test_a_spilled_session_is_saved_from_its_files(tmp_path, monkeypatch):
    model = recalling(stored="int8", search="candidates")
    session, plain = mnemic.Session(model), mnemic.Session(model)
    session.spill_to(tmp_path / "spilled", ram=3000)
    for seed in range(4):
        for each in (session, plain):
            each.read(tokens(1, 5 * SEGMENT, seed))
        with monkeypatch.context() as patched:
            patched.setattr(bank.Bank, "_tensors", None)  # which would gather it
            patched.setattr(bank.Bank, "tensors", None)
            session.save(f"{tmp_path}/me/")
        plain.save(f"{tmp_path}/plain/")
        assert names(tmp_path / "me") == names(tmp_path / "plain")
    assert torch.equal(said(load(tmp_path / "me", model)), said(session))
    # both may lie in one folder
    session.save(tmp_path / "spilled")
    assert torch.equal(said(load(tmp_path / "spilled", model)), said(session))
    assert torch.equal(said(session), said(plain))


def test_what_is_no_longer_there_is_removed_and_what_is_another_s_stays(tmp_path):
    session = reading(recalling())
    session.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for left in (f"{'0' * 64}.chunk", f".{'0' * 64}.chunk.abc", f".{folders.HEAD}.abc"):
        (tmp_path / left).write_text("of a save that was killed")
    session.forget(0, 3)
    before = names(tmp_path)
    session.save(tmp_path)
    assert names(tmp_path) & before == {"notes.txt"}
    assert torch.equal(said(load(tmp_path)), said(session))
    mnemic.Session(recalling()).save(tmp_path)
    assert names(tmp_path) == {"notes.txt"}
    assert load(tmp_path).stream is None
    with pytest.raises(FileNotFoundError):
        load(f"{tmp_path}/none/")


@pytest.mark.parametrize("way", ["missing", "cut", "cut in use", "changed", "swapped", "empty"])
def test_a_chunk_file_that_is_not_what_it_was(way, tmp_path):
    session = reading(recalling())
    session.save(tmp_path)
    path, *_, other = sorted(tmp_path.glob("*.chunk"), key=lambda path: -path.stat().st_size)
    again = load(tmp_path)
    data = path.read_bytes()
    if way == "missing":
        path.unlink()
        said_of = rf"{tmp_path} lacks its chunk file {path.name}"
    elif way.startswith("cut"):
        os.truncate(path, 900)
        said_of = path.name + (" was cut to 900 of" if way == "cut in use" else " is not a whole safetensors file")
    elif way == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        said_of = f"{path.name} was changed after it was written: the checksum of bank.values"
    else:
        path.write_bytes(other.read_bytes() if way == "swapped" else (8).to_bytes(8, "little") + b"{}      ")
        said_of = rf"{path.name} does not hold the {4 * SEGMENT} tokens that its folder says"
    with pytest.raises(mnemic.StateError, match=said_of):
        (again if way == "cut in use" else load(tmp_path)).forward(QUESTION)
    if way in ("missing", "cut"):
        session.save(tmp_path)  # which has it still
        assert torch.equal(said(load(tmp_path)), said(session))


def test_a_head_that_is_not_what_it_was(tmp_path):
    model, session = recalling(), reading(recalling())
    session.save(tmp_path)
    head = tmp_path / folders.HEAD
    with pytest.raises(mnemic.StateError, match=r"nothing here keeps 'bank\.files, bank\.units'"):
        load(head, model)  # without what lies beside it
    tensors, meta = read_file(head)
    sizes = tensors[folders.FILES]
    for wrong in (sizes[:, 1:], sizes[0], sizes.float(), torch.cat([sizes, -sizes, sizes], 1)):
        write_file(head, tensors | {folders.FILES: wrong}, meta)
        with pytest.raises(mnemic.StateError, match="does not say in which files its"):
            load(tmp_path, model)
    write_file(head, tensors | {"bank.positions": tensors["bank.positions"][:, :-9]}, meta)
    with pytest.raises(mnemic.StateError, match="does not fit this model"):
        load(tmp_path, model)
    files = names(tmp_path)
    head.write_bytes(head.read_bytes()[:-1])
    with pytest.raises(mnemic.StateError, match="not a whole safetensors file"):
        load(tmp_path, model)
    assert names(tmp_path) == files
    session.save(tmp_path)
    assert torch.equal(said(load(tmp_path, model)), said(session))


@pytest.mark.parametrize("what", ["a chunk file", "the head"])
def test_a_full_disk_leaves_what_was_there(what, tmp_path):
    """A limit to what a file may have stands for a disk without room."""
    session = reading(recalling(), 13 * SEGMENT + 3)  # of which the next segment fills a chunk file of its own
    session.save(f"{tmp_path}/me/")
    folder, expected = tmp_path / "me", said(session)
    before = contents(folder)
    read_on(session, 5)
    session.save(f"{tmp_path}/other/")
    (new,) = names(tmp_path / "other") - names(folder)
    size = (tmp_path / "other" / new).stat().st_size
    limit = size - 1 if what == "a chunk file" else size
    assert limit < (tmp_path / "other" / folders.HEAD).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=rf"could not be saved to {folder} \(File too large\); make room there"):
            session.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert torch.equal(said(load(folder)), expected)
    session.save(folder)
    assert torch.equal(said(load(folder)), said(session))


@pytest.mark.parametrize("stage", ["a chunk file", "the head", "behind the head", "what is old"])
def test_a_save_that_is_interrupted_leaves_the_version_before_or_after(stage, tmp_path, monkeypatch):
    session = reading(recalling())
    session.save(tmp_path)
    expected, before = said(session), contents(tmp_path)
    session.forget(0, 3)
    replace = os.replace

    def interrupted(_, path):
        if stage == ("the head" if path.name == folders.HEAD else "a chunk file"):
            raise KeyboardInterrupt
        replace(_, path)
        if stage == "behind the head" and path.name == folders.HEAD:
            raise KeyboardInterrupt

    def not_removed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mnemic.state.os.replace", interrupted)
        if stage == "what is old":
            patched.setattr(folders, "_clean", not_removed)
        with pytest.raises(KeyboardInterrupt):
            session.save(tmp_path)
    if stage == "behind the head":
        expected = said(session)
        assert not names(tmp_path) & before.keys()
    elif stage == "what is old":
        expected = said(session)
        assert names(tmp_path) > before.keys() - {folders.HEAD, folders.LOCK}
    else:
        assert contents(tmp_path) == before
    assert torch.equal(said(load(tmp_path)), expected)
    session.save(tmp_path)
    assert not names(tmp_path) & before.keys()


def test_a_folder_that_is_saved_into_while_it_is_opened(tmp_path, monkeypatch):
    model = recalling()
    session, opened = reading(model), folders.map_tensors
    session.save(tmp_path)
    session.forget(0, 3)

    def saved_meanwhile(path):
        monkeypatch.setattr(folders, "map_tensors", opened)
        session.save(tmp_path)
        return opened(path)

    monkeypatch.setattr(folders, "map_tensors", saved_meanwhile)
    assert torch.equal(said(load(tmp_path, model)), said(session))


def test_a_folder_can_be_looked_into(tmp_path):
    session = reading(recalling())
    session.save(f"{tmp_path}/me/")
    session.save(tmp_path / "me.memory")
    one, two = open_session(tmp_path / "me"), open_session(tmp_path / "me.memory")
    assert one.name == "me"
    assert one.size == sum(path.stat().st_size for path in (tmp_path / "me").iterdir())
    assert one.bytes == {**two.bytes, "keys": one.bytes["keys"]}
    assert two.bytes["keys"] - 8 * 4096 < one.bytes["keys"] <= two.bytes["keys"]  # zeros behind them are in the file


@torch.no_grad()
def test_a_folder_goes_on_in_another_dtype(tmp_path):
    model = recalling()
    session = reading(model)
    session.save(tmp_path)
    lower = copy.deepcopy(model).to(torch.bfloat16)
    again = mnemic.Session.load(tmp_path, lower, strict=False)
    assert not any(chunk.sealed for chunk in again.stream.banks[0].chunks)
    assert again.stream.banks[0].keys(0)[0].dtype == torch.bfloat16
    (path, *_) = tmp_path.glob("*.chunk")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(mnemic.StateError, match=r"the checksum of bank\.values"):
        mnemic.Session.load(tmp_path, lower, strict=False)
