"""Attention of one row over the keys of its window and further ones that a memory gives, in one softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.memory import Further


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
    count, time = more.keys_ktms.shape[2], query.shape[2]
    if mask is None and time > 1:
        held = key.shape[2]
        mask = torch.ones(time, held, dtype=torch.bool, device=key.device).tril(held - time)[None, None]
        if not str(module.config._attn_implementation).endswith("sdpa"):  # pyright: ignore
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if mask is not None:
        seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat([seen.expand(*mask.shape[:3], count), mask], -1)
    key = torch.cat([more.keys_ktms[:, 0][None].to(key.dtype), key], 2)
    value = torch.cat([more.values_ktmv[:, 0][None].to(value.dtype), value], 2)
    return base(module, query, key, value, mask, **kwargs)[0]


def with_own(
    query_hts: Tensor, key_kns: Tensor, value_knv: Tensor, mask: Tensor | None, more: Further, kwargs: dict[str, Any]
) -> Tensor:
    """Attention of one row in which every token has further keys of its own: `[1, t, h, v]`, as the host gives it."""
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
    if more.keep_ktm is not None:
        far = far.masked_fill(~more.keep_ktm[:, None], -torch.inf)
    weight_kgtn = torch.cat([far, near], -1).softmax(-1)
    far, near = weight_kgtn.split([far.shape[-1], held], -1)
    read = (far.transpose(1, 2) @ more.values_ktmv.float()).transpose(1, 2)
    read = read + (near.flatten(1, 2) @ value_knv.float()).unflatten(1, (own, time))
    return read.flatten(0, 1).transpose(0, 1)[None].to(query_hts.dtype)
