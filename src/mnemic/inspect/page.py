"""A session's contents as one page that stands alone: no network, nothing executed but the script that is written here.

What was read is somebody's text, and a file may come from anywhere. So values enter the page as JSON in which no
character can end the element it stands in, the script makes text of them and never markup, and the page's own policy
lets no other script and no request through, by the hashes of the two that it has.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from mnemic.inspect import inside
from mnemic.inspect.inside import Contents, Group, Words

MOST = 256
"""Rows and columns of the heat map; of more every second, third or so is shown."""
DIGITS = {"age": 0, "lifespan": 1, "fired": 0, "attention": 2, "usage": 2}
"""Digits behind the point in the columns that a group may have."""


def values(found: Contents, words: Words | None = None) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    told = inside.written(found, words)
    groups = inside.groups(found)
    valid = found.rest.get("window.valid")
    history = found.log.records()
    places = set(told) if not groups else {place for group in groups for place in group.ids}
    result = {
        "name": found.name,
        "title": found.title,
        "kind": found.kind,
        "base": found.meta.get("base_model"),
        "saved": found.saved,
        "seen": found.ledger("seen"),
        "waiting": found.ledger("counts"),
        "written": found.ledger("written"),
        "segment": found.meta["memory"]["segment_length"],
        "window": found.meta.get("window"),
        "sinks": found.meta.get("sinks", 0),
        "held": int(valid.sum()) if valid is not None else 0,
        "bytes": found.bytes,
        "text": words is not None,
        "share": "of the memory",
        "history": [
            {
                **{name: record[name] for name in ("number", "first", "last", "time")},
                "left": sum(each["left"] for each in record["places"] if each["place"] in places) / max(1, len(places)),
            }
            for record in history
        ],
        "groups": [_group(found, group, told) for group in groups],
        "written_into": [{"name": f"head {place}", "written": told[place]} for place in sorted(told)],
        "graph": inside.graph_over_time(found),
        "queues": inside.queues(found),
        "matrices": inside.matrices(found),
        "tensors": inside.tensors(found),
        "settings": inside.settings(found),
        "fingerprints": {"base": found.meta.get("base_fingerprint"), "memory": found.meta.get("memory_fingerprint")},
    }
    return _finite(result)


def _group(found: Contents, group: Group, told: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    rows = [
        {
            "id": place,
            "label": label,
            "norm": norm,
            "nearest": nearest,
            "age": inside.mean_age(found, told.get(place, [])),
            "values": {name: column[i] for name, column in group.columns.items()},
            "written": told.get(place, []),
        }
        for i, (place, label, norm, nearest) in enumerate(
            zip(group.ids, group.labels, group.norms, group.nearest, strict=True)
        )
    ]
    return {
        "name": group.name,
        "unit": group.unit[0],
        "units": group.unit[1],
        "of": group.name.removeprefix(group.unit[1]).strip(),
        "width": group.vectors.shape[1],
        "directions": group.directions,
        "columns": [{"name": name, "digits": DIGITS.get(name)} for name in group.columns],
        "order": "fired" if "fired" in group.columns else "number",
        "rows": rows,
        "similarity": _similarity(group),
    }


def _similarity(group: Group) -> dict[str, Any] | None:
    """Cosines in hundredths, a signed byte each."""
    if len(group.ids) < 2:
        return None
    cosine = group.cosine
    upper = torch.triu_indices(len(cosine), len(cosine), 1)
    pairs = cosine[upper[0], upper[1]]
    i, j = (int(side[int(pairs.argmax())]) for side in upper)
    labels = [group.labels[place] for place in group.compared]
    chosen = torch.arange(0, len(cosine), math.ceil(len(cosine) / MOST))
    hundredths = (100 * cosine[chosen][:, chosen]).nan_to_num().round().to(torch.int8)
    return {
        "values": base64.b64encode(hundredths.numpy(force=True).tobytes()).decode(),
        "labels": [labels[place] for place in chosen.tolist()],
        "mean": float(pairs.mean()),
        "most": [labels[i], labels[j], float(pairs.max())],
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN: None stands in its place."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(shown: dict[str, Any]) -> str:
    """The page."""
    files = importlib.resources.files("mnemic.inspect")
    page, style, graph, script = (
        (files / name).read_text("utf-8") for name in ("page.html", "page.css", "page_graph.js", "page.js")
    )
    script = graph + script
    parts = {
        "title": html.escape(f"{shown['name']}: {shown['title']}"),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": embedded(shown),
    }
    # one pass, so that what is put in is never searched for places itself
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def embedded(shown: Any) -> str:
    """JSON that may stand in an HTML element: none of its characters can open or end one."""
    text = json.dumps(shown, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(found: Contents, path: str | os.PathLike[str], words: Words | None = None) -> Path:
    """Writes the page, whole or not at all."""
    path = Path(path)
    text = render(values(found, words))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path
