"""`mnemic bench memoria-*`: what a step of Memoria costs, how it grows, and that it does not without end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mnemic.cli.bench import Checkpoints, Out, bench
from mnemic.cli.show import Show, console

Threads = Annotated[int | None, typer.Option(help="Threads for PyTorch; all cores by default.")]


@bench.command("memoria-step")
def memoria_step(
    setting: Annotated[str, typer.Argument(help="lm, sorting or enwik8: the paper's settings.")],
    batch: Annotated[int, typer.Option(help="Rows.")] = 8,
    runs: Annotated[int, typer.Option(help="Counted steps of the package; ours run three times as many.")] = 5,
    threads: Threads = None,
    out: Out = Path("results"),
) -> None:
    """A step against `memoria-pytorch`, from the same filled memory: time, bytes of the graph, peak of memory."""
    import torch

    from mnemic.bench.memoria import SETTINGS, against_package

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
    console.print(f"results {record.save(out, f'{record.task}.json')}")


@bench.command("memoria-growth")
def memoria_growth(threads: Threads = None, out: Out = Path("results")) -> None:
    """A step by the number of engrams alive."""
    import torch

    from mnemic.bench.memoria import growth

    torch.set_num_threads(threads or os.cpu_count() or 1)
    record = growth(console.print)
    for rule, found in record.measures.items():
        console.print(f"{rule}: time grows as engrams to the power {found['exponent']:.2f}")
    console.print(f"results {record.save(out, 'memoria-growth.json')}")


@bench.command("memoria-graph")
def memoria_graph(threads: Threads = None, out: Out = Path("results")) -> None:
    """Three ways to keep the counts: bits, a table of all pairs, a list of pairs."""
    import torch

    from mnemic.bench.memoria import representations

    torch.set_num_threads(threads or os.cpu_count() or 1)
    record = representations(console.print)
    for name in ("bits", "table", "pairs"):
        console.print(name, {key: round(value, 1) for key, value in record.measures[name].items()})
    console.print(f"results {record.save(out, 'memoria-graph.json')}")


@bench.command("memoria-stream")
def memoria_stream(
    rule: Annotated[str, typer.Option(help="paper, seeds or lift.")] = "paper",
    steps: Annotated[int, typer.Option(help="Steps, one a segment.")] = 100_000,
    out: Out = Path("results"),
) -> None:
    """One stream of very many steps: does anything grow once long-term memory has levelled off?"""
    import torch

    from mnemic.bench.memoria import endless

    torch.set_num_threads(1)
    record = endless(rule, console.print, steps)
    console.print(f"results {record.save(out, f'{record.task}.json')}")


@bench.command("memoria-overhead")
def memoria_overhead(
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 7,
    threads: Threads = None,
    out: Out = Path("results"),
) -> None:
    """Forward of one segment with a filled memory against without, on the shape of GPT-2 small."""
    import torch

    from mnemic.bench.memoria import overhead
    from mnemic.memories.memoria import MemoriaConfig

    torch.set_num_threads(threads or os.cpu_count() or 1)
    configs = {
        "every block, host's width": MemoriaConfig(heads=12),
        "every block, half the width": MemoriaConfig(heads=12, dim=384),
        "every block, a third of the width": MemoriaConfig(heads=8, dim=256),
        "every second block, half the width": MemoriaConfig(heads=12, dim=384, read_layers=list(range(1, 12, 2))),
    }
    record = overhead(configs, runs=runs)
    for name in configs:
        console.print(f"{name}: {record.measures[name]['with memory / base']['median']:.3f}")
    console.print(f"results {record.save(out, 'overhead-memoria.json')}")


@bench.command("sorting-extended")
def sorting_extended(
    segments: Annotated[int, typer.Option(help="Segments of 256 symbols a prompt, 4 or 8.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights and streams.")] = 0,
    rows: Annotated[int, typer.Option(help="Test streams.")] = 256,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Sorting by frequency where Memoria may send a gradient back, and may read little: controls, ablations, floors."""
    from mnemic.bench.sorting_extended import published

    name = f"sorting-extended-{segments}-seed{seed}"
    with Show(name) as show:
        _, record = published(segments, seed, rows).run(
            show, checkpoints / f"{name}.safetensors" if checkpoints else None
        )
    score = record.scores[0]
    for row, value in {"memory": score.score, **score.controls, **score.floors}.items():
        console.print(f"{row:<32} {100 * value:.1f} %")
    console.print(f"results {record.save(out, f'sorting-memoria-extended-{segments}-seed{seed}.json')}")
