"""What is kept of a session: as named tensors and a description of plain values, and a session made of them again."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mnemic import folders
from mnemic.attachment import check_fingerprint, check_settings, router_of
from mnemic.bank import Bank, Chunk, filled
from mnemic.checks import check_contents, check_description, check_kept, keys_of
from mnemic.chunks import UNITS, Lying, Units, cut
from mnemic.history import Log
from mnemic.host.anatomy import fingerprint
from mnemic.host.cache import Window
from mnemic.host.release import DynamicLayer
from mnemic.host.remembered import remembered
from mnemic.host.router import Router
from mnemic.host.wrappers import unwrapped, whole
from mnemic.mapping import Mapped, map_file
from mnemic.memory import Further
from mnemic.rereading import reread, window_ids
from mnemic.spilling import Spill
from mnemic.state import State, StateError
from mnemic.stream import Stream

if TYPE_CHECKING:
    from mnemic.session import Session


def contents(session: Session) -> tuple[State, dict[str, Any]]:
    """All that is kept. Zeros behind the bank's tokens fill its last chunk, so that a file can be mapped."""
    tensors, meta, bank = _contents(session)
    kept = bank.tensors(whole=True) if bank is not None else {}
    return tensors | {f"bank.{name}": tensor for name, tensor in kept.items()}, meta


def parted(session: Session) -> tuple[State, dict[str, Any], Units]:
    """What is kept as a head and the bank's units (`mnemic.chunks`)."""
    tensors, meta, bank = _contents(session)
    head, units = cut(bank or Bank(), check_kept)
    return tensors | head, meta, units


def _contents(session: Session) -> tuple[State, dict[str, Any], Bank | None]:
    """What is kept, its bank apart. The tensors: the stream's; where keys are kept that left the window, `bank.keys`
    and `bank.values` `[1, blocks, heads, n, width]` and `bank.positions [1, n]`, which are the callers' to add, and
    `bank.chosen [1, blocks, heads, c]` where the next tokens share what was chosen of them; `history.*`; of the window
    `window.valid [1, kept]` and, unless its tokens can be read again and are to be, `keys.*` and `values.*` `[1, heads,
    kept, width]` in the base's dtype.
    """
    if session._layer.off:
        raise StateError(
            "tokens were read while the memory was off, and a session of such a memory could not go on from its file; "
            "save before that, or do such things with session.fork()"
        )
    tensors, meta, bank = {}, _description(session), None
    if session.stream is not None:
        stream = session.stream.detach()
        tensors |= stream.tensors()
        if (bank := stream.banks[0]) is not None:
            tensors |= _chosen(stream.held[0])
        if (log := stream.logs[0]) is not None:
            tensors |= {f"history.{name}": tensor for name, tensor in log.tensors().items()}
        counts = {"counts": stream.counts, "written": stream.written, "seen": stream.seen}
        meta["stream"] = {name: list(values) for name, values in counts.items()}
    if session._cache is not None and (window := session._cache.window) is not None:
        counts = {"context": window.context, "running": window.running, "position": window.position}
        meta["running"] = {name: list(values) for name, values in counts.items()}
        if _ids_of_window(session) is None:
            tensors |= {"window.valid": window.valid} | keys_of(session._cache)
        else:
            tensors["window.valid"] = window.valid.new_ones(1, window.context[0])
    return tensors, meta, bank


def opened(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any], list[Lying]]:
    """What lies in a file or in a folder: a head, and the bank's tokens that are mapped, and not read."""
    if folders.is_folder(path):
        return folders.read(path)
    tensors, meta, unread = map_file(path)
    if unread is None:
        return tensors, meta, []
    lie = {name.removeprefix("bank."): tensors.pop(name) for name in unread.digests}
    # of another shape they are refused by whoever checks them
    lie = {name: tensor[0] if tensor.shape[:1] == (1,) else tensor for name, tensor in lie.items()}
    return tensors, meta, [Lying(lie, unread)]


def restored(
    cls: type[Session],
    tensors: State,
    meta: dict[str, Any],
    chunks: Sequence[Lying],
    source: object,
    model: nn.Module,
    tokenizer: Any,
    strict: bool,
) -> Session:
    """The session of a head and of what lies beside it; raises `StateError` as `Session.load` does."""
    check_description(meta, source)
    check_fingerprint(model, meta, source, strict=strict)
    router = router_of(model)
    if strict:
        check_settings(meta["memory"], router.config, source)
        if fingerprint_of(router) != meta["memory_fingerprint"]:
            raise StateError(
                f"{source} was written with another memory (other weights); load the memory it was written with"
            )
    try:
        settings = {"keep_text": meta.get("keep_text", False), "keep_keys": meta.get("keep_keys", True)}
        # a file that says nothing of sinks was written before there were any, or has none
        session = cls(model, tokenizer, window=meta["window"], sinks=meta.get("sinks", 0), **settings)
    except ValueError as error:
        raise StateError(f"{source} has a window that this model cannot have: {error}") from error
    session.notes = meta.get("notes", {})
    tensors = brought_up(tensors, meta, router)
    check_contents(tensors, meta, model, source, chunks)
    fill(session, tensors, meta, chunks)
    return session


def brought_up(tensors: State, meta: Mapping[str, Any], router: Router) -> State:
    """The contents of a file with those names of the state that earlier releases did not have, as in a new stream."""
    if meta.get("stream") is None:
        return tensors
    first = router.memory.init_state(1)
    return {f"state.{name}": first[name].cpu() for name in router.memory.newer if name in first} | tensors


def fill(session: Session, tensors: State, meta: dict[str, Any], chunks: Sequence[Lying]) -> None:
    """Puts contents that passed `check_contents` into a new session."""
    router = session._router
    # keys of a base in float32 go on in the same base in bfloat16
    dtype: Any = unwrapped(session.model).dtype
    tensors = {
        name: tensor.to(router.device, dtype if _in_dtype(name, tensor) else tensor.dtype)
        for name, tensor in tensors.items()
    }
    if (ledger := meta.get("stream")) is not None:
        state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
        noted = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("history.")}
        logs = (Log.of(noted) if noted else session._empty_log,)  # a file of before there were histories has none
        ledgers: dict[str, Any] = {name: tuple(values) for name, values in ledger.items()}
        kept = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("bank.")}
        banks = (_bank(kept, chunks, session) if kept else None,)
        chosen = enumerate(kept["chosen"][0] if "chosen" in kept else ())
        held = ({place: its_kc[:, None] for place, its_kc in chosen},)
        carried = Stream(state, tensors["waiting"], **ledgers, logs=logs, banks=banks, held=held)
        session._layer.stream = replace(carried, ids=tensors.get("ids"))
    if (cache := session._cache) is None or (ledger := meta.get("running")) is None:
        return
    ledgers = {name: tuple(values) for name, values in ledger.items()}
    cache.window = Window(*cache.settings, tensors["window.valid"], **ledgers)
    for index, layer in enumerate(cache.layers):
        if f"keys.{index}" in tensors:
            assert isinstance(layer, DynamicLayer)
            layer.lazy_initialization(tensors[f"keys.{index}"], tensors[f"values.{index}"])
            layer.keys, layer.values = tensors[f"keys.{index}"], tensors[f"values.{index}"]
    session._before = seen = session.stream.seen[0] if session.stream is not None else 0
    if any(name.startswith("keys.") for name in tensors):
        session._before = seen if session.keep_keys else None  # a file that could not leave them out
    elif ledgers["context"][0]:
        ids = window_ids(session._log, seen, cache, router.segment_length)
        assert ids is not None  # checked
        reread(session.model, cache, cache.window, ids.to(router.device), router.segment_length)


def _bank(kept: State, chunks: Sequence[Lying], session: Session) -> Bank:
    """A bank of what was kept of one: `kept` has all its positions, and the tokens behind those that lie in chunks."""
    bank, positions = Bank(stored=session._router.memory.stored), kept["positions"][0]
    for each in chunks:
        bank = _holding(bank, each, positions[bank.length :], session)
    rest = {name: tensor[0] for name, tensor in kept.items() if name not in ("chosen", "positions")}
    return bank.adding(rest | {"positions": positions[bank.length :]}) if rest else bank


def _holding(bank: Bank, lying: Lying, positions: Tensor, session: Session) -> Bank:
    """The bank with a chunk behind its tokens, which is read and checked when it is used, or now where it goes on in
    another dtype or on another device.
    """
    base: Any = unwrapped(session.model).dtype
    device, room = session._router.device, lying.tensors["keys"].shape[2]
    dtypes = {name: base if _in_dtype(f"bank.{name}", t) else t.dtype for name, t in lying.tensors.items()}
    check = functools.partial(lying.check, numbers=check_kept)
    stays = all(t.device == device and t.dtype == dtypes[name] for name, t in lying.tensors.items())
    if room == filled(room) and stays:
        chunk = Chunk(lying.tensors, check, sealed=True, in_file=isinstance(lying.unread, Mapped))
        if lying.units:
            chunk.made[UNITS] = list(lying.units)
        return bank.holding(chunk, positions[:room])
    for name, tensor in lying.tensors.items():
        check(name, tensor)
    moved = {name: tensor.to(device, dtypes[name]) for name, tensor in lying.tensors.items()}
    return bank.adding(moved | {"positions": positions[:room]})


def forget(session: Session, first: int, last: int) -> int:
    """`Session.forget`, in a call of the session."""
    stream, cache = session.stream, session._cache
    if not session._router.memory.keeps:
        kind = session._router.config.kind
        raise ValueError(f"a memory of kind {kind!r} keeps no token apart from others; reset() forgets all")
    if session._router.memory.writes:
        raise ValueError(
            "beside recall another memory has written these tokens, which it cannot take apart again; reset() "
            "forgets all"
        )
    window = None if cache is None else cache.window
    sinks = 0 if window is None else min(window.sinks, window.context[0])
    left = 0 if window is None else window.context[0] - sinks
    seen = 0 if stream is None else stream.seen[0]
    if not sinks <= first <= last < seen - left:
        which = f"the first {sinks}, its sinks, and the last {left}" if sinks else f"the last {left}"
        raise ValueError(
            f"tokens {first} to {last} cannot be forgotten: of {seen} that were read {which} are in the window; use "
            f"{sinks} <= first <= last < {seen - left}"
        )
    assert stream is not None
    bank, log = stream.banks[0] or Bank(stored=session._router.memory.stored), stream.logs[0]
    shorter = bank.without(first, last)
    stream = replace(stream, logs=(None if log is None else log.without(first, last),))
    session._layer.stream = stream.with_banks((shorter,))
    session._layer.replay = None  # which knows the stream as it was
    return bank.length - shorter.length


def spill_to(session: Session, folder: Path, ram: int) -> None:
    """`Session.spill_to`, in a call of the session."""
    if not session._router.memory.keeps:
        kind = session._router.config.kind
        raise ValueError(f"a memory of kind {kind!r} keeps no keys that could be laid into files; leave it out")
    if (device := session._router.device).type != "cpu":
        raise ValueError(f"the model is on {device}, and files are mapped into RAM; use it on the CPU")
    if ram < 0:
        raise ValueError(f"ram is {ram}; use 0 bytes or more")
    folder.mkdir(parents=True, exist_ok=True)
    spill = Spill(folder.resolve(), ram)
    new = Bank(stored=session._router.memory.stored, spill=spill)
    if (stream := session.stream) is not None:
        bank = stream.banks[0]
        session._layer.stream = replace(stream, banks=(new if bank is None else bank.spilling(spill),))
        session._layer.replay = None  # which knows the stream as it was
    session._bank = session._layer.bank = new


def _chosen(held: Mapping[int, Further | Tensor]) -> State:
    """What was chosen for all that is held; nothing where that is not all of it."""
    found = [each if isinstance(each, Tensor) else each.chosen_ktc for _, each in sorted(held.items())]
    there = [chosen_ktc[:, 0] for chosen_ktc in found if chosen_ktc is not None]
    return {"bank.chosen": torch.stack(there)[None]} if there and len(there) == len(found) else {}


def _in_dtype(name: str, tensor: Tensor) -> bool:
    """Whether a tensor goes on in the base's dtype: its keys and values, unless they are packed."""
    of_base = name.startswith(("keys.", "values.")) or name in ("bank.keys", "bank.values")
    return of_base and tensor.is_floating_point()


def _ids_of_window(session: Session) -> Int[Tensor, "1 k"] | None:
    """What a file holds instead of the window's keys; None where it holds these."""
    if session.keep_keys or session._cache is None or session._before is None:
        return None
    # what was read while the memory was switched off has keys, and is not in the text
    seen = session.stream.seen[0] if session.stream is not None else 0
    all_there = session._before + session._taken == seen
    return window_ids(session._log, seen, session._cache, session._router.segment_length) if all_there else None


def _description(session: Session) -> dict[str, Any]:
    router = session._router
    return {
        "content": "session",
        "window": session.window,
        **({"sinks": session.sinks} if session.sinks else {}),
        "keep_text": session.keep_text,
        **({} if session.keep_keys else {"keep_keys": False}),  # a file with keys is as it ever was
        **({"notes": session.notes} if session.notes else {}),
        "memory": router.config.to_dict(),
        "memory_fingerprint": fingerprint_of(router),
        "base_fingerprint": fingerprint(session.model),
        "base_model": getattr(session.model.config, "_name_or_path", "") or None,  # pyright: ignore
    }


def fingerprint_of(router: Router) -> str:
    """The hash of a memory's own weights: a state belongs to the memory that wrote it."""
    return remembered(router.memory, lambda: _hash(router.memory))


def _hash(memory: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(memory.state_dict().items()):
        digest.update(name.encode())
        digest.update(whole(tensor).to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
