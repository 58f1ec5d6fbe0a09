"""What Memoria costs beside its base: a forward pass with it, its long-term memory filled, against one without.

python benchmarks/memoria_overhead.py --out results
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from memoria_speed import filled, run
from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import attach, memory_cache
from mnemic.bench.results import Record, records
from mnemic.cli.show import console
from mnemic.host.arguments import with_cache
from mnemic.memories.memoria import MemoriaConfig
from mnemic.state import nbytes
from scripts import Out, Threads, launch, saved, today
from timing import alternate, gpt2_small, ratio


@torch.no_grad()
def overhead(
    configs: dict[str, MemoriaConfig], *, batch: int = 8, tokens: int = 150, runs: int = 7, segments: int = 30
) -> Record:
    """Forward of a GPT-2-small shape over one segment with Memoria, its long-term memory filled, against without."""
    measures: dict[str, Any] = {"batch": batch, "tokens": tokens, "runs": runs, "segments before": segments}
    for name, config in configs.items():
        model = gpt2_small()
        torch.manual_seed(0)
        attachment = attach(model, config.replace(segment_length=tokens))
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
        cache = memory_cache(model, tokens)
        state, source = filled(config, batch, model.config.hidden_size, segments)
        stream = attachment.router.new_stream(batch, run(config, state, *next(source)))

        def with_memory(model: Any = model, cache: Any = cache, stream: Any = stream, ids: Tensor = ids) -> Any:
            fresh = cache.fork()
            fresh.memory.stream = stream
            return model(ids, **with_cache(model, fresh))

        def base(model: Any = model, attachment: Any = attachment, ids: Tensor = ids) -> Any:
            with attachment.disabled():
                return model(ids, use_cache=True)

        times = alternate({"base": base, "with memory": with_memory}, runs)
        measures[name] = {
            "with memory / base": ratio(times, "with memory", "base"),
            "parameters": sum(parameter.numel() for parameter in attachment.parameters()),
            "state bytes a row": nbytes(stream.state) // batch,
        }
    host = "GPT-2 small shape, random weights, cpu, float32"
    return Record("overhead-memoria", "memoria", host, 0, next(iter(configs.values())).to_dict(), measures=measures)


def table(found: Sequence[Record]) -> str:
    """A forward pass with Memoria against without."""
    m = found[0].measures
    rows = []
    for name, values in m.items():
        if isinstance(values, dict):
            r = values["with memory / base"]
            rows.append(
                [
                    name,
                    f"**{r['median']:.3f}** ({r['least']:.3f}-{r['most']:.3f})",
                    f"{values['parameters'] / 1e6:.1f} M",
                    f"{values['state bytes a row']:,}",
                ]
            )
    header = ["reads", "with memory / base", "parameters", "bytes a session"]
    return markdown(header, rows) + (
        f"\n\nMade by `{found[0].command}`: forward of one segment, GPT-2-small shape, batch {m['batch']} x "
        f"{m['tokens']} tokens, after {m['segments before']} segments; median, least and most of paired runs."
    )


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    found = today(records(results, "overhead-memoria"), "bench memoria-overhead", "memoria_overhead.py")
    return {"memoria-overhead": table(found) if found else missing("memoria-overhead")}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 7,
    threads: Threads = None,
    out: Out = Path("results"),
) -> None:
    """Forward of one segment with a filled memory against without, on the shape of GPT-2 small."""
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
    saved(record, out, "overhead-memoria.json")


if __name__ == "__main__":
    launch(app)
