"""Cutting calls into pieces, against a count of tokens one by one, and the immutable stream."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import CONFIGS, SEGMENT
from mnemic.memory import Memory, Site
from mnemic.state import StateError, append_rows, grow
from mnemic.stream import Piece, Stream, check_finite, cut


def cut_slowly(waiting, time, length, keep, fresh):
    """Every row's tokens counted one after another."""
    ended, begun = {}, {}
    for row, count in enumerate(waiting):
        for t in range(time):
            if fresh[row][t]:
                count = 0
                begun.setdefault(t, []).append(row)
            if keep[row][t]:
                count += 1
                if count == length:
                    count = 0
                    ended.setdefault(t + 1, []).append(row)
    edges = sorted({0, time, *ended, *begun})
    return [Piece(a, b, tuple(begun.get(a, ())), tuple(ended.get(b, ()))) for a, b in itertools.pairwise(edges)]


@st.composite
def calls(draw):
    length, rows, time = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    flags = st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=rows, max_size=rows)
    waiting = draw(st.lists(st.integers(0, length - 1), min_size=rows, max_size=rows))
    return waiting, time, length, draw(flags), draw(flags)


@given(calls(), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_cut_counts_tokens(case, masked, packed):
    waiting, time, length, keep, fresh = case
    keep = keep if masked else [[True] * time for _ in waiting]
    fresh = fresh if packed else [[False] * time for _ in waiting]
    pieces = cut(waiting, time, length, torch.tensor(keep) if masked else None, torch.tensor(fresh) if packed else None)
    assert pieces == cut_slowly(waiting, time, length, keep, fresh)


@given(calls())
@settings(max_examples=100, deadline=None)
def test_append_rows_packs_to_the_left(case):
    counts, time, length, keep, _ = case
    buffer = torch.arange(len(counts) * length * 2.0).view(len(counts), length, 2)
    piece = -torch.arange(1, len(counts) * time * 2 + 1.0).view(len(counts), time, 2)
    longer, total = append_rows(buffer, list(counts), piece, torch.tensor(keep))
    assert longer.shape[1] == max(total)
    for row, count in enumerate(counts):
        kept = [piece[row, t] for t in range(time) if keep[row][t]]
        assert total[row] == count + len(kept)
        expected = torch.stack([*buffer[row, :count], *kept]) if total[row] else longer[row, :0]
        assert torch.equal(longer[row, : total[row]], expected)


def test_append_rows_without_a_mask_keeps_every_token():
    buffer, piece = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    longer, counts = append_rows(buffer, [2, 2], piece, None)
    assert counts == [7, 7]
    assert torch.equal(longer, torch.cat([buffer[:, :2], piece], 1))
    longer, counts = append_rows(buffer, [1, 3], piece, None)
    assert counts == [6, 8]
    assert torch.equal(longer[0, :6], torch.cat([buffer[0, :1], piece[0]]))
    assert torch.equal(longer[1], torch.cat([buffer[1], piece[1]]))


def test_append_rows_carries_gradients():
    buffer, piece = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True)
    longer, _ = append_rows(buffer, [1, 3], piece, torch.tensor([[True, False], [True, True]]))
    longer.sum().backward()
    assert piece.grad.sum(-1).tolist() == [[4, 0], [4, 4]]


@pytest.fixture
def memory():
    return CONFIGS["emt-0"].build(64, 2)


@pytest.fixture
def ragged(memory):
    """Three rows with 3, 5 and 0 tokens waiting."""
    keep = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [False] * 5])
    return Stream.new(memory, 3, torch.empty(0, 64)).append(torch.randn(3, 5, 64), keep)


def test_stream_counts(ragged):
    assert (ragged.counts, ragged.seen, ragged.written, ragged.batch) == ((3, 5, 0), (3, 5, 0), (0, 0, 0), 3)


def test_commit_writes_some_rows_and_leaves_the_stream_it_came_from(memory, ragged):
    before = {name: tensor.clone() for name, tensor in ragged.tensors().items()}
    after = ragged.commit(memory, [0, 2])
    assert (after.counts, after.written, after.seen) == ((0, 5, 0), (1, 0, 0), (3, 5, 0))
    assert torch.equal(after.state["slots"][1:], ragged.state["slots"][1:])
    assert not torch.equal(after.state["slots"][0], ragged.state["slots"][0])
    assert all(torch.equal(ragged.tensors()[name], tensor) for name, tensor in before.items())
    expected = memory.write(ragged.waiting[:1, :3], {"slots": ragged.state["slots"][:1]})
    torch.testing.assert_close(after.state["slots"][:1], expected["slots"])
    assert ragged.commit(memory, [2]) is ragged


def test_commit_of_ragged_rows_ignores_what_is_beyond_their_count(memory, ragged):
    after = ragged.commit(memory, [0, 1])
    alone = ragged.select([0]).commit(memory, [0])
    torch.testing.assert_close(after.state["slots"][:1], alone.state["slots"], atol=1e-6, rtol=0)
    assert after.waiting.shape == (3, 0, 64)


def test_what_a_row_forgot_stays_nowhere(memory, ragged):
    # written or reset tokens are neither saved with the other rows nor kept alive by a view
    for after in (ragged.commit(memory, [0]), ragged.reset(memory, [0])):
        assert after.waiting.shape == (3, 5, 64)
        assert not after.waiting[0].any()
        assert torch.equal(after.waiting[1], ragged.waiting[1])
    after = ragged.reset(memory, [1])
    assert after.waiting.untyped_storage().nbytes() == 3 * 3 * 64 * 4


def test_reset_begins_again(memory, ragged):
    after = ragged.commit(memory, [0, 1]).reset(memory, [0])
    first = memory.init_state(3)["slots"]
    assert torch.equal(after.state["slots"][0], first[0])
    assert not torch.equal(after.state["slots"][1], first[1])
    assert (after.counts, after.written, after.seen) == ((0, 0, 0), (0, 1, 0), (0, 5, 0))


def test_select_repeat_and_concatenate(ragged):
    chosen = ragged.select([2, 0, 0])
    assert chosen.counts == (0, 3, 3)
    assert chosen.waiting.shape == (3, 3, 64)
    assert torch.equal(chosen.waiting[1], ragged.waiting[0, :3])
    assert ragged.repeat(2).counts == (3, 3, 5, 5, 0, 0)
    assert torch.equal(ragged.repeat(2).waiting[3], ragged.waiting[1])
    joined = Stream.concatenate([chosen, ragged.select([1])])
    assert joined.counts == (0, 3, 3, 5)
    assert torch.equal(joined.waiting[3], ragged.waiting[1])
    assert joined.nbytes == sum(tensor.numel() * 4 for tensor in joined.tensors().values())


def test_detach_cuts_the_gradient(memory, ragged):
    stream = ragged.commit(memory, [0, 1])
    assert stream.state["slots"].requires_grad
    assert not stream.detach().state["slots"].requires_grad


# --- states that grow, and traces ------------------------------------------------------------------------------------


@dataclass
class Diary:
    """A memory in so far as a stream needs it: every write adds one page, the sum of its tokens, and `ink` dries."""

    writes_tokens_behind, writes, takes_ids, known = False, (Site(0),), False, Memory.known
    writes_inside = False

    def init_state(self, batch, device=None):
        return {
            "pages": torch.zeros(batch, 0),
            "count": torch.zeros(batch, dtype=torch.long),
            "ink": torch.zeros(batch, 2),
        }

    def write(self, hidden, state, keep=None):
        keep = torch.ones(hidden.shape[:2]) if keep is None else keep.float()
        count = state["count"] + 1
        pages = grow(state["pages"], (max(state["pages"].shape[1], int(count.max())),))
        page = (hidden.sum(-1) * keep).sum(1, keepdim=True)
        pages = pages.scatter(1, count[:, None] - 1, page)
        return {"pages": pages, "count": count, "ink": torch.zeros_like(state["ink"])}


@pytest.fixture
def diary():
    """Three rows whose segments hold 2, 1 and no tokens."""
    keep = torch.tensor([[True, True], [False, True], [False, False]])
    hidden = torch.tensor([[1.0, 2.0], [9.0, 4.0], [9.0, 9.0]])[..., None]
    return Stream.new(Diary(), 3, torch.empty(0, 1)).append(hidden, keep)


def test_rows_grow_apart(diary):
    memory, one = Diary(), torch.ones(3, 1, 1)
    after = diary.commit(memory, [0])
    assert after.state["pages"].tolist() == [[3], [0], [0]]
    for _ in range(2):
        after = after.append(one, torch.tensor([[True], [False], [False]])).commit(memory, [0])
    after = after.append(5 * one, None).commit(memory, [0, 1, 2])
    assert after.state["pages"].tolist() == [[3, 1, 1, 5], [9, 0, 0, 0], [5, 0, 0, 0]]
    assert (after.written, after.state["count"].tolist()) == ((4, 1, 1), [4, 1, 1])
    begun = after.reset(memory, [0])
    assert begun.state["pages"].tolist() == [[0, 0, 0, 0], [9, 0, 0, 0], [5, 0, 0, 0]]
    again = begun.append(one, None).commit(memory, [0, 1, 2])
    assert again.state["pages"].tolist() == [[1, 0, 0, 0], [9, 1, 0, 0], [5, 1, 0, 0]]
    assert diary.state["pages"].shape == (3, 0)
    short = Stream.concatenate([diary.select([1]), after.select([0, 2])])
    assert short.state["pages"].tolist() == [[0, 0, 0, 0], [3, 1, 1, 5], [5, 0, 0, 0]]
    assert (short.counts, short.written) == ((1, 0, 0), (0, 4, 1))


def test_what_reading_leaves_is_summed_over_real_tokens(diary):
    trace = torch.tensor([[[1.0, 10.0], [2.0, 20.0]], [[3.0, 30.0], [4.0, 40.0]], [[5.0, 50.0], [6.0, 60.0]]])
    assert diary.leave({"ink": trace}, None).state["ink"].tolist() == [[3, 30], [7, 70], [11, 110]]
    keep = torch.tensor([[True, True], [False, True], [False, False]])
    left = diary.leave({"ink": trace}, keep)
    assert left.state["ink"].tolist() == [[3, 30], [4, 40], [0, 0]]
    twice = left.leave({"ink": trace[:, :1]}, None)
    assert twice.state["ink"].tolist() == [[4, 40], [7, 70], [5, 50]]
    # the stream it came from, its ledgers and all other tensors stay
    assert not diary.state["ink"].any()
    assert (left.counts, left.seen, left.written) == (diary.counts, diary.seen, diary.written)
    assert left.state["pages"] is diary.state["pages"]
    assert diary.leave({}, keep).state.keys() == diary.state.keys()
    assert not twice.commit(Diary(), [0, 1]).state["ink"][:2].any()
    assert twice.commit(Diary(), [0, 1]).state["ink"][2].tolist() == [5, 50]


def test_padding_may_leave_anything(diary):
    trace = torch.full((3, 2, 2), torch.nan)
    trace[:, 0] = 1
    left = diary.leave({"ink": trace}, torch.tensor([[True, False]] * 3))
    assert left.state["ink"].tolist() == [[1, 1]] * 3


def test_scalar_traces_join_too(diary):
    state = {**diary.state, "steps": torch.zeros(3)}
    left = replace(diary, state=state).leave({"steps": torch.ones(3, 2)}, torch.tensor([[True, False]] * 3))
    assert left.state["steps"].tolist() == [1, 1, 1]


def test_check_finite_names_the_place():
    hidden = torch.zeros(2, SEGMENT, 4)
    check_finite(hidden, None, Site(1))
    hidden[1, 3] = torch.nan
    with pytest.raises(StateError, match=r"block 1 are NaN or infinite.*row 1, token 3.*nothing was written"):
        check_finite(hidden, None, Site(1))
    keep = torch.ones(2, SEGMENT, dtype=torch.bool)
    keep[1, 3] = False
    check_finite(hidden, keep, Site(1))
