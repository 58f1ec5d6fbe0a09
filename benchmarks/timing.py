"""Times, and bytes of a process: medians over runs that alternate what is compared, so that a machine's drift touches
both; what is reported is their ratio.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

Progress = Callable[[str], None]


def gpt2_small(device: str = "cpu", dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """The shape of GPT-2 small (12 blocks, width 768, 124 M parameters) with random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval().to(device=device, dtype=dtype)  # pyright: ignore


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of one call, the accelerator's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def alternate(
    functions: dict[str, Callable[[], Any]], runs: int, advance: Callable[[int], object] = lambda runs: None
) -> dict[str, list[float]]:
    """Times of each function, called in turn `runs` times after one call that is not counted; `advance` is told of
    every turn, that one too.
    """
    for function in functions.values():
        function()
    advance(1)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(seconds_of(function))
        advance(1)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and spread of `name / base`, pair by pair."""
    ratios = sorted(a / b for a, b in zip(times[name], times[base], strict=True))
    return {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


def resident_bytes() -> int | None:
    """What the process holds in memory now; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return None


def held_at_most() -> int:
    """The most bytes that this process has held. What `getrusage` says is not that on Linux: a process that was started
    by a larger one begins with the peak of that.
    """
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
