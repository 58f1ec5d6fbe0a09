"""`/healthz`, `/readyz` and `/metrics`: for those who run it, without a key."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mnemic.serve.errors import Refused
from mnemic.serve.state import TheServer

router = APIRouter()


@router.get("/healthz")
async def healthy(server: TheServer) -> dict[str, str]:
    """Whether the model's thread runs."""
    if not server.engine.alive:
        raise Refused(503, "dead", "the model's thread has ended; start the server anew")
    return {"status": "ok"}


@router.get("/readyz")
async def ready(server: TheServer) -> dict[str, str]:
    """Whether the store answers, too."""
    await healthy(server)
    await asyncio.to_thread(server.sessions.store.stored, "/")
    return {"status": "ok"}


@router.get("/metrics")
async def metrics(server: TheServer) -> Response:
    """What was counted, in Prometheus' own format."""
    return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)
