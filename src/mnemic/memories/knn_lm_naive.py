"""The equations of `knn_lm.py` in plain loops: one row and one token at a time. Slow on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.knn_lm import KNNLMConfig


def naive_write(size: int, hidden_btd: Tensor, ids_bt: Tensor | None, state: State, keep_bt: Tensor | None) -> State:
    """M after one segment, and the token that waits for what follows it."""
    assert ids_bt is not None
    rows, latest = [], []
    for b in range(len(hidden_btd)):
        entries = [(state["keys"][b, i], int(state["tokens"][b, i])) for i in range(int(state["count"][b]))]
        before = state["last"][b] if state["waits"][b] else None
        for t, token in enumerate(hidden_btd[b]):
            if keep_bt is None or keep_bt[b, t]:
                if before is not None:
                    key = torch.cat([before, -torch.dot(before, before)[None] / 2])
                    entries = [*entries, (key, int(ids_bt[b, t]) + 1)][-size:]
                before = token
        rows.append(entries)
        latest.append(before)
    longest, nothing = max(map(len, rows)), hidden_btd.new_zeros(hidden_btd.shape[-1] + 1)
    padded = [[*row, *[(nothing, 0)] * (longest - len(row))] for row in rows]
    return {
        "keys": torch.stack([torch.stack([key for key, _ in row]) if row else nothing[None, :][:0] for row in padded]),
        "tokens": torch.tensor([[token for _, token in row] for row in padded], dtype=torch.long),
        "count": torch.tensor([len(row) for row in rows]),
        "last": torch.stack([nothing[:-1] if before is None else before for before in latest]),
        "waits": torch.tensor([int(before is not None) for before in latest]),
    }


def naive_mix(config: KNNLMConfig, logits_btv: Tensor, hidden_btd: Tensor, state: State) -> Tensor:
    """The mixture itself, as probabilities `[b, t, v]`."""
    rows = []
    for b, t in [(b, t) for b in range(len(hidden_btd)) for t in range(hidden_btd.shape[1])]:
        model_v, query = logits_btv[b, t].softmax(-1), hidden_btd[b, t]
        entries = [(state["keys"][b, i][:-1], int(state["tokens"][b, i]) - 1) for i in range(int(state["count"][b]))]
        away = [((query - key).square().sum() / query.square().sum(), token) for key, token in entries]
        best = sorted(away, key=lambda pair: float(pair[0].detach()))[: config.top_k]
        if not best:
            rows.append(model_v)
            continue
        powers = [(-distance / config.temperature).exp() for distance, _ in best]
        nearest_v = torch.zeros_like(model_v)
        for power, (_, token) in zip(powers, best, strict=True):
            nearest_v[token] += power / sum(powers)
        rate = query.new_tensor(config.rate)
        if config.sentinel is not None:
            own = query.new_tensor(-config.sentinel / config.temperature).exp()
            rate = config.rate * sum(powers) / (sum(powers) + own)
        rows.append(rate * nearest_v + (1 - rate) * model_v)
    return torch.stack(rows).view(logits_btv.shape)
