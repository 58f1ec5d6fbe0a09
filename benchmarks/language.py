"""Language modelling: does what a memory has read of a novel make the rest of it easier to predict?

A model reads text a segment at a time, its window, and the memory is all it has of earlier segments. It is trained on
novels of some authors and tested on novels of others, in order, every segment under five conditions:

    memory             the document's own memory
    other document     the memory of a novel by another author, which has read as many segments
    last segment       a memory that began with the segment before
    empty              a memory that begins here
    no memory          the memory switched off

`other document` has everything that training gave the memory but the right content, so `memory` must be below it for
the content to count. What `memory` is below `last segment` comes from more than one segment ago.

Where the base trains too, the same base trained without a memory, for as many steps on the same batches, is one more
control.

    python benchmarks/language.py --novels novels.tar.xz --model smollm2 --out results
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_training import Recipe, fit, small_model, spread
from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import Attachment, attach, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, Score, records
from mnemic.cli.models import CAUSAL
from mnemic.cli.models import found as folder_of
from mnemic.cli.show import Show, Table, console
from mnemic.host.arguments import with_cache
from mnemic.memories.memoria import MemoriaConfig
from mnemic.memory import MemoryConfig
from mnemic.stream import Stream
from mnemic.tasks.documents import DocumentBatch, DocumentStream, Tokens, novels, tokenize
from paired import difference
from scripts import Checkpoints, Out, Seeds, launch, numbers, saved, today

CONDITIONS = ("memory", "other document", "last segment", "empty", "no memory")
TRAINED_WITHOUT = "trained without"
STARTS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Where the ranges of positions begin, in segments of the document."""


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Excerpts to train on, and one of each novel by an author who is not among them, by name."""

    train: list[Tokens]
    test: dict[str, Tokens]


def author(name: str) -> str:
    """Files are named author first: `Eliot_Adam_1859`."""
    return name.split("_")[0]


def texts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    train: int,
    test: int,
    excerpts: int,
    held_out: int = 4,
    skip: int = 5_000,
) -> Texts:
    """Excerpts of `train` tokens, `excerpts` of them in all, and of `test` tokens, one a novel.

    Every `held_out`th author is kept for the test. The first `skip` characters of a novel are left out: title pages and
    contents. Training excerpts lie evenly over a novel.
    """
    found = novels(path)
    authors = sorted({author(name) for name, _ in found})
    if len(authors) < 2 * held_out:
        raise ValueError(f"{path} has novels of {len(authors)} authors; a test needs at least {2 * held_out}")
    kept = set(authors[held_out - 1 :: held_out])
    some: list[Tokens] = []
    tests = {name: take(text, skip, test, tokenizer) for name, text in found if author(name) in kept}
    others = [text for name, text in found if author(name) not in kept]
    for number, text in enumerate(others):
        count = (number + 1) * excerpts // len(others) - number * excerpts // len(others)
        for place in range(count):
            some.append(take(text, skip + place * max(0, len(text) - skip) // count, train, tokenizer))
    return Texts(
        [excerpt for excerpt in some if len(excerpt) == train],
        {name: excerpt for name, excerpt in tests.items() if len(excerpt) == test},
    )


def take(text: str, start: int, count: int, tokenizer: Any) -> Tokens:
    """`count` tokens of a text from the first line end behind `start` on; fewer where it ends before."""
    start = max(text.find("\n", start), 0)
    tokens = tokenize(text[start : start + 8 * count], tokenizer)
    return Tokens(tokens.ids[:count], tokens.lengths[:count])


def apart(names: Sequence[str]) -> list[int]:
    """For each document another one, by another author: by the fewest places that no author's novels span."""
    for shift in range(1, len(names)):
        order = [(place + shift) % len(names) for place in range(len(names))]
        if all(author(name) != author(names[other]) for name, other in zip(names, order, strict=True)):
            return order
    raise ValueError(f"{len(names)} documents cannot be paired so that their authors differ")


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bits:
    """Bits of each document's segments by condition, `[documents, segments]`, and the bytes they are bits of."""

    bits: dict[str, Float[Tensor, "n s"]]
    bytes: Float[Tensor, "n s"]

    def mean(self, condition: str, start: int = 0, stop: int | None = None) -> Float[Tensor, " n"]:
        """Bits a byte of each document over segments `start` to `stop`."""
        return self.bits[condition][:, start:stop].sum(1) / self.bytes[:, start:stop].sum(1)


@torch.no_grad()
def measure(
    model: nn.Module,
    documents: dict[str, Tokens],
    length: int,
    attachment: Attachment | None = None,
    advance: Callable[..., None] = lambda steps, **values: None,
) -> Bits:
    """Reads all documents abreast, every segment under each condition; without an attachment as the model is."""
    model.eval()
    names = list(documents)
    others = apart(names)
    batches = list(DocumentStream(list(documents.values()), len(names), length, None, 1))
    bits: dict[str, list[Tensor]] = {}
    own: Stream | None = None
    last: Stream | None = None
    for batch in batches:
        ids = batch.input_ids

        def note(name: str, logits: Tensor, batch: DocumentBatch = batch) -> None:
            nats = F.cross_entropy(logits.float().transpose(1, 2), batch.targets, reduction="none")
            bits.setdefault(name, []).append(nats.sum(1).double() / math.log(2))

        if attachment is None:
            note(TRAINED_WITHOUT, model(input_ids=ids, use_cache=False).logits)
        else:
            with attachment.disabled():
                note("no memory", model(input_ids=ids, use_cache=False).logits)
            # of the first segment all memories are new
            note("other document", read(attachment, ids, None if own is None else own.select(others))[0])
            note("last segment", read(attachment, ids, last)[0])
            logits, own = read(attachment, ids, own)
            note("memory", logits)
            logits, last = read(attachment, ids, None)
            note("empty", logits)
        advance(1)
    lengths = torch.stack([batch.target_bytes.sum(1) for batch in batches], 1).double()
    return Bits({name: torch.stack(values, 1) for name, values in bits.items()}, lengths)


def read(attachment: Attachment, ids: Tensor, stream: Stream | None) -> tuple[Tensor, Stream]:
    """Logits of one segment read with the memory of `stream`, and the stream behind it."""
    cache = memory_cache(attachment.model, attachment.router.segment_length)
    cache.memory.stream = stream
    logits = attachment.model(input_ids=ids, **with_cache(attachment.model, cache)).logits
    assert cache.memory.stream is not None
    return logits, cache.memory.stream


def spans(segments: int) -> list[tuple[int, int]]:
    """The ranges of positions in documents of that many segments."""
    starts = [start for start in STARTS if start < segments]
    return list(zip(starts, [*starts[1:], segments], strict=True))


def scores(bits: Bits, length: int) -> list[Score]:
    """One score a range of positions: mean bits a byte over documents. Its length is where the range begins."""
    found = []
    for start, stop in spans(bits.bytes.shape[1]):
        means = {name: float(bits.mean(name, start, stop).mean()) for name in bits.bits}
        found.append(
            Score(
                length=start,
                tokens=start * length,
                examples=len(bits.bytes) * (stop - start),
                score=means.pop("memory"),
                controls=means,
                floors={},
                ceiling=None,
                details={"segments": stop - start},
            )
        )
    return found


def summary(bits: Bits) -> dict[str, Any]:
    """Over all but each document's first segment, where memories are empty: bits a byte, and every control's excess."""
    means = {name: bits.mean(name, 1) for name in bits.bits}
    own = means["memory"]
    return {
        "bits per byte": {name: float(values.mean()) for name, values in means.items()},
        "above memory": {name: difference(own, values) for name, values in means.items() if name != "memory"},
    }


# --- the experiment --------------------------------------------------------------------------------------------------


@dataclass
class Experiment:
    """What is trained on what: a memory on the frozen base `model`, a folder or hub id, or, without one, a memory and a
    small Llama together, over the tokens of `tokenizer` (a folder, a hub id or "bytes").
    """

    config: MemoryConfig
    recipe: Recipe
    model: str | None = None
    tokenizer: str = "bytes"
    segments: int = 64
    seed: int = 0
    layers: int = 3
    width: int = 128

    @property
    def task(self) -> str:
        """The name of its records."""
        return "novels-scratch" if self.model is None else "novels-frozen"

    def run(
        self, path: str | os.PathLike[str], reporter: Reporter | None = None, checkpoints: Path | None = None
    ) -> Record:
        """Trains and measures on the novels at `path`; the record is not saved yet."""
        reporter, length, recipe = reporter or Silent(), self.config.segment_length, self.recipe
        name = self.model or self.tokenizer
        tokenizer = name if name == "bytes" else AutoTokenizer.from_pretrained(name)
        self.vocabulary = 256 if isinstance(tokenizer, str) else len(tokenizer)
        excerpts = -(-(recipe.steps + recipe.alone) * recipe.rows * recipe.chunk // recipe.excerpt)
        corpus = texts(path, tokenizer, train=recipe.excerpt * length, test=self.segments * length, excerpts=excerpts)
        seconds: dict[str, float] = {}

        def trained(model: nn.Module, recipe: Recipe, name: str, attachment: Attachment | None = None) -> nn.Module:
            reporter.phase(name, recipe.steps)
            file = f"{self.task}-{self.config.kind}-{self.seed}-{name.replace(' ', '-')}.safetensors"
            place = checkpoints / file if checkpoints else None
            order = 2 * self.seed + (name == "base alone")
            seconds[name] = fit(model, corpus.train, length, recipe, order, attachment, reporter.advance, place)
            return model

        base = self._base()
        if recipe.alone:
            trained(base, replace(recipe, steps=recipe.alone, hold=1.0), "base alone")
        model = copy.deepcopy(base)
        torch.manual_seed(self.seed)
        attachment = attach(model, self.config, freeze=self.model is not None)
        if recipe.sharp:
            spread(attachment, corpus.train, recipe.sharp)
        trained(model, recipe, "with memory", attachment)
        reporter.phase("read other novels", self.segments)
        begun = time.monotonic()
        bits = measure(model, corpus.test, length, attachment, reporter.advance)
        seconds["evaluation"] = time.monotonic() - begun
        if self.model is None:
            bits.bits.update(measure(trained(base, recipe, "without memory"), corpus.test, length).bits)
        return self._record(bits, corpus, attachment, seconds)

    def _base(self) -> nn.Module:
        if self.model is None:
            return small_model(self.vocabulary, self.config.segment_length, self.seed, self.layers, self.width)
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def _record(self, bits: Bits, corpus: Texts, attachment: Attachment, seconds: dict[str, float]) -> Record:
        own = sum(parameter.numel() for parameter in attachment.parameters())
        host = (
            f"Llama of {self.layers} blocks, width {self.width}, {self.vocabulary} tokens, trained with its memory"
            if self.model is None
            else f"{Path(self.model).name}, frozen"
        )
        ranges = spans(self.segments)
        documents = {
            name: {
                condition: [round(float(bits.mean(condition, *span)[row]), 5) for span in ranges]
                for condition in bits.bits
            }
            for row, name in enumerate(corpus.test)
        }
        return Record(
            task=self.task,
            mechanism=self.config.kind,
            host=host,
            seed=self.seed,
            config={"memory": self.config.to_dict(), "recipe": asdict(self.recipe), "segments": self.segments},
            scores=scores(bits, self.config.segment_length),
            measures={
                "unit": "bits per byte",
                **summary(bits),
                "parameters": {
                    "memory": own,
                    "base": sum(parameter.numel() for parameter in attachment.model.parameters()) - own,
                },
                "training excerpts": len(corpus.train),
                "ranges": ranges,
                "bits per byte by document and range": documents,
            },
            seconds=seconds,
        )


def published(
    model: str | None, tokenizer: str = "bytes", seed: int = 0, steps: int | None = None, segments: int = 64
) -> Experiment:
    """The settings of the published runs of Memoria, on a frozen base or from scratch."""
    config = MemoriaConfig(segment_length=32, working=16, reminded_stm=16, reminded_ltm=16, stm_capacity=64)
    recipe = Recipe(
        steps=steps or (250 if model else 600), learning_rate=3e-3, warm=20, alone=0 if model else 400, sharp=3.0
    )
    return Experiment(config, recipe, model, tokenizer, segments, seed)


# --- the tables -------------------------------------------------------------------------------------------------------


def table(found: Sequence[Record]) -> str:
    """Bits a byte on held-out novels under every condition, and by how much the controls are above the memory."""
    rows = []
    for record in found:
        m = record.measures
        for name, bits in m["bits per byte"].items():
            above = m["above memory"].get(name)
            rows.append(
                [
                    "frozen" if record.task == "novels-frozen" else "from scratch",
                    str(record.seed),
                    f"**{name}**" if name == "memory" else name,
                    f"{bits:.4f}",
                    "" if above is None else f"{above['mean']:+.4f} ({above['low']:+.4f} to {above['high']:+.4f})",
                    "" if above is None else f"{above['documents']:.0f} of {above['of']:.0f}",
                ]
            )
    header = ["base", "seed", "condition", "bits a byte", "above the memory (95 %)", "novels where it is"]
    hosts = dict.fromkeys(record.host for record in found)
    commands = dict.fromkeys(record.command.split(" --seed")[0] for record in found)
    return markdown(header, rows) + (
        f"\n\nHeld-out novels of other authors than those trained on, read in order. Hosts: {'; '.join(hosts)}. "
        "Made by " + ", ".join(f"`{command}`" for command in commands) + "."
    )


def positions(found: Sequence[Record]) -> str:
    """The same by position in the document, means over seeds."""
    rows = []
    for task, title in (("novels-frozen", "frozen"), ("novels-scratch", "from scratch")):
        records = [record for record in found if record.task == task]
        if not records:
            continue
        for place, first in enumerate(records[0].scores):
            scores = [record.scores[place] for record in records]
            names = ("other document", "last segment", "no memory")
            cells = [sum(s.controls[name] - s.score for s in scores) / len(scores) for name in names]
            last = first.length + int(first.details["segments"]) - 1
            mean = sum(s.score for s in scores) / len(scores)
            rows.append([title, f"{first.length}-{last}", f"{mean:.4f}", *(f"{cell:+.4f}" for cell in cells)])
    header = ["base", "segment of the document", "memory", "other document", "last segment", "no memory"]
    return "By position: the memory's bits a byte, and by how much each control is above it, means over seeds.\n\n" + (
        markdown(header, rows)
    )


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name."""
    found = [record for record in records(results) if record.task.startswith("novels-")]
    found = today(found, "bench language", "language.py")
    makers = {"memoria-language": table, "memoria-language-positions": positions}
    return {name: make(found) if found else missing(name) for name, make in makers.items()}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    novels: Annotated[Path, typer.Option(help="Novels, named author first: a folder or archive of .txt files.")],
    model: Annotated[str | None, typer.Option(help=CAUSAL, callback=folder_of)] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Without a model: whose tokens a small one learns; or bytes.")
    ] = "bytes",
    seeds: Seeds = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Training steps, if not those of the published runs.")] = None,
    segments: Annotated[int, typer.Option(help="Segments read of each test novel.")] = 64,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Memoria on novels: bits a byte with a novel's own memory and with every control, by position.

    On a frozen base, or, without --model, on a small one that is trained with its memory and once more without.
    """
    for seed in numbers(seeds):
        experiment = published(model, tokenizer, seed, steps, segments)
        with Show(f"{experiment.task}, seed {seed}") as show:
            record = experiment.run(novels, show, checkpoints)
        printed = Table("from segment", *("memory", *record.scores[0].controls))
        for score in record.scores:
            printed.add_row(str(score.length), *(f"{value:.4f}" for value in (score.score, *score.controls.values())))
        console.print(printed)
        for name, excess in record.measures["above memory"].items():
            console.print(
                f"{name}: {excess['mean']:+.4f} bits a byte above memory, {excess['low']:+.4f} to "
                f"{excess['high']:+.4f}, above in {excess['documents']:.0f} of {excess['of']:.0f} novels"
            )
        name = f"language-{record.mechanism}-{record.task.removeprefix('novels-')}-seed{seed}.json"
        saved(record, out, name)


if __name__ == "__main__":
    launch(app)
