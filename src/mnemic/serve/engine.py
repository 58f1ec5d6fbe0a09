"""One thread that runs the model: answers of different sessions share its forward passes, and come and go in between.

An answer has a session of its own, a fork that nobody else uses. Its prompt is read in pieces, between the tokens of
the others, so a long one does not stop them. Then it joins their batch, a row each; every row chooses by its own
processors and draws from its own generator. An answer that fails, or that nobody waits for any more, leaves; the others
go on.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mnemic.batching import Rows
from mnemic.host.choosing import Choosing, setting
from mnemic.host.evaluating import evaluating
from mnemic.serve.said import Said
from mnemic.session import Session

PIECE = 256
"""Tokens of a prompt that are read at once, between two tokens of the answers on their way."""


@dataclass(eq=False)
class Answer:
    """One on its way: the session that it continues, with what, and how (`ways`, the arguments of `generate`).

    `tell` gets pieces of text, and at last None, in the engine's thread; then `error` is what went wrong, if anything
    did. `closing` gives the tokens that end an answer in the session, from those that were said.
    """

    session: Session
    prompt: Int[Tensor, "1 t"]
    ways: dict[str, Any]
    said: Said
    tell: Callable[[str | None], None]
    closing: Callable[[list[int]], Int[Tensor, "1 n"] | None] = lambda _: None
    seed: int | None = None
    whose: str = ""
    cancelled: bool = False
    error: Exception | None = None
    choosing: Choosing | None = None
    generator: torch.Generator | None = None
    logits: Float[Tensor, "1 v"] | None = None
    left: Int[Tensor, "1 n"] = field(init=False)
    """What the session is to read next."""

    def __post_init__(self) -> None:
        self.left = self.prompt

    @property
    def tokens(self) -> list[int]:
        """What was said so far, as ids."""
        return [] if self.choosing is None else self.choosing.answer[0].tolist()

    @property
    def cut(self) -> bool:
        """Whether it ended because it was as long as it may be."""
        ends = setting(self.session.model, self.ways, "eos_token_id")
        ends = torch.as_tensor([] if ends is None else ends).flatten().tolist()
        return not self.said.stopped and len(self.tokens) == self.ways["max_new_tokens"] and self.tokens[-1] not in ends

    def prepare(self) -> None:
        """What choosing takes."""
        self.choosing = Choosing(self.session.model, self.prompt, self.session.cache, **self.ways)
        self.generator = torch.Generator(self.prompt.device)
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)

    def choose(self) -> bool:
        """Chooses the next token, tells what it adds to the text, and returns whether it is the last one."""
        assert self.choosing is not None
        assert self.logits is not None
        self.left = self.choosing.choose(self.logits, self.generator)
        if piece := self.said.more(self.choosing.answer[0], last=self.choosing.done):
            self.tell(piece)
        return self.choosing.done or self.said.stopped

    def close(self) -> None:
        """The session reads the last token, which no step has fed, and what closes the answer."""
        if (closing := self.closing(self.tokens)) is not None:
            self.left = torch.cat([self.left, closing.to(self.left.device)], 1)
        self.session.read(self.left)

    def end(self, error: Exception | None = None) -> None:
        """Tells that nothing more comes."""
        self.error = error
        self.tell(None)


class Engine:
    """Runs answers, `most` at a time, first come first served, and owners in turn: next comes one with fewest running.

    `steps` and `tokens` count forward passes of the batch and what was chosen.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self.model, self.most, self.steps, self.tokens = model, most, 0, 0
        self._waiting: list[Answer] = []
        self._reading: list[Answer] = []
        self._batch: list[Answer] = []
        """The answers of `_rows`, in the order of its rows."""
        self._rows: Rows | None = None
        self._served: Counter[str] = Counter()
        """When an answer of each owner was last begun: the greater, the later."""
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="mnemic-engine", daemon=True)

    def start(self) -> None:
        """Begins to run."""
        self._thread.start()

    def close(self) -> None:
        """Returns when every answer on its way has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it runs and takes answers in."""
        return self._thread.is_alive() and not self._closing

    def begin(self, answer: Answer) -> None:
        """Takes an answer in; raises `RuntimeError` where the engine is closed."""
        with self._changed:
            if not self.alive:
                raise RuntimeError("the engine is closed")
            self._waiting.append(answer)
            self._changed.notify()

    # --- in its thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._admit():
            try:
                with evaluating(self.model), torch.no_grad():
                    self._leave([answer for answer in self._batch if answer.cancelled])
                    self._read()
                    self._step()
            except Exception as error:  # a fault of its own must leave nobody waiting
                failed, self._reading, self._batch, self._rows = [*self._reading, *self._batch], [], [], None
                for answer in failed:
                    answer.end(error)

    def _admit(self) -> bool:
        """Waits for work and takes in what there is room for; False when there will be none any more."""
        with self._changed:
            while not (self._waiting or self._reading or self._batch):
                if self._closing:
                    return False
                self._changed.wait()
            running = Counter(answer.whose for answer in [*self._reading, *self._batch])
            while self._waiting and running.total() < self.most:
                chosen = min(self._waiting, key=lambda each: (running[each.whose], self._served[each.whose]))
                self._waiting.remove(chosen)
                self._served[chosen.whose] = self._served.total() + 1
                self._reading.append(chosen)
                running[chosen.whose] += 1
        return True

    def _read(self) -> None:
        """A piece of one long prompt, and what is left of the others, which then have their first token to choose."""
        for answer in [each for each in self._reading if each.cancelled]:
            self._reading.remove(answer)
        for answer in [each for each in self._reading if each.choosing is None]:
            self._tried(answer, answer.prepare)
        for answer in [each for each in self._reading if each.left.shape[1] > PIECE][:1]:
            self._tried(answer, lambda answer=answer: answer.session.read(answer.left[:, :PIECE]))
            answer.left = answer.left[:, PIECE:]
        ready = [each for each in self._reading if each.left.shape[1] <= PIECE]
        self._reading = [each for each in self._reading if each not in ready]
        self._join(ready)

    def _step(self) -> None:
        """A token of every answer. Those that end with it leave the batch first, and are closed."""
        ended, failed = [], []
        for answer in self._batch:
            try:
                if answer.choose():
                    ended.append(answer)
                self.tokens += 1
            except Exception as error:
                failed.append(answer)
                answer.end(error)
        self._leave([*ended, *failed])
        for answer in ended:
            try:
                answer.close()
            except Exception as error:
                answer.end(error)
            else:
                answer.end()
        if self._rows is None:
            return
        try:
            self._feed(self._rows, self._batch, [[answer.left] for answer in self._batch])
        except Exception:
            # the step was taken back: each row takes it alone, so that one fails and no other
            alone, rows, self._batch, self._rows = self._batch, self._rows, [], None
            rows.give_back()
            for answer in alone:
                self._join([answer])

    def _feed(self, rows: Rows, answers: Sequence[Answer], parts: Any) -> None:
        choosing = answers[0].choosing
        assert choosing is not None
        logits = rows.call(rows.model, parts, **choosing.forward)[0].logits[:, -1]
        for row, answer in enumerate(answers):
            answer.logits = logits[row : row + 1]
        self.steps += 1

    def _join(self, answers: Sequence[Answer]) -> None:
        """These read what is left to them, as one batch, or each alone where that fails, and join."""
        if not answers:
            return
        rows = Rows([answer.session for answer in answers])
        try:
            self._feed(rows, answers, rows.in_step([answer.left for answer in answers]))
        except Exception as error:
            if len(answers) == 1:
                answers[0].end(error)
            else:
                for answer in answers:
                    self._join([answer])
            return
        if self._rows is None:
            self._rows = rows
        else:
            self._rows.join(rows)
        self._batch += answers

    def _leave(self, answers: Sequence[Answer]) -> None:
        """Their rows are through; their sessions have read what was fed."""
        if self._rows is None:
            return
        places = [place for place, answer in zip(self._rows.places, self._batch, strict=True) if answer in answers]
        self._rows.part_with(places)
        self._batch = [answer for answer in self._batch if answer not in answers]
        if not self._batch:
            self._rows = None

    def _tried(self, answer: Answer, work: Callable[[], Any]) -> None:
        """Does something for a prompt that is being read; where that fails its answer ends."""
        try:
            work()
        except Exception as error:
            self._reading.remove(answer)
            answer.end(error)
