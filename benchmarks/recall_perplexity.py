"""Perplexity with recall: is a novel told better when what has left the window is found again while it is read?

Novels that were held out are read 256 tokens at a time with a window of 1,024. Beside recall, which retrieves for every
token and makes its keys that way (`recall_in_reading`), stand the first tokens and the window, the window alone, and
the base with all of the text in its window, as far as it has positions: all of them on the same tokens, of which those
count that have a whole window behind them. An excess over recall comes with its interval: a bootstrap of blocks of 256
tokens, in pairs.

    python benchmarks/recall_perplexity.py --data novels.tar.xz --lengths 4096,8192,32768 --documents 2 --out results

What a novel gave under a condition is kept under `runs/recall_perplexity`: a run that was stopped goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import called, hold_out
from mnemic.bench.experiments import Reporter
from mnemic.bench.results import Record, Score, records
from mnemic.checkpoints import folder_of
from mnemic.cli.show import Show, Table, console
from mnemic.host.arguments import with_cache
from mnemic.memories.recall import RecallConfig
from mnemic.tasks.documents import novels, tokenize
from mnemic.texts import around
from needles import EVERYTHING, SETTINGS, SINKS, WINDOW, Bench, Kept, beside_default, prepared, under
from paired import difference

BLOCK = 256
"""Tokens that are drawn together by the bootstrap, and that one call reads."""


@dataclass(frozen=True)
class Novel:
    """The tokens of a part of a novel, and the bytes of those behind a window."""

    ids: Int[Tensor, "1 t"]
    bytes: int


def novel(texts: Sequence[tuple[str, str]], tokenizer: Any, length: int, number: int, seed: int, window: int) -> Novel:
    """`length` tokens of a novel from a line in its middle on; `number` is that among the novels that have as many.

    Raises:
        ValueError: a length without a whole block behind the window, and too few novels of it.
    """
    if length % BLOCK or length <= window:
        raise ValueError(f"{length} tokens; use a multiple of {BLOCK} above the window of {window}")
    source, start, left = random.Random(seed), around(tokenizer)[0], number
    for _, text in source.sample(list(texts), len(texts)):
        begin, count = 1 + text.find("\n", len(text) // 4), length - len(start)
        part = text[begin : begin + 8 * count]
        if len(part) < 2 * count or len((tokens := tokenize(part, tokenizer)).ids) < count:
            continue
        if not left:
            ids = torch.cat([torch.tensor(start, dtype=torch.long), tokens.ids[:count]])
            return Novel(ids[None], int(tokens.lengths[window - len(start) : count].sum()))
        left -= 1
    raise ValueError(f"{number - left} novels held out have {length:,} tokens, and {number + 1} are asked for")


# --- reading ---------------------------------------------------------------------------------------------------------


def conditions(bench: Bench, length: int) -> dict[str, RecallConfig]:
    """What a novel is read under, and with which config; the first is the score."""
    found = {f"recall, {name}": config for name, config in bench.settings.items()}
    found |= {SINKS: bench.config.replace(budget=0), WINDOW: bench.config}
    if length <= (getattr(bench.model.config, "max_position_embeddings", None) or math.inf):
        found[EVERYTHING] = bench.config
    return found


@torch.no_grad()
def nats(
    bench: Bench, ids: Int[Tensor, "1 t"], name: str, config: RecallConfig, advance: Callable[[int], object]
) -> Float[Tensor, " n"]:
    """The mean nats a token of each block behind the window."""
    found, last = [], None
    ids = ids.to(bench.model.device)
    with _reader(bench, name, config) as read:
        for part in ids.split(BLOCK, 1):
            logits = read(part)[0].float()
            if last is not None:
                found.append(F.cross_entropy(torch.cat([last, logits[:-1]]), part[0]))
            last = logits[-1:]
            advance(part.shape[1])
    first = (config.window or BLOCK) // BLOCK - 1  # no token predicts the first block's first, which is left out
    return torch.stack(found)[first:].cpu()


@contextlib.contextmanager
def _reader(bench: Bench, name: str, config: RecallConfig) -> Iterator[Callable[[Tensor], Tensor]]:
    """What gives the logits of the next tokens of a stream."""
    model = bench.model
    if name == EVERYTHING:
        cache = DynamicCache(config=model.config)
        with bench.attachment.disabled():
            yield lambda part: model(input_ids=part, **with_cache(model, cache)).logits
    else:
        session = mnemic.Session(model)
        with bench.attachment.disabled() if name == WINDOW else under(bench.attachment, config):
            yield lambda part: session.forward(part).logits


def run(
    bench: Bench,
    texts: Sequence[tuple[str, str]],
    lengths: Sequence[int],
    documents: int,
    seed: int,
    model: str,
    folder: Path,
    show: Reporter,
) -> Record:
    """All novels under all conditions; what `folder` has is not read again."""
    window = bench.config.window or BLOCK
    about = {"kind": "perplexity", "model": model, "seed": seed, "text": called(texts), "window": window}
    about |= beside_default(bench)
    kept, scores, above, read = Kept(folder, about), [], {}, 0.0
    for length in lengths:
        found = {name: [] for name in conditions(bench, length)}
        seconds, size = dict.fromkeys(found, 0.0), 0
        show.phase(f"{length:,} tokens", length * documents * len(found))
        for number in range(documents):
            its = novel(texts, bench.tokenizer, length, number, seed, window)
            size += its.bytes
            there = kept.values["documents"].setdefault(f"{length} tokens, number {number}", {})
            for name, config in conditions(bench, length).items():
                mark = json.dumps(config.to_dict())
                if there.get(name, {}).get("config") != mark:
                    begun = time.perf_counter()
                    blocks = nats(bench, its.ids, name, config, show.advance)
                    there[name] = {"config": mark, "nats": blocks.tolist(), "seconds": time.perf_counter() - begun}
                    kept.save()
                found[name] += there[name]["nats"]
                seconds[name] += there[name]["seconds"]
        score, above[str(length)] = scored(length, found, size, seconds)
        scores.append(score)
        read += sum(seconds.values())
    return Record(
        task="recall-perplexity",
        mechanism="recall",
        host=f"{model}, untrained",
        seed=seed,
        config={
            **about,
            "memory": bench.config.to_dict(),
            "settings": {name: config.to_dict() for name, config in bench.settings.items()},
            "lengths": list(lengths),
            "documents": documents,
            "block": BLOCK,
        },
        scores=scores,
        measures={"nats above recall": above},
        seconds={
            "reading": sum(value for score in scores for name, value in score.details.items() if "second" in name)
        },
    )


def scored(
    length: int, found: dict[str, list[float]], size: int, seconds: dict[str, float]
) -> tuple[Score, dict[str, dict[str, float]]]:
    """Bits a byte of one length, and by how many nats a token the others are above the first, block by block."""
    blocks = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
    own, *others = blocks
    tokens = BLOCK * len(blocks[own])
    bytes_a_token = size / tokens
    bits = {name: float(each.mean()) / math.log(2) / bytes_a_token for name, each in blocks.items()}
    details = {"bytes a labelled token": bytes_a_token}
    for name, each in blocks.items():
        details |= {f"nats, {name}": float(each.mean()), f"perplexity, {name}": math.exp(float(each.mean()))}
        details[f"seconds, {name}"] = seconds[name]
    above = {}
    for name in others:
        above[name] = difference(blocks[own], blocks[name])
        above[name]["blocks"] = above[name].pop("documents")
    score = Score(
        length=length,
        tokens=length,
        examples=tokens,
        score=bits.pop(own),
        controls=bits,
        floors={},
        ceiling=None,
        details=details,
        outcomes={
            "memory" if name == own else name: " ".join(f"{value:.6f}" for value in values)
            for name, values in found.items()
        },
    )
    return score, above


def table(record: Record) -> Table:
    """Perplexity at each length, and by how many nats it is above that of recall."""
    made = Table(title="perplexity behind the window (nats above recall, 95 %)", title_justify="left")
    made.add_column("tokens")
    own = f"recall, {next(iter(record.config['settings']))}"
    names = [own, *dict.fromkeys(name for score in record.scores for name in score.controls)]
    for name in names:
        made.add_column(name, justify="right")
    for score in record.scores:
        cells, above = [], record.measures["nats above recall"][str(score.length)]
        for name in names:
            cell = f"{score.details[f'perplexity, {name}']:.3f}" if name == own or name in above else "-"
            if name in above:
                cell += " ({mean:+.4f}, {low:+.4f} to {high:+.4f})".format(**above[name])
            cells.append(cell)
        made.add_row(f"{score.length:,}", *cells)
    return made


def main(
    data: Annotated[Path, typer.Option(help="Text: a folder or a tar archive of .txt files.")],
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens that are read, by commas.")] = "4096,8192,32768",
    documents: Annotated[int, typer.Option(min=1, help="Novels of each length.")] = 2,
    settings: Annotated[str, typer.Option(help="Of recall, as of needles.py; the first is the score.")] = "default",
    seed: Annotated[int, typer.Option(help="Of the choice of novels.")] = 0,
    bf16: Annotated[bool, typer.Option(help="The base in bfloat16.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs/recall_perplexity/records"),
) -> None:
    """Reads novels under each condition and writes one record."""
    if unknown := sorted(set(named := settings.split(",")) - SETTINGS.keys()):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known: {', '.join(SETTINGS)}")
    _, held = hold_out(novels(data), 0.3)
    bench = prepared(folder_of(model), named, {}, bf16)
    bench.settings = {name: config.replace(recall_in_reading=True) for name, config in bench.settings.items()}
    counts, called_by = [int(length) for length in lengths.split(",")], Path(model).name
    with Show("recall, perplexity") as show:
        record = run(bench, held, counts, documents, seed, called_by, Path("runs/recall_perplexity"), show)
    record.command = (
        f"python benchmarks/recall_perplexity.py --data {data.name} --model {called_by} --lengths {lengths} "
        f"--documents {documents} --settings {settings} --seed {seed}{' --bf16' * bf16}"
    )
    console.print(table(record))
    of = ("" if model == "smollm2" else f"-{called_by}") + "-bf16" * bf16
    console.print(record.save(out, f"recall-perplexity{of}{f'-seed{seed}' if seed else ''}.json"))


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"recall-perplexity": page(records(results, "recall-perplexity"))}


def page(found: Sequence[Record]) -> str:
    """Perplexity under each condition, a row for each length, and the nats above recall with their interval."""
    if not found:
        return missing("the perplexity of novels with recall")
    rows = []
    for record in found:
        own = f"recall, {next(iter(record.config['settings']))}"
        for score in record.scores:
            above = record.measures["nats above recall"][str(score.length)]
            for name in (own, *above):
                shown = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**above[name]) if name in above else ""
                rows.append([f"{score.length:,}", name, f"{score.details[f'perplexity, {name}']:.2f}", shown])
    config = found[0].config
    note = f"{found[0].host}, {config.get('dtype', 'float32')}, a window of {config['window']:,}; novels of a length: "
    note += f"{config['documents']}. In brackets the interval of 95 %. Made by `{found[0].command}`."
    return f"{markdown(['tokens', 'read with', 'perplexity', 'nats a token above recall'], rows)}\n\n{note}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
