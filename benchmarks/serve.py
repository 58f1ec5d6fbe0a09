"""What `mnemic serve` answers when sessions share its forward passes, beside one request after another.

The server and its clients are one process, over loopback. In every round each of the sessions is asked once, all in
turn and all at once (the first of the two changes with the round), and answers a fixed number of tokens. Beside tokens
a second: how long a client waits for the first piece of text, and for the next ones. On a machine that does other
things, too, ratios hold and seconds do not; processor time, of the clients too, is beside the time on the clock.

    python benchmarks/serve.py --out results
"""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.memories import MemoryConfig
from mnemic.serve import Settings, make_app
from real_model import opened, timed

QUESTION = "The lamp stood on the table by the window. Tell me what you see there, and who may have put it there."


def main(
    model: Annotated[str, typer.Option(help="A causal model with a chat template: a folder, or smollm2.")] = "smollm2",
    memory: Annotated[str, typer.Option(help="The mechanism.")] = "recall",
    sessions: Annotated[int, typer.Option(min=2, help="Sessions that are asked.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each session and way.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs"),
) -> None:
    """Times both ways and writes a record."""
    host, tokenizer, name = opened(model)
    config = MemoryConfig.from_dict({"kind": memory})
    mnemic.attach(host, config)
    host.generation_config.eos_token_id = tokenizer.eos_token_id = None  # every answer has as many tokens
    with tempfile.TemporaryDirectory() as folder, mnemic.SessionStore(Path(folder) / "m.db") as store:
        measures = measured(host, tokenizer, store, sessions, tokens, rounds)
    record = Record("serve", memory, f"{name}, untrained", 0, {"memory": config.to_dict(), "threads": 1})
    record.config |= {"sessions": sessions, "tokens": tokens, "rounds": rounds}
    record.measures = measures
    record.command = "python benchmarks/serve.py"
    record.command += f" --model {name} --memory {memory} --sessions {sessions} --tokens {tokens} --rounds {rounds}"
    print(record.save(out, "serve.json"))


def measured(
    host: Any, tokenizer: Any, store: mnemic.SessionStore, sessions: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second and waits, in turn and at once, and the one by the other."""
    found: dict[str, Any] = {
        way: {"clock": [], "processor": [], "first": [], "next": []} for way in ("in turn", "at once")
    }
    with serving(host, tokenizer, store, sessions) as port:
        for turn in range(-1, rounds):
            for way in sorted(found, reverse=bool(turn % 2)):
                names = [f"{way} {number}".replace(" ", "-") for number in range(sessions)]
                waits: list[list[float]] = []
                spent, _ = timed(lambda w=way, n=names, s=waits: ask_all(port, n, tokens, s, at_once=w == "at once"))
                if turn < 0:
                    continue  # what is made once
                its = found[way]
                its["clock"].append(spent.clock)
                its["processor"].append(spent.processor)
                its["first"] += [wait[0] for wait in waits]
                its["next"] += [each for wait in waits for each in wait[1:]]
                print(f"{way}, {turn}: {spent}", flush=True)
    said, measures = sessions * tokens, {}
    for way, its in found.items():
        rates = {clock: said / statistics.median(its[clock]) for clock in ("clock", "processor")}
        pieces = {f"{name} piece, s": quantiles(its[name]) for name in ("first", "next")}
        measures[way] = {"tokens a second": rates, **pieces, "seconds": {clock: its[clock] for clock in rates}}
    for clock in ("clock", "processor"):
        pairs = zip(found["in turn"][clock], found["at once"][clock], strict=True)
        measures[f"at once / in turn, {clock}"] = statistics.median(alone / shared for alone, shared in pairs)
    print(json.dumps(measures, indent=1))
    return measures


def quantiles(values: list[float]) -> dict[str, float]:
    """The median, and what 95 % are within."""
    return {"p50": statistics.median(values), "p95": statistics.quantiles(values, n=20, method="inclusive")[-1]}


@contextlib.contextmanager
def serving(host: Any, tokenizer: Any, store: mnemic.SessionStore, rows: int) -> Iterator[int]:
    """The port of a server."""
    app = make_app(host, tokenizer, store, Settings("model", rows=rows))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask_all(port: int, names: list[str], tokens: int, waits: list[list[float]], *, at_once: bool) -> None:
    """A turn of every session."""
    if not at_once:
        waits += [ask(port, name, tokens) for name in names]
        return
    threads = [threading.Thread(target=lambda name=name: waits.append(ask(port, name, tokens))) for name in names]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if len(waits) != len(names):
        raise RuntimeError(f"{len(names) - len(waits)} of {len(names)} requests failed")


def ask(port: int, session: str, tokens: int) -> list[float]:
    """Seconds until each piece of an answer; raises `RuntimeError` where there are not as many tokens as asked for."""
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    body |= {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}, "user": session}
    waits, before, said = [], time.perf_counter(), 0
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            said = event["usage"]["completion_tokens"]
        elif event["choices"][0]["delta"].get("content"):
            waits.append(time.perf_counter() - before)
            before = time.perf_counter()
    connection.close()
    if said != tokens:
        raise RuntimeError(f"session {session} said {said} tokens, and {tokens} were asked for")
    return waits


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"serve": table(records(results, "serve"))}


def table(found: Sequence[Record]) -> str:
    """Sessions at once beside the same in turn, a row for each length of an answer."""
    if not found:
        return missing("serving")
    rows = []
    for record in sorted(found, key=lambda record: record.config["tokens"]):
        turn, once = record.measures["in turn"], record.measures["at once"]
        waits = [f"{way['first piece, s'][part]:.2f}" for way in (turn, once) for part in ("p50", "p95")]
        ratios = [f"{record.measures[f'at once / in turn, {clock}']:.2f}" for clock in ("clock", "processor")]
        rows.append([f"{record.config['sessions']}", f"{record.config['tokens']}", *ratios, *waits])
    header = ["sessions", "tokens an answer", "tokens a second at once / in turn", "by processor time"]
    header += [f"first piece {way}, s, {part}" for way in ("in turn", "at once") for part in ("p50", "p95")]
    first = found[0]
    note = f"{first.host}, {first.mechanism}, {first.config['threads']} thread, rounds: {first.config['rounds']}; the "
    note += f"machine did other things, too. Made by {', '.join(f'`{each.command}`' for each in found)}."
    return f"{markdown(header, rows)}\n\n{note}"


if __name__ == "__main__":
    typer.run(main)
