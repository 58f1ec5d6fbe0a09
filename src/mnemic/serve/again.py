"""A request that is sent again, because its client did not see the answer, is answered as it was and read once.

A client says by `Idempotency-Key` that two requests are one. The key and the answer are notes of the session that the
answer made, so they are kept with it or not at all. A session knows its latest request that had a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mnemic.serve.errors import Refused
from mnemic.serve.schemas import Sampling

NOTE = "request"
"""The session's note that has it."""


@dataclass(frozen=True)
class Given:
    """An answer: its text, how it ended in the words of this API, and the tokens that were read and said."""

    text: str
    end: str
    read: int
    said: int


@dataclass(frozen=True)
class Once:
    """A request, by hashes of its key and of what it asks for."""

    key: str
    body: str

    @staticmethod
    def of(key: str | None, asked: Sampling) -> Once | None:
        """None for a request without a key; raises `Refused` for a key that is none."""
        if key is None:
            return None
        if not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
            raise Refused(400, "invalid_key", "a key has 1 to 255 printable ASCII characters", "Idempotency-Key")
        body = asked.model_dump_json(exclude={"stream", "stream_options"})
        return Once(*(hashlib.sha256(text.encode()).hexdigest() for text in (key, body)))

    def given(self, notes: Mapping[str, Any]) -> Given | None:
        """The answer that it got; None where it got none. Raises `Refused` where another request had its key."""
        note = notes.get(NOTE)
        if not isinstance(note, dict) or note.get("key") != self.key:
            return None
        if note["body"] != self.body:
            raise Refused(422, "key_reused", "another request had this key; use a new one", "Idempotency-Key")
        return Given(**note["given"])

    def note(self, given: Given) -> dict[str, Any]:
        """For the session's notes."""
        return {NOTE: {**asdict(self), "given": asdict(given)}}
