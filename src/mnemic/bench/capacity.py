"""Every update rule on the capacity probe: how many pairs it holds, whether it overwrites, and what age does to a pair.

All rules with keys of one width see the same keys, values and order. Nothing is trained and there is no model.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.bench.cost import Progress
from mnemic.bench.results import Record
from mnemic.memories.rules import RULES, Rule
from mnemic.tasks.capacity import Capacity, Writes

PAIRS = (4, 8, 16, 32, 64, 128)
MODES = ("distinct", "rewrites")
ROWS = (16, 128)
"""Least and most rows of a batch. Each row has a codebook of its own, and most of the time goes into drawing them."""


@dataclass(frozen=True)
class Setup:
    """A rule as it is probed: with which keys. Values are always of length 1."""

    label: str
    rule: str
    key_width: int = 32
    key_norm: float = 1.0
    value_width: int = 32

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the state's tensors, without the batch."""
        return RULES[self.rule].state_shape(self.key_width, self.value_width)

    @property
    def floats(self) -> int:
        """Numbers in the state."""
        return sum(math.prod(shape) for shape in self.shapes.values())


UNIT_VARIANCE = math.sqrt(32)
"""Length of a key whose 32 dimensions have variance 1, as projections give at initialisation."""

SETUPS = (
    Setup("sum", "sum"),
    Setup("decay, 0.95 kept at a write", "decay"),
    Setup("delta", "delta"),
    Setup("Infini-attention, keys of length 1", "infini"),
    Setup("Infini-attention, length 5.7", "infini", key_norm=UNIT_VARIANCE),
    Setup("Infini-attention, length 17", "infini", key_norm=3 * UNIT_VARIANCE),
    Setup("Infini-attention with delta, length 17", "infini-delta", key_norm=3 * UNIT_VARIANCE),
    Setup("ARMT", "armt"),
    Setup("ARMT without its correction", "armt-uncorrected"),
    Setup("delta, keys as wide as ARMT's features", "delta", key_width=192),
)
"""What is compared. The last has a state as large as ARMT's."""


def answers(rule: Rule, writes: Writes, key_norm: float = 1.0) -> Tensor:
    """What a rule answers to every key `[b, p]` after all writes, as places in the codebook."""
    keys, values = writes.pairs()
    state = rule.init_state(len(keys), keys.shape[-1], values.shape[-1])
    state = rule.write_all(state, key_norm * keys, values)
    # all keys at once: a dimension of 1 for the state, which reading leaves alone
    state = {name: tensor[:, None] for name, tensor in state.items()}
    return writes.decode(rule.read(state, key_norm * writes.keys))


def age_bin(age: Tensor) -> Tensor:
    """Ages in bins that double: 0, 1-2, 3-6, 7-14, ..."""
    return (age + 1).double().log2().floor().long()


def probe(setup: Setup, writes: Writes) -> dict[str, Any]:
    """One rule on one batch: share right, share answered with an earlier value, and by bin of age how many are right,
    how many are asked, and the sum of their ages.
    """
    said = answers(RULES[setup.rule], writes, setup.key_norm)
    right, age = writes.right(said), writes.age[writes.asked]
    ages = {}
    for each in age_bin(age).unique().tolist():
        inside = age_bin(age) == each
        ages[each] = [int(right[inside].sum()), int(inside.sum()), int(age[inside].sum())]
    return {
        "right": right.double().mean().item(),
        "earlier value": writes.earlier(said).double().mean().item(),
        "asked": len(right),
        "ages": ages,
    }


@torch.no_grad()
def capacity(
    progress: Progress,
    pairs: Sequence[int] = PAIRS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    reads: int = 2048,
    setups: Sequence[Setup] = SETUPS,
) -> Record:
    """Every setup at every number of pairs, with each key written once and with rewrites; at most about `reads`
    keys are asked for each of them and each seed.
    """
    begun, worked = time.perf_counter(), time.process_time()
    results: list[dict[str, Any]] = [
        {**asdict(setup), "shapes": setup.shapes, "floats": setup.floats} | {mode: {} for mode in MODES}
        for setup in setups
    ]
    floors: dict[str, dict[int, dict[str, float]]] = {mode: {} for mode in MODES}
    for count in pairs:
        rows = min(max(reads // max(count, 1), ROWS[0]), ROWS[1])
        for mode in MODES:
            for seed in seeds:
                drawn = {
                    width: Capacity(count, mode == "rewrites", key_width=width).examples(rows, "test", seed)
                    for width in {setup.key_width for setup in setups}
                }
                for setup, result in zip(setups, results, strict=True):
                    _add(result[mode].setdefault(count, {}), probe(setup, drawn[setup.key_width]))
            of_seed = [Capacity(count, mode == "rewrites").floors(rows, seed) for seed in seeds]
            floors[mode][count] = {name: statistics.mean(each[name] for each in of_seed) for name in of_seed[0]}
        progress(f"{count} pairs: {time.perf_counter() - begun:.0f} s")
    record = Record(
        task="capacity",
        mechanism="update rules",
        host="none: the rules alone, random keys",
        seed=seeds[0],
        config={"pairs": list(pairs), "seeds": list(seeds), "reads": reads, **_common()},
        measures={"rules": results, "floors": floors},
    )
    record.seconds = {"probe": time.perf_counter() - begun, "processor": time.process_time() - worked}
    return record


def _common() -> dict[str, Any]:
    """The generator's settings that are the same everywhere."""
    return {key: value for key, value in Capacity().settings().items() if key in ("value_width", "codebook")}


def _add(cell: dict[str, Any], found: dict[str, Any]) -> None:
    """Takes a seed's result into a cell: lists by seed, counts by age summed."""
    for name in ("right", "earlier value", "asked"):
        cell.setdefault(name, []).append(found[name])
    ages = cell.setdefault("ages", {})
    for each, counts in found["ages"].items():
        ages[each] = [before + count for before, count in zip(ages.get(each, [0, 0, 0]), counts, strict=True)]
