"""Which blocks of a model recall: the attention of each to what is asked for, and how well a few of them do alone.

Documents of novels with five needles are read with recall in all blocks, and each needle is asked for, its answer
given. The attention that a block pays to the needle meanwhile, of its best head of keys, ranks the blocks. Then
memories of the first few of these alone read the same documents: how many answers they would say (greedily, token by
token), and the nats of an answer. The novels are those that `needles.py` does not test on.

    python benchmarks/recall_blocks.py --data novels.tar.xz --out results
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import hold_out
from mnemic.bench.results import Record, records
from mnemic.memories.recall import RecallConfig
from mnemic.tasks.documents import novels
from needle_documents import KINDS
from real_model import opened

KIND = "five-depths"


@dataclass(frozen=True)
class Case:
    """A document `ids [1, t]`, a question behind it, its answer, and where in the document that is told."""

    document: int
    question: Tensor
    answer: Tensor
    told: slice


def main(
    data: Annotated[Path | None, typer.Option(help="Text: a folder or a tar archive of .txt files.")] = None,
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    length: Annotated[int, typer.Option(help="Tokens of a document.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    counts: Annotated[str, typer.Option(help="Numbers of blocks that are tried, by commas.")] = "4,6,8,10,12",
    seed: Annotated[int, typer.Option(help="Draws the documents.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs"),
) -> None:
    """Ranks the blocks, tries the first of them, and writes a record."""
    if data is None:
        raise typer.BadParameter("give --data, a text")
    host, tokenizer, name = opened(model)
    texts, _ = hold_out(novels(data), 0.3)
    told, cases = drawn(tokenizer, texts, length, documents, seed)
    shares, scores = measured(host, told, cases, [int(count) for count in counts.split(",")])
    record = recorded(name, seed, length, documents, shares, scores)
    record.command = (
        f"python benchmarks/recall_blocks.py --data {data.name} --length {length} --documents {documents} "
        f"--counts {counts} --seed {seed}"
    )
    print(record.save(out, "recall-blocks.json"))


def recorded(
    model: str, seed: int, length: int, documents: int, shares: dict[str, list[float]], scores: dict[str, Any]
) -> Record:
    """What was measured, to be saved."""
    config = {"memory": RecallConfig().to_dict(), "length": length, "documents": documents, "kind": KIND}
    record = Record("recall-blocks", "recall", f"{model}, untrained", seed, config)
    record.measures = {"attention": shares, "blocks": scores}
    return record


def drawn(
    tokenizer: Any, texts: list[tuple[str, str]], length: int, documents: int, seed: int
) -> tuple[list[Tensor], list[Case]]:
    """Documents `[1, t]` with needles at even depths, and a case for each question."""
    kind, told, cases = KINDS[KIND], [], []
    for number in range(documents):
        luck = random.Random(f"blocks {seed} {number}")
        text = luck.choice(texts)[1]
        begin = luck.randrange(len(text) // 2)
        prose = tokenizer(text[begin : begin + 6 * length], add_special_tokens=False, verbose=False)["input_ids"]
        telling = kind.telling(f"blocks {seed}", number)
        ids: list[int] = []
        places: list[slice] = []
        step = length // (len(telling.needles) + 1)
        for needle in telling.needles:
            ids += prose[len(ids) : len(ids) + step]
            sentence = tokenizer(needle.told, add_special_tokens=False)["input_ids"]
            places.append(slice(len(ids), len(ids) + len(sentence)))
            ids += sentence
        told.append(torch.tensor([ids + prose[len(ids) : length]]))
        for question in telling.questions:
            (needle,) = question.needles
            asked = kind.prompt(tokenizer, question.asked, before=[], new=False)
            answer = tokenizer(f" {telling.needles[needle].key}", add_special_tokens=False)["input_ids"]
            cases.append(Case(number, torch.tensor([asked]), torch.tensor([answer]), places[needle]))
    return told, cases


@torch.no_grad()
def measured(
    host: Any, told: list[Tensor], cases: list[Case], counts: list[int]
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Of every block the share of each head of keys; of every number of blocks which, right answers, nats."""
    attachment = mnemic.attach(host, RecallConfig())
    sessions = read(host, told)
    total: dict[int, Tensor] = {}
    for case in track(cases, "attention"):
        session = sessions[case.document].fork()
        session.forward(case.question)
        with session.sources() as sources:
            session.forward(case.answer[:, :-1])
        assert sources.noted is not None
        for place, (mass_kn, count) in sources.noted.items():
            share_k = mass_kn[:, case.told].sum(1) / count / len(cases)
            total[place] = total.get(place, torch.zeros_like(share_k)) + share_k
    served = attachment.router.attended
    order = sorted(total, key=lambda place: -float(total[place].max()))
    shares = {f"{served[place]}": [round(share, 4) for share in total[place].tolist()] for place in sorted(total)}
    scores = {f"{len(served)}": {"blocks": served, **asked(sessions, cases)}}
    for count in track(counts, "fewer blocks"):
        attachment.detach()
        blocks = sorted(served[place] for place in order[:count])
        attachment = mnemic.attach(host, RecallConfig(read_layers=blocks))
        scores[f"{count}"] = {"blocks": blocks, **asked(read(host, told), cases)}
        print(count, scores[f"{count}"], flush=True)
    return shares, scores


def read(host: Any, told: list[Tensor]) -> list[mnemic.Session]:
    """A session that has read each document."""
    sessions = [mnemic.Session(host) for _ in told]
    for session, ids in zip(sessions, told, strict=True):
        session.read(ids)
    return sessions


@torch.no_grad()
def asked(sessions: list[mnemic.Session], cases: list[Case]) -> dict[str, float]:
    """The share of answers that would be said, their nats on average, and the bytes of a session's bank."""
    right, nats = 0, 0.0
    for case in cases:
        ids = torch.cat([case.question, case.answer], 1)
        count = case.answer.shape[1]
        logits = sessions[case.document].fork().forward(ids).logits[0, -count - 1 : -1].float()
        right += int((logits.argmax(-1) == case.answer[0]).all())
        nats += float(torch.nn.functional.cross_entropy(logits, case.answer[0], reduction="sum"))
    return {"right": right / len(cases), "nats": round(nats / len(cases), 3), "bytes": sessions[0].nbytes}


def table(found: Sequence[Record]) -> str:
    """What a few blocks recall, those first that attend to needles most."""
    if not found:
        return missing("blocks")
    config, rows = found[0].config, []
    every = max(score["bytes"] for score in found[0].measures["blocks"].values())
    for score in sorted(found[0].measures["blocks"].values(), key=lambda score: len(score["blocks"])):
        blocks, right = score["blocks"], f"{100 * score['right']:.1f}"
        names = "all" if score["bytes"] == every else ", ".join(map(str, blocks))
        rows.append([str(len(blocks)), names, right, f"{score['nats']:.2f}", f"{score['bytes'] / 2**20:.0f}"])
    note = f"Per cent of answers that would be said and nats of an answer, {config['kind']}, {config['documents']} "
    note += f"documents of {config['length']:,} tokens of other novels than those of needles, {found[0].host}. Made by "
    return f"{markdown(['blocks', 'which', 'right', 'nats', 'MiB'], rows)}\n\n{note}`{found[0].command}`."


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"recall-blocks": table(records(results, "recall-blocks"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
