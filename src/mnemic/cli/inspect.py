"""`mnemic inspect`: a saved session, read from its file alone: in the terminal, as a page, or whenever it changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from mnemic.cli.show import console

if TYPE_CHECKING:
    from torch import nn

    from mnemic.inspect.inside import Contents, Words


def inspect(
    file: Annotated[Path, typer.Argument(help="A session that Session.save wrote.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew when the file changes; Ctrl-C ends.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Engrams, slots and other places in a table.")] = 10,
    page: Annotated[Path | None, typer.Option("--html", help="Write it as one page that needs no network.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's folder or name, for words instead of positions.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="The text that was read, from its beginning, where the session kept none.")
    ] = None,
    histograms: Annotated[
        bool, typer.Option("--histograms", help="How norms, similarities, ages and lifespans are spread.")
    ] = False,
    graph: Annotated[Path | None, typer.Option(help="Memoria: draw the engrams and their ties to this PNG.")] = None,
) -> None:
    """What a saved session holds: its memory, what was written when, what waits, its window, and whose it is."""
    from mnemic.inspect.inside import open_session
    from mnemic.inspect.page import write_page
    from mnemic.inspect.terminal import view
    from mnemic.state import StateError

    def look() -> RenderableType:
        found = open_session(file)
        words = words_of(found, tokenizer, text)
        try:
            if graph is not None:
                draw(found, graph)
            if page is not None:
                write_page(found, page, words)
            return view(found, words, top, histograms=histograms)
        except (StateError, OSError, ImportError):
            raise
        except Exception as error:
            # a file is whole by its checksum, but anyone can make one
            raise StateError(f"the parts of {file} do not fit each other ({type(error).__name__}: {error})") from error

    try:
        found = look()
    except (OSError, ValueError, ImportError) as error:
        Console(stderr=True).print("[red]error:[/red]", Text(str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(found)
    for kind, path in (("page", page), ("picture", graph)):
        if path is not None:
            console.print(f"{kind} {path}", highlight=False, markup=False)
    if watch:
        follow(file, look)


def words_of(found: Contents, tokenizer: str | None, text: Path | None) -> Words | None:
    """The text that was read: as the session kept it, or from a file; None without a tokenizer.

    Raises:
        ValueError: a text without a tokenizer, or beside one that the session kept; no such tokenizer.
    """
    ids = found.log.ids
    if tokenizer is None:
        if text is not None:
            raise ValueError(f"--text {text} needs the tokenizer it was read with: --tokenizer FOLDER")
        return None
    if text is not None and ids:
        raise ValueError(f"{found.name} kept its own text; leave --text {text} out")
    from transformers import AutoTokenizer

    from mnemic.inspect.inside import Words
    from mnemic.texts import token_ids

    if text is None and not ids:
        raise ValueError(f"{found.name} kept no text (keep_text); name the text that was read: --text FILE")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if text is not None:
        ids = token_ids(text.read_text("utf-8"), loaded, start=True, end=False)[0].tolist()  # as Session.read does
    return Words(ids or [], loaded)


def follow(file: Path, look: Callable[[], RenderableType]) -> None:
    """Shows the file anew whenever it changes, until Ctrl-C; one that cannot be read just now, as the error."""
    from mnemic.inspect.terminal import QUIET

    try:
        for _ in changes(file):
            try:
                found = look()
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


def look_inside(model: nn.Module, out: Path, seed: int = 0, fillers: int = 16) -> Path:
    """What a memory of `mnemic demo` holds after it was told pairs and read `fillers` segments of filler: a session and
    its page in the folder `out`.
    """
    import torch

    from mnemic.inspect.inside import Words, open_session
    from mnemic.inspect.page import write_page
    from mnemic.session import Session
    from mnemic.tasks.facts import SymbolRecall

    task, generator = SymbolRecall(), torch.Generator().manual_seed(seed)
    told = task.tell(1, generator).told[:, 0]
    session = Session(model, Symbols(), window=task.segment_length, keep_text=True)
    session.read(torch.cat([told, task.filler(1, fillers, generator)], 1))
    out.mkdir(parents=True, exist_ok=True)
    session.save(out / "session.memory")
    found = open_session(out / "session.memory")
    return write_page(found, out / "session.html", Words(found.log.ids or [], session.tokenizer))


class Symbols:
    """The tokenizer of the demonstration's symbols: keys k0 to k15, values v0 to v15, noise as dots."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The symbols, with spaces between them."""
        from mnemic.tasks.recall import SymbolStreams

        return " ".join(SymbolStreams().text(ids))


def draw(found: Contents, picture: Path) -> Path:
    """The engrams of a Memoria session and their strongest ties, as a PNG."""
    from mnemic.inspect.engram_pictures import draw_graph
    from mnemic.inspect.engrams import engram_graph
    from mnemic.state import StateError

    if found.kind != "memoria":
        raise StateError(f"only Memoria has a graph of engrams, {found.name} is a session of {found.kind!r}")
    if not found.state or not int(found.state["levels"].sum()):
        raise StateError(f"{found.name} has no engrams yet; nothing to draw")
    directed = engram_graph(found.state, strongest=1, within=False)
    return draw_graph({f"after {directed.graph['step']:,} segments": directed}, picture, found.name)
