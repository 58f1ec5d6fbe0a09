"""What Memoria's engrams do while a model reads a text, and the same text twice, under several rules of reminding.

python benchmarks/memoria_engrams.py --model smollm2 --text FILE.txt --out results
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from memoria_engrams_history import (
    PAPER,
    PUBLISHED,
    History,
    SeenTwice,
    autocorrelation,
    compare_readings,
    observe,
    summary,
)
from memoria_engrams_pictures import draw_ages, draw_autocorrelation, draw_seen_twice, reading_colours
from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import attach, from_pretrained
from mnemic.bench.results import Record, records
from mnemic.bench.settings import read_text
from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import Show, Table, console, need
from mnemic.inspect.engram_pictures import draw_graph
from mnemic.inspect.engrams import engram_graph
from mnemic.memories.memoria import MemoriaConfig
from mnemic.state import State
from scripts import Out, launch, numbers, saved, today

LONGEST_LAG = 30


@dataclass
class Analysis:
    """What was seen under each rule: `histories` of the whole text, `twice` of its beginning read again."""

    histories: dict[str, History]
    twice: dict[str, SeenTwice]
    since: int


def analyse(
    model: nn.Module,
    config: MemoriaConfig,
    weights: State | None,
    ids: Tensor,
    rules: Sequence[str],
    *,
    twice: int,
    keep: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Analysis:
    """Reads `ids [t]`, whole segments, under each rule with the same memory: `weights`, or untrained ones from `seed`.

    Then a new stream reads the first `twice` segments, as many more, and the first ones again. Ages and autocorrelation
    are those of the later half. The model has no memory when it comes and when it goes.
    """
    length = config.segment_length
    if 2 * twice * length > len(ids):
        raise ValueError(
            f"{twice} segments, as many between and the first again need {2 * twice} segments of {length} tokens, "
            f"the text has {len(ids) // length}; read {twice} segments fewer twice or more text"
        )
    histories, again = {}, {}
    repeated = torch.cat([ids[: 2 * twice * length], ids[: twice * length]])
    for rule in rules:
        torch.manual_seed(seed)
        attachment = attach(model, config.with_rule(rule))
        try:
            if weights is not None:
                attachment.memory.load_state_dict(weights)
            histories[rule] = observe(model, ids, keep=keep, progress=progress)
            read = observe(model, repeated, keep=[3 * twice], progress=progress)
            again[rule] = compare_readings(read, twice, twice)
        finally:
            attachment.detach()
    return Analysis(histories, again, since=len(ids) // length // 2)


def record_of(analysis: Analysis, config: MemoriaConfig, host: str, seed: int, **notes: Any) -> Record:
    """The result file: the comparison of rules, the curves, and for every step who was reminded."""
    measures: dict[str, Any] = {
        **notes,
        "rules": {rule: summary(history, analysis.since) for rule, history in analysis.histories.items()},
        "from step": analysis.since,
        "LTM again, paper": PAPER,
        "LTM again, published code on synthetic input": PUBLISHED,
        "autocorrelation": {rule: _curves(history, analysis.since) for rule, history in analysis.histories.items()},
        "seen twice": {rule: twice_line(twice) for rule, twice in analysis.twice.items()},
        "steps": {rule: [_step(moment) for moment in h.rows[0]] for rule, h in analysis.histories.items()},
    }
    return Record("memoria-engrams", config.kind, host, seed, config.to_dict(), measures=_without_nan(measures))


def _curves(history: History, since: int) -> dict[str, dict[int, float]]:
    lags = range(1, LONGEST_LAG + 1)
    return {
        "LTM": autocorrelation(history, "long", lags, since=since),
        "LTM by chance": autocorrelation(history, "long", lags, since=since, chance=True),
        "STM": autocorrelation(history, "short", lags, since=since),
        "STM by chance": autocorrelation(history, "short", lags, since=since, chance=True),
    }


def twice_line(twice: SeenTwice) -> dict[str, Any]:
    """A text read twice in a few numbers."""
    reminded, alive = twice.counts_by_offset[0]
    return {
        "segments": twice.segments,
        "between": twice.between,
        "of LTM reminded, made in the first reading": float(np.nanmean(twice.first)),
        "the same by chance": float(np.nanmean(twice.first_by_chance)),
        "alive of the segment read again": alive,
        "of those, reminded": reminded / alive if alive else math.nan,
        "of the first reading's other segments, reminded": twice.other_offsets,
        "of all LTM alive, reminded": twice.any_engram,
        "by offset": {offset: list(counts) for offset, counts in twice.counts_by_offset.items() if counts[1]},
    }


def _step(moment: Any) -> dict[str, Any]:
    old = moment.ages(moment.long)
    return {
        "step": moment.step,
        "levels": " ".join(map(str, moment.levels)),
        "start points": moment.starts,
        "found": moment.found,
        "mean age of reminded LTM": round(float(old.mean()), 3) if len(old) else None,
        "mean age of LTM": round(float(moment.ages(moment.alive("long")).mean()), 3) if moment.levels[0] else None,
        "longest lifespan": round(float(moment.lifespans.max()), 3),
        "LTM reminded": " ".join(map(str, moment.long)),
        "STM reminded": len(moment.short),
    }


def _without_nan(value: Any) -> Any:
    """The same values with None for nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(analysis: Analysis, folder: Path, about: str) -> list[Path]:
    """All pictures, `memoria-*.png`; `about` says what read what."""
    made = [
        draw_ages(analysis.histories, folder / "memoria-ages.png", f"Age of reminded engrams: {about}"),
        draw_autocorrelation(
            analysis.histories,
            folder / "memoria-autocorrelation.png",
            f"Reminded again: {about}",
            longest=LONGEST_LAG,
            since=analysis.since,
        ),
        draw_seen_twice(analysis.twice, folder / "memoria-seen-twice.png", f"The same text read twice: {about}"),
    ]
    for rule, history in analysis.histories.items():
        graphs = {f"after {step} segments": _ties(state) for (_, step), state in history.kept.items()}
        if graphs:
            path = folder / f"memoria-graph-{rule}.png"
            made.append(draw_graph(graphs, path, f"The engrams and their strongest ties, rule {rule!r}"))
    ends = {f"rule {rule!r}": _ties(*twice.history.kept.values()) for rule, twice in analysis.twice.items()}
    first = next(iter(analysis.twice.values()))
    colours = reading_colours(first.segments, first.between)
    title = "Engrams when a text has been read for the second time"
    made.append(draw_graph(ends, folder / "memoria-graph-seen-twice.png", title, colours=colours))
    return made


def _ties(state: State) -> Any:
    return engram_graph(state, strongest=1, within=False)


# --- the table --------------------------------------------------------------------------------------------------------


def table(found: Sequence[Record]) -> str:
    """What is reminded under each rule, beside the paper's own autocorrelation."""
    m = found[0].measures
    lags = list(m["LTM again, paper"])
    rows = []
    for rule, values in m["rules"].items():
        twice = m["seen twice"][rule]
        rows.append(
            [
                rule,
                f"{values['LTM alive']:.0f}",
                f"{values['start points']:.0f}",
                f"{values['found']:.0f}",
                f"{values['LTM reminded']:.0f}",
                f"{values['mean age of reminded LTM']:.0f}",
                *(f".{1000 * values[f'LTM again at {lag}']:03.0f}" for lag in lags),
                f"{100 * twice['of those, reminded']:.0f}",
                f"{100 * twice['of all LTM alive, reminded']:.0f}",
            ]
        )
    paper = [f".{1000 * m['LTM again, paper'][lag]:03.0f}" for lag in lags]
    rows.append(["*the paper's table 7*", "", "", "", "", "", *paper, "", ""])
    header = ["rule", "alive", "start points", "found", "reminded", "mean age", *(f"again at {lag}" for lag in lags)]
    header += ["read twice, %", "by chance, %"]
    return markdown(header, rows) + (
        f"\n\nLong-term engrams on a real novel ({m['tokens']:,} tokens, {m['segments']} segments, {m['weights']}), "
        "means of the later half. *Again at n*: the share of reminded engrams that were reminded n segments before, "
        "too. *Read twice*: of the long-term engrams made of a segment in a first reading, the share reminded when it "
        "is read again. "
        f"Made by `{found[0].command}`."
    )


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    told = today(records(results, "memoria-engrams"), "analyse memoria", "memoria_engrams.py")
    return {"memoria-rules": table(told) if told else missing("memoria-rules")}


COUNTS = ("LTM alive", "start points", "found", "LTM reminded", "mean age of reminded LTM", "mean age of LTM alive")
TWICE = {
    "of LTM reminded, made in the first reading": "of LTM reminded, made in the first reading",
    "the same by chance": "  by chance",
    "of those, reminded": "of LTM made of the same segment, reminded",
    "of the first reading's other segments, reminded": "of LTM made of others in the first reading",
    "of all LTM alive, reminded": "  by chance: of all LTM",
}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help=CAUSAL, callback=found)],
    text: Annotated[Path, typer.Option(help="A text file, or a tar archive of them.")],
    memory: Annotated[Path | None, typer.Option(help="Folder of a saved memory; an untrained one else.")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="paper, seeds or lift; may be given several times. All by default.")
    ] = None,
    segments: Annotated[int, typer.Option(min=4, help="Segments to read.")] = 200,
    twice: Annotated[int, typer.Option(min=2, help="Segments of the text that is read twice.")] = 30,
    steps: Annotated[str, typer.Option(help="Steps whose graphs are drawn, separated by commas.")] = "20,60,200",
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens a segment, for an untrained memory.")] = 150,
    seed: int = 0,
    out: Out = Path("runs/memoria"),
    folder: Annotated[
        Path | None, typer.Option("--pictures", help="Folder for the pictures; --out by default.")
    ] = None,
) -> None:
    """Memoria's engrams: ages, autocorrelation, the graph, a text seen twice, under three rules of reminding."""
    need("matplotlib", "networkx")
    rules = rule or ["paper", "seeds", "lift"]
    keep = [step for step in numbers(steps) if step <= segments]
    try:
        for name in rules:
            MemoriaConfig().with_rule(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config, weights = MemoriaConfig(segment_length=segment_length), None
    if memory is not None:
        config, weights = _loaded(base, memory)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"])
    wanted = segments * config.segment_length
    if len(ids) < wanted:
        whole = len(ids) // config.segment_length
        raise typer.BadParameter(f"{text.name} has {whole} segments of {config.segment_length} tokens, not {segments}")
    try:
        with Show("") as show:
            show.phase("read", len(rules) * (segments + 3 * twice))
            seen = analyse(
                base, config, weights, ids[:wanted], rules, twice=twice, keep=keep, seed=seed, progress=show.advance
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    host = f"{Path(model).name}, frozen, {text.name}"
    kind = f"trained memory {memory.name}" if memory else "untrained memory"
    record = record_of(seen, config, host, seed, weights=kind, tokens=wanted, segments=segments)
    console.print(_table(record.measures["rules"]))
    console.print(_twice_table(record.measures["seen twice"]))
    for picture in draw(seen, folder or out, f"{Path(model).name}, {text.stem.replace('_', ' ')}, {kind}"):
        console.print(f"picture {picture}")
    saved(record, out, f"memoria-engrams-seed{seed}.json")


def _loaded(base: Any, folder: Path) -> tuple[Any, Any]:
    """The config and the weights of a memory that `save_pretrained` wrote."""
    try:
        attachment = from_pretrained(base, folder)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    config, weights = attachment.config, attachment.memory.state_dict()
    attachment.detach()
    if not isinstance(config, MemoriaConfig):
        raise typer.BadParameter(f"{folder} holds a memory of kind {config.kind!r}, not Memoria")
    return config, weights


def _table(rules: dict[str, dict[str, float | None]]) -> Table:
    table = Table(title="Rules of reminding, means over the later half", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name in (*rules, "table 7", "published*"):
        table.add_column(name, justify="right")
    for name in COUNTS:
        table.add_row(name, *(_cell(line[name], 1) for line in rules.values()))
    for lag in PAPER:
        again = (_cell(line[f"LTM again at {lag}"]) for line in rules.values())
        table.add_row(f"LTM again at {lag}", *again, _cell(PAPER[lag]), _cell(PUBLISHED[lag]), style="bold")
        table.add_row(
            "  by chance", *(_cell(line[f"LTM again at {lag}, by chance"]) for line in rules.values()), style="dim"
        )
    for lag in PAPER:
        table.add_row(f"STM again at {lag}", *(_cell(line[f"STM again at {lag}"]) for line in rules.values()))
    table.caption = "table 7: the paper's LTM; published: memoria-pytorch 1.1.0 on synthetic input"
    return table


def _twice_table(rules: dict[str, dict[str, float | None]]) -> Table:
    table = Table(title="The same text read twice", title_justify="left", title_style="bold")
    table.add_column("share")
    for name in rules:
        table.add_column(name, justify="right")
    for name, says in TWICE.items():
        table.add_row(says, *(_cell(line[name]) for line in rules.values()))
    return table


def _cell(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    launch(app)
