"""The tables of Memoria's page, from its result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mnemic.analysis.markdown import markdown, missing, spread
from mnemic.bench.results import Record, records


def tables(results: Path) -> dict[str, str]:
    """Every table of the page by name."""
    found = records(results)

    def of(prefix: str) -> list[Record]:
        return [record for record in found if record.task.startswith(prefix)]

    makers: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
        "memoria-sorting": ("sorting", sorting),
        "memoria-language": ("novels-", language),
        "memoria-language-positions": ("novels-", positions),
        "memoria-classification": ("hyperpartisan", classification),
        "memoria-rules": ("memoria-engrams", rules),
        "memoria-step": ("memoria-step-", step),
        "memoria-growth": ("memoria-growth", growth),
        "memoria-graph": ("memoria-graph", graph),
        "memoria-endless": ("memoria-endless-", endless),
        "memoria-overhead": ("overhead-memoria", overhead),
    }
    return {name: make(of(prefix)) if of(prefix) else missing(name) for name, (prefix, make) in makers.items()}


def sorting(found: Sequence[Record]) -> str:
    """Sorting by frequency: memory, controls, ablations and floors."""
    columns = [(record, score) for record in found for score in record.scores]
    titles = {"sorting": "paper's rules", "sorting-extended": "extended"}
    header = ["right symbols, %"]
    for record, score in columns:
        seed = f", seed {record.seed}" if sum(r.task == record.task for r in found) > 2 else ""
        header.append(f"{titles[record.task]}, {score.length} segments{seed}")
    rows = [["**memory**", *(f"**{100 * score.score:.1f}**" for _, score in columns)]]
    for kind in ("controls", "floors"):
        names = list(dict.fromkeys(name for _, score in columns for name in getattr(score, kind)))
        for name in names:
            cells = [getattr(score, kind).get(name) for _, score in columns]
            mark = "*" if kind == "floors" else ""
            rows.append([f"{mark}{name}{mark}", *("-" if cell is None else f"{100 * cell:.1f}" for cell in cells)])
    minutes = [f"{(record.seconds['base'] + record.seconds['training']) / 60:.0f}" for record, _ in columns]
    rows.append(["training, minutes", *minutes])
    commands = dict.fromkeys(record.command.split(" --out")[0] for record in found)
    return markdown(header, rows) + (
        "\n\nSegments of 256 symbols, teacher-forced; floors in italics. *working memory* and *working and short-term "
        "memory* are the same weights with the rest not reminded, *rule* the same weights reminded by another rule. "
        "Made by " + ", ".join(f"`{command}`" for command in commands) + "."
    )


def language(found: Sequence[Record]) -> str:
    """Bits a byte on held-out novels under every condition, and by how much the controls are above the memory."""
    rows = []
    for record in found:
        m = record.measures
        for name, bits in m["bits per byte"].items():
            above = m["above memory"].get(name)
            rows.append(
                [
                    "frozen" if record.task == "novels-frozen" else "from scratch",
                    str(record.seed),
                    f"**{name}**" if name == "memory" else name,
                    f"{bits:.4f}",
                    "" if above is None else f"{above['mean']:+.4f} ({above['low']:+.4f} to {above['high']:+.4f})",
                    "" if above is None else f"{above['documents']:.0f} of {above['of']:.0f}",
                ]
            )
    header = ["base", "seed", "condition", "bits a byte", "above the memory (95 %)", "novels where it is"]
    hosts = dict.fromkeys(record.host for record in found)
    commands = dict.fromkeys(record.command.split(" --seed")[0] for record in found)
    return markdown(header, rows) + (
        f"\n\nHeld-out novels of other authors than those trained on, read in order. Hosts: {'; '.join(hosts)}. "
        "Made by " + ", ".join(f"`{command}`" for command in commands) + "."
    )


def positions(found: Sequence[Record]) -> str:
    """The same by position in the document, means over seeds."""
    rows = []
    for task, title in (("novels-frozen", "frozen"), ("novels-scratch", "from scratch")):
        records = [record for record in found if record.task == task]
        if not records:
            continue
        for place, first in enumerate(records[0].scores):
            scores = [record.scores[place] for record in records]
            names = ("other document", "last segment", "no memory")
            cells = [sum(s.controls[name] - s.score for s in scores) / len(scores) for name in names]
            last = first.length + int(first.details["segments"]) - 1
            mean = sum(s.score for s in scores) / len(scores)
            rows.append([title, f"{first.length}-{last}", f"{mean:.4f}", *(f"{cell:+.4f}" for cell in cells)])
    header = ["base", "segment of the document", "memory", "other document", "last segment", "no memory"]
    return "By position: the memory's bits a byte, and by how much each control is above it, means over seeds.\n\n" + (
        markdown(header, rows)
    )


def classification(found: Sequence[Record]) -> str:
    """Hyperpartisan news: macro F1 and accuracy over seeds."""
    rows = []
    for name in found[0].measures["macro F1"]:
        f1, accuracy = ([record.measures[key][name] for record in found] for key in ("macro F1", "accuracy"))
        rows.append([name, spread(f1), spread(accuracy)])
    rows.append(["*most frequent class*", spread([r.scores[0].floors["most frequent class"] for r in found]), ""])
    command = found[0].command.split(" --out")[0]
    return markdown(["classifier", "macro F1, %", "accuracy, %"], rows) + (
        f"\n\n{found[0].host}; {len(found)} seeds, each its own split; mean and, in brackets, least and most. Made by "
        f"`{command}`."
    )


def rules(found: Sequence[Record]) -> str:
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


def step(found: Sequence[Record]) -> str:
    """Our step against the package's."""
    rows = []
    for record in sorted(found, key=lambda r: (r.config["working"], r.measures["batch"])):
        m = record.measures
        for rule, title in (("paper", "paper's rule"), ("seeds", "random starts")):
            ours, theirs = m[rule]["ours"], m[rule]["package"]
            rows.append(
                [
                    record.task.removeprefix("memoria-step-").rpartition("-")[0],
                    str(m["batch"]),
                    title,
                    f"{ours['engrams']:,}",
                    f"{ours['reminded long-term']:.0f} of {record.config['reminded_ltm']}",
                    f"{theirs['ms']:,.0f}",
                    f"{ours['ms']:,.1f}",
                    f"**{m[rule]['times faster']:.1f}**",
                    f"{m[rule]['times faster, distance']:.1f}",
                    f"1/{1 / m[rule]['graph bytes ratio']:,.0f}",
                    f"1/{1 / m[rule]['peak bytes ratio']:,.1f}",
                ]
            )
    header = ["setting", "batch", "reminding", "engrams", "long-term reminded", "package, ms", "ours, ms"]
    header += ["times faster", "with `distance`", "graph's bytes", "peak of memory"]
    machine = found[0].machine
    return markdown(header, rows) + (
        "\n\nMade by `mnemic bench memoria-step` with memoria-pytorch 1.1.0, "
        f"{machine['cores']} {machine['processor']} cores; medians of {found[0].measures['runs']} steps of the package "
        "and three times as many of ours. The package compares by mean distance; with `distance` we do the same."
    )


def growth(found: Sequence[Record]) -> str:
    """A step by the number of engrams."""
    m = found[0].measures
    rows = []
    for rule, title in (("paper", "paper's rule"), ("seeds", "random starts")):
        cells = [f"{row['ms']:.1f} ms at {row['engrams']:,}" for row in m[rule]["rows"]]
        rows.append([title, *cells, f"{m[rule]['exponent']:.2f}"])
    header = ["reminding", *(f"alpha {alpha:g}" for alpha in m["paper"]["alphas"]), "exponent"]
    return (
        "Time of a step by the number of engrams (longer lives, all else equal), and the power with which it grows:\n\n"
        + markdown(header, rows)
        + f"\n\nMade by `{found[0].command}`: width 256, batch 8."
    )


def graph(found: Sequence[Record]) -> str:
    """Three ways to keep counts."""
    m = found[0].measures
    titles = {"bits": "bits of who fired when (ours)", "table": "table of all pairs", "pairs": "list of pairs"}
    keys = ("add", "rows of 30", "rows of 350")
    rows = [
        [title, *(f"{m[name][key]:.1f}" for key in keys), f"{m[name]['bytes']:,}"] for name, title in titles.items()
    ]
    header = ["kept", "a step added, ms", "30 rows ten times, ms", "350 rows ten times, ms", "bytes"]
    return markdown(header, rows) + (
        f"\n\nMade by `{found[0].command}`: {m['engrams']:,} engrams, batch {m['batch']}, the paper's settings for "
        "language."
    )


def endless(found: Sequence[Record]) -> str:
    """One stream of very many steps."""
    rows = []
    for record in found:
        trail: list[dict[str, Any]] = record.measures["rows"]
        for point in [trail[0], *trail[max(0, len(trail) // 5 - 1) :: max(1, len(trail) // 5)]]:
            rows.append(
                [
                    record.task.removeprefix("memoria-endless-"),
                    f"{point['step']:,}",
                    f"{sum(point['levels']):,}",
                    f"{point['elders']:,}",
                    f"{point['oldest']:,}",
                    f"{point['state bytes']:,}",
                    f"{point['resident bytes'] / 2**20:.0f} MiB",
                    f"{point['ms']:.1f}",
                ]
            )
    header = ["rule", "step", "engrams", "of them elders", "age of the oldest", "state, bytes", "process", "ms a step"]
    return markdown(header, rows) + (
        "\n\nMade by `mnemic bench memoria-stream`: one row of width 64 on one core; the machine had other work, so "
        "times vary."
    )


def overhead(found: Sequence[Record]) -> str:
    """A forward pass with Memoria against without."""
    m = found[0].measures
    rows = []
    for name, values in m.items():
        if isinstance(values, dict):
            r = values["with memory / base"]
            rows.append(
                [
                    name,
                    f"**{r['median']:.3f}** ({r['least']:.3f}-{r['most']:.3f})",
                    f"{values['parameters'] / 1e6:.1f} M",
                    f"{values['state bytes a row']:,}",
                ]
            )
    header = ["reads", "with memory / base", "parameters", "bytes a session"]
    return markdown(header, rows) + (
        f"\n\nMade by `{found[0].command}`: forward of one segment, GPT-2-small shape, batch {m['batch']} x "
        f"{m['tokens']} tokens, after {m['segments before']} segments; median, least and most of paired runs."
    )
