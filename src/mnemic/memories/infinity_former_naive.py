"""The equations of `infinity_former.py` in plain loops: one row, token, head, basis function and bin at a time.

Slow on purpose. The tests compare it with the fast path, forward and gradients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.infinity_former import InfinityFormer, InfinityFormerConfig


def infinity_former_naive(
    memory: InfinityFormer, hidden_btd: Tensor, state: State, keep_bt: Tensor | None
) -> tuple[Tensor, State]:
    """Reads every token of one segment where it reads first with its traces, then writes; shapes as in `Memory`."""
    config, outputs, rows = memory.config, [], []
    for b in range(hidden_btd.shape[0]):
        row = {name: tensor[b] for name, tensor in state.items()}
        kept = [t for t in range(hidden_btd.shape[1]) if keep_bt is None or keep_bt[b, t]]
        attention, output = row.get("attention"), []
        for t, token in enumerate(hidden_btd[b]):
            read, densities = _read(memory.readers[str(memory.reads[0].layer)], config, token, row)
            output.append(read)
            if attention is not None and t in kept and row["written"] > 0:
                attention = attention + _masses(densities, config.bins)
        outputs.append(torch.stack(output))
        rows.append(_write(memory, hidden_btd[b, kept], row, attention))
    return torch.stack(outputs), {name: torch.stack([row[name] for row in rows]) for name in state}


def _places(config: InfinityFormerConfig) -> list[tuple[float, float]]:
    """μ_j and σ_j."""
    grid = config.bases // len(config.widths)
    return [((i + 0.5) / grid, width / grid) for i in range(grid) for width in config.widths]


def _bell(distance: Any, deviation: Any) -> Any:
    exponent = torch.as_tensor(-0.5 * (distance / deviation) ** 2, dtype=torch.float64)
    return exponent.exp() / (deviation * math.sqrt(2 * math.pi))


def _read(
    reader: Any, config: InfinityFormerConfig, token: Tensor, row: State
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    size, query = config.dim // config.heads, reader.query(reader.norm(token))
    keys, values = ([project(b) for b in row["coefficients"]] for project in (reader.key, reader.value))
    reads, densities = [], []
    for head in range(config.heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack([torch.dot(query[part], key[part]) / math.sqrt(size) for key in keys])
        mean = 1 / (1 + torch.exp(-reader.mean(scores)))
        variance = torch.log(1 + torch.exp(reader.variance(scores))).clamp_min(1e-4)
        read = torch.zeros_like(query[part])
        for value, (centre, deviation) in zip(values, _places(config), strict=True):
            read = read + value[part] * _bell(mean - centre, (variance + deviation**2).sqrt())
        reads.append(read)
        densities.append((mean.detach(), variance.detach().sqrt()))
    return token + reader.output(torch.cat(reads)), densities


def _masses(densities: list[tuple[Tensor, Tensor]], bins: int) -> Tensor:
    shares = []
    for i in range(bins):
        below, above = (
            torch.stack(
                [torch.erf((edge / bins - mean) / deviation / math.sqrt(2)) / 2 for mean, deviation in densities]
            )
            for edge in (i, i + 1)
        )
        shares.append((above - below).mean())
    return torch.stack(shares)


def _quantiles(attention: Tensor, samples: int) -> list[float]:
    weights = attention.tolist() if attention.sum() > 0 else [1.0] * len(attention)
    places = []
    for m in range(samples):
        left, bin_ = (m + 0.5) / samples * sum(weights), 0
        while left >= weights[bin_]:
            left, bin_ = left - weights[bin_], bin_ + 1
        places.append((bin_ + left / weights[bin_]) / len(weights))
    return places


def _write(memory: InfinityFormer, tokens: Tensor, row: State, attention: Tensor | None) -> State:
    config, before = memory.config, row["coefficients"]
    if not len(tokens):
        return row if attention is None else {**row, "attention": attention}
    if config.detach:
        tokens, before = tokens.detach(), before.detach()
    new = [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in tokens]
    if memory.gate is not None:
        weight, bias = memory.gate.weight, memory.gate.bias
        assert bias is not None
        zero = [torch.zeros_like(new[0])]
        padded = zero + new + zero
        smooth = [sum((weight[:, :, i] @ padded[k + i] for i in range(3)), start=bias) for k in range(len(new))]
        new = [x * torch.sigmoid(gate) for x, gate in zip(new, smooth, strict=True)]
    places, vectors, tau = [], [], 0.0
    if row["written"] > 0:
        tau = config.tau
        middle = [(m + 0.5) / config.samples for m in range(config.samples)]
        found = middle if attention is None else _quantiles(attention, config.samples)
        for m, t in enumerate(found):
            basis = [_bell(t - centre, deviation) for centre, deviation in _places(config)]
            vectors.append(sum((psi * b for psi, b in zip(basis, before, strict=True)), start=torch.zeros_like(new[0])))
            places.append(tau * middle[m])
    for k, x in enumerate(new):
        vectors.append(x)
        places.append(tau + (1 - tau) * (k + 0.5) / len(new))
    basis_np = torch.stack([torch.stack([_bell(t - c, s) for t in places]) for c, s in _places(config)])
    normal = basis_np @ basis_np.T + config.ridge * torch.eye(config.bases, dtype=basis_np.dtype)
    fitted = torch.linalg.solve(normal, basis_np @ torch.stack(vectors))
    after = {"coefficients": fitted, "written": row["written"] + 1}
    return after if attention is None else {**after, "attention": torch.zeros_like(attention)}
