"""What a session's file may hold: checked before anything is loaded, and before anything is written.

A checksum tells of accidents. Whoever can write a file can write its checksum too, so nothing in one is believed: the
description's types, the names, shapes and dtypes of the tensors, and the numbers that point into them. What is to be
written must pass the same checks, so that no good version is replaced by one that nobody can load.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mnemic.attachment import check_unedited, config_of, memory_cache, router_of
from mnemic.bank import filled
from mnemic.chunks import Lying
from mnemic.history import Log
from mnemic.host.anatomy import examine
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache
from mnemic.host.release import DynamicLayer
from mnemic.host.router import Router
from mnemic.packing import CODES, parts
from mnemic.state import State, StateError, check_range, is_finite
from mnemic.stream import waiting_width

NOTES = 2**20
"""Most bytes of an owner's notes, as JSON."""
MOST = 2**62
"""Beyond any number of tokens that were read."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of hidden states and keys beside the model's own: under autocast they are not the weights'."""
HISTORY = {f"history.{name}" for name in Log(text=()).tensors()}
SCALES = {f"bank.{parts(name, 'int8')[1]}" for name in ("keys", "values")}
BANK = {"bank.keys", "bank.values", *SCALES, "bank.positions", "bank.chosen"}
STREAM, WINDOW = ("counts", "written", "seen"), ("context", "running", "position")

Kind = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""The shape a tensor must have, and the dtypes it may."""


def check_description(meta: Mapping[str, Any], source: object) -> None:
    """Raises `StateError` unless the description has a session's fields, each of its type."""
    if meta.get("content") != "session":
        raise StateError(f"{source} holds {repr(meta.get('content'))[:80]}, not a session")
    fields = {
        "window": meta.get("window") is None or _count(meta["window"]),
        "sinks": _count(meta.get("sinks", 0)),
        "memory": isinstance(meta.get("memory"), dict),
        "memory_fingerprint": isinstance(meta.get("memory_fingerprint"), str),
        "keep_text": type(meta.get("keep_text", False)) is bool,
        "keep_keys": meta.get("keep_keys", True) is True
        or (meta["keep_keys"] is False and meta.get("keep_text") is True),
        "notes": _are_notes(meta.get("notes", {})),
        "base_fingerprint": isinstance(meta.get("base_fingerprint"), str),
        "base_model": meta.get("base_model") is None or isinstance(meta["base_model"], str),
        "stream": meta.get("stream") is None or _ledger(meta["stream"], STREAM),
        "running": meta.get("running") is None or _ledger(meta["running"], WINDOW),
    }
    if missing := sorted(
        fields.keys() - meta.keys() - {"sinks", "keep_text", "keep_keys", "notes", "stream", "running"}
    ):
        raise StateError(
            f"{source} does not say {', '.join(missing)}, which every session does; restore it from a copy"
        )
    if unknown := sorted(meta.keys() - {"content", *fields}):
        raise StateError(
            f"{source} says {', '.join(unknown)[:200]!r}, which this release of mnemic does not know: it was written "
            "by a later one, or is damaged"
        )
    if wrong := [name for name, right in fields.items() if not right]:
        said = ", ".join(f"{name} is {str(meta.get(name))[:80]!r}" for name in wrong)
        raise StateError(f"{source} has a description of the wrong kind: {said}; restore it from a copy")


def check_contents(
    tensors: State, meta: Mapping[str, Any], model: nn.Module, source: object, chunks: Sequence[Lying] = ()
) -> None:
    """Raises `StateError` unless the tensors, and those of the bank's first tokens that lie in `chunks`, are such as
    `model` and its memory make in a session with the meta's window. `meta` has passed `check_description`. The numbers
    in chunks are not read for that, and left to `check_kept`.
    """
    try:
        _check_fit(tensors, meta, model, key_shapes, [each.tensors for each in chunks])
    except StateError as error:
        raise StateError(f"{source} does not fit this model and its memory: {error}; restore it from a copy") from error


def check_written(tensors: State, meta: Mapping[str, Any], model: nn.Module, chunks: Sequence[State] = ()) -> None:
    """Raises `StateError` for a session that could not be loaded again, whatever its model or its owner did to it. The
    numbers in `chunks`, `[l, k, n, ...]` of its bank's first tokens, are not read for that.
    """

    def own(_: nn.Module) -> dict[str, tuple[int, int]]:
        # as the base has just made them: it need not run for this
        found = {name: (tensor.shape[1], tensor.shape[3]) for name, tensor in tensors.items() if _is_key(name)}
        kept = chunks[0] if chunks else {name[5:]: tensors[name][0] for name in tensors if name.startswith("bank.")}
        for layer in router_of(model).attended if "keys" in kept else ():
            for kind in ("keys", "values"):
                found.setdefault(f"{kind}.{layer}", (kept[kind].shape[1], kept[kind].shape[3]))
        return found

    try:
        check_description(meta, "it")
        check_unedited(router_of(model))
        if meta["window"] is not None:
            memory_cache(model, meta["window"], meta.get("sinks", 0))
        _check_fit(tensors, meta, model, own, chunks)
    except ValueError as error:
        raise StateError(f"this session could not be loaded again: {error}. Nothing was written") from error


def check_bytes(tensors: State, meta: Mapping[str, Any], source: object) -> None:
    """Raises `StateError` for what cannot be a session, as far as that can be told without a model."""
    check_description(meta, source)
    config = config_of(meta["memory"], source)
    try:
        _check_history(tensors, meta)
        if unknown := sorted(name for name in tensors if not _has_place(name, meta)):
            raise StateError(f"nothing here keeps {', '.join(unknown)[:200]!r}")
        if lacking := _lacking(tensors, meta):
            raise StateError(f"it lacks {lacking}")
        check_kept(tensors)
        _check_numbers(tensors, meta, config.segment_length)
    except StateError as error:
        raise StateError(f"{source} is no session that could be loaded: {error}") from error


def _lacking(tensors: State, meta: Mapping[str, Any]) -> str | None:
    """What the description tells of and is not there, as far as that can be told without a model."""
    if meta.get("stream") is not None and "waiting" not in tensors:
        return "waiting"
    if meta.get("running") is not None:
        if "window.valid" not in tensors:
            return "window.valid"
        kept, text = tensors["window.valid"].numel(), tensors.get("history.text")
        reread = meta.get("keep_keys", True) is False and text is not None and text.numel() >= kept
        if kept and not any(map(_is_key, tensors)) and not reread:
            return "the keys of its window"
    return None


def _check_fit(
    tensors: State,
    meta: Mapping[str, Any],
    model: nn.Module,
    keys: Callable[[nn.Module], dict[str, tuple[int, int]]],
    chunks: Sequence[State],
) -> None:
    """Raises `StateError` unless tensors, chunks and counts are such as the model and its memory make; `keys` gives the
    heads and width of the keys and values.
    """
    router = router_of(model)
    _check_history(tensors, meta)
    if (meta["window"] is None) is router.causal:
        raise StateError(f"its window is {meta['window']}; decoders have one, encoders have none")
    expected = _stream(tensors, meta, router) | _window(tensors, meta, model, keys)
    expected |= _bank(tensors, meta, model, keys, chunks)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in HISTORY}
    _check_kinds(tensors, expected)
    check_kept(tensors)
    _check_numbers(tensors, meta, router.segment_length)
    if (stream := meta.get("stream")) is not None:
        state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
        router.memory.check_state(state, stream["written"][0])
        if (ids := tensors.get("ids")) is not None:
            embeddings: Any = examine(model).trunk.get_input_embeddings()
            check_range("ids", ids, 0, embeddings.weight.shape[0] - 1)
        positions = tensors.get("bank.positions")
        _check_in_order("positions", positions, stream["seen"][0])
        _check_in_order("chosen tokens", tensors.get("bank.chosen"), 0 if positions is None else positions.numel())
    if (running := meta.get("running")) is not None:
        position, limit = running["position"][0], router.new_cache(meta["window"], meta.get("sinks", 0)).settings[2]
        if limit is not None and position > limit:
            raise StateError(f"the next key of its window stands at position {position} of {limit}")


def _check_kinds(tensors: State, expected: Mapping[str, Kind]) -> None:
    """Raises `StateError` for tensors of other names, shapes or dtypes."""
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise StateError(f"nothing here keeps {', '.join(unknown)[:200]!r}")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise StateError(f"it lacks {', '.join(missing)}")
    for name, (shape, dtypes) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            found = f"{list(tensor.shape)} of {tensor.dtype}"
            raise StateError(f"{name} is {found}, here it would be {list(shape)} of {dtypes[0]}")


def _bank(
    tensors: State,
    meta: Mapping[str, Any],
    model: nn.Module,
    keys: Callable[[nn.Module], dict[str, tuple[int, int]]],
    chunks: Sequence[State],
) -> dict[str, Kind]:
    """What a session's bank is made of, beside `chunks`: nothing before keys have left the window, or where none are
    kept.
    """
    router = router_of(model)
    if meta.get("stream") is None or not router.memory.keeps or not (chunks or BANK & tensors.keys()):
        if chunks:
            raise StateError(f"its bank has {len(chunks)} chunks, and none is kept here")
        return {}
    count = tensors["bank.positions"].numel() if "bank.positions" in tensors else 0
    if count > meta["stream"]["seen"][0]:
        raise StateError(f"its bank has {count} tokens, and {meta['stream']['seen'][0]} were read")

    def kinds(room: int) -> dict[str, Kind]:
        """Of so many tokens."""
        found, stored = {}, router.memory.stored
        for kind in ("keys", "values"):
            heads, width = keys(model)[f"{kind}.{router.attended[0]}"]
            numbers, *scale = (f"bank.{part}" for part in parts(kind, stored))
            dtypes = (router.dtype, *FLOATS) if stored == "base" else (CODES[stored],)
            found[numbers] = ((len(router.attended), heads, room, width), dtypes)
            found |= {name: ((len(router.attended), heads, room, 1), (torch.float32,)) for name in scale}
        return found

    left, expected = count, {}
    for chunk in chunks:
        first = chunk[min(chunk)]
        room = first.shape[2] if first.ndim == 4 else 0
        # whole `LEAST` tokens, of which the last may have zeros behind them, or as they once were written, without
        if not 0 < room <= filled(left) or room not in (filled(room), left):
            raise StateError(f"a chunk of its bank is {list(first.shape)}, where {left} of {count} tokens are left")
        _check_kinds({f"bank.{name}": tensor for name, tensor in chunk.items()}, kinds(room))
        left -= room
    if left > 0 or not chunks:
        kept, room = tensors.get("bank.keys"), filled(left)
        if kept is None or kept.ndim != 5 or kept.shape[3] != room:  # likewise
            room = left
        expected |= {name: ((1, *shape), dtypes) for name, (shape, dtypes) in kinds(room).items()}
    if (chosen := tensors.get("bank.chosen")) is not None:
        heads, _ = keys(model)[f"keys.{router.attended[0]}"]
        size = chosen.shape[-1] if chosen.ndim else 0
        expected["bank.chosen"] = ((1, len(router.attended), heads, size), (torch.long,))
    return expected | {"bank.positions": ((1, count), (torch.long,))}


def check_kept(tensors: State) -> None:
    """Raises `StateError` for numbers that are not finite, and scales of packed keys and values below 0."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise StateError(f"{name} is NaN or infinite somewhere")
    for name in sorted(SCALES & tensors.keys()):
        if tensors[name].numel() and (least := float(tensors[name].min())) < 0:
            raise StateError(f"{name} goes down to {least:g}, and scales are 0 or more")


def _check_in_order(name: str, numbers: torch.Tensor | None, count: int) -> None:
    """Raises `StateError` for numbers of tokens that are not in order among `count` of them."""
    if numbers is not None and numbers.numel():
        in_order = bool((numbers.diff() > 0).all())
        if not in_order or int(numbers.min()) < 0 or int(numbers.max()) >= count:
            raise StateError(f"the {name} in its bank are not in order among the {count} tokens that they are of")


def _is_key(name: str) -> bool:
    return name.startswith(("keys.", "values."))


def _has_place(name: str, meta: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to something that the description tells of."""
    if name == "window.valid" or _is_key(name):
        return meta.get("running") is not None
    of_stream = name in ("waiting", "ids") or name in BANK or name.startswith("state.")
    return name in HISTORY or (meta.get("stream") is not None and of_stream)


def _are_notes(value: object) -> bool:
    """Whether it is a dictionary that is the same when it was written as JSON and read again, and not too large."""
    try:
        text = json.dumps(value, allow_nan=False)
        return isinstance(value, dict) and len(text) <= NOTES and json.loads(text) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < MOST


def _ledger(value: object, names: tuple[str, ...]) -> bool:
    """Whether it has these names, each with one count for the one row of a session."""
    return (
        isinstance(value, dict)
        and value.keys() == set(names)
        and all(isinstance(one, list) and len(one) == 1 and _count(one[0]) for one in value.values())
    )


def _stream(tensors: State, meta: Mapping[str, Any], router: Router) -> dict[str, Kind]:
    """What a session's stream is made of: nothing before the first token."""
    if meta.get("stream") is None:
        return {}
    waiting = (1, meta["stream"]["counts"][0], waiting_width(router.memory, router.width))
    expected: dict[str, Kind] = {"waiting": (waiting, (router.dtype, *FLOATS))}
    if router.memory.takes_ids:
        expected["ids"] = (waiting[:2], (torch.long,))
    for name, first in router.memory.init_state(1).items():
        found = tensors.get(f"state.{name}", first)
        sizes = found.shape if found.ndim == first.ndim else first.shape
        # dimensions that grow begin at 0
        shape = tuple(size or grown for size, grown in zip(first.shape, sizes, strict=True))
        expected[f"state.{name}"] = (shape, (first.dtype,))
    return expected


def _window(
    tensors: State,
    meta: Mapping[str, Any],
    model: nn.Module,
    keys: Callable[[nn.Module], dict[str, tuple[int, int]]],
) -> dict[str, Kind]:
    """What a session's window is made of: the base's keys, where it has any."""
    if meta.get("running") is None:
        return {}
    router = router_of(model)
    if not router.causal:
        raise StateError(f"{type(model).__name__} is an encoder and keeps no keys")
    kept = tensors["window.valid"].shape[-1] if "window.valid" in tensors and tensors["window.valid"].ndim else 0
    expected: dict[str, Kind] = {"window.valid": ((1, kept), (torch.bool,))}
    if kept and meta.get("keep_keys", True) is False and not any(_is_key(name) for name in tensors):
        _check_rereading(tensors.get("history.text"), kept, meta, model)
    elif kept:
        for name, (heads, width) in keys(model).items():
            expected[name] = ((1, heads, kept, width), (router.dtype, *FLOATS))
    return expected


def _check_rereading(text: torch.Tensor | None, kept: int, meta: Mapping[str, Any], model: nn.Module) -> None:
    """Raises `StateError` where `kept` keys of a window are not there and could not be made from the text."""
    router = router_of(model)
    seen = meta["stream"]["seen"][0] if meta.get("stream") is not None else 0
    sinks = min(meta.get("sinks", 0), kept)
    ids = None if text is None or not kept <= text.numel() == seen else text
    ids = None if ids is None else torch.cat([ids[:sinks], ids[seen - kept + sinks :]])
    if ids is None or bool((ids < 0).any()) or router.memory.beside or router.segment_length < 2:
        raise StateError(f"it has neither the {kept} keys of its window nor the text that they could be made from")
    if kept > meta["window"]:
        raise StateError(f"its window of {meta['window']} cannot hold {kept} tokens")
    embeddings: Any = examine(model).trunk.get_input_embeddings()
    if (highest := int(ids.max())) >= (known := embeddings.weight.shape[0]):
        raise StateError(f"token {highest} is in its window, and the model knows {known}")


def keys_of(cache: MemoryCache) -> State:
    """The keys and values that a cache holds, by their names in a file."""
    held: State = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None:
            assert layer.values is not None
            held |= {f"keys.{index}": layer.keys, f"values.{index}": layer.values}
    return held


_key_shapes: weakref.WeakKeyDictionary[Router, dict[str, tuple[int, int]]] = weakref.WeakKeyDictionary()


def key_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Heads and width of the keys and values of every block, by their names in a file.

    Families differ in both, and in which blocks have keys, so one token is run through the base, once for a model.
    """
    router = router_of(model)
    if router not in _key_shapes:
        device = router.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            cache = memory_cache(model)
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            examine(model).trunk(input_ids=ids, **with_cache(examine(model).trunk, cache))
        shapes = {name: (tensor.shape[1], tensor.shape[3]) for name, tensor in keys_of(cache).items()}
        if not shapes:
            raise StateError("the model keeps no keys now (gradient checkpointing in training); call model.eval()")
        _key_shapes[router] = shapes
    return _key_shapes[router]


def _check_history(tensors: State, meta: Mapping[str, Any]) -> None:
    """Raises `StateError` where a history is none, or its text not what the description says."""
    history = {name[8:]: tensor for name, tensor in tensors.items() if name in HISTORY}
    if not history:
        return  # a file of before there were histories
    Log.of(history)
    text, keeps = history.get("text"), meta.get("keep_text", False)
    seen = meta["stream"]["seen"][0] if meta.get("stream") else 0
    if (text is not None) is not keeps:
        raise StateError(f"keep_text is {keeps}, and its history has {'no ' if text is None else ''}text")
    if text is not None and text.numel() > seen:
        raise StateError(f"it has {text.numel()} tokens of text, and {seen} were read")


def _check_numbers(tensors: State, meta: Mapping[str, Any], length: int) -> None:
    """Raises `StateError` for counts that do not fit each other or the tensors, with segments of `length` tokens."""
    if (stream := meta.get("stream")) is not None:
        counts, written, seen = (stream[name][0] for name in STREAM)
        if counts >= length or not written + counts <= seen <= written * length + counts:
            raise StateError(
                f"{seen} tokens cannot be {written} segments of at most {length} and {counts} that wait for the next"
            )
    if (running := meta.get("running")) is not None:
        context, begun, position = (running[name][0] for name in WINDOW)
        there = int(tensors["window.valid"].sum()) if "window.valid" in tensors else 0
        if context != there or begun >= length or position < context:
            raise StateError(
                f"a window of {context} keys, of which {there} are there, {begun} of them in the running segment of "
                f"{length}, and the next at position {position}, cannot be"
            )
