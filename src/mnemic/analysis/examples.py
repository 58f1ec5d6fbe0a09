"""One example of a task as a person reads it: what stands where, and the picture of it. The picture needs
`mnemic[plot]`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from mnemic.tasks.base import Examples, Task

SEGMENTS = 8
"""As many segments are shown at most."""

COLUMNS = 112
"""Characters of a line."""

LINES = {True: 3, False: 1}
"""Lines of a segment at most: with evidence or an answer, and without."""

MARKS = {
    "evidence": {"face": "#f6c667", "text": "#222222"},
    "answer": {"face": "#1f5fa8", "text": "#ffffff"},
    "other": {"face": "#e9edf1", "text": "#333333"},
    "padding": {"face": "#f7f7f7", "text": "#bbbbbb"},
    "left out": {"face": "none", "text": "#777777"},
}
"""What a token can be, and its colours."""


@dataclass
class Cell:
    """A token, or a note of how many were left out."""

    text: str
    mark: str

    @property
    def width(self) -> int:
        """In characters."""
        return len(self.text)


@dataclass
class Row:
    """A segment with what is shown of its tokens; without cells, segments that were left out."""

    title: str
    cells: list[Cell]


def summary(task: Task, examples: Examples, row: int = 0) -> str:
    """Sizes of one stream: segments, facts, answers, lags."""
    tokens = examples.input_ids.shape[1]
    segments, lag = tokens // task.segment_length, examples.lag[row][examples.place[row] >= 0]
    parts = [
        f"{segments:,} segment{'s' * (segments != 1)} of {task.segment_length:,} tokens",
        f"{int(examples.facts[row]):,} fact{'s' * (int(examples.facts[row]) != 1)}",
        f"{len(lag):,} answer{'s' * (len(lag) != 1)}",
    ]
    if len(lag):
        least, most = int(lag.min()), int(lag.max())
        parts.append(f"lag {least:,} tokens" if least == most else f"lag {least:,} to {most:,} tokens")
    return ", ".join(parts)


def layout(task: Task, examples: Examples, row: int = 0) -> list[Row]:
    """What is shown of one stream: every segment, or those with evidence and answers and the ends; of long segments
    the surroundings of what is marked and the ends.
    """
    length, ids = task.segment_length, examples.input_ids[row]
    marks = _marks(task, examples, row)
    marked = (marks == 1) | (marks == 2)
    segments = len(ids) // length
    shown = _segments(marked.view(segments, length).any(1))
    names = ["other", "evidence", "answer", "padding"]
    words = [_readable(piece) for piece in task.text(ids.tolist())]
    rows, skipped = [], 0
    for segment in range(segments):
        if not shown[segment]:
            skipped += 1
            continue
        if skipped:
            rows.append(Row(f"... {skipped:,} segment{'s' * (skipped != 1)} ...", []))
            skipped = 0
        part = slice(segment * length, (segment + 1) * length)
        cells = [Cell(word, names[mark]) for word, mark in zip(words[part], marks[part].tolist(), strict=True)]
        keep = _tokens(cells, marked[part])
        rows.append(Row(f"segment {segment:,}", _left_out(cells, keep)))
    return rows


def _marks(task: Task, examples: Examples, row: int) -> Tensor:
    """What each token is: 0 other, 1 evidence, 2 answer, 3 padding."""
    ids, asked = examples.input_ids[row], examples.asked[row]
    marks = torch.zeros(len(ids), dtype=torch.long)
    # equal tokens to the end behind the last answer
    end = int(asked.nonzero().max()) + 1 if bool(asked.any()) else len(ids)
    last = end + int((ids[end:] != ids[-1]).nonzero().max().item() + 1 if bool((ids[end:] != ids[-1]).any()) else 0)
    if len(ids) - last > 1:
        marks[last:] = 3
    for answer, places in enumerate(examples.evidence[row].tolist()):
        said = ids[examples.answer[row] == answer]
        for place in places:
            if place >= 0:
                marks[place : place + _piece(task, ids, place, said)] = 1
    marks[asked] = 2
    return marks


def _piece(task: Task, ids: Tensor, place: int, said: Tensor) -> int:
    """Tokens of a piece of evidence, of which a task tells the first: a sentence, up to the answer where that stands in
    it, or what belongs together by the task's `unit`; a whole segment where that begins with it and neither is so.
    """
    left = task.segment_length - place % task.segment_length
    if hasattr(task, "tokenizer"):
        words = task.text(ids[place : place + 80].tolist())
        return next((end + 1 for end, word in enumerate(words) if word.strip()[-1:] in (".", ";", "!", "?")), 1)
    if task.unit > 1:
        found = ids[place : place + min(task.unit, left)].unfold(0, len(said), 1) if len(said) <= left else said[:0]
        same = (found == said).all(1).nonzero() if len(found) else found
        return int(same[0]) + len(said) if len(same) else min(task.unit, left)
    return left if left == task.segment_length and len(said) > 1 else 1


def _segments(marked: Bool[Tensor, " s"]) -> list[bool]:
    count = len(marked)
    if count <= SEGMENTS:
        return [True] * count
    wanted = [s for s in range(count) if bool(marked[s]) or s in (0, 1, count - 2, count - 1)]
    if len(wanted) > SEGMENTS:
        wanted = wanted[: SEGMENTS // 2] + wanted[-SEGMENTS // 2 :]
    # a single segment takes no more room than the note that it is left out
    wanted = {*wanted, *(s for s in range(1, count - 1) if s - 1 in wanted and s + 1 in wanted)}
    return [s in wanted for s in range(count)]


def _tokens(cells: list[Cell], marked: Bool[Tensor, " t"]) -> list[bool]:
    """The tokens that are shown: as much around what is marked, and of both ends, as there is room for."""
    room = COLUMNS * LINES[bool(marked.any())]
    uniform = _uniform(cells)
    cost = torch.tensor([(uniform or cell.width) + 1 for cell in cells])
    length = len(cells)
    if int(cost.sum()) <= max(room, 2 * COLUMNS):
        return [True] * length
    # of padding, the first two tokens say all
    body = sum(cell.mark != "padding" for cell in cells)
    place = torch.arange(length)
    for radius in (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1):
        near = F.max_pool1d(marked[None, None].float(), 2 * radius + 1, 1, radius)[0, 0] > 0
        ends = (place < radius) | (place >= body - radius)
        keep = (near | ends) & (place < body + 2)
        if int(cost[keep].sum()) + 12 * _gaps(keep) <= room:
            return keep.tolist()
    # everything is marked: the beginning and the end of it
    half = (room - 24) // 2
    return ((cost.cumsum(0) <= half) | (cost.flip(0).cumsum(0).flip(0) <= half)).tolist()


def _gaps(keep: Bool[Tensor, " t"]) -> int:
    return int((keep[1:] & ~keep[:-1]).sum()) + 1


def _left_out(cells: list[Cell], keep: list[bool]) -> list[Cell]:
    """The cells that are kept, with notes of how many are missing between them."""
    found, skipped = [], []
    for cell, kept in zip([*cells, None], [*keep, True], strict=True):
        if not kept and cell is not None:
            skipped.append(cell)
            continue
        found += skipped if len(skipped) < 3 else [Cell(f"... {len(skipped):,} ...", "left out")]
        skipped = []
        if cell is not None:
            found.append(cell)
    return found


def _uniform(cells: list[Cell]) -> int | None:
    """One width for all tokens where they are short, so that they stand in columns."""
    widest = max((cell.width for cell in cells if cell.mark != "left out"), default=0)
    return widest if widest <= 3 else None


def _readable(piece: str) -> str:
    """A piece of text without blanks that nobody sees."""
    return piece.strip(" ").replace("\n", "\u21b5").replace("\t", "\u2192").replace("\r", "") or "\u00b7"


# --- the picture -----------------------------------------------------------------------------------------------------


def picture(task: Task, path: str | Path, number: int = 0, split: str = "train") -> Path:
    """Draws the first example of a batch, segment by segment, and saves a PNG (150 dots an inch) at `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    examples = task.examples(1, split, number)
    rows = layout(task, examples)
    size, character, line, left = 8.0, 8.0 * 0.602 / 72, 0.21, 0.95
    placed, width, height = _placed(rows)
    across = max(left + character * width + 0.15, 6.4)
    about = textwrap.wrap(task.card.asks, int((across - 0.3) / (8.5 * 0.54 / 72)))
    above = 0.42 + 0.17 * (len(about) + 1) + 0.12
    down = above + line * height + 0.36
    figure = plt.figure(figsize=(across, down))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, across), ylim=(down, 0))
    axes.axis("off")
    plain: dict[str, Any] = {"va": "center", "parse_math": False}
    axes.text(0.15, 0.22, f"{task.card.title} ({task.name})", fontsize=11, fontweight="bold", **plain)
    for number_of_line, words in enumerate([*about, summary(task, examples)]):
        axes.text(0.15, 0.45 + 0.17 * number_of_line, words, fontsize=8.5, color="#555555", **plain)
    for title, y in placed.titles:
        axes.text(0.15, above + line * (y + 0.5), title, fontsize=8, color="#777777", **plain)
    for cell, x, y, wide in placed.cells:
        look = MARKS[cell.mark]
        corner = (left + character * x, above + line * y + 0.015)
        if look["face"] != "none":
            axes.add_patch(Rectangle(corner, character * wide - 0.02, line - 0.03, facecolor=look["face"], linewidth=0))
        axes.text(
            corner[0] + (character * wide - 0.02) / 2,
            above + line * (y + 0.5),
            cell.text,
            family="DejaVu Sans Mono",
            fontsize=size,
            fontweight="bold" if cell.mark in ("evidence", "answer") else "normal",
            color=look["text"],
            ha="center",
            **plain,
        )
    used = {cell.mark for cell, *_ in placed.cells}
    handles = [Patch(facecolor=look["face"], label=name) for name, look in MARKS.items() if name in used - {"left out"}]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.15 / across, 0.06 / down),
        borderpad=0,
        borderaxespad=0,
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        columnspacing=1.4,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


@dataclass
class Placed:
    """Where each title and cell goes, in characters from the left and lines from the top."""

    titles: list[tuple[str, float]]
    cells: list[tuple[Cell, float, float, float]]


def _placed(rows: list[Row]) -> tuple[Placed, float, float]:
    """Everything with its place, the width in characters and the height in lines."""
    uniform = _uniform([cell for row in rows for cell in row.cells])
    placed, widest, y = Placed([], []), 0.0, 0.0
    for row in rows:
        placed.titles.append((row.title, y))
        x = 0.0
        for cell in row.cells:
            wide = (cell.width if cell.mark == "left out" else uniform or cell.width) + 0.9
            if x + wide > COLUMNS + 1 and x > 0:
                x, y = 0.0, y + 1
            placed.cells.append((cell, x, y, wide))
            x += wide
            widest = max(widest, x)
        y += 1.25
    return placed, widest, y
