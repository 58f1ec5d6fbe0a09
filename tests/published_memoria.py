"""The same engrams and the same table of what fired when, for our step and for the authors' package."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemic.memories.memoria import MemoriaConfig
from mnemic.memories.memoria.graph import COLUMNS
from mnemic.memories.memoria.remind import remind
from mnemic.state import State, concatenate

WORKING, SHORT, LONG = 1, 2, 3
"""How the package writes a level; 0 is a null engram."""


def published() -> ModuleType:
    """The authors' package; skips where it is not installed."""
    return pytest.importorskip(
        "memoria", reason="the published package is missing: pip install memoria-pytorch==1.1.0 (extra: peers)"
    )


# --- the same memory for both ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """The memory of one row. Slots: its long-term, its short-term, then its working memory, as `levels` counts them."""

    vectors: Tensor
    levels: tuple[int, int, int]
    counts: Tensor
    lifespan: Tensor
    fired: Tensor
    elders: Tensor

    @property
    def slots(self) -> int:
        return len(self.vectors)


def row(
    long: list[float],
    short: list[float],
    working: list[float],
    edges: dict[tuple[int, int], int] | None = None,
    lifespan: list[float] | None = None,
) -> Row:
    """Engrams at places on a line, `edges` the counts of pairs of slots, every other count 0."""
    places = [*long, *short, *working]
    table = torch.zeros(len(places), len(places), dtype=torch.int32)
    for (i, j), count in (edges or {}).items():
        table[i, j] = table[j, i] = count
    vectors = torch.stack([torch.tensor(places), torch.zeros(len(places))], 1)
    lives = torch.full((len(places),), 9.0) if lifespan is None else torch.tensor(lifespan)
    fired = torch.zeros(len(places), COLUMNS // 8, dtype=torch.uint8)
    return Row(vectors, (len(long), len(short), len(working)), table, lives, fired, table)


def settings(**changes: Any) -> MemoriaConfig:
    """The published choice of correlation, one working engram, room enough for all that a test may find."""
    return MemoriaConfig(**{"working": 1, "correlation": "distance", "depth": 0, **changes})


def state_of(rows: list[Row], config: MemoriaConfig, step: int = 200) -> State:
    """Our state; what a row lacks beside a fuller one is padded with zeros."""
    width = config.reminded_stm + config.reminded_ltm
    return concatenate(
        [
            {
                "engram": row.vectors[None],
                "lifespan": row.lifespan[None],
                "id": torch.arange(1, row.slots + 1, dtype=torch.int32)[None],
                "levels": torch.tensor([row.levels]),
                "fired": row.fired[None],
                "elders": row.elders[None],
                "recalled": torch.full((1, width), -1),
                "use": torch.zeros(1, width),
                "step": torch.tensor([step]),
            }
            for row in rows
        ]
    )


def package_of(rows: list[Row], config: MemoriaConfig) -> Any:
    """The package's memory; a row with fewer engrams has its null ones first, as the package itself leaves it."""
    package = published()
    size = max(row.slots for row in rows)
    data, table = torch.zeros(len(rows), size, rows[0].vectors.shape[1]), torch.full((len(rows), size, size), -1)
    types, lifespan = torch.zeros(len(rows), size), torch.full((len(rows), size), -1.0)
    for b, row in enumerate(rows):
        first = size - row.slots
        data[b, first:], lifespan[b, first:] = row.vectors, row.lifespan
        table[b, first:, first:] = row.counts
        types[b, first:] = torch.tensor([LONG, SHORT, WORKING]).repeat_interleave(torch.tensor(row.levels))
    memory = package.Memoria(config.reminded_stm, config.stm_capacity, config.depth, 9, config.reminded_ltm)
    memory.engrams = package.Engrams(data, induce_counts=table, engrams_types=types, lifespan=lifespan)
    memory.ext_device = memory.device = data.device
    return memory


def ours(rows: list[Row], config: MemoriaConfig, step: int = 200) -> list[set[int]]:
    """The slots that each row is reminded of by us."""
    found = [
        [slot for slot in slots if slot >= 0]
        for slots in remind(state_of(rows, config, step), config)["recalled"].tolist()
    ]
    assert all(len(slots) == len(set(slots)) for slots in found)
    return [set(slots) for slots in found]


def theirs(rows: list[Row], config: MemoriaConfig, memory: Any = None) -> list[set[int]]:
    """The slots that each row is reminded of by the package; null engrams are nothing."""
    indices = (memory or package_of(rows, config)).remind()[1].tolist()
    size = max(row.slots for row in rows)
    return [
        {i + row.slots - size for i in found if i >= size - row.slots} for row, found in zip(rows, indices, strict=True)
    ]


def long_of(row: Row, slots: set[int]) -> set[int]:
    return {slot for slot in slots if slot < row.levels[0]}
