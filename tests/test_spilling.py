"""Banks that do not fit into RAM: their chunks lie in files, and the session is what it is without."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import tempfile

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, random_cuts, tokens
from mnemic.bank import Bank
from mnemic.spilling import Spill
from mnemic.state import nbytes
from test_mapped import QUESTION, recalling, said, small_chunks
from test_packing import assert_same, numbers

__all__ = ["small_chunks"]  # with chunks of a few segments
RAM = 2 * 2 * 3 * 16 * 8 * 4  # of 16 tokens


def filled(bank, keys, cuts):
    for part in keys.split(cuts, 2):
        bank = bank.append(part, -part)
    return bank


def in_ram(bank):
    return sum(nbytes(chunk.tensors) for chunk in bank.chunks if not chunk.in_file)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stored", ["base", "int8", "fp8"])
def test_a_bank_in_files_gives_what_it_gives_without(stored, tmp_path):
    keys = numbers(2, 3, 150, 8)
    plain = Bank(stored=stored).append(keys, -keys)
    for seed in range(3):
        bank = filled(Bank(stored=stored, spill=Spill(tmp_path, RAM)), keys, random_cuts(150, seed))
        assert sum(chunk.sealed for chunk in bank.chunks) == len(names(tmp_path)) > 1
        assert in_ram(bank) <= RAM
        assert_same(bank, plain)
        assert bank.nbytes == plain.nbytes
        assert torch.equal(bank.means(1, 2), plain.means(1, 2))
        start = torch.tensor([0, 20, 64, 148])[None, None].expand(3, 2, -1)
        for name in ("keys", "values"):
            assert torch.equal(bank.runs(name, 1, start, 2), plain.runs(name, 1, start, 2))
        assert torch.equal(bank.first(0, 40)[1], plain.first(0, 40)[1])
        for each in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), bank.without(149, 149)):
            assert in_ram(each) <= RAM
            assert each.spill == bank.spill
        assert bank.without(0, 149).spill is bank.spill
        assert in_ram(bank.zeroed()) <= RAM
        assert in_ram(plain.spilling(Spill(tmp_path, 0))) <= RAM
        del bank, each
        gc.collect()
        assert names(tmp_path) == []


def test_forks_share_files_and_do_not_see_each_other(tmp_path):
    keys, one, two = numbers(2, 3, 64, 8), numbers(2, 3, 40, 8, seed=1), numbers(2, 3, 40, 8, seed=2)
    first = Bank(spill=Spill(tmp_path, RAM)).append(keys, -keys)
    before = names(tmp_path)
    assert before
    forks = [first.append(each, -each) for each in (one, two, two)]
    assert all(fork.chunks[0] is first.chunks[0] for fork in forks)
    for fork, its in zip(forks, (one, two, two), strict=True):
        assert torch.equal(fork.tensors()["keys"][0], torch.cat([keys, its], 2))
    # who has read the same has the same files
    assert len(names(tmp_path)) == len(before) + 2
    assert forks[1].chunks[1] is forks[2].chunks[1]
    del first, forks[0], fork
    gc.collect()
    assert len(names(tmp_path)) == len(before) + 1
    again = Bank(spill=Spill(tmp_path, RAM)).append(keys, -keys)
    assert set(before) < set(names(tmp_path)), "named by its content"
    assert_same(again, Bank().append(keys, -keys))


@torch.no_grad()
def test_a_session_in_files_says_what_it_says_without(tmp_path):
    model = recalling(stored="int8", search="candidates")
    plain, session, later = mnemic.Session(model), mnemic.Session(model), mnemic.Session(model)
    folder = tmp_path / "chunks" / "of alice"
    session.spill_to(folder, ram=4000)
    for each in (plain, session, later):
        each.read(tokens(1, 9 * SEGMENT + 3))
    assert torch.equal(said(session), said(plain))
    later.spill_to(folder, ram=4000)
    assert in_ram(later.stream.banks[0]) <= 4000 < in_ram(plain.stream.banks[0])
    mnemic.batch([session, later]).read([tokens(1, 4 * SEGMENT, 9)] * 2)
    plain.read(tokens(1, 4 * SEGMENT, 9))
    for each in (session, later, session.fork()):
        assert in_ram(each.stream.banks[0]) <= 4000
        assert each.nbytes == plain.nbytes
    session.save(tmp_path / "s.memory")
    again = mnemic.Session.load(tmp_path / "s.memory", model)
    assert torch.equal(said(again), said(session))
    again.spill_to(folder, ram=0)
    again.read(tokens(1, 3 * SEGMENT, 10))
    assert again.forget(0, 2) == 3
    fork = session.fork()
    for each in (session, fork):
        each.reset()
        each.read(tokens(1, 9 * SEGMENT))
        assert in_ram(each.stream.banks[0]) <= 4000
        assert any(chunk.sealed for chunk in each.stream.banks[0].chunks)
    del each, session, later, again, fork
    gc.collect()
    assert names(folder) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full to stand for a full disk")
@torch.no_grad()
def test_a_full_disk_leaves_the_session_as_it_was(tmp_path, monkeypatch):
    model = recalling()
    session, plain = mnemic.Session(model), mnemic.Session(model)
    session.spill_to(tmp_path, ram=4000)
    for each in (session, plain):
        each.read(tokens(1, 7 * SEGMENT + 3))
    before, files = session.stream, names(tmp_path)
    with monkeypatch.context() as patched:
        full = lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "none"))  # noqa: E731
        patched.setattr(tempfile, "mkstemp", full)
        with pytest.raises(OSError, match=r"a chunk of [\d,]+ bytes could not be written to .*No space left") as error:
            session.read(tokens(1, 5 * SEGMENT, 7))
    assert error.value.errno == errno.ENOSPC
    assert session.stream is before
    assert names(tmp_path) == files
    for each in (session, plain):
        each.read(tokens(1, 5 * SEGMENT, 7))
    assert torch.equal(said(session), said(plain))


@torch.no_grad()
def test_chunks_that_are_missing_cut_or_changed(tmp_path):
    model = recalling(recall_in_reading=False)
    session = mnemic.Session(model)
    session.spill_to(tmp_path, ram=0)
    session.read(tokens(1, 9 * SEGMENT))
    expected = said(session)
    # who holds a chunk holds its file
    (path, *_) = tmp_path.iterdir()
    path.rename(tmp_path / "away")
    assert torch.equal(said(session), expected)
    os.truncate(tmp_path / "away", 100)
    before = session.stream
    with pytest.raises(mnemic.StateError, match=rf"chunk .*{path.name} was cut to 100 of"):
        session.forward(QUESTION)
    assert session.stream is before
    session.reset()
    session.read(tokens(1, 9 * SEGMENT, 5))  # which uses no more than the sinks
    for path in tmp_path.glob("*.chunk"):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    before = session.stream
    with pytest.raises(mnemic.StateError, match=r"chunk .*\.chunk was changed after it was written"):
        session.forward(QUESTION)
    assert session.stream is before


@torch.no_grad()
def test_what_cannot_be_laid_into_files_is_refused(tmp_path):
    session = mnemic.Session(recalling())
    with pytest.raises(ValueError, match="ram is -1"):
        session.spill_to(tmp_path, ram=-1)
    session.spill_to(tmp_path / "gone", ram=0)
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match=r"gone .*No such file"):
        session.read(tokens(1, 9 * SEGMENT))
    assert session.stream is None
    other = make("llama")
    mnemic.attach(other, mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=16))
    with pytest.raises(ValueError, match="kind 'emt' keeps no keys"):
        mnemic.Session(other).spill_to(tmp_path)
