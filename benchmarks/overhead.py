"""What a memory costs: time beside the base's own forward, and the token write against its equations in plain loops.

python benchmarks/overhead.py --out results
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import attach
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, records
from mnemic.cli.show import Show, console
from mnemic.memories.emt import EMTConfig
from mnemic.memory import Site
from mnemic.session import Session
from scripts import Out, Threads, launch, saved, today
from timing import alternate, gpt2_small, ratio


@torch.no_grad()
def overhead(
    config: EMTConfig,
    name: str,
    *,
    batch: int,
    tokens: int,
    runs: int = 9,
    device: str = "cpu",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Record:
    """Forward of a GPT-2-small shape with a memory, against the same model without: one segment of `tokens` tokens.

    `with memory / base` times whole forwards; `memory alone / base` only the memory's read and write of that segment.
    """
    model = gpt2_small(device)
    torch.manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    attachment = attach(model, config.replace(segment_length=tokens))
    memory, width = attachment.memory, model.config.hidden_size
    hidden = torch.randn(batch, tokens, width, device=device)
    state = memory.init_state(batch, torch.device(device))

    def base() -> Any:
        with attachment.disabled():
            return model(ids, use_cache=True)

    def alone() -> None:
        for site in memory.hidden_reads:
            memory.read(site, hidden, state)
        memory.write(hidden, state)

    reporter = reporter or Silent()
    reporter.phase(f"{name} write", runs + 1)
    functions = {"base": base, "with memory": lambda: model(ids, use_cache=True), "alone": alone}
    times = alternate(functions, runs, reporter.advance)
    session = Session(model, window=tokens)
    session.read(ids[:1])
    return Record(
        task=f"overhead-{name}",
        mechanism=config.kind,
        host=f"GPT-2 small shape, random weights, {device}, float32",
        seed=seed,
        config=config.to_dict(),
        measures={
            "batch": batch,
            "tokens": tokens,
            "runs": runs,
            "with memory / base": ratio(times, "with memory", "base"),
            "memory alone / base": ratio(times, "alone", "base"),
            "base tokens per second": batch * tokens / statistics.median(times["base"]),
            "tokens per second with memory": batch * tokens / statistics.median(times["with memory"]),
            "parameters": sum(parameter.numel() for parameter in attachment.parameters()),
            "session bytes at a segment's end": session.nbytes,
        },
        state_bytes=session.nbytes,
        seconds={key: statistics.median(values) for key, values in times.items()},
    )


@torch.no_grad()
def against_naive(seed: int = 0) -> Record:
    """The token write's fast path against the equations in plain loops, two stacked memories on a GPT-2-small width."""
    torch.manual_seed(seed)
    config = EMTConfig.whitepaper(segment_length=8)
    memory = config.build(768, 12)
    hidden, state = torch.randn(2, 8, 768), memory.init_state(2)
    times = {}
    begun = time.perf_counter()
    read, written = memory.read(Site(11), hidden, state), memory.write(hidden, state)
    times["fast"] = time.perf_counter() - begun
    begun = time.perf_counter()
    naive_read, naive_written = memory.naive(hidden, state)
    times["naive"] = time.perf_counter() - begun
    differences = {name: float((written[name] - naive_written[name]).abs().max()) for name in written}
    differences["read"] = float((read - naive_read).abs().max())
    return Record(
        task="naive-token",
        mechanism=config.kind,
        host="width 768, batch 2, 8 tokens, 64 slots x 256, stack 2, float32",
        seed=seed,
        config=config.to_dict(),
        measures={"largest difference": differences},
        seconds=times,
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def table(found: Sequence[Record]) -> str:
    """Time beside the base's forward."""
    if not found:
        return missing("the overhead")
    rows = []
    for record in found:
        m = record.measures

        def show(name: str, m: dict[str, Any] = m) -> str:
            r = m[name]
            return f"{r['median']:.3f} ({r['least']:.3f}-{r['most']:.3f})"

        rows.append(
            [
                record.task.removeprefix("overhead-"),
                f"{m['batch']} x {m['tokens']}",
                show("with memory / base"),
                show("memory alone / base"),
                f"{m['parameters'] / 1e6:.1f} M",
                f"{m['session bytes at a segment' + chr(39) + 's end']:,}",
                record.machine["accelerator"] or f"{record.machine['cores']} cores",
            ]
        )
    header = [
        "setting",
        "batch x tokens",
        "with memory / base",
        "memory alone / base",
        "parameters",
        "bytes",
        "machine",
    ]
    return markdown(header, rows) + (
        "\n\nMade by `python benchmarks/overhead.py`: median, least and most of paired runs."
    )


def table_of_naive(found: Sequence[Record]) -> str:
    """Fast against naive."""
    if not found:
        return missing("the comparison")
    rows = [[name, f"{value:.1e}"] for name, value in found[0].measures["largest difference"].items()]
    return markdown(["tensor", "largest difference to the plain loops"], rows)


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name."""
    found = today(records(results), "bench overhead", "overhead.py")
    times = [record for record in found if record.task in ("overhead-segment", "overhead-token")]
    return {"overhead": table(times), "naive": table_of_naive([r for r in found if r.task == "naive-token"])}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 9,
    device: str = "cpu",
    threads: Threads = None,
    out: Out = Path("results"),
) -> None:
    """Forward with a memory against without, on the shape of GPT-2 small; the token write against plain loops."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    suffix = "" if device == "cpu" else f"-{device}"
    settings = {"segment": (EMTConfig(), 512), "token": (EMTConfig.whitepaper(), 256)}
    for name, (config, tokens) in settings.items():
        with Show("") as show:
            record = overhead(config, name, batch=4, tokens=tokens, runs=runs, device=device, reporter=show)
        for key in ("with memory / base", "memory alone / base"):
            console.print(f"{name} write, {key}: {record.measures[key]['median']:.3f}")
        saved(record, out, f"overhead-{name}{suffix}.json")
    record = against_naive()
    console.print(
        f"token write, largest difference to plain loops: {max(record.measures['largest difference'].values()):.1e}"
    )
    saved(record, out, "naive-token.json")


if __name__ == "__main__":
    launch(app)
