"""Are the generators ever in the way? Tokens a second that each makes, beside those that a small model trains on.

python benchmarks/generators.py --out results
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from torch import nn

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.hosts import tiny_gpt2
from mnemic.bench.results import Record, records
from mnemic.cli.show import Show, console
from mnemic.tasks.base import TASKS, Task
from scripts import Out, launch, saved, today


def throughput(
    report: Callable[[str, float], None],
    rows: int = 64,
    runs: int = 5,
    threads: int = 2,
    reporter: Reporter | None = None,
) -> Record:
    """Tokens a second of every task by default, on one thread, medians of `runs` batches of `rows` streams; of a
    GPT-2 of 4 blocks and width 128 in training, on `threads` threads; and their ratio.
    """
    reporter = reporter or Silent()
    reporter.phase("model and tasks", 1 + len(TASKS))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = trained(rows=8, length=256, runs=runs)
    finally:
        torch.set_num_threads(before)
    report("a model in training", model)
    reporter.advance(1)
    made: dict[str, float] = {}
    torch.set_num_threads(1)
    try:
        for name, kind in sorted(TASKS.items()):
            made[name] = generated(kind(), rows, runs)
            reporter.advance(1)
    finally:
        torch.set_num_threads(before)
    for name, speed in made.items():
        report(name, speed / model)
    record = Record("generators", "none", "GPT-2, 4 blocks, width 128", 0, {"rows": rows, "runs": runs})
    record.measures = {
        "model, tokens a second": model,
        "tokens a second": made,
        "generator / model": {name: speed / model for name, speed in made.items()},
    }
    return record


def generated(task: Task, rows: int, runs: int) -> float:
    """Tokens a second of a generator; its first batch, which may read files or make tables, is not counted."""
    tokens = task.examples(rows, "train", 0).input_ids.numel()

    def once(number: int) -> float:
        begun = time.perf_counter()
        task.examples(rows, "train", number)
        return time.perf_counter() - begun

    return tokens / statistics.median(once(number + 1) for number in range(runs))


def trained(rows: int, length: int, runs: int) -> float:
    """Tokens a second of a small GPT-2 in training: forward, backward and a step of AdamW."""
    torch.manual_seed(0)
    model = tiny_gpt2(256, length, width=128, depth=4, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ids = torch.randint(0, 256, (rows, length))

    def once() -> float:
        begun = time.perf_counter()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - begun

    once()
    return ids.numel() / statistics.median(once() for _ in range(runs))


def table(record: Record) -> str:
    """How fast streams are made, beside how fast a small model trains on them."""
    measures = record.measures
    rows = [
        [f"`{name}`", f"{measures['tokens a second'][name]:,.0f}", f"{ratio:,.0f}"]
        for name, ratio in sorted(measures["generator / model"].items(), key=lambda item: item[1])
    ]
    threads = record.machine["cores"]
    return markdown(["task", "tokens a second", "times those a model trains on"], rows) + (
        f"\n\nOne thread, default settings; the model ({record.host}) trains on "
        f"{measures['model, tokens a second']:,.0f} tokens a second with {threads} threads. Made by `{record.command}`."
    )


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    found = today(records(results, "generators"), "bench generators", "generators.py")
    return {"generators": table(found[0]) if found else missing("the generators")}


app = typer.Typer(add_completion=False)


@app.command()
def main(out: Out = Path("results")) -> None:
    """Tokens a second that every task makes, over those that a GPT-2 of 4 blocks and width 128 trains on."""

    def report(name: str, value: float) -> None:
        console.print(f"{name:<24} {value:>10,.1f}")

    with Show("") as show:
        record = throughput(report, threads=os.cpu_count() or 1, reporter=show)
    saved(record, out, "generators.json")


if __name__ == "__main__":
    launch(app)
