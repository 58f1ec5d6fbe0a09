"""Opening a call: which cache it rides, which tokens are padding, where its segments end, and what the base is given.

With a `MemoryCache` the base's window is arranged here too, and memory tokens join the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from mnemic.host.arguments import check_batch, document_starts, kept_tokens, refined
from mnemic.host.beside import Beside, Wordless, encoder_positions
from mnemic.host.cache import MemoryCache, memory_layer, snapshot
from mnemic.host.call import Call, thread
from mnemic.host.release import CHECKPOINTS_WITHOUT_GRADIENT, Cache, DynamicCache
from mnemic.host.wrappers import compiled_inside
from mnemic.memory import MemoryTokens
from mnemic.stream import Piece, cut, waiting_width

if TYPE_CHECKING:
    from mnemic.host.router import Router


def open_call(router: Router, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
    """Fills in what one pass needs to know: cache, padding, packing, stream, pieces."""
    inputs = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
    if inputs is None or inputs.shape[0] == 0 or (inputs.shape[1] == 0 and call.wordless is None):
        shape = None if inputs is None else list(inputs.shape[:2])
        raise ValueError(f"the input is empty (shape {shape}); pass at least one row and one token")
    batch, call.time = inputs.shape[:2]
    call.keep = call.stream = call.before = None
    call.ids = arguments.get("input_ids")
    call.pieces, call.states, call.traces, call.written, call.beside = [], [], {}, {}, None
    if not router.causal:
        _open_encoder(router, call, trunk, arguments, inputs)
        return
    cache = arguments.get(router.cache_name)
    if router.enabled and cache is not None and not isinstance(cache, Cache):
        refuse_paged(type(cache).__name__)
    call.checkpointing = (
        trunk.training
        and (torch.is_grad_enabled() or CHECKPOINTS_WITHOUT_GRADIENT)
        and any(getattr(m, "gradient_checkpointing", False) for m in trunk.modules())
    )
    wanted = arguments.get("use_cache")
    wanted = getattr(trunk.config, "use_cache", False) if wanted is None else wanted  # pyright: ignore
    packed = document_starts(arguments, call.time) if cache is None else None
    if router.enabled and router.memory.beside and not isinstance(cache, MemoryCache):
        if packed is not None:
            _refuse_packed(router)
        cache = _own_cache(router, call, arguments, bool(wanted))
    if cache is None and wanted and not call.checkpointing and packed is None and router.enabled:
        cache = arguments[router.cache_name] = DynamicCache(config=trunk.config)  # pyright: ignore
    call.cache = cache if isinstance(cache, Cache) else None
    if call.cache is not None and not call.earlier:
        call.restore = cache.snapshot() if isinstance(cache, MemoryCache) else snapshot(call.cache)
    if isinstance(cache, MemoryCache):
        window = cache.open(batch, inputs.device)
        check_batch(len(window.context), batch)
        if call.checkpointing and window.kept:
            raise ValueError(
                "gradient checkpointing drops the base's keys between calls; feed whole segments with "
                f"window=segment_length ({router.segment_length}), or turn checkpointing off"
            )
    elif not router.enabled:
        return
    call.keep = kept_tokens(arguments.get("attention_mask"), call.time, call.cache)
    if call.keep is not None and bool(call.keep.all()):
        call.keep = None
    cuts: set[int] = set()
    if isinstance(cache, MemoryCache) and cache.window is not None:
        cuts = {piece.stop for piece in cut(cache.window.running, call.time, router.segment_length, call.keep)}
        if router.slides and call.keep is not None:
            # padding may end a part but not lie between a row's tokens: the next part is packed against its keys
            cuts |= {t + 1 for t in (call.keep[:, 1:] & ~call.keep[:, :-1]).any(0).nonzero().flatten().tolist()}
    if not router.enabled:
        call.pieces = refined([Piece(0, call.time)], cuts)
        return
    call.layer = memory_layer(call.cache, router.depth) if call.cache is not None else None
    _bring_stream(router, call, batch)
    assert call.stream is not None
    if call.wordless is not None:
        call.pieces, call.states = [Piece(0, 0, (), call.wordless.ending)], [call.stream.state]
        return
    call.pieces = refined(cut(call.stream.counts, call.time, router.segment_length, call.keep, packed), cuts)
    call.states = [call.stream.state]


def refuse_paged(*cache: object, **settings: object) -> NoReturn:
    """Raises `ValueError`: a paged cache holds keys of many requests in one row, and nothing of their streams."""
    kind = cache[0] if cache else "paged cache (generate_batch, continuous batching)"
    raise ValueError(
        f"a {kind} carries no memory; use mnemic.batch([session, ...]).generate(...) or model.generate, or detach the "
        "memory first"
    )


def goes_by_segment(router: Router, call: Call) -> bool:
    """Whether the trunk must be called once a piece: a piece can only run when the one before it is written."""
    if not router.enabled or isinstance(call.cache, MemoryCache):
        return True
    if not router.memory.writes_see_reads:
        return False
    if any(piece.fresh for piece in call.pieces):
        _refuse_packed(router)
    if call.checkpointing:
        raise ValueError(
            "gradient checkpointing drops the base's keys, which reads before the write need from segment to "
            "segment; feed whole segments through a MemoryCache with window=segment_length, or turn it off"
        )
    return True


def arrange(router: Router, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
    """Gives the base its window: mask and positions of what is physically there."""
    cache = call.cache
    assert isinstance(cache, MemoryCache)
    assert cache.window is not None
    if router.slides and not bool(cache.window.valid[:, -1:].all()):
        cache.pack()
    if router.enabled and router.memory.beside:
        _add_tokens(router, call, trunk, arguments)
    keep, width = (call.keep, call.time) if call.beside is None else (call.beside.keep, call.beside.width)
    mask, positions = cache.window.arrange(keep, width)
    if router.enabled and router.memory.span is not None:
        mask = cache.window.band(keep, width, router.memory.span, router.dtype)
    arguments["attention_mask"] = mask
    arguments["use_cache"] = True
    if router.takes_positions:
        arguments["position_ids"] = positions
    cache.inside = True


def _open_encoder(router: Router, call: Call, trunk: nn.Module, arguments: dict[str, Any], inputs: Tensor) -> None:
    """An encoder sees both ways, so one call is one segment; its stream is carried by `carrying`."""
    if not router.enabled:
        return
    batch, time = inputs.shape[:2]
    call.layer = thread.carried
    if call.layer is not None and time > router.segment_length:
        raise ValueError(
            f"a call of {time} tokens is longer than the segment of {router.segment_length}; an encoder reads one "
            "segment a call: use Session.read, which cuts the text"
        )
    mask = arguments.get("attention_mask")
    call.keep = mask.bool() if mask is not None and mask.ndim == 2 else None
    _bring_stream(router, call, batch)
    assert call.stream is not None
    call.pieces = [Piece(0, time, (), tuple(range(batch)))]
    call.states = [call.stream.state]
    behind = router.memory.tokens_behind(call.stream.state) if router.memory.beside else None
    if behind is not None:
        call.beside = Beside(None, behind, time)
        count = call.beside.width - time
        arguments["position_ids"] = encoder_positions(trunk, arguments, time, count)
        if mask is not None:
            arguments["attention_mask"] = torch.cat([mask, mask.new_ones(batch, count)], 1)
        if (kinds := arguments.get("token_type_ids")) is not None:
            arguments["token_type_ids"] = torch.cat([kinds, kinds.new_zeros(batch, count)], 1)
        words = _embedded(router, trunk, arguments)
        arguments["inputs_embeds"] = torch.cat([words, behind.embeddings.to(words)], 1)


def _bring_stream(router: Router, call: Call, batch: int) -> None:
    """The stream that the cache carries, checked, or a new one."""
    stream = call.layer.stream if call.layer is not None else None
    if stream is None:
        stream = router.new_stream(batch)
        stream = stream if call.layer is None else call.layer.begin(stream)
    check_batch(stream.batch, batch)
    if stream.waiting.device != router.device:
        raise ValueError(
            f"the cache's stream is on {stream.waiting.device}, the memory on {router.device}; move the model first, "
            "then make or load the session"
        )
    width = waiting_width(router.memory, router.width)
    if stream.waiting.shape[-1] != width:
        raise ValueError(
            f"the cache's stream keeps {stream.waiting.shape[-1]} values of a token, this model's memory {width}; "
            "use a cache of this model"
        )
    call.before = call.stream = stream


def _own_cache(router: Router, call: Call, arguments: dict[str, Any], wanted: bool) -> MemoryCache:
    """The cache for a memory with tokens beside its segments: the caller's own turned into one, or a new one."""
    given, cache = arguments.get(router.cache_name), router.new_cache(router.config.window or router.segment_length)
    if given is None:
        call.private_cache = not wanted
    elif type(given) is DynamicCache and not given.get_seq_length():
        cache.take_over(given)
        cache = cast(MemoryCache, given)
    else:
        raise ValueError(
            f"a memory with tokens beside its segments cannot join a {type(given).__name__} of "
            f"{int(given.get_seq_length())} tokens; pass {router.cache_name}=mnemic.memory_cache(model)"
        )
    arguments[router.cache_name], arguments["use_cache"] = cache, True
    return cache


def _add_tokens(router: Router, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> None:
    """Puts memory tokens before the words of rows that begin a segment, and behind those of rows that end one."""
    stream, (piece,), memory, cache = call.stream, call.pieces, router.memory, call.cache
    assert stream is not None
    assert isinstance(cache, MemoryCache)
    assert cache.window is not None
    batch, device = stream.batch, router.device
    keep = torch.ones(batch, call.time, dtype=torch.bool, device=device) if call.keep is None else call.keep
    begun = [count > 0 for count in stream.counts]
    if call.wordless is not None:
        begins = torch.tensor([row in call.wordless.beginning for row in range(batch)], device=device)
    else:
        begins = ~torch.tensor(begun, device=device) & keep.any(1)
        if router.slides and bool(begins.any()) and _leaves_gap(memory.tokens_before(stream.state), begins, any(begun)):
            # layers that count keys as they lie bear no gap between a row's keys: these tokens go ahead, and are
            # packed against the words
            router.run_wordless(trunk, cache, Wordless(beginning=tuple(begins.nonzero().flatten().tolist())))
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
    beside, embeddings = Beside.join(_embedded(router, trunk, arguments), keep, (before, begins), (behind, ends))
    beside.apart = (
        before is not None
        and behind is None
        and call.time > 0
        and len(before.inputs) == router.depth
        and not call.checkpointing
        and trunk.config._attn_implementation in ("sdpa", "eager")  # pyright: ignore
        and not compiled_inside(trunk)
    )
    call.beside, arguments["inputs_embeds"] = beside, embeddings


def _leaves_gap(tokens: MemoryTokens | None, begins: Tensor, begun: bool) -> bool:
    """Whether rows would have columns of these tokens without one of their own: rows that are in the middle of a
    segment, or begin one with fewer than others.
    """
    if tokens is None:
        return False
    return begun or (tokens.keep is not None and not bool(tokens.keep[begins].all()))


def _embedded(router: Router, trunk: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The call's words as embeddings, which memory tokens can join."""
    words, ids = arguments.get("inputs_embeds"), arguments.pop("input_ids", None)
    return trunk.get_input_embeddings()(ids) if words is None else words  # pyright: ignore


def _refuse_packed(router: Router) -> NoReturn:
    reads, writes = (", ".join(map(str, sites)) for sites in (router.memory.hidden_reads, router.memory.writes))
    why = f"{router.memory.beside} memory tokens" if router.memory.beside else f"reads {reads}, writes {writes}"
    raise ValueError(
        "packed documents need every read at the write or after it and no memory tokens beside a segment "
        f"(here {why}); pass one document a row"
    )
