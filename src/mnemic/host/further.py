"""Further keys that a memory gives to tokens of one row, and attention over them and its window in one softmax."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnemic.memory import Asked, Further, Memory, Site

Part = tuple[int, int, Further | None]
"""From which token of a call to before which one, and what these see before the window."""


def in_parts(
    memory: Memory, site: Site, asked: Asked, held: Further | Tensor | None
) -> tuple[list[Part], Further | None]:
    """What the tokens of one row see, in parts, where `held` is shared by those before the first that the memory is
    asked for; and what the segment's next tokens share.
    """
    time, every, number = len(asked.number), memory.sharing(asked.reading), asked.number
    if every == 1:
        return [(0, time, memory.further(site, asked))], None

    def given(tokens: list[int], chosen: Tensor | None = None) -> Further | None:
        query, position = asked.turned_hts[:, tokens], asked.position_t[tokens]
        few = replace(asked, turned_hts=query, position_t=position, number=[number[t] for t in tokens])
        return memory.further(site, replace(few, chosen_ktc=chosen))

    if isinstance(held, Tensor):
        held = given([], held)
    first = [t for t in range(time) if number[t] % every == 0]  # which -1 is not
    if held is None:  # nobody was asked for those before them
        first = sorted({*first, *[t for t in range(time) if number[t] >= 0][:1]})
    if not first:
        return [(0, time, held)], held
    if (more := given(first)) is None:
        return [(0, time, None)], None
    begins = [0 if held is None else first[0], *first[1:]]
    parts: list[Part] = [(0, begins[0], held)] if begins[0] else []
    parts += [(begin, end, more.of(i)) for i, (begin, end) in enumerate(itertools.pairwise([*begins, time]))]
    with torch.inference_mode(False), torch.no_grad():  # whoever goes on with it may be outside of it
        return parts, more.of(len(first) - 1).map(Tensor.clone)


def with_shared(
    base: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    more: Further,
    kwargs: dict[str, Any],
) -> Tensor:
    """The host's own function over further keys that all tokens share, and the window's."""
    count, time, held = more.keys_ktms.shape[2], query.shape[2], key.shape[2]
    if mask is None and (time > 1 or more.bias_ktm is not None):
        mask = torch.ones(time, held, dtype=torch.bool, device=key.device).tril(held - time)[None, None]
        if not str(module.config._attn_implementation).endswith("sdpa"):  # pyright: ignore
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if more.bias_ktm is not None:
        assert mask is not None
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        heads = query.shape[1]
        bias_htm = more.bias_ktm.repeat_interleave(heads // len(more.bias_ktm), 0).to(mask.dtype)
        mask = torch.cat([bias_htm.expand(-1, time, -1)[None], mask.expand(-1, heads, -1, -1)], -1)
    elif mask is not None:
        seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat([seen.expand(*mask.shape[:3], count), mask], -1)
    key = torch.cat([more.keys_ktms[:, 0][None].to(key.dtype), key], 2)
    value = torch.cat([more.values_ktmv[:, 0][None].to(value.dtype), value], 2)
    return base(module, query, key, value, mask, **kwargs)[0]


def weights(
    query_hts: Tensor, key_kns: Tensor, mask: Tensor | None, more: Further, kwargs: dict[str, Any]
) -> Float[Tensor, "k g t n"]:
    """What each token of one row attends to: first the further keys, then those of the window."""
    time, held, own = query_hts.shape[1], key_kns.shape[1], len(query_hts) // len(key_kns)
    scale = float(kwargs.get("scaling") or query_hts.shape[-1] ** -0.5)
    query_kgts = query_hts.unflatten(0, (-1, own)).float() * scale
    near = (query_kgts.flatten(1, 2) @ key_kns.float().transpose(-1, -2)).unflatten(1, (own, time))
    # [k, t, g, s] @ [k, t, s, m]
    far = (query_kgts.transpose(1, 2) @ more.keys_ktms.float().transpose(-1, -2)).transpose(1, 2)
    if (cap := kwargs.get("softcap")) is not None:
        near, far = (torch.tanh(score / cap) * cap for score in (near, far))
    if mask is not None:
        mask = mask[0, 0] if mask.shape[1] == 1 else mask[0].unflatten(0, (-1, own))
        near = near.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else near + mask.float()
    elif time > 1:  # one token sees all
        mask = torch.ones(time, held, dtype=torch.bool, device=near.device).tril(held - time)
        near = near.masked_fill(~mask, -torch.inf)
    if more.bias_ktm is not None:
        far = far + more.bias_ktm[:, None]
    if more.keep_ktm is not None:
        far = far.masked_fill(~more.keep_ktm[:, None], -torch.inf)
    return torch.cat([far, near], -1).softmax(-1)


def with_own(
    query_hts: Tensor, key_kns: Tensor, value_knv: Tensor, mask: Tensor | None, more: Further, kwargs: dict[str, Any]
) -> Tensor:
    """Attention of one row in which every token has further keys of its own: `[1, t, h, v]`, as the host gives it."""
    held, own, time = key_kns.shape[1], len(query_hts) // len(key_kns), query_hts.shape[1]
    weight_kgtn = weights(query_hts, key_kns, mask, more, kwargs)
    far, near = weight_kgtn.split([weight_kgtn.shape[-1] - held, held], -1)
    read = (far.transpose(1, 2) @ more.values_ktmv.float()).transpose(1, 2)
    read = read + (near.flatten(1, 2) @ value_knv.float()).unflatten(1, (own, time))
    return read.flatten(0, 1).transpose(0, 1)[None].to(query_hts.dtype)
