"""Segment-wise unrolling with truncated backpropagation through time.

Two ways through the same segments give the same numbers:

- *one after another*: each segment is a call of the model, as in use;
- *all at once*, where it is exact: the base keeps no keys between segments (window = segment) and the memory writes
  below or where it reads. Then what is written does not depend on what was read, so the base's lower blocks run over
  all segments as one batch, the writes follow as a short recurrence, and only segments with labels run through the
  upper blocks, again as one batch. With the memory disabled the latter is all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mnemic.attachment import memory_cache, router_of
from mnemic.host.anatomy import base_parameters, examine
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache
from mnemic.host.release import KEEP, parameter_names
from mnemic.host.router import Router
from mnemic.host.wrappers import as_forward, inner_of, unwrapped
from mnemic.state import concatenate
from mnemic.stream import Stream, check_finite, collecting, note_auxiliary

IGNORED = -100
"""The label of tokens without a loss, as everywhere in Hugging Face."""

TOKENS_AT_ONCE = 16_384
"""How many tokens the batched lower blocks take at once: bounds the memory of `read_segments`."""


@dataclass
class Unrolled:
    """What came of a batch of streams: mean `loss` over labelled tokens, their logits `[n, v]`, targets `[n]` and the
    row each belongs to `[n]`, ordered by row, then by position. The stream as it stands after the last token. The
    memory's own `auxiliary` loss, 0 where it has none.
    """

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "n v"]
    targets: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    stream: Stream
    auxiliary: Float[Tensor, ""]

    @property
    def correct(self) -> Bool[Tensor, " n"]:
        """Whether each labelled token was the most probable one."""
        return self.logits.argmax(-1) == self.targets


def unroll(
    model: nn.Module,
    input_ids: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    *,
    window: int | None = None,
    bptt_segments: int | None = None,
    stream: Stream | None = None,
    parallel: bool | None = None,
    memo: FeatureMemo | None = None,
    advance: bool = True,
) -> Unrolled:
    """Runs streams of whole segments through the model and returns the loss at the labelled tokens.

    Args:
        model: a causal model with a memory, wrapped or not.
        input_ids: `[b, s * segment_length]`, no padding inside.
        labels: as in Hugging Face: the token at t is predicted from what comes before t; -100 where there is no loss.
        window: how many of the latest tokens the base itself sees; that of the memory's config by default.
        bptt_segments: how many segments back a loss sends its gradient: into the writes of segments s-1 .. s-k and no
            further, for the loss of segment s. None for all.
        stream: where the streams stand; new ones by default. Its values are constants to the gradient.
        parallel: True or False to insist on one of the two ways; by default what is less work, where it is exact.
        memo: keeps what the base makes of segments that come again, when they run all at once.
        advance: False leaves the stream somewhere in the last labelled segment, which saves time when only the loss is
            wanted.

    Under DDP or FSDP2 all of it is one forward pass of the wrapped model, so processes exchange what they must.

    Raises:
        ValueError: no rows, tokens that are not whole segments, no labels, or `parallel=True` where it is not exact.
    """
    done: list[Unrolled] = []

    def forward(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        done.append(_unroll(inner_of(model), input_ids, labels, window, bptt_segments, stream, parallel, memo, advance))
        return done[0].loss, done[0].auxiliary

    # losses alone are what a wrapper sees: DDP waits for gradients of all else that it is given
    loss, auxiliary = as_forward(model, forward, input_ids, labels)
    return replace(done[0], loss=loss, auxiliary=auxiliary)


def _unroll(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    window: int | None,
    bptt_segments: int | None,
    stream: Stream | None,
    parallel: bool | None,
    memo: FeatureMemo | None,
    advance: bool,
) -> Unrolled:
    router = router_of(model)
    length = router.segment_length
    if not len(input_ids):
        raise ValueError("the batch is empty (0 rows); give at least one stream, of texts long enough to make one")
    if input_ids.shape[1] % length or input_ids.shape[1] == 0:
        raise ValueError(f"{input_ids.shape[1]} tokens are not whole segments of {length}; pad or trim the stream")
    if bptt_segments is not None and bptt_segments < 0:
        raise ValueError(f"bptt_segments is {bptt_segments}; use 0 or more, or None for all")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if not bool((targets != IGNORED).any()):
        raise ValueError("no token has a label (the first token of a stream cannot have one); nothing to learn")
    window = router.config.window or length if window is None else window
    # a base without a memory and without earlier keys needs the labelled segments alone
    alone = router.causal and not router.enabled and window == length
    obstacle = None if alone else obstacle_to_parallel(model, window)
    if parallel and obstacle is not None:
        raise ValueError(f"segments cannot run all at once: {obstacle}; leave parallel out")
    ids, wanted = (tensor.unflatten(1, (-1, length)).transpose(0, 1) for tensor in (input_ids, targets))
    labelled = [s for s in range(len(ids)) if bool((wanted[s] != IGNORED).any())]
    if parallel is None:
        parallel = obstacle is None and (alone or _worth_it(model, router, len(ids), len(labelled)))
    losses: list[Tensor] | None = [] if torch.is_grad_enabled() else None
    # the head runs where some row has a label; nothing after the last of these has a part in the loss
    places = (wanted[labelled] != IGNORED).flatten(0, 1).any(0).nonzero().flatten()
    if parallel:
        logits, stream = _all_at_once(
            model, router, ids, labelled, places, bptt_segments, stream, memo, advance, losses
        )
    else:
        ids = ids if advance else ids[: labelled[-1] + 1]
        logits, stream = _one_after_another(
            model, router, ids, labelled, places, window, bptt_segments, stream, advance, losses
        )
    wanted = wanted[labelled][:, :, places]
    places_n, rows = _by_row(wanted != IGNORED)
    logits_nv, targets_n = logits.flatten(0, 2)[places_n], wanted.flatten()[places_n]
    loss = F.cross_entropy(logits_nv.float(), targets_n)
    auxiliary = torch.cat(losses).mean() if losses else torch.zeros_like(loss)
    return Unrolled(loss, logits_nv, targets_n, rows, stream, auxiliary)


def _worth_it(model: nn.Module, router: Router, segments: int, labelled: int) -> bool:
    """Whether all at once is less work where the base trains: labelled segments pass the lower blocks twice there, once
    for what they write and once for their loss. With a frozen base the first time costs no gradient.
    """
    if not (torch.is_grad_enabled() and base_trains(model)):
        return True
    last = router.memory.writes[-1]
    lower = last.layer + (last.at != "input")
    return labelled + segments * lower / router.depth <= segments


def _by_row(chosen_sbt: Tensor) -> tuple[Tensor, Tensor]:
    """Where chosen tokens stand among all of them, ordered by row, and the row of each."""
    rows = chosen_sbt.nonzero()[:, 1]
    order = torch.argsort(rows, stable=True)
    return chosen_sbt.flatten().nonzero()[order, 0], rows[order]


def obstacle_to_parallel(model: nn.Module, window: int) -> str | None:
    """Why segments depend on each other through the base and cannot run all at once; None when they do not."""
    router = router_of(model)
    if not router.causal:
        return "the model is an encoder"
    if window != router.segment_length:
        return f"the window of {window} keeps keys of earlier segments (segment_length {router.segment_length})"
    if not router.enabled:
        return "the memory is disabled"
    if router.memory.beside:
        return "memory tokens stand beside every segment"
    if router.attended:
        return "keys that leave the window are seen inside attention"
    if router.memory.writes_see_reads:
        return "the memory reads before it writes"
    if not router.memory.writes:
        return "the memory writes no hidden states"
    return None


def can_read_ahead(model: nn.Module, cache: MemoryCache | None, stream: Stream | None) -> bool:
    """Whether whole segments of what comes next may go through the base as one batch: no row has begun one, and none
    depends on another. `cache` is None for encoders.
    """
    if cache is None or (size := cache.settings[0]) is None:
        return False
    counts = stream.counts if stream is not None else ()
    running = cache.window.running if cache.window is not None else ()  # it moves on while the memory is disabled, too
    return not any((*counts, *running)) and obstacle_to_parallel(model, size) is None


# --- one after another -----------------------------------------------------------------------------------------------


def _one_after_another(
    model: nn.Module,
    router: Router,
    ids: Tensor,
    labelled: list[int],
    places: Tensor,
    window: int,
    reach: int | None,
    stream: Stream | None,
    advance: bool,
    losses: list[Tensor] | None,
) -> tuple[Tensor, Stream]:
    cache = memory_cache(model, window)
    cache.memory.stream = stream.detach() if stream is not None else None

    used = ids.shape[2] if advance else int(places.max()) + 1

    def run(cache: MemoryCache, s: int) -> Tensor:
        part = ids[s, :, :used] if s == len(ids) - 1 else ids[s]
        return _logits(model, part, cache, places if s in labelled else places[:1])

    if reach is None:
        with collecting(losses):
            outputs = [run(cache, s) for s in range(len(ids))]
        return torch.stack([outputs[s] for s in labelled]), _stream_of(cache, router, ids)
    # the loss of segment s is run again from the cache as it stood `reach` segments before, a constant there
    past, logits = {0: cache}, []
    for s in range(len(ids)):
        first = max(0, s - reach)
        # no branch begins later
        done = torch.is_grad_enabled() and not advance and s >= labelled[-1] - reach
        if s in labelled and torch.is_grad_enabled():
            branch = past[first].fork()
            for step in range(first, s):
                run(branch, step)
            with collecting(losses if done else None):
                logits.append(run(branch, s))
            if s == len(ids) - 1 and not advance:
                cache = branch
        if done:
            continue
        with torch.no_grad(), collecting(losses):
            cache = cache.fork()
            plain = run(cache, s)
        if s in labelled and not torch.is_grad_enabled():
            logits.append(plain)
        past[s + 1] = cache
        past.pop(s - reach, None)
    return torch.stack(logits), _stream_of(cache, router, ids)


def _stream_of(cache: MemoryCache, router: Router, ids: Tensor) -> Stream:
    stream = cache.memory.stream
    return stream if stream is not None else router.new_stream(ids.shape[1])


# --- all at once -----------------------------------------------------------------------------------------------------


def _all_at_once(
    model: nn.Module,
    router: Router,
    ids: Tensor,
    labelled: list[int],
    places: Tensor,
    reach: int | None,
    stream: Stream | None,
    memo: FeatureMemo | None,
    advance: bool,
    losses: list[Tensor] | None,
) -> tuple[Tensor, Stream]:
    memory, (_, batch, length) = router.memory, ids.shape
    count = (len(ids) if advance else labelled[-1]) if router.enabled else 0
    stream = router.new_stream(batch) if stream is None else stream.detach()
    if any(stream.counts):
        raise ValueError(f"the stream has {stream.counts} tokens waiting; begin at a segment's end (flush it)")
    compute = functools.partial(features, model) if base_trains(model) else memo or functools.partial(features, model)
    hidden = compute(ids[:count]) if count else ids
    states, state = [stream.state], stream.state
    with torch.set_grad_enabled(torch.is_grad_enabled() and reach is None), collecting(losses):
        for s in range(count):
            note_auxiliary(memory, hidden[s], state)
            state = memory.write(hidden[s], state, **memory.known(ids[s]))
            states.append(state)
    if not router.enabled:
        recent = [stream.state for _ in labelled]
    elif reach is not None and torch.is_grad_enabled():
        # every labelled segment's state again, with the gradient of its last `reach` writes
        begin = [max(0, s - reach) for s in labelled]
        recent = []
        for s, first in zip(labelled, begin, strict=True):
            state = states[first]
            for step in range(first, s):
                state = memory.write(hidden[step], state, **memory.known(ids[step]))
            recent.append(state)
    else:
        recent = [states[s] for s in labelled]
    asked = concatenate(recent)
    cache = memory_cache(model, length)
    cache.memory.stream = router.new_stream(len(labelled) * batch, asked)
    used = int(places.max()) + 1
    logits = _logits(model, ids[labelled, :, :used].flatten(0, 1), cache, places)
    return logits.unflatten(0, (len(labelled), batch)), stream.after(states[-1], count, length)


def _logits(
    model: nn.Module, ids: Int[Tensor, "b t"], cache: MemoryCache, places: Int[Tensor, " p"]
) -> Float[Tensor, "b p v"]:
    """Logits at some places of a call; the head, a fifth of a small model's work, runs there alone where it can."""
    given = with_cache(model, cache)
    if len(places) == ids.shape[1]:
        return model(input_ids=ids, **given).logits
    if KEEP in parameter_names(type(unwrapped(model))):
        return model(input_ids=ids, **given, **{KEEP: places}).logits
    return model(input_ids=ids, **given).logits[:, places]


def base_trains(model: nn.Module) -> bool:
    """Whether some of the base's own weights train."""
    return any(parameter.requires_grad for parameter in base_parameters(model).values())


def features(model: nn.Module, ids_sbt: Int[Tensor, "s b t"]) -> Float[Tensor, "s b t d"]:
    """The hidden states that are written, for segments that the base sees each on its own. No gradient."""
    router, trunk = router_of(model), examine(model).trunk
    flat = ids_sbt.flatten(0, 1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and base_trains(model)):
        parts = flat.split(max(1, TOKENS_AT_ONCE // flat.shape[1]))
        hidden = torch.cat([router.record(trunk, part) for part in parts])
    check_finite(hidden, None, router.memory.writes[-1])
    return hidden.unflatten(0, ids_sbt.shape[:2])


class FeatureMemo:
    """`features` that computes a segment once when it comes again and again, as filler from a pool does.

    What the frozen base makes of a segment depends on its tokens alone, so keeping it changes nothing. Segments are
    kept from their second coming on, up to `most_bytes`.
    """

    def __init__(self, model: nn.Module, most_bytes: int = 2**29) -> None:
        self.model, self.most_bytes = model, most_bytes
        self.places: dict[int, int | None] = {}
        self.kept: list[Tensor] = []
        self.table: Tensor | None = None
        self.bytes = 0

    def __call__(self, ids_sbt: Int[Tensor, "s b t"]) -> Float[Tensor, "s b t d"]:
        """As `features`."""
        flat = ids_sbt.flatten(0, 1)
        source = torch.Generator().manual_seed(flat.shape[1])
        weights = torch.randint(2**62, (flat.shape[1],), generator=source).to(flat.device)
        keys = ((flat + 1) * weights).sum(1).tolist()  # int64 wraps around, which is what a hash wants
        places = [self.places.get(key) for key in keys]
        new = [row for row, place in enumerate(places) if place is None]
        hidden = features(self.model, flat[new][None])[0] if new else None
        again = []
        for i, row in enumerate(new):
            assert hidden is not None
            if keys[row] not in self.places:
                self.places[keys[row]] = None
            elif self.places[keys[row]] is None and self.bytes < self.most_bytes:
                self.places[keys[row]] = len(self.kept)
                self.kept.append(hidden[i].clone())
                self.bytes += hidden[i].numel() * hidden.element_size()
                again.append(row)
        if again:
            self.table = None
        if len(new) == len(keys):
            assert hidden is not None
            return hidden.unflatten(0, ids_sbt.shape[:2])
        if self.table is None:
            self.table = torch.stack(self.kept)
        known = torch.tensor([place or 0 for place in places], device=flat.device)
        result = self.table[known]
        if hidden is not None:
            result[torch.tensor(new, device=flat.device)] = hidden
        return result.unflatten(0, ids_sbt.shape[:2])


def read_segments(
    model: nn.Module, ids_bt: Int[Tensor, "b t"], stream: Stream | None = None, *, part: int = 64
) -> Stream:
    """Reads whole segments into the memory without a gradient, `part` of them at a time through the base as one batch.

    Equal to reading them one after another with a window of one segment, and faster. Raises `ValueError` where that
    would not be exact (see the module's docstring).
    """
    router = router_of(model)
    if obstacle := obstacle_to_parallel(model, router.segment_length):
        raise ValueError(f"segments cannot be read all at once: {obstacle}")
    stream = router.new_stream(ids_bt.shape[0]) if stream is None else stream
    with torch.no_grad():
        for piece in ids_bt.unflatten(1, (-1, router.segment_length)).transpose(0, 1).split(part):
            for ids, hidden_btd in zip(piece, features(model, piece), strict=True):
                stream = stream.whole(router.memory, hidden_btd, ids)
    return stream
