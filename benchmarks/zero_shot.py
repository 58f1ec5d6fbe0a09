"""The whitepaper's zero-shot mode measured: an untrained memory with random projections on a pretrained model.

python benchmarks/zero_shot.py --model smollm2 --text FILE.txt --out results
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import Attachment, attach, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, records
from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import Show, console
from mnemic.controls import zeroed
from mnemic.host.arguments import with_cache
from mnemic.memories.emt import EMTConfig
from scripts import Out, launch, saved, today


@torch.no_grad()
def bits(
    attachment: Attachment, ids: Tensor, condition: str, advance: Callable[[int], object] = lambda windows: None
) -> float:
    """Bits a token of one stream read window by window. Conditions: `written`, `never written`, `zeroed`, `none`."""
    model, router = attachment.model, attachment.router
    length, total = router.segment_length, 0.0
    cache = memory_cache(model, length)
    for part in ids.split(length, 1):
        if condition == "never written":
            cache.memory.stream = router.new_stream(1)
        elif condition == "zeroed" and cache.memory.stream is not None:
            stream = cache.memory.stream
            cache.memory.stream = router.new_stream(1, zeroed(stream.state))
        logits = model(input_ids=part, **with_cache(model, cache)).logits[0, :-1]
        total += F.cross_entropy(logits.float(), part[0, 1:], reduction="sum").item()
        advance(1)
    return total / (ids.shape[1] - len(ids.split(length, 1))) / math.log(2)


def measure(
    name: str, text: Path, tokens: int, seeds: int = 3, length: int = 256, reporter: Reporter | None = None
) -> Record:
    """The whitepaper's setting after the last block, over several random initialisations, beside its controls."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"][:tokens]])
    ids = ids[:, : ids.shape[1] - ids.shape[1] % length]
    config = EMTConfig.whitepaper(segment_length=length)
    results: dict[str, float] = {}
    reporter = reporter or Silent()
    reporter.phase("windows read", (1 + 3 * seeds) * (ids.shape[1] // length))
    for seed in range(seeds):
        torch.manual_seed(seed)
        attachment = attach(model, config)
        if not results:
            with attachment.disabled():
                results["no memory"] = bits(attachment, ids, "none", reporter.advance)
        for condition in ("written", "never written", "zeroed"):
            results[f"zero-shot, {condition}, seed {seed}"] = bits(attachment, ids, condition, reporter.advance)
        attachment.detach()
    results["what writing moves, at most"] = max(
        abs(results[f"zero-shot, written, seed {s}"] - results[f"zero-shot, never written, seed {s}"])
        for s in range(seeds)
    )
    return Record(
        task="zero-shot",
        mechanism=config.kind,
        host=f"{Path(name).name}, frozen, windows of {length} tokens of {text.name}",
        seed=0,
        config=config.to_dict(),
        measures={"bits per token": results, "tokens": ids.shape[1]},
    )


def table(found: Sequence[Record]) -> str:
    """What an untrained memory with random projections does."""
    if not found:
        return missing("the zero-shot mode")
    rows = [[name, f"{value:.4f}"] for name, value in found[0].measures["bits per token"].items()]
    return markdown(["condition", "bits per token"], rows) + f"\n\nMade by `{found[0].command}`."


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"zero-shot": table(today(records(results, "zero-shot"), "bench zero-shot", "zero_shot.py"))}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help=CAUSAL, callback=found)],
    text: Annotated[Path, typer.Option(help="A text file.")],
    tokens: Annotated[int, typer.Option(help="Tokens to predict.")] = 32_768,
    out: Out = Path("results"),
) -> None:
    """Does the whitepaper's untrained memory help? Bits a token with it, without it, and with controls."""
    with Show("") as show:
        record = measure(model, text, tokens, reporter=show)
    for name, value in record.measures["bits per token"].items():
        console.print(f"{name:<40} {value:.4f} bits per token")
    saved(record, out, "zero-shot.json")


if __name__ == "__main__":
    launch(app)
