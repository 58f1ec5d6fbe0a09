"""Compact on a real model: what is lost when few keys stand for all that left the window?

Documents in which five things are told (`five-depths` of needles.py) are read 256 tokens at a time with a window of
512. The tokens behind two windows count for perplexity; then each of the five things is asked for, on forks of the
session. A ratio of 16 keeps one key for 16 tokens that have left the window. Beside matching stand other ways to keep
keys, at the first ratio and with as many bytes (they have no masses, so some keys more; a reservoir of earlier queries
takes the place of some); four sinks and the window; the whole document in the base's window; the memory of a document
that was told something else; and BM25, with as many tokens of text as there are keys.

    python benchmarks/compact.py --data novels.tar.xz --documents 2 --out results

What a document gave under a condition is kept under `runs/compact`: a run that was stopped goes on behind it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import called, hold_out
from mnemic.bench.experiments import Reporter
from mnemic.bench.results import Record, Score, records
from mnemic.bench.retrieving import bm25
from mnemic.checkpoints import folder_of
from mnemic.cli.show import Show, Table, console
from mnemic.host.arguments import with_cache
from mnemic.memories.compact import MATCHED, By, CompactConfig
from mnemic.memories.compact_presses import PRESSES, SINKS
from mnemic.state import nbytes
from mnemic.tasks.documents import novels
from needle_documents import KINDS, Document, Place, document
from needles import CHUNK, EVERYTHING, OTHER, Kept, retrieved
from paired import difference

KIND, BLOCK = "five-depths", 256
RESERVOIR = 32
"""Tokens whose queries are kept in place of some keys."""
SINKS_AND_WINDOW, RETRIEVED = "sinks + window", "BM25"


def conditions(
    config: CompactConfig, length: int, ratios: Sequence[int], ways: Sequence[By], width: int, group: int = 1
) -> dict[str, CompactConfig]:
    """With which config a document of `length` tokens is read, under each condition that has one: matching at each
    ratio, of which the first is the score, and other ways at that, and matching with a reservoir. Heads are `width`
    wide, and `group` of queries share one of keys.
    """
    left = length - (config.window or config.segment_length)
    keys = left // ratios[0]
    found = {f"matching, {ratio} x": config.replace(keys=left // ratio) for ratio in ratios}
    # the others have no masses, but for pursuit
    more = keys * (2 * width + 1) // (2 * width)
    found |= {f"{by}, {ratios[0]} x": config.replace(keys=keys if by in MATCHED else more, by=by) for by in ways}
    fewer = keys - math.ceil(RESERVOIR * group * 4 * width / (8 * width + 8))
    if fewer > 0:
        with_reservoir = config.replace(keys=fewer, reservoir=RESERVOIR)
        found[f"matching, with a reservoir of {RESERVOIR}, {ratios[0]} x"] = with_reservoir
    return found | {SINKS_AND_WINDOW: config.replace(keys=SINKS, by="recent")}


class Reading:
    """One document under every condition."""

    def __init__(self, model: Any, tokenizer: Any, text: Document, first: int) -> None:
        self.model, self.tokenizer, self.text, self.first = model, tokenizer, text, first

    @torch.no_grad()
    def under(self, config: CompactConfig) -> dict[str, Any]:
        """What it gives under a condition: nats of the blocks behind `first`, what was said and whether it is right,
        bytes that are carried.
        """
        attachment, begun = mnemic.attach(self.model, config), time.perf_counter()
        try:
            session = mnemic.Session(self.model, self.tokenizer)
            found: dict[str, Any] = {"nats": self._nats(lambda part: session.forward(part).logits)}
            found |= self._asked(lambda: session.fork().answer)
            if config.by == "matching":
                found["other"] = self._asked(lambda: session.fork().answer, other=True)["right"]
            assert session.stream is not None
            return found | {"bytes": nbytes(session.stream.state), "seconds": time.perf_counter() - begun}
        finally:
            attachment.detach()

    @torch.no_grad()
    def everything(self) -> dict[str, Any]:
        """The base with all of it in its window."""
        cache, begun = DynamicCache(config=self.model.config), time.perf_counter()
        nats = self._nats(lambda part: self.model(input_ids=part, **with_cache(self.model, cache)).logits)
        size = sum(nbytes({"k": layer.keys, "v": layer.values}) for layer in cache.layers)  # pyright: ignore
        found = self._asked(lambda: self._greedy(copy.deepcopy(cache)))
        return found | {"nats": nats, "bytes": size, "seconds": time.perf_counter() - begun}

    @torch.no_grad()
    def retrieved(self, budget: int) -> dict[str, Any]:
        """The base with what BM25 finds before the question."""
        chunks = [self.tokenizer.decode(chunk[0]) for chunk in self.text.ids.split(CHUNK, 1)]
        scores = iter(bm25(chunks, [each.asked for each in self.text.own.questions]))
        return self._asked(
            lambda: self._greedy(DynamicCache(config=self.model.config)),
            context=lambda: retrieved(self.text.ids, next(scores), budget)[0].tolist(),
        )

    def _nats(self, read: Callable[[Tensor], Tensor]) -> list[float]:
        found, last = [], None
        for part in self.text.ids.split(BLOCK, 1):
            logits = read(part)[0].float()
            if last is not None:
                found.append(float(F.cross_entropy(torch.cat([last, logits[:-1]]), part[0])))
            last = logits[-1:]
        return found[self.first // BLOCK - 1 :]

    def _asked(
        self,
        answering: Callable[[], Callable[..., Iterator[Any]]],
        other: bool = False,
        context: Callable[[], Sequence[int]] = tuple,
    ) -> dict[str, Any]:
        kind, telling, said = KINDS[KIND], self.text.other if other else self.text.own, []
        for question in telling.questions:
            before = context()
            prompt = kind.prompt(self.tokenizer, question.asked, context=before, new=bool(before))
            answer = answering()(torch.tensor([prompt]), max_new_tokens=kind.answer, do_sample=False)
            said.append(self.tokenizer.decode([int(token) for token in answer]))
        return {"said": said, "right": telling.right(kind, said)}

    def _greedy(self, cache: DynamicCache) -> Callable[..., Iterator[int]]:
        def answer(ids: Int[Tensor, "1 t"], max_new_tokens: int, do_sample: bool) -> Iterator[int]:
            for _ in range(max_new_tokens):
                logits = self.model(input_ids=ids, **with_cache(self.model, cache), logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                yield int(ids)

        return answer


def run(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    config: CompactConfig,
    length: int,
    ratios: Sequence[int],
    ways: Sequence[By],
    documents: int,
    seed: int,
    name: str,
    folder: Path,
    show: Reporter,
) -> Record:
    """All documents under all conditions; what `folder` has is not read again."""
    window, settings = config.window or config.segment_length, model.config
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    group = settings.num_attention_heads // settings.num_key_value_heads
    configs = conditions(config, length, ratios, ways, width, group)
    about = {"kind": "compact", "model": name, "seed": seed, "text": called(texts), "window": window, "length": length}
    kept, size, found = Kept(folder, about), 0, {}
    show.phase(f"{length:,} tokens", length * documents * (len(configs) + 1))
    for number in range(documents):
        text = document(texts, tokenizer, Place(KIND, length, 0.0, number), seed, window)
        size += len(tokenizer.decode(text.ids[0, 2 * window :]).encode())
        reading = Reading(model, tokenizer, text, 2 * window)
        its = kept.values["documents"].setdefault(f"number {number}", {})
        budget = next(iter(configs.values())).keys
        todo: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
            EVERYTHING: (None, reading.everything),
            RETRIEVED: (budget, lambda reading=reading: reading.retrieved(next(iter(configs.values())).keys)),
        }
        for each, own in configs.items():
            todo[each] = own.to_dict(), lambda reading=reading, own=own: reading.under(own)
        for each, (settings, give) in todo.items():
            mark = json.dumps(settings)
            if its.get(each, {}).get("config") != mark:
                its[each] = {"config": mark, **give()}
                kept.save()
            show.advance(length if "nats" in its[each] else 0)
            found.setdefault(each, []).append(its[each])
    own = next(iter(configs))
    ordered = {each: found[each] for each in [*configs, EVERYTHING, RETRIEVED]}
    scores, above = scored(ordered, own, length, size)
    return Record(
        task="compact",
        mechanism="compact",
        host=f"{name}, untrained",
        seed=seed,
        config={
            **about,
            "settings": {each: its.to_dict() for each, its in configs.items()},
            "needles": asdict(KINDS[KIND]),
            "documents": documents,
            "block": BLOCK,
        },
        scores=scores,
        measures={
            f"nats above {own}": above,
            "bytes": {each: its[0]["bytes"] for each, its in ordered.items() if "bytes" in its[0]},
        },
        state_bytes=ordered[own][0]["bytes"],
        seconds={each: sum(one.get("seconds", 0.0) for one in its) for each, its in ordered.items()},
    )


def scored(
    found: dict[str, list[dict[str, Any]]], own: str, length: int, size: int
) -> tuple[list[Score], dict[str, dict[str, float]]]:
    """Bits a byte and the share of things that were found again; and by how many nats a token others are above."""
    nats = {name: [nat for one in its for nat in one["nats"]] for name, its in found.items() if "nats" in its[0]}
    blocks = {name: torch.tensor(each, dtype=torch.float64) for name, each in nats.items()}
    count = BLOCK * len(nats[own])
    bits = {name: float(each.mean()) / math.log(2) / (size / count) for name, each in blocks.items()}
    details = {"bytes a labelled token": size / count}
    details |= {f"perplexity, {name}": math.exp(float(each.mean())) for name, each in blocks.items()}
    outcomes = {name: " ".join(f"{nat:.6f}" for nat in each) for name, each in nats.items()}
    told = {name: "".join(one["right"] for one in its) for name, its in found.items()}
    told |= {
        f"{OTHER}, {name}": "".join(one["other"] for one in its) for name, its in found.items() if "other" in its[0]
    }
    right = {name: each.count("1") / len(each) for name, each in told.items()}
    scores = [
        Score(length, length, count, bits.pop(own), bits, {}, None, details, {"memory": outcomes.pop(own), **outcomes}),
        Score(
            length,
            length,
            len(told[own]),
            right.pop(own),
            right,
            KINDS[KIND].floors,
            1.0,
            {},
            {"memory": told.pop(own), **told},
        ),
    ]
    above = {name: difference(blocks[own], each) for name, each in blocks.items() if name != own}
    for each in above.values():
        each["blocks"] = each.pop("documents")
    return scores, above


def table(record: Record) -> Table:
    """Perplexity and what was found again, under each condition."""
    made = Table(title=f"{record.scores[0].length:,} tokens", title_justify="left")
    for column in ("", "perplexity", "found again", "bytes"):
        made.add_column(column, justify="left" if not column else "right")
    told, own = record.scores[1], next(iter(record.config["settings"]))
    for name in (own, *told.controls):
        ppl, size = record.scores[0].details.get(f"perplexity, {name}"), record.measures["bytes"].get(name)
        outcome = told.outcomes["memory" if name == own else name]
        made.add_row(
            name,
            "" if ppl is None else f"{ppl:.2f}",
            f"{outcome.count('1')} of {len(outcome)}",
            "" if size is None else f"{size:,}",
        )
    return made


def main(
    data: Annotated[Path, typer.Option(help="Text: a folder or a tar archive of .txt files.")],
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    length: Annotated[int, typer.Option(min=1024, help="Tokens of a document.")] = 4096,
    ratios: Annotated[str, typer.Option(help="Tokens for each key, by commas; the first is the score.")] = "16,4",
    ways: Annotated[str, typer.Option(help="Others to keep keys, by commas.")] = ",".join(PRESSES),
    documents: Annotated[int, typer.Option(min=1, help="Documents.")] = 2,
    seed: Annotated[int, typer.Option(help="Of texts and numbers.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs/compact/records"),
) -> None:
    """Reads documents under each condition and writes one record."""
    _, held = hold_out(novels(data), 0.3)
    folder = folder_of(model)
    host: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    host.requires_grad_(False)
    known = ["pursuit", *PRESSES]
    if unknown := sorted(set(others := ways.split(",")) - set(known)):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    counts, name = [int(ratio) for ratio in ratios.split(",")], Path(model).name
    arguments = (
        held,
        CompactConfig(),
        length,
        counts,
        cast("list[By]", others),
        documents,
        seed,
        name,
        Path("runs/compact"),
    )
    with Show("compact") as show:
        record = run(host, AutoTokenizer.from_pretrained(folder), *arguments, show)
    record.command = (
        f"python benchmarks/compact.py --data {data.name} --model {name} --length {length} --ratios {ratios} "
        f"--ways {ways} --documents {documents} --seed {seed}"
    )
    console.print(table(record))
    of = "" if model == "smollm2" else f"-{name}"
    console.print(record.save(out, f"compact{of}{f'-seed{seed}' if seed else ''}.json"))


def page(found: Sequence[Record]) -> str:
    """Perplexity and what was found again with few keys in place of all that left the window, beside other ways."""
    if not found:
        return missing("compact")
    record, (told, asked) = found[0], found[0].scores
    own = next(iter(record.config["settings"]))
    above, rows = record.measures[f"nats above {own}"], []
    for name in (own, *asked.controls):
        perplexity, size = told.details.get(f"perplexity, {name}"), record.measures["bytes"].get(name)
        outcome = asked.outcomes["memory" if name == own else name]
        rows.append(
            [
                f"**{name}**" if name == own else name,
                "" if perplexity is None else f"{perplexity:.2f}",
                "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**above[name]) if name in above else "",
                f"{outcome.count('1')} of {len(outcome)}",
                "" if not size else f"{size / 2**20:.1f}",
            ]
        )
    config = record.config
    count = f"{config['documents']} document{'s' if config['documents'] > 1 else ''}"
    note = f"{count} of {config['length']:,} tokens of novels in which five things are told, "
    note += f"{record.host}, window {config['window']}; perplexity of {told.examples:,} tokens behind the first "
    note += f"{2 * config['window']:,}; in brackets 95 % of a bootstrap of blocks of {config['block']} tokens. MiB are "
    note += f"those of the memory, and for everything in the window of its keys. Made by `{record.command}`."
    header = ["what is kept", "perplexity", f"nats a token above {own}", "found again", "MiB"]
    return f"{markdown(header, rows)}\n\n{note}"


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"compact": page(records(results, "compact"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
