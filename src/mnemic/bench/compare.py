"""One run of a comparison: a mechanism on a task with one seed, trained and asked under every control.

Every mechanism gets the same host with the same first weights, the same streams in the same order, the same steps of
the same optimiser, and the same gradient scope. Every test stream is asked under every control (`asking`).

The mechanism "none" is the host trained without a memory for as many steps: what the task gives without one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mnemic.attachment import Attachment, attach
from mnemic.bench.asking import cost, evaluate
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.hosts import Host, make_room
from mnemic.bench.results import Record, joined
from mnemic.host.anatomy import fingerprint
from mnemic.memories import CONFIGS
from mnemic.memories.emt import EMTConfig
from mnemic.memory import MemoryConfig
from mnemic.state import read_file, write_file
from mnemic.tasks.base import TASKS, Task
from mnemic.training import Batch, train
from mnemic.unrolling import IGNORED

NONE = "none"
"""The mechanism that is none."""

CHECKPOINT_SECONDS = 30.0

ALONE = 250_000_000
"""Numbers of the training batches that a host sees alone begin here."""


@dataclass(frozen=True)
class Recipe:
    """How a run is trained: AdamW for `steps` steps of `rows` streams, the rate rising over `warm` steps and falling on
    a cosine. `bptt_segments` is how many segments back gradients go, None for all.

    `stages` make training easier at first: each a share of the steps, and settings of the task that differ in it.

    Before that the host learns the task alone for `alone` steps with whole streams in its window, going through the
    settings of `alone_mix` in turn. That is what a pretrained model brings along, and shows what it can do where there
    is nothing to remember. With `freeze` it then stays as it is, and the memory alone trains.
    """

    steps: int = 600
    rows: int = 64
    learning_rate: float = 2e-3
    warm: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    bptt_segments: int | None = None
    stages: tuple[dict[str, Any], ...] = ()
    alone: int = 0
    alone_rate: float = 2e-3
    alone_mix: tuple[dict[str, Any], ...] = ({},)
    freeze: bool = False

    def rate(self, progress: float) -> float:
        """Learning-rate factor at `progress` in [0, 1]."""
        rise = min(1.0, (progress * self.steps + 1) / max(1, min(self.warm, self.steps // 4)))
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def settings(self) -> list[dict[str, Any]]:
        """What differs in the task at every step.

        Raises:
            ValueError: shares that leave nothing for the task itself, or are not between 0 and 1.
        """
        plan: list[dict[str, Any]] = []
        for stage in self.stages:
            share = stage.get("share", 0)
            if not 0 < share < 1:
                raise ValueError(f"a stage's share is {share!r}; give each a part of the steps between 0 and 1")
            changes = {name: value for name, value in stage.items() if name != "share"}
            plan += [changes] * round(share * self.steps)
        if len(plan) >= self.steps > 0 and self.stages:
            raise ValueError(f"the stages take {len(plan)} of {self.steps} steps; leave some for the task itself")
        return plan + [{}] * (self.steps - len(plan))


@dataclass(frozen=True)
class Run:
    """What is run. `settings` are the task's; it is asked with each of `lengths` as its `axis`. `memory` are settings
    over the mechanism's `small` ones; `size` as there. `number` tells runs apart that ask the same in one suite.
    """

    task: str
    mechanism: str
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[Any, ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    host: Host = field(default_factory=Host)
    recipe: Recipe = field(default_factory=Recipe)
    test_rows: int = 256
    number: int = 1

    def make_task(self, **changes: Any) -> Task:
        """The task with its settings, and the host's tokenizer where host and task have one."""
        if self.task not in TASKS:
            raise ValueError(f"there is no task {self.task!r}; known: {', '.join(sorted(TASKS))}")
        kind = TASKS[self.task]
        settings = {**self.settings, **changes}
        tokenizer = self.host.tokenizer()
        if tokenizer is not None and "tokenizer" in kind.__dataclass_fields__:  # pyright: ignore[reportAttributeAccessIssue]
            settings["tokenizer"] = tokenizer
        try:
            return kind(**settings)
        except TypeError as error:
            known = ", ".join(kind.__dataclass_fields__)  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"task {self.task!r} with {settings}: {error}; its settings: {known}") from None

    def tests(self) -> list[tuple[Any, Task]]:
        """The task at each length it is asked at."""
        kind = TASKS[self.task]
        if not self.lengths:
            task = self.make_task()
            return [(getattr(task, kind.axis), task)]
        return [(length, self.make_task(**{kind.axis: length})) for length in self.lengths]

    def config(self, segment_length: int) -> MemoryConfig | None:
        """The mechanism's settings; None for none."""
        if self.mechanism == NONE:
            return None
        if self.mechanism not in CONFIGS:
            known = ", ".join([NONE, *sorted(CONFIGS)])
            raise ValueError(f"there is no memory {self.mechanism!r}; known: {known}")
        small = CONFIGS[self.mechanism].small(segment_length, self.host.shape[0], self.size)
        return MemoryConfig.from_dict({**small.to_dict(), **self.memory})

    def described(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values: what a finished run is recognised by."""
        task = self.make_task()
        config = self.config(task.segment_length)
        recipe = asdict(self.recipe)
        recipe |= {name: list(recipe[name]) for name in ("betas", "stages", "alone_mix")}
        return {
            "task": task.settings(),
            "lengths": list(self.lengths),
            "memory": config.to_dict() if config else None,
            "host": self.host.described(),
            "recipe": recipe,
            "test rows": self.test_rows,
        }

    def run(self, reporter: Reporter | None = None, checkpoint: str | Path | None = None) -> Record:
        """Trains and measures; the record is not saved yet."""
        reporter, begun = reporter or Silent(), time.monotonic()
        task, tests = self.make_task(), self.tests()
        config = self.config(task.segment_length)
        model, alone = self.make_host(max(test.vocabulary for _, test in tests), reporter, checkpoint)
        first = fingerprint(model)
        torch.manual_seed(self.seed)
        if config is not None:
            with torch.device("meta"):
                beside = config.build(*self.host.shape).beside
            make_room(model, task.segment_length + beside, self.seed)
        # without a memory the model still goes through the same code, with one that is switched off
        switched_off = EMTConfig.small(task.segment_length, self.host.shape[0])
        attachment = attach(model, config or switched_off, freeze=self.frozen)
        without = attachment.disabled() if config is None else contextlib.nullcontext()
        record = Record(self.task, self.mechanism, self.host.title, self.seed, self.described())
        record.digests["model"] = first
        with without:
            if config is not None or not self.frozen:
                record.seconds["training"] = self._train(attachment, reporter, checkpoint)
            model.eval()
            asking = time.monotonic()
            for length, test in tests:
                reporter.phase(f"ask at {TASKS[self.task].axis} {length}", self.test_rows)
                score = evaluate(attachment, test, self.test_rows, seed=self.seed, reporter=reporter)
                score.length = length if isinstance(length, int) else 0
                record.scores.append(score)
                reporter.score(score)
            record.seconds["evaluation"] = time.monotonic() - asking
            record.measures["cost"] = cost(attachment, task)
        record.digests["texts"] = joined(record.scores)
        record.measures["alone"] = alone
        record.measures["title"] = TASKS[self.task].card.title
        record.measures["axis"] = TASKS[self.task].axis
        record.measures["metric"] = TASKS[self.task].metric
        record.measures["lower is better"] = TASKS[self.task].lower_is_better
        record.measures["parameters"] = sum(p.numel() for p in attachment.memory.parameters()) if config else 0
        record.state_bytes = max(int(score.details["state_bytes"]) for score in record.scores)
        record.seconds["all"] = time.monotonic() - begun
        return record

    @property
    def frozen(self) -> bool:
        """Whether the memory alone trains."""
        return self.recipe.freeze or not self.host.trains

    def make_host(
        self, vocabulary: int, reporter: Reporter, checkpoint: str | Path | None
    ) -> tuple[nn.Module, dict[str, float]]:
        """The host as every mechanism gets it, and what learning alone came to. Beside `checkpoint` it is kept for the
        other mechanisms.
        """
        torch.manual_seed(self.seed)
        task, recipe = self.make_task(), self.recipe
        if not recipe.alone or not self.host.trains:
            return self.host.make(max(vocabulary, task.vocabulary), task.segment_length), {}
        mix = [self.make_task(**changes) for changes in recipe.alone_mix]
        longest = max(task.segment_length, *(each.examples(1, "train").input_ids.shape[1] for each in mix))
        model = self.host.make(max(vocabulary, *(each.vocabulary for each in (task, *mix))), longest)
        description = self.described()
        known = {name: description["recipe"][name] for name in ("alone", "alone_rate", "alone_mix", "rows")}
        known |= {"task": description["task"], "host": description["host"], "seed": self.seed}
        mark = hashlib.sha256(json.dumps([self.task, known], sort_keys=True).encode()).hexdigest()[:12]
        path = Path(checkpoint).parent / f"host-{mark}.safetensors" if checkpoint else None
        if path is not None and path.is_file():
            tensors, found = read_file(path)
            model.load_state_dict(tensors)
            return model, found["alone"]
        alone = learn_alone(model, mix, recipe, self.seed, reporter)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            write_file(path, tensors, {"content": "host", "alone": alone})
        return model, alone

    def _train(self, attachment: Attachment, reporter: Reporter, checkpoint: str | Path | None) -> float:
        plan = self.recipe.settings()
        tasks = {str(changes): self.make_task(**changes) for changes in plan}

        def batches(step: int) -> Batch:
            return tasks[str(plan[step])].examples(self.recipe.rows, "train", 1_000_000 * self.seed + step)

        attachment.model.train(not self.frozen)
        reporter.phase("train", self.recipe.steps)
        seconds, accuracy, done = 0.0, 0.0, 0
        for step in train(
            attachment.model,
            batches,
            steps=self.recipe.steps,
            learning_rate=self.recipe.learning_rate,
            schedule=self.recipe.rate,
            betas=self.recipe.betas,
            weight_decay=self.recipe.weight_decay,
            clip=self.recipe.clip,
            bptt_segments=reach_of(attachment, self.recipe.bptt_segments),
            checkpoint=checkpoint,
            checkpoint_seconds=CHECKPOINT_SECONDS,
        ):
            seconds, accuracy = step.seconds, 0.95 * accuracy + 0.05 * step.accuracy
            reporter.advance(step.step + 1 - done, loss=step.loss, right=accuracy)
            done = step.step + 1
        return seconds


def learn_alone(
    model: nn.Module, mix: Sequence[Task], recipe: Recipe, seed: int, reporter: Reporter
) -> dict[str, float]:
    """Trains a host on whole streams in its window; returns what it took, and its result with the last of the mix."""
    begun, running = time.monotonic(), 0.0
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.alone_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    same = replace(recipe, steps=recipe.alone, stages=())
    reporter.phase("the host alone", recipe.alone)
    for step in range(recipe.alone):
        batch = mix[step % len(mix)].examples(recipe.rows, "train", ALONE + 1_000_000 * seed + step)
        targets = batch.labels[:, 1:]
        chosen = targets != IGNORED
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][chosen]
        loss = F.cross_entropy(logits, targets[chosen])
        for group in optimizer.param_groups:
            group["lr"] = recipe.alone_rate * same.rate(step / recipe.alone)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        running = 0.95 * running + 0.05 * (logits.argmax(-1) == targets[chosen]).float().mean().item()
        reporter.advance(1, loss=loss.item(), right=running)
    task = mix[-1]
    test = task.examples(200, "validation", seed)
    tokens, nats = torch.zeros_like(test.labels), torch.zeros(test.labels.shape)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens), 50):
            rows = slice(start, start + 50)
            logits = model(input_ids=test.input_ids[rows], use_cache=False).logits[:, :-1].float()
            tokens[rows, 1:] = logits.argmax(-1)
            nats[rows, 1:] = F.cross_entropy(
                logits.transpose(1, 2), test.labels[rows, 1:], ignore_index=IGNORED, reduction="none"
            )
    result = task.result(tokens, nats, test)
    return {"steps": recipe.alone, "in its window": result, "seconds": time.monotonic() - begun}


def reach_of(attachment: Attachment, asked: int | None) -> int | None:
    """How far back gradients go: as far as asked for, but no farther than the mechanism lets them pass."""
    own = attachment.memory.gradient_reach
    return own if asked is None else asked if own is None else min(asked, own)


# --- equal bytes -----------------------------------------------------------------------------------------------------


def most_bytes(run: Run) -> int:
    """The law of the run's state: most bytes of a stream when the longest of its tests asks."""
    task = run.make_task()
    config = run.config(task.segment_length)
    if config is None:
        return 0
    written = max(test.examples(1, "test").input_ids.shape[1] // task.segment_length - 1 for _, test in run.tests())
    with torch.device("meta"):  # a law needs no weights
        return config.build(*run.host.shape).most_bytes(written)


def match_bytes(runs: Sequence[Run], most: int) -> list[Run]:
    """The runs with the largest `size` whose state takes at most `most` bytes; as they are where there is no size.

    Raises:
        ValueError: a mechanism whose smallest state is larger.
    """
    return [_matched(run, most) for run in runs]


def _matched(run: Run, most: int) -> Run:
    def sized(size: int) -> Run:
        return replace(run, size=size)

    if run.mechanism == NONE or most_bytes(sized(1)) == most_bytes(sized(2)):
        return run
    if most_bytes(sized(1)) > most:
        raise ValueError(
            f"{run.mechanism} on {run.task} takes {most_bytes(sized(1)):,} bytes at its smallest; "
            f"match at least that instead of {most:,}"
        )
    low, high = 1, 2
    while most_bytes(sized(high)) <= most:
        if most_bytes(sized(2 * high)) == most_bytes(sized(high)):
            return sized(high)  # it holds all there is, in fewer bytes
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if most_bytes(sized(middle)) <= most else (low, middle)
    return sized(low)
