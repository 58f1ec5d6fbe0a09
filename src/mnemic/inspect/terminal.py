"""What a session holds, in the terminal: the same as on its page, as rich tables and bars."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import torch
from rich.columns import Columns
from rich.console import Group as Together
from rich.console import RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mnemic.inspect import inside
from mnemic.inspect.inside import Contents, Group, Words

BLUE, AMBER, QUIET = "#5a9bd8", "#e0a030", "bright_black"
LEVELS = {"long": ("long-term", BLUE), "short": ("short-term", AMBER), "working": ("working", "white")}
EIGHTHS = " ▏▎▍▌▋▊▉█"


def view(
    found: Contents,
    words: Words | None = None,
    top: int = 10,
    *,
    histograms: bool = False,
    trained: bool | None = None,
) -> RenderableType:
    """All that `mnemic inspect` shows of a session; of engrams, slots and other places the first `top`.

    `trained` is whether the memory is, None where that is not known.
    """
    parts: list[RenderableType] = [Text(summary(found, trained), style="bold"), _head(found)]
    if found.state and found.kind == "memoria":
        parts += _memoria(found, top, histograms)
    elif found.state:
        parts += [_places(group, histograms) for group in inside.groups(found)]
    parts += [table for table in (_matrices(found), _queues(found), _written(found, words, top)) if table is not None]
    if found.state:
        parts.append(_tensors(found))
    parts.append(_settings(found))
    return Together(*parts)


def summary(found: Contents, trained: bool | None = None) -> str:
    """How much was read and written, and whether the memory is trained, in one line."""
    length, seen, written = found.meta["memory"]["segment_length"], found.ledger("seen"), found.ledger("written")
    said = f"{seen:,} token{'s' * (seen != 1)} read, "
    said += f"{written:,} segment{'s' * (written != 1)} of {length:,} tokens written"
    if not seen:
        said = "nothing was read yet"
    told = {None: "", True: "; the memory is trained", False: "; the memory is not trained"}
    return said + told[trained]


def _head(found: Contents) -> RenderableType:
    meta, length, rest = found.meta, found.meta["memory"]["segment_length"], found.rest
    waiting = found.ledger("counts")
    held = int(rest["window.valid"].sum()) if "window.valid" in rest else 0
    table = _pairs()
    table.add_row("memory", f"{escape(found.title)} [{QUIET}]{escape(meta['memory_fingerprint'])}")
    table.add_row("base", f"{escape(meta['base_model'] or 'unnamed')} [{QUIET}]{escape(meta['base_fingerprint'])}")
    if writes := found.log.records():
        table.add_row("written", f"from {inside.clock(writes[0]['time'])} to {inside.clock(writes[-1]['time'])}")
    table.add_row("waiting", Text.assemble(bar(waiting, length, 20), f" {waiting:,} of {length:,} tokens"))
    if window := meta.get("window"):
        sinks = f", the first {meta['sinks']} for good" if meta.get("sinks") else ""
        table.add_row("window", Text.assemble(bar(held, window, 20), f" {held:,} of {window:,} tokens' keys{sinks}"))
    if "bank.positions" in rest:
        table.add_row("kept", f"{rest['bank.positions'].numel():,} tokens' keys and values, from before the window")
    sizes = ", ".join(f"{name} {size:,}" for name, size in found.bytes.items())
    table.add_row("bytes", sizes + (f"; file {found.size:,}" if found.size is not None else ""))
    saved = None if found.saved is None else time.strftime("saved %Y-%m-%d %H:%M:%S", time.localtime(found.saved))
    return Panel(table, title=f"[bold]{escape(found.name)}[/bold]", subtitle=saved, title_align="left")


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=QUIET)
    table.add_column()
    return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style=QUIET)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _tensors(found: Contents) -> RenderableType:
    table = _table("state", ("tensor", "shape", "dtype"), ("bytes", "finite"))
    for each in inside.tensors(found):
        shape, finite = " x ".join(map(str, each["shape"])), "yes" if each["finite"] else "[red]no"
        table.add_row(escape(each["name"]), shape, each["dtype"], f"{each['bytes']:,}", finite)
    return table


def _settings(found: Contents) -> RenderableType:
    words = [Text("settings", style=QUIET)]
    for name, value, changed in inside.settings(found):
        words.append(Text.assemble((f"{name} ", QUIET), (f"{value}", "bold" if changed else "")))
    return Columns(words, padding=(0, 2))


def bar(value: float, most: float, width: int, colour: str = BLUE) -> Text:
    """A bar of `value` beside `most`, `width` characters at most, to an eighth of one."""
    eighths = round(8 * width * min(1.0, value / most)) if most > 0 and value > 0 else 0
    if value > 0:
        eighths = max(1, eighths)
    filled = "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    return Text(filled, style=colour) + Text("·" * (width - len(filled)), style=QUIET)


def histogram(values: Any, title: str, *, bins: int = 8, whole: bool = False, colour: str = BLUE) -> RenderableType:
    """How many values lie between which borders, as bars."""
    values = np.asarray(values, dtype=np.float64)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    if whole:
        wide = max(1, int(np.ceil((high - low + 1) / bins)))
        edges = np.arange(low, high + wide + 1, wide)
        labels = [f"{edge:,.0f}" + (f" to {edge + wide - 1:,.0f}" if wide > 1 else "") for edge in edges[:-1]]
    elif high - low < 0.005 * max(1.0, abs(high)):
        edges, labels = np.array([low, high]), [f"{low:.3f} to {high:.3f}"]
    else:
        edges = np.linspace(low, high, bins + 1)
        digits = 0 if high - low > 10 * bins else 2
        labels = [f"{start:,.{digits}f} to {stop:,.{digits}f}" for start, stop in itertools.pairwise(edges)]
    counts = np.histogram(values, edges)[0] if high > low else np.array([len(values)])
    for count, label in zip(counts, labels, strict=False):
        cells = Text(label, style=QUIET, justify="right"), bar(count, max(counts), 20, colour)
        table.add_row(*cells, f"{count:,}")
    return table


def _range(values: Any, form: str) -> str:
    values = [value for value in values if value is not None]
    if not len(values):
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


# --- what was written ------------------------------------------------------------------------------------------------


def _written(found: Contents, words: Words | None, top: int) -> RenderableType | None:
    """The places that hold most of something known, and the writes that they hold most of."""
    told = inside.written(found, words)
    if found.kind == "memoria" and found.state:
        alive = {place for group in inside.groups(found) for place in group.ids}
        told = {place: entries for place, entries in told.items() if place in alive}
    if not told:
        writes = found.log.records()
        return Text(f"{found.title} does not tell which tokens went where", style=QUIET) if writes else None
    names = {
        place: f"{group.unit[0]} {label}"
        for group in inside.groups(found)
        for place, label in zip(group.ids, group.labels, strict=True)
    }
    several = len(inside.groups(found)) > 1
    if several:
        names = {}
    chosen = sorted(told, key=lambda place: (-told[place][0]["left"], -told[place][0]["number"], place))[:top]
    table = _table("what was written, by how much of it is left", ("into",), ("age", "left", "segment"))
    table.add_column(
        "tokens that weighed most" if words is not None else "positions of the tokens that weighed most", ratio=1
    )
    for place in chosen:
        for i, entry in enumerate(told[place][:2]):
            age = inside.mean_age(found, told[place])
            cells = ("", "") if i else (names.get(place, f"place {place}"), f"{age:,.1f}")
            table.add_row(*cells, f"{100 * entry['left']:.0f} %", f"{entry['number']:,}", _passage(entry))
    return table


def _passage(entry: dict[str, Any]) -> Text:
    if not entry.get("passage"):
        return Text(", ".join(f"{token:,}" for token in entry["tokens"]))
    text = Text()
    for run, weight in entry["passage"]:
        # control characters could move the cursor: a memory is somebody's text
        run = "".join(letter if letter.isprintable() else " " for letter in run)
        text.append(run, style=f"bold {BLUE}" if weight else QUIET)
    return text


# --- slots, matrices, queues -----------------------------------------------------------------------------------------


def _places(group: Group, histograms: bool) -> RenderableType:
    """Norms of slots or rows, and how alike they are: those that say the same hold one thing."""
    norms, cosine = group.vectors.norm(dim=-1), group.cosine
    upper = torch.triu_indices(len(cosine), len(cosine), 1)
    pairs = cosine[upper[0], upper[1]]
    table = _pairs()
    table.add_row(group.unit[1], f"{len(norms)} of width {group.vectors.shape[1]}")
    table.add_row("norm", f"{norms.min():.3f} to {norms.max():.3f}, mean {norms.mean():.3f}")
    if len(pairs):
        i, j = (group.labels[group.compared[int(side[int(pairs.argmax())])]] for side in upper)
        table.add_row(
            "similarity", f"mean {pairs.mean():.3f}; most alike {group.unit[1]} {i} and {j}: {pairs.max():.3f}"
        )
    if group.directions is not None:
        table.add_row("directions in use", f"{group.directions:.1f} of {min(group.vectors.shape)}")
    for name, values in group.columns.items():
        table.add_row(name, f"{_range(values, '{:.2f}')}, mean {np.mean(values):.2f}")
    shapes = [histogram(norms.numpy(), f"norms of {group.unit[1]}")] if histograms else []
    if histograms and len(pairs):
        shapes.append(histogram(pairs.numpy(), "similarity of pairs (cosine)", colour=AMBER))
    parts = [table, Columns(shapes, padding=(1, 4))] if shapes else [table]
    return Panel(Together(*parts), title=group.name, title_align="left")


def _matrices(found: Contents) -> RenderableType | None:
    if not (matrices := inside.matrices(found)):
        return None
    table = _table("matrices", ("",), ("shape", "norm", "effective rank", "largest singular value"))
    for each in matrices:
        shape = " x ".join(map(str, each["shape"]))
        rank = (f"{each['rank']:.1f}", f"{max(each['values']):.3f}") if each["values"] else ("-", "-")
        table.add_row(escape(each["name"]), shape, f"{each['norm']:.3f}", *rank)
    return table


def _queues(found: Contents) -> RenderableType | None:
    if not (queues := inside.queues(found)):
        return None
    table = _table("queues", ("", ""), ("held", "at most", "tokens of the stream"))
    for each in queues:
        tokens = "older ones" if each["first"] is None else f"{each['first']:,} to {each['last']:,}"
        table.add_row(
            each["name"], bar(each["held"], each["size"], 20), f"{each['held']:,}", f"{each['size']:,}", tokens
        )
    return table


# --- Memoria ---------------------------------------------------------------------------------------------------------


def _memoria(found: Contents, top: int, histograms: bool) -> list[RenderableType]:
    """Levels, the engrams that fired most with their strongest ties, and ages and lifespans where they are wanted."""
    from mnemic.inspect.engrams import Moment

    state, moment = found.state, Moment.of(found.state)
    if not len(moment.ids):
        return [Text("no engrams yet: the first segment is not written", style=QUIET)]
    reminded = {"long": moment.long, "short": moment.short, "working": np.array([], dtype=int)}
    each = sum(state[name].numel() * state[name].element_size() for name in ("engram", "lifespan", "id", "fired"))
    each //= max(1, state["id"].numel())
    levels = Table(title="levels", title_justify="left", title_style="bold", box=None, header_style=QUIET)
    for name in ("", "engrams", "", "reminded", "bytes", "age", "lifespan"):
        levels.add_column(name, justify="left" if not name else "right")
    for level, (label, colour) in LEVELS.items():
        ids = moment.alive(level)  # pyright: ignore[reportArgumentType]
        spans = moment.lifespans[np.isin(moment.ids, ids)]
        levels.add_row(
            Text(label, style=colour),
            f"{len(ids):,}",
            bar(len(ids), max(moment.levels), 20, colour),
            f"{len(reminded[level]):,}",
            f"{each * len(ids):,}",
            _range(moment.ages(ids), "{:,.0f}"),
            _range(spans, "{:,.1f}"),
        )
    (group,) = inside.groups(found)
    alike = f"engrams are alike by {group.cosine.mean():.3f} on the mean"
    if group.directions is not None:
        alike += f", {group.directions:.1f} directions in use"
    title = f"engrams at step {moment.step:,}"
    parts: list[RenderableType] = [
        Panel(Together(levels, Text(alike, style=QUIET)), title=title, title_align="left"),
        _strongest(found, moment, group, top),
    ]
    if histograms:
        ages = histogram(moment.ages(moment.ids), "ages, segments", whole=True)
        spans = histogram(moment.lifespans, "lifespans left, segments", colour=AMBER)
        parts.append(Columns([ages, spans], padding=(1, 4)))
    return parts


def _strongest(found: Contents, moment: Any, group: Group, top: int) -> Table:
    from mnemic.inspect.engrams import edge_table

    weight, count = edge_table(found.state)
    fires, born, columns = count.diagonal(), moment.born(moment.ids), group.columns
    title = f"the {top} engrams that fired most; ties: share of its firings"
    table = _table(title, (), ("id",))
    table.add_column("level")
    for name in ("age", "lifespan", "fires", "reminded now", "attention since"):
        table.add_column(name, justify="right")
    table.add_column("strongest ties to other segments")
    for slot in np.lexsort((moment.ids, -moment.lifespans, -fires))[:top].tolist():
        label, colour = LEVELS[columns["level"][slot]]
        others = np.where(born != born[slot], weight[slot], 0)
        ties = [other for other in np.lexsort((-count[slot], -others))[:3].tolist() if others[other] > 0]
        use = columns["attention"][slot]
        table.add_row(
            str(moment.ids[slot]),
            Text(label, style=colour),
            f"{columns['age'][slot]:,}",
            f"{moment.lifespans[slot]:,.1f}",
            f"{fires[slot]:,}",
            "" if use is None else "●",
            "" if use is None else f"{use:.2f}",
            ", ".join(f"{moment.ids[other]} ({others[other]:.2f})" for other in ties),
        )
    return table
