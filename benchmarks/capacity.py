"""Every update rule on the capacity probe: how many pairs it holds, whether it overwrites, and what age does to a pair.

All rules with keys of one width see the same keys, values and order. Nothing is trained and there is no model.

    python benchmarks/capacity.py --out results
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.cli.show import console
from mnemic.memories.rules import RULES, Rule
from mnemic.tasks.capacity import Capacity, Writes
from scripts import Out, Seeds, launch, numbers, saved, shown, today

PAIRS = (4, 8, 16, 32, 64, 128)
MODES = ("distinct", "rewrites")
ROWS = (16, 128)
"""Least and most rows of a batch. Each row has a codebook of its own, and most of the time goes into drawing them."""


@dataclass(frozen=True)
class Setup:
    """A rule as it is probed: with which keys. Values are always of length 1."""

    label: str
    rule: str
    key_width: int = 32
    key_norm: float = 1.0
    value_width: int = 32

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the state's tensors, without the batch."""
        return RULES[self.rule].state_shape(self.key_width, self.value_width)

    @property
    def floats(self) -> int:
        """Numbers in the state."""
        return sum(math.prod(shape) for shape in self.shapes.values())


UNIT_VARIANCE = math.sqrt(32)
"""Length of a key whose 32 dimensions have variance 1, as projections give at initialisation."""

SETUPS = (
    Setup("sum", "sum"),
    Setup("decay, 0.95 kept at a write", "decay"),
    Setup("delta", "delta"),
    Setup("Infini-attention, keys of length 1", "infini"),
    Setup("Infini-attention, length 5.7", "infini", key_norm=UNIT_VARIANCE),
    Setup("Infini-attention, length 17", "infini", key_norm=3 * UNIT_VARIANCE),
    Setup("Infini-attention with delta, length 17", "infini-delta", key_norm=3 * UNIT_VARIANCE),
    Setup("ARMT", "armt"),
    Setup("ARMT without its correction", "armt-uncorrected"),
    Setup("delta, keys as wide as ARMT's features", "delta", key_width=192),
)
"""What is compared. The last has a state as large as ARMT's."""


def answers(rule: Rule, writes: Writes, key_norm: float = 1.0) -> Tensor:
    """What a rule answers to every key `[b, p]` after all writes, as places in the codebook."""
    keys, values = writes.pairs()
    state = rule.init_state(len(keys), keys.shape[-1], values.shape[-1])
    state = rule.write_all(state, key_norm * keys, values)
    # all keys at once: a dimension of 1 for the state, which reading leaves alone
    state = {name: tensor[:, None] for name, tensor in state.items()}
    return writes.decode(rule.read(state, key_norm * writes.keys))


def age_bin(age: Tensor) -> Tensor:
    """Ages in bins that double: 0, 1-2, 3-6, 7-14, ..."""
    return (age + 1).double().log2().floor().long()


def probe(setup: Setup, writes: Writes) -> dict[str, Any]:
    """One rule on one batch: share right, share answered with an earlier value, and by bin of age how many are right,
    how many are asked, and the sum of their ages.
    """
    said = answers(RULES[setup.rule], writes, setup.key_norm)
    right, age = writes.right(said), writes.age[writes.asked]
    ages = {}
    for each in age_bin(age).unique().tolist():
        inside = age_bin(age) == each
        ages[each] = [int(right[inside].sum()), int(inside.sum()), int(age[inside].sum())]
    return {
        "right": right.double().mean().item(),
        "earlier value": writes.earlier(said).double().mean().item(),
        "asked": len(right),
        "ages": ages,
    }


@torch.no_grad()
def capacity(
    progress: Callable[[str], None],
    pairs: Sequence[int] = PAIRS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    reads: int = 2048,
    setups: Sequence[Setup] = SETUPS,
) -> Record:
    """Every setup at every number of pairs, with each key written once and with rewrites; at most about `reads`
    keys are asked for each of them and each seed.
    """
    begun, worked = time.perf_counter(), time.process_time()
    results: list[dict[str, Any]] = [
        {**asdict(setup), "shapes": setup.shapes, "floats": setup.floats} | {mode: {} for mode in MODES}
        for setup in setups
    ]
    floors: dict[str, dict[int, dict[str, float]]] = {mode: {} for mode in MODES}
    for count in pairs:
        rows = min(max(reads // max(count, 1), ROWS[0]), ROWS[1])
        for mode in MODES:
            for seed in seeds:
                drawn = {
                    width: Capacity(count, mode == "rewrites", key_width=width).examples(rows, "test", seed)
                    for width in {setup.key_width for setup in setups}
                }
                for setup, result in zip(setups, results, strict=True):
                    _add(result[mode].setdefault(count, {}), probe(setup, drawn[setup.key_width]))
            of_seed = [Capacity(count, mode == "rewrites").floors(rows, seed) for seed in seeds]
            floors[mode][count] = {name: statistics.mean(each[name] for each in of_seed) for name in of_seed[0]}
        progress(f"{count} pairs: {time.perf_counter() - begun:.0f} s")
    record = Record(
        task="capacity",
        mechanism="update rules",
        host="none: the rules alone, random keys",
        seed=seeds[0],
        config={"pairs": list(pairs), "seeds": list(seeds), "reads": reads, **_common()},
        measures={"rules": results, "floors": floors},
    )
    record.seconds = {"probe": time.perf_counter() - begun, "processor": time.process_time() - worked}
    return record


def _common() -> dict[str, Any]:
    """The generator's settings that are the same everywhere."""
    return {key: value for key, value in Capacity().settings().items() if key in ("value_width", "codebook")}


def _add(cell: dict[str, Any], found: dict[str, Any]) -> None:
    """Takes a seed's result into a cell: lists by seed, counts by age summed."""
    for name in ("right", "earlier value", "asked"):
        cell.setdefault(name, []).append(found[name])
    ages = cell.setdefault("ages", {})
    for each, counts in found["ages"].items():
        ages[each] = [before + count for before, count in zip(ages.get(each, [0, 0, 0]), counts, strict=True)]


# --- table and picture ----------------------------------------------------------------------------------------------

AGE_PAIRS = 32
"""Number of pairs for which accuracy by age is drawn."""

STYLES: dict[str, dict[str, Any]] = {
    "sum": {"color": "#444444", "marker": "o"},
    "decay": {"color": "#c9a227", "marker": "v"},
    "delta": {"color": "#1f5fa8", "marker": "s"},
    "infini": {"color": "#d1701c", "marker": "^"},
    "infini-delta": {"color": "#a8324a", "marker": "D"},
    "armt": {"color": "#2a8f6d", "marker": "P"},
    "armt-uncorrected": {"color": "#8d5a9e", "marker": "X"},
}
DASHES = ("-", "--", ":")
"""For rules that are probed with several kinds of keys, in their order."""


def cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a rule a row: right answers in per cent with keys written once / with rewrites."""
    pairs = [str(count) for count in record.config["pairs"]]
    rows = []
    for rule in record.measures["rules"]:
        shape = " x ".join(str(size) for size in rule["shapes"]["weights"])
        found = [" / ".join(f"{100 * _mean(_at(rule[mode], count)):.1f}" for mode in MODES) for count in pairs]
        rows.append([rule["label"], shape, *found])
    return ["rule", "state", *(f"{count} pairs" for count in pairs)], rows


def table(records: Sequence[Record]) -> str:
    """The table for the documentation, with floors and how it was made."""
    if not records:
        return missing("capacity")
    record = records[0]
    header, rows = cells(record)
    pairs = [str(count) for count in record.config["pairs"]]
    floors = {mode: record.measures["floors"][mode] for mode in MODES}
    for name in _at(floors["distinct"], pairs[0]):
        found = [" / ".join(f"{100 * _at(floors[mode], count)[name]:.1f}" for mode in MODES) for count in pairs]
        rows.append([f"*{name}*", "", *found])
    each = [_at(rule[mode], count)["right"] for rule in record.measures["rules"] for mode in MODES for count in pairs]
    widest = max(max(values) - min(values) for values in each)
    return markdown(header, rows) + (
        "\n\nRight answers in per cent, keys written once / four times on average; floors in italics. Mean over "
        f"{len(record.config['seeds'])} seeds of up to {record.config['reads']:,} questions each; seeds lie at most "
        f"{100 * widest:.1f} points apart. Made by `{record.command}` in {record.seconds['processor']:.0f} seconds of "
        f"processor time ({record.machine['processor']})."
    )


def table_of_earlier(records: Sequence[Record]) -> str:
    """Answers that are a value which the key had before its last: what was not overwritten."""
    if not records:
        return missing("capacity")
    record = records[0]
    pairs = [str(count) for count in record.config["pairs"]]
    rows = [
        [rule["label"], *(f"{100 * statistics.mean(_at(rule['rewrites'], n)['earlier value']):.1f}" for n in pairs)]
        for rule in record.measures["rules"]
    ]
    return markdown(["an earlier value of the key, %", *(f"{count} pairs" for count in pairs)], rows)


def picture(records: Sequence[Record], path: str | Path) -> Path:
    """Accuracy over the number of pairs and by age, with keys written once and with rewrites; a PNG at `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    record = records[0]
    pairs = record.config["pairs"]
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.6), layout="constrained", sharey=True)
    kinds: dict[str, int] = {}
    for rule in record.measures["rules"]:
        kind = kinds[rule["rule"]] = kinds.get(rule["rule"], -1) + 1
        style = {**STYLES[rule["rule"]], "linestyle": DASHES[kind % len(DASHES)], "linewidth": 1.5, "markersize": 4.5}
        for column, mode in enumerate(MODES):
            means = [100 * _mean(_at(rule[mode], count)) for count in pairs]
            axes[0, column].plot(pairs, means, label=rule["label"], **style)
            if AGE_PAIRS in pairs:
                ages = {int(each): counts for each, counts in _at(rule[mode], AGE_PAIRS)["ages"].items()}
                # a bin that few reads fall into says nothing
                known = [counts for _, counts in sorted(ages.items()) if counts[1] >= 100]
                places = [1 + total / asked for _, asked, total in known]
                axes[1, column].plot(places, [100 * right / asked for right, asked, _ in known], **style)
    for column, title in enumerate(("every key written once", "four writes a key, the last counts")):
        axes[0, column].set_title(title, fontsize=10.5)
        axes[0, column].set_xscale("log", base=2)
        axes[0, column].set_xticks(pairs, [str(count) for count in pairs])
        axes[0, column].set_xlabel("pairs")
        axes[1, column].set_xscale("log", base=2)
        ticks = [2**power for power in range(8 if column else 6)]
        axes[1, column].set_xticks(ticks, [str(tick) for tick in ticks])
        axes[1, column].set_xlabel(f"the key's last write, counted from the end; {AGE_PAIRS} pairs")
    for panel in axes.flat:
        panel.minorticks_off()
        panel.set_ylim(-3, 104)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("right answers, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def _at(by_count: dict[Any, Any], count: int | str) -> dict[str, Any]:
    """A cell by its number of pairs, which is text in a record that was read from a file."""
    return by_count[str(count)] if str(count) in by_count else by_count[int(count)]


def _mean(cell: dict[str, Any]) -> float:
    return statistics.mean(cell["right"])


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name."""
    found = today(records(results, "capacity"), "bench capacity", "capacity.py")
    return {"capacity": table(found), "capacity-earlier": table_of_earlier(found)}


def pictures(results: Path, images: Path) -> None:
    """Draws the page's picture, where there is a record of it."""
    if found := records(results, "capacity"):
        picture(found, images / "capacity.png")


# --- the command ----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
    pairs: Annotated[str, typer.Option(help="Numbers of pairs, separated by commas.")] = "4,8,16,32,64,128",
    seeds: Seeds = "0,1,2,3,4",
    reads: Annotated[int, typer.Option(min=1, help="Keys asked for each cell and seed, at most about.")] = 2048,
    out: Out = Path("results"),
) -> None:
    """Random keys into a matrix and out again: right answers of every update rule, by the number of pairs."""
    try:
        record = capacity(console.print, numbers(pairs), numbers(seeds), reads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    shown("right answers, %: keys written once / four times", *cells(record))
    saved(record, out, "capacity.json")


if __name__ == "__main__":
    launch(app)
