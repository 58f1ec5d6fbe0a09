"""Recall beyond the window: train a memory on the recall task, then measure it at lengths it never saw, with controls.

For every length the same streams are asked with their own memory and under every control of `mnemic.controls`, and once
with everything in one window, without a memory: the ceiling that the base sets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic import controls
from mnemic.attachment import Attachment, memory_cache
from mnemic.bench.results import Score
from mnemic.controls import CONDITIONS, parts
from mnemic.host.arguments import with_cache
from mnemic.host.release import GENERATE_CACHE
from mnemic.state import State
from mnemic.stream import Stream
from mnemic.tasks.base import TEST_SEEDS, generator
from mnemic.tasks.facts import Episode, Question, RecallTask
from mnemic.unrolling import read_segments


def read_stream(
    attachment: Attachment,
    task: RecallTask,
    episode: Episode,
    fillers: int,
    seed: int,
    progress: Callable[[int], None],
    part: int = 64,
) -> Stream:
    """The streams after the facts and `fillers` segments of filler, read `part` segments at a time."""
    model, source = attachment.model, generator(seed)
    device, rows = attachment.router.device, len(episode.told)
    stream = read_segments(model, episode.told.to(device))
    for start in range(0, fillers, part):
        count = min(part, fillers - start)
        stream = read_segments(model, task.filler(rows, count, source).to(device), stream)
        progress(rows * count)
    return stream


def conditions(attachment: Attachment, stream: Stream) -> dict[str, State | None]:
    """The state under which each condition asks; None for no memory."""
    return controls.conditions(attachment, stream.state)


@torch.no_grad()
def logits_of(attachment: Attachment, ids: Tensor, state: State | None) -> Tensor:
    """The model's logits `[b, t, v]` for one segment that begins with `state`; None for the base alone."""
    router, model = attachment.router, attachment.model
    cache = memory_cache(model, router.segment_length)
    ids = ids.to(router.device)
    if state is None:
        with attachment.disabled():
            return model(input_ids=ids, **with_cache(model, cache)).logits
    cache.memory.stream = router.new_stream(len(ids), state)
    return model(input_ids=ids, **with_cache(model, cache)).logits


def answered(logits: Tensor, question: Question) -> Tensor:
    """Whether every token of the answer is the most probable one `[b]`: greedy decoding would say exactly this."""
    targets = F.pad(question.labels[:, 1:], (0, 1), value=-100).to(logits.device)
    return ((logits.argmax(-1) == targets) | (targets == -100)).all(1)


def margins(
    attachment: Attachment, task: RecallTask, question: Question, episode_values: Tensor, state: State
) -> Tensor:
    """By how many nats the right answer is more probable than the best wrong one `[b]`: the whitepaper's directness.

    Every candidate stands in the answer's place in turn; an answer's probability is that of all its tokens.
    """
    rows, scores = len(question.ids), []
    start = (question.labels != -100).long().argmax(1)
    for candidate in task.candidates:
        ids = question.ids.clone()
        for offset, token in enumerate(candidate):
            ids.scatter_(1, (start + offset)[:, None].clamp_max(ids.shape[1] - 1), token)
        logp = logits_of(attachment, ids, state).log_softmax(-1)
        total = torch.zeros(rows, device=logp.device)
        for offset, token in enumerate(candidate):
            total += logp[torch.arange(rows), (start + offset - 1).clamp_max(ids.shape[1] - 2), token]
        scores.append(total.cpu())
    score = torch.stack(scores, 1)
    right = score.gather(1, episode_values[:, None])[:, 0]
    return right - score.scatter(1, episode_values[:, None], -torch.inf).max(1).values


@torch.no_grad()
def tokens_until_value(
    attachment: Attachment, task: RecallTask, question: Question, values: Tensor, state: State, most: int
) -> tuple[float, float]:
    """Greedy continuation of the question: the share of answers found within `most` tokens, and the mean number of
    tokens until the value was complete among those (the whitepaper's conciseness). Rows whose answers begin at
    different places are asked one place at a time.
    """
    router, model = attachment.router, attachment.model
    starts = (question.labels != -100).long().argmax(1)
    needed: list[int] = []
    for start in starts.unique().tolist():
        rows = (starts == start).nonzero().flatten()
        cache = memory_cache(model, router.segment_length)
        part = {name: tensor[rows.to(tensor.device)] for name, tensor in state.items()}
        cache.memory.stream = router.new_stream(len(rows), part)
        ids = question.ids[rows, :start].to(router.device)
        output = model.generate(  # pyright: ignore[reportCallIssue]
            ids, **{GENERATE_CACHE: cache}, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
        )
        for row, said in zip(rows.tolist(), output[:, start:].tolist(), strict=True):
            value = task.candidates[int(values[row])]
            ends = [i + len(value) for i in range(most - len(value) + 1) if said[i : i + len(value)] == value]
            if ends:
                needed.append(ends[0])
    return len(needed) / len(starts), sum(needed) / len(needed) if needed else float("nan")


@torch.no_grad()
def evaluate(
    attachment: Attachment,
    task: RecallTask,
    fillers: int,
    *,
    rows: int = 512,
    batch: int = 128,
    seed: int = 0,
    detail: bool = True,
    progress: Callable[[int], None] = lambda segments: None,
) -> Score:
    """Asks every fact of `rows` streams, each on its own, after `fillers` segments of filler.

    `seed` numbers the test; test streams are never training streams. `progress` is told the segments read.
    """
    model = attachment.model
    model.eval()
    outcomes: dict[str, list[int]] = {name: [] for name in CONDITIONS}
    margin: list[float] = []
    found: list[tuple[float, float]] = []
    state_bytes = 0
    for part in parts(rows, batch):
        start, count = part.start, part.stop - part.start
        first = TEST_SEEDS + 10_007 * seed + start
        source = generator(first)
        episode = task.tell(count, source)
        stream = read_stream(attachment, task, episode, fillers, first + 1, progress)
        state_bytes = sum(t[0].numel() * t.element_size() for t in stream.state.values())
        states = conditions(attachment, stream)
        for which in range(task.pairs):
            question = task.ask(episode, torch.full((count, 1), which), source)
            for name, state in states.items():
                right = answered(logits_of(attachment, question.ids, state), question)
                outcomes[name] += right.int().tolist()
            if detail and start == 0:
                margin += margins(attachment, task, question, episode.values[:, which], stream.state).tolist()
                found.append(
                    tokens_until_value(attachment, task, question, episode.values[:, which], stream.state, most=8)
                )
    scores = {name: sum(values) / len(values) for name, values in outcomes.items()}
    details: dict[str, float] = {"state_bytes": state_bytes}
    if detail:
        details |= {
            "margin_nats": sum(margin) / len(margin),
            "found_in_8_tokens": sum(share for share, _ in found) / len(found),
        }
        # where nothing was found there is no length to speak of
        counted = [mean for share, mean in found if share]
        details |= {"tokens_until_value": sum(counted) / len(counted)} if counted else {}
    return Score(
        length=fillers,
        tokens=fillers * task.segment_length,
        examples=rows * task.pairs,
        score=scores["memory"],
        controls={name: scores[name] for name in CONDITIONS[1:]},
        floors=task.floors,
        ceiling=ceiling(attachment, task, rows=rows, seed=seed),
        details=details,
        outcomes={name: "".join(map(str, values)) for name, values in outcomes.items()},
    )


@torch.no_grad()
def ceiling(attachment: Attachment, task: RecallTask, *, rows: int, seed: int) -> float:
    """The base's own exact match with facts and question in one window."""
    question = task.ask_in_window(rows, generator(TEST_SEEDS + 10_007 * seed))
    logits = logits_of(attachment, question.ids, None)
    targets = F.pad(question.labels[:, 1:], (0, 1), value=-100).to(logits.device)
    fact = F.pad(question.fact[:, 1:], (0, 1), value=-1).to(logits.device)
    wrong = (logits.argmax(-1) != targets) & (targets != -100)
    shares = []
    for which in range(task.pairs):
        asked = ((fact == which) & (targets != -100)).any(1)
        if bool(asked.any()):
            shares.append((~(wrong & (fact == which)).any(1))[asked].float().mean())
    return float(torch.stack(shares).mean())
