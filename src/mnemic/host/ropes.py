"""Rotary embeddings that depend on the length of a text: dynamic NTK and LongRoPE.

The base takes a call's last position for that length, and keeps what it chose on the module. With a window the position
grows with the stream while the keys that are seen do not, and what one stream chose another would find. So calls with a
window are given the rotations of the window's length, which are the same wherever it stands.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def length_dependent(trunk: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a trunk that change their frequencies with the last position."""
    found = []
    for module in trunk.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            found.append(module)
    return found


def rotations(
    rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], length: int | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines at the given positions, with the frequencies for texts of `length` tokens; by default for one
    that ends with the last position. The arguments are those of the module's forward.
    """
    given = inspect.signature(rotary.forward).bind(*args, **kwargs).arguments
    hidden_btd, position_ids = given.pop("x"), given.pop("position_ids")
    more = {name: value for name, value in given.items() if name != "kwargs"}
    kind = type(rotary)
    # a new one, as the module keeps the frequencies of whoever called it last; it chooses by the last position
    own = kind(config=rotary.config).to(hidden_btd.device)  # pyright: ignore[reportCallIssue]
    last = position_ids.max() if length is None else torch.tensor(length - 1, device=hidden_btd.device)
    own(hidden_btd, last[None, None], **more)
    return inspect.unwrap(kind.forward)(own, hidden_btd, position_ids, **more)
