"""A training step beside public packages that implement the same or a similar mechanism.

Steps of the two sides of a pair alternate in one process, so that what a machine does meanwhile touches both, and what
is reported is the median of their ratios: of time on the wall, and of time on the processors, which other programs
touch less. The peak of memory of each side is taken in a process of its own.

    python benchmarks/peers.py --pair NAME --shape small,wide --out results
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.cli.show import console
from peers_pairs import PAIRS, SHAPES, TINY, Pair, Shape
from scripts import Out, launch, numbers, saved, shown, today
from timing import Progress, held_at_most, ratio, seconds_of


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
    base = held_at_most()
    for _ in range(steps):
        made.step()
    return held_at_most() - base


def peak_apart(name: str, side: str, shape: Shape, threads: int) -> int:
    """`peak_bytes` in a new process."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import torch; import peers as p; "
        "name, side, shape, threads = sys.argv[2:]; "
        "torch.set_num_threads(int(threads)); print(p.peak_bytes(name, side, p.Shape(**json.loads(shape))))"
    )
    arguments = [str(Path(__file__).parent), name, side, json.dumps(asdict(shape)), str(threads)]
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


# --- tables -----------------------------------------------------------------------------------------------------------


def cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a pair at a shape each: package / ours in parameters, time and peak of memory."""
    threads = record.config["threads"]
    header = ["pair", "shape", "parameters, M", f"ms, {_threads(threads[0])}"]
    header += [f"times faster, {_threads(count)}" for count in threads]
    header += ["peak, MiB", "our peak / theirs"]
    rows = []
    for label in record.config["shapes"]:
        for name, pair in record.measures["pairs"].items():
            found = pair["shapes"][label]
            first = found["threads"][str(threads[0])]["ms"]
            size, peak = found["parameters"], found["peak bytes"]
            rows.append(
                [
                    name,
                    label,
                    f"{size['package'] / 1e6:.2f} / {size['ours'] / 1e6:.2f}" if size["ours"] else "none",
                    f"{first['package']:,.0f} / {first['ours']:,.0f}",
                    *(_faster(found["threads"][str(count)]) for count in threads),
                    f"{peak['package'] / 2**20:,.0f} / {peak['ours'] / 2**20:,.0f}",
                    f"{peak['ours / package']:.2f}",
                ]
            )
    return header, rows


def table(records: Sequence[Record]) -> str:
    """The table for the documentation: times, and how they were made."""
    if not records:
        return missing("the packages")
    record = records[0]
    sentences = [
        "A pair of numbers is the package's / ours. Times faster: the median of the ratios of "
        f"{record.config['runs']} alternating steps, with the least and the most.",
        *(f"{_shape(label, shape)}." for label, shape in record.config["shapes"].items()),
        *(f"`{name}` was skipped: {reason}." for name, reason in record.measures["skipped"].items()),
        f"Made by `{record.command}` on {record.machine['cores']} {record.machine['processor']} cores with torch "
        f"{record.versions['torch']} and transformers {record.versions['transformers']}.",
    ]
    return markdown(*cells(record)) + "\n\n" + " ".join(sentences)


def table_of_pairs(records: Sequence[Record]) -> str:
    """What stands against what, and what differs."""
    if not records:
        return missing("the packages")
    rows = [
        [name, f"{pair['package']} {pair['version']}", f"{pair['mechanism']}; {pair['scope']}", pair["differs"]]
        for name, pair in records[0].measures["pairs"].items()
    ]
    return markdown(["pair", "package", "ours", "what differs"], rows)


def _faster(found: dict[str, Any]) -> str:
    wall = found["package / ours"]
    return f"**{wall['median']:.2f}** ({wall['least']:.2f}-{wall['most']:.2f})"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _shape(label: str, shape: dict[str, int]) -> str:
    return (
        f"*{label}*: batch {shape['batch']}, {shape['segments']} segments of {shape['segment']} tokens, "
        f"width {shape['width']}, {shape['depth']} blocks, {shape['heads']} heads, vocabulary {shape['vocabulary']}, "
        f"{shape['slots']} memory slots"
    )


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name."""
    found = today(records(results, "peers"), "bench peers", "peers.py")
    return {"peers": table(found), "peers-pairs": table_of_pairs(found)}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    pair: Annotated[str, typer.Option(help="Some of the pairs, separated by commas; all by default.")] = "",
    shape: Annotated[str, typer.Option(help="small, wide, or both, separated by a comma.")] = "small,wide",
    threads: Annotated[str, typer.Option(help="Numbers of threads for PyTorch, separated by commas.")] = "2,1",
    runs: Annotated[int, typer.Option(min=1, help="Counted steps of each side.")] = 9,
    out: Out = Path("results"),
) -> None:
    """A training step beside public packages of the same mechanisms (extra: peers): time, and peak of memory."""
    names, shapes = ([word for word in text.split(",") if word] for text in (pair, shape))
    try:
        record = peers(console.print, names, shapes, numbers(threads), runs)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    header, rows = cells(record)
    shown("package / ours", header, [[cell.replace("*", "") for cell in row] for row in rows])
    saved(record, out, "peers.json")


if __name__ == "__main__":
    launch(app)
