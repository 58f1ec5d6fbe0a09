"""What a saved session holds, as plain values: for `mnemic inspect`, its page, and `mnemic.show`.

All is read off the session's tensors and its description, so neither a model nor its memory is needed. What a tensor is
(rows that can be told apart, a matrix, a queue) goes by its name in the state; what is not known here is listed with
its shape and size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemic import folders
from mnemic.checks import check_description
from mnemic.history import Log
from mnemic.memories import CONFIGS
from mnemic.memories.settings import defaults
from mnemic.state import State, StateError, nbytes, read_file

ROWS = {
    "slots": ("slot", "slots"),
    "engram": ("engram", "engrams"),
    "rows": ("row", "rows"),
    "tokens": ("memory token", "memory tokens"),
    "coefficients": ("basis function", "basis functions"),
}
"""Tensors `[..., n, d]` whose rows are places of their own, and what one and several of them are called."""
MATRICES = ("matrix", "learned", "momentum")
"""Tensors that are matrices of fast weights, `name` or `name_block`."""
QUEUES = {"keys": "count", "memory": "count", "compressed": "compressed_count"}
"""Tensors `[n, d]` of which the newest tokens are the last, and where it stands how many there are."""
LARGEST = 2048
"""Rows of which each two are compared, and the smaller side of a matrix whose singular values are taken: what is larger
would take minutes, and a file may say of itself what it likes."""
CONTEXT = 6
"""Tokens shown on either side of one that weighed much."""
PIECE = 3
"""Tokens that are decoded before one to see what it adds: some tokenizers write spaces only between two."""


@dataclass
class Contents:
    """A session's file in its parts: the memory's `state`, other tensors, the description, and the history."""

    name: str
    state: State
    rest: State
    meta: dict[str, Any]
    log: Log
    size: int | None = None
    saved: float | None = None

    @property
    def kind(self) -> str:
        """The mechanism."""
        return self.meta["memory"]["kind"]

    @property
    def title(self) -> str:
        """The mechanism's name in full."""
        return CONFIGS[self.kind].card.title if self.kind in CONFIGS else self.kind

    def ledger(self, name: str) -> int:
        """Tokens `seen`, of them waiting (`counts`), segments `written`."""
        return self.meta["stream"][name][0] if self.meta.get("stream") else 0

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the memory's state, of waiting tokens, of keys in the window and kept from before it, and of the
        history with its text.
        """
        kinds = ("keys.", "values.", "window.", "bank.")
        keys = {name: tensor for name, tensor in self.rest.items() if name.startswith(kinds)}
        return {
            "state": nbytes(self.state),
            "waiting": nbytes(self.rest) - nbytes(keys),
            "keys": nbytes(keys),
            "history": nbytes(self.log.tensors()),
        }


def contents(tensors: State, meta: dict[str, Any], name: str) -> Contents:
    """The parts of what `Session.save` writes; raises `StateError` for anything else."""
    if meta.get("content") != "session":
        kind = "a memory's weights (of save_pretrained)" if "memory" in meta else repr(meta.get("content"))
        raise StateError(f"{name} holds {kind}, not a session; sessions are what Session.save writes")

    def part(prefix: str) -> State:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    noted = part("history.")
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(("state.", "history."))}
    return Contents(name, part("state."), rest, meta, Log.of(noted) if noted else Log())


def open_session(file: Path) -> Contents:
    """The contents of a file or a folder, whose chunk files are not read; raises `StateError` for one that holds no
    session or is not whole.
    """
    if folders.is_folder(file):
        tensors, meta, chunks = folders.read(file)
        for place, each in enumerate(chunks):
            tensors |= {f"bank.{name}.{place}": tensor for name, tensor in each.tensors.items()}
        head, files = file / folders.HEAD, list(file.iterdir())
    else:
        (tensors, meta), head, files = read_file(file), file, [file]
    found = contents(tensors, meta, str(file))
    check_description(meta, file)
    found.size, found.saved = sum(each.stat().st_size for each in files), head.stat().st_mtime
    found.name = file.name
    return found


# --- words -----------------------------------------------------------------------------------------------------------


@dataclass
class Words:
    """The text that was read, by position: token ids and what turns them into words."""

    ids: Sequence[int]
    tokenizer: Any
    known: dict[tuple[int, ...], str] = field(default_factory=dict)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text."""
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.tokenizer.decode(list(key)) if key else ""
        return self.known[key]

    def piece(self, position: int, first: int) -> str:
        """What the token at `position` adds to those before it, from `first` on."""
        start = max(first, position - PIECE)
        before, whole = (self.decode(self.ids[start:stop]) for stop in (position, position + 1))
        return whole[len(before) :] if whole.startswith(before) else self.decode(self.ids[position : position + 1])

    def passage(self, first: int, last: int, tokens: Sequence[int], weights: Sequence[float]) -> list[list[Any]] | None:
        """The neighbourhood of some tokens within `first` to `last` as runs of text, each with its weight, 0 for what
        stands around them; None where the text is not known.
        """
        last = min(last, len(self.ids) - 1)
        known = {token: weight for token, weight in zip(tokens, weights, strict=True) if token <= last}
        if not known or any(self.ids[position] < 0 for position in known):
            return None
        runs: list[list[Any]] = []
        shown = sorted(
            {p for token in known for p in range(token - CONTEXT, token + CONTEXT + 1) if first <= p <= last}
        )
        before = first - 1
        for position in shown:
            text = self.piece(position, first) if self.ids[position] >= 0 else "\u2026"
            text = text if position == before + 1 else f" \u2026 {text.lstrip()}"
            weight = known.get(position, 0)
            if runs and not weight and not runs[-1][1]:
                runs[-1][0] += text
            else:
                runs.append([text, round(float(weight), 3)])
            before = position
        if before < last:
            runs.append([" \u2026", 0])
        return runs


# --- places ----------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Places of one kind, such as the slots of a memory.

    `ids` are their numbers as the history has them, `labels` as they are shown; `vectors [n, d]` what they hold;
    `columns` further numbers of each, by name.
    """

    name: str
    unit: tuple[str, str]
    ids: list[int]
    labels: list[int]
    vectors: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def norms(self) -> list[float]:
        """The length of each vector."""
        return self.vectors.norm(dim=-1).tolist()

    @property
    def compared(self) -> list[int]:
        """The rows of which each two are compared: all, or of more than `LARGEST` every second, third or so."""
        return list(range(0, len(self.ids), math.ceil(len(self.ids) / LARGEST)))

    @property
    def cosine(self) -> Tensor:
        """How alike each two of those that are `compared` are, from -1 to 1."""
        chosen = self.vectors[self.compared]
        unit = chosen / chosen.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return (unit @ unit.T).clamp(-1, 1)

    @property
    def nearest(self) -> list[tuple[int, float] | None]:
        """For each the label of the one most like it, and how much; None where not all are compared."""
        if not 2 <= len(self.ids) <= LARGEST:
            return [None] * len(self.ids)
        best = self.cosine.fill_diagonal_(-2).max(-1)
        return [(self.labels[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    @property
    def directions(self) -> float | None:
        """In how many directions the vectors lie: e to the entropy of their squared singular values; None of many."""
        values = singular_values(self.vectors)
        return None if values is None else effective_rank(values)


def singular_values(matrix: Tensor) -> Tensor | None:
    """Largest first; what is NaN or infinite counts as 0. None for large matrices."""
    return torch.linalg.svdvals(matrix.nan_to_num(0, 0, 0)) if min(matrix.shape) <= LARGEST else None


def effective_rank(values: Tensor) -> float:
    """e to the entropy of squared singular values: 1 where there is one direction, n where n are alike."""
    share = values.double().square() / values.double().square().sum().clamp_min(1e-300)
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum())) if bool(values.any()) else 0.0


def groups(found: Contents) -> list[Group]:
    """What of a memory's state can be told apart row by row; none where nothing was read or nothing can."""
    result: list[Group] = []
    for name, unit in ROWS.items():
        tensor = found.state.get(name)
        if tensor is None or tensor.ndim < 3:
            continue
        if name == "engram":
            result += _engrams(found, unit)
            continue
        stacked = tensor[0].reshape(-1, *tensor.shape[-2:]).double()
        for number, vectors in enumerate(stacked):
            count = len(vectors)
            title = unit[1] if len(stacked) == 1 else f"{unit[1]} of memory {number}"
            group = Group(title, unit, list(range(number * count, (number + 1) * count)), list(range(count)), vectors)
            for column in ("age", "usage"):
                if column in found.state:
                    group.columns[column] = found.state[column][0].reshape(-1, count)[number].tolist()
            result.append(group)
    return result


def _engrams(found: Contents, unit: tuple[str, str]) -> list[Group]:
    from mnemic.inspect.engrams import LEVELS, Moment
    from mnemic.memories.memoria import graph

    moment = Moment.of(found.state)
    count = len(moment.ids)
    if not count:
        return []
    ids, slots = moment.ids.tolist(), found.state["recalled"][0].tolist()
    use = {slot: value for slot, value in zip(slots, found.state["use"][0].tolist(), strict=True) if slot >= 0}
    levels = [level for level, size in zip(LEVELS, moment.levels, strict=True) for _ in range(size)]
    columns: dict[str, list[Any]] = {
        "level": levels,
        "age": moment.ages(moment.ids).tolist(),
        "lifespan": moment.lifespans.tolist(),
        "fired": graph.fires(found.state)[0, :count].tolist(),
        "attention": [use.get(slot) for slot in range(count)],
    }
    return [Group(unit[1], unit, ids, ids, found.state["engram"][0, :count].double(), columns)]


def written(found: Contents, words: Words | None = None) -> dict[int, list[dict[str, Any]]]:
    """What the history tells of each place: the writes of which it holds most, first the one it holds most of.

    Each has the write's `number`, `first`, `last` and `time`, `share`, `left`, `tokens`, `weights`, and with `words`
    the `passage`, see `Words.passage`.
    """
    result: dict[int, list[dict[str, Any]]] = {}
    for record in found.log.records():
        for each in record["places"]:
            entry = {**{name: record[name] for name in ("number", "first", "last", "time")}, **each}
            if words is not None:
                entry["passage"] = words.passage(record["first"], record["last"], each["tokens"], each["weights"])
            result.setdefault(entry.pop("place"), []).append(entry)
    for entries in result.values():
        entries.sort(key=lambda entry: (-entry["left"], -entry["number"]))
    return result


def mean_age(found: Contents, entries: Sequence[dict[str, Any]]) -> float | None:
    """How many segments ago what a place holds was written, on the mean over what is known of it; 1 for the last."""
    left = sum(entry["left"] for entry in entries)
    last = found.ledger("written") + 1
    return sum(entry["left"] * (last - entry["number"]) for entry in entries) / left if left else None


# --- matrices and queues ---------------------------------------------------------------------------------------------


def matrices(found: Contents) -> list[dict[str, Any]]:
    """Every matrix of fast weights: `name`, `shape`, `norm`, effective `rank` and its singular `values` (None and
    none of a large one).
    """
    result = []
    for name, tensor in found.state.items():
        if name.split("_")[0] not in MATRICES or tensor.ndim < 3:
            continue
        heads = tensor[0].reshape(-1, *tensor.shape[-2:]).double()
        for number, matrix in enumerate(heads):
            values = singular_values(matrix)
            result.append(
                {
                    "name": name.replace("_", " ") + (f", head {number}" if len(heads) > 1 else ""),
                    "shape": list(matrix.shape),
                    "norm": float(matrix.norm()),
                    "rank": None if values is None else effective_rank(values),
                    "values": [] if values is None else values.tolist(),
                }
            )
    return result


def queues(found: Contents) -> list[dict[str, Any]]:
    """Every queue of tokens: `name`, how many states are `held`, the `size` it may have, and which positions of the
    stream they are of, `first` to `last` (None where several tokens make a state).
    """
    result, settings = [], found.meta["memory"]
    end = found.ledger("seen") - found.ledger("counts")
    for name, counter in QUEUES.items():
        counter = f"{name}_count" if f"{name}_count" in found.state else counter
        if name not in found.state or counter not in found.state:
            continue
        held, limit = int(found.state[counter][0]), settings["compressed" if name == "compressed" else "size"]
        queue = {"name": {"keys": "keys and values"}.get(name, name), "held": held, "size": limit}
        queue |= (
            {"first": end - held, "last": end - 1} if held and name != "compressed" else {"first": None, "last": None}
        )
        result.append(queue)
    return result


def tensors(found: Contents) -> list[dict[str, Any]]:
    """Every tensor of the state: `name`, `shape`, `dtype`, `bytes`, and whether all of it is `finite`."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.numel() * tensor.element_size(),
            "finite": bool(torch.isfinite(tensor).all()),
        }
        for name, tensor in sorted(found.state.items())
    ]


def settings(found: Contents) -> list[tuple[str, Any, bool]]:
    """The memory's settings, and whether each is another than usual."""
    values = found.meta["memory"]
    usual = defaults(CONFIGS[found.kind]) if found.kind in CONFIGS else {}
    return [(name, value, usual.get(name, value) != value) for name, value in values.items() if name != "kind"]


def clock(seconds: float) -> str:
    """A time as it is shown: UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


# --- Memoria's graph -------------------------------------------------------------------------------------------------


def graph_over_time(found: Contents, most: int = 600) -> dict[str, Any] | None:
    """How Memoria's engrams fired and were tied, segment by segment; None for other memories, without engrams, or with
    more than 4,096.

    The state itself remembers who fired in the latest 122 to 129 segments. So this is of the engrams that are alive at
    the end; those that were forgotten on the way are not in it. `steps` are numbers of writes, from 1; `nodes` have an
    `id`, when they were made (`born`, the number of a write), the `level` at the end, how often they `fired` and where
    they are drawn (`x`, `y` in -1 to 1); `fired[s]` are the nodes that fired after write `steps[s]`, `ties[s]` what
    changed of each node's strongest tie to another segment's: `[node, other, times]`; `alive[s]` how many engrams there
    were then, None where the history does not say. Of more than `most` engrams those
    that fired most, and all of the last segment.
    """
    if found.kind != "memoria" or not found.state or not 0 < int(found.state["levels"].sum()) <= 2 * LARGEST:
        return None
    from mnemic.inspect.engrams import LEVELS, Moment, firings, ring

    moment = Moment.of(found.state)
    steps, fired, before = firings(found.state)
    counted = {record["number"]: record["alive"] for record in found.log.records() if record["alive"]}
    born = moment.born(moment.ids) + 1
    levels = np.repeat(np.array(LEVELS, dtype=object), moment.levels)
    total = fired[:, :-1].sum(1) + before.diagonal()
    chosen = np.sort(np.lexsort((-moment.ids, -total, born < moment.step))[:most])
    fired, before, born, levels, total = (
        fired[chosen],
        before[np.ix_(chosen, chosen)],
        born[chosen],
        levels[chosen],
        total[chosen],
    )
    place = ring(born, levels.tolist())
    count = before.astype(np.int64)
    apart = born[:, None] != born[None]
    strongest = np.zeros((len(chosen), 2), np.int64)
    ties: list[list[list[int]]] = []
    for step in range(len(steps)):
        now = np.zeros((len(chosen), 2), np.int64)
        there = np.where(apart, count, 0)
        # of equal ones the younger
        now[:, 0] = there.shape[1] - 1 - there[:, ::-1].argmax(1)
        now[:, 1] = np.take_along_axis(there, now[:, :1], 1)[:, 0]
        now[now[:, 1] == 0] = 0
        changed = np.flatnonzero((now != strongest).any(1))
        ties.append([[int(i), *map(int, now[i])] for i in changed])
        strongest = now
        count = count + np.outer(fired[:, step], fired[:, step])
    nodes = [
        {
            "id": int(moment.ids[slot]),
            "born": int(born[node]),
            "level": str(levels[node]),
            "fired": int(total[node]),
            "x": round(float(place[node, 0]), 4),
            "y": round(float(place[node, 1]), 4),
        }
        for node, slot in enumerate(chosen.tolist())
    ]
    lit = [np.flatnonzero(fired[:, step]).tolist() for step in range(len(steps))]
    alive = [counted.get(step) for step in steps]
    left_out = len(moment.ids) - len(nodes)
    return {"steps": steps, "nodes": nodes, "fired": lit, "ties": ties, "alive": alive, "left_out": left_out}
