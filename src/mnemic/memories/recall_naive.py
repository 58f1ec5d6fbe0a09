"""The equations of `recall.py` in plain loops: one token, one head and one block at a time. Slow on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from mnemic.memories.recall import Recall, RecallConfig
from mnemic.memory import Asked

Seen = tuple[int, Tensor, Tensor]
"""What is seen of a kept token: its number in the stream, its key turned to where it stands, its value."""


def naive(memory: Recall, asked: Asked) -> list[list[list[Seen]]]:
    """What each token `[t]` of each head of keys `[k]` chooses, where not all that is kept fits."""
    config, scale = memory.config, asked.scale
    keys, values = (torch.cat(parts(asked.place), 1).float() for parts in (asked.bank.keys, asked.bank.values))
    (heads, kept, _), window, unit = keys.shape, asked.window, config.unit
    group, always, take = len(asked.query_hts) // heads, config.sinks // unit, config.budget // unit
    blocks = [list(range(start, min(start + unit, kept))) for start in range(0, kept, unit)]
    seen: list[list[list[Seen]]] = [[] for _ in range(heads)]
    for t, position in enumerate(asked.position_t.tolist()):
        if t and asked.number[t] % config.refresh:
            seen = [[*its, its[-1]] for its in seen]
            continue
        far = [_turned(asked, _turned(asked, query, window), 0) for query in asked.query_hts[:, t]]
        among = [list(range(len(blocks)))] * heads
        if config.search == "candidates" and config.choice == "mass":
            whole = list(range(asked.bank.means(asked.place, unit).shape[-1]))
            mean = [[keys[head, blocks[u]].mean(0) for u in whole] for head in range(heads)]
            shares = [[float((scale * key @ query).exp()) for key in mean[h // group]] for h, query in enumerate(far)]
            worth = _voted(config, group, [[share / sum(row) for share in row] for row in shares])
            new = among[0][len(whole) :]
            among = [sorted({*_best(whole, row, always, config.wider * take), *new}) for row in worth]
        rows = []
        for h, query in enumerate(far):
            its = [blocks[u] for u in among[h // group]]
            tokens = [i for block in its for i in block]
            rows.append([_worth(config, scale, query, keys[h // group], block, tokens) for block in its])
        for head, row in enumerate(_voted(config, group, rows)):
            chosen = _best(among[head], row, always, take)
            if config.choice == "mass":
                share = dict(zip(among[head], row, strict=True))
                least = config.least if always else min(config.least, max(share[u] for u in chosen))
                chosen = [u for u in chosen if u < always or share[u] >= least]
            first, found = asked.first - len(chosen) * unit, []
            for place, i in enumerate(i for u in chosen for i in blocks[u]):
                stands = first + place if config.layout == "line" else position - window
                found.append((i, _turned(asked, keys[head, i], stands), values[head, i]))
            seen[head].append(found)
    return seen


def _turned(asked: Asked, vector: Tensor, position: int) -> Tensor:
    return asked.turn(vector[None], asked.position_t.new_tensor([position]))[0]


def _voted(config: RecallConfig, group: int, rows: list[list[float]]) -> list[list[float]]:
    """What blocks are worth to each head of keys, from what they are to each head of queries."""
    add = sum if config.choice == "mean" else max
    parts = [rows] if config.by == "layer" else [rows[h : h + group] for h in range(0, len(rows), group)]
    found = [[float(add(column)) for column in zip(*part, strict=True)] for part in parts]
    return found * (len(rows) // group) if config.by == "layer" else found


def _best(blocks: list[int], worth: list[float], always: int, take: int) -> list[int]:
    """The first blocks of the stream and the best others, in order of time."""
    others = sorted((-value, u) for u, value in zip(blocks, worth, strict=True) if u >= always)
    return sorted([*range(always), *(u for _, u in others[:take])])


def _worth(config: RecallConfig, scale: float, query: Tensor, keys: Tensor, block: list[int], of: list[int]) -> float:
    if config.choice == "mass":
        return float((powers := (scale * keys @ query).double().exp())[block].sum() / powers[of].sum())
    part = keys[[*block, *[block[-1]] * (config.unit - len(block))]]
    if config.choice == "mean":
        return float(scale * torch.dot(part.mean(0), query))
    return float(scale * torch.maximum(part.amax(0) * query, part.amin(0) * query).sum())
