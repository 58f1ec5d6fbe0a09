"""`/v1/sessions`: what a session is, what was written in it, another one that begins with it, its file, and its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Response

from mnemic.serve.errors import Refused, told
from mnemic.serve.schemas import ForgetRequest, ForkRequest
from mnemic.serve.state import Server, Tenant, TheServer, checked, stored
from mnemic.serve.turn import to_the_end
from mnemic.session import Session
from mnemic.tables import Entry

router = APIRouter(prefix="/v1/sessions/{name}")
Name = Annotated[str, Path()]
Result = TypeVar("Result")


@contextlib.asynccontextmanager
async def _held(server: Server, tenant: str, name: str) -> AsyncIterator[tuple[str, Any]]:
    """A session's name in the store, while nobody else here uses it, and what runs work in a thread meanwhile."""
    full = stored(tenant, "session", checked(name, "session"))

    async def run(work: Callable[[], Result]) -> Result:
        try:
            return await to_the_end(asyncio.to_thread(work))
        except Exception as error:
            raise told(error) from error

    async with server.sessions.hold(full):
        yield full, run


@router.get("")
async def show(name: Name, server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """Its version, times, bytes and tokens."""
    async with _held(server, tenant, name) as (full, run):
        return await run(lambda: _told(name, server.sessions.store.entry(full), server.sessions.load(full)))


@router.delete("")
async def delete(name: Name, server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """Removes it for good."""
    async with _held(server, tenant, name) as (full, run):
        await run(lambda: server.sessions.delete(full))
    return {"id": name, "object": "session.deleted", "deleted": True}


@router.get("/history")
async def history(name: Name, server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """What was written when, as `Session.history` has it."""
    async with _held(server, tenant, name) as (full, run):
        session = await run(lambda: server.sessions.load(full))
    return {"object": "list", "data": session.history}


@router.get("/export")
async def export(name: Name, server: TheServer, tenant: Tenant) -> Response:
    """The file that `Session.save` would write."""
    async with _held(server, tenant, name) as (full, run):
        data, _ = await run(lambda: server.sessions.store.get_bytes(full))
    return Response(data, media_type="application/octet-stream")


@router.post("/fork")
async def fork(asked: ForkRequest, name: Name, server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """Another session, which begins with what this one has heard, under a name that is free."""
    other = stored(tenant, "session", asked.to)

    def work() -> dict[str, Any]:
        session = server.sessions.load(full)
        if server.sessions.store.stored(other) is not None:
            raise Refused(409, "exists", "there is a session of that name already", "to")
        session.stored = None
        server.sessions.keep(other, session)
        return _told(asked.to, server.sessions.store.entry(other), session)

    async with _held(server, tenant, name) as (full, run):
        return await run(work)


@router.post("/forget")
async def forget(asked: ForgetRequest, name: Name, server: TheServer, tenant: Tenant) -> dict[str, Any]:
    """Forgets some of its tokens, where its memory keeps tokens one by one."""

    def work() -> dict[str, Any]:
        session = server.sessions.load(full)
        forgotten = sum(session.forget(first, last) for first, last in _spans(session, asked))
        version = server.sessions.keep(full, session)
        return {"id": name, "object": "session.forgotten", "forgotten_tokens": forgotten, "version": version}

    async with _held(server, tenant, name) as (full, run):
        return await run(work)


def _spans(session: Session, asked: ForgetRequest) -> list[tuple[int, int]]:
    """The tokens that are to be forgotten: the first and the last of each run of them."""
    if asked.first is not None and asked.last is not None:
        return [(asked.first, asked.last)]
    since, until = asked.since or 0, float("inf") if asked.until is None else asked.until
    chosen = [
        record
        for record in session.history
        if (record["number"] == asked.segment if asked.segment is not None else since <= record["time"] <= until)
    ]
    if not chosen:
        raise Refused(400, "nothing_there", "the session's history has no such segment", "segment")
    return [(record["first"], record["last"]) for record in chosen]


def _told(name: str, entry: Entry, session: Session) -> dict[str, Any]:
    stream = session.stream
    return {
        "id": name,
        "object": "session",
        "version": entry.version,
        "created": int(entry.created.timestamp()),
        "updated": int(entry.updated.timestamp()),
        "expires": None if entry.expires is None else int(entry.expires.timestamp()),
        "bytes": entry.nbytes,
        "memory": entry.memory,
        "tokens": 0 if stream is None else stream.seen[0],
        "segments": 0 if stream is None else stream.written[0],
    }
