"""The equations of `compressive.py` in plain loops: one row, token, group and block at a time.

Slow on purpose. The tests compare it with the fast path, forward and gradients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.compressive import Compressive


def compressive_naive(memory: Compressive, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> State:
    """The state after one segment; shapes as in `Memory`."""
    config, learns = memory.config, memory.config.learns_from_task
    rows: dict[str, list[list[Tensor]]] = {"memory": [], "compressed": []}
    for b in range(hidden_btd.shape[0]):
        seen = [token.detach() for token in state["memory"][b, : int(state["memory_count"][b])]]
        made = list(state["compressed"][b, : int(state["compressed_count"][b])])
        words = [word.detach() for t, word in enumerate(hidden_btd[b]) if keep_bt is None or keep_bt[b, t]]
        queue, old = [*seen, *words], []
        while len(queue) >= config.size + config.rate:
            old.append(queue[: config.rate])
            queue = queue[config.rate :]
        used = config.compression == "most used"
        made += _most_used(memory, old, words, seen) if used else [_group(memory, group) for group in old]
        rows["memory"].append(queue)
        rows["compressed"].append([each if learns else each.detach() for each in made][-config.compressed :])
    after: State = {}
    for name, lists in rows.items():
        after[f"{name}_count"] = state[f"{name}_count"].new_tensor([len(each) for each in lists])
        longest = max(len(each) for each in lists)
        empty = state[name].new_zeros(state[name].shape[-1])
        # one more than there are, so that nothing can be stacked too
        after[name] = torch.stack([torch.stack([*each, *[empty] * (longest + 1 - len(each))]) for each in lists])
        after[name] = after[name][:, :longest]
    return after


def _group(memory: Compressive, group: list[Tensor]) -> Tensor:
    """f_c of one group."""
    parts = []
    for block in range(memory.depth):
        states = [_of_block(memory, state, block) for state in group]
        if memory.convolution is not None:
            part = memory.convolution.bias[block]
            for weight, state in zip(memory.convolution.weight[block], states, strict=True):
                part = part + weight.T @ state
        elif memory.config.compression == "max":
            part = torch.stack([max(channel) for channel in zip(*states, strict=True)])
        else:
            part = sum(states[1:], states[0]) / len(states)
        parts.append(part)
    return torch.cat(parts)


def _most_used(memory: Compressive, old: list[list[Tensor]], words: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    """The most used of all that leave."""
    blocks = []
    for block in range(memory.depth):
        keys = [_normed(_of_block(memory, token, block)) for token in seen]
        used = [0.0] * len(seen)
        for word in words:
            query = _normed(_of_block(memory, word, block))
            scores = [math.exp(float(torch.dot(query, key)) / math.sqrt(memory.width)) for key in keys]
            used = [u + score / sum(scores) for u, score in zip(used, scores, strict=True)]
        leaving = [_of_block(memory, token, block) for group in old for token in group]
        best = sorted(range(len(leaving)), key=lambda place: -used[place])[: len(old)]
        blocks.append([leaving[place] for place in sorted(best)])
    return [torch.cat(states) for states in zip(*blocks, strict=True)]


def _of_block(memory: Compressive, state: Tensor, block: int) -> Tensor:
    return state[block * memory.width : (block + 1) * memory.width]


def _normed(state: Tensor) -> Tensor:
    return (state - state.mean()) / ((state - state.mean()).square().mean() + 1e-5).sqrt()
