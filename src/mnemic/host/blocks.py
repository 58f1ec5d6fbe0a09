"""At a block: memory tokens enter it, what it puts out is written, and the memory reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnemic.host.arguments import bound
from mnemic.host.beside import Beside, for_queries
from mnemic.host.cache import KeysTakenError, MemoryCache
from mnemic.host.call import Call, eager, thread
from mnemic.state import State
from mnemic.stream import Piece, Stream, check_finite, cut

if TYPE_CHECKING:
    from mnemic.host.router import Router


@eager
def before_block(
    router: Router, block: nn.Module, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of block `layer`, with what the memory puts there."""
    call = router.calls[-1] if router.enabled and router.calls else None
    cache = call.cache if call is not None else None
    if isinstance(cache, MemoryCache) and cache.taking:  # a block that makes keys for `_keys_apart`
        return args, kwargs
    hidden_btd = args[0] if args else kwargs.pop("hidden_states")
    rest = args[1:]
    if layer == 0:
        hidden_btd = at_block(router, -1, hidden_btd)
    beside = call.beside if call is not None else None
    if beside is not None and beside.apart:
        assert isinstance(cache, MemoryCache)
        hidden_btd, rest, kwargs = _keys_apart(router, block, layer, beside, cache, hidden_btd, rest, kwargs)
    elif beside is not None:
        hidden_btd = beside.enter(layer, hidden_btd)
    return (hidden_btd, *rest), kwargs


def _keys_apart(
    router: Router,
    block: nn.Module,
    layer: int,
    beside: Beside,
    cache: MemoryCache,
    hidden_btd: Tensor,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Lets a block make keys of the tokens before, which it leaves as soon as they are in the cache, where it can be
    left: what it makes of their queries is not wanted. Returns its arguments for the words.
    """
    assert beside.before is not None
    assert cache.window is not None
    arguments = bound(block, (hidden_btd, *rest), kwargs)
    name = next(iter(arguments))
    del arguments[name]
    cache.taking = True
    try:
        # compiled code cannot be left on the way: a block whose forward is compiled runs to its end
        block._call_impl(
            beside.before.inputs[layer].to(hidden_btd),
            **for_queries(arguments, slice(0, beside.first), cache.window.kept, hidden_btd),
        )
    except KeysTakenError:
        pass
    finally:
        cache.taking = False
    words = for_queries(arguments, beside.words, cache.window.kept, hidden_btd)
    return hidden_btd[:, beside.words_in(hidden_btd)], (), words


@eager
def at_block(router: Router, layer: int, hidden_btd: Tensor) -> Tensor:
    """What block `layer` puts out, after the memory wrote and read there; -1 is what enters the first."""
    memory = router.memory
    if (watch := thread.watch) is not None and watch.router is router:
        watch.at(layer, hidden_btd)
        return hidden_btd
    if not router.enabled or not router.calls:
        return hidden_btd
    call = router.calls[-1]
    if isinstance(call.cache, MemoryCache) and call.cache.taking:
        return hidden_btd
    if layer in memory.written_layers:
        call.written[layer] = _to_write(router, call, hidden_btd)
    writes = layer == memory.write_layer
    if writes and not memory.writes_see_reads:
        _write(router, call, layer)
    read_btd = _read(router, call, layer, hidden_btd) if layer in memory.read_layers else hidden_btd
    if writes and memory.writes_see_reads:
        # after the read, for its traces; what is written is the hidden state from before it all the same
        _write(router, call, layer)
    if call.beside is not None and call.beside.apart and layer == router.depth - 1:
        # the trunk expects as many columns as it was given
        read_btd = torch.nn.functional.pad(read_btd, (0, 0, call.beside.first, 0))
    return read_btd


def _to_write(router: Router, call: Call, hidden_btd: Tensor) -> Tensor:
    """The columns that are written: the words', or those of the memory tokens behind them."""
    if call.beside is None:
        return hidden_btd[:, :0] if router.memory.writes_tokens_behind else hidden_btd
    words = call.beside.words_in(hidden_btd)
    return hidden_btd[:, words.stop :] if router.memory.writes_tokens_behind else hidden_btd[:, words]


def _read(router: Router, call: Call, layer: int, hidden_btd: Tensor) -> Tensor:
    local_btd = hidden_btd.to(router.device)  # a model spread over devices keeps its memory on one
    parts = []
    for piece, state in zip(call.pieces, call.states, strict=True):
        part = slice(piece.start, piece.stop) if call.beside is None else slice(None)
        read, traces = router.memory.read_and_trace(layer, local_btd[:, part], state)
        if call.beside is not None:
            words = call.beside.words_in(local_btd)
            traces = {name: trace[:, words] for name, trace in traces.items()}
        parts.append(read)
        call.traces = {
            **call.traces,
            **{name: call.traces[name] + trace if name in call.traces else trace for name, trace in traces.items()},
        }
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(hidden_btd.device)


def _write(router: Router, call: Call, layer: int) -> None:
    keep, stream = call.keep, call.stream
    assert stream is not None
    parts = [call.written[each].to(router.device) for each in router.memory.written_layers]
    hidden_btd = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if router.memory.writes_tokens_behind:
        _write_behind(router, call, layer, hidden_btd)
        return
    check_finite(hidden_btd, keep, layer)
    keep = None if keep is None else keep.to(router.device)
    if keep is not None:
        hidden_btd = hidden_btd.masked_fill(~keep[..., None], 0)
    traces, call.traces = call.traces, {}
    call.stream, call.states = _advance(router, stream, hidden_btd, keep, call.pieces, traces)
    if router.memory.reads_own_segment:
        call.states = [call.stream.state]
    if call.layer is not None and not torch.is_grad_enabled() and not router.memory.beside:
        before, hidden = call.before, hidden_btd
        assert before is not None
        # a part of a call that runs segment by segment goes back into the part before it
        whole = router.calls[-2] if len(router.calls) > 1 else call
        previous = call.layer.replay if whole.earlier else None

        def replay(count: int) -> Stream:
            time = hidden.shape[1] - count
            if time < 0 and previous is not None:
                return previous(-time)
            if time < 0:
                raise ValueError(f"cannot take back {-time} tokens more than the last call had")
            kept = None if keep is None else keep[:, :time]
            pieces = cut(before.counts, time, router.segment_length, kept) if time else []
            left = {name: trace[:, :time] for name, trace in traces.items()}
            return _advance(router, before, hidden[:, :time], kept, pieces, left)[0]

        call.layer.replay = replay


def _write_behind(router: Router, call: Call, layer: int, behind_bmd: Tensor) -> None:
    """Counts the words, and writes the hidden states of the tokens behind them to the rows whose segment ends."""
    (piece,), stream, traces = call.pieces, call.stream, call.traces
    assert stream is not None
    rows = torch.zeros(stream.batch, behind_bmd.shape[1], dtype=torch.bool, device=behind_bmd.device)
    rows[list(piece.ended)] = True
    check_finite(behind_bmd, rows, layer)
    uncounted = behind_bmd.new_zeros(stream.batch, call.time, 0)
    stream = stream.leave(traces, call.keep).append(uncounted, call.keep)
    call.traces, call.stream = {}, stream.commit(router.memory, piece.ended, behind_bmd)


def _advance(
    router: Router, stream: Stream, hidden_btd: Tensor, keep: Tensor | None, pieces: list[Piece], traces: State
) -> tuple[Stream, list[State]]:
    """The stream after these tokens, and the state each piece reads; `traces` are those of a single piece."""
    states = []
    stream = stream.leave(traces, keep)
    for piece in pieces:
        if piece.fresh:
            stream = stream.reset(router.memory, piece.fresh)
        states.append(stream.state)
        part = slice(piece.start, piece.stop)
        stream = stream.append(hidden_btd[:, part], None if keep is None else keep[:, part])
        stream = stream.commit(router.memory, piece.ended)
    return stream, states
