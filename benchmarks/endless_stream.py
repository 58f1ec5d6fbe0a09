"""One session without end: what it and the process hold along the way, and whether anything turns NaN.

python benchmarks/endless_stream.py --out results
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import attach, memory_cache
from mnemic.bench.results import Record, records
from mnemic.cli.show import Show
from mnemic.host.arguments import with_cache
from mnemic.memories.emt import EMTConfig
from scripts import Out, launch, saved, today
from timing import resident_bytes


@torch.no_grad()
def endless(
    tokens: int = 1_000_000, *, window: int = 512, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Record:
    """One session reads `tokens` tokens call after call; what it and the process hold is noted along the way."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=window,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    config = EMTConfig(slots=64, dim=256, segment_length=window // 4)
    attach(model, config)
    cache, source = memory_cache(model, window), torch.Generator().manual_seed(seed)
    trail, begun, call = [], time.perf_counter(), window + 37
    seen = finite = 0
    while seen < tokens:
        count = min(call, tokens - seen)
        ids = torch.randint(0, 256, (1, count), generator=source)
        logits = model(input_ids=ids, **with_cache(model, cache), logits_to_keep=1).logits
        finite += int(bool(torch.isfinite(logits).all()))
        seen += count
        stream = cache.memory.stream
        assert stream is not None
        if len(trail) < 20 * seen // tokens:
            keys = sum(layer.keys.numel() * 8 for layer in cache.layers if getattr(layer, "keys", None) is not None)  # pyright: ignore
            trail.append({"tokens": seen, "session_bytes": stream.nbytes + keys, "resident_bytes": resident_bytes()})
        if progress is not None:
            progress(count)
    stream = cache.memory.stream
    assert stream is not None
    return Record(
        task="endless-stream",
        mechanism=config.kind,
        host=f"Llama, 3 blocks, width 64, random weights, window {window}",
        seed=seed,
        config=config.to_dict(),
        measures={
            "tokens": seen,
            "calls": -(-seen // call),
            "calls with finite logits": finite,
            "state finite": all(bool(torch.isfinite(tensor).all()) for tensor in stream.state.values()),
            "trail": trail,
        },
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in stream.state.values()),
        seconds={"all": time.perf_counter() - begun},
    )


def table(found: Sequence[Record]) -> str:
    """What a stream without end holds along the way."""
    if not found:
        return missing("the stream")
    trail = found[0].measures["trail"]
    rows = [
        [f"{p['tokens']:,}", f"{p['session_bytes']:,}", f"{(p['resident_bytes'] or 0) / 2**20:.0f} MiB"]
        for p in trail[:: max(1, len(trail) // 6)]
    ]
    m = found[0].measures
    note = (
        f"\n{m['tokens']:,} tokens in {m['calls']:,} calls, {m['calls with finite logits']:,} with finite logits; "
        f"state finite at the end: {m['state finite']}. Made by `{found[0].command}`."
    )
    return markdown(["tokens read", "session bytes", "process"], rows) + "\n" + note


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"stream": table(today(records(results, "endless-stream"), "bench stream", "endless_stream.py"))}


app = typer.Typer(add_completion=False)


@app.command()
def main(tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1_000_000, out: Out = Path("results")) -> None:
    """One session without end: what it and the process hold along the way, and whether anything turns NaN."""
    with Show("") as show:
        show.phase("read", tokens)
        record = endless(tokens, progress=show.advance)
    saved(record, out, "endless-stream.json")


if __name__ == "__main__":
    launch(app)
