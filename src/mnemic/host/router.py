"""The hooks: what happens to one call of the trunk on its way through a model with a memory.

Before the trunk runs, the call is bound to its cache and cut at segment ends. At the write layer the new tokens join
the running segment and full segments are written; at each read layer tokens read the slots of their segment's start.
After the trunk, and only if nothing failed, the new stream is stored in the cache.

Where some layer reads below the write layer, or the cache has a window, a segment can only run once the one before it
is written: the trunk is then called once a segment, and its outputs are joined, so the caller sees one call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from mnemic.host.anatomy import MEMORY_NAME, Anatomy
from mnemic.host.arguments import bound, check_batch, document_starts, flat_mask, joined, kept_tokens, part_of, refined
from mnemic.host.cache import MemoryCache, MemoryLayer, memory_layer, snapshot
from mnemic.memories.base import Memory, MemoryConfig
from mnemic.state import State
from mnemic.stream import Piece, Stream, check_finite, cut


@dataclass
class Call:
    """One pass of the trunk. `states[i]` is the memory as it stands for the tokens of `pieces[i]`."""

    restore: Callable[[], None] = lambda: None
    cache: Cache | None = None
    layer: MemoryLayer | None = None
    before: Stream | None = None
    stream: Stream | None = None
    pieces: list[Piece] = field(default_factory=list)
    keep: Tensor | None = None
    states: list[State] = field(default_factory=list)
    traces: State = field(default_factory=dict)
    earlier: list[Any] = field(default_factory=list)
    private_cache: bool = False
    checkpointing: bool = False
    time: int = 0


_threads = threading.local()
Function = TypeVar("Function", bound=Callable[..., Any])


def _eager(function: Function) -> Function:
    """Keeps `torch.compile` out: what a call needs depends on its numbers. The base is compiled on both sides."""
    return cast(Function, torch.compiler.disable(function))


class _RecordedError(Exception):
    """Leaves the trunk at the write layer with what was wanted there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Router(nn.Module):
    """Lives on the trunk as `mnemic`; owns the memory's parameters. Hooks are bound methods of submodules, so copying
    or pickling a model keeps each copy's hooks with its own memory.
    """

    def __init__(self, memory: Memory, config: MemoryConfig, anatomy: Anatomy) -> None:
        super().__init__()
        self.memory = memory
        self.config, self.segment_length = config, config.segment_length
        self.depth, self.width, self.causal = len(anatomy.blocks), anatomy.width, anatomy.causal
        self.positions, self.takes_positions, self.slides = anatomy.positions, anatomy.takes_positions, anatomy.slides
        self.dtype = anatomy.dtype
        self.enabled = True
        layers = sorted({*memory.read_layers, memory.write_layer})
        self.taps = nn.ModuleDict({str(layer): Tap(layer, self) for layer in layers})

    def install(self, anatomy: Anatomy) -> None:
        """Registers the hooks."""
        handles = [
            anatomy.trunk.register_forward_pre_hook(self.before, with_kwargs=True),
            anatomy.trunk.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        for layer, tap in self.taps.items():
            assert isinstance(tap, Tap)
            handles.append(anatomy.blocks[int(layer)].register_forward_hook(tap.after, with_kwargs=True, prepend=True))
        object.__setattr__(self, "handles", handles)
        setattr(anatomy.trunk, MEMORY_NAME, self)

    def remove(self, anatomy: Anatomy) -> None:
        """Takes the hooks away again. They are found by their owner, so this works on copies of a model too."""
        for module in (anatomy.trunk, *anatomy.blocks):
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) in (self, *self.taps.values()):
                        del hooks[key]
                        for marks in (
                            module._forward_hooks_with_kwargs,
                            module._forward_hooks_always_called,
                            module._forward_pre_hooks_with_kwargs,
                        ):
                            marks.pop(key, None)
        delattr(anatomy.trunk, MEMORY_NAME)

    # --- one call ----------------------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """This thread's running calls, innermost last."""
        table: dict[int, list[Call]] = _threads.__dict__.setdefault("calls", {})
        return table.setdefault(id(self), [])

    @_eager
    def before(
        self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """The trunk's pre-hook: binds the call, runs all segments but the last, prepares the last."""
        call = Call()
        self.calls.append(call)
        arguments = bound(trunk, args, kwargs)
        if getattr(_threads, "recording", None) is self:
            return (), arguments
        self._open(call, trunk, arguments)
        if len(call.pieces) > 1 and self._segment_by_segment(call):
            if call.cache is None:
                call.cache = arguments["past_key_values"] = DynamicCache(config=trunk.config)  # pyright: ignore
                arguments["use_cache"] = call.private_cache = True
            if arguments.get("output_attentions", trunk.config.output_attentions):  # pyright: ignore
                raise ValueError(
                    "attention weights cannot be joined across segments; "
                    "call without output_attentions, or a segment a call"
                )
            seen = int(call.cache.get_seq_length())  # a static cache counts in place
            mask = arguments.get("attention_mask")
            if isinstance(mask, dict) or call.cache.is_compileable:
                # masks made for the whole call do not fit its parts; from a flat one the trunk makes its own
                arguments["attention_mask"] = flat_mask(mask, call.time, call.cache)
            for piece in call.pieces[:-1]:
                call.earlier.append(trunk(**part_of(arguments, piece, seen, call.time)))
            arguments = part_of(arguments, call.pieces[-1], seen, call.time)
            self._open(call, trunk, arguments)
        if isinstance(call.cache, MemoryCache):
            self._arrange(call, trunk, arguments)
        return (), arguments

    @_eager
    def after(self, trunk: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The trunk's hook: stores the new stream, moves the window, joins outputs. Undoes everything on an error."""
        call = self.calls.pop()
        if output is None:
            call.restore()
            return None
        if call.layer is not None and call.stream is not None:
            call.layer.stream = call.stream.leave(call.traces, call.keep)
        if isinstance(call.cache, MemoryCache):
            call.cache.inside = False
            window = call.cache.window
            assert window is not None
            ended = cut(window.running, call.time, self.segment_length, call.keep)[-1].ended
            call.cache.window = window.advance(call.keep, call.time)
            call.cache.close_segment(ended)
        if call.earlier:
            output = joined([*call.earlier, output])
        if call.private_cache:
            output["past_key_values"] = None
        return output

    def _open(self, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
        """Fills in what one pass needs to know: cache, padding, packing, stream, pieces."""
        inputs = (
            arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
        )
        if inputs is None or inputs.shape[0] == 0 or inputs.shape[1] == 0:
            shape = None if inputs is None else list(inputs.shape[:2])
            raise ValueError(f"the input is empty (shape {shape}); pass at least one row and one token")
        batch, call.time = inputs.shape[:2]
        call.keep = call.stream = call.before = None
        call.pieces, call.states, call.traces = [], [], {}
        cache = arguments.get("past_key_values")
        if not self.causal:
            self._open_encoder(call, arguments, inputs)
            return
        call.checkpointing = trunk.training and any(
            getattr(m, "gradient_checkpointing", False) for m in trunk.modules()
        )
        wanted = arguments.get("use_cache")
        wanted = getattr(trunk.config, "use_cache", False) if wanted is None else wanted  # pyright: ignore
        packed = document_starts(arguments, call.time) if cache is None else None
        if cache is None and wanted and not call.checkpointing and packed is None and self.enabled:
            cache = arguments["past_key_values"] = DynamicCache(config=trunk.config)  # pyright: ignore
        call.cache = cache if isinstance(cache, Cache) else None
        if call.cache is not None and not call.earlier:
            call.restore = cache.snapshot() if isinstance(cache, MemoryCache) else snapshot(call.cache)
        if isinstance(cache, MemoryCache):
            window = cache.open(batch, inputs.device)
            check_batch(len(window.context), batch)
            if call.checkpointing and window.kept:
                raise ValueError(
                    "gradient checkpointing drops the base's keys between calls; feed whole segments with "
                    f"window=segment_length ({self.segment_length}), or turn checkpointing off"
                )
        elif not self.enabled:
            return
        call.keep = kept_tokens(arguments.get("attention_mask"), call.time, call.cache)
        if call.keep is not None and bool(call.keep.all()):
            call.keep = None
        cuts: set[int] = set()
        if isinstance(cache, MemoryCache) and cache.window is not None:
            cuts = {piece.stop for piece in cut(cache.window.running, call.time, self.segment_length, call.keep)}
            if self.slides and call.keep is not None:
                # padding may end a part but not lie between a row's tokens: the next part is packed against its keys
                cuts |= {t + 1 for t in (call.keep[:, 1:] & ~call.keep[:, :-1]).any(0).nonzero().flatten().tolist()}
        if not self.enabled:
            call.pieces = refined([Piece(0, call.time)], cuts)
            return
        call.layer = memory_layer(call.cache, self.depth) if call.cache is not None else None
        self._bring_stream(call, batch)
        assert call.stream is not None
        call.pieces = refined(cut(call.stream.counts, call.time, self.segment_length, call.keep, packed), cuts)
        call.states = [call.stream.state]

    def _open_encoder(self, call: Call, arguments: dict[str, Any], inputs: Tensor) -> None:
        """An encoder sees both ways, so one call is one segment; its stream is carried by `carrying`."""
        if not self.enabled:
            return
        batch, time = inputs.shape[:2]
        call.layer = getattr(_threads, "carried", None)
        if call.layer is not None and time > self.segment_length:
            raise ValueError(
                f"a call of {time} tokens is longer than the segment of {self.segment_length}; an encoder reads one "
                "segment a call: use Session.read, which cuts the text"
            )
        mask = arguments.get("attention_mask")
        call.keep = mask.bool() if mask is not None and mask.ndim == 2 else None
        self._bring_stream(call, batch)
        assert call.stream is not None
        call.pieces = [Piece(0, time, (), tuple(range(batch)))]
        call.states = [call.stream.state]

    def _bring_stream(self, call: Call, batch: int) -> None:
        """The stream that the cache carries, checked, or a new one."""
        stream = call.layer.stream if call.layer is not None else None
        if stream is None:
            stream = self.new_stream(batch)
        check_batch(stream.batch, batch)
        if stream.waiting.device != self.device:
            raise ValueError(
                f"the cache's stream is on {stream.waiting.device}, the memory on {self.device}; move the model first, "
                "then make or load the session"
            )
        if stream.waiting.shape[-1] != self.width:
            raise ValueError(f"the cache's stream is of width {stream.waiting.shape[-1]}, this model's is {self.width}")
        call.before = call.stream = stream

    def _segment_by_segment(self, call: Call) -> bool:
        if not self.enabled or isinstance(call.cache, MemoryCache):
            return True
        if not self.memory.writes_see_reads:
            return False
        if any(piece.fresh for piece in call.pieces):
            raise ValueError(
                "packed documents need every read at or above the write layer (here reads "
                f"{list(self.memory.read_layers)}, write {self.memory.write_layer}); pass one document a row"
            )
        if call.checkpointing:
            raise ValueError(
                "gradient checkpointing drops the base's keys, which reads below the write layer need from segment to "
                "segment; feed whole segments through a MemoryCache with window=segment_length, or turn it off"
            )
        return True

    def _arrange(self, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
        """Gives the base its window: mask and positions of what is physically there."""
        cache = call.cache
        assert isinstance(cache, MemoryCache)
        assert cache.window is not None
        if self.slides and not bool(cache.window.valid[:, -1:].all()):
            cache.pack()
        mask, positions = cache.window.arrange(call.keep, call.time)
        arguments["attention_mask"] = mask
        arguments["use_cache"] = True
        if self.takes_positions:
            arguments["position_ids"] = positions
        cache.inside = True

    def new_stream(self, batch: int, state: State | None = None) -> Stream:
        """`batch` streams at their beginning, or at a segment's end with `state`."""
        like = torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        stream = Stream.new(self.memory, batch, like)
        return stream if state is None else replace(stream, state=state)

    def watch(self, anatomy: Anatomy, input_ids: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """What the base alone puts out at some blocks `[b, t, d]`, for rows that it sees on their own."""
        seen: dict[int, Tensor] = {}

        def hook(layer: int) -> Callable[..., None]:
            def keep(block: nn.Module, args: Any, output: Any) -> None:
                seen[layer] = (output[0] if isinstance(output, tuple) else output).detach()

            return keep

        handles = [anatomy.blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
        enabled, self.enabled = self.enabled, False
        try:
            anatomy.trunk(input_ids=input_ids, use_cache=False)
        finally:
            self.enabled = enabled
            for handle in handles:
                handle.remove()
        return seen

    def record(self, trunk: nn.Module, input_ids: Tensor) -> Tensor:
        """What the write layer puts out `[b, t, d]` for rows the base sees on their own; later blocks do not run."""
        _threads.recording = self
        try:
            trunk(input_ids=input_ids, use_cache=False)
        except _RecordedError as recorded:
            return recorded.hidden
        finally:
            _threads.recording = None
        raise RuntimeError(f"block {self.memory.write_layer} did not run")

    # --- at a block --------------------------------------------------------------------------------------------------

    @_eager
    def at_block(self, layer: int, hidden_btd: Tensor) -> Tensor:
        """What block `layer` puts out, after the memory wrote and read there."""
        if getattr(_threads, "recording", None) is self and layer == self.memory.write_layer:
            raise _RecordedError(hidden_btd)
        if not self.enabled or not self.calls or getattr(_threads, "recording", None) is self:
            return hidden_btd
        call, memory = self.calls[-1], self.memory
        writes = layer == memory.write_layer
        if writes and not memory.writes_see_reads:
            self._write(call, layer, hidden_btd)
        read_btd = self._read(call, layer, hidden_btd) if layer in memory.read_layers else hidden_btd
        if writes and memory.writes_see_reads:
            # after the read, for its traces; what is written is the hidden state from before it all the same
            self._write(call, layer, hidden_btd)
        return read_btd

    def _read(self, call: Call, layer: int, hidden_btd: Tensor) -> Tensor:
        local_btd = hidden_btd.to(self.device)  # a model spread over devices keeps its memory on one
        parts = []
        for piece, state in zip(call.pieces, call.states, strict=True):
            read, traces = self.memory.read_and_trace(layer, local_btd[:, piece.start : piece.stop], state)
            parts.append(read)
            call.traces = {
                **call.traces,
                **{name: call.traces[name] + trace if name in call.traces else trace for name, trace in traces.items()},
            }
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(hidden_btd.device)

    @property
    def device(self) -> torch.device:
        """Where the memory lives."""
        return next(self.memory.parameters()).device

    def _write(self, call: Call, layer: int, hidden_btd: Tensor) -> None:
        keep, stream = call.keep, call.stream
        assert stream is not None
        check_finite(hidden_btd, keep, layer)
        hidden_btd = hidden_btd.to(self.device)
        keep = None if keep is None else keep.to(self.device)
        if keep is not None:
            hidden_btd = hidden_btd.masked_fill(~keep[..., None], 0)
        traces, call.traces = call.traces, {}
        call.stream, call.states = self._advance(stream, hidden_btd, keep, call.pieces, traces)
        if self.memory.reads_own_segment:
            call.states = [call.stream.state]
        if call.layer is not None and not torch.is_grad_enabled():
            before, hidden = call.before, hidden_btd
            assert before is not None
            # a part of a call that runs segment by segment goes back into the part before it
            whole = self.calls[-2] if len(self.calls) > 1 else call
            previous = call.layer.replay if whole.earlier else None

            def replay(count: int) -> Stream:
                time = hidden.shape[1] - count
                if time < 0 and previous is not None:
                    return previous(-time)
                if time < 0:
                    raise ValueError(f"cannot take back {-time} tokens more than the last call had")
                kept = None if keep is None else keep[:, :time]
                pieces = cut(before.counts, time, self.segment_length, kept) if time else []
                left = {name: trace[:, :time] for name, trace in traces.items()}
                return self._advance(before, hidden[:, :time], kept, pieces, left)[0]

            call.layer.replay = replay

    def _advance(
        self, stream: Stream, hidden_btd: Tensor, keep: Tensor | None, pieces: list[Piece], traces: State
    ) -> tuple[Stream, list[State]]:
        """The stream after these tokens, and the state each piece reads; `traces` are those of a single piece."""
        states = []
        stream = stream.leave(traces, keep)
        for piece in pieces:
            if piece.fresh:
                stream = stream.reset(self.memory, piece.fresh)
            states.append(stream.state)
            part = slice(piece.start, piece.stop)
            stream = stream.append(hidden_btd[:, part], None if keep is None else keep[:, part])
            stream = stream.commit(self.memory, piece.ended)
        return stream, states


class Tap(nn.Module):
    """The hook of one block."""

    def __init__(self, layer: int, router: Router) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "router", router)  # not a submodule: the router owns the tap

    router: Router

    def after(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The block's hook; blocks return a tensor or a tuple that begins with one."""
        if isinstance(output, tuple):
            return (self.router.at_block(self.layer, output[0]), *output[1:])
        return self.router.at_block(self.layer, output)


@contextlib.contextmanager
def carrying(layer: MemoryLayer) -> Iterator[None]:
    """Within it, calls of encoders in this thread read and write the stream of `layer` (they have no cache to ride)."""
    outer = getattr(_threads, "carried", None)
    _threads.carried = layer
    try:
        yield
    finally:
        _threads.carried = outer
