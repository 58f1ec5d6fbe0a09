"""Errors in the form that clients of this API know: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mnemic.serve.heard import OtherHistoryError
from mnemic.state import StateError
from mnemic.store import Conflict, NoRoom, NotStored, StoreError

log = logging.getLogger("mnemic.serve")
TYPES = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}


class Refused(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry: int | None = None
    ) -> None:
        self.status, self.code, self.message, self.param, self.retry = status, code, message, param, retry
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As an answer to a request."""
        headers = {"Retry-After": str(self.retry)} if self.retry is not None else None
        return JSONResponse(self.body, self.status, headers)


def missing(what: str = "session") -> Refused:
    """The same for what is not there and what is another's."""
    return Refused(404, "not_found", f"there is no such {what}")


def told(error: BaseException) -> Refused:
    """What a client is told of an error. Of those that are not its own it learns nothing; the log has their place."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, NotStored):
        return missing()
    if isinstance(error, Conflict):
        return Refused(409, "conflict", "the session was changed by another server meanwhile; send the request again")
    if isinstance(error, OtherHistoryError):
        return Refused(409, "other_history", str(error), "messages")
    if isinstance(error, NoRoom):
        return Refused(507, "no_room", "the session, or the store with it, would be larger than it may be; delete some")
    if isinstance(error, TimeoutError):
        return Refused(504, "timeout", "the answer took too long; the session is as it was")
    if isinstance(error, ValueError) and not isinstance(error, StateError):
        return Refused(400, "invalid_value", str(error)[:500])
    _log(error)
    if isinstance(error, StoreError | StateError):
        return Refused(503, "store_failed", "the session could not be read or kept; it is as it was", retry=5)
    return Refused(500, "failed", "the server failed; a session that the request names is as it was")


def _log(error: BaseException) -> None:
    """An error by its kind and where it was raised, without what it says, which may be somebody's text."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)).rstrip())


def install(app: FastAPI) -> None:
    """Makes every error of an app's routes one of these."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        names = {404: ("not_found", "there is no such page"), 405: ("method_not_allowed", "no such method here")}
        names[413] = "too_large", str(error.detail)
        code, message = names.get(error.status_code, ("invalid_request", "the request cannot be read; send JSON"))
        response = Refused(error.status_code, code, message).response()
        response.headers.update(error.headers or {})
        return response


def _invalid(problem: Mapping[str, Any]) -> Refused:
    """Says where a body is wrong and why, and nothing of what stood there."""
    place = [str(each) for each in problem["loc"] if each != "body"]
    param = ".".join(place)[:200].encode("utf-8", "replace").decode() or None
    if problem["type"] == "json_invalid":
        return Refused(400, "invalid_json", "the body is no JSON")
    if problem["type"] == "extra_forbidden":
        return Refused(400, "unknown_parameter", "this server does not know this parameter", param)
    message = str(problem["msg"]).removeprefix("Value error, ")[:500]
    return Refused(400, "invalid_value", message.encode("utf-8", "replace").decode(), param)
