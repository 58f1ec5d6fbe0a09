"""What every request passes: it gets an id, a limit of its size, a line in the log, and a place in the metrics."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnemic.serve.errors import told
from mnemic.serve.metrics import Metrics

log = logging.getLogger("mnemic.serve")


class Gate:
    """Middleware. The log names the route, not the path, and no text: sessions' names are their owners' affair."""

    def __init__(self, app: ASGIApp, metrics: Metrics, body: int) -> None:
        self.app, self.metrics, self.body = app, metrics, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given, begun, status = Headers(scope=scope).get("x-request-id", ""), time.monotonic(), 0
        name = given if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given) else uuid.uuid4().hex

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self.app(scope, self._limited(scope, receive), sending)
        except Exception as error:  # not for those above, who would log what it says
            refused = told(error)
            if status:
                raise ConnectionError("the response was cut short") from None
            await refused.response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.monotonic() - begun
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            whose = scope.get("mnemic.tenant", "-")
            log.info("%s %s %s %s %d %.3f s", name, whose, _method(scope), route, status, seconds)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        length, taken = Headers(scope=scope).get("content-length", ""), 0
        # this class goes through FastAPI as it is
        too_large = HTTPException(413, f"the body has more than {self.body:,} bytes, which are the most here")

        async def receiving() -> Message:
            nonlocal taken
            if length.isascii() and length.isdigit() and int(length[:20]) > self.body:
                raise too_large
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.body:
                raise too_large
            return message

        return receiving


def _method(scope: dict[str, Any] | Any) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT") else "other"
