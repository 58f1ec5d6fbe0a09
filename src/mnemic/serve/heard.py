"""What a session has heard of a conversation, as hashes of its latest turns: by them what is sent again is known.

Clients of chat APIs send the whole conversation with every request, or its latest part; a session needs what is new.
The turns before that end with the last answer, so they are found where the request has that answer, with what stood
before it. A client that sends only what is new sends no answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTE = "turns"
"""The session's note that has it."""
TAIL = 256
"""Turns that are known again, the latest."""

Message = Mapping[str, str]
"""A `role` and a `content`."""


class OtherHistoryError(ValueError):
    """A request has answers that the session did not give last."""


@dataclass(frozen=True)
class Heard:
    """Hashes: of the `system` messages that a session began with, and of its latest `turns` after them."""

    system: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()

    @staticmethod
    def of(notes: Mapping[str, Any]) -> Heard:
        """What a session's notes say; notes that somebody else made say nothing."""
        found = notes.get(NOTE)
        if not isinstance(found, dict):
            return Heard()
        parts = [found.get(name) for name in ("system", "turns")]
        if not all(isinstance(part, list) and all(isinstance(each, str) for each in part) for part in parts):
            return Heard()
        return Heard(*map(tuple, parts))  # pyright: ignore[reportArgumentType]

    def note(self) -> dict[str, Any]:
        """For the session's notes."""
        return {NOTE: {"system": list(self.system), "turns": list(self.turns)}}

    def new(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that the session has not heard yet.

        Raises:
            OtherHistoryError: answers in them, of which the last is not the session's last.
            ValueError: nothing is new.
        """
        if not (self.system or self.turns):
            return list(messages)
        hashes, begin = [hashed(each) for each in messages], 0
        while begin < len(messages) and messages[begin]["role"] == "system" and hashes[begin] in self.system:
            begin += 1
        answers = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
        if answers:
            known = [at for at in answers if self._ends_with(hashes[begin : at + 1])]
            if not known:
                raise OtherHistoryError(
                    "the conversation in this request is not the one that the session has heard: its last answer "
                    "differs, or what stood before it; send only what is new, or use another session"
                )
            begin = known[-1] + 1
        if begin == len(messages):
            raise ValueError("the session has heard all of these messages; send what is new")
        return list(messages[begin:])

    def _ends_with(self, hashes: Sequence[str]) -> bool:
        count = min(len(hashes), len(self.turns))
        complete = len(hashes) <= len(self.turns) or len(self.turns) == TAIL
        return complete and count > 0 and tuple(hashes[-count:]) == self.turns[-count:]

    def after(self, messages: Sequence[Message], answer: str) -> Heard:
        """What was heard when these, which were new, were answered."""
        system, rest = self.system, list(messages)
        if not (self.system or self.turns):
            first = next((at for at, each in enumerate(rest) if each["role"] != "system"), len(rest))
            system, rest = tuple(map(hashed, rest[:first])), rest[first:]
        turns = (*self.turns, *map(hashed, rest), hashed({"role": "assistant", "content": answer}))
        return Heard(system[:TAIL], turns[-TAIL:])


def hashed(message: Message) -> str:
    """A turn's hash: of who says what, without white space around it, which clients drop."""
    return hashlib.sha256(f"{message['role']}\0{message['content'].strip()}".encode()).hexdigest()[:20]
