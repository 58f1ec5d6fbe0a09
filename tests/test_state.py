"""Operations on states, and the file format: whole, checked, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mnemic import StateError
from mnemic.state import (
    batch_size,
    concatenate,
    detach,
    map_state,
    nbytes,
    read_file,
    repeat,
    select,
    where,
    write_file,
)


@pytest.fixture
def state():
    return {"slots": torch.randn(3, 4, 5), "age": torch.randn(3, 4, dtype=torch.float64)}


def test_rows(state):
    assert batch_size(state) == 3
    assert torch.equal(select(state, torch.tensor([2, 0, 2]))["age"], state["age"][[2, 0, 2]])
    assert torch.equal(repeat(state, 2)["slots"], state["slots"][[0, 0, 1, 1, 2, 2]])
    joined = concatenate([state, select(state, torch.tensor([1]))])
    assert torch.equal(joined["slots"], state["slots"][[0, 1, 2, 1]])


def test_where_copies_rows(state):
    bad = map_state(state, lambda tensor: torch.full_like(tensor, torch.nan))
    mixed = where(torch.tensor([True, False, True]), state, bad)
    assert torch.equal(mixed["slots"][[0, 2]], state["slots"][[0, 2]])
    assert mixed["age"][1].isnan().all()


def test_operations_leave_their_argument_alone(state):
    before = {name: tensor.clone() for name, tensor in state.items()}
    select(state, torch.tensor([0]))["slots"].zero_()
    repeat(state, 2)["slots"].zero_()
    concatenate([state, state])["slots"].zero_()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_bytes_and_detach(state):
    assert nbytes(state) == 3 * 4 * 5 * 4 + 3 * 4 * 8
    state["slots"].requires_grad_()
    assert not detach(state)["slots"].requires_grad


def test_states_that_do_not_fit():
    with pytest.raises(StateError, match=r"one batch size, found \[2, 3\]"):
        batch_size({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(StateError, match="no tensors"):
        batch_size({})
    with pytest.raises(StateError, match="different tensors"):
        concatenate([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])


META = {"content": "session", "numbers": [1, 2], "name": None}


@pytest.fixture
def path(state, tmp_path):
    state["half"] = torch.randn(3, 2).to(torch.bfloat16)
    state["mask"] = torch.tensor([[True], [False], [True]])
    state["empty"] = torch.zeros(3, 0, 4)
    write_file(tmp_path / "one", state, META)
    return tmp_path / "one"


def test_file_round_trip(state, path):
    tensors, meta = read_file(path)
    assert meta == META
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_file_of_views(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"a": base[:, ::2], "b": base.T, "c": base[1].expand(3, -1)}
    write_file(tmp_path / "views", tensors, {})
    assert all(torch.equal(read_file(tmp_path / "views")[0][name], tensor) for name, tensor in tensors.items())


def test_file_appears_whole_or_not_at_all(state, path, monkeypatch):
    content = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, {"other": torch.zeros(3)}, {})
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no memory file at"):
        read_file(tmp_path / "none")


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for length in [*range(64), *range(64, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(StateError, match=str(path)):
            read_file(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(StateError):
        read_file(path)


@pytest.mark.parametrize("bit", [1, 4, 0x80])
def test_every_edited_byte_is_refused(state, path, bit):
    content = path.read_bytes()
    for place in range(len(content)):
        edited = bytearray(content)
        edited[place] ^= bit
        path.write_bytes(bytes(edited))
        try:
            tensors, meta = read_file(path)
        except StateError:
            continue
        # a byte that means nothing (a space of the header's padding) may change, what is read may not
        assert meta == META, place
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items()), place


def test_foreign_files_are_refused(path):
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StateError, match=r"has format None, this version of mnemic reads '1'"):
        read_file(path)
    save_file({"weight": torch.zeros(2)}, path, {"mnemic": "2", "meta": json.dumps({})})
    with pytest.raises(StateError, match="has format '2'"):
        read_file(path)
    save_file({"weight": torch.zeros(2)}, path, {"mnemic": "1"})
    with pytest.raises(StateError, match=str(path)):
        read_file(path)
    path.write_text("hello")
    with pytest.raises(StateError, match="not a whole safetensors file"):
        read_file(path)
