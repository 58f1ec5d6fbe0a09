"""What is kept of a session: as named tensors and a description of plain values, and a session made of them again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mnemic.bank import Bank
from mnemic.checks import keys_of
from mnemic.history import Log
from mnemic.host.anatomy import fingerprint
from mnemic.host.cache import Window
from mnemic.host.release import DynamicLayer
from mnemic.host.remembered import remembered
from mnemic.host.router import Router
from mnemic.host.wrappers import unwrapped, whole
from mnemic.memory import Further
from mnemic.rereading import reread, window_ids
from mnemic.state import State, StateError
from mnemic.stream import Stream

if TYPE_CHECKING:
    from mnemic.session import Session


def contents(session: Session) -> tuple[State, dict[str, Any]]:
    """The tensors: the stream's; `bank.keys` and `bank.values` `[1, blocks, heads, n, width]` where keys are kept that
    left the window, with `bank.chosen [1, blocks, heads, c]` where the next tokens share what was chosen of them;
    `history.*`; of the window `window.valid [1, kept]` and, unless its tokens can be read again and are to be, `keys.*`
    and `values.*` `[1, heads, kept, width]` in the base's dtype.
    """
    if session._layer.off:
        raise StateError(
            "tokens were read while the memory was off, and a session of such a memory could not go on from its file; "
            "save before that, or do such things with session.fork()"
        )
    tensors, meta = {}, _description(session)
    if session.stream is not None:
        stream = session.stream.detach()
        tensors |= stream.tensors()
        if (bank := stream.banks[0]) is not None:
            tensors |= {f"bank.{name}": tensor for name, tensor in bank.tensors().items()}
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
    return tensors, meta


def brought_up(tensors: State, meta: Mapping[str, Any], router: Router) -> State:
    """The contents of a file with those names of the state that earlier releases did not have, as in a new stream."""
    if meta.get("stream") is None:
        return tensors
    first = router.memory.init_state(1)
    return {f"state.{name}": first[name].cpu() for name in router.memory.newer if name in first} | tensors


def fill(session: Session, tensors: State, meta: dict[str, Any]) -> None:
    """Puts contents that passed `check_contents` into a new session."""
    router = session._router
    # keys of a base in float32 go on in the same base in bfloat16
    dtype: Any = unwrapped(session.model).dtype
    tensors = {
        name: tensor.to(
            router.device, dtype if name.startswith(("keys.", "values.", "bank.keys", "bank.values")) else tensor.dtype
        )
        for name, tensor in tensors.items()
    }
    if (ledger := meta.get("stream")) is not None:
        state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
        noted = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("history.")}
        logs = (Log.of(noted) if noted else session._empty_log,)  # a file of before there were histories has none
        ledgers: dict[str, Any] = {name: tuple(values) for name, values in ledger.items()}
        kept = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("bank.")}
        banks = (Bank.of(kept) if kept else None,)
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


def _chosen(held: Mapping[int, Further | Tensor]) -> State:
    """What was chosen for all that is held; nothing where that is not all of it."""
    found = [each if isinstance(each, Tensor) else each.chosen_ktc for _, each in sorted(held.items())]
    there = [chosen_ktc[:, 0] for chosen_ktc in found if chosen_ktc is not None]
    return {"bank.chosen": torch.stack(there)[None]} if there and len(there) == len(found) else {}


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
