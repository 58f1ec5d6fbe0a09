"""The equations of `compact.py` in plain loops: one row, block, head and query at a time. Slow on purpose.

Values are found by the normal equations over keys, where the fast path has those over queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnemic.memory import Leaving
from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.compact import Compact

Key = tuple[Tensor, Tensor, float, int]
"""A key without its position, its value, its mass, and how many tokens before the window it stands."""


def naive(
    memory: Compact, hidden_btd: Tensor, state: State, keep_bt: Tensor | None, leaving: Sequence[Leaving] | None
) -> State:
    """The state after one segment, of matching; shapes as in `Memory`."""
    after = {name: tensor.clone() for name, tensor in state.items()}
    for row, left in enumerate(leaving or ()):
        words = [word for t, word in enumerate(hidden_btd[row]) if keep_bt is None or keep_bt[row, t]]
        every, length = max(1, len(words) // memory.config.queries), memory.config.segment_length
        asking = [(t, words[t]) for t in range(0, len(words), every)]
        earlier = _reservoir(state, row)
        asking += [((number - 1) % length, query) for number, query in earlier]
        queries = torch.stack([word for _, word in asking])
        queries = queries.view(len(asking), memory.inside.blocks, memory.inside.queries, -1)
        group = memory.inside.queries // max(1, memory.inside.heads)
        for place in range(memory.inside.blocks if left.keys_lkns.shape[2] else 0):
            for head in range(memory.inside.heads):
                its = queries[:, place, head * group : (head + 1) * group]
                stood = [left.begins + t for t, _ in asking]
                kept = _kept(memory, _before(state, row, place, head), its, stood, left, place, head)
                for i, made in enumerate(kept):
                    for name, value in zip(("keys", "values", "mass", "behind"), made, strict=True):
                        after[name][row, place, head, i] = value
        if memory.config.reservoir and left.ratio is None:
            read = int(state["read"][row])
            came = [*earlier, *((read + t + 1, word) for t, word in enumerate(words))]
            best = sorted(came, key=lambda one: -((one[0] * 0x9E3779B97F4A7C15 + 2**63) % 2**64))
            after["read"][row] = read + len(words)
            for i, (number, query) in enumerate(best[: memory.config.reservoir]):
                after["when"][row, i], after["asked"][row, i] = number, query
    return after


def _reservoir(state: State, row: int) -> list[tuple[int, Tensor]]:
    if "when" not in state:
        return []
    its = zip(state["when"][row].tolist(), state["asked"][row], strict=True)
    return [(number, query) for number, query in its if number]


def _before(state: State, row: int, place: int, head: int) -> list[Key]:
    its = [state[name][row, place, head] for name in ("keys", "values", "mass", "behind")]
    return [(key, value, float(m), int(b)) for key, value, m, b in zip(*its, strict=True) if m > 0]


def _kept(
    memory: Compact, own: list[Key], asking: Tensor, stood: list[int], left: Leaving, place: int, head: int
) -> list[Key]:
    from mnemic.memories.compact_matching import MOST, RIDGE, STEPS

    config, turn, new = memory.config, left.turns[place], left.keys_lkns.shape[2]
    keys = [(key, value, m, min(behind + new, config.farthest)) for key, value, m, behind in own]
    for i in range(new):
        came = left.keys_lkns[place, head, i], left.values_lknv[place, head, i].float()
        keys.append((*came, 1.0, min(new - i, config.farthest)))
    count = min(config.keys, len(own) + (new if left.ratio is None else math.ceil(new / left.ratio)))
    if len(keys) <= count:
        return keys

    def turned(x: Tensor, position: int) -> Tensor:
        return turn(x[None], torch.tensor([position]))[0].double()

    far = [turned(key, left.first + new - behind) for key, _, _, behind in keys]
    near = left.stays_lkms[place, head].double()
    shares, parts, weights = [], [], []
    for queries, position in zip(asking, stood, strict=True):
        for query in queries:
            q = turned(query, position) * memory.inside.scales[place]
            part = [math.exp(float(q @ k)) for k in far]
            y = sum(m * e for (_, _, m, _), e in zip(keys, part, strict=True))
            shares.append([m * e / y for (_, _, m, _), e in zip(keys, part, strict=True)])
            parts.append([e / y for e in part])
            weights.append(y / (y + sum(math.exp(float(q @ k)) for k in near)))
    values = torch.stack([value.double() for _, value, _, _ in keys])
    seen = [[w * each for each in share] for w, share in zip(weights, shares, strict=True)]
    worth = [sum(row[i] ** 2 for row in seen) for i in range(len(keys))]
    first = _pursued(torch.tensor(seen).double(), values, count) if config.by == "pursuit" else []
    chosen = sorted(sorted(range(len(keys)), key=lambda i: (i not in first, -worth[i]))[:count])

    a = torch.tensor([[w * part[i] for i in chosen] for w, part in zip(weights, parts, strict=True)]).double()
    target, mass = torch.tensor(weights).double(), torch.tensor([keys[i][2] for i in chosen]).double()
    for _ in range(STEPS):
        mass = mass * (a.T @ target) / (a.T @ a @ mass)
    mass = mass.clamp(1 / MOST, MOST)

    rows = a * mass
    x = rows / rows.sum(1, keepdim=True)
    miss = torch.tensor(shares).double() @ values - x @ values[chosen]
    w = torch.tensor(weights).double()[:, None]
    gram = (w * x).T @ (w * x)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(chosen)).double()
    found = values[chosen] + torch.linalg.solve(gram + ridge, (w * x).T @ (w * miss))
    return [(keys[i][0], found[c].float(), float(mass[c]), keys[i][3]) for c, i in enumerate(chosen)]


def _pursued(seen: Tensor, values: Tensor, count: int) -> list[int]:
    """The keys that orthogonal matching pursuit chooses for what the queries read, until nothing is left."""
    from mnemic.memories.compact_matching import SAME

    chosen: list[int] = []
    left, target, whole = seen.clone(), seen @ values, seen.square().sum(0)
    while len(chosen) < min(count, len(seen) - 1):
        rest = left.square().sum(0)
        able = [i for i in range(len(values)) if i not in chosen and rest[i] > SAME * whole[i]]
        if not able:
            break
        chosen.append(max(able, key=lambda i: float((left[:, i] @ target).square().sum() / rest[i])))
        along = left[:, chosen[-1]] / rest[chosen[-1]].sqrt()
        left, target = left - along[:, None] * (along @ left), target - along[:, None] * (along @ target)
    return chosen
