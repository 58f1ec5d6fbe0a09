"""A memory trained on a real model in lessons: copying text at first, then facts, ever more of them, and asked.

Each lesson is a number of steps; a step draws its batch from its own number, so a run that was stopped goes on as if it
had not been. What is asked at the end: names, values, wordings and prose that training never met, under every control
of `mnemic.controls`, beside the base with the whole stream in its window.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemic.attachment import WEIGHTS_FILE, Attachment, attach, check_fingerprint
from mnemic.bench.asking import predict
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, Score
from mnemic.bench.retrieving import bm25
from mnemic.controls import CONDITIONS, parts
from mnemic.memory import MemoryConfig
from mnemic.state import nbytes, read_file
from mnemic.tasks.base import seed_of
from mnemic.tasks.documents import tokenize
from mnemic.tasks.told import PLAIN, Copying, Mixture, Told, ToldThings, endings, pool_of, whole
from mnemic.training import Batch, calibrate, hold_then_fall, train

SETTINGS_FILE = "lessons.json"
CALIBRATED = 256
"""Segments that a memory is fitted to before training."""
CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Lesson:
    """`steps` steps of copying (0 `facts`), or of streams of so many facts in 1 to so many segments, both drawn from
    what is named, anew for every step.
    """

    steps: int
    facts: tuple[int, ...] = (0,)
    segments: tuple[int, ...] = (8,)


def lessons(text: str) -> list[Lesson]:
    """`copying:200,1x4:300,1+4x8+64:1000` as lessons: steps of copying, of 1 fact in 1 to 4 segments, of 1 or 4 facts
    in 1 to 8 or 1 to 64. What is named twice is drawn twice as often; 0 facts are copying.

    Raises:
        ValueError: what is none.
    """
    found = []
    for word in text.split(","):
        name, _, steps = word.partition(":")
        facts, _, segments = name.partition("x")
        try:
            if name == "copying":
                found.append(Lesson(int(steps)))
                continue
            drawn = (tuple(map(int, given.split("+"))) for given in (facts, segments or "8"))
            found.append(Lesson(int(steps), *drawn))
        except ValueError:
            raise ValueError(
                f"{word!r} is no lesson; write copying:STEPS or FACTSxSEGMENTS:STEPS, such as copying:200,1x8:500, "
                "and 1+4x8+64:500 where both are drawn"
            ) from None
    return found


@dataclass(frozen=True)
class Asked:
    """One row of the test: `facts` facts in `segments` segments; of relations that training had, or of others."""

    facts: int
    segments: tuple[int, int]
    held_out_relations: bool = False


ASKED = (Asked(1, (1, 8)), Asked(4, (1, 8)), Asked(4, (64, 64)), Asked(1, (1, 8), held_out_relations=True))


@torch.no_grad()
def in_window(attachment: Attachment, batch: Batch) -> Int[Tensor, "b t"]:
    """What the base says at every place with all of each row in its window, and no memory."""
    said = torch.zeros_like(batch.labels)
    with attachment.disabled():
        # one by one, as the logits of all tokens are large
        for row, ids in enumerate(batch.input_ids):
            said[row, 1:] = attachment.model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
    return said


RETRIEVED = 4
"""How many segments retrieval of text puts before a question."""


@torch.no_grad()
def retrieved(attachment: Attachment, tokenizer: Any, batch: Told, length: int) -> Int[Tensor, "b t"]:
    """What the base says at every place, without a memory, of the segments that BM25 finds by the question, in their
    order, and the one that asks.
    """
    said, last = torch.zeros_like(batch.labels), batch.labels.shape[1] - length
    with attachment.disabled():
        for row, ids in enumerate(batch.input_ids):
            pieces = ids[:last].unflatten(0, (-1, length))
            (scores,) = bm25(tokenizer.batch_decode(pieces), [batch.question[row]])
            best = sorted(sorted(range(len(pieces)), key=lambda piece: -scores[piece])[:RETRIEVED])
            given = torch.cat([pieces[best].flatten(), ids[last:]])
            said[row, last:] = attachment.model(input_ids=given[None]).logits[0, -length - 1 : -1].argmax(-1)
    return said


@dataclass
class LessonRun:
    """How a memory is taught on the frozen base `model`, a folder or a hub id: `rows` streams a step, `questions` of
    each, at `learning_rate` held for half of the steps and then falling. It begins as the memory saved in the folder
    `begin`, or new. With `bf16` the base computes in bfloat16, and the memory still in float32.
    """

    model: str
    config: MemoryConfig
    lessons: Sequence[Lesson]
    rows: int = 16
    questions: int = 1
    learning_rate: float = 2e-3
    mixture: Mixture = PLAIN
    seed: int = 0
    test_rows: int = 64
    pool: int = 2048
    begin: Path | None = None
    bf16: bool = False

    @property
    def steps(self) -> int:
        """Of all lessons."""
        return sum(lesson.steps for lesson in self.lessons)

    def described(self) -> dict[str, Any]:
        """The settings that decide what is learnt."""
        return {
            **{name: getattr(self, name) for name in ("rows", "questions", "learning_rate", "seed", "pool", "bf16")},
            "model": Path(self.model).name,
            "begin": None if self.begin is None else json.loads((self.begin / SETTINGS_FILE).read_text()),
            "memory": self.config.to_dict(),
            "lessons": [asdict(lesson) for lesson in self.lessons],
            "mixture": asdict(self.mixture),
        }

    def run(
        self,
        train_texts: Sequence[tuple[str, str]],
        test_texts: Sequence[tuple[str, str]],
        out: str | os.PathLike[str],
        *,
        until: int | None = None,
        resume: bool = False,
        report: Reporter | None = None,
    ) -> tuple[Attachment, Record]:
        """Teaches, asks, and writes the memory to `out`, with the checkpoint from which a run that was stopped goes on
        with `resume`. With `until` it asks after so many steps in all, and a later call goes on. The record is not
        saved yet.

        Raises:
            ValueError: texts too short, a run in `out` that was begun with other settings, or one that is begun and not
                to be resumed.
        """
        report, out = report or Silent(), Path(out)
        if (out / CHECKPOINT_FILE).is_file() and not resume:
            raise ValueError(f"{out} holds a run that was begun; resume it, or give another folder")
        self._check(out)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        pools = [self._pool(texts, tokenizer) for texts in (train_texts, test_texts)]
        dtype = torch.bfloat16 if self.bf16 else torch.float32  # whatever the file has
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or "cpu"
        torch.nn.Module.to(model, device)
        pools = [pool.to(device) for pool in pools]
        torch.manual_seed(self.seed)
        attachment = attach(model, self.config)
        if self.begin is not None:
            self._begun(attachment, self.begin)
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS_FILE).write_text(json.dumps(self.described(), indent=1) + "\n")
        curve, seconds = self.teach(attachment, tokenizer, pools[0], out / CHECKPOINT_FILE, until, report)
        attachment.save_pretrained(out)
        begun = time.monotonic()
        scores = [self.ask(attachment, tokenizer, pools[1], asked, report) for asked in ASKED]
        record = Record(
            task="told",
            mechanism=self.config.kind,
            host=f"{Path(self.model).name}, frozen",
            seed=self.seed,
            config=self.described() | {"test_rows": self.test_rows},
            scores=scores,
            measures={"loss": curve, "parameters": sum(each.numel() for each in attachment.parameters())},
            state_bytes=nbytes(attachment.memory.init_state(1)),
            seconds={"training": seconds, "asking": time.monotonic() - begun},
        )
        return attachment, record

    def teach(
        self,
        attachment: Attachment,
        tokenizer: Any,
        pool: Tensor,
        checkpoint: Path,
        until: int | None,
        report: Reporter,
    ) -> tuple[list[list[float]], float]:
        """The curve, [step, loss, share of tokens right] a hundred times, and the seconds."""
        batches = self.batches(tokenizer, pool)
        if self.begin is None:
            # covariances of the host's width want several times as many tokens
            calibrate(attachment.model, Copying(pool).batch(CALIBRATED, self.seed))
        curve, seconds, every = [], 0.0, max(1, self.steps // 100)
        report.phase("lessons", self.steps)
        # the notes keep the curve of what an earlier call did
        notes: dict[str, float] = {}
        loss = accuracy = count = 0.0
        done = 0
        for step in train(
            attachment.model,
            batches,
            steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=hold_then_fall,
            notes=notes,
            checkpoint=checkpoint,
        ):
            loss, accuracy, count = loss + step.loss, accuracy + step.accuracy, count + 1
            if (step.step + 1) % every == 0 or step.step + 1 in (self.steps, until):
                place = f"{step.step + 1:08d}"
                notes[f"loss {place}"], notes[f"right {place}"] = loss / count, accuracy / count
                loss = accuracy = count = 0.0
            seconds = step.seconds
            report.advance(step.step + 1 - done, loss=step.loss, right=step.accuracy)  # a resumed run has come far
            done = step.step + 1
            if until is not None and step.step + 1 >= until:
                break
        for name, value in sorted(notes.items()):
            if name.startswith("loss "):
                place = name.partition(" ")[2]
                curve.append([int(place), round(value, 4), round(notes[f"right {place}"], 4)])
        return curve, seconds

    def batches(self, tokenizer: Any, pool: Tensor) -> Any:
        """The batch of a step by its number."""
        copying, told = Copying(pool), functools.partial(ToldThings, tokenizer, pool)
        makers = {
            (facts, segments): told(facts=facts, segments=(1, segments), questions=self.questions, mixture=self.mixture)
            for lesson in self.lessons
            for facts in lesson.facts
            if facts
            for segments in lesson.segments
        }
        ends = list(itertools.accumulate(lesson.steps for lesson in self.lessons))

        def batch(step: int) -> Batch:
            lesson, seed = self.lessons[bisect.bisect(ends, step)], self.seed * 1_000_003 + step
            luck = random.Random(f"lesson {seed}")
            drawn = luck.choice(lesson.facts), luck.choice(lesson.segments)
            return (makers[drawn] if drawn[0] else copying).batch(self.rows, seed)

        return batch

    def ask(self, attachment: Attachment, tokenizer: Any, pool: Tensor, asked: Asked, report: Reporter) -> Score:
        """Whole values right under every condition, by the base with the whole stream in its window, and with what
        retrieval of text finds in it; of names, values and wordings for tests, none corrected. The floor knows what was
        told, and not of whom.
        """
        made = ToldThings(
            tokenizer,
            pool,
            facts=asked.facts,
            segments=asked.segments,
            mixture=replace(PLAIN, chat=self.mixture.chat),
            split="test",
            held_out_relations=asked.held_out_relations,
        )
        report.phase(f"ask, {asked.facts} facts in up to {asked.segments[1]} segments", self.test_rows)
        ends, right = endings(tokenizer), []
        for place, part in enumerate(parts(self.test_rows, 16)):
            batch = made.batch(part.stop - part.start, seed_of("test", place))
            found = predict(attachment, batch.input_ids, batch.labels)
            said = [*(found.tokens[name] for name in CONDITIONS)]
            said += [in_window(attachment, batch), retrieved(attachment, tokenizer, batch, self.config.segment_length)]
            right.append(torch.stack([whole(each.cpu(), batch.labels.cpu(), ends) for each in said], 1))
            report.advance(part.stop - part.start)
        shares = torch.cat(right).double().mean(0).tolist()
        scores = dict(zip((*CONDITIONS, "everything in the window", "text retrieval"), shares, strict=True))
        return Score(
            length=asked.segments[1],
            tokens=asked.segments[1] * self.config.segment_length,
            examples=self.test_rows,
            score=scores.pop("memory"),
            controls=scores,
            floors={"a told value at random": 1 / asked.facts},
            ceiling=1.0,
            details={"facts": asked.facts, "held-out relations": float(asked.held_out_relations)},
        )

    def _pool(self, texts: Sequence[tuple[str, str]], tokenizer: Any) -> Tensor:
        """Running text of `pool` segments, an equal part of every text's middle."""
        length = self.config.segment_length
        most = -(-self.pool // len(texts)) * length
        # six characters a token are more than enough
        cut = [text[len(text) // 4 :][: 6 * most] for _, text in texts]
        return torch.cat([pool_of(tokenize(text, tokenizer).ids[:most], length) for text in cut])

    def _begun(self, attachment: Attachment, folder: Path) -> None:
        """Gives the memory the weights of an earlier run; raises `ValueError` where they do not fit its settings."""
        tensors, description = read_file(folder / WEIGHTS_FILE)
        check_fingerprint(attachment.model, description, folder, strict=True)
        try:
            attachment.memory.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"the memory in {folder} has the settings {description['memory']}, whose weights do not fit "
                f"{self.config.to_dict()}; begin with the settings that shape them"
            ) from error

    def _check(self, out: Path) -> None:
        """Raises `ValueError` where a run was begun with other settings."""
        path = out / SETTINGS_FILE
        if not path.is_file():
            return
        known, wanted = json.loads(path.read_text()), json.loads(json.dumps(self.described()))
        # what an earlier release did not name had its default
        known = {each.name: each.default for each in fields(self) if each.default is not MISSING} | known
        known["memory"] = MemoryConfig.from_file(known["memory"]).to_dict()
        for name, value in wanted.items():
            if known.get(name) != value:
                raise ValueError(
                    f"the run in {out} was begun with {name} {known.get(name)}, not {value}; go on with its settings, "
                    "or give another folder"
                )
