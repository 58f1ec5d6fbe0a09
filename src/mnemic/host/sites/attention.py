"""Inside a block's attention: the memory gives further keys and values to the same softmax.

An attention function and a mask function of our own stand over each of the host's (sdpa, eager), by names of their own.
Where no memory gives anything they are the host's, bit by bit. Keys that leave the window reach the memory here, too:
turned back from their positions, so that they can stand anywhere.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnemic.bank import Bank
from mnemic.host.anatomy import attention_of
from mnemic.host.cache import MemoryCache, Window
from mnemic.host.call import Call, eager, thread
from mnemic.host.further import Part, in_parts, weights, with_own, with_shared
from mnemic.host.release import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, DynamicLayer, newer
from mnemic.memory import Asked, Leaving, Site
from mnemic.sources import noted
from mnemic.state import StateError

if TYPE_CHECKING:
    from mnemic.host.anatomy import Anatomy
    from mnemic.host.router import Router

PREFIX = "mnemic_"
SERVED = ("sdpa", "eager")


def served(anatomy: Anatomy, wanted: Sequence[int]) -> list[int]:
    """Of the blocks that a memory wants to serve those whose attention sees all keys of the window: what sliding layers
    see is the base's own affair. Raises `ValueError` where there is none of them, and for an encoder.
    """
    name = type(anatomy.trunk).__name__
    if wanted and not anatomy.causal:
        raise ValueError(f"{name} is an encoder and keeps no keys, which this memory is made of; use a decoder")
    kinds = getattr(anatomy.trunk.config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if anatomy.slides else "full_attention"] * len(anatomy.blocks)
    found = [layer for layer in wanted if kinds[layer] == "full_attention"]
    if wanted and not found:
        few = getattr(anatomy.trunk.config, "sliding_window", "few")
        raise ValueError(
            f"every block of {name} that this memory would serve sees a sliding window of {few} keys by itself; use a "
            "model with blocks that see all"
        )
    return found


def install(anatomy: Anatomy) -> None:
    """Puts our function in the host's place; raises `ValueError` for a family that does not call it."""
    trunk = anatomy.trunk
    name, own = type(trunk).__name__, (trunk.config._attn_implementation or "").removeprefix(PREFIX)
    if not trunk._can_set_attn_implementation() or any(attention_of(block) is None for block in anatomy.blocks):
        raise ValueError(
            newer(
                f"{name} does not call its attention through transformers' AttentionInterface, inside which this "
                "memory works; use a family that does (Llama, Qwen, Gemma, GPT-NeoX, GPT-2 ...)"
            )
        )
    if own not in SERVED:
        raise ValueError(
            f"{name} runs attention {own!r}, beside which this memory cannot stand; load the model with "
            "attn_implementation='sdpa'"
        )
    trunk.set_attn_implementation(PREFIX + own)


def remove(trunk: Any) -> None:
    """Gives the host its function back."""
    own = trunk.config._attn_implementation or ""
    if own.startswith(PREFIX):
        trunk.set_attn_implementation(own.removeprefix(PREFIX))


def base_function(own: str, module: nn.Module) -> Callable[..., Any]:
    """The host's attention function by name; every modelling file has an eager one of its own."""
    if own in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[own]
    return sys.modules[type(module).__module__].eager_attention_forward


@eager
def attend(
    own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What stands in place of the host's attention function. `query [b, h, t, s]`, `key [b, k, n, s]`."""
    base = base_function(own, module)
    if thread.probe is not None:
        thread.probe.append((int(module.layer_idx), key, value, kwargs, query))  # pyright: ignore[reportArgumentType]
    found = _call_of(module)
    if found is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    router, call = found
    assert call.stream is not None
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    if layer == router.attended[-1]:
        _check_finite(key[:, :, -query.shape[2] :], call.keep, layer)
    if router.memory.writes_inside:
        call.written[Site(layer, "attention")] = _plain(router, call, layer, query)
    further = [_asked(router, call, layer, query, row, kwargs) for row in range(len(query))]
    if all(more is None for parts in further for *_, more in parts):
        return base(module, query, key, value, attention_mask, **kwargs)
    time, rows = query.shape[2], []
    for row, parts in enumerate(further):
        one, found = slice(row, row + 1), []
        for begin, end, more in parts:
            # a part's own tokens are the last of the keys that it sees
            here, held = slice(begin, end), slice(key.shape[2] - time + end)
            mask = None
            if attention_mask is not None:
                mask = attention_mask[one if len(attention_mask) > 1 else slice(0, 1), :, here, held]
            q, k, v = query[one, :, here], key[one, :, held], value[one, :, held]
            memory = call.plan.layer
            if more is not None and memory is not None and memory.noted is not None and row == 0:
                bank, place = call.stream.banks[0], router.attended.index(layer)
                assert bank is not None
                memory.noted = noted(memory.noted, place, weights(q[0], k[0], mask, more, kwargs), more, bank)
            if more is None:
                found.append(base(module, q, k, v, mask, **kwargs)[0])
            elif more.shared and end - begin > 1:
                found.append(with_shared(base, module, q, k, v, mask, more, kwargs))
            else:
                found.append(with_own(q[0], k[0], v[0], mask, more, kwargs))
        rows.append(torch.cat(found, 1))
    return torch.cat(rows), None


def _call_of(module: nn.Module) -> tuple[Router, Call] | None:
    """The running call that a module's attention is part of, where its memory has something to say there."""
    for calls in thread.calls.values():
        call = calls[-1] if calls else None
        # not by its config, which another model may share: that is called inside of this call, or has no memory
        if call is not None and any(module is own for own in call.router.attentions):
            router = call.router
            stands = router.enabled and isinstance(call.cache, MemoryCache) and call.stream is not None
            return (router, call) if stands else None
    return None


def _check_finite(key_bkts: Tensor, keep_bt: Tensor | None, layer: int) -> None:
    """Raises `StateError` for keys that are NaN or infinite, before anything is kept."""
    bad = ~torch.isfinite(key_bkts).all(-1).all(1)
    bad = bad if keep_bt is None else bad & keep_bt.to(bad.device)
    if bad.any():
        row, time = bad.nonzero()[0].tolist()
        raise StateError(
            f"keys of block {layer} are NaN or infinite (first at row {row}, token {time} of the call), so nothing was "
            "written; check the input and the base's dtype (float16 overflows where bfloat16 does not)"
        )


def _asked(router: Router, call: Call, layer: int, query: Tensor, row: int, kwargs: dict[str, Any]) -> list[Part]:
    """What the memory gives to one row."""
    assert call.stream is not None
    bank = call.stream.banks[row]
    if router.memory.keeps and (bank is None or not bank.length):
        return [(0, query.shape[2], None)]
    assert isinstance(call.cache, MemoryCache)
    assert call.cache.window is not None
    window, place = call.cache.window, router.attended.index(layer)
    turn = functools.partial(router.turnings[place], memo=call.angles)
    position = _positions(window, call, row, query.shape[2], query.device)
    asked = Asked(
        turned_hts=query[row],
        position_t=position,
        first=window.position[row] - window.context[row] + min(window.sinks, window.context[row]),
        scale=float(kwargs.get("scaling") or query.shape[-1] ** -0.5),
        bank=bank or Bank(),
        place=place,
        turn=turn,
        window=call.cache.settings[0] or router.segment_length,
        number=_numbers(window.running[row], call, row),
        reading=thread.reading,
        state={name: tensor[row : row + 1] for name, tensor in call.states[0].items()},
    )
    # as it stood: a memory beside this one may have ended the segment in an earlier block
    held = (call.before or call.stream).held[row].get(place)
    parts, shared = in_parts(router.memory, Site(layer, "attention"), asked, held)
    if shared is not None:
        call.held[row][place] = shared
    return parts


def _plain(router: Router, call: Call, layer: int, query: Tensor) -> Float[Tensor, "b t d"]:
    """The queries without their positions, heads joined."""
    assert isinstance(call.cache, MemoryCache)
    assert call.cache.window is not None
    turning = router.turnings[router.attended.index(layer)]
    found = []
    for row, turned_hts in enumerate(query.detach()):
        position = _positions(call.cache.window, call, row, query.shape[2], query.device)
        found.append(turning(turned_hts, position, back=True, memo=call.angles))
    return torch.stack(found).transpose(1, 2).flatten(2).to(query.dtype)


def _numbers(running: int, call: Call, row: int) -> Sequence[int]:
    """Which token of its segment each one is, of which it had `running`."""
    if call.keep is None:
        return range(running, running + call.time)
    count = itertools.count(running)
    return [next(count) if real else -1 for real in call.keep[row].tolist()]


def _positions(window: Window, call: Call, row: int, time: int, device: torch.device) -> Tensor:
    if call.keep is None:
        return window.position[row] + torch.arange(time, device=device)
    return window.position[row] + (call.keep[row].long().cumsum(0) - 1).clamp_min(0).to(device)


for _own in SERVED:  # when this is imported: a pickled model finds its function, too
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + _own, functools.partial(attend, _own))
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + _own, ALL_MASK_ATTENTION_FUNCTIONS[_own])


def check_asked(router: Router, call: Call, trunk: Any) -> None:
    """Raises `ValueError` for a call with a window that a memory inside attention cannot serve."""
    assert isinstance(call.cache, MemoryCache)
    if not trunk.config._attn_implementation.startswith(PREFIX):
        raise ValueError(
            f"the model's attention was set to {trunk.config._attn_implementation!r} after its memory was attached, "
            "which works inside it; detach the memory, set the attention, and attach it again"
        )
    if call.plan.checkpointing:
        raise ValueError(
            "gradient checkpointing runs attention twice, the second time without the memory inside it; turn it off"
        )
    if call.cache.memory.off:
        raise ValueError(
            "tokens were read while the memory was off, and stand in the window, whose keys it keeps; go on with the "
            "memory off, or do such things with session.fork()"
        )


# --- keys that leave the window --------------------------------------------------------------------------------------


@torch.no_grad()
def take_leaving(router: Router, cache: MemoryCache, rows: Sequence[int], moves: bool) -> None:
    """The keys that leave the window when `rows` end their segment join the banks of their streams, or are written with
    the queries of the segment; `moves` as in `Window.close_segment`.
    """
    window, stream = cache.window, cache.memory.stream
    if window is None or stream is None or not rows:
        return
    gone = window.valid & ~window.close_segment(rows, moves).valid
    if router.memory.writes_inside:
        left = {row: leaving(router, cache, window, row, gone[row]) for row in rows}
        cache.memory.stream = stream.commit(router.memory, rows, leaving=left)
        return
    banks = list(stream.banks)
    for row in gone.any(1).nonzero().flatten().tolist():
        left = leaving(router, cache, window, row, gone[row])
        bank = banks[row] or Bank(stored=router.memory.stored)
        begins = stream.seen[row] - window.position[row] + left.first
        stood = torch.arange(begins, begins + left.keys_lkns.shape[2])
        banks[row] = bank.append(left.keys_lkns.to(left.values_lknv.dtype), left.values_lknv, stood)
    cache.memory.stream = stream.with_banks(banks)


def leaving(router: Router, cache: MemoryCache, window: Window, row: int, gone: Bool[Tensor, " kept"]) -> Leaving:
    """What leaves the window of one row: its keys behind its sinks, which stay, stand one behind another."""
    columns, staying = gone.nonzero().flatten(), (window.valid[row] & ~gone).nonzero().flatten()
    rank = window.valid[row].long().cumsum(0)[columns] - 1
    position = window.position[row] - window.context[row] + rank
    memo: dict[Any, tuple[Tensor, Tensor]] = {}
    turns = [functools.partial(turning, memo=memo) for turning in router.turnings]
    keys, values, stays = [], [], []
    for layer, turn in zip([cache.layers[layer] for layer in router.attended], turns, strict=True):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        keys.append(turn(layer.keys[row][:, columns], position, back=True))
        values.append(layer.values[row][:, columns])
        stays.append(layer.keys[row][:, staying])
    first = int(position[0]) if len(columns) else window.position[row] - window.context[row]
    begins = window.position[row] - window.running[row]
    return Leaving(torch.stack(keys), torch.stack(values), first, begins, turns, torch.stack(stays))
