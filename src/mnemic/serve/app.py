"""The application: its parts, its routes, its beginning and its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from torch import nn

from mnemic.attachment import router_of
from mnemic.serve import completions, errors, health, manage, responses
from mnemic.serve.engine import Engine
from mnemic.serve.gate import Gate
from mnemic.serve.keys import Keys
from mnemic.serve.metrics import Metrics
from mnemic.serve.sessions import Sessions
from mnemic.serve.settings import Settings
from mnemic.serve.state import Server
from mnemic.serve.turn import Turns
from mnemic.store import SessionStore, StoreError

PURGE = 3600
"""Seconds between two looks for sessions that have expired."""


def make_app(
    model: nn.Module, tokenizer: Any, store: SessionStore, settings: Settings, keys: Keys | None = None
) -> FastAPI:
    """An ASGI application that serves a model with its memory. The store is the caller's to close.

    Raises:
        ValueError: a model without a memory, or an encoder, which says nothing.
    """
    if not router_of(model).causal:
        raise ValueError(f"{type(model).__name__} is an encoder and answers nothing; serve a decoder")
    metrics, engine = Metrics(), Engine(model, settings.rows)
    sessions = Sessions(model, tokenizer, store, warm=settings.warm, wait=settings.wait, keep_text=settings.keep_text)
    turns = Turns(engine, sessions, settings, metrics)

    @contextlib.asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        purging = asyncio.create_task(_purge(store))
        yield
        purging.cancel()
        await turns.end()
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="mnemic", lifespan=living, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = Server(settings, keys or Keys(), metrics, engine, sessions, turns, int(time.time()))
    app.add_middleware(Gate, metrics=metrics, body=settings.body)
    errors.install(app)
    for each in (completions, responses, manage, health):
        app.include_router(each.router)
    return app


async def _purge(store: SessionStore) -> None:
    while True:
        with contextlib.suppress(StoreError):
            await asyncio.to_thread(store.purge)
        await asyncio.sleep(PURGE)
