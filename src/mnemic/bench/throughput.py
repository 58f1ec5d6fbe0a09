"""Are the generators ever in the way? Tokens a second that each makes, beside those that a small model trains on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.hosts import tiny_gpt2
from mnemic.bench.results import Record
from mnemic.tasks.base import TASKS, Task


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
