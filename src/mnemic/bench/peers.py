"""A training step beside public packages that implement the same or a similar mechanism.

Steps of the two sides of a pair alternate in one process, so that what a machine does meanwhile touches both, and what
is reported is the median of their ratios: of time on the wall, and of time on the processors, which other programs
touch less. The peak of memory of each side is taken in a process of its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mnemic.bench.cost import Progress, ratio, seconds_of
from mnemic.bench.pairs import PAIRS, SHAPES, TINY, Pair, Shape
from mnemic.bench.results import Record


def compare(pair: Pair, shape: Shape, threads: Sequence[int], runs: int) -> dict[str, Any]:
    """Milliseconds of both sides and their ratio, pair by pair of steps, for each number of threads; parameters."""
    torch.manual_seed(0)
    theirs, ours = pair.theirs(shape), pair.ours(shape)
    found: dict[str, Any] = {"parameters": {"package": theirs.size, "ours": ours.size}, "threads": {}}
    if ours.config is not None:
        found["config"] = ours.config.to_dict()
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            wall, processor = alternate({"package": theirs.step, "ours": ours.step}, runs)
            found["threads"][str(count)] = {
                "ms": {name: 1e3 * statistics.median(values) for name, values in wall.items()},
                "package / ours": ratio(wall, "package", "ours"),
                "package / ours, processor": ratio(processor, "package", "ours"),
            }
    finally:
        torch.set_num_threads(before)
    return found


def alternate(functions: dict[str, Callable[[], Any]], runs: int) -> tuple[dict[str, list[float]], ...]:
    """Seconds on the wall and on the processors of each function, in turn, after one call that is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            begun = time.process_time()
            seconds = seconds_of(function)
            if run:
                wall[name].append(seconds)
                processor[name].append(time.process_time() - begun)
    return wall, processor


def peak_bytes(name: str, side: str, shape: Shape, steps: int = 3) -> int:
    """The most memory that this process holds during a few steps, above what it holds before them."""
    pair = PAIRS[name]
    torch.manual_seed(0)
    make = pair.theirs if side == "package" else pair.ours
    make(TINY).step()  # what is loaded or kept once is no part of a step
    made = make(shape)
    with suppress(OSError):
        # on Linux: forget the peak of what was before
        Path("/proc/self/clear_refs").write_text("5")
    base = _peak()
    for _ in range(steps):
        made.step()
    return _peak() - base


def _peak() -> int:
    """The most bytes that this process has held. What `getrusage` says is not that on Linux: a process that was started
    by a larger one begins with the peak of that.
    """
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_apart(name: str, side: str, shape: Shape, threads: int) -> int:
    """`peak_bytes` in a new process."""
    program = (
        "import json, sys; import torch; from mnemic.bench import peers as p; "
        "name, side, shape, threads = sys.argv[1:]; "
        "torch.set_num_threads(int(threads)); print(p.peak_bytes(name, side, p.Shape(**json.loads(shape))))"
    )
    arguments = [name, side, json.dumps(asdict(shape)), str(threads)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {side}, failed in its process:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def peers(
    progress: Progress,
    names: Sequence[str] = (),
    shapes: Sequence[str] = tuple(SHAPES),
    threads: Sequence[int] = (2, 1),
    runs: int = 9,
) -> Record:
    """Every pair, or those named, at every shape.

    Raises:
        ValueError: a name of a pair or of a shape that there is not.
    """
    for given, known in ((names, PAIRS), (shapes, SHAPES)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(known)}")
    chosen = {name: PAIRS[name] for name in names or PAIRS}
    skipped = {name: obstacle for name, pair in chosen.items() if (obstacle := pair.obstacle())}
    for name, obstacle in skipped.items():
        progress(f"{name}: skipped, {obstacle}")
    found: dict[str, Any] = {}
    for name, pair in chosen.items():
        if name in skipped:
            continue
        found[name] = {key: getattr(pair, key) for key in ("package", "kind", "scope", "mechanism", "differs")}
        found[name] |= {"version": pair.version(), "shapes": {}}
        for label in shapes:
            shape = SHAPES[label]
            result = compare(pair, shape, threads, runs)
            peaks = {side: peak_apart(name, side, shape, threads[0]) for side in ("package", "ours")}
            result["peak bytes"] = peaks | {"ours / package": peaks["ours"] / peaks["package"]}
            found[name]["shapes"][label] = result
            speeds = ", ".join(
                f"{each['package / ours']['median']:.2f} times faster with {count} threads"
                for count, each in result["threads"].items()
            )
            progress(f"{name}, {label}: {speeds}; peak of memory {result['peak bytes']['ours / package']:.2f}")
    config = {"shapes": {label: asdict(SHAPES[label]) for label in shapes}, "threads": list(threads), "runs": runs}
    host = "Llama or GPT-2 with the package's width, depth and heads, random weights"
    record = Record("peers", "all", host, 0, config)
    record.measures = {"pairs": found, "skipped": skipped}
    return record
