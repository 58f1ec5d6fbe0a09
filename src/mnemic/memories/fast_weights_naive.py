"""The equations of `fast_weights.py` in plain loops: one row, one head and one token at a time.

Slow on purpose. The tests compare it with the fast path, forward and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemic.memories.layers import EPSILON, NEXT_TO_NOTHING
from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.fast_weights import FastWeights, FastWeightsConfig


def fast_weights_naive(
    memory: FastWeights, hidden_btd: Tensor, state: State, keep_bt: Tensor | None
) -> tuple[Tensor, State]:
    """Reads every token of one segment at the first site, then writes the segment; shapes as in `Memory`."""
    config, reader = memory.config, memory.readers[str(memory.reads[0].layer)]
    size = config.dim // config.heads
    outputs, rows = [], []
    for b in range(hidden_btd.shape[0]):
        kept = [t for t in range(hidden_btd.shape[1]) if keep_bt is None or keep_bt[b, t]]
        row = [{n: tensor[b, head] for n, tensor in state.items() if n != "last"} for head in range(config.heads)]
        parts = [slice(head * size, (head + 1) * size) for head in range(config.heads)]
        outputs.append(torch.stack([_naive_read(reader, config, token, row, parts) for token in hidden_btd[b]]))
        tokens = [memory.writer.norm(hidden_btd[b, t]) for t in kept]
        last = state["last"][b] if config.shift else None
        after = [_naive_write(memory.writer, config, tokens, row[h], h, parts[h], last) for h in range(config.heads)]
        rows.append({name: torch.stack([each[name] for each in after]) for name in row[0]})
        if last is not None:
            rows[-1]["last"] = memory.writer.previous(tokens[-1]) if tokens else last  # pyright: ignore
    return torch.stack(outputs), {name: torch.stack([row[name] for row in rows]) for name in state}


def _naive_features(config: FastWeightsConfig, key: Tensor) -> Tensor:
    if config.features == "l2":
        return key / torch.dot(key, key).sqrt()
    return torch.where(key > 0, key + 1, key.clamp(max=0).exp())


def _naive_read(
    reader: Any, config: FastWeightsConfig, token: Tensor, heads: list[State], parts: list[slice]
) -> Tensor:
    query, reads = reader.query(reader.norm(token)), []
    for head, part in zip(heads, parts, strict=True):
        feature = _naive_features(config, query[part])
        read = head["matrix"].T @ feature
        if "normaliser" in head:
            read = read / (torch.dot(head["normaliser"], feature) + EPSILON)
        reads.append(read / ((read * read).mean() + NEXT_TO_NOTHING).sqrt())
    return token + reader.output(torch.cat(reads))


def _naive_write(
    writer: Any,
    config: FastWeightsConfig,
    tokens: list[Tensor],
    found: State,
    head: int,
    part: slice,
    before: Tensor | None,
) -> State:
    state = found
    for token in tokens:
        key = writer.key(token)
        if before is not None:
            key, before = key + before, writer.previous(token)
        key, value = _naive_features(config, key[part]), writer.value(token)[part]
        kept = {"decay": config.decay}.get(config.rule, 1.0)
        if config.rule == "gated delta":
            kept = torch.sigmoid(writer.forget(token)[head])
        matrix = kept * state["matrix"]
        if config.delta:
            there = found if config.correct == "segment" else {**state, "matrix": matrix}
            remembered = there["matrix"].T @ key
            if "normaliser" in state:
                remembered = remembered / (torch.dot(there["normaliser"], key) + EPSILON)
            value = value - remembered
        rate = 1.0 if config.infini else torch.sigmoid(writer.rate(token)[head])
        after = {"matrix": matrix + rate * torch.outer(key, value)}
        if "normaliser" in state:
            after["normaliser"] = state["normaliser"] + key
        state = after
    return state
