"""The cache that carries a memory: one extra layer at the end of any Hugging Face cache, and a cache with a window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.bank import Bank
from mnemic.history import Log
from mnemic.host.release import Cache, DummyLayer, DynamicCache, DynamicLayer
from mnemic.sources import Noted
from mnemic.stream import Stream

if TYPE_CHECKING:
    from mnemic.host.turning import Turning


class MemoryLayer(DummyLayer):
    """Holds the `Stream` of a batch where `generate` reorders, repeats and selects what a cache holds.

    It stores no keys: masks, sizes and early initialisation skip it.
    """

    # for tokens of the last call, which are all that assisted decoding takes back
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.stream: Stream | None = None
        self.replay: Callable[[int], Stream] | None = None
        self.off = False
        """Whether tokens were read with a memory inside attention switched off: their keys are not the stream's."""
        self.log: Log | None = None
        """What the history of a new stream begins with; None for streams without one."""
        self.bank: Bank | None = None
        """The bank that a new stream begins with; None for the usual one."""
        self.noted: Noted | None = None
        """Which kept tokens were attended to, while somebody wants to know."""

    def begin(self, stream: Stream) -> Stream:
        """A new stream with its history and its bank."""
        return replace(stream, logs=(self.log,) * stream.batch, banks=(self.bank,) * stream.batch)

    def _map(self, function: Callable[[Stream], Stream]) -> None:
        if self.stream is not None:
            self.stream = function(self.stream)

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        """Rows follow their beams."""
        self._map(lambda stream: stream.select(beam_idx.tolist()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map(lambda stream: stream.repeat(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by index or by a boolean mask."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._map(lambda stream: stream.select(rows.tolist()))

    def reset(self) -> None:
        """The streams are forgotten."""
        self.stream = self.replay = None
        self.off = False

    def detach(self) -> None:
        """Cuts what is carried out of any gradient."""
        self._map(Stream.detach)
        self.replay = None

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens of the last call by writing that call again without them."""
        count = abs(tokens_to_remove)
        if count and self.stream is not None:
            if self.replay is None:
                raise ValueError("a memory can take back tokens of its last call only, and there was none")
            replay, self.stream = self.replay, self.replay(count)
            self.replay = lambda more: replay(count + more)


def memory_layer(cache: Cache, depth: int) -> MemoryLayer:
    """The memory's layer of any cache, appended on first use."""
    for layer in reversed(cache.layers):
        if isinstance(layer, MemoryLayer):
            return layer
    if cache.layer_class_to_replicate is not None:
        # a cache that grows on demand must not grow past the memory's layer
        cache.layers += [cache.layer_class_to_replicate() for _ in range(depth - len(cache.layers))]  # pyright: ignore[reportAttributeAccessIssue]
    layer = MemoryLayer()
    cache.layers.append(layer)  # pyright: ignore[reportArgumentType]
    return layer


def snapshot(cache: Cache) -> Callable[[], None]:
    """A function that puts the layers of a cache back as they are now. Tensors are shared, none is copied.

    A static cache writes into its tensors, so what was written there stays; its memory is put back.
    """
    layers = list(cache.layers)
    attributes = [(layer, dict(vars(layer))) for layer in layers if isinstance(layer, DynamicLayer | MemoryLayer)]

    def restore() -> None:
        cache.layers[:] = layers
        for layer, values in attributes:
            vars(layer).clear()
            vars(layer).update(values)

    return restore


LEDGERS = ("context", "running", "position", "taken")
"""What a window counts for each row."""


@dataclass(frozen=True)
class Window:
    """Which of the base's keys each row may still see, and where its next token stands. Immutable.

    The window moves a segment at a time: when a row's segment ends, its oldest keys go until one more segment fits in
    `size` tokens, so a row sees between `size - segment_length` and `size` tokens. `size=None` keeps everything.

    A row's first `sinks` keys never go: models leave on them the attention that they have no use for, and are lost
    without (Xiao et al., StreamingLLM, ICLR 2024, arXiv 2309.17453). They are among the `size`, and stand at positions
    0, 1, ... for ever, the others in line up to `position`. A row with no other keys left goes on behind its sinks. So
    does one whose positions would run out (`limit`), with its other keys where these can be moved, else without.

    `valid [b, kept]` marks, of the keys that are physically there, those of real tokens inside the row's window.
    Keys of memory tokens, of which at most `beside` come with a segment, are kept and leave as those of words do.
    `taken[b]` counts the words that came through the base since the window was made here: it is in no file.
    """

    size: int | None
    segment_length: int
    limit: int | None
    beside: int
    sinks: int
    valid: Bool[Tensor, "b kept"]
    context: tuple[int, ...]
    running: tuple[int, ...]
    position: tuple[int, ...]
    taken: tuple[int, ...] = (0,)

    @staticmethod
    def new(
        size: int | None,
        segment_length: int,
        limit: int | None,
        beside: int,
        sinks: int,
        batch: int,
        device: torch.device,
    ) -> Window:
        """The window of `batch` streams at their beginning."""
        zeros = (0,) * batch
        valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return Window(size, segment_length, limit, beside, sinks, valid, zeros, zeros, zeros, zeros)

    @property
    def kept(self) -> int:
        """Keys physically there."""
        return self.valid.shape[1]

    @property
    def packed(self) -> bool:
        """Whether every row's keys are the last ones, with nothing between them."""
        return bool(self.valid[:, -1:].all() and (self.valid[:, 1:] >= self.valid[:, :-1]).all())

    def arrange(self, keep_bt: Bool[Tensor, "b t"] | None, time: int) -> tuple[Tensor | None, Int[Tensor, "b t"]]:
        """The attention mask `[b, kept + t]` (None where nothing is masked) and the positions of a call's tokens."""
        device = self.valid.device
        start = torch.tensor(self.position, device=device)[:, None]
        if keep_bt is None and all(count == self.kept for count in self.context):
            mask, position = None, start + torch.arange(time, device=device)
        else:
            keep = torch.ones(len(self.context), time, dtype=torch.bool, device=device) if keep_bt is None else keep_bt
            mask = torch.cat([self.valid, keep], 1).long()
            position = (start + keep.long().cumsum(1) - 1).clamp_min(0)
        if self.size is None and self.limit is not None and (top := int(position.max())) >= self.limit:
            raise ValueError(
                f"position {top} is beyond the model's {self.limit}; "
                "give the session or cache a window= of at most that"
            )
        return mask, position

    def band(
        self, keep_bt: Bool[Tensor, "b t"] | None, time: int, span: int, dtype: torch.dtype
    ) -> Float[Tensor, "b 1 t k"]:
        """The additive mask of a call whose tokens see the latest `span` keys each, their own among them."""
        keep = torch.ones(len(self.context), time, dtype=torch.bool, device=self.valid.device)
        there = torch.cat([self.valid, keep if keep_bt is None else keep_bt], 1)
        rank = there.long().cumsum(1)
        distance = rank[:, -time:, None] - rank[:, None, :]
        column = torch.arange(there.shape[1], device=there.device)
        seen = there[:, None, :] & (distance < span) & (column <= column[-time:, None])
        seen = seen | (column == column[-time:, None])  # a row of padding must see something, or it is NaN
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    def advance(self, keep_bt: Bool[Tensor, "b t"] | None, time: int, words: slice | None = None) -> Window:
        """The window after a call's tokens, nothing evicted yet; of these, `words` are not the memory's."""
        batch, words = len(self.context), words or slice(0, time)
        keep = torch.ones(batch, time, dtype=torch.bool, device=self.valid.device) if keep_bt is None else keep_bt
        added = [time] * batch if keep_bt is None else keep_bt.sum(1).tolist()
        counted = [words.stop - words.start] * batch if keep_bt is None else keep_bt[:, words].sum(1).tolist()
        context, running, position, taken = (
            tuple(value + new for value, new in zip(values, more, strict=True))
            for values, more in (
                (self.context, added),
                (self.running, counted),
                (self.position, added),
                (self.taken, counted),
            )
        )
        valid = torch.cat([self.valid, keep], 1)
        return replace(self, valid=valid, context=context, running=running, position=position, taken=taken)

    def runs_out(self, row: int) -> bool:
        """Whether there are no positions for another segment."""
        return self.limit is not None and self.position[row] + self.segment_length + self.beside > self.limit

    def close_segment(self, rows: Sequence[int], moves: bool = False) -> Window:
        """`rows` end their segment: the oldest keys behind the sinks leave so that another segment fits. Where
        positions run out the others leave, too, unless they can be moved (`moves`) to stand behind the sinks.
        """
        context, running, position = list(self.context), list(self.running), list(self.position)
        for row in rows:
            running[row] = 0
            if self.size is None:
                continue
            context[row] = min(context[row], self.size - self.segment_length)
            if self.runs_out(row):
                moved = replace(self, position=tuple(context))
                if moves and not moved.runs_out(row):
                    position[row] = context[row]
                else:
                    context[row] = min(context[row], self.sinks)
            if context[row] <= self.sinks:
                position[row] = context[row]
        return replace(self.shortened(context), running=tuple(running), position=tuple(position))

    def shortened(self, context: Sequence[int]) -> Window:
        """The window with so many keys of each row, no more than it has: the oldest behind the sinks are gone."""
        drop = torch.tensor(self.context, device=self.valid.device) - torch.tensor(context, device=self.valid.device)
        valid = self.valid
        if any(drop.tolist()):
            rank = valid.long().cumsum(1)
            valid = valid & ((rank <= self.sinks) | (rank > self.sinks + drop[:, None]))
        return replace(self, valid=valid, context=tuple(context))

    def select(self, rows: Sequence[int]) -> Window:
        """Rows by index, repeats allowed."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.valid.device)
        ledgers = {name: tuple(getattr(self, name)[row] for row in rows) for name in LEDGERS}
        return replace(self, valid=self.valid[index], **ledgers)

    @staticmethod
    def concatenate(windows: Sequence[Window]) -> Window:
        """Rows of several windows of one size, one after another; those that hold less have theirs on the right."""
        kept = max(window.kept for window in windows)
        valid = [torch.nn.functional.pad(window.valid, (kept - window.kept, 0)) for window in windows]
        ledgers = {name: tuple(value for window in windows for value in getattr(window, name)) for name in LEDGERS}
        return replace(windows[0], valid=torch.cat(valid), **ledgers)


class KeysTakenError(Exception):
    """Leaves a block as soon as its keys are in the cache."""


class MemoryCache(DynamicCache):
    """A stream's whole past: the memory, and the base's keys and values of the last `window` tokens, of which the first
    `sinks` of the stream are always some.

    Calls pass only new tokens, as does `model.generate(new_ids, cache=cache)`: the history lives here, and so
    do its padding and positions. To callers the cache therefore reports length 0; inside the model's forward it
    reports the keys it holds.
    """

    def __init__(
        self, size: int | None, segment_length: int, limit: int | None, depth: int, beside: int = 0, sinks: int = 0
    ) -> None:
        super().__init__()
        self.settings = (size, segment_length, limit, beside, sinks)
        self.depth = depth
        self.window: Window | None = None
        self.inside = self.taking = False
        memory_layer(self, depth)

    def take_over(self, cache: DynamicCache) -> None:
        """Turns an empty cache into one like this: `generate` makes its own and goes on with that very object."""
        cache.__class__ = MemoryCache
        vars(cache).clear()
        vars(cache).update(vars(self))

    @property
    def memory(self) -> MemoryLayer:
        """The layer that carries the memory's stream."""
        return memory_layer(self, self.depth)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys held, to the model; 0 to callers, for whom every token they pass is new."""
        return super().get_seq_length(layer_idx) if self.inside else 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As every cache; while `taking`, raises `KeysTakenError` when it is done, outside of compiled code.

        Raises:
            RuntimeError: a call that did not come through the memory, which alone knows what the window holds.
        """
        if not torch.compiler.is_compiling() and not self.inside:
            raise RuntimeError(
                "the model runs without its memory, which this cache is for: it was detached, or its forward replaced "
                "since (accelerate's remove_hook_from_module puts back what stood there before); attach it again"
            )
        keys_and_values = super().update(*args, **kwargs)
        if not torch.compiler.is_compiling() and self.taking:
            raise KeysTakenError
        return keys_and_values

    def open(self, batch: int, device: torch.device) -> Window:
        """The window, made on first use; raises `ValueError` if the batch size changed."""
        if self.window is None:
            self.window = Window.new(*self.settings, batch, device)
        return self.window

    def close_segment(self, rows: Sequence[int], turnings: Mapping[int, Turning] | None = None) -> None:
        """`rows` end their segment: keys that left the window are dropped. Where positions run out they are turned back
        by `turnings`, one for each block, if there are any.
        """
        before = self.window
        if before is None or not rows:
            return
        self.window = before.close_segment(rows, turnings is not None)
        for row in rows:
            back = before.position[row] - self.window.position[row]
            if turnings is not None and back and self.window.context[row] > before.sinks:
                self._turn(row, before.position[row], back, turnings)
        if max(self.window.context) < self.window.kept:
            self.pack()

    def _turn(self, row: int, position: int, back: int, turnings: Mapping[int, Turning]) -> None:
        """Turns a row's keys behind its sinks, the last of which stands before `position`, `back` by so many."""
        assert self.window is not None
        columns = self.window.valid[row].nonzero().flatten()[self.window.sinks :]
        stood = torch.arange(position - len(columns), position, device=columns.device)
        for index, turning in turnings.items():
            layer = self.layers[index]
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            plain = turning(layer.keys[row][:, columns], stood, back=True)
            keys = layer.keys.clone()  # what a snapshot or a fork holds stays
            keys[row, :, columns] = turning(plain, stood - back).to(keys.dtype)
            layer.keys = keys

    def pack(self) -> None:
        """Moves every row's own keys to the right, in their order, and drops what no row needs."""
        window = self.window
        if window is None:
            return
        target = max(window.context)
        order = torch.argsort(window.valid.long(), dim=1, stable=True)[:, window.kept - target :]
        self.window = replace(window, valid=window.valid.gather(1, order))
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                if target == 0:
                    layer.reset()
                elif layer.keys is not None and layer.values is not None:
                    layer.keys, layer.values = _gather(layer.keys, order), _gather(layer.values, order)

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._select_window(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.window is not None:
            self._select_window([row for row in range(len(self.window.context)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by index or by a boolean mask."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        super().batch_select_indices(rows)
        self._select_window(rows.tolist())

    def _select_window(self, rows: Sequence[int]) -> None:
        if self.window is not None:
            self.window = self.window.select(rows)

    def reset(self) -> None:
        """Everything is forgotten."""
        super().reset()
        self.window = None

    def detach(self) -> None:
        """Cuts memory and keys out of any gradient."""
        self.memory.detach()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    @property
    def is_croppable(self) -> bool:
        """Never: keys that have left the window do not come back."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: keys that left the window cannot come back."""
        if tokens_to_remove:
            raise ValueError("a MemoryCache cannot take tokens back (assisted decoding); generate with the plain cache")

    def snapshot(self) -> Callable[[], None]:
        """A function that puts everything back as it is now. Tensors are shared, none is copied."""
        layers, window = snapshot(self), self.window

        def restore() -> None:
            layers()
            self.window, self.inside, self.taking = window, False, False

        return restore

    @staticmethod
    def concatenate(caches: Sequence[MemoryCache], device: torch.device) -> MemoryCache:
        """Windows and keys of several caches as one batch; one that was not used yet has one row. Their streams are for
        the caller to join: a cache without one says nothing of how a new one begins.
        """
        first = caches[0]
        joined = first._new()
        if all(cache.window is None for cache in caches):
            return joined
        joined.memory.off = any(cache.memory.off for cache in caches)
        windows = [cache.window or Window.new(*first.settings, 1, device) for cache in caches]
        joined.window = Window.concatenate(windows)
        for index, layer in enumerate(joined.layers):
            there = [own for cache in caches if isinstance(own := cache.layers[index], DynamicLayer)]
            some = next((own for own in there if own.is_initialized), None)
            if isinstance(layer, DynamicLayer) and some is not None:
                held: list[Tensor] = []
                for name in ("keys", "values"):
                    empty = getattr(some, name)[:, :, :0]
                    parts = [getattr(own, name) if own.is_initialized else empty for own in there]
                    padded = [torch.nn.functional.pad(t, (0, 0, joined.window.kept - t.shape[2], 0)) for t in parts]
                    held.append(torch.cat(padded))
                layer.lazy_initialization(*held)
                layer.keys, layer.values = held
        return joined

    def row(self, row: int) -> MemoryCache:
        """One row with its own keys alone, in copies that keep nothing of the others alive."""
        lone = self.fork()
        lone.batch_select_indices(torch.tensor([row], device=self.window.valid.device if self.window else None))
        if lone.window is not None and lone.window.context[0] < lone.window.kept:
            lone.pack()
        return lone

    def fork(self) -> MemoryCache:
        """An independent copy: what one reads from here on, the other does not."""
        copy = self._new()
        copy.window, copy.memory.stream, copy.memory.log = self.window, self.memory.stream, self.memory.log
        copy.memory.off, copy.memory.bank = self.memory.off, self.memory.bank
        for mine, theirs in zip(self.layers, copy.layers, strict=True):
            if isinstance(mine, DynamicLayer) and mine.is_initialized:
                theirs.lazy_initialization(mine.keys, mine.values)  # pyright: ignore
                theirs.keys, theirs.values = mine.keys, mine.values  # pyright: ignore[reportAttributeAccessIssue]
        return copy

    def _new(self) -> MemoryCache:
        """An empty one with the same settings."""
        size, segment_length, limit, beside, sinks = self.settings
        return MemoryCache(size, segment_length, limit, self.depth, beside, sinks)


def _gather(keys: Tensor, order: Int[Tensor, "b kept"]) -> Tensor:
    """Keys or values `[b, h, t, d]` at the places of `order`."""
    return keys.gather(2, order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
