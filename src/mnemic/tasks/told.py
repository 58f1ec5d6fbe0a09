"""Streams in which things are told, lost among prose, and asked for: what a memory of a real model is trained on.

A stream is whole segments of running text. Sentences and turns of a chat that tell facts, correct them and take them
back stand anywhere in it, several in a segment or across a border; later segments ask, each for one fact. The base sees
one segment at a time, so what is answered right has come through the memory. Asked for what nobody told, the answer is
"I was not told."

Where a stream's text is that of the pool alone, its segments are the pool's, one after another, so `train` computes
what the frozen base makes of them once. The answers of a batch begin at one place, mostly an early one: what follows
them need not be computed, nor logits elsewhere.

`Copying` is the first stage of every training: a segment of text, then the same again with a loss on all of it. It is
dense where questions are sparse, so the memory's write and read find each other in minutes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mnemic.tasks.base import generator
from mnemic.tasks.telling import ASK, CORRECT, NOT_TOLD, RETRACT, TELL, Fact, Split, Teller, wording
from mnemic.tasks.text import Pretrained
from mnemic.training import Batch
from mnemic.turns import Turns
from mnemic.unrolling import IGNORED

TRIES = 50
"""Wordings that are tried for one that fits a segment."""


@dataclass
class Told(Batch):
    """A batch, and of every row what was asked last: its `question`, the `answer`, and how it came to be ("told",
    "corrected", "retracted", "never told").
    """

    question: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    how: list[str] = field(default_factory=list)


def pool_of(ids: Int[Tensor, " n"], segment_length: int) -> Int[Tensor, "p t"]:
    """Running text as segments, one after another; a rest is dropped. Raises `ValueError` for less than two."""
    count = len(ids) // segment_length
    if count < 2:
        raise ValueError(f"the filler has {len(ids)} tokens; give at least two segments of {segment_length}")
    return ids[: count * segment_length].unflatten(0, (count, segment_length))


ENDINGS = (".", "!", "?", ";", "\n")


def endings(tokenizer: Any) -> Bool[Tensor, " v"]:
    """Of all tokens those that end an answer: the model's own ends, and what begins with a stop or a new line."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = torch.tensor([text.lstrip(" ").startswith(ENDINGS) for text in texts])
    ends[tokenizer.all_special_ids] = True
    return ends


def whole(said: Int[Tensor, "b t"], labels: Int[Tensor, "b t"], ends: Bool[Tensor, " v"]) -> Bool[Tensor, " b"]:
    """Whether all that has a label was said, token by token; for the last label of a row, whose place is behind the
    value, anything that ends an answer will do.
    """
    wanted = labels != IGNORED
    place_t = torch.arange(labels.shape[1], device=labels.device)
    last = place_t == place_t.where(wanted, -1).amax(1, keepdim=True)
    # a model may have rows in its vocabulary that its tokenizer has no token for
    ended = (said < len(ends)) & ends.to(said.device)[said.clamp_max(len(ends) - 1)]
    return ((said == labels) | ~wanted | (last & ended)).all(1)


@dataclass
class Copying:
    """A segment of the pool, then the same again: every token of the second but its first has a label."""

    pool: Int[Tensor, "p t"]

    def batch(self, rows: int, seed: int) -> Batch:
        """`rows` streams of two segments."""
        ids = self.pool[torch.randint(len(self.pool), (rows,), generator=generator(seed))]
        labels = torch.cat([torch.full_like(ids, IGNORED), ids], 1)
        labels[:, ids.shape[1]] = IGNORED  # nothing tells the first token of a copy
        return Batch(torch.cat([ids, ids], 1), labels)


@dataclass(frozen=True)
class Mixture:
    """How often, of all facts, one is corrected or taken back; of all questions, one asks for what nobody told; of all
    sentences, one is a turn of a chat in the model's template.
    """

    corrected: float = 0.2
    retracted: float = 0.05
    untold: float = 0.1
    chat: float = 0.3


PLAIN = Mixture(0.0, 0.0, 0.0, 0.3)
"""Facts that hold, asked for as they were told."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer as tokens, `before` of them before the answer; both as text, and how it came to be."""

    ids: list[int]
    before: int
    question: str
    answer: str
    how: str


class ToldThings:
    """Streams of `facts` facts in 1 to `segments` segments of text, then one segment for each of `questions` questions.

    `tokenizer` is a Hugging Face tokenizer, with a chat template or without, `pool [p, t]` the text around the facts in
    segments (`pool_of`). `split` chooses names, values and wordings; `held_out_relations` asks for relations that
    training never meets. In `early` of the batches questions stand at a segment's beginning, which is quicker, and in
    the others anywhere, as in use.

    Raises:
        ValueError: a segment that is too short for a question and its answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        pool: Int[Tensor, "p t"],
        *,
        facts: int = 1,
        segments: tuple[int, int] = (1, 8),
        questions: int = 1,
        mixture: Mixture = PLAIN,
        split: Split = "train",
        held_out_relations: bool = False,
        early: float = 0.75,
    ) -> None:
        if facts < 1 or questions < 1 or not 1 <= segments[0] <= segments[1]:
            raise ValueError(f"facts {facts}, questions {questions}, segments {segments}: use 1 or more, in order")
        self.encoder, self.turns = Pretrained(tokenizer), Turns(tokenizer)
        self.pool, self.segment_length = pool, pool.shape[1]
        self.fewest, self.most = segments
        self.facts, self.questions, self.mixture, self.early = facts, questions, mixture, early
        self.split: Split = split
        self.teller = Teller(split, held_out_relations)
        self.closing = self.turns.closing([]) if self.turns.template else None
        # a question that does not fit shows at once, and not in the middle of a training
        self.batch(4, 0)

    def batch(self, rows: int, seed: int) -> Told:
        """`rows` streams; the same seed gives the same."""
        luck = random.Random(seed)
        streams = [self._events(luck) for _ in range(rows)]
        longest = max(sum(map(len, said)) for said, _ in streams)
        count = max(luck.randint(self.fewest, self.most), -(-longest // self.segment_length))
        # of one form in all rows, so that their lengths differ little
        form = luck.random()
        asked = [
            [self._asked(luck, form, *each) for each in luck.choices(answers, k=self.questions)]
            for _, answers in streams
        ]
        # answers begin at one place
        begin = max(each.before for row in asked for each in row)
        spare = self.segment_length - begin - max(len(each.ids) - each.before for row in asked for each in row)
        begin += luck.randint(0, max(0, spare)) if luck.random() < 1 - self.early else min(0, spare)
        ids = torch.stack([self._laid(luck, said, count) for said, _ in streams])
        start = [luck.randrange(len(self.pool)) for _ in range(rows)]
        found = [self._question_segments(row, first, begin) for row, first in zip(asked, start, strict=True)]
        questions, labels = (torch.stack(each) for each in zip(*found, strict=True))
        last = [row[-1] for row in asked]
        return Told(
            torch.cat([ids, questions], 1),
            torch.cat([torch.full_like(ids, IGNORED), labels], 1),
            question=[each.question for each in last],
            answer=[each.answer for each in last],
            how=[each.how for each in last],
        )

    # --- what is told ------------------------------------------------------------------------------------------------

    def _events(self, luck: random.Random) -> tuple[list[list[int]], list[tuple[Fact, str]]]:
        """What a stream says in order, as tokens, and what may be asked: facts with the way that they came to be."""
        facts = self.teller.facts(luck, self.facts + 1)
        *facts, untold = facts
        said: list[tuple[float, list[int]]] = []
        answers: list[tuple[Fact, str]] = []
        for fact in facts:
            times = sorted((luck.random(), luck.random()))
            said.append((times[0], self._said(luck, fact.sentence(wording(luck, TELL, self.split)))))
            chance = luck.random()
            if chance < self.mixture.corrected:
                new = self.teller.other_value(luck, fact)
                form = wording(luck, CORRECT, self.split)
                said.append((times[1], self._said(luck, new.sentence(form, before=fact.value))))
                answers.append((new, "corrected"))
            elif chance < self.mixture.corrected + self.mixture.retracted:
                said.append((times[1], self._said(luck, fact.sentence(wording(luck, RETRACT, self.split)))))
                answers.append((fact, "retracted"))
            else:
                answers.append((fact, "told"))
        if luck.random() < self.mixture.untold:
            answers = [(untold, "never told")]
        return [ids for _, ids in sorted(said, key=lambda each: each[0])], answers

    def _said(self, luck: random.Random, sentence: str) -> list[int]:
        if self.turns.template and luck.random() < self.mixture.chat:
            ids = self.turns.message(sentence, first=False)[0].tolist() + self._bare(luck.choice(("Noted.", "OK.")))
            return ids + ([] if self.closing is None else self.closing[0].tolist())
        return self.encoder.encode(sentence)

    def _laid(self, luck: random.Random, said: list[list[int]], count: int) -> Tensor:
        """`count` segments of running text in which the sentences stand in place of what was there."""
        first = luck.randrange(len(self.pool))
        ids = self.pool[(first + torch.arange(count)) % len(self.pool)].flatten().clone()
        free = len(ids) - sum(map(len, said))
        gaps = sorted(luck.randint(0, free) for _ in said)
        begin = 0
        for gap, sentence in zip(gaps, said, strict=True):
            ids[gap + begin : gap + begin + len(sentence)] = torch.tensor(sentence)
            begin += len(sentence)
        return ids

    # --- what is asked -----------------------------------------------------------------------------------------------

    def _bare(self, text: str) -> list[int]:
        return self.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _asked(self, luck: random.Random, form: float, fact: Fact, how: str) -> Asked:
        """A question and its answer that fit a segment: a turn of a chat, a sentence to be ended, or a question, by
        where `form` lies between 0 and 1.
        """
        known, question = how in ("told", "corrected"), ""
        for attempt in range(TRIES):
            # what fits in no wording of this form may fit in another
            form = form if attempt < TRIES // 2 else luck.random()
            if self.turns.template and form < self.mixture.chat:
                question = fact.sentence(wording(luck, ASK, self.split))
                before = self.turns.message(question, first=False)[0].tolist()
                after = self._bare(fact.value if known else NOT_TOLD)
                after += [] if self.closing is None else self.closing[0, :1].tolist()
            elif known and form < 0.5 + self.mixture.chat / 2:
                question = fact.sentence("{s} {n} is")
                before = self.encoder.encode(question)
                after = self.encoder.encode(f"{fact.value}.")
            else:
                question = fact.sentence(wording(luck, ASK, self.split))
                before = self._bare(f"\nQuestion: {question}\nAnswer:")
                after = self.encoder.encode(f"{fact.value}." if known else NOT_TOLD)
            if len(before) + len(after) <= self.segment_length:
                return Asked(before + after, len(before), question, fact.value if known else NOT_TOLD, how)
        raise ValueError(
            f"no question with its answer fits a segment of {self.segment_length} tokens, such as {question!r} and "
            f"{fact.value!r}; use longer segments"
        )

    def _question_segments(self, asked: list[Asked], first: int, begin: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels of the segments that ask, text around the questions, their answers at `begin`."""
        ids = self.pool[(first + torch.arange(len(asked))) % len(self.pool)].clone()
        labels = torch.full_like(ids, IGNORED)
        for segment, each in enumerate(asked):
            # a question that would begin before the segment, or end behind it, is moved into it
            start = max(0, min(begin - each.before, self.segment_length - len(each.ids)))
            answer, stop = start + each.before, start + len(each.ids)
            ids[segment, start:stop] = torch.tensor(each.ids)
            labels[segment, answer:stop] = ids[segment, answer:stop]
        return ids.flatten(), labels.flatten()
