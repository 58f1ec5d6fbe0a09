"""A server with a tiny model on a port of this machine, for tests of what clients see."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import uvicorn

import mnemic
from families import make
from helpers import CONFIGS, trained
from mnemic.serve import Settings, make_app
from mnemic.serve.keys import Keys
from talkers import TEMPLATE, tokenizer_of

TOKENIZER = tokenizer_of(TEMPLATE)


def model_of(kind: str = "emt-0", window: int = 24, endless: bool = False) -> Any:
    """A model with a memory; one that is `endless` never chooses to end an answer."""
    model = make("llama", vocab_size=101)
    model.generation_config.eos_token_id = 2
    if endless:  # the greatest of 100 others is above 0
        model.lm_head.weight.data[2] = 0
    trained(model, CONFIGS[kind].replace(window=window))
    return model


class Service:
    """A server, and clients of it."""

    def __init__(self, app: Any, server: uvicorn.Server) -> None:
        self.app, self.server = app, server
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        self.parts = app.state.server

    def http(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, trust_env=False)

    def openai(self, key: str = "none", **headers: str) -> openai.OpenAI:
        http = httpx.Client(timeout=60, trust_env=False)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, default_headers=headers, max_retries=0, http_client=http
        )


@contextlib.contextmanager
def serving(model: Any, store: mnemic.SessionStore, keys: Keys | None = None, **settings: Any) -> Iterator[Service]:
    app = make_app(model, TOKENIZER, store, Settings("tiny", **settings), keys)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield Service(app, server)
    finally:
        server.should_exit = True
        thread.join(60)


def idle(service: Service) -> None:
    """Returns when no turn runs any more."""
    until = time.monotonic() + 60
    while service.parts.turns.running:
        assert time.monotonic() < until
        time.sleep(0.01)
