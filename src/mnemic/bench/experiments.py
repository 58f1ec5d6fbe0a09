"""The recall experiments from beginning to end: base, memory, evaluation, record. Progress goes to a `Reporter`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mnemic.attachment import Attachment, attach
from mnemic.bench.recall import evaluate
from mnemic.bench.results import Record, Score
from mnemic.memories.base import MemoryConfig
from mnemic.tasks.recall import RecallTask, SymbolRecall, generator
from mnemic.training import Batch, train


class Reporter(Protocol):
    """Who is told how a run goes on; the command line draws it, tests are silent."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` steps begins."""

    def advance(self, steps: int, **values: float) -> None:
        """`steps` more are done."""

    def score(self, score: Score) -> None:
        """A length was measured."""


class Silent:
    """Tells nobody."""

    def phase(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self, steps: int, **values: float) -> None:
        """Ignored."""

    def score(self, score: Score) -> None:
        """Ignored."""


@dataclass
class Recipe:
    """How a memory is trained on recall: no filler at first, then streams of ever more of it as the answers get right.

    A step's number of fillers is drawn evenly in its logarithm up to a maximum. Whenever the running accuracy passes
    `pass_mark` the maximum grows by `growth`, up to `longest`. Long streams come in smaller batches: at most `segments`
    segments a step, but never fewer than `rows` / 4 streams. Filler is drawn from a `pool` of that many segments.
    """

    steps: int
    rows: int = 64
    longest: int = 64
    learning_rate: float = 2e-3
    growth: float = 1.6
    pass_mark: float = 0.97
    segments: int = 1024
    pool: int = 4096
    average: float = 0.98


@dataclass
class Curriculum:
    """Where a training stands; `notes` are what a checkpoint keeps: the maximum of fillers and the running accuracy."""

    task: RecallTask
    recipe: Recipe
    seed: int
    notes: dict[str, float] = field(default_factory=lambda: {"longest": 0.0, "accuracy": 0.0})

    def __post_init__(self) -> None:
        source = generator(self.seed * 1_000_003 + 999_983)
        self.pool = self.task.filler(self.recipe.pool, 1, source)

    def batch(self, step: int) -> Batch:
        """The streams of a step; the same for the same step, seed and notes."""
        source = generator(self.seed * 1_000_003 + step)
        share = float(torch.rand((), generator=source))
        fillers = round(math.exp(share * math.log(int(self.notes["longest"]) + 1))) - 1
        rows = max(self.recipe.rows // 4, min(self.recipe.rows, self.recipe.segments // (fillers + 1)))
        return Batch(*self.task.stream(rows, fillers, source, self.pool))

    def advance(self, accuracy: float) -> None:
        """Takes note of a step's accuracy and moves on when it is good enough."""
        notes, recipe = self.notes, self.recipe
        notes["accuracy"] = 0.95 * notes["accuracy"] + 0.05 * accuracy
        if notes["accuracy"] > recipe.pass_mark and notes["longest"] < recipe.longest:
            notes["longest"] = min(recipe.longest, max(notes["longest"] + 1, notes["longest"] * recipe.growth))
            notes["accuracy"] = recipe.pass_mark - 0.05


@dataclass
class Experiment:
    """A task, a memory, how it is trained, and the lengths in filler segments it is asked at."""

    task: RecallTask
    config: MemoryConfig
    recipe: Recipe
    lengths: Sequence[int]
    rows: int = 512
    batch: int = 128
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def run(
        self, model: nn.Module, host: str, reporter: Reporter | None = None, checkpoint: str | Path | None = None
    ) -> tuple[Attachment, Record]:
        """Attaches, trains and measures; the record is not saved yet."""
        reporter = reporter or Silent()
        torch.manual_seed(self.seed)
        attachment = attach(model, self.config)
        seconds = self._train(attachment, reporter, checkpoint)
        record = Record(
            task=self.task.name,
            mechanism=self.config.kind,
            host=host,
            seed=self.seed,
            config={"memory": self.config.to_dict(), "recipe": asdict(self.recipe), **self.extra},
            seconds={"training": seconds},
        )
        begun = time.monotonic()
        for length in self.lengths:
            reporter.phase(f"ask after {length:,} fillers", self.rows * length)
            score = evaluate(
                attachment,
                self.task,
                length,
                rows=self.rows,
                batch=self.batch,
                seed=self.seed,
                progress=reporter.advance,
            )
            record.scores.append(score)
            record.state_bytes = int(score.details["state_bytes"])
            reporter.score(score)
        record.seconds["evaluation"] = time.monotonic() - begun
        return attachment, record

    def _train(self, attachment: Attachment, reporter: Reporter, checkpoint: str | Path | None) -> float:
        attachment.model.eval()
        reporter.phase("train the memory", self.recipe.steps)
        curriculum = Curriculum(self.task, self.recipe, self.seed)
        seconds, done = 0.0, 0
        for step in train(
            attachment.model,
            curriculum.batch,
            steps=self.recipe.steps,
            learning_rate=self.recipe.learning_rate,
            average=self.recipe.average,
            notes=curriculum.notes,
            checkpoint=checkpoint,
        ):
            seconds = step.seconds
            curriculum.advance(step.accuracy)
            notes = curriculum.notes
            reporter.advance(
                step.step + 1 - done, loss=step.loss, accuracy=notes["accuracy"], fillers=int(notes["longest"])
            )
            done = step.step + 1
        return seconds


def symbol_base(
    task: SymbolRecall, seed: int, reporter: Reporter | None = None, steps: int = 700, attempts: int = 6
) -> tuple[nn.Module, dict[str, float]]:
    """A tiny GPT-2 trained on the spot to answer within its own window; returns it with what training took.

    So small a model may stay for thousands of steps at guessing among the values it sees. It then starts again from
    other weights, up to `attempts` times of `steps` steps. Raises `RuntimeError` when none of them learns the task.
    """
    reporter = reporter or Silent()
    begun = time.monotonic()
    for attempt in range(attempts):
        model, taken, accuracy = _train_base(task, seed + 1_000 * attempt, reporter, steps)
        if accuracy > 0.9:
            seconds = time.monotonic() - begun
            return model, {"steps": taken, "attempts": attempt + 1, "accuracy": accuracy, "seconds": seconds}
    raise RuntimeError(f"{attempts} bases of {steps} steps did not learn to answer in their window; try another seed")


def _train_base(task: SymbolRecall, seed: int, reporter: Reporter, most: int) -> tuple[nn.Module, int, float]:
    """Three blocks of width 64. Embeddings start larger and matrices as `nn.Linear` does, and the number of pairs
    varies from batch to batch: each makes the plateau of guessing rarer.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=task.vocabulary,
            n_positions=task.segment_length,
            n_embd=64,
            n_layer=3,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    nn.init.normal_(model.transformer.wte.weight, std=0.5)
    nn.init.normal_(model.transformer.wpe.weight, std=0.2)
    for parameter in model.transformer.h.parameters():
        if parameter.ndim == 2:
            bound = parameter.shape[0] ** -0.5  # GPT-2 stores its matrices input first
            nn.init.uniform_(parameter, -bound, bound)
    model.lm_head.reset_parameters()
    tasks = [SymbolRecall(task.segment_length, pairs) for pairs in (2, 4, 6, 8)]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    reporter.phase("train the base in its window", most)
    running, step = 0.0, 0
    for step in range(most):
        source = generator(2_000_000_011 + 1_000_003 * seed + step)
        question = tasks[int(torch.randint(len(tasks), (), generator=source))].ask_in_window(64, source)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 if running < 0.97 else 6e-4
        chosen = question.labels[:, 1:] != -100
        logits = model(input_ids=question.ids, use_cache=False).logits[:, :-1][chosen]
        targets = question.labels[:, 1:][chosen]
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * float((logits.argmax(-1) == targets).float().mean())
        reporter.advance(1, loss=loss.item(), accuracy=running)
        if running > 0.998:
            break
    return model.eval(), step + 1, running
