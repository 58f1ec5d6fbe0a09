"""Tables for the documentation, made from result files. Text between `<!-- table:NAME -->` and `<!-- /table -->` is
replaced; nobody types a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.analysis import (
    capacity,
    drift,
    memoria_tables,
    peers,
    real_tables,
    recall_tables,
    store_tables,
    suite_tables,
    tasks_tables,
)
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.memories import CONFIGS

BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def fill(path: Path, tables: dict[str, str], *, write: bool = True) -> bool:
    """Fills the tables of one file; returns whether it changes. Raises `KeyError` for a table nobody makes."""
    text = path.read_text()

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match['name']]}\n\n{match[3]}"

    filled = BLOCK.sub(table, text)
    if write and filled != text:
        path.write_text(filled)
    return filled != text


def tables(results: Path) -> dict[str, str]:
    """Every table that can be made from a folder of results, by name."""
    made = {"mechanisms": mechanisms()}
    for task in ("recall-symbols", "recall-language"):
        found = records(results, task)
        made |= {task: recall_tables.short(found), f"{task}-full": recall_tables.full(found)}
        made[f"{task}-claims"] = recall_tables.claims(found)
    made["overhead"] = overhead([r for r in records(results) if r.task in ("overhead-segment", "overhead-token")])
    made["naive"] = naive(records(results, "naive-token"))
    made["stream"] = endless(records(results, "endless-stream"))
    made["capacity"] = capacity.table(records(results, "capacity"))
    made["capacity-earlier"] = capacity.table_of_earlier(records(results, "capacity"))
    made["peers"] = peers.table(records(results, "peers"))
    made["peers-pairs"] = peers.table_of_pairs(records(results, "peers"))
    made["drift"] = drift.table(records(results, "drift"))
    made["store-cost"] = store_tables.cost(records(results, "store"))
    made["kept"] = store_tables.kept(records(results, "kept"))
    made["store-crowds"] = store_tables.crowds(records(results, "store"))
    made["mutated-files"] = store_tables.mutated(records(results, "mutated-files"))
    made["needles"] = real_tables.needles(records(results, "needles"))
    made["compact"] = real_tables.compact(records(results, "compact"))
    made["recall-blocks"] = real_tables.recall_blocks(records(results, "recall-blocks"))
    made["recall-events"] = real_tables.recall_events(records(results, "recall-events"))
    made["recall-speed"] = real_tables.recall_speed(records(results, "recall-speed"))
    made["window-sinks"] = real_tables.window_sinks(records(results, "window-sinks"))
    made["knn-lm"] = real_tables.knn_lm(records(results, "knn-lm"))
    made["copying"] = real_tables.copying(records(results, "copying"))
    made["lesson-speed"] = real_tables.lesson_speed(records(results, "lesson-speed"))
    made["told"] = real_tables.told(records(results, "told"))
    made["zero-shot"] = zero_shot(records(results, "zero-shot"))
    return made | memoria_tables.tables(results) | suite_tables.tables(results) | tasks_tables.tables(results)


def mechanisms() -> str:
    """What is implemented."""
    rows = []
    for kind, config in sorted(CONFIGS.items()):
        card = config.card
        rows.append([f"`{kind}`", card.title, card.seam, card.trains, card.bytes_law, card.paper])
    return markdown(["kind", "mechanism", "seam", "trains", "bytes a session", "source"], rows)


def overhead(found: Sequence[Record]) -> str:
    """Time beside the base's forward."""
    if not found:
        return missing("the overhead")
    rows = []
    for record in found:
        m = record.measures

        def show(name: str, m: dict[str, Any] = m) -> str:
            r = m[name]
            return f"{r['median']:.3f} ({r['least']:.3f}-{r['most']:.3f})"

        rows.append(
            [
                record.task.removeprefix("overhead-"),
                f"{m['batch']} x {m['tokens']}",
                show("with memory / base"),
                show("memory alone / base"),
                f"{m['parameters'] / 1e6:.1f} M",
                f"{m['session bytes at a segment' + chr(39) + 's end']:,}",
                record.machine["accelerator"] or f"{record.machine['cores']} cores",
            ]
        )
    header = [
        "setting",
        "batch x tokens",
        "with memory / base",
        "memory alone / base",
        "parameters",
        "bytes",
        "machine",
    ]
    return markdown(header, rows) + "\n\nMade by `mnemic bench overhead`: median, least and most of paired runs."


def naive(found: Sequence[Record]) -> str:
    """Fast against naive."""
    if not found:
        return missing("the comparison")
    rows = [[name, f"{value:.1e}"] for name, value in found[0].measures["largest difference"].items()]
    return markdown(["tensor", "largest difference to the plain loops"], rows)


def endless(found: Sequence[Record]) -> str:
    """What a stream without end holds along the way."""
    if not found:
        return missing("the stream")
    trail = found[0].measures["trail"]
    rows = [
        [f"{p['tokens']:,}", f"{p['session_bytes']:,}", f"{(p['resident_bytes'] or 0) / 2**20:.0f} MiB"]
        for p in trail[:: max(1, len(trail) // 6)]
    ]
    m = found[0].measures
    note = (
        f"\n{m['tokens']:,} tokens in {m['calls']:,} calls, {m['calls with finite logits']:,} with finite logits; "
        f"state finite at the end: {m['state finite']}. Made by `{found[0].command}`."
    )
    return markdown(["tokens read", "session bytes", "process"], rows) + "\n" + note


def zero_shot(found: Sequence[Record]) -> str:
    """What an untrained memory with random projections does."""
    if not found:
        return missing("the zero-shot mode")
    rows = [[name, f"{value:.4f}"] for name, value in found[0].measures["bits per token"].items()]
    return markdown(["condition", "bits per token"], rows) + f"\n\nMade by `{found[0].command}`."
