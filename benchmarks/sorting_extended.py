"""Sorting by frequency with Memoria, extended where the paper's rules stand in the way of this task.

Three of them do. Hidden states are constants to the gradient, so nothing teaches the model to leave a symbol's
identity in them: here the gradient goes one segment back (`grad_segments=1`). Working memory and all that is reminded
are read with the same weights and weigh the same, so the last segment counts as much as all others together: here each
attention may read little (`null`). And only a quarter of a segment's length is reminded of short-term memory, so that
segments are left out: here fewer engrams are made of each segment, and all of short-term memory is reminded.

The base first learns, without a memory, to sort prompts that fit in its window.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mnemic.attachment import Attachment, attach
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record
from mnemic.cli.show import Show, console
from mnemic.memories.memoria import Memoria, MemoriaConfig
from mnemic.memories.memoria.attention import Reader
from mnemic.tasks.sorting import PAD, SEPARATOR, SYMBOLS, VOCABULARY, SortingTask
from mnemic.training import Batch, train
from scripts import Checkpoints, Out, launch, saved
from sorting import evaluate_sorting


@dataclass
class Recipe:
    """`windowed` steps of the base alone on prompts of `inside` symbols, then `stages`: segments, steps, streams.

    Rates rise over 50 steps and fall to a twentieth on a cosine. `output` is what readers' outputs begin with, times
    the identity.
    """

    stages: tuple[tuple[int, int, int], ...]
    windowed: int = 1000
    inside: int = 96
    base_rate: float = 3e-3
    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    deviation: float = 0.1
    output: float = 0.8

    @property
    def steps(self) -> int:
        """Training steps with memory."""
        return sum(steps for _, steps, _ in self.stages)


def factor(step: float, steps: int) -> float:
    """The learning rate's factor at a step."""
    return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def extended_config(length: int = 256, working: int = 8, **changes: Any) -> MemoriaConfig:
    """`working` engrams a segment; short-term memory holds four segments and is reminded of whole."""
    sizes: dict[str, Any] = {"segment_length": length, "working": working, "reminded_stm": 4 * working}
    sizes |= {"reminded_ltm": 8 * working, "stm_capacity": 4 * working, "lifespan": 5.0, "alpha": 8.0, "heads": 1}
    return MemoriaConfig(**{**sizes, "grad_segments": 1, "null": True, **changes})


def make_base(length: int, width: int, depth: int, recipe: Recipe) -> GPT2LMHeadModel:
    """A small GPT-2 with random weights."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=length,
            n_embd=width,
            n_layer=depth,
            n_head=4,
            initializer_range=recipe.deviation,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=SEPARATOR,
            eos_token_id=PAD,
        )
    )


def train_base(model: nn.Module, recipe: Recipe, seed: int, reporter: Reporter) -> float:
    """Teaches the base to sort what is in its window; returns the share of symbols right in the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), recipe.base_rate, betas=recipe.betas, weight_decay=0.0)
    task, count, right = SortingTask(recipe.inside, 1), recipe.inside, 0.0
    reporter.phase("sort within the window", recipe.windowed)
    for step in range(recipe.windowed):
        batch = task.examples(64, "train", 100_000_000 + 1_000_000 * seed + step)
        answer = task.order(batch)
        ids = batch.input_ids[:, : count + SYMBOLS + 1]
        logits = model(input_ids=ids, use_cache=False).logits[:, count : count + SYMBOLS]
        loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
        for group in optimizer.param_groups:
            group["lr"] = recipe.base_rate * factor(step, recipe.windowed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.95 * right + 0.05 * float((logits.argmax(-1) == answer).float().mean())
        reporter.advance(1, loss=loss.item(), right=right)
    return right


@torch.no_grad()
def begin(attachment: Attachment, recipe: Recipe) -> None:
    """Readers begin by passing engrams on as they are."""
    memory = attachment.memory
    assert isinstance(memory, Memoria)
    for reader in memory.readers.values():
        assert isinstance(reader, Reader)
        nn.init.eye_(reader.value.weight)
        nn.init.zeros_(reader.value.bias)
        nn.init.eye_(reader.output.weight).mul_(recipe.output)


@dataclass
class ExtendedExperiment:
    """A base and Memoria learn to sort prompts of up to `stages[-1][0]` segments; asked after that many."""

    config: MemoriaConfig
    recipe: Recipe
    width: int = 64
    depth: int = 2
    rows: int = 256
    seed: int = 0

    def run(self, reporter: Reporter | None = None, checkpoint: str | Path | None = None) -> tuple[Attachment, Record]:
        """Trains and measures; the record is not saved yet."""
        reporter, begun = reporter or Silent(), time.monotonic()
        torch.manual_seed(self.seed)
        length, recipe = self.config.segment_length, self.recipe
        model = make_base(length, self.width, self.depth, recipe)
        right = train_base(model, recipe, self.seed, reporter)
        attachment = attach(model, self.config, freeze=False)
        begin(attachment, recipe)
        base = time.monotonic() - begun
        plan = [(segments, rows) for segments, steps, rows in recipe.stages for _ in range(steps)]

        def batches(step: int) -> Batch:
            segments, rows = plan[step]
            return SortingTask(length, segments).examples(rows, "train", 1_000_000 * self.seed + step)

        reporter.phase("train base and memory", recipe.steps)
        accuracy, seconds, done = 0.0, 0.0, 0
        for step in train(
            model,
            batches,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            schedule=lambda progress: factor(progress * recipe.steps, recipe.steps),
            betas=recipe.betas,
            bptt_segments=1,
            checkpoint=checkpoint,
        ):
            accuracy = 0.95 * accuracy + 0.05 * step.accuracy
            seconds = step.seconds
            reporter.advance(step.step + 1 - done, segments=plan[step.step][0], accuracy=accuracy)
            done = step.step + 1
        begun = time.monotonic()
        task = SortingTask(length, recipe.stages[-1][0])
        score, reminded = evaluate_sorting(attachment, task, rows=self.rows, seed=self.seed, reporter=reporter)
        record = Record(
            task="sorting-extended",
            mechanism=self.config.kind,
            host=f"GPT-2, {self.depth} blocks, width {self.width}, trained with its memory",
            seed=self.seed,
            config={"memory": self.config.to_dict(), "recipe": asdict(recipe)},
            scores=[score],
            measures={"base": {"right within the window": right}, "reminding": {str(score.length): reminded}},
            state_bytes=int(score.details["state_bytes"]),
            seconds={"base": base, "training": seconds, "evaluation": time.monotonic() - begun},
        )
        return attachment, record


def published(segments: int, seed: int, rows: int) -> ExtendedExperiment:
    """The settings behind the documentation's numbers, for prompts of 4 or 8 segments."""
    stages = {4: ((1, 80, 32), (4, 320, 32)), 8: ((1, 80, 32), (4, 160, 32), (8, 130, 16))}
    if segments not in stages:
        raise ValueError(f"there is a recipe for {' and '.join(map(str, stages))} segments, not for {segments}")
    return ExtendedExperiment(extended_config(), Recipe(stages[segments]), rows=rows, seed=seed)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    segments: Annotated[int, typer.Option(help="Segments of 256 symbols a prompt, 4 or 8.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights and streams.")] = 0,
    rows: Annotated[int, typer.Option(help="Test streams.")] = 256,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Sorting by frequency where Memoria may send a gradient back, and may read little: controls, ablations, floors."""
    name = f"sorting-extended-{segments}-seed{seed}"
    with Show(name) as show:
        _, record = published(segments, seed, rows).run(
            show, checkpoints / f"{name}.safetensors" if checkpoints else None
        )
    score = record.scores[0]
    for row, value in {"memory": score.score, **score.controls, **score.floors}.items():
        console.print(f"{row:<32} {100 * value:.1f} %")
    saved(record, out, f"sorting-memoria-extended-{segments}-seed{seed}.json")


if __name__ == "__main__":
    launch(app)
