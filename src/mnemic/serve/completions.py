"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import functools
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from mnemic.serve import asking
from mnemic.serve.again import Once
from mnemic.serve.answering import answered, event
from mnemic.serve.schemas import ChatRequest, CompletionRequest, Old
from mnemic.serve.state import Key, Named, Server, Tenant, TheServer, session_of, stored
from mnemic.serve.turn import Asked, Turn

router = APIRouter()


class Choices:
    """The form of both: one choice, of which a chat has a message and a completion a text."""

    def __init__(self, asked: Old, session: str | None) -> None:
        self.chat, self.session = isinstance(asked, ChatRequest), session
        self.usage = asked.stream_options is not None and asked.stream_options.include_usage
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, turn: Turn, text: str) -> dict[str, Any]:
        """The whole answer."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": turn.given.end}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": counted(turn), **self._session(turn)}

    def begun(self) -> list[str]:
        """Who speaks."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def said(self, piece: str) -> list[str]:
        """A piece."""
        return [self._chunk({"content": piece} if self.chat else piece)]

    def ended(self, turn: Turn) -> list[str]:
        """Why it ended, what it took, and the mark of the end."""
        chunks = [self._chunk({} if self.chat else "", turn.given.end, **self._session(turn))]
        if self.usage:
            chunks.append(event({**self.head, "object": self._kind, "choices": [], "usage": counted(turn)}))
        return [*chunks, event("[DONE]")]

    def failed(self, body: dict[str, Any]) -> str:
        """An error."""
        return event(body)

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, said: Any, end: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta" if self.chat else "text": said, "logprobs": None, "finish_reason": end}
        return event({**self.head, "object": self._kind, "choices": [choice], **more})

    def _session(self, turn: Turn) -> dict[str, Any]:
        return {} if self.session is None else {"session": {"id": self.session, "version": turn.version}}


def counted(turn: Turn) -> dict[str, int]:
    """The tokens that were read of the request, of which none were read before, and those of the answer."""
    read, said = turn.given.read, turn.given.said
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


@router.post("/v1/chat/completions")
async def chat(
    asked: ChatRequest, request: Request, server: TheServer, tenant: Tenant, named: Named = None, key: Key = None
) -> Response:
    """Answers in the words of the model's chat template."""
    messages = [each.plain() for each in asked.messages]
    prepare = functools.partial(
        asking.chat, messages=messages, asked=asked, settings=server.settings, once=Once.of(key, asked)
    )
    return await _answered(asked, prepare, request, server, tenant, named)


@router.post("/v1/completions")
async def complete(
    asked: CompletionRequest, request: Request, server: TheServer, tenant: Tenant, named: Named = None, key: Key = None
) -> Response:
    """Goes on with a text."""
    prepare = functools.partial(
        asking.completion, prompt=asked.prompt, asked=asked, settings=server.settings, once=Once.of(key, asked)
    )
    return await _answered(asked, prepare, request, server, tenant, named)


async def _answered(
    asked: Old, prepare: Any, request: Request, server: Server, tenant: str, named: str | None
) -> Response:
    server.check_model(asked.model)
    session, sessions = session_of(named, asked), server.sessions
    name = None if session is None else stored(tenant, "session", session)

    def work() -> Asked:
        return prepare(lambda: sessions.load_or_new(name))

    turn = server.turns.begin(tenant, name, name, work)
    return await answered(turn, Choices(asked, session), request, stream=asked.stream, session=session)


@router.get("/v1/models")
async def models(server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """The one model."""
    return {"object": "list", "data": [_model(server)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """The one model."""
    server.check_model(name)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    return {"id": server.settings.model, "object": "model", "created": server.began, "owned_by": "mnemic"}
