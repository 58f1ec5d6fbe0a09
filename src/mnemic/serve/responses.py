"""`/v1/responses`: each response that is stored is a session of its own, and what goes on from it is a fork. So a
conversation may branch anywhere, and one response can be deleted and leave the others.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from mnemic.serve import asking
from mnemic.serve.answering import answered, event
from mnemic.serve.errors import Refused, missing, told
from mnemic.serve.schemas import ResponseRequest
from mnemic.serve.state import Named, Tenant, TheServer, stored
from mnemic.serve.turn import Asked, Turn, to_the_end
from mnemic.session import Session

router = APIRouter(prefix="/v1/responses")


class Events:
    """The form of a response: one message with one text, whose events name what they are part of and are numbered."""

    def __init__(self, asked: ResponseRequest, name: str) -> None:
        self.name, self.message, self.created = name, f"msg_{secrets.token_hex(16)}", int(time.time())
        self.asked, self.count, self.text = asked, 0, ""

    def whole(self, turn: Turn, text: str) -> dict[str, Any]:
        """The whole answer."""
        read, said = turn.given.read, turn.given.said
        cut = turn.given.end == "length"
        usage = {"input_tokens": read, "output_tokens": said, "total_tokens": read + said}
        usage |= {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}
        usage |= {"output_tokens_details": {"reasoning_tokens": 0}}
        status = "incomplete" if cut else "completed"
        return self._response(
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=[self._message(status, [self._part(text)])],
            usage=usage,
        )

    def begun(self) -> list[str]:
        """The response, its message and its text, all empty."""
        return [
            self._event("response.created", response=self._response(status="in_progress", output=[])),
            self._event("response.in_progress", response=self._response(status="in_progress", output=[])),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress", [])),
            self._of_text("response.content_part.added", part=self._part("")),
        ]

    def said(self, piece: str) -> list[str]:
        """A piece."""
        self.text += piece
        return [self._of_text("response.output_text.delta", delta=piece, logprobs=[])]

    def ended(self, turn: Turn) -> list[str]:
        """Text, message and response, all whole."""
        whole = self.whole(turn, self.text)
        return [
            self._of_text("response.output_text.done", text=self.text, logprobs=[]),
            self._of_text("response.content_part.done", part=self._part(self.text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def failed(self, body: dict[str, Any]) -> str:
        """An error."""
        return self._event("error", **body, code=body["error"]["code"], message=body["error"]["message"], param=None)

    def _event(self, kind: str, **data: Any) -> str:
        self.count += 1
        return event({"type": kind, "sequence_number": self.count - 1, **data}, kind)

    def _of_text(self, kind: str, **data: Any) -> str:
        return self._event(kind, item_id=self.message, output_index=0, content_index=0, **data)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.message, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, **more: Any) -> dict[str, Any]:
        asked = self.asked
        return {
            "id": self.name,
            "object": "response",
            "created_at": self.created,
            "model": asked.model,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "store": asked.store,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }


@router.post("")
async def respond(
    asked: ResponseRequest, request: Request, server: TheServer, tenant: Tenant, named: Named = None
) -> Response:
    """Answers, from where a response before it ended."""
    server.check_model(asked.model)
    if named is not None:
        raise Refused(400, "invalid_session", "a response goes on from previous_response_id, not from X-Session-Id")
    settings, sessions, name = server.settings, server.sessions, f"resp_{secrets.token_hex(16)}"
    keep = stored(tenant, "response", name) if asked.store else None
    previous = asked.previous_response_id
    before = None if previous is None else stored(tenant, "response", previous)
    messages = [each.plain() for each in asked.messages]

    def load() -> Session:
        return sessions.new() if before is None else sessions.load(before)

    def prepare() -> Asked:
        found = asking.chat(load, messages, asked, settings)
        found.session.stored = None  # it is another session from here on
        return found

    turn = server.turns.begin(tenant, before, keep, prepare)
    return await answered(turn, Events(asked, name), request, stream=asked.stream, session=None)


@router.delete("/{name}")
async def delete(name: Annotated[str, Path()], server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """Removes a response for good. Those that went on from it stay."""
    full = stored(tenant, "response", name)
    if len(name) > 40 or not name.isascii() or not name.isprintable():
        raise missing("response")
    async with server.sessions.hold(full):
        try:
            await to_the_end(asyncio.to_thread(server.sessions.delete, full))
        except Exception as error:
            raise told(error) from error
    return {"id": name, "object": "response", "deleted": True}
