"""Asking a trained memory: test streams under every control (`mnemic.controls`), beside the task's floors, and what
reading costs.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mnemic.attachment import Attachment, memory_cache
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Score, digest_of
from mnemic.controls import CONDITIONS, CONTROLS, apart, changed, others, parts
from mnemic.host.arguments import with_cache
from mnemic.tasks.base import Examples, Task
from mnemic.tasks.language import Language
from mnemic.unrolling import IGNORED, obstacle_to_parallel, read_segments


@dataclass
class Predicted:
    """For each condition the most probable token and the negative log-likelihood (nats) of the right one, both
    `[b, t]` and meant where labels stand; bytes of the largest state of a row, in use.
    """

    tokens: dict[str, Int[Tensor, "b t"]]
    nats: dict[str, Float[Tensor, "b t"]]
    state_bytes: int


@torch.no_grad()
def predict(attachment: Attachment, ids: Int[Tensor, "b t"], labels: Int[Tensor, "b t"]) -> Predicted:
    """Reads whole streams and asks every segment with labels under every condition, from the state at its start.

    Raises:
        ValueError: a row has no other stream to take a memory from.
    """
    model, router = attachment.model, attachment.router
    length, (rows, total) = router.segment_length, ids.shape
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    names = CONDITIONS if router.enabled else ("memory",)
    tokens = {name: torch.zeros(rows, total, dtype=torch.long) for name in names}
    nats = {name: torch.zeros(rows, total) for name in names}
    ids, cache, state_bytes = ids.to(router.device), memory_cache(model, length), 0
    segments = total // length
    wanted = [bool((targets[:, s * length : (s + 1) * length] != IGNORED).any()) for s in range(segments)]
    last = max((s for s in range(segments) if wanted[s]), default=0)
    order = others(ids[:, : last * length or None]) if router.enabled else []

    def note(name: str, logits: Tensor, here: slice) -> None:
        tokens[name][:, here] = logits.argmax(-1).cpu()
        target = targets[:, here].to(logits.device)
        lost = F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
        nats[name][:, here] = lost.cpu()

    s = 0
    while s < segments:
        here = slice(s * length, (s + 1) * length)
        if not wanted[s] and router.enabled and obstacle_to_parallel(model, length) is None:
            # segments without a question can be read at once
            stop = next((later for later in range(s, segments) if wanted[later]), segments)
            cache.memory.stream = read_segments(model, ids[:, s * length : stop * length], cache.memory.stream)
            s = stop
            continue
        if wanted[s] and router.enabled:
            stream = cache.memory.stream or router.new_stream(rows)
            row = sum(t[0].numel() * t.element_size() for t in stream.state.values())
            state_bytes = max(state_bytes, row + max(0 if bank is None else bank.nbytes for bank in stream.banks))
            others_of = apart(order)
            for control in CONTROLS:  # the own memory goes on to the next segment
                branch = memory_cache(model, length)
                with attachment.disabled() if control == "no_memory" else contextlib.nullcontext():
                    if control != "no_memory":
                        branch.memory.stream = changed(router, stream, control, others_of)
                    logits = model(input_ids=ids[:, here], **with_cache(model, branch)).logits
                    note(control.replace("_", " "), logits, here)
        output = model(input_ids=ids[:, here], **with_cache(model, cache))
        if wanted[s]:
            note("memory", output.logits, here)
        s += 1
    # the token at t was predicted one place before
    tokens = {name: F.pad(each[:, :-1], (1, 0)) for name, each in tokens.items()}
    nats = {name: F.pad(each[:, :-1], (1, 0)) for name, each in nats.items()}
    return Predicted(tokens, nats, state_bytes)


def evaluate(
    attachment: Attachment,
    task: Task,
    rows: int,
    *,
    seed: int = 0,
    batch: int = 64,
    reporter: Reporter | None = None,
) -> Score:
    """Scores `rows` test streams under every condition, beside the task's floors."""
    reporter = reporter or Silent()
    test = task.examples(rows, "test", seed)
    found: list[Predicted] = []
    for part in parts(rows, batch):
        some = test.take(part)
        found.append(predict(attachment, some.input_ids, some.labels))
        reporter.advance(len(some.input_ids))
    names = list(found[0].tokens)
    tokens = {name: torch.cat([part.tokens[name] for part in found]) for name in names}
    nats = {name: torch.cat([part.nats[name] for part in found]) for name in names}
    scores = {name: task.result(tokens[name], nats[name], test) for name in names}
    details: dict[str, float] = {"state_bytes": max(part.state_bytes for part in found)}
    for name in names:
        measured = task.measures(tokens[name], test)
        measured |= task.bits(nats[name], test) if isinstance(task, Language) else {}
        details |= {each if name == "memory" else f"{name}: {each}": value for each, value in measured.items()}
    details |= profile(task, tokens["memory"], test)
    details["nats a labelled token"] = nats["memory"][test.asked].mean().item()
    if isinstance(task, Language):
        details["bytes a labelled token"] = float(test.extra["bytes"].sum() / test.asked.sum())
    return Score(
        length=0,
        tokens=int(test.input_ids.shape[1]),
        examples=rows if task.lower_is_better else int(task.right(test.labels, test).numel()),
        score=scores.pop("memory"),
        controls=scores,
        floors=floors(task, rows, seed),
        ceiling=1.0 if task.solvable else None,
        details=details,
        outcomes={name: _outcomes(task, tokens[name], nats[name], test) for name in names},
        streams=rows,
        questions=digest_of(test.input_ids, test.labels),
    )


DEPTHS = (0, 20, 40, 60, 80)
"""Where the fifths of a context begin, in per cent."""

AGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Where the ranges of ages begin, in segments."""


def profile(task: Task, predicted: Tensor, test: Examples) -> dict[str, float]:
    """Scores by how deep in the context the evidence stands, or by its age, where the task notes either."""
    found: dict[str, float] = {}
    for name, starts in (("depth", DEPTHS), ("age", AGES)):
        if name not in test.extra or not task.by_answer:
            continue
        by_value = task.right_by(predicted, test, name)
        for start, stop in zip(starts, (*starts[1:], None), strict=True):
            inside = [each for value, each in by_value.items() if value >= start and (stop is None or value < stop)]
            if inside:
                right = sum(share * count for share, count in inside) / sum(count for _, count in inside)
                found[f"{name} from {start}"] = right
    return found


def _outcomes(task: Task, tokens: Tensor, nats: Tensor, test: Examples) -> str:
    """What the score is computed from: whether each answer is right, or the mean nats of each stream."""
    if task.lower_is_better:
        means = nats.masked_fill(~test.asked, 0).sum(1) / test.asked.sum(1)
        return " ".join(f"{mean:.6f}" for mean in means.tolist())
    return "".join("1" if each else "0" for each in task.right(tokens, test).tolist())


_FLOORS: dict[str, dict[str, float]] = {}


def floors(task: Task, rows: int, seed: int) -> dict[str, float]:
    """The task's floors, computed once in a process: every mechanism is held against the same ones."""
    key = json.dumps([task.name, task.settings(), rows, seed])
    if key not in _FLOORS:
        _FLOORS[key] = task.floors(rows, seed)
    return _FLOORS[key]


@torch.no_grad()
def cost(attachment: Attachment, task: Task, rows: int = 8, segments: int = 4, runs: int = 5) -> dict[str, float]:
    """Microseconds a token when `rows` streams are read in step, with the memory and without it, medians of `runs`
    interleaved ones; and their ratio.
    """
    router = attachment.router
    length = router.segment_length
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(0, task.vocabulary, (rows, segments * length), generator=source).to(router.device)

    def once() -> float:
        cache, begun = memory_cache(attachment.model, length), time.perf_counter()
        for segment in ids.split(length, 1):
            attachment.model(input_ids=segment, **with_cache(attachment.model, cache))
        return 1e6 * (time.perf_counter() - begun) / ids.numel()

    def timed() -> Iterator[tuple[float, float]]:
        once()
        for _ in range(runs):
            with attachment.disabled():
                without = once()
            yield once(), without

    pairs = list(timed())
    return {
        "microseconds a token": statistics.median(with_it for with_it, _ in pairs),
        "microseconds a token without": statistics.median(without for _, without in pairs),
        "with memory / base": statistics.median(with_it / without for with_it, without in pairs),
    }
