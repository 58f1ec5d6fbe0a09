"""What the tests of tasks share: statistics, the oracle's score, and where real data are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnemic.tasks import Task


def chi_square(counts: Tensor | Iterable[float], expected: Tensor | Iterable[float] | float | None = None) -> float:
    """Pearson's statistic of counts, against equal frequencies unless others are `expected`."""
    found = torch.as_tensor(counts if isinstance(counts, Tensor) else list(counts), dtype=torch.float64)
    if expected is None:
        expected = float(found.sum()) / len(found)
    elif not isinstance(expected, Tensor | float | int):
        expected = torch.tensor(list(expected), dtype=torch.float64)
    return float(((found - expected) ** 2 / expected).sum())


def critical(freedom: int) -> float:
    """What chi-square exceeds once in a thousand times (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3


def kolmogorov(shares: Iterable[float]) -> float:
    """How far the distribution of numbers in [0, 1] is from the even one, times the root of their number: above 1.95
    once in a thousand times.
    """
    drawn = torch.tensor(sorted(shares), dtype=torch.float64)
    even = torch.arange(len(drawn), dtype=torch.float64) / len(drawn)
    return float(torch.maximum((drawn - even).abs(), (drawn - even - 1 / len(drawn)).abs()).max()) * len(drawn) ** 0.5


def real(name: str) -> Path:
    """A real file or folder, in the folder that MNEMIC_DATA names or else in shared/data beside the repository; the
    test is skipped where it is not there.
    """
    folder = Path(os.environ.get("MNEMIC_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; MNEMIC_DATA names the folder of real data")
    return folder / name


def perfect(task: Task, rows: int = 20, split: str = "test") -> float:
    """Score of the oracle."""
    examples = task.examples(rows, split)
    return task.score(task.solve(examples), examples)


def words(task: Task, row: Tensor) -> str:
    """Tokens `[t]` as readable words with spaces between."""
    return " ".join(task.text(row.tolist()))
