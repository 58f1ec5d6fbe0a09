"""`mnemic.show`: what a session holds, in a notebook as the page, elsewhere as `mnemic inspect` prints it."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult

from mnemic.attachment import attached
from mnemic.inspect.inside import Contents, Words, contents
from mnemic.inspect.page import render, values
from mnemic.inspect.terminal import view

if TYPE_CHECKING:
    from mnemic.session import Session


@dataclass
class Shown:
    """A view of a session as it was when it was asked for. Notebooks take the page, rich and `print` the terminal's."""

    contents: Contents
    words: Words | None = None
    trained: bool | None = None
    histograms: bool = False

    @property
    def html(self) -> str:
        """The page, as `mnemic inspect --html` writes it."""
        return render(values(self.contents, self.words))

    def _repr_html_(self) -> str:
        # apart from the notebook: in a frame that may run the page's script and do nothing else
        style = "width: 100%; height: 720px; border: 0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(self.html)}"></iframe>'

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield view(self.contents, self.words, histograms=self.histograms, trained=self.trained)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()

    def __repr__(self) -> str:
        return str(self)


def show(session: Session, *, histograms: bool = False) -> Shown:
    """What a session holds, as `mnemic inspect` shows it: as the page in a notebook, else as in the terminal.

    With `keep_text` and a tokenizer it tells in words what was written.
    """
    found, attachment = contents(*session.contents(), "session"), attached(session.model)
    trained = attachment.trained if attachment.parameters() else None  # nothing to be said of what has no weights
    ids = found.log.ids
    words = Words(ids, session.tokenizer) if ids and session.tokenizer is not None else None
    return Shown(found, words, trained, histograms)
