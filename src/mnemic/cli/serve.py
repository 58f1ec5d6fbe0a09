"""`mnemic serve` and `mnemic keys`: sessions behind an HTTP API, and who may use it."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mnemic.cli.chat import RECALL, load, load_base
from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import console
from mnemic.cli.train import configured

if TYPE_CHECKING:
    from torch import nn


def serve(
    model: Annotated[str, typer.Argument(help=CAUSAL)],
    memory: Annotated[
        str, typer.Option(help="A mechanism (mnemic list names them), or the folder of a trained memory.")
    ] = RECALL,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the mechanism; repeat it.")
    ] = None,
    store: Annotated[str, typer.Option(help="A path (SQLite), or postgresql+psycopg://...")] = "memories.db",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port; 0 for any that is free.")] = 8000,
    key_file: Annotated[Path | None, typer.Option("--keys", help="A file that mnemic keys made: who may ask.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its own name by default.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that are made at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; one more gets 429.")] = 64,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a request waits for its session, then 409.")] = 30,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 600,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a request.")] = 131_072,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 4 * 2**20,
    session_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of a session in the store.")] = None,
    store_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of all that is in the store.")] = None,
    warm: Annotated[int, typer.Option(min=0, help="Sessions that stay in RAM.")] = 64,
    ttl: Annotated[float | None, typer.Option(help="Seconds that a session lives after its last turn.")] = None,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers have to end after SIGTERM.")] = 60,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="New sessions keep their text, so that a look inside tells in words.")
    ] = False,
) -> None:
    """Serves a model whose sessions outlive requests and processes, behind the API that OpenAI's clients speak."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ModuleNotFoundError:
        raise typer.BadParameter("a server needs more packages: pip install 'mnemic[serve]'") from None
    import mnemic
    from mnemic.serve import Settings, make_app
    from mnemic.serve.keys import Keys

    try:
        keys = Keys(key_file)
        if not (keys.asked or _is_local(host)):
            raise ValueError(f"{host} can be reached by others, and everybody may ask; pass --keys or --host 127.0.0.1")
        settings = Settings(
            name or model,
            rows=rows,
            queue=queue,
            wait=wait,
            timeout=timeout,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            body=body_bytes,
            warm=warm,
            keep_text=keep_text,
        )
        base, tokenizer = _load(found(model) or model, memory, setting or [])
        # behind what may be refused: it makes a file
        opened = mnemic.SessionStore(store, ttl=ttl, size_limit=session_bytes, total_limit=store_bytes)
        app = make_app(base, tokenizer, opened, settings, keys)
    except (OSError, ValueError, mnemic.StoreError, ImportError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    kind = mnemic.attached(base).config.kind
    console.print(
        f"{settings.model} with {kind}, sessions in {opened.url}: http://{host}:{port}/v1, "
        + ("with keys" if keys.asked else "for everybody on this machine"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    _log_requests()
    with opened:
        uvicorn.run(
            app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=drain or None
        )


def keys(
    tenant: Annotated[str, typer.Argument(help="Whose: a-z, 0-9, _ and -.")],
    file: Annotated[Path, typer.Option("--keys", help="The file, which gets the key's hash.")] = Path("keys.toml"),
) -> None:
    """Makes an API key for mnemic serve and prints it, this once; the file has its hash alone."""
    from mnemic.serve.keys import new_key

    try:
        typer.echo(new_key(tenant, file))
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _load(name: str, memory: str, settings: list[str]) -> tuple[nn.Module, Any]:
    """The model with its memory, and its tokenizer."""
    import torch

    import mnemic

    if Path(memory).is_dir() or (memory == RECALL and not settings):
        if settings:
            raise ValueError(f"--set {settings[0]}: the memory in {memory} has its settings")
        return load(name, Path(memory))
    config = configured(memory, settings)
    model, tokenizer = load_base(name)
    torch.manual_seed(0)  # the same memory in every run, or it would not take its own sessions back
    attached = mnemic.attach(model, config)
    torch.seed()
    if any(True for _ in attached.memory.parameters()):
        console.print(f"This {memory} is not trained, so nothing is remembered beyond the window.", style="yellow")
    return model, tokenizer


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _log_requests() -> None:
    log, handler = logging.getLogger("mnemic.serve"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
