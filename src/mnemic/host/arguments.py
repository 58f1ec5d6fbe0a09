"""What a call of the trunk was given, in any of the forms Hugging Face passes it, and its parts and its whole again."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.host.cache import MemoryLayer
from mnemic.host.release import GENERATE_CACHE, Cache, ModelOutput, cache_name, parameter_names, renamed
from mnemic.host.wrappers import unwrapped
from mnemic.stream import Piece


def bound(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by its own names: some callers pass them by place, some by an older name."""
    return renamed(trunk, {**dict(zip(parameter_names(type(trunk)), args, strict=False)), **kwargs})


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Any]:
    """The arguments that give a model a cache, by the name that its forward has for one."""
    return {cache_name(unwrapped(model)) or GENERATE_CACHE: cache, "use_cache": True}


def check_batch(carried: int, given: int) -> None:
    """Raises `ValueError` when a cache carries another number of streams than the call brings rows."""
    if carried != given:
        raise ValueError(
            f"the cache carries {carried} stream(s) and the call brings {given} row(s); use one cache a batch, or "
            "cache.batch_repeat_interleave / cache.batch_select_indices to change it"
        )


def document_starts(arguments: dict[str, Any], time: int) -> Tensor | None:
    """Where documents begin in packed rows `[b, t]`: positions that do not go on; None for rows that are not packed."""
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None or time == 1:
        return None
    jumps = positions.diff(dim=-1) != 1
    if not bool(jumps.any()):
        return None
    batch = (arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]).shape[0]
    return torch.cat([torch.ones_like(jumps[:, :1]), jumps], 1).expand(batch, -1)


def kept_tokens(mask: Any, time: int, cache: Cache | None) -> Tensor | None:
    """Which of the call's tokens are real `[b, t]`, from the attention mask in any of the forms a trunk is given."""
    flat = flat_mask(mask, time, cache)
    return None if flat is None else flat[:, -time:].bool()


def flat_mask(mask: Any, time: int, cache: Cache | None) -> Tensor | None:
    """The mask of real tokens `[b, seen + t]` behind any form of it; None where nothing is masked."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next((m for m in mask.values() if m is not None), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask
    # 4-D, from a static cache: a token is real when any token of the call, itself among them, may attend to it
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    visible = allowed[:, 0].any(1)
    seen = 0 if cache is None else int(cache.get_seq_length())
    layers = [] if cache is None else [i for i, layer in enumerate(cache.layers) if not isinstance(layer, MemoryLayer)]
    sizes = [cache.get_mask_sizes(time, index) for index in layers] if cache is not None else []
    # the first keys may have left a sliding layer, whose mask begins after them
    offset = next((offset for length, offset in sizes if length == mask.shape[-1]), 0)
    flat = visible.new_zeros(visible.shape[0], seen + time)
    flat[:, offset:] = visible[:, : seen + time - offset]
    return flat.long()


def refined(pieces: list[Piece], cuts: set[int]) -> list[Piece]:
    """The same pieces, cut at `cuts` too."""
    found = []
    for piece in pieces:
        inner = [piece.start, *sorted(c for c in cuts if piece.start < c < piece.stop), piece.stop]
        for start, stop in itertools.pairwise(inner):
            fresh = piece.fresh if start == piece.start else ()
            found.append(Piece(start, stop, fresh, piece.ended if stop == piece.stop else ()))
    return found


def part_of(arguments: dict[str, Any], start: int, stop: int, seen: int, time: int) -> dict[str, Any]:
    """The arguments of a call for the tokens from `start` to before `stop`."""
    part = slice(start, stop)
    sliced = dict(arguments)
    for name in ("input_ids", "inputs_embeds", "token_type_ids"):
        if arguments.get(name) is not None:
            sliced[name] = arguments[name][:, part]
    if (positions := arguments.get("position_ids")) is not None:
        sliced["position_ids"] = positions[..., part]

    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor):
        two = mask.ndim == 2
        sliced["attention_mask"] = mask[:, : mask.shape[1] - time + stop] if two else mask[:, :, part, : seen + stop]
    return sliced


def joined(outputs: list[Any]) -> Any:
    """The outputs of a call's pieces as the output of one call."""
    last = outputs[-1]
    if not isinstance(last, ModelOutput):
        return (torch.cat([output[0] for output in outputs], 1), *last[1:])
    last["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], 1)
    if last.get("hidden_states") is not None:
        layers = zip(*(output["hidden_states"] for output in outputs), strict=True)
        last["hidden_states"] = tuple(torch.cat(layer, 1) for layer in layers)
    if last.get("router_logits") is not None:
        batch = len(last["last_hidden_state"])
        layers = zip(*(output["router_logits"] for output in outputs), strict=True)
        last["router_logits"] = tuple(
            torch.cat([by_row(part, batch) for part in layer], 1).flatten(0, 1) for layer in layers
        )
    return last


def by_row(logits: Tensor, batch: int) -> Tensor:
    """What the routers of experts put out, a row for each token of all rows, as `[b, t, experts]`."""
    return logits.reshape(batch, -1, logits.shape[-1])
