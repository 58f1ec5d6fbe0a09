"""What recall costs: a decoded token, and a token that is read, against the base with the same window.

The first 5,120 tokens of a novel are read once. A session of N remembered tokens is made of them without reading: the
4,096 that left the window are repeated, keys and values, until there are N. What they say is of no interest here, and
costs what other keys would. Then tokens are decoded one by one in turns: by the base (memory disabled), by the sinks
and the window alone (budget 0), and by recall under each search, with choices that tokens share, and in a few blocks
alone (`FEW`, and the `TEN` first of them, as `recall_blocks.py` ranks them); then segments are read in turns. Times are
medians; where tokens share a choice, of those that make one and of the others apart, each as often as there are such.
On a machine that does other things, too, ratios hold and seconds do not; processor time is given beside the time on the
clock.

    taskset -c 1 python benchmarks/recall_speed.py --data novels.tar.xz --out results
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bank import Bank
from mnemic.bench.results import Record, records
from mnemic.memories.recall import RecallConfig
from real_model import Clock, ids_of, opened, timed

READ = 4096
"""Tokens whose keys are repeated."""
BASE = "base"
SIDES: dict[str, dict[str, Any]] = {
    "sinks + window": {"budget": 0},
    "recall": {},
    "recall, candidates": {"search": "candidates"},
    "recall, refresh 16": {"refresh": 16},
    "few blocks": {},
    "few blocks, candidates": {"search": "candidates"},
    "ten blocks, candidates": {"search": "candidates"},
    "ten blocks, fewer candidates": {"search": "candidates", "wider": 2},
}
"""Beside the base, with what is changed of recall's settings."""
FEW: list[int] = [5, 6, 7, 8, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 28]
"""Of SmolLM2, the blocks that attend to what is asked for."""
TEN: list[int] = [6, 7, 8, 14, 15, 17, 18, 20, 21, 23]
"""Those of them that do so most."""


def main(
    data: Annotated[Path | None, typer.Option(help="Text: a folder or a tar archive of .txt files.")] = None,
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens that are remembered, by commas.")] = "4096,16384,65536",
    turns: Annotated[int, typer.Option(min=16, help="Decoded tokens of each side, one at least that chooses.")] = 24,
    segments: Annotated[int, typer.Option(min=0, help="Segments that each side reads.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs"),
) -> None:
    """Times all sides and writes a record."""
    if data is None:
        raise typer.BadParameter("give --data, a text")
    host, tokenizer, name = opened(model)
    ids = ids_of(data, tokenizer)
    config = RecallConfig()
    counts = [int(length) for length in lengths.split(",")]
    measures = measured(host, config, {"few": FEW, "ten": TEN}, ids, counts, turns, segments, READ)
    record = Record("recall-speed", "recall", f"{name}, untrained", 0, {"memory": config.to_dict()})
    record.config |= {
        "few": FEW,
        "ten": TEN,
        "turns": turns,
        "segments": segments,
        "repeated": READ,
        "threads": torch.get_num_threads(),
    }
    record.measures = measures
    record.command = f"python benchmarks/recall_speed.py --data {data.name} --lengths {lengths} --turns {turns}"
    print(record.save(out, "recall-speed.json"))


@torch.no_grad()
def measured(
    host: Any,
    config: RecallConfig,
    some: dict[str, list[int]],
    ids: torch.Tensor,
    lengths: list[int],
    turns: int,
    segments: int,
    read: int,
) -> dict[str, Any]:
    """Of every number of remembered tokens what each side costs, and as a multiple of the base; `some` are the blocks
    of sides that are called after them.
    """
    found: dict[str, Any] = {}
    configs = {"all": config} | {name: config.replace(read_layers=blocks) for name, blocks in some.items()}
    hosts = {"all": host} | {name: copy.deepcopy(host) for name in some}
    attached = {name: mnemic.attach(hosts[name], each) for name, each in configs.items()}
    firsts = {name: mnemic.Session(each) for name, each in hosts.items()}
    for first in firsts.values():
        first.read(ids[:, : read + (config.window or 0)])

    def under(side: str) -> contextlib.AbstractContextManager[Any]:
        name = blocks(side)
        memory: Any = attached[name].memory
        memory.config = configs[name].replace(**SIDES.get(side, {}))
        return attached[name].disabled() if side == BASE else contextlib.nullcontext()

    for length in lengths:
        filled = {name: _filled(first, length, read) for name, first in firsts.items()}
        sessions = {side: filled[blocks(side)].fork() for side in (BASE, *SIDES)}
        tokens = ids[:, -turns - 1 :].split(1, 1)
        spent: dict[str, list[Clock]] = {side: [] for side in sessions}
        for number, token in enumerate(tokens):
            for side, session in sessions.items():
                with under(side):
                    clock, _ = timed(lambda session=session, token=token: session.forward(token))
                if number:  # the first one makes what a bank derives from its keys
                    spent[side].append(clock)
        measures = summed(spent)
        measures["bytes"] = {name: _bank_of(session).nbytes for name, session in filled.items()}
        # a base that has read could not go on with the memory
        readers = {side: filled[blocks(side)].fork() for side in (BASE, "recall", "few blocks")}
        spent = {side: [] for side in readers}
        for number in range(segments):
            part = ids[:, number * config.segment_length :][:, : config.segment_length]
            for side, session in readers.items():
                with under(side):
                    spent[side].append(timed(lambda session=session, part=part: session.read(part))[0])
        found[f"{length}"] = measures | ({"reading": summed(spent)} if segments else {})
        ratios = ", ".join(f"{side} {ratio:.2f}" for side, ratio in measures["clock / base"].items())
        print(f"{length:,} remembered, a decoded token / base: {ratios}", flush=True)
    return found


def blocks(side: str) -> str:
    """In which blocks a side recalls."""
    name, _, rest = side.partition(" blocks")
    return name if rest or side.endswith(" blocks") else "all"


def _bank_of(session: mnemic.Session) -> Bank:
    assert session.stream is not None
    return session.stream.banks[0] or Bank()


def _filled(first: mnemic.Session, length: int, read: int) -> mnemic.Session:
    """A session that remembers so many tokens: the first `read` that left the window of another, again and again."""
    kept, bank = _bank_of(first).tensors(), Bank()
    keys, values = (kept[name][0][:, :, :read] for name in ("keys", "values"))
    while bank.length < length:
        bank = bank.append(keys[:, :, : length - bank.length], values[:, :, : length - bank.length])
    filled = first.fork()
    assert first.stream is not None
    filled._layer.stream = first.stream.with_banks([bank])
    return filled


def summed(spent: dict[str, list[Clock]]) -> dict[str, Any]:
    """Medians, and these as multiples of the base's."""
    found: dict[str, Any] = {}
    for place, name in enumerate(("clock", "processor")):
        seconds = {side: _of_a_token(side, [clock[place] for clock in clocks]) for side, clocks in spent.items()}
        found[f"seconds, {name}"] = seconds
        found[f"{name} / base"] = {side: value / seconds[BASE] for side, value in seconds.items() if side != BASE}
    return found


def _of_a_token(side: str, seconds: list[float]) -> float:
    """The median, where tokens share a choice of those that make it and of the others apart; the first that was timed
    is the second of its segment.
    """
    every = SIDES.get(side, {}).get("refresh", 1)
    choose, share = seconds[every - 1 :: every], [each for i, each in enumerate(seconds, 1) if i % every]
    return (statistics.median(choose) + (every - 1) * statistics.median(share or [0.0])) / every


def table(found: Sequence[Record]) -> str:
    """A decoded token and reading as multiples of the base's, by what is remembered."""
    if not found:
        return missing("the speed of recall")
    measures, config = found[0].measures, found[0].config
    rows, names = [], next(iter(measures.values()))["processor / base"]
    for remembered, measured in measures.items():
        ratios = [measured["processor / base"], measured["clock / base"]]
        cells = [f"{ratios[0][name]:.2f} ({ratios[1][name]:.2f})" for name in names]
        reading = [f"{ratio:.2f}" for ratio in measured["reading"]["processor / base"].values()]
        rows.append([f"{int(remembered):,}", *cells, *reading])
    reads = next(iter(measures.values()))["reading"]["processor / base"]
    header = ["tokens remembered", *(f"a token, {name}" for name in names), *(f"reading, {name}" for name in reads)]
    note = f"Multiples of the base's time with the same window of {config['memory']['window']:,} and the memory off, "
    note += f"{found[0].host}, {config['threads']} thread; processor time, in brackets by the clock; medians of "
    note += f"{config['turns']} turns. Keys are those of {config['repeated']:,} tokens, again and again. Made by "
    return f"{markdown(header, rows)}\n\n{note}`{found[0].command}`."


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"recall-speed": table(records(results, "recall-speed"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
