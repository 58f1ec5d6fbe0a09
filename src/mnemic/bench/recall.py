"""Recall beyond the window: where a memory's facts may stand, and how many it still has there, beside its controls.

For every place the same streams are asked with their own memory and under every control of `mnemic.controls`, and once
with everything in one window, without a memory: the ceiling that the base sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Generator, Tensor

from mnemic.attachment import Attachment, memory_cache
from mnemic.bench.results import Score, digest_of
from mnemic.controls import CONDITIONS, conditions, others, parts
from mnemic.host.arguments import with_cache
from mnemic.host.release import GENERATE_CACHE
from mnemic.state import State
from mnemic.stream import Stream
from mnemic.tasks.base import TEST_SEEDS, generator
from mnemic.tasks.facts import Episode, Question, RecallTask, anywhere
from mnemic.unrolling import IGNORED, read_segments

KINDS = ("facts", "first facts", "second facts", "corrected facts")
"""What questions are about: facts of the only segment that has some, of the first or second of two, or corrected."""

UNBOUND = "the most frequent of its segment"
"""The floor that decides: a memory that has the values of every segment, and not whose they are."""


@dataclass(frozen=True)
class Places:
    """Where the facts of a test stand: how many segments of filler `before` the first of the `segments` with facts,
    `between` two of them and `after` the last. `corrected` facts of the second segment correct some of the first. With
    `anywhere` all this filler lies in any order, another in every stream.

    Raises:
        ValueError: a number below 0, or neither one nor two segments with facts.
    """

    before: int = 0
    between: int = 0
    after: int = 0
    segments: int = 1
    corrected: int = 0
    anywhere: bool = False

    def __post_init__(self) -> None:
        for name in ("before", "between", "after", "corrected"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.segments not in (1, 2):
            raise ValueError(f"segments is {self.segments}; facts stand in 1 or 2")

    @property
    def fillers(self) -> int:
        """Segments without a fact."""
        return self.before + self.between * (self.segments - 1) + self.after

    @property
    def total(self) -> int:
        """Segments before the one that asks."""
        return self.fillers + self.segments

    def draw(self, rows: int, generator: Generator) -> Int[Tensor, "b k"]:
        """The places of the segments with facts in `rows` streams."""
        if self.anywhere:
            return anywhere(rows, self.fillers, self.segments, generator)
        return (self.before + (1 + self.between) * torch.arange(self.segments)).expand(rows, -1)


def test_places(lengths: Sequence[int], far: int, corrected: int) -> list[Places]:
    """One segment of facts, two, and two of which the second has `corrected` facts anew: with each of `lengths` before,
    between and after, and with as many as the longest of these in any order. Then one segment, and `far` before it or
    after.
    """
    longest, made = max(lengths), []
    for segments, again in ((1, 0), (2, 0), (2, corrected)):
        made += [Places(count, count, count, segments, again) for count in lengths]
        made.append(Places(longest, longest, longest, segments, again, anywhere=True))
    return [*made, Places(before=far), Places(after=far)]


def places_of(score: Score) -> Places:
    """Where the facts of a score stood, from its details."""
    numbers = {each.name: int(score.details[each.name]) for each in fields(Places)}
    return Places(**{**numbers, "anywhere": bool(numbers["anywhere"])})


def asked_for(score: Score) -> str:
    """What the questions of a score are about: one of `KINDS`, or the facts beside corrected ones."""
    asked, places = int(score.details["asked"]), places_of(score)
    if asked == len(KINDS) - 1 or not places.corrected:
        return KINDS[asked]
    return f"{KINDS[asked]}, beside corrected"


def read_stream(attachment: Attachment, laid: Tensor, progress: Callable[[int], None], part: int = 64) -> Stream:
    """The streams after what was laid `[b, t]`, read `part` segments at a time."""
    stream = attachment.router.new_stream(len(laid))
    for piece in laid.split(part * attachment.router.segment_length, 1):
        stream = read_segments(attachment.model, piece.to(attachment.router.device), stream)
        progress(piece.numel() // attachment.router.segment_length)
    return stream


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
    targets = F.pad(question.labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    return ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1)


def margins(
    attachment: Attachment, task: RecallTask, question: Question, episode_values: Tensor, state: State
) -> Tensor:
    """By how many nats the right answer is more probable than the best wrong one `[b]`: the whitepaper's directness.

    Every candidate stands in the answer's place in turn; an answer's probability is that of all its tokens.
    """
    rows, scores = len(question.ids), []
    start = (question.labels != IGNORED).long().argmax(1)
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
) -> Tensor:
    """Greedy continuation of the question: the number of tokens until the value was complete `[b]` (the whitepaper's
    conciseness), 0 where it is not within `most`. Rows whose answers begin at different places are asked one place at
    a time.
    """
    router, model = attachment.router, attachment.model
    starts = (question.labels != IGNORED).long().argmax(1)
    needed = torch.zeros(len(starts), dtype=torch.long)
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
            needed[row] = ends[0] if ends else 0
    return needed


def unbound(task: RecallTask, episode: Episode, which: int) -> dict[str, Tensor]:
    """What is right without knowing whose a value is `[b]`, on average over guesses: any value; any that the stream
    was told; the most frequent of those that the fact's own segment told.
    """
    value_b1, told_bv = episode.values[:, which, None], episode.said.flatten(1)
    own_bp = episode.said[torch.arange(len(value_b1)), episode.since[:, which]]
    count_bv = F.one_hot(own_bp, len(task.candidates)).sum(1)
    most_bv = count_bv == count_bv.max(1, keepdim=True).values
    return {
        "chance": torch.full((len(value_b1),), 1 / len(task.candidates)),
        "a told value at random": (told_bv == value_b1).float().mean(1),
        UNBOUND: most_bv.gather(1, value_b1)[:, 0] / most_bv.sum(1),
    }


@torch.no_grad()
def evaluate(
    attachment: Attachment,
    task: RecallTask,
    places: Places,
    *,
    rows: int = 512,
    batch: int = 128,
    seed: int = 0,
    detail: bool = True,
    progress: Callable[[int], None] = lambda segments: None,
) -> list[Score]:
    """Asks every fact of `rows` streams, each on its own. One score for the facts of each segment that were told once,
    and one for those that were corrected: these are asked for the new value, and `details` say how often the old one
    is the answer.

    `seed` numbers the test; test streams are never training streams. `progress` is told the segments read.
    """
    attachment.model.eval()
    first, answers = TEST_SEEDS + 10_007 * seed, []
    for part in parts(rows, batch):
        start, count = part.start, part.stop - part.start
        answers.append(_ask_all(attachment, task, places, count, first + start, detail and start == 0, progress))
    best = ceiling(attachment, task, rows=rows, seed=seed)
    scores = (_score_of(task, places, answers, kind, best) for kind in range(len(KINDS)))
    return [score for score in scores if score.examples]


@dataclass
class _Answers:
    """What came of all questions of some streams, `[b, n]` each: right under every condition and on every floor,
    whether the corrected value was said; of the first streams, margins and tokens until the value.
    """

    episode: Episode
    right: dict[str, Tensor]
    floors: dict[str, Tensor]
    old: Tensor
    margin: Tensor | None
    needed: Tensor | None
    state_bytes: int


def _ask_all(
    attachment: Attachment,
    task: RecallTask,
    places: Places,
    rows: int,
    seed: int,
    detail: bool,
    progress: Callable[[int], None],
) -> _Answers:
    source = generator(seed)
    episode = task.tell(rows, source, segments=places.segments, corrected=places.corrected)
    laid = task.lay(episode, places.draw(rows, source), places.total, source)
    stream = read_stream(attachment, laid, progress)
    states = conditions(attachment, stream.state, others(laid))
    outdated = replace(episode, values=torch.where(episode.before < 0, episode.values, episode.before))
    right: dict[str, list[Tensor]] = {name: [] for name in CONDITIONS}
    floors: list[dict[str, Tensor]] = []
    old, margin, needed = [], [], []
    for which in range(episode.keys.shape[1]):
        place, values = torch.full((rows, 1), which), episode.values[:, which]
        question = task.ask(episode, place, generator(seed + 1 + which))
        for name, state in states.items():
            right[name].append(answered(logits_of(attachment, question.ids, state), question).cpu())
        floors.append(unbound(task, episode, which))
        if places.corrected:
            # the same question with the old value as its answer
            before = task.ask(outdated, place, generator(seed + 1 + which))
            old.append(answered(logits_of(attachment, before.ids, stream.state), before).cpu())
        if detail:
            margin.append(margins(attachment, task, question, values, stream.state))
            needed.append(tokens_until_value(attachment, task, question, values, stream.state, most=8))
    return _Answers(
        episode,
        {name: torch.stack(each, 1) for name, each in right.items()},
        {name: torch.stack([each[name] for each in floors], 1) for name in floors[0]},
        torch.stack(old, 1) if old else torch.zeros_like(episode.keys),
        torch.stack(margin, 1) if detail else None,
        torch.stack(needed, 1) if detail else None,
        sum(tensor[0].numel() * tensor.element_size() for tensor in stream.state.values()),
    )


def _kind(episode: Episode) -> Int[Tensor, "b n"]:
    """Which of `KINDS` a question for each fact is of."""
    order = episode.since + (episode.told.shape[1] > 1)
    return torch.where(episode.before < 0, order, len(KINDS) - 1)


def _score_of(task: RecallTask, places: Places, answers: list[_Answers], asked: int, best: float) -> Score:
    """The score of one of `KINDS`, by its number; without examples where there is no such question."""
    chosen = [_kind(answer.episode) == asked for answer in answers]

    def of(pick: Callable[[_Answers], Tensor]) -> Tensor:
        return torch.cat([pick(a)[mask].float() for a, mask in zip(answers, chosen, strict=True)])

    scores = {name: of(lambda a, name=name: a.right[name]) for name in CONDITIONS}
    details = {"state_bytes": answers[0].state_bytes, "asked": asked, **asdict(places)}
    if asked == len(KINDS) - 1:
        details["old"] = of(lambda a: a.old).mean().item()
    if answers[0].margin is not None and answers[0].needed is not None:
        margin, needed = answers[0].margin[chosen[0]], answers[0].needed[chosen[0]]
        found = needed[needed > 0].float()
        details |= {"margin_nats": margin.mean().item(), "found_in_8_tokens": len(found) / max(1, len(needed))}
        # where nothing was found there is no length to speak of
        details |= {"tokens_until_value": found.mean().item()} if len(found) else {}
    return Score(
        length=places.fillers,
        tokens=places.total * task.segment_length,
        examples=len(scores["memory"]),
        score=scores["memory"].mean().item(),
        controls={name: scores[name].mean().item() for name in CONDITIONS[1:]},
        floors={name: of(lambda a, name=name: a.floors[name]).mean().item() for name in answers[0].floors},
        ceiling=best,
        details=details,
        outcomes={name: "".join(str(int(each)) for each in right.tolist()) for name, right in scores.items()},
        streams=sum(len(answer.episode.keys) for answer in answers),
        questions=digest_of(*(each for a in answers for each in (a.episode.told, a.episode.keys, a.episode.values))),
    )


def beyond_chance(scores: Sequence[Score]) -> dict[str, float]:
    """The controls that are right more often than chance, on average over all places, and how often.

    By more than three standard deviations of as many guesses as the largest score has: other scores ask about the same
    streams.
    """
    chance, count = scores[0].floors["chance"], max(score.examples for score in scores)
    most = chance + 3 * (chance * (1 - chance) / count) ** 0.5
    means = {name: sum(score.controls[name] for score in scores) / len(scores) for name in scores[0].controls}
    return {name: mean for name, mean in means.items() if mean > most}


@torch.no_grad()
def ceiling(attachment: Attachment, task: RecallTask, *, rows: int, seed: int) -> float:
    """The base's own exact match with facts and question in one window."""
    question = task.ask_in_window(rows, generator(TEST_SEEDS + 10_007 * seed))
    logits = logits_of(attachment, question.ids, None)
    targets = F.pad(question.labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    fact = F.pad(question.fact[:, 1:], (0, 1), value=-1).to(logits.device)
    wrong = (logits.argmax(-1) != targets) & (targets != IGNORED)
    shares = []
    for which in range(task.pairs):
        asked = ((fact == which) & (targets != IGNORED)).any(1)
        if bool(asked.any()):
            shares.append((~(wrong & (fact == which)).any(1))[asked].float().mean())
    return float(torch.stack(shares).mean())
