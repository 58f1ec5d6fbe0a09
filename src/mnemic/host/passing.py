"""Hidden states pass a site: they are written, and the memory reads. And the stream that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnemic.host.cache import MemoryCache
from mnemic.host.call import Call, eager, thread
from mnemic.memory import Site
from mnemic.state import State
from mnemic.stream import Piece, Stream, check_finite, cut

if TYPE_CHECKING:
    from mnemic.host.router import Router


@eager
def passed(router: Router, site: Site, hidden_btd: Tensor) -> Tensor:
    """The hidden states at `site`, after the memory wrote and read there."""
    memory = router.memory
    if (watch := thread.watch) is not None and watch.router is router:
        watch.at(site, hidden_btd)
        return hidden_btd
    call = router.running
    if call is None or (isinstance(call.cache, MemoryCache) and call.cache.taking):
        return hidden_btd
    if site in memory.writes:
        call.written[site] = _to_write(router, call, hidden_btd)
    writes = site in memory.writes[-1:]
    if writes and not memory.writes_see_reads:
        _write(router, call)
    read_btd = _read(router, call, site, hidden_btd) if site in memory.hidden_reads else hidden_btd
    if writes and memory.writes_see_reads:
        # after the read, for its traces; what is written is the hidden state from before it all the same
        _write(router, call)
    if call.beside is not None and call.beside.apart and site == Site(router.depth - 1):
        # the trunk expects as many columns as it was given
        read_btd = torch.nn.functional.pad(read_btd, (0, 0, call.beside.first, 0))
    return read_btd


def _to_write(router: Router, call: Call, hidden_btd: Tensor) -> Tensor:
    """The columns that are written: the words', or those of the memory tokens behind them."""
    if call.beside is None:
        return hidden_btd[:, :0] if router.memory.writes_tokens_behind else hidden_btd
    words = call.beside.words_in(hidden_btd)
    return hidden_btd[:, words.stop :] if router.memory.writes_tokens_behind else hidden_btd[:, words]


def _read(router: Router, call: Call, site: Site, hidden_btd: Tensor) -> Tensor:
    local_btd = hidden_btd.to(router.device)  # a model spread over devices keeps its memory on one
    parts = []
    for piece, state in zip(call.pieces, call.states, strict=True):
        part = slice(piece.start, piece.stop) if call.beside is None else slice(None)
        read, traces = router.memory.read_and_trace(site, local_btd[:, part], state)
        if call.beside is not None:
            words = call.beside.words_in(local_btd)
            traces = {name: trace[:, words] for name, trace in traces.items()}
        parts.append(read)
        call.traces = {
            **call.traces,
            **{name: call.traces[name] + trace if name in call.traces else trace for name, trace in traces.items()},
        }
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(hidden_btd.device)


def _write(router: Router, call: Call) -> None:
    keep, stream = call.keep, call.stream
    assert stream is not None
    parts = [call.written[site].to(router.device) for site in router.memory.writes]
    hidden_btd = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if router.memory.writes_tokens_behind:
        _write_behind(router, call, hidden_btd)
        return
    check_finite(hidden_btd, keep, router.memory.writes[-1])
    keep = None if keep is None else keep.to(router.device)
    if keep is not None:
        hidden_btd = hidden_btd.masked_fill(~keep[..., None], 0)
    traces, call.traces = call.traces, {}
    # a call of memory tokens alone has no words
    ids = call.ids if call.ids is not None else hidden_btd.new_zeros(hidden_btd.shape[:2], dtype=torch.long)
    call.stream, call.states = _advance(router, stream, hidden_btd, ids, keep, call.pieces, traces)
    if router.memory.reads_own_segment:
        call.states = [call.stream.state]
    if call.plan.layer is not None and not torch.is_grad_enabled() and not router.memory.beside:
        before, hidden = call.before, hidden_btd
        assert before is not None

        def first(time: int) -> Stream:
            kept = None if keep is None else keep[:, :time]
            pieces = cut(before.counts, time, router.segment_length, kept) if time else []
            left = {name: trace[:, :time] for name, trace in traces.items()}
            return _advance(router, before, hidden[:, :time], ids[:, :time], kept, pieces, left)[0]

        _replay(call, first)


def _replay(call: Call, first: Callable[[int], Stream]) -> None:
    """Leaves how to take back tokens of the last call: `first(time)` is the stream after so many of this pass."""
    layer, length = call.plan.layer, call.time
    assert layer is not None
    # a pass of a call that runs segment by segment goes back into the one before it
    previous = layer.replay if call.number else None

    def replay(count: int) -> Stream:
        if count > length and previous is not None:
            return previous(count - length)
        if count > length:
            raise ValueError(f"cannot take back {count - length} tokens more than the last call had")
        return first(length - count)

    layer.replay = replay


def _write_behind(router: Router, call: Call, behind_bmd: Tensor) -> None:
    """Counts the words, and writes the hidden states of the tokens behind them to the rows whose segment ends."""
    (piece,), stream, traces = call.pieces, call.stream, call.traces
    assert stream is not None
    rows = torch.zeros(stream.batch, behind_bmd.shape[1], dtype=torch.bool, device=behind_bmd.device)
    rows[list(piece.ended)] = True
    check_finite(behind_bmd, rows, router.memory.writes[-1])
    uncounted = behind_bmd.new_zeros(stream.batch, call.time, 0)
    stream = stream.leave(traces, call.keep).append(uncounted, call.keep)
    call.traces, call.stream = {}, stream.commit(router.memory, piece.ended, behind_bmd)


def _advance(
    router: Router,
    stream: Stream,
    hidden_btd: Tensor,
    ids_bt: Tensor,
    keep: Tensor | None,
    pieces: Sequence[Piece],
    traces: State,
) -> tuple[Stream, list[State]]:
    """The stream after these tokens, and the state each piece reads; `traces` are those of a single piece."""
    states = []
    stream = stream.leave(traces, keep)
    for piece in pieces:
        if piece.fresh:
            stream = stream.reset(router.memory, piece.fresh)
        states.append(stream.state)
        part = slice(piece.start, piece.stop)
        stream = stream.append(hidden_btd[:, part], None if keep is None else keep[:, part], ids_bt[:, part])
        stream = stream.commit(router.memory, piece.ended)
    return stream, states


def counted(router: Router, call: Call) -> Stream:
    """The stream after a pass of which no hidden states are written. Queries wait until keys leave the window."""
    before, keep = call.stream, call.keep
    assert before is not None
    if call.written:
        query_btd = torch.cat([call.written[site].to(router.device) for site in sorted(call.written)], -1)
        check_finite(query_btd, keep, max(call.written))
        return before.append(query_btd if keep is None else query_btd.masked_fill(~keep[..., None], 0), keep)

    def first(time: int) -> Stream:
        kept = None if keep is None else keep[:, :time]
        pieces = cut(before.counts, time, router.segment_length, kept) if time else []
        return before.passed(router.memory, pieces, time, kept)

    _replay(call, first)
    return before.passed(router.memory, call.pieces, call.time, keep)
