"""The hooks: what happens to one call of the trunk on its way through a model with a memory.

Before the trunk runs, the call is bound to its cache and cut at segment ends. At the write layer the new tokens join
the running segment and full segments are written; at each read layer tokens read the slots of their segment's start.
After the trunk, and only if nothing failed, the new stream is stored in the cache.

Where some layer reads below the write layer, or the cache has a window, a segment can only run once the one before it
is written: the trunk is then called once a segment, and its outputs are joined, so the caller sees one call.

Memory tokens join the words of such a call as embeddings, before and behind them, and are cut out of its output.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from mnemic.host.anatomy import MEMORY_NAME, Anatomy
from mnemic.host.arguments import (
    bound,
    check_batch,
    document_starts,
    flat_mask,
    joined,
    kept_tokens,
    part_of,
    refined,
)
from mnemic.host.beside import Beside, Wordless, encoder_positions, for_queries, words_of
from mnemic.host.cache import KeysTakenError, MemoryCache, MemoryLayer, memory_layer, snapshot
from mnemic.memories.base import Memory, MemoryConfig
from mnemic.state import State
from mnemic.stream import Piece, Stream, check_finite, cut, waiting_width


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
    written: dict[int, Tensor] = field(default_factory=dict)
    beside: Beside | None = None
    wordless: Wordless | None = None
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
        if memory.span is not None and (self.slides or self.positions is None):
            raise ValueError(
                f"a span of {memory.span} keys cannot join a model that has its own (sliding layers, ALiBi); "
                "leave it out"
            )
        self.enabled = True
        layers = range(self.depth) if memory.beside else {*memory.read_layers, *memory.written_layers}
        self.taps = nn.ModuleDict({str(layer): Tap(layer, self) for layer in sorted({max(0, each) for each in layers})})

    def install(self, anatomy: Anatomy) -> None:
        """Registers the hooks."""
        handles = [
            anatomy.trunk.register_forward_pre_hook(self.before, with_kwargs=True),
            anatomy.trunk.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        touched = {*self.memory.read_layers, *self.memory.written_layers}
        for layer, tap in self.taps.items():
            assert isinstance(tap, Tap)
            if self.memory.beside or (layer == "0" and -1 in touched):
                block = anatomy.blocks[int(layer)]
                handles.append(block.register_forward_pre_hook(tap.before, with_kwargs=True))
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
        call.wordless, _threads.wordless = getattr(_threads, "wordless", None), None
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
            pieces = cut(window.running, call.time, self.segment_length, call.keep)
            beside = call.beside
            if beside is None:
                call.cache.window = window.advance(call.keep, call.time)
            else:
                call.cache.window = window.advance(beside.keep, beside.width, beside.words)
            call.cache.close_segment(pieces[-1].ended if pieces else call.pieces[-1].ended)
        if call.beside is not None:
            output = words_of(output, call.beside.words_in)
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
        if inputs is None or inputs.shape[0] == 0 or (inputs.shape[1] == 0 and call.wordless is None):
            shape = None if inputs is None else list(inputs.shape[:2])
            raise ValueError(f"the input is empty (shape {shape}); pass at least one row and one token")
        batch, call.time = inputs.shape[:2]
        call.keep = call.stream = call.before = None
        call.pieces, call.states, call.traces, call.written, call.beside = [], [], {}, {}, None
        cache = arguments.get("past_key_values")
        if not self.causal:
            self._open_encoder(call, trunk, arguments, inputs)
            return
        call.checkpointing = trunk.training and any(
            getattr(m, "gradient_checkpointing", False) for m in trunk.modules()
        )
        wanted = arguments.get("use_cache")
        wanted = getattr(trunk.config, "use_cache", False) if wanted is None else wanted  # pyright: ignore
        packed = document_starts(arguments, call.time) if cache is None else None
        if self.enabled and self.memory.beside and not isinstance(cache, MemoryCache):
            if packed is not None:
                self._refuse_packed()
            cache = self._own_cache(call, arguments, bool(wanted))
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
        if call.wordless is not None:
            call.pieces, call.states = [Piece(0, 0, (), call.wordless.ending)], [call.stream.state]
            return
        call.pieces = refined(cut(call.stream.counts, call.time, self.segment_length, call.keep, packed), cuts)
        call.states = [call.stream.state]

    def _open_encoder(self, call: Call, trunk: nn.Module, arguments: dict[str, Any], inputs: Tensor) -> None:
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
        behind = self.memory.tokens_behind(call.stream.state) if self.memory.beside else None
        if behind is not None:
            call.beside = Beside(None, behind, time)
            count = call.beside.width - time
            arguments["position_ids"] = encoder_positions(trunk, arguments, time, count)
            if mask is not None:
                arguments["attention_mask"] = torch.cat([mask, mask.new_ones(batch, count)], 1)
            if (kinds := arguments.get("token_type_ids")) is not None:
                arguments["token_type_ids"] = torch.cat([kinds, kinds.new_zeros(batch, count)], 1)
            words = self._embedded(trunk, arguments)
            arguments["inputs_embeds"] = torch.cat([words, behind.embeddings.to(words)], 1)

    def _embedded(self, trunk: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The call's words as embeddings, which memory tokens can join."""
        words, ids = arguments.get("inputs_embeds"), arguments.pop("input_ids", None)
        return trunk.get_input_embeddings()(ids) if words is None else words  # pyright: ignore

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
        width = waiting_width(self.memory, self.width)
        if stream.waiting.shape[-1] != width:
            raise ValueError(
                f"the cache's stream keeps {stream.waiting.shape[-1]} values of a token, this model's memory {width}; "
                "use a cache of this model"
            )
        call.before = call.stream = stream

    def _segment_by_segment(self, call: Call) -> bool:
        if not self.enabled or isinstance(call.cache, MemoryCache):
            return True
        if not self.memory.writes_see_reads:
            return False
        if any(piece.fresh for piece in call.pieces):
            self._refuse_packed()
        if call.checkpointing:
            raise ValueError(
                "gradient checkpointing drops the base's keys, which reads below the write layer need from segment to "
                "segment; feed whole segments through a MemoryCache with window=segment_length, or turn it off"
            )
        return True

    def _refuse_packed(self) -> NoReturn:
        reads, write = list(self.memory.read_layers), self.memory.write_layer
        why = f"{self.memory.beside} memory tokens" if self.memory.beside else f"reads {reads}, write {write}"
        raise ValueError(
            "packed documents need every read at or above the write layer and no memory tokens beside a segment "
            f"(here {why}); pass one document a row"
        )

    def _own_cache(self, call: Call, arguments: dict[str, Any], wanted: bool) -> MemoryCache:
        """The cache for a memory with tokens beside its segments: the caller's own turned into one, or a new one."""
        given, cache = arguments.get("past_key_values"), self.new_cache(self.config.window or self.segment_length)
        if given is None:
            call.private_cache = not wanted
        elif type(given) is DynamicCache and not given.get_seq_length():
            cache.take_over(given)
            cache = cast(MemoryCache, given)
        else:
            raise ValueError(
                f"a memory with tokens beside its segments cannot join a {type(given).__name__} of "
                f"{int(given.get_seq_length())} tokens; pass past_key_values=mnemic.memory_cache(model)"
            )
        arguments["past_key_values"], arguments["use_cache"] = cache, True
        return cache

    def new_cache(self, window: int | None) -> MemoryCache:
        """A cache for new streams, with keys of the last `window` tokens."""
        return MemoryCache(window, self.segment_length, self.positions, self.depth, self.memory.beside)

    def flush(self, trunk: nn.Module, cache: MemoryCache, rows: tuple[int, ...]) -> None:
        """Ends the running segment of `rows`, which have tokens in it: what they have read is written."""
        stream = cache.memory.stream
        assert stream is not None
        if not self.memory.writes_tokens_behind:
            cache.memory.stream = stream.commit(self.memory, rows)
            cache.close_segment(rows)
            return
        self._run_wordless(trunk, cache, Wordless(ending=rows))

    def _run_wordless(self, trunk: nn.Module, cache: MemoryCache, wordless: Wordless) -> None:
        stream = cache.memory.stream
        assert stream is not None
        nothing = torch.empty(stream.batch, 0, self.width, dtype=self.dtype, device=self.device)
        _threads.wordless = wordless
        try:
            trunk(inputs_embeds=nothing, past_key_values=cache, use_cache=True)
        finally:
            _threads.wordless = None

    def _add_tokens(self, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
        """Puts memory tokens before the words of rows that begin a segment, and behind those of rows that end one."""
        stream, (piece,), memory, cache = call.stream, call.pieces, self.memory, call.cache
        assert stream is not None
        assert isinstance(cache, MemoryCache)
        assert cache.window is not None
        batch, device = stream.batch, self.device
        keep = torch.ones(batch, call.time, dtype=torch.bool, device=device) if call.keep is None else call.keep
        begun = [count > 0 for count in stream.counts]
        if call.wordless is not None:
            begins = torch.tensor([row in call.wordless.beginning for row in range(batch)], device=device)
        else:
            begins = ~torch.tensor(begun, device=device) & keep.any(1)
            if self.slides and any(begun) and bool(begins.any()) and memory.tokens_before(stream.state) is not None:
                # layers that count keys as they lie bear no gap between a row's keys: these tokens go ahead, and are
                # packed against the words
                self._run_wordless(trunk, cache, Wordless(beginning=tuple(begins.nonzero().flatten().tolist())))
                cache.inside = False
                cache.pack()
                begins = torch.zeros_like(begins)
        ends = torch.tensor([row in piece.ended for row in range(batch)], device=device)
        before = memory.tokens_before(stream.state) if bool(begins.any()) else None
        behind = memory.tokens_behind(stream.state) if bool(ends.any()) else None
        if before is None and behind is None:
            return
        if arguments.get("token_type_ids") is not None:
            raise ValueError("memory tokens have no token_type_ids; call without them")
        beside, embeddings = Beside.join(self._embedded(trunk, arguments), keep, (before, begins), (behind, ends))
        beside.apart = (
            before is not None
            and behind is None
            and call.time > 0
            and len(before.inputs) == self.depth
            and not call.checkpointing
            and trunk.config._attn_implementation in ("sdpa", "eager")  # pyright: ignore
        )
        call.beside, arguments["inputs_embeds"] = beside, embeddings

    def _arrange(self, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
        """Gives the base its window: mask and positions of what is physically there."""
        cache = call.cache
        assert isinstance(cache, MemoryCache)
        assert cache.window is not None
        if self.slides and not bool(cache.window.valid[:, -1:].all()):
            cache.pack()
        if self.enabled and self.memory.beside:
            self._add_tokens(call, trunk, arguments)
        keep, width = (call.keep, call.time) if call.beside is None else (call.beside.keep, call.beside.width)
        mask, positions = cache.window.arrange(keep, width)
        if self.enabled and self.memory.span is not None:
            mask = cache.window.band(keep, width, self.memory.span, self.dtype)
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
    def before_block(
        self, block: nn.Module, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of block `layer`, with what the memory puts there."""
        call = self.calls[-1] if self.enabled and self.calls else None
        cache = call.cache if call is not None else None
        if isinstance(cache, MemoryCache) and cache.taking:  # a block that makes keys for `_keys_apart`
            return args, kwargs
        hidden_btd = args[0] if args else kwargs.pop("hidden_states")
        rest = args[1:]
        if layer == 0:
            hidden_btd = self.at_block(-1, hidden_btd)
        beside = call.beside if call is not None else None
        if beside is not None and beside.apart:
            assert isinstance(cache, MemoryCache)
            hidden_btd, rest, kwargs = self._keys_apart(block, layer, beside, cache, hidden_btd, rest, kwargs)
        elif beside is not None:
            hidden_btd = beside.enter(layer, hidden_btd)
        return (hidden_btd, *rest), kwargs

    def _keys_apart(
        self,
        block: nn.Module,
        layer: int,
        beside: Beside,
        cache: MemoryCache,
        hidden_btd: Tensor,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Lets a block make keys of the tokens before, which it leaves as soon as they are in the cache; what it would
        make of their queries is not wanted. Returns its arguments for the words.
        """
        assert beside.before is not None
        assert cache.window is not None
        arguments = bound(block, (hidden_btd, *rest), kwargs)
        name = next(iter(arguments))
        del arguments[name]
        cache.taking = True
        try:
            block(
                beside.before.inputs[layer].to(hidden_btd),
                **for_queries(arguments, slice(0, beside.first), cache.window.kept, hidden_btd),
            )
        except KeysTakenError:
            pass
        finally:
            cache.taking = False
        words = for_queries(arguments, beside.words, cache.window.kept, hidden_btd)
        return hidden_btd[:, beside.words_in(hidden_btd)], (), words

    @_eager
    def at_block(self, layer: int, hidden_btd: Tensor) -> Tensor:
        """What block `layer` puts out, after the memory wrote and read there; -1 is what enters the first."""
        memory = self.memory
        if getattr(_threads, "recording", None) is self and layer == memory.write_layer:
            raise _RecordedError(hidden_btd)
        if not self.enabled or not self.calls or getattr(_threads, "recording", None) is self:
            return hidden_btd
        call = self.calls[-1]
        if layer in memory.written_layers:
            call.written[layer] = self._to_write(call, hidden_btd)
        writes = layer == memory.write_layer
        if writes and not memory.writes_see_reads:
            self._write(call, layer)
        read_btd = self._read(call, layer, hidden_btd) if layer in memory.read_layers else hidden_btd
        if writes and memory.writes_see_reads:
            # after the read, for its traces; what is written is the hidden state from before it all the same
            self._write(call, layer)
        if call.beside is not None and call.beside.apart and layer == self.depth - 1:
            # the trunk expects as many columns as it was given
            read_btd = torch.nn.functional.pad(read_btd, (0, 0, call.beside.first, 0))
        return read_btd

    def _to_write(self, call: Call, hidden_btd: Tensor) -> Tensor:
        """The columns that are written: the words', or those of the memory tokens behind them."""
        if call.beside is None:
            return hidden_btd[:, :0] if self.memory.writes_tokens_behind else hidden_btd
        words = call.beside.words_in(hidden_btd)
        return hidden_btd[:, words.stop :] if self.memory.writes_tokens_behind else hidden_btd[:, words]

    def _read(self, call: Call, layer: int, hidden_btd: Tensor) -> Tensor:
        local_btd = hidden_btd.to(self.device)  # a model spread over devices keeps its memory on one
        parts = []
        for piece, state in zip(call.pieces, call.states, strict=True):
            part = slice(piece.start, piece.stop) if call.beside is None else slice(None)
            read, traces = self.memory.read_and_trace(layer, local_btd[:, part], state)
            if call.beside is not None:
                words = call.beside.words_in(local_btd)
                traces = {name: trace[:, words] for name, trace in traces.items()}
            parts.append(read)
            call.traces = {
                **call.traces,
                **{name: call.traces[name] + trace if name in call.traces else trace for name, trace in traces.items()},
            }
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(hidden_btd.device)

    @property
    def device(self) -> torch.device:
        """Where the memory lives."""
        return self.memory.place.device

    def _write(self, call: Call, layer: int) -> None:
        keep, stream = call.keep, call.stream
        assert stream is not None
        parts = [call.written[each].to(self.device) for each in self.memory.written_layers]
        hidden_btd = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self.memory.writes_tokens_behind:
            self._write_behind(call, layer, hidden_btd)
            return
        check_finite(hidden_btd, keep, layer)
        keep = None if keep is None else keep.to(self.device)
        if keep is not None:
            hidden_btd = hidden_btd.masked_fill(~keep[..., None], 0)
        traces, call.traces = call.traces, {}
        call.stream, call.states = self._advance(stream, hidden_btd, keep, call.pieces, traces)
        if self.memory.reads_own_segment:
            call.states = [call.stream.state]
        if call.layer is not None and not torch.is_grad_enabled() and not self.memory.beside:
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

    def _write_behind(self, call: Call, layer: int, behind_bmd: Tensor) -> None:
        """Counts the words, and writes the hidden states of the tokens behind them to the rows whose segment ends."""
        (piece,), stream, traces = call.pieces, call.stream, call.traces
        assert stream is not None
        rows = torch.zeros(stream.batch, behind_bmd.shape[1], dtype=torch.bool, device=behind_bmd.device)
        rows[list(piece.ended)] = True
        check_finite(behind_bmd, rows, layer)
        uncounted = behind_bmd.new_zeros(stream.batch, call.time, 0)
        stream = stream.leave(traces, call.keep).append(uncounted, call.keep)
        call.traces, call.stream = {}, stream.commit(self.memory, piece.ended, behind_bmd)

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

    def before(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The block's pre-hook; blocks take hidden states first, by place or by name."""
        return self.router.before_block(block, self.layer, args, kwargs)

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
