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
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mnemic.attachment import Attachment, attach, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, Score
from mnemic.host.arguments import with_cache
from mnemic.memories.memoria import Memoria, MemoriaConfig
from mnemic.memory import MemoryConfig
from mnemic.state import StateError, read_file, write_file
from mnemic.stream import Stream
from mnemic.tasks.base import generator
from mnemic.tasks.documents import DocumentBatch, DocumentStream, Tokens, novels, tokenize
from mnemic.training import hold_then_fall
from mnemic.unrolling import IGNORED, unroll

CONDITIONS = ("memory", "other document", "last segment", "empty", "no memory")
TRAINED_WITHOUT = "trained without"
CHECKPOINT_SECONDS = 60.0
STARTS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Where the ranges of positions begin, in segments of the document."""


@dataclass
class Recipe:
    """How model or memory are trained: `steps` of AdamW on `rows` streams, `chunk` segments a step.

    The base is first trained for `alone` steps without a memory: one that predicts nothing yet has no use for what it
    cannot see. `sharp` is how sharply the abstractor attends when its training begins (see `spread`); 0 leaves it as it
    is made. Streams read excerpts of `excerpt` segments. Their memory is carried from step to step and begins again
    with every excerpt; gradients stay within a step. Rates rise over `warm` steps, hold and fall.
    """

    steps: int
    rows: int = 16
    chunk: int = 4
    excerpt: int = 64
    learning_rate: float = 2e-3
    warm: int = 50
    hold: float = 0.5
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    alone: int = 0
    sharp: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * min(1.0, (step + 1) / self.warm) * hold_then_fall(step / self.steps, self.hold)


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


# --- training --------------------------------------------------------------------------------------------------------


def small_model(vocabulary: int, length: int, seed: int, layers: int, width: int) -> nn.Module:
    """A Llama with random weights, for one segment. They begin larger than usual, as it has few steps to learn."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
    )


def fit(
    model: nn.Module,
    excerpts: Sequence[Tokens],
    length: int,
    recipe: Recipe,
    seed: int,
    attachment: Attachment | None = None,
    advance: Callable[..., None] = lambda steps, **values: None,
    checkpoint: Path | None = None,
) -> float:
    """Trains everything of the model that is not frozen; with the memory, if it has one. Returns seconds.

    Without an attachment segments are rows of their own, and the same tokens are predicted. A run that was stopped goes
    on from `checkpoint`, with the streams as they stood.
    """
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=recipe.betas, weight_decay=recipe.weight_decay)
    chunks = DocumentStream(excerpts, recipe.rows, recipe.chunk * length, seed)
    first, spent, stream = resume(checkpoint, parameters, optimizer) if checkpoint else (0, 0.0, None)
    begun = saved = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        if attachment is None:
            loss = alone(model, chunks[step], length)
        else:
            loss, stream = carried(attachment, chunks[step], stream)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower learning_rate or clip")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        advance(1, loss=loss.item())
        if checkpoint and (time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == recipe.steps):
            saved = time.monotonic()
            keep(checkpoint, parameters, optimizer, stream, step + 1, spent + saved - begun)
    return spent + time.monotonic() - begun


def keep(
    path: Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    stream: Stream | None,
    step: int,
    seconds: float,
) -> None:
    """Writes what `resume` needs to go on behind `step` steps."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(parameters):
        tensors[f"parameter.{i}"] = parameter
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[parameter].items()}
    meta: dict[str, Any] = {"content": "language training", "step": step, "seconds": seconds}
    if stream is not None:
        tensors |= {f"stream.{name}": tensor for name, tensor in stream.tensors().items()}
        meta["stream"] = {"counts": stream.counts, "written": stream.written, "seen": stream.seen}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, meta)


def resume(
    path: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float, Stream | None]:
    """Steps and seconds of the checkpoint and its streams; nothing done where there is none."""
    if not path.is_file():
        return 0, 0.0, None
    tensors, meta = read_file(path)
    shapes = [tuple(tensors[f"parameter.{i}"].shape) for i in range(len(parameters)) if f"parameter.{i}" in tensors]
    if meta.get("content") != "language training" or shapes != [tuple(each.shape) for each in parameters]:
        raise StateError(f"{path} is not a checkpoint of this training; remove it to start anew")
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            optimizer.state[parameter] = {name: tensors[f"{name}.{i}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    stream = None
    if "stream" in meta:
        named = {name.removeprefix("stream."): tensor for name, tensor in tensors.items() if name.startswith("stream.")}
        state = {name.removeprefix("state."): named[name] for name in named if name.startswith("state.")}
        ledgers = {name: tuple(values) for name, values in meta["stream"].items()}
        stream = Stream(state, named["waiting"], **ledgers, ids=named.get("ids"))
    return meta["step"], meta["seconds"], stream


@torch.no_grad()
def spread(attachment: Attachment, excerpts: Sequence[Tokens], sharp: float) -> None:
    """Scales a new Memoria's abstractor until its attention has scores of deviation `sharp` within a segment and its
    engrams entries of deviation 1 over segments.

    With usual weights its attention is even: all engrams are the mean of their segment, and small beside the biases of
    those who read them, so that a training this short finds next to nothing there.
    """
    memory, length = attachment.memory, attachment.router.segment_length
    assert isinstance(memory, Memoria)
    ids = torch.cat([excerpt.ids[: 16 * length] for excerpt in excerpts[:16]]).view(-1, length)
    made = memory.abstractor
    hidden = attachment.router.watch(attachment.anatomy, ids, memory.writes)[memory.writes[-1]]
    normal = made.norm(hidden)
    made.query.mul_(sharp / (made.query @ made.key.weight @ normal.transpose(1, 2)).std(-1).mean())
    weight = (made.query @ made.key.weight @ normal.transpose(1, 2)).softmax(-1)
    made.value.weight.div_(made.value(weight @ normal).std(0).mean())
    made.contract.bias.zero_()
    made.contract.weight.div_(made(hidden, None).std(0).mean())


def alone(model: nn.Module, batch: DocumentBatch, length: int) -> Tensor:
    """The loss without a memory, of the tokens that `carried` predicts."""
    ids = batch.input_ids.unflatten(1, (-1, length)).flatten(0, 1)
    targets = batch.targets.clone()
    targets[:, -1] = IGNORED  # `unroll` is not told the token behind its last
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def carried(attachment: Attachment, batch: DocumentBatch, stream: Stream | None) -> tuple[Tensor, Stream]:
    """The loss with the memory that `stream` carries, and the stream behind the batch."""
    begins = batch.fresh.nonzero().flatten().tolist()
    if stream is not None and begins:
        stream = stream.reset(attachment.memory, begins)
    unrolled = unroll(attachment.model, batch.input_ids, batch.input_ids, stream=stream)
    return unrolled.loss, unrolled.stream.detach()


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


def difference(lower: Float[Tensor, " n"], higher: Float[Tensor, " n"], draws: int = 10_000) -> dict[str, float]:
    """By how much `higher` is higher, paired by document: mean, the middle 95 % of the bootstrap, and how often."""
    each = higher - lower
    picked = torch.randint(len(each), (draws, len(each)), generator=generator(0))
    means = each[picked].mean(1).sort().values
    return {
        "mean": float(each.mean()),
        "low": float(means[int(0.025 * draws)]),
        "high": float(means[int(0.975 * draws)]),
        "documents": float((each > 0).sum()),
        "of": float(len(each)),
    }


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
