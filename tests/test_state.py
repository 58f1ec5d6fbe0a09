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
    grow,
    level,
    map_state,
    nbytes,
    push_rows,
    put,
    read_file,
    repeat,
    select,
    shrink,
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


# --- states that grow ------------------------------------------------------------------------------------------------


def test_grow_pads_with_zeros():
    table = torch.arange(1.0, 13.0).view(2, 2, 3)
    grown = grow(table, (4, 3))
    assert grown.shape == (2, 4, 3)
    assert torch.equal(grown[:, :2], table)
    assert not grown[:, 2:].any()
    both = grow(table, (3, 5))
    assert torch.equal(both[:, :2, :3], table)
    assert both.sum() == table.sum()
    assert grow(table, (2, 3)) is table
    assert grow(torch.ones(3), ()).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.int32, torch.bool])
def test_grow_keeps_the_dtype(dtype):
    grown = grow(torch.ones(2, 1, dtype=dtype), (3,))
    assert grown.dtype == dtype
    assert grown.long().tolist() == [[1, 0, 0]] * 2
    assert grow(torch.ones(2, 0, 4, dtype=dtype), (2, 4)).shape == (2, 2, 4)


def test_level_takes_the_largest_of_every_dimension():
    tensors = [torch.full((1, 2, 5), 1), torch.full((3, 4, 1), 2), torch.full((2, 0, 0), 3)]
    levelled = level(tensors)
    assert [tuple(tensor.shape) for tensor in levelled] == [(1, 4, 5), (3, 4, 5), (2, 4, 5)]
    assert [int(tensor.sum()) for tensor in levelled] == [10, 24, 0]
    assert levelled[1][2, 3].tolist() == [2, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="zip"):
        level([torch.zeros(1, 2), torch.zeros(1, 2, 2)])


NONE = {"id": torch.zeros(1, 0, dtype=torch.long), "pair": torch.zeros(1, 0, 0, dtype=torch.int32)}
"""A row with nothing in it."""


@pytest.fixture
def grown():
    """Two rows that hold more than those of `small`."""
    return {"id": torch.arange(1, 9).view(2, 4), "pair": torch.ones(2, 4, 4, dtype=torch.int32)}


@pytest.fixture
def small():
    return {"id": torch.tensor([[-1, -2], [-3, -4], [-5, -6]]), "pair": torch.full((3, 1, 1), 7, dtype=torch.int32)}


def test_concatenate_states_of_different_sizes(grown, small):
    joined = concatenate([small, grown, NONE])
    assert joined["id"].tolist() == [
        [-1, -2, 0, 0],
        [-3, -4, 0, 0],
        [-5, -6, 0, 0],
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [0, 0, 0, 0],
    ]
    assert joined["pair"].shape == (6, 4, 4)
    assert joined["pair"].sum((1, 2)).tolist() == [7, 7, 7, 16, 16, 0]
    assert joined["pair"].dtype == torch.int32


def test_put_replaces_rows_and_pads_either(grown, small):
    kept = {name: tensor.clone() for name, tensor in small.items()}
    after = put(small, torch.tensor([2, 0]), grown)
    assert after["id"].tolist() == [[5, 6, 7, 8], [-3, -4, 0, 0], [1, 2, 3, 4]]
    assert after["pair"].sum((1, 2)).tolist() == [16, 7, 16]
    assert all(torch.equal(small[name], tensor) for name, tensor in kept.items())
    # nothing of a row's longer past stays behind what replaces it
    after = put(grown, torch.tensor([1]), select(small, torch.tensor([0])))
    assert after["id"].tolist() == [[1, 2, 3, 4], [-1, -2, 0, 0]]
    assert after["pair"][1].tolist() == [[7, 0, 0, 0], *[[0, 0, 0, 0]] * 3]
    assert put(small, torch.tensor([0]), NONE)["id"].tolist() == [[0, 0], [-3, -4], [-5, -6]]


def test_put_carries_gradients():
    old, new = torch.ones(3, 2, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    after = put({"slots": old}, torch.tensor([1]), {"slots": new})["slots"]
    (after * torch.arange(9.0).view(3, 3)).sum().backward()
    assert new.grad.tolist() == [[3, 4, 5]]
    assert old.grad.tolist() == [[0, 1], [0, 0], [6, 7]]


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
    save_file({"weight": torch.zeros(2)}, path, {"mnemic": "3", "meta": json.dumps({})})
    with pytest.raises(StateError, match="has format '3'"):
        read_file(path)
    save_file({"weight": torch.zeros(2)}, path, {"mnemic": "1"})
    with pytest.raises(StateError, match=str(path)):
        read_file(path)
    path.write_text("hello")
    with pytest.raises(StateError, match="not a whole safetensors file"):
        read_file(path)


@torch.no_grad()
def test_a_queue_keeps_each_rows_own_latest():
    generator = torch.Generator().manual_seed(0)
    for most in (1, 3, 8, 20):
        entries, counts, expected = torch.zeros(3, 0, 2), [0, 0, 0], [[], [], []]
        for step in range(12):
            time = int(torch.randint(1, 10, (1,), generator=generator))
            new = torch.randn(3, time, 2, generator=generator)
            keep = torch.rand(3, time, generator=generator) < 0.6 if step % 3 else None
            entries, counts = push_rows(entries, counts, new, keep, most)
            for row, kept in enumerate(expected):
                kept += [each for t, each in enumerate(new[row].tolist()) if keep is None or keep[row, t]]
                assert entries[row, : counts[row]].tolist() == kept[-most:]
                assert not entries[row, counts[row] :].any()
            assert entries.shape[1] == max(counts) <= most
            # what left is not kept behind a view
            assert entries.untyped_storage().nbytes() == entries.numel() * 4


def test_shrink_is_the_inverse_of_level():
    least = {
        "slots": torch.zeros(1, 3, 2),
        "keys": torch.zeros(1, 0, 4),
        "age": torch.zeros(1, 0),
        "ties": torch.zeros(1, 0, 0),
    }
    state = {
        "slots": torch.zeros(1, 3, 2),  # zeros in what does not grow are values
        "keys": torch.ones(1, 5, 4),
        "age": torch.zeros(1, 5),  # counts what keys count: cut with them
        "ties": torch.ones(1, 2, 2),
    }
    wide = {
        name: grow(tensor, sizes)
        for (name, tensor), sizes in zip(state.items(), ([3, 2], [9, 4], [9], [6, 6]), strict=True)
    }
    found = shrink(wide, least)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        name: list(tensor.shape) for name, tensor in state.items()
    }
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["keys"].untyped_storage().nbytes() == 5 * 4 * 4  # a copy, not a view of the wide one
    assert shrink({**wide, "keys": torch.zeros(1, 9, 4)}, least)["keys"].shape == (1, 0, 4)
    assert {name: tensor.shape for name, tensor in shrink(least, least).items()} == {
        name: tensor.shape for name, tensor in least.items()
    }
