"""A reservoir of queries for compact: those of as many tokens, evenly spread over all of a stream that was written.

Token t of the stream has the fraction of t times the golden ratio, which depends on t alone, so any cut of calls, forks
and loaded sessions keep the same tokens: those with the greatest. They are spread more evenly than by chance.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemic.state import State, StateError, check_range

# Shapes: b rows, t tokens, r tokens in the reservoir, d queries of all blocks, joined.

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""The golden ratio's fraction of 2^64, as a signed number: a product that runs over has the fraction, less a half."""


def empty(batch: int, size: int, width: int, device: torch.device | None) -> State:
    """Queries without positions `asked [b, r, d]`, the number `when [b, r]` of each token, from 1 on, 0 where there is
    none yet, and how many tokens were written, `read [b]`. Nothing where `size` is 0.
    """
    if not size:
        return {}
    shapes = {"when": (batch, size), "read": (batch,)}
    numbers = {name: torch.zeros(shape, dtype=torch.long, device=device) for name, shape in shapes.items()}
    return {"asked": torch.zeros(batch, size, width, device=device), **numbers}


def earlier(state: State, row: int, query_td: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "r d"], Int[Tensor, " r"]]:
    """The queries that are there, and which token of the stream each was of, from 0 on; beside those of some tokens."""
    if "when" not in state:
        return query_td[:0].float(), torch.zeros(0, dtype=torch.long, device=query_td.device)
    there_r = state["when"][row] > 0
    return state["asked"][row][there_r], state["when"][row][there_r] - 1


def draw(state: State, row: int, query_td: Float[Tensor, "t d"]) -> None:
    """Puts some of the next tokens in the places of others, in a state that is the caller's own."""
    if "when" not in state:
        return
    came_t = state["read"][row] + torch.arange(1, len(query_td) + 1, device=query_td.device)
    when_n = torch.cat([state["when"][row], came_t])
    best_r = (when_n * GOLDEN).masked_fill(when_n == 0, -(2**63)).topk(state["when"].shape[1]).indices
    state["asked"][row] = torch.cat([state["asked"][row], query_td.to(state["asked"])])[best_r]
    state["when"][row], state["read"][row] = when_n[best_r], came_t[-1]


def check(state: State, most: int) -> None:
    """Raises `StateError` for more than `most` tokens, others than were read, and empty places before others."""
    if "when" not in state:
        return
    check_range("read", state["read"], 0, most)
    check_range("when", state["when"], 0, int(state["read"].max()))
    there = state["when"] > 0
    if bool((there[:, 1:] > there[:, :-1]).any()):
        raise StateError("when has an empty place before others, and a reservoir is filled from the first one on")
