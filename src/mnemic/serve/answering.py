"""How a turn is sent: as one JSON object, or as events while it is made. A client that leaves cancels it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mnemic.serve.errors import Refused, told
from mnemic.serve.turn import Turn


class Form(Protocol):
    """How an endpoint writes an answer: whole, or as events of its beginning, of a piece of text, of its end (which
    comes when the session is kept), and of what went wrong.
    """

    def whole(self, turn: Turn, text: str) -> dict[str, Any]:
        """The whole answer."""
        ...

    def begun(self) -> list[str]:
        """Before the first piece."""
        ...

    def said(self, piece: str) -> list[str]:
        """A piece."""
        ...

    def ended(self, turn: Turn) -> list[str]:
        """Behind the last piece."""
        ...

    def failed(self, body: dict[str, Any]) -> str:
        """An error, after which nothing comes."""
        ...


async def answered(turn: Turn, form: Form, request: Request, *, stream: bool, session: str | None) -> Response:
    """The response; raises `Refused` for what goes wrong before it begins."""
    headers = {"X-Session-Id": session} if session is not None else {}
    try:
        await turn.started()
        if stream:
            return Events(turn, form, headers)
        return JSONResponse(form.whole(turn, await _whole(turn, request)), headers=headers)
    except BaseException as error:
        turn.cancel()
        raise (told(error) if isinstance(error, Exception) else error) from error


class Events(StreamingResponse):
    """Server-sent events of a turn, which ends with the connection at the latest."""

    def __init__(self, turn: Turn, form: Form, headers: dict[str, str]) -> None:
        self.turn = turn
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(self._events(form), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        sent = asyncio.ensure_future(super().__call__(scope, _never, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait([sent, gone], return_when=asyncio.FIRST_COMPLETED)
            if sent.done():
                sent.result()
        finally:
            for each in (sent, gone):
                each.cancel()
            self.turn.cancel()

    async def _events(self, form: Form) -> AsyncIterator[str]:
        try:
            for each in form.begun():
                yield each
            async for piece in self.turn.pieces():
                for each in form.said(piece):
                    yield each
            for each in form.ended(self.turn):
                yield each
        except Exception as error:
            yield form.failed(told(error).body)


async def _whole(turn: Turn, request: Request) -> str:
    """The text of an answer, when it is whole and kept."""

    async def joined() -> str:
        return "".join([piece async for piece in turn.pieces()])

    text, gone = asyncio.ensure_future(joined()), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait([text, gone], return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            raise Refused(499, "client_closed_request", "the client left")  # as others count it; nobody is told
        return await text
    finally:
        text.cancel()
        gone.cancel()


def event(data: dict[str, Any] | str, name: str | None = None) -> str:
    """One event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Any:
    await asyncio.Event().wait()
