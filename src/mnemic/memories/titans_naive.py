"""The equations of `titans.py` in plain loops: one row, one head and one token at a time.

Slow on purpose. The tests compare it with the fast path, forward and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemic.memories.layers import NEXT_TO_NOTHING
from mnemic.memories.titans_network import UNIT_LENGTH
from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.titans import Titans


def titans_naive(memory: Titans, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[Tensor, State]:
    """Reads every token of one segment where it reads first, if it does, then writes the segment; shapes as in
    `Memory`.
    """
    config = memory.config
    reader = memory.readers[str(memory.reads[0].layer)] if memory.reads else None
    size, count = config.dim // config.heads, config.layers
    outputs, rows = [], []
    for b in range(hidden_btd.shape[0]):
        kept = [t for t in range(hidden_btd.shape[1]) if keep_bt is None or keep_bt[b, t]]
        tokens, heads, networks = [memory.writer.norm(hidden_btd[b, t]) for t in kept], [], []
        last = state["last"][b] if config.shift else None
        for head in range(config.heads):
            first = [weights[head] for weights in memory.first]
            learned = [state[f"learned_{layer + 1}"][b, head] for layer in range(count)]
            surprise = [state[f"momentum_{layer + 1}"][b, head] for layer in range(count)]
            networks.append([f + m for f, m in zip(first, learned, strict=True)])
            part = slice(head * size, (head + 1) * size)
            heads.append(_write(memory, tokens, first, learned, surprise, head, part, last))
        outputs += [token if reader is None else token + _read(reader, token, networks) for token in hidden_btd[b]]
        rows.append({name: torch.stack([after[name] for after in heads]) for name in heads[0]})
        if last is not None:
            rows[-1]["last"] = memory.writer.previous(tokens[-1]) if tokens else last  # pyright: ignore
    return (
        torch.stack(outputs).view(hidden_btd.shape),
        {name: torch.stack([row[name] for row in rows]) for name in state},
    )


def _read(reader: Any, token: Tensor, networks: list[list[Tensor]]) -> Tensor:
    """G O [r / sqrt(mean r² + δ)] for one token; `networks` are the matrices of every head."""
    normed, answers = reader.norm(token), []
    for matrices, query in zip(networks, reader.query(normed).chunk(len(networks)), strict=True):
        answer = _network(matrices, query / torch.dot(query, query).sqrt())[0][-1]
        answers.append(answer / ((answer * answer).mean() + NEXT_TO_NOTHING).sqrt())
    added = reader.output(torch.cat(answers))
    return added if reader.gate is None else torch.sigmoid(reader.gate(normed)) * added


def _network(matrices: list[Tensor], key: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """W_lᵀ a_{l-1} and a_{l-1} of every layer for one key."""
    sums, inputs = [], [key]
    for matrix in matrices:
        sums.append(matrix.T @ inputs[-1])
        inputs.append(sums[-1] * torch.sigmoid(sums[-1]) * (UNIT_LENGTH / len(sums[-1])) ** 0.5)
    return sums, inputs[:-1]


def _gradient(matrices: list[Tensor], key: Tensor, value: Tensor, clip: float | None) -> list[Tensor]:
    sums, inputs = _network(matrices, key)
    error, found = sums[-1] - value, []
    for layer in reversed(range(len(matrices))):
        found.insert(0, torch.outer(inputs[layer], error))
        if layer > 0:
            z, back = sums[layer - 1], matrices[layer] @ error
            steep = torch.sigmoid(z) + z * torch.sigmoid(z) * torch.sigmoid(-z)
            error = back * steep * (UNIT_LENGTH / len(z)) ** 0.5
    if clip is not None:
        square = sum((each * each).sum() for each in found)
        found = [each / (1 + square / clip**2) ** 0.5 for each in found]
    return found


def _write(
    memory: Titans,
    tokens: list[Tensor],
    first: list[Tensor],
    learned: list[Tensor],
    surprise: list[Tensor],
    head: int,
    part: slice,
    before: Tensor | None,
) -> State:
    config, writer = memory.config, memory.writer
    pairs: list[tuple[Tensor, Tensor]] = []
    matrices: list[Tensor] = []
    for t, token in enumerate(tokens):
        key = writer.key(token)
        if writer.previous is not None and before is not None:
            key, before = key + before, writer.previous(token)
        pairs.append((key[part] / torch.dot(key[part], key[part]).sqrt(), writer.value(token)[part]))
        if t % config.chunk == 0:
            matrices = [f + m for f, m in zip(first, learned, strict=True)]
        rate, momentum, forget = (
            torch.sigmoid(gate(token)[head]) for gate in (writer.rate, writer.momentum, writer.forget)
        )
        surprise = [momentum * each for each in surprise]
        for i in range(max(0, t - config.window_tokens + 1), t + 1):
            share = 1.0 if writer.share is None else torch.sigmoid(writer.share(tokens[i])[head])
            gradient = _gradient(matrices, *pairs[i], config.clip)
            surprise = [s - rate * share * g for s, g in zip(surprise, gradient, strict=True)]
        learned = [(1 - forget) * m + s for m, s in zip(learned, surprise, strict=True)]
    after = {f"learned_{layer}": each for layer, each in enumerate(learned, 1)}
    return after | {f"momentum_{layer}": each for layer, each in enumerate(surprise, 1)}
