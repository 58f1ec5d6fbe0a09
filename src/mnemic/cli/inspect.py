"""`mnemic inspect`: a saved session in the terminal, read from its file alone, once or whenever the file changes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mnemic.cli.show import console
from mnemic.memories import CONFIGS
from mnemic.state import State, StateError, nbytes, read_file

BLUE, AMBER, QUIET = "#5a9bd8", "#e0a030", "bright_black"
LEVELS = {"long": ("long-term", BLUE), "short": ("short-term", AMBER), "working": ("working", "white")}
EIGHTHS = " ▏▎▍▌▋▊▉█"


def inspect(
    file: Annotated[Path, typer.Argument(help="A session that Session.save wrote.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew when the file changes; Ctrl-C ends.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Memoria: engrams in the table.")] = 10,
    graph: Annotated[Path | None, typer.Option(help="Memoria: draw the engrams and their ties to this PNG.")] = None,
) -> None:
    """What a saved session holds: its memory, what waits, its window, and the memory that it belongs to."""
    try:
        found = view(file, top)
        if graph is not None:
            draw(file, graph)
    except (OSError, ValueError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(found)
    if graph is not None:
        console.print(f"picture {graph}")
    if watch:
        follow(file, top, graph)


def follow(file: Path, top: int, graph: Path | None) -> None:
    """Shows the file anew whenever it changes, until Ctrl-C; one that cannot be read just now, as the error."""
    try:
        for _ in changes(file):
            try:
                found = view(file, top)
                if graph is not None:
                    draw(file, graph)
            except (OSError, ValueError) as error:
                found = Text(f"{time.strftime('%H:%M:%S')} {error}", style="red")
            console.clear()
            console.print(found)
    except KeyboardInterrupt:
        console.print("no longer watched", style=QUIET)


def changes(file: Path, every: float = 0.3) -> Iterator[None]:
    """Yields whenever the file has become another one than when it was last looked at, for ever."""
    before = _mark(file)
    while True:
        time.sleep(every)
        now = _mark(file)
        if now != before:
            before = now
            yield


def _mark(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


# --- any session -----------------------------------------------------------------------------------------------------


def read_session(file: Path) -> tuple[State, State, dict[str, Any]]:
    """The memory's state, everything else, and the description; `StateError` for files that hold no session."""
    tensors, meta = read_file(file)
    if meta.get("content") != "session":
        kind = "a memory's weights (of save_pretrained)" if "memory" in meta else repr(meta.get("content"))
        raise StateError(f"{file} holds {kind}, not a session; sessions are what Session.save writes")
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("state.")}
    return state, rest, meta


def view(file: Path, top: int = 10) -> RenderableType:
    """All that `mnemic inspect` shows of a file."""
    state, rest, meta = read_session(file)
    kind = meta["memory"]["kind"]
    parts: list[RenderableType] = [_head(file, state, rest, meta)]
    if not state:
        parts.append(Text("nothing was read yet", style=QUIET))
    elif kind == "memoria":
        parts += _memoria(state, top)
    elif kind == "emt":
        parts += _emt(state)
    if state:
        parts.append(_tensors(state))
    parts.append(_config(meta["memory"]))
    return Group(*parts)


def _head(file: Path, state: State, rest: State, meta: dict[str, Any]) -> RenderableType:
    config, ledger = meta["memory"], meta.get("stream")
    title = CONFIGS[config["kind"]].card.title if config["kind"] in CONFIGS else config["kind"]
    seen, waiting, written = (ledger[name][0] if ledger else 0 for name in ("seen", "counts", "written"))
    length = config["segment_length"]
    window = meta.get("window")
    keys = {name: tensor for name, tensor in rest.items() if name.startswith(("keys.", "values.", "window."))}
    held = int(rest["window.valid"].sum()) if "window.valid" in rest else 0
    table = _pairs()
    table.add_row("memory", f"{escape(title)} [{QUIET}]{meta['memory_fingerprint']}")
    table.add_row("base", f"{escape(meta['base_model'] or 'unnamed')} [{QUIET}]{meta['base_fingerprint']}")
    table.add_row("read", f"{seen:,} tokens, {written:,} segment{'s' * (written != 1)} of {length:,} written")
    table.add_row("waiting", Text.assemble(bar(waiting, length, 20), f" {waiting:,} of {length:,} tokens"))
    if window:
        table.add_row("window", Text.assemble(bar(held, window, 20), f" {held:,} of {window:,} tokens' keys"))
    sizes = (("state", nbytes(state)), ("waiting", nbytes(rest) - nbytes(keys)), ("keys", nbytes(keys)))
    table.add_row("bytes", ", ".join(f"{name} {size:,}" for name, size in sizes) + f"; file {file.stat().st_size:,}")
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime))
    return Panel(table, title=f"[bold]{escape(file.name)}[/bold]", subtitle=f"saved {saved}", title_align="left")


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=QUIET)
    table.add_column()
    return table


def _tensors(state: State) -> RenderableType:
    table = Table(title="state", title_justify="left", title_style="bold", box=None, header_style=QUIET)
    for name in ("tensor", "shape", "dtype"):
        table.add_column(name)
    for name in ("bytes", "finite"):
        table.add_column(name, justify="right")
    for name, tensor in sorted(state.items()):
        shape, dtype = " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")
        finite = "yes" if bool(torch.isfinite(tensor).all()) else "[red]no"
        table.add_row(name, shape, dtype, f"{tensor.numel() * tensor.element_size():,}", finite)
    return table


def _config(values: dict[str, Any]) -> RenderableType:
    usual = CONFIGS[values["kind"]]().to_dict() if values["kind"] in CONFIGS else {}
    words = [Text("settings", style=QUIET)]
    for name, value in values.items():
        if name != "kind":
            changed = usual.get(name, value) != value
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


# --- EMT -------------------------------------------------------------------------------------------------------------


def _emt(state: State) -> list[RenderableType]:
    """Norms of the slots, and how alike they are: slots that say the same hold one thing."""
    parts: list[RenderableType] = []
    slots: Tensor = state["slots"][0]
    for number, memory in enumerate(slots.reshape(-1, *slots.shape[-2:])):
        memory = memory.double()
        norms = memory.norm(dim=-1)
        unit = memory / norms.clamp_min(1e-12)[:, None]
        cosine = unit @ unit.T
        upper = torch.triu_indices(len(memory), len(memory), 1)
        pairs = cosine[upper[0], upper[1]]
        values = torch.linalg.svdvals(memory)
        share = values.square() / values.square().sum().clamp_min(1e-12)
        directions = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
        table = _pairs()
        table.add_row("slots", f"{len(memory)} of width {memory.shape[1]}")
        table.add_row("norm", f"{norms.min():.3f} to {norms.max():.3f}, mean {norms.mean():.3f}")
        if len(pairs):
            i, j = (int(side[int(pairs.argmax())]) for side in upper)
            table.add_row("similarity", f"mean {pairs.mean():.3f}; most alike slots {i} and {j}: {pairs.max():.3f}")
        table.add_row("directions in use", f"{directions:.1f} of {min(memory.shape)}")
        for name in ("usage", "age"):
            if name in state:
                value = state[name][0].reshape(-1, len(memory))[number]
                table.add_row(name, f"{value.min():.2f} to {value.max():.2f}, mean {value.mean():.2f}")
        shapes = [histogram(norms.numpy(), "norms of slots")]
        if len(pairs):
            shapes.append(histogram(pairs.numpy(), "similarity of pairs (cosine)", colour=AMBER))
        title = "slots" if len(slots.shape) == 2 or slots.shape[0] == 1 else f"slots of memory {number}"
        parts.append(Panel(Group(table, Columns(shapes, padding=(1, 4))), title=title, title_align="left"))
    return parts


# --- Memoria ---------------------------------------------------------------------------------------------------------


def _memoria(state: State, top: int) -> list[RenderableType]:
    """Levels, the engrams that fired most with their strongest ties, ages and lifespans."""
    from mnemic.analysis.memoria import Moment

    moment = Moment.of(state)
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
    ages = histogram(moment.ages(moment.ids), "ages, segments", whole=True)
    spans = histogram(moment.lifespans, "lifespans left, segments", colour=AMBER)
    return [
        Panel(levels, title=f"engrams at step {moment.step:,}", title_align="left"),
        _strongest(state, moment, top),
        Columns([ages, spans], padding=(1, 4)),
    ]


def _range(values: np.ndarray, form: str) -> str:
    if not len(values):
        return "-"
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"


def _strongest(state: State, moment: Any, top: int) -> Table:
    from mnemic.analysis.memoria import LEVELS as ORDER
    from mnemic.analysis.memoria import edge_table

    weight, count = edge_table(state)
    fires, born = count.diagonal(), moment.born(moment.ids)
    level = [name for name, size in zip(ORDER, moment.levels, strict=True) for _ in range(size)]
    slots = state["recalled"][0].tolist()
    use = {slot: float(value) for slot, value in zip(slots, state["use"][0], strict=True) if slot >= 0}
    table = Table(
        title=f"the {top} engrams that fired most; ties: share of its firings",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    table.header_style = QUIET
    for name in ("id", "level", "age", "lifespan", "fires", "reminded now", "attention since"):
        table.add_column(name, justify="left" if name == "level" else "right")
    table.add_column("strongest ties to other segments")
    for slot in np.lexsort((moment.ids, -moment.lifespans, -fires))[:top].tolist():
        label, colour = LEVELS[level[slot]]
        others = np.where(born != born[slot], weight[slot], 0)
        ties = [other for other in np.lexsort((-count[slot], -others))[:3].tolist() if others[other] > 0]
        table.add_row(
            str(moment.ids[slot]),
            Text(label, style=colour),
            f"{moment.step - born[slot]:,}",
            f"{moment.lifespans[slot]:,.1f}",
            f"{fires[slot]:,}",
            "●" if slot in use else "",
            f"{use[slot]:.2f}" if slot in use else "",
            ", ".join(f"{moment.ids[other]} ({others[other]:.2f})" for other in ties),
        )
    return table


def draw(file: Path, picture: Path) -> Path:
    """The engrams of a Memoria session and their strongest ties, as a PNG."""
    from mnemic.analysis.memoria import engram_graph
    from mnemic.analysis.memoria_pictures import draw_graph

    state, _, meta = read_session(file)
    if meta["memory"]["kind"] != "memoria":
        raise StateError(f"only Memoria has a graph of engrams, {file} is a session of {meta['memory']['kind']!r}")
    if not state or not int(state["levels"].sum()):
        raise StateError(f"{file} has no engrams yet; nothing to draw")
    directed = engram_graph(state, strongest=1, within=False)
    return draw_graph({f"after {directed.graph['step']:,} segments": directed}, picture, file.name)
