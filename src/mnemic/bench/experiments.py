"""The recall experiments from beginning to end: base, memory, evaluation, record. Progress goes to a `Reporter`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from mnemic.attachment import Attachment, attach
from mnemic.bench.hosts import tiny_gpt2
from mnemic.bench.recall import Places, evaluate
from mnemic.bench.results import Record, Score, joined
from mnemic.host.anatomy import fingerprint
from mnemic.memory import MemoryConfig
from mnemic.tasks.base import below, generator
from mnemic.tasks.facts import Episode, LanguageRecall, RecallTask, SymbolRecall, anywhere
from mnemic.training import Batch, Step, calibrate, hold_then_fall, train
from mnemic.unrolling import IGNORED


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
    """How a memory is trained on recall: facts without filler at first, then in streams of ever more of it as the
    answers get right.

    A step's number of fillers is drawn evenly in its logarithm up to a maximum. Whenever the running accuracy passes
    `pass_mark` the maximum grows by `growth`, up to `longest`. From its first growth on, facts lie in two segments in a
    share `several` of the steps, of which half correct some facts of the first; where among the fillers is drawn for
    every stream. Long streams come in smaller batches: at most `segments` segments a step, but never fewer than
    `rows` / 4 streams. Filler is drawn from a `pool` of that many segments.
    """

    steps: int
    rows: int = 64
    longest: int = 64
    several: float = 0.5
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    hold: float = 0.5
    growth: float = 1.6
    pass_mark: float = 0.97
    segments: int = 1024
    pool: int = 4096
    average: float = 0.98


class Curriculum:
    """Where a training stands: whole streams that ask every fact. `notes` are what a checkpoint keeps."""

    def __init__(self, task: RecallTask, recipe: Recipe, seed: int) -> None:
        self.task, self.recipe, self.seed = task, recipe, seed
        self.notes = {"longest": 0.0, "accuracy": 0.0}
        self.pool = task.filler(recipe.pool, 1, generator(seed * 1_000_003 + 999_983))

    def fillers(self, source: torch.Generator) -> tuple[int, int]:
        """A step's number of fillers and of rows."""
        share = float(torch.rand((), generator=source))
        count = round(math.exp(share * math.log(int(self.notes["longest"]) + 1))) - 1
        recipe = self.recipe
        return count, max(recipe.rows // 4, min(recipe.rows, recipe.segments // (count + 1)))

    def told(self, source: torch.Generator) -> tuple[int, int]:
        """In how many segments a step tells facts, and how many of the second's correct the first's."""
        several, some = torch.rand(2, generator=source).tolist()
        # not before one segment of them is remembered
        if self.notes["longest"] == 0 or several >= self.recipe.several:
            return 1, 0
        return 2, 1 + below(self.task.pairs, source) if some < 0.5 else 0

    def batch(self, step: int) -> Batch:
        """The streams of a step; the same for the same step, seed and notes."""
        source = generator(self.seed * 1_000_003 + step)
        count, rows = self.fillers(source)
        segments, corrected = self.told(source)
        return Batch(*self.task.stream(rows, count, source, self.pool, segments=segments, corrected=corrected))

    def advance(self, step: Step) -> None:
        """Takes note of a step's accuracy and moves on when it is good enough."""
        self._note(step.accuracy)
        self._lengthen()

    def _note(self, accuracy: float) -> None:
        self.notes["accuracy"] = 0.95 * self.notes["accuracy"] + 0.05 * accuracy

    def _lengthen(self) -> None:
        notes, recipe = self.notes, self.recipe
        if notes["accuracy"] > recipe.pass_mark and notes["longest"] < recipe.longest:
            notes["longest"] = min(recipe.longest, max(notes["longest"] + 1, notes["longest"] * recipe.growth))
            notes["accuracy"] = recipe.pass_mark - 0.05


class LanguageCurriculum(Curriculum):
    """Three stages: recite the facts in order; answer one question, of ever more names; then ever more filler around
    the facts, and a second segment of them.

    Straight at the question training stays where the two things are known and the names ignored, half of the answers
    right. Reciting makes the memory keep the facts apart, names and things together; with two names the question then
    is a choice between two, which the first gradients point to, and every further name has something to build on.
    A fifth of the rows goes on reciting, where one segment told all there is to recite.
    """

    task: LanguageRecall
    episodes: dict[tuple[int | None, int, int], Episode]
    names = (2, 3, 4, 6, 8)
    recited, chosen = 0.92, 0.93

    def __init__(self, task: LanguageRecall, recipe: Recipe, seed: int) -> None:
        super().__init__(task, recipe, seed)
        self.notes |= {"stage": 0.0, "names": 0.0}
        # told segments come from pools too: what the base makes of them is then computed once
        source = generator(seed * 1_000_003 + 999_961)
        self.episodes = {(known, 1, 0): task.tell(recipe.pool // 2, source, keys=known) for known in self.names}
        self.episodes[None, 1, 0] = task.tell(4 * recipe.pool, source)
        for corrected in range(task.pairs + 1):
            self.episodes[None, 2, corrected] = task.tell(recipe.pool, source, segments=2, corrected=corrected)

    def batch(self, step: int) -> Batch:
        """Recitations alone at first, then mostly questions."""
        source, notes = generator(self.seed * 1_000_003 + step), self.notes
        task, recipe = self.task, self.recipe
        count, rows, known, segments, corrected = 0, recipe.rows, None, 1, 0
        if notes["stage"] == 0:
            rows = recipe.rows // 3
        elif notes["stage"] == 1:
            known = self.names[int(notes["names"])]
        else:
            count, rows = self.fillers(source)
            segments, corrected = self.told(source)
        reciting = rows if notes["stage"] == 0 else rows // 5 if segments == 1 else 0
        episodes = self.episodes[known, segments, corrected]
        episode = episodes.take(torch.randint(len(episodes.told), (rows,), generator=source))
        recitation = task.recite(episode.take(slice(rows - reciting, rows)), source)
        asking = episode.take(slice(0, rows - reciting))
        asked = torch.randint(episode.keys.shape[1], (rows - reciting, 1), generator=source)
        question = task.ask(asking, asked, source)
        laid = task.lay(episode, anywhere(rows, count, segments, source), count + segments, source, self.pool)
        last, labels = torch.cat([question.ids, recitation.ids]), torch.cat([question.labels, recitation.labels])
        self.asking = rows - reciting
        return Batch(torch.cat([laid, last], 1), torch.cat([torch.full_like(laid, IGNORED), labels], 1))

    def advance(self, step: Step) -> None:
        """Moves through the stages by the accuracy of what the stage is about."""
        notes = self.notes
        relevant = step.correct if notes["stage"] == 0 else step.correct[step.rows < self.asking]
        self._note(relevant.float().mean().item())
        if notes["stage"] == 0 and notes["accuracy"] > self.recited:
            notes |= {"stage": 1.0, "accuracy": 0.5}
        elif notes["stage"] == 1 and notes["accuracy"] > self.chosen:
            notes |= {"names": notes["names"] + 1, "accuracy": 0.7}
            if notes["names"] == len(self.names):
                notes["stage"] = 2.0
        elif notes["stage"] == 2:
            self._lengthen()


@dataclass
class Experiment:
    """A task, a memory, how it is trained, and the places of facts it is asked at.

    `test_task` is the same task over text that training does not see, where the task has text. Without `detail` the
    margins and lengths of answers are not measured, for which every candidate is tried in every answer's place.
    """

    task: RecallTask
    config: MemoryConfig
    recipe: Recipe
    places: Sequence[Places]
    rows: int = 512
    batch: int = 128
    seed: int = 0
    test_task: RecallTask | None = None
    detail: bool = True

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
            config={"memory": self.config.to_dict(), "recipe": asdict(self.recipe)},
            seconds={"training": seconds},
            digests={"model": fingerprint(model)},
        )
        begun = time.monotonic()
        reporter.phase("ask", self.rows * sum(places.total for places in self.places))
        for places in self.places:
            scores = evaluate(
                attachment,
                self.test_task or self.task,
                places,
                rows=self.rows,
                batch=self.batch,
                seed=self.seed,
                detail=self.detail,
                progress=reporter.advance,
            )
            record.scores += scores
            record.state_bytes = int(scores[0].details["state_bytes"])
            for score in scores:
                reporter.score(score)
        record.digests["texts"] = joined(record.scores)
        record.seconds["evaluation"] = time.monotonic() - begun
        return attachment, record

    def _train(self, attachment: Attachment, reporter: Reporter, checkpoint: str | Path | None) -> float:
        attachment.model.eval()
        reporter.phase("train the memory", self.recipe.steps)
        kind = LanguageCurriculum if isinstance(self.task, LanguageRecall) else Curriculum
        curriculum = kind(self.task, self.recipe, self.seed)  # pyright: ignore[reportArgumentType]
        source = generator(self.seed * 1_000_003 + 999_979)
        calibrate(attachment.model, Batch(*self.task.stream(1024, 0, source)))
        seconds, done = 0.0, 0
        for step in train(
            attachment.model,
            curriculum.batch,
            steps=self.recipe.steps,
            learning_rate=self.recipe.learning_rate,
            schedule=lambda progress: hold_then_fall(progress, self.recipe.hold),
            betas=self.recipe.betas,
            weight_decay=self.recipe.weight_decay,
            average=self.recipe.average,
            notes=curriculum.notes,
            checkpoint=checkpoint,
        ):
            seconds = step.seconds
            curriculum.advance(step)
            notes = curriculum.notes | {"longest": int(curriculum.notes["longest"])}
            reporter.advance(step.step + 1 - done, loss=step.loss, **notes)
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
    """Three blocks of width 64. The number of pairs varies from batch to batch, which makes the plateau rarer."""
    torch.manual_seed(seed)
    model = tiny_gpt2(task.vocabulary, task.segment_length, width=64, depth=3, heads=4)
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
