"""What a step of Memoria costs: against the published package, by the number of engrams, and in an endless stream.

Every measurement runs in a process of its own, so that its peak of memory is its own. The package (`memoria-pytorch`,
an extra) begins where our engine stands after the long-term memory has filled: the same engrams, counts, levels and
lifespans, then the same input. So both are timed at the same size, and filling does not take the package an hour.

    python benchmarks/memoria_speed.py step lm --out results
    python benchmarks/memoria_speed.py growth
    python benchmarks/memoria_speed.py graph
    python benchmarks/memoria_speed.py stream --rule paper
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.cli.show import console
from mnemic.memories.memoria import MemoriaConfig, engrams, graph
from mnemic.memories.memoria.remind import advance
from mnemic.state import State, nbytes
from scripts import Out, Threads, launch, saved, today
from timing import Progress, alternate, held_at_most, resident_bytes

SETTINGS: dict[str, tuple[MemoriaConfig, int, int]] = {
    "lm": (MemoriaConfig(), 768, 60),
    "sorting": (
        MemoriaConfig(working=128, reminded_stm=256, reminded_ltm=640, stm_capacity=512, lifespan=5.0),
        512,
        60,
    ),
    "enwik8": (MemoriaConfig(working=170, reminded_stm=170, reminded_ltm=170, stm_capacity=1360), 512, 40),
}
"""The paper's settings: config, width, and the steps after which long-term memory has filled."""


def drifting(config: MemoriaConfig, batch: int, width: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless synthetic steps: working memory around a mean that drifts, and random attention to what is reminded."""
    source = torch.Generator().manual_seed(seed)
    mean = torch.zeros(batch, 1, width)
    while True:
        mean = 0.95 * mean + 0.15 * torch.randn(batch, 1, width, generator=source)
        working = mean + 0.5 * torch.randn(batch, config.working, width, generator=source)
        yield working, torch.randn(batch, config.reminded_stm + config.reminded_ltm, generator=source).softmax(1)


def run(config: MemoriaConfig, state: State, working: Tensor, use: Tensor) -> State:
    """One step of our engine, without the network around it."""
    return advance({**state, "use": use * (state["recalled"] >= 0)}, working, config)


def filled(config: MemoriaConfig, batch: int, width: int, steps: int) -> tuple[State, Iterator[tuple[Tensor, Tensor]]]:
    """The state after `steps` synthetic steps, and the input that goes on from there."""
    source = drifting(config, batch, width)
    state = engrams.empty(batch, width, config.reminded_stm + config.reminded_ltm)
    for _ in range(steps):
        state = run(config, state, *next(source))
    return state, source


# --- a step against the package --------------------------------------------------------------------------------------


def measure_ours(config: MemoriaConfig, batch: int, width: int, steps: int, runs: int) -> dict[str, Any]:
    """Milliseconds of our step after `steps` others, with sizes and the peak of memory."""
    base = held_at_most()
    state, source = filled(config, batch, width, steps)
    times = []
    for _ in range(runs):
        working, use = next(source)
        begun = time.perf_counter()
        state = run(config, state, working, use)
        times.append(time.perf_counter() - begun)
    return {
        "ms": 1e3 * statistics.median(times),
        "least ms": 1e3 * min(times),
        "engrams": int(state["levels"].sum(1).max()),
        "long-term": state["levels"][:, 0].float().mean().item(),
        "reminded long-term": (state["recalled"][:, config.reminded_stm :] >= 0).sum(1).float().mean().item(),
        "graph bytes": nbytes({name: state[name] for name in ("fired", "elders")}),
        "state bytes": nbytes(state),
        "peak bytes": held_at_most() - base,
    }


def measure_package(config: MemoriaConfig, batch: int, width: int, steps: int, runs: int) -> dict[str, Any]:
    """The same of the published package, begun from the state of our engine."""
    from memoria import EngramType, Memoria  # pyright: ignore[reportMissingImports]
    from memoria.engram import Engrams  # pyright: ignore[reportMissingImports]

    base = held_at_most()
    state, source = filled(config, batch, width, steps)
    long, short, working = engrams.level_masks(state)
    kinds = torch.full(long.shape, EngramType.NULL.value)
    for mask, kind in ((long, EngramType.LONGTERM), (short, EngramType.SHORTTERM), (working, EngramType.SHORTTERM)):
        kinds[mask] = kind.value
    free = state["id"] == 0
    counts = graph.counts(state).masked_fill(free[:, None] | free[..., None], -1)
    theirs = Memoria(
        num_reminded_stm=config.reminded_stm,
        stm_capacity=config.stm_capacity,
        ltm_search_depth=config.depth,
        initial_lifespan=int(config.lifespan),
        num_final_ltms=config.reminded_ltm,
    )
    lifespan = state["lifespan"].masked_fill(free, -1)
    theirs.engrams = Engrams(state["engram"].clone(), counts, kinds, lifespan)
    del state, counts
    times = []
    for _ in range(runs):
        working, use = next(source)
        begun = time.perf_counter()
        theirs.add_working_memory(working)
        _, indices = theirs.remind()
        # it may return a column of padding more than can be reminded
        share = torch.nn.functional.pad(use, (0, 1), value=1e-9)[:, : indices.shape[1]] * (indices >= 0)
        gain = share / share.sum(1, keepdim=True) * (indices >= 0).sum(1, keepdim=True) * config.alpha
        theirs.adjust_lifespan_and_memories(indices, gain)
        times.append(time.perf_counter() - begun)
    table = theirs.engrams.induce_counts
    return {
        "ms": 1e3 * statistics.median(times),
        "least ms": 1e3 * min(times),
        "engrams": theirs.engrams.memory_length,
        "long-term": theirs.engrams.longterm_memory_mask.sum(1).float().mean().item(),
        "graph bytes": table.numel() * table.element_size(),
        "peak bytes": held_at_most() - base,
    }


def apart(function: str, **arguments: Any) -> dict[str, Any]:
    """The result of a function of this module in a new process."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv.pop(1)); import memoria_speed as m; "
        "from mnemic.memories.memoria import MemoriaConfig; "
        "import torch; a = json.loads(sys.argv[2]); torch.set_num_threads(a.pop('threads')); "
        "a['config'] = MemoriaConfig.from_dict(a['config']); print(json.dumps(getattr(m, sys.argv[1])(**a)))"
    )
    arguments["config"] = arguments["config"].to_dict()
    folder, values = str(Path(__file__).parent), json.dumps({"threads": torch.get_num_threads(), **arguments})
    done = subprocess.run([sys.executable, "-c", program, folder, function, values], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function} failed in its process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def against_package(setting: str, batch: int, progress: Progress, runs: int = 5) -> Record:
    """Our step against the package's at one of the paper's settings, by the paper's rule and with random starts."""
    config, width, steps = SETTINGS[setting]
    measures: dict[str, Any] = {"batch": batch, "width": width, "steps before": steps, "runs": runs}
    for rule in ("paper", "seeds"):
        ruled = config.with_rule(rule)
        common = {"config": ruled, "batch": batch, "width": width, "steps": steps}
        progress(f"{setting}, batch {batch}, {rule}: the package")
        theirs = apart("measure_package", **common, runs=runs)
        progress(f"{setting}, batch {batch}, {rule}: ours")
        ours = apart("measure_ours", **common, runs=3 * runs)
        centre = apart("measure_ours", **{**common, "config": ruled.replace(correlation="distance")}, runs=3 * runs)
        measures[rule] = {
            "package": theirs,
            "ours": ours,
            "ours, distance": centre,
            "times faster": theirs["ms"] / ours["ms"],
            "times faster, distance": theirs["ms"] / centre["ms"],
            "graph bytes ratio": ours["graph bytes"] / theirs["graph bytes"],
            "peak bytes ratio": ours["peak bytes"] / theirs["peak bytes"],
        }
    return Record(
        task=f"memoria-step-{setting}-{batch}",
        mechanism="memoria",
        host="none: the step alone, synthetic input",
        seed=0,
        config=config.to_dict(),
        measures=measures,
    )


def growth(progress: Progress, alphas: tuple[float, ...] = (4, 8, 16, 32), batch: int = 8) -> Record:
    """A step by the number of engrams: longer lives (`alpha`) at otherwise equal settings, by both rules."""
    measures: dict[str, Any] = {}
    for rule in ("paper", "seeds"):
        rows = []
        for alpha in alphas:
            progress(f"alpha {alpha:g}, {rule}")
            config = MemoriaConfig(alpha=alpha).with_rule(rule)
            rows.append(
                apart("measure_ours", config=config, batch=batch, width=256, steps=int(60 + 4 * alpha), runs=15)
            )
        sizes, times = ([math.log(row[key]) for row in rows] for key in ("engrams", "ms"))
        slope = statistics.linear_regression(sizes, times).slope
        measures[rule] = {"alphas": list(alphas), "rows": rows, "exponent": slope}
    return Record("memoria-growth", "memoria", "none: the step alone", 0, MemoriaConfig().to_dict(), measures=measures)


# --- what to keep of the graph --------------------------------------------------------------------------------------


def representations(progress: Progress, runs: int = 7) -> Record:
    """Three ways to keep counts, at the paper's settings for language: bits of who fired when (ours), a table of all
    pairs, and a sorted list of the pairs that are not 0. Milliseconds to add a step, and to give the rows of 30 and of
    350 engrams ten times over, as a search of depth 10 asks for; bytes.
    """
    config, _, steps = SETTINGS["lm"]
    state, _ = filled(config, 8, 64, steps)
    table = graph.counts(state)
    long = engrams.level_masks(state)[0]
    active = engrams.activated(state)
    everyone = torch.ones(8, dtype=torch.bool)
    size = int(state["levels"][:, 0].max())
    edges = graph.Edges(state, long[:, :size], 0, "oldest", False)
    pairs = [row.nonzero() for row in table]
    keys = [pair[:, 0] * table.shape[1] + pair[:, 1] for pair in pairs]
    values = [row[pair[:, 0], pair[:, 1]] for row, pair in zip(table, pairs, strict=True)]

    def sparse_add() -> None:
        for row in range(8):
            slots = active[row].nonzero().flatten()
            new = (slots[:, None] * table.shape[1] + slots).flatten()
            joined, place = torch.cat([keys[row], new]).unique(return_inverse=True)
            counts = torch.cat([values[row], torch.ones_like(new, dtype=torch.int32)])
            torch.zeros_like(joined, dtype=torch.int32).index_add_(0, place, counts)

    def sparse_rows(count: int) -> None:
        for row in range(8):
            asked = (torch.arange(count)[:, None] * table.shape[1] + torch.arange(size)).flatten()
            place = torch.searchsorted(keys[row], asked).clamp_max(len(keys[row]) - 1)
            torch.where(keys[row][place] == asked, values[row][place], 0)

    def ten(function: Any) -> None:
        for _ in range(10):
            function()

    slots = {count: torch.arange(count).expand(8, -1) for count in (30, 350)}
    fired = active.int()
    ways: dict[str, dict[str, Any]] = {
        "bits": {
            "add": lambda: graph.fire(state, active, state["step"] - 1, everyone),
            "rows of 30": lambda: ten(lambda: edges.scores(slots[30])),
            "rows of 350": lambda: ten(lambda: edges.scores(slots[350])),
        },
        "table": {
            "add": lambda: table + fired[:, :, None] * fired[:, None],
            "rows of 30": lambda: ten(lambda: table[:, :30, :size].float()),
            "rows of 350": lambda: ten(lambda: table[:, :350, :size].float()),
        },
        "pairs": {
            "add": sparse_add,
            "rows of 30": lambda: ten(lambda: sparse_rows(30)),
            "rows of 350": lambda: ten(lambda: sparse_rows(350)),
        },
    }
    size_of = {
        "bits": nbytes({name: state[name] for name in ("fired", "elders")}),
        "table": table.numel() * table.element_size(),
        "pairs": sum(12 * len(key) for key in keys),
    }
    measures: dict[str, Any] = {"engrams": int(state["levels"].sum(1).max()), "batch": 8, "runs": runs}
    for name, functions in ways.items():
        progress(name)
        times = alternate(functions, runs)
        measures[name] = {key: 1e3 * statistics.median(found) for key, found in times.items()} | {
            "bytes": size_of[name]
        }
    return Record("memoria-graph", "memoria", "none: the graph alone", 0, config.to_dict(), measures=measures)


# --- an endless stream -----------------------------------------------------------------------------------------------


def endless(rule: str, progress: Progress, steps: int = 100_000, width: int = 64, every: int = 1_000) -> Record:
    """One stream of many steps at the paper's settings for language: time, engrams, bytes and memory of the process."""
    config = MemoriaConfig().with_rule(rule)
    state, source = filled(config, 1, width, 0)
    rows: list[dict[str, Any]] = []
    times: list[float] = []
    for step in range(1, steps + 1):
        working, use = next(source)
        begun = time.perf_counter()
        state = run(config, state, working, use)
        times.append(time.perf_counter() - begun)
        if step % every == 0:
            rows.append(
                {
                    "step": step,
                    "ms": 1e3 * statistics.median(times),
                    "levels": state["levels"][0].tolist(),
                    "elders": state["elders"].shape[1],
                    "oldest": int(state["step"]) - int(state["id"][0, 0] - 1) // config.working,
                    "reminded long-term": int((state["recalled"][0, config.reminded_stm :] >= 0).sum()),
                    "state bytes": nbytes(state),
                    "resident bytes": resident_bytes(),
                }
            )
            times = []
            progress(f"{rule}: step {step:,}, {sum(rows[-1]['levels'])} engrams, {rows[-1]['ms']:.1f} ms")
    record = Record(f"memoria-endless-{rule}", "memoria", "none: the step alone", 0, config.to_dict())
    record.measures = {"width": width, "rows": rows}
    return record


# --- tables -----------------------------------------------------------------------------------------------------------


def table_of_steps(found: Sequence[Record]) -> str:
    """Our step against the package's."""
    rows = []
    for record in sorted(found, key=lambda r: (r.config["working"], r.measures["batch"])):
        m = record.measures
        for rule, title in (("paper", "paper's rule"), ("seeds", "random starts")):
            ours, theirs = m[rule]["ours"], m[rule]["package"]
            rows.append(
                [
                    record.task.removeprefix("memoria-step-").rpartition("-")[0],
                    str(m["batch"]),
                    title,
                    f"{ours['engrams']:,}",
                    f"{ours['reminded long-term']:.0f} of {record.config['reminded_ltm']}",
                    f"{theirs['ms']:,.0f}",
                    f"{ours['ms']:,.1f}",
                    f"**{m[rule]['times faster']:.1f}**",
                    f"{m[rule]['times faster, distance']:.1f}",
                    f"1/{1 / m[rule]['graph bytes ratio']:,.0f}",
                    f"1/{1 / m[rule]['peak bytes ratio']:,.1f}",
                ]
            )
    header = ["setting", "batch", "reminding", "engrams", "long-term reminded", "package, ms", "ours, ms"]
    header += ["times faster", "with `distance`", "graph's bytes", "peak of memory"]
    machine = found[0].machine
    return markdown(header, rows) + (
        "\n\nMade by `python benchmarks/memoria_speed.py step` with memoria-pytorch 1.1.0, "
        f"{machine['cores']} {machine['processor']} cores; medians of {found[0].measures['runs']} steps of the package "
        "and three times as many of ours. The package compares by mean distance; with `distance` we do the same."
    )


def table_of_growth(found: Sequence[Record]) -> str:
    """A step by the number of engrams."""
    m = found[0].measures
    rows = []
    for rule, title in (("paper", "paper's rule"), ("seeds", "random starts")):
        cells = [f"{row['ms']:.1f} ms at {row['engrams']:,}" for row in m[rule]["rows"]]
        rows.append([title, *cells, f"{m[rule]['exponent']:.2f}"])
    header = ["reminding", *(f"alpha {alpha:g}" for alpha in m["paper"]["alphas"]), "exponent"]
    return (
        "Time of a step by the number of engrams (longer lives, all else equal), and the power with which it grows:\n\n"
        + markdown(header, rows)
        + f"\n\nMade by `{found[0].command}`: width 256, batch 8."
    )


def table_of_graphs(found: Sequence[Record]) -> str:
    """Three ways to keep counts."""
    m = found[0].measures
    titles = {"bits": "bits of who fired when (ours)", "table": "table of all pairs", "pairs": "list of pairs"}
    keys = ("add", "rows of 30", "rows of 350")
    rows = [
        [title, *(f"{m[name][key]:.1f}" for key in keys), f"{m[name]['bytes']:,}"] for name, title in titles.items()
    ]
    header = ["kept", "a step added, ms", "30 rows ten times, ms", "350 rows ten times, ms", "bytes"]
    return markdown(header, rows) + (
        f"\n\nMade by `{found[0].command}`: {m['engrams']:,} engrams, batch {m['batch']}, the paper's settings for "
        "language."
    )


def table_of_streams(found: Sequence[Record]) -> str:
    """One stream of very many steps."""
    rows = []
    for record in found:
        trail: list[dict[str, Any]] = record.measures["rows"]
        for point in [trail[0], *trail[max(0, len(trail) // 5 - 1) :: max(1, len(trail) // 5)]]:
            rows.append(
                [
                    record.task.removeprefix("memoria-endless-"),
                    f"{point['step']:,}",
                    f"{sum(point['levels']):,}",
                    f"{point['elders']:,}",
                    f"{point['oldest']:,}",
                    f"{point['state bytes']:,}",
                    f"{point['resident bytes'] / 2**20:.0f} MiB",
                    f"{point['ms']:.1f}",
                ]
            )
    header = ["rule", "step", "engrams", "of them elders", "age of the oldest", "state, bytes", "process", "ms a step"]
    return markdown(header, rows) + (
        "\n\nMade by `python benchmarks/memoria_speed.py stream`: one row of width 64 on one core; the machine had "
        "other work, so times vary."
    )


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name."""
    found = records(results)
    for name in ("step", "growth", "graph", "stream"):
        found = today(found, f"bench memoria-{name}", f"memoria_speed.py {name}")
    makers: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
        "memoria-step": ("memoria-step-", table_of_steps),
        "memoria-growth": ("memoria-growth", table_of_growth),
        "memoria-graph": ("memoria-graph", table_of_graphs),
        "memoria-endless": ("memoria-endless-", table_of_streams),
    }
    made = {}
    for name, (prefix, make) in makers.items():
        some = [record for record in found if record.task.startswith(prefix)]
        made[name] = make(some) if some else missing(name)
    return made


# --- the commands -----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("step")
def memoria_step(
    setting: Annotated[str, typer.Argument(help="lm, sorting or enwik8: the paper's settings.")],
    batch: Annotated[int, typer.Option(help="Rows.")] = 8,
    runs: Annotated[int, typer.Option(help="Counted steps of the package; ours run three times as many.")] = 5,
    threads: Threads = None,
    out: Out = Path("results"),
) -> None:
    """A step against `memoria-pytorch`, from the same filled memory: time, bytes of the graph, peak of memory."""
    if setting not in SETTINGS:
        raise typer.BadParameter(f"{setting!r} is not one of {', '.join(SETTINGS)}")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    record = against_package(setting, batch, console.print, runs)
    for rule in ("paper", "seeds"):
        found = record.measures[rule]
        console.print(
            f"{rule}: {found['package']['ms']:.0f} ms against {found['ours']['ms']:.1f} ms, "
            f"{found['times faster']:.1f} times faster; graph {found['graph bytes ratio']:.4f}, "
            f"peak {found['peak bytes ratio']:.3f} of its bytes"
        )
    saved(record, out, f"{record.task}.json")


@app.command("growth")
def memoria_growth(threads: Threads = None, out: Out = Path("results")) -> None:
    """A step by the number of engrams alive."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    record = growth(console.print)
    for rule, found in record.measures.items():
        console.print(f"{rule}: time grows as engrams to the power {found['exponent']:.2f}")
    saved(record, out, "memoria-growth.json")


@app.command("graph")
def memoria_graph(threads: Threads = None, out: Out = Path("results")) -> None:
    """Three ways to keep the counts: bits, a table of all pairs, a list of pairs."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    record = representations(console.print)
    for name in ("bits", "table", "pairs"):
        console.print(name, {key: round(value, 1) for key, value in record.measures[name].items()})
    saved(record, out, "memoria-graph.json")


@app.command("stream")
def memoria_stream(
    rule: Annotated[str, typer.Option(help="paper, seeds or lift.")] = "paper",
    steps: Annotated[int, typer.Option(help="Steps, one a segment.")] = 100_000,
    out: Out = Path("results"),
) -> None:
    """One stream of very many steps: does anything grow once long-term memory has levelled off?"""
    torch.set_num_threads(1)
    record = endless(rule, console.print, steps)
    saved(record, out, f"{record.task}.json")


if __name__ == "__main__":
    launch(app)
