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

from mnemic.attach import Attachment, attach
from mnemic.bench.recall import evaluate
from mnemic.bench.results import Record, Score
from mnemic.memories.base import MemoryConfig
from mnemic.tasks.recall import RecallTask, SymbolRecall, generator
from mnemic.training import Batch, cosine, train


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
    """How a memory is trained on recall: streams of a random number of fillers up to a maximum that grows.

    The maximum grows from 1 to `longest` over the first `growth` of all steps, evenly in its logarithm; a step's number
    of fillers is drawn evenly up to it.
    """

    steps: int
    rows: int
    longest: int
    learning_rate: float = 2e-3
    growth: float = 0.6
    weight_decay: float = 0.0

    def fillers(self, step: int, seed: int) -> int:
        """The number of filler segments of a step; the same for the same step and seed."""
        progress = min(1.0, step / (self.growth * self.steps)) if self.growth else 1.0
        most = math.exp(progress * math.log(self.longest + 1)) - 1
        return int(torch.rand((), generator=generator(seed * 7_919 + step)) * (most + 1))

    def batch(self, task: RecallTask, step: int, seed: int) -> Batch:
        """The streams of a step."""
        source = generator(seed * 1_000_003 + step)
        return Batch(*task.stream(self.rows, self.fillers(step, seed), source))


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
            reporter.phase(
                f"ask after {length:,} fillers", -(-self.rows // self.batch) * self.batch * max(1, -(-length // 64))
            )
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
        seconds, running, done = 0.0, 0.0, 0
        for step in train(
            attachment.model,
            lambda step: self.recipe.batch(self.task, step, self.seed),
            steps=self.recipe.steps,
            learning_rate=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            checkpoint=checkpoint,
        ):
            seconds, running = step.seconds, 0.95 * running + 0.05 * step.accuracy
            reporter.advance(step.step + 1 - done, loss=step.loss, accuracy=running)
            done = step.step + 1
        return seconds


def symbol_base(
    task: SymbolRecall, seed: int, reporter: Reporter | None = None, most: int = 3000
) -> tuple[nn.Module, dict[str, float]]:
    """A tiny GPT-2 trained on the spot to answer within its own window; returns it with steps, accuracy and seconds.

    Three blocks of width 64. Embeddings start larger and matrices as `nn.Linear` does: with GPT-2's own small numbers so
    small a model stays for thousands of steps at guessing among the values it sees.
    """
    reporter = reporter or Silent()
    torch.manual_seed(seed)
    config = GPT2Config(
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
    model = GPT2LMHeadModel(config)
    nn.init.normal_(model.transformer.wte.weight, std=0.5)
    nn.init.normal_(model.transformer.wpe.weight, std=0.2)
    for name, parameter in model.transformer.h.named_parameters():
        if parameter.ndim == 2:
            bound = parameter.shape[0] ** -0.5  # GPT-2 stores its matrices input first
            nn.init.uniform_(parameter, -bound, bound)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    reporter.phase("train the base in its window", most)
    begun, running, step = time.monotonic(), 0.0, 0
    for step in range(most):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step / most, warmup=0)
        question = task.ask_in_window(64, generator(2_000_000_011 + 1_000_003 * seed + step))
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
    return model.eval(), {"steps": step + 1, "accuracy": running, "seconds": time.monotonic() - begun}
