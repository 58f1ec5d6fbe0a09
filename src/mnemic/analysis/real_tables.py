"""Tables of memories on a real model: needles, copying, and things that were told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record

STEPS = (20, 40, 60, 80, 100, 150, 200)
"""At which steps the curve of copying is shown."""


def copying(found: Sequence[Record]) -> str:
    """Nats by step, at the end on copies of text that was held out, and the controls; the best first."""
    if not found:
        return missing("copying")
    rows, steps = [], 0
    for record in sorted(found, key=lambda record: record.scores[0].score):
        score, curve = record.scores[0], dict(record.measures["nats by step"])
        steps = max(steps, record.config["steps"])
        rows.append(
            [
                f"`{record.mechanism}`" + ", bfloat16" * bool(record.config.get("bf16")),
                *(f"{curve[step]:.2f}" if step in curve else "" for step in STEPS),
                f"{score.score:.2f}",
                f"{100 * score.details['memory, right']:.1f} %",
                *(f"{score.controls[name]:.2f}" for name in ("other stream", "fresh", "no memory")),
                f"{record.state_bytes:,}",
                f"{record.measures['parameters'] / 1e6:.1f} M",
                f"{record.config['learning_rate']:g}",
                f"{record.seconds['training'] / 60:.0f}",
            ]
        )
    header = ["memory", *(f"step {step}" for step in STEPS), "held out", "right"]
    header += ["other stream", "fresh", "no memory", "bytes", "parameters", "rate", "minutes"]
    config = found[0].config
    note = f"Nats a token of the copy, {found[0].host}, segments of {config['segment_length']}, {config['rows']} rows "
    note += "a step: in training as the mean of ten steps, then on text that was held out. Made by "
    note += "`python benchmarks/copying.py NAME --data novels.tar.xz --out results`."
    return f"{markdown(header, rows)}\n\n{note}"


def needles(found: Sequence[Record]) -> str:
    """Numbers found again, over all depths: a row for each kind of needle and length, a column for each condition."""
    if not found:
        return missing("needles")
    rows, commands = [], []
    names = list(dict.fromkeys(name for record in found for score in record.scores for name in score.controls))
    for record in sorted(found, key=lambda record: (record.host, record.measures["kind"], "blocks" in record.config)):
        for length in dict.fromkeys(score.length for score in record.scores):
            scores = [score for score in record.scores if score.length == length]
            told = {name: "".join(score.outcomes.get(name, "") for score in scores) for name in ("memory", *names)}
            cells = [f"{100 * each.count('1') / len(each):.1f}" if each else "-" for each in told.values()]
            size = max(score.details["session bytes"] for score in scores) / 2**20
            shown = [
                record.config["model"],
                ", ".join([record.measures["kind"], *_unusual(record.config)]),
                f"{length:,}",
                len(told["memory"]),
                *cells,
                f"{size:,.0f}",
            ]
            rows.append([str(cell) for cell in shown])
        commands.append(f"`{record.command}`")
    header = ["model", "needle", "tokens", "questions", "own", *names, "MiB"]
    note = "Per cent of numbers answered by untrained models, needles at even distances from the start on. Made by "
    return f"{markdown(header, rows)}\n\n{note}{', '.join(dict.fromkeys(commands))}."


def _apart(record: Record, others: Sequence[Record]) -> list[str]:
    """The memory's settings in which records of one mechanism differ, where this one's says them."""
    own, settings = record.config["memory"], [other.config["memory"] for other in others]
    names = [name for name in own if any(each.get(name, own[name]) != own[name] for each in settings)]
    names += [name for name in own if any(name not in each for each in settings)]
    return [f"{name} {own[name]:g}" for name in names if own[name]]


def _unusual(config: dict[str, Any]) -> list[str]:
    """What decided a needle's answers beside the defaults."""
    found = [f"{len(few)} blocks"] if (few := config.get("blocks")) else []
    found += [config[name].removeprefix("torch.") for name in ("stored", "dtype") if name in config]
    if config["memory"].get("search") == "candidates":
        found.append("candidates" if config["memory"]["wider"] == 4 else "fewer candidates")
    # what was measured before there was a least had none
    found += [] if config["memory"].get("least", 0.0) else ["least 0"]
    return found + (["in files"] if "ram" in config else [])


def recall_blocks(found: Sequence[Record]) -> str:
    """What a few blocks recall, those first that attend to needles most."""
    if not found:
        return missing("blocks")
    config, rows = found[0].config, []
    every = max(score["bytes"] for score in found[0].measures["blocks"].values())
    for score in sorted(found[0].measures["blocks"].values(), key=lambda score: len(score["blocks"])):
        blocks, right = score["blocks"], f"{100 * score['right']:.1f}"
        names = "all" if score["bytes"] == every else ", ".join(map(str, blocks))
        rows.append([str(len(blocks)), names, right, f"{score['nats']:.2f}", f"{score['bytes'] / 2**20:.0f}"])
    note = f"Per cent of answers that would be said and nats of an answer, {config['kind']}, {config['documents']} "
    note += f"documents of {config['length']:,} tokens of other novels than those of needles, {found[0].host}. Made by "
    return f"{markdown(['blocks', 'which', 'right', 'nats', 'MiB'], rows)}\n\n{note}`{found[0].command}`."


def recall_events(found: Sequence[Record]) -> str:
    """How much attention even blocks and events leave in a budget."""
    if not found:
        return missing("events")
    record, table = found[0], defaultdict[tuple[int, str], dict[int, str]](dict)
    for name, share in record.measures.items():
        cut, size, budget = name.rsplit(", ", 2)
        table[int(size.split()[0]), cut][int(budget.split()[1])] = f"{100 * share:.1f}"
    budgets = sorted(next(iter(table.values())))
    rows = [[str(size), cut, *(row[budget] for budget in budgets)] for (size, cut), row in sorted(table.items())]
    note = "Per cent of the attention of a base with everything in its window, to what had left the window here, that "
    note += f"falls on what is chosen: five-depths, {record.config['documents']} documents of "
    note += f"{record.config['length']:,} tokens, mean over blocks and tokens of answers, {record.host}."
    header = ["tokens", "cut", *(f"budget {budget}" for budget in budgets)]
    return f"{markdown(header, rows)}\n\n{note} Made by `{record.command}`."


def lesson_speed(found: Sequence[Record]) -> str:
    """Seconds of a training step on told things, before and now."""
    if not found:
        return missing("the speed of lessons")
    rows = []
    for record in sorted(found, key=lambda record: record.config["segments"]):
        measures = record.measures
        for name, seconds in measures["seconds a step"].items():
            ratio = "" if name == "before" else f"{measures['before / now'][name]:.2f}"
            cells = [f"{seconds:.2f}", f"{measures['tokens a second'][name]:,.0f}", ratio]
            rows.append([str(record.config["segments"]), name, *cells])
    note = f"Medians; {found[0].config['rows']} streams of segments of 32 tokens and one that asks, fast weights on "
    note += f"{found[0].host}, one thread; before: commit {found[0].measures['commits']['before'][:7]}. Made by "
    note += ", ".join(f"`{record.command}`" for record in found)
    return f"{markdown(['segments', 'side', 'seconds a step', 'tokens a second', 'before / now'], rows)}\n\n{note}."


def recall_speed(found: Sequence[Record]) -> str:
    """A decoded token and reading as multiples of the base's, by what is remembered."""
    if not found:
        return missing("the speed of recall")
    measures, config = found[0].measures, found[0].config
    rows, names = [], next(iter(measures.values()))["processor / base"]
    for remembered, measured in measures.items():
        ratios = [measured["processor / base"], measured["clock / base"]]
        cells = [f"{ratios[0][name]:.2f} ({ratios[1][name]:.2f})" for name in names]
        reading = [f"{ratio:.2f}" for ratio in measured["reading"]["processor / base"].values()]
        rows.append([f"{int(remembered):,}", *cells, *reading])
    reads = next(iter(measures.values()))["reading"]["processor / base"]
    header = ["tokens remembered", *(f"a token, {name}" for name in names), *(f"reading, {name}" for name in reads)]
    note = f"Multiples of the base's time with the same window of {config['memory']['window']:,} and the memory off, "
    note += f"{found[0].host}, {config['threads']} thread; processor time, in brackets by the clock; medians of "
    note += f"{config['turns']} turns. Keys are those of {config['repeated']:,} tokens, again and again. Made by "
    return f"{markdown(header, rows)}\n\n{note}`{found[0].command}`."


def knn_lm(found: Sequence[Record]) -> str:
    """Bits a byte of second halves of novels with a kNN-LM that read the first, and how much the controls are above."""
    if not found:
        return missing("the kNN-LM")
    record, score = found[0], found[0].scores[0]
    rows = [["one rate", f"**{score.score:.4f}**", ""]]
    for name, bits in score.controls.items():
        above = "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**record.measures["nats above memory"][name])
        rows.append([name, f"{bits:.4f}", above])
    plain, sentinel = record.config["memory"], record.config["sentinel"]
    note = f"{score.examples:,} tokens, the second halves of {record.config['length']:,} tokens each of "
    note += f"{record.config['documents']} novels, {record.host}, window {plain['window']}, {plain['top_k']} entries. "
    note += f"Chosen on another novel: rate {plain['rate']} and temperature {plain['temperature']}; with a sentinel at "
    note += (
        f"{sentinel['sentinel']}, {sentinel['rate']} and {sentinel['temperature']}. In brackets 95 % of a bootstrap "
    )
    note += f"of blocks of 256 tokens. Made by `{record.command}`."
    return f"{markdown(['memory', 'bits a byte', 'nats a token above'], rows)}\n\n{note}"


def compact(found: Sequence[Record]) -> str:
    """Perplexity and what was found again with few keys in place of all that left the window, beside other ways."""
    if not found:
        return missing("compact")
    record, (told, asked) = found[0], found[0].scores
    own = next(iter(record.config["settings"]))
    above, rows = record.measures[f"nats above {own}"], []
    for name in (own, *asked.controls):
        perplexity, size = told.details.get(f"perplexity, {name}"), record.measures["bytes"].get(name)
        outcome = asked.outcomes["memory" if name == own else name]
        rows.append(
            [
                f"**{name}**" if name == own else name,
                "" if perplexity is None else f"{perplexity:.2f}",
                "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**above[name]) if name in above else "",
                f"{outcome.count('1')} of {len(outcome)}",
                "" if not size else f"{size / 2**20:.1f}",
            ]
        )
    config = record.config
    count = f"{config['documents']} document{'s' if config['documents'] > 1 else ''}"
    note = f"{count} of {config['length']:,} tokens of novels in which five things are told, "
    note += f"{record.host}, window {config['window']}; perplexity of {told.examples:,} tokens behind the first "
    note += f"{2 * config['window']:,}; in brackets 95 % of a bootstrap of blocks of {config['block']} tokens. MiB are "
    note += f"those of the memory, and for everything in the window of its keys. Made by `{record.command}`."
    header = ["what is kept", "perplexity", f"nats a token above {own}", "found again", "MiB"]
    return f"{markdown(header, rows)}\n\n{note}"


def window_sinks(found: Sequence[Record]) -> str:
    """Perplexity of a novel in windows with sinks, without, and with all keys recomputed."""
    if not found:
        return missing("sinks")
    score, config = found[0].scores[0], found[0].config
    start = "perplexity, "
    rows = [[name.removeprefix(start), f"{value:.2f}"] for name, value in score.details.items() if start in name]
    note = f"Perplexity of {score.examples:,} tokens of a novel behind the first window, {found[0].host} without a "
    note += f"memory, windows of {config['window']}, segments of {config['segment_length']}. Recomputed: the base "
    note += f"alone, on the window's tokens anew for every segment. Made by `{found[0].command}`."
    return f"{markdown(['window', 'perplexity'], rows)}\n\n{note}"


def _begun(config: dict[str, Any]) -> str:
    """The steps of the run that another one began with, as `800 + `."""
    if not (before := config.get("begin")):
        return ""
    return _begun(before) + f"{sum(lesson['steps'] for lesson in before['lessons']):,} + "


def told(found: Sequence[Record]) -> str:
    """Whole values right, one row for each question of each run."""
    if not found:
        return missing("told things")
    rows, commands = [], []
    names = list(dict.fromkeys(name for record in found for name in record.scores[0].controls))
    floors = found[0].scores[0].floors
    for record in sorted(found, key=lambda record: -record.scores[0].score):
        others = [other for other in found if other.mechanism == record.mechanism]
        for score in record.scores:
            shown = [score.score, *(score.controls.get(name) for name in names), *score.floors.values()]
            rows.append(
                [
                    ", ".join([f"`{record.mechanism}`", *_apart(record, others)]),
                    f"{score.details['facts']:.0f}",
                    f"{'1 to ' if score.length < 64 else ''}{score.length}",
                    "new" if score.details["held-out relations"] else "known",
                    *("-" if value is None else f"{100 * value:.1f}" for value in shown),
                    _begun(record.config) + f"{record.measures['loss'][-1][0]:,}",
                    f"{record.seconds['training'] / 60:.0f}",
                ]
            )
        commands.append(f"`{record.command}`")
    header = ["memory", "facts", "segments", "relations", "own", *names, *floors, "steps", "minutes"]
    note = f"Per cent of whole values right, {found[0].scores[0].examples} questions a row; names, values, wordings "
    note += "and text that training did not have. Made by " + ", ".join(dict.fromkeys(commands)) + "."
    return f"{markdown(header, rows)}\n\n{note}"
