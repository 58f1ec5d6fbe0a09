"""The plan of a call: which cache it rides, which tokens are padding, where its segments end. And what each pass of it
gives to the base: with a `MemoryCache` its window, and memory tokens beside the words.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from mnemic.host.arguments import check_batch, document_starts, flat_mask, kept_tokens, part_of, refined
from mnemic.host.beside import Beside, Wordless, encoder_positions
from mnemic.host.cache import MemoryCache, MemoryLayer, memory_layer, snapshot
from mnemic.host.call import Call, Pass, Plan, eager, thread
from mnemic.host.release import CHECKPOINTS_WITHOUT_GRADIENT, Cache, DynamicCache
from mnemic.host.sites import attention
from mnemic.host.wrappers import compiled_inside
from mnemic.memory import MemoryTokens
from mnemic.stream import Piece, Stream, cut, waiting_width

if TYPE_CHECKING:
    from mnemic.host.router import Router


@eager
def planned(router: Router, trunk: Any, given: dict[str, Any], undo: contextlib.ExitStack) -> Plan:
    """The plan of a call. What takes back what it does to a cache is left in `undo`."""
    wordless, thread.wordless = thread.wordless, None
    arguments, enabled = dict(given), router.enabled
    inputs = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
    if inputs is None or inputs.shape[0] == 0 or (inputs.shape[1] == 0 and wordless is None):
        shape = None if inputs is None else list(inputs.shape[:2])
        raise ValueError(f"the input is empty (shape {shape}); pass at least one row and one token")
    batch, time = inputs.shape[:2]
    if enabled and router.memory.takes_ids and arguments.get("input_ids") is None and wordless is None:
        raise ValueError(
            f"{type(router.memory).__name__} has to know which tokens it reads, and inputs_embeds do not say; call "
            "with input_ids"
        )
    plan = Plan(arguments, batch, time, (Pass(0, time, ()),), wordless=wordless)
    if not router.causal:
        return _of_encoder(router, plan) if enabled else plan

    # what it rides
    cache, private = arguments.get(router.cache_name), False
    if enabled and cache is not None and not isinstance(cache, Cache):
        refuse_paged(type(cache).__name__)
    checkpointing = (
        trunk.training
        and (torch.is_grad_enabled() or CHECKPOINTS_WITHOUT_GRADIENT)
        and any(getattr(m, "gradient_checkpointing", False) for m in trunk.modules())
    )
    wanted = arguments.get("use_cache")
    wanted = getattr(trunk.config, "use_cache", False) if wanted is None else wanted
    packed = document_starts(arguments, time) if cache is None else None
    if enabled and router.memory.beside and not isinstance(cache, MemoryCache):
        if packed is not None:
            _refuse_packed(router)
        private = cache is None and not wanted
        cache = _own_cache(router, arguments)
    if cache is None and wanted and not checkpointing and packed is None and enabled:
        cache = arguments[router.cache_name] = DynamicCache(config=trunk.config)
    cache = cache if isinstance(cache, Cache) else None
    if cache is not None:
        undo.callback(cache.snapshot() if isinstance(cache, MemoryCache) else snapshot(cache))
    window = None
    if isinstance(cache, MemoryCache):
        window = cache.open(batch, inputs.device)
        check_batch(len(window.context), batch)
    plan = replace(plan, cache=cache, checkpointing=checkpointing, private_cache=private)
    if window is None and not enabled:
        return plan

    # what of it is real, and where it is cut
    keep = kept_tokens(arguments.get("attention_mask"), time, cache)
    keep = None if keep is None or bool(keep.all()) else keep
    closing: dict[int, tuple[int, ...]] = {}
    cuts: set[int] = set()
    if window is not None:
        closing = {piece.stop: piece.ended for piece in cut(window.running, time, router.segment_length, keep)}
        cuts = set(closing)
        if router.slides and keep is not None:
            # padding may end a part but not lie between a row's tokens: the next part is packed against its keys
            cuts |= {t + 1 for t in (keep[:, 1:] & ~keep[:, :-1]).any(0).nonzero().flatten().tolist()}
    layer = memory_layer(cache, router.depth) if cache is not None and enabled else None
    stream = _stream(router, layer, batch) if enabled else None
    if wordless is not None and stream is not None:
        pieces, closing = [Piece(0, 0, (), wordless.ending)], {0: wordless.ending}
    else:
        whole = cut(stream.counts, time, router.segment_length, keep, packed) if stream else [Piece(0, time)]
        pieces = refined(whole, cuts)
    plan = replace(plan, keep=keep, layer=layer, stream=stream)
    if len(pieces) == 1 or not _goes_by_segment(router, plan, pieces):
        return replace(plan, passes=(Pass(0, time, tuple(pieces), closing.get(time, ())),))

    # a piece can only run when the one before it is written
    if cache is None:
        cache = arguments[router.cache_name] = DynamicCache(config=trunk.config)
        arguments["use_cache"], layer = True, memory_layer(cache, router.depth)
        plan = replace(plan, cache=cache, layer=layer, private_cache=True)
    attentions = arguments.get("output_attentions")
    if trunk.config.output_attentions if attentions is None else attentions:
        raise ValueError(
            "attention weights cannot be joined across segments; call without output_attentions, or a segment a call"
        )
    seen = int(cache.get_seq_length())  # a static cache counts in place
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict) or cache.is_compileable:
        # masks made for the whole call do not fit its parts; from a flat one the trunk makes its own
        arguments["attention_mask"] = flat_mask(mask, time, cache)
    passes = []
    for each in pieces:
        own = Piece(0, each.stop - each.start, each.fresh, each.ended)
        passes.append(Pass(each.start, each.stop, (own,), closing.get(each.stop, ())))
    return replace(plan, passes=tuple(passes), seen=seen)


@eager
def opened(router: Router, trunk: Any, plan: Plan, number: int) -> Call:
    """One pass of a plan, when those before it have run."""
    now, alone = plan.passes[number], len(plan.passes) == 1
    arguments = dict(plan.arguments) if alone else part_of(plan.arguments, now.start, now.stop, plan.seen, plan.time)
    keep = None if plan.keep is None else plan.keep[:, now.start : now.stop]
    keep = None if keep is None or bool(keep.all()) else keep
    stream = plan.layer.stream if number and plan.layer is not None else plan.stream
    call = Call(router, plan, number, arguments, keep, stream, stream, [stream.state] if stream else [])
    if isinstance(plan.cache, MemoryCache):
        assert plan.cache.window is not None
        if plan.checkpointing and plan.cache.window.kept:
            raise ValueError(
                "gradient checkpointing drops the base's keys between calls; feed whole segments with "
                f"window=segment_length ({router.segment_length}), or turn checkpointing off"
            )
        if router.attended and router.enabled:
            attention.check_asked(router, call, trunk)
        _arrange(router, call, trunk)
    elif not router.causal and stream is not None:
        _add_behind(router, call, trunk)
    return call


def refuse_paged(*cache: object, **settings: object) -> NoReturn:
    """Raises `ValueError`: a paged cache holds keys of many requests in one row, and nothing of their streams."""
    kind = cache[0] if cache else "paged cache (generate_batch, continuous batching)"
    raise ValueError(
        f"a {kind} carries no memory; use mnemic.batch([session, ...]).generate(...) or model.generate, or detach the "
        "memory first"
    )


def _goes_by_segment(router: Router, plan: Plan, pieces: list[Piece]) -> bool:
    """Whether a piece can only run when the one before it is written."""
    if not router.enabled or isinstance(plan.cache, MemoryCache):
        return True
    if not router.memory.writes_see_reads:
        return False
    if any(piece.fresh for piece in pieces):
        _refuse_packed(router)
    if plan.checkpointing:
        raise ValueError(
            "gradient checkpointing drops the base's keys, which reads before the write need from segment to "
            "segment; feed whole segments through a MemoryCache with window=segment_length, or turn it off"
        )
    return True


def _arrange(router: Router, call: Call, trunk: Any) -> None:
    """Gives the base its window: mask and positions of what is physically there."""
    cache, arguments = call.cache, call.arguments
    assert isinstance(cache, MemoryCache)
    assert cache.window is not None
    if router.slides and not cache.window.packed:
        cache.pack()
    if router.enabled and router.memory.beside:
        _add_tokens(router, call, trunk)
    keep, width = (call.keep, call.time) if call.beside is None else (call.beside.keep, call.beside.width)
    mask, positions = cache.window.arrange(keep, width)
    if router.enabled and router.memory.span is not None:
        mask = cache.window.band(keep, width, router.memory.span, router.dtype)
    arguments["attention_mask"] = mask
    arguments["use_cache"] = True
    if router.takes_positions:
        arguments["position_ids"] = positions
    cache.inside = True


def _of_encoder(router: Router, plan: Plan) -> Plan:
    """An encoder sees both ways, so one call is one segment; its stream is carried by `carrying`."""
    layer, time = thread.carried, plan.time
    if layer is not None and time > router.segment_length:
        raise ValueError(
            f"a call of {time} tokens is longer than the segment of {router.segment_length}; an encoder reads one "
            "segment a call: use Session.read, which cuts the text"
        )
    mask = plan.arguments.get("attention_mask")
    keep = mask.bool() if mask is not None and mask.ndim == 2 else None
    whole = Pass(0, time, (Piece(0, time, (), tuple(range(plan.batch))),))
    return replace(plan, keep=keep, layer=layer, stream=_stream(router, layer, plan.batch), passes=(whole,))


def _add_behind(router: Router, call: Call, trunk: Any) -> None:
    """Puts memory tokens behind the words of an encoder."""
    assert call.stream is not None
    arguments, time, batch = call.arguments, call.time, call.plan.batch
    behind = router.memory.tokens_behind(call.stream.state) if router.memory.beside else None
    if behind is None:
        return
    call.beside = Beside(None, behind, time)
    count = call.beside.width - time
    arguments["position_ids"] = encoder_positions(trunk, arguments, time, count)
    for name, ones in (("attention_mask", 1), ("token_type_ids", 0)):
        if (given := arguments.get(name)) is not None:
            arguments[name] = torch.cat([given, given.new_full((batch, count), ones)], 1)
    words = _embedded(trunk, arguments)
    arguments["inputs_embeds"] = torch.cat([words, behind.embeddings.to(words)], 1)


def _stream(router: Router, layer: MemoryLayer | None, batch: int) -> Stream:
    """The stream that is carried, checked, or a new one."""
    stream = layer.stream if layer is not None else None
    if stream is None:
        stream = router.new_stream(batch)
        stream = stream if layer is None else layer.begin(stream)
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
    return stream


def _own_cache(router: Router, arguments: dict[str, Any]) -> MemoryCache:
    """The cache for a memory with tokens beside its segments: the caller's own turned into one, or a new one."""
    given, cache = arguments.get(router.cache_name), router.new_cache(router.config.window or router.segment_length)
    if type(given) is DynamicCache and not given.get_seq_length():
        cache.take_over(given)
        cache = cast(MemoryCache, given)
    elif given is not None:
        raise ValueError(
            f"a memory with tokens beside its segments cannot join a {type(given).__name__} of "
            f"{int(given.get_seq_length())} tokens; pass {router.cache_name}=mnemic.memory_cache(model)"
        )
    arguments[router.cache_name], arguments["use_cache"] = cache, True
    return cache


def _add_tokens(router: Router, call: Call, trunk: Any) -> None:
    """Puts memory tokens before the words of rows that begin a segment, and behind those of rows that end one."""
    stream, (piece,), memory, cache = call.stream, call.pieces, router.memory, call.cache
    wordless, arguments = call.plan.wordless, call.arguments
    assert stream is not None
    assert isinstance(cache, MemoryCache)
    assert cache.window is not None
    batch, device = stream.batch, router.device
    keep = torch.ones(batch, call.time, dtype=torch.bool, device=device) if call.keep is None else call.keep
    begun = [count > 0 for count in stream.counts]
    if wordless is not None:
        begins = torch.tensor([row in wordless.beginning for row in range(batch)], device=device)
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
    beside, embeddings = Beside.join(_embedded(trunk, arguments), keep, (before, begins), (behind, ends))
    beside.apart = (
        before is not None
        and behind is None
        and call.time > 0
        and len(before.inputs) == router.depth
        and not call.plan.checkpointing
        and trunk.config._attn_implementation in ("sdpa", "eager")
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


def _embedded(trunk: Any, arguments: dict[str, Any]) -> Tensor:
    """The call's words as embeddings, which memory tokens can join."""
    words, ids = arguments.get("inputs_embeds"), arguments.pop("input_ids", None)
    return trunk.get_input_embeddings()(ids) if words is None else words


def _refuse_packed(router: Router) -> NoReturn:
    reads, writes = (", ".join(map(str, sites)) for sites in (router.memory.hidden_reads, router.memory.writes))
    why = f"{router.memory.beside} memory tokens" if router.memory.beside else f"reads {reads}, writes {writes}"
    raise ValueError(
        "packed documents need every read at the write or after it and no memory tokens beside a segment "
        f"(here {why}); pass one document a row"
    )
