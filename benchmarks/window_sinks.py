"""Perplexity of a base in a window that moves, with and without attention sinks, and what they depend on.

One novel is read with a window of 256 tokens and segments of 64, without a memory. Beside windows with 0, 4 and 16
sinks stand the base that recomputes all keys of the window for every segment, and two more windows with 4: one whose
positions run out every `OFTEN` tokens, so that its keys are moved again and again, and one that goes on `FAR` positions
away from its sinks, as it would if nothing was ever moved.

    python benchmarks/window_sinks.py --data novels.tar.xz --out results
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import called
from mnemic.bench.experiments import Reporter
from mnemic.bench.results import Record, records
from mnemic.checkpoints import folder_of
from mnemic.cli.show import Show
from mnemic.tasks.documents import novels
from recall_perplexity import BLOCK, Novel, novel, scored

WINDOW, SEGMENT, FAR, OFTEN = 256, 64, 30_000, 512
CONDITIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "4 sinks": (4, {}),
    "no sinks": (0, {}),
    "16 sinks": (16, {}),
    f"4 sinks, positions up to {OFTEN}": (4, {"limit": OFTEN}),
    f"4 sinks, {FAR:,} positions away": (4, {"position": (FAR,), "limit": None}),
}
"""Sinks of a window, and what of it is changed behind the first segment."""
RECOMPUTED = "recomputed"


def windowed(model: Any, sinks: int, changes: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What gives the logits of the next segment in a window."""
    session = mnemic.Session(model, window=WINDOW, sinks=sinks)

    def read(part: Tensor) -> Tensor:
        logits, cache = session.forward(part).logits, session.cache
        if cache.window is not None and cache.window.position == (SEGMENT,):
            cache.window = replace(cache.window, **changes)
        return logits

    return read


def recomputed(model: Any) -> Callable[[Tensor], Tensor]:
    """The same by the base alone, which sees the window's tokens and no others."""
    seen = torch.zeros(1, 0, dtype=torch.long, device=model.device)

    def read(part: Tensor) -> Tensor:
        nonlocal seen
        seen = torch.cat([seen, part], 1)[:, -WINDOW:]
        return model(input_ids=seen, use_cache=False).logits[:, -part.shape[1] :]

    return read


@torch.no_grad()
def nats(ids: Int[Tensor, "1 t"], read: Callable[[Tensor], Tensor]) -> Float[Tensor, " n"]:
    """The mean nats a token of each block behind the first window."""
    found, last = [], None
    for part in ids.split(SEGMENT, 1):
        logits = read(part)[0].float()
        if last is not None:
            found.append(F.cross_entropy(torch.cat([last, logits[:-1]]), part[0], reduction="none"))
        last = logits[-1:]
    return torch.cat(found)[WINDOW - SEGMENT :].view(-1, BLOCK).mean(1).cpu()


def run(attachment: mnemic.Attachment, its: Novel, name: str, show: Reporter) -> Record:
    """One novel under all conditions."""
    model, found, seconds = attachment.model, {}, {}
    show.phase("conditions", len(CONDITIONS) + 1)
    with attachment.disabled():
        for condition in (*CONDITIONS, RECOMPUTED):
            begun = time.perf_counter()
            read = recomputed(model) if condition == RECOMPUTED else windowed(model, *CONDITIONS[condition])
            found[condition] = nats(its.ids.to(attachment.router.device), read).tolist()
            seconds[condition] = time.perf_counter() - begun
            show.advance(1)
    length = its.ids.shape[1]
    score, above = scored(length, found, its.bytes, seconds)
    config = {"window": WINDOW, "segment_length": SEGMENT, "length": length, "block": BLOCK, "far": FAR, "often": OFTEN}
    measures = {"nats above 4 sinks": above}
    return Record(
        "window-sinks", "none", name, 0, config, [score], measures, seconds={"reading": sum(seconds.values())}
    )


def main(
    data: Annotated[Path, typer.Option(help="Text: a folder or a tar archive of .txt files.")],
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    length: Annotated[int, typer.Option(help="Tokens that are read.")] = 4096,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs/window_sinks"),
) -> None:
    """Reads a novel under each condition and writes one record."""
    folder = folder_of(model)
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    attachment, texts = mnemic.attach(base.eval(), mnemic.EMTConfig(segment_length=SEGMENT)), list(novels(data))
    with Show("sinks of a window") as show:
        record = run(attachment, novel(texts, tokenizer, length, 0, 0, WINDOW), Path(model).name, show)
    record.config["text"] = called(texts)
    record.command = (
        f"python benchmarks/window_sinks.py --data {data.name} --model {Path(model).name} --length {length}"
    )
    print(record.save(out, "window-sinks.json"))


def table(found: Sequence[Record]) -> str:
    """Perplexity of a novel in windows with sinks, without, and with all keys recomputed."""
    if not found:
        return missing("sinks")
    score, config = found[0].scores[0], found[0].config
    start = "perplexity, "
    rows = [[name.removeprefix(start), f"{value:.2f}"] for name, value in score.details.items() if start in name]
    note = f"Perplexity of {score.examples:,} tokens of a novel behind the first window, {found[0].host} without a "
    note += f"memory, windows of {config['window']}, segments of {config['segment_length']}. Recomputed: the base "
    note += f"alone, on the window's tokens anew for every segment. Made by `{found[0].command}`."
    return f"{markdown(['window', 'perplexity'], rows)}\n\n{note}"


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"window-sinks": table(records(results, "window-sinks"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
