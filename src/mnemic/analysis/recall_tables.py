"""Tables of recall: how many facts a memory still has, by where they stood and what came after them."""

from __future__ import annotations

from collections.abc import Sequence

from mnemic.analysis.markdown import markdown, missing, spread
from mnemic.bench.recall import KINDS, UNBOUND, Places, asked_for, places_of
from mnemic.bench.results import Record, Score

Groups = dict[tuple[Places, str], list[Score]]


def grouped(found: Sequence[Record]) -> Groups:
    """The scores over seeds of every kind of question at every place, in the order they were measured."""
    groups: Groups = {}
    for score in (score for record in found for score in record.scores):
        groups.setdefault((places_of(score), asked_for(score)), []).append(score)
    return groups


def short(found: Sequence[Record]) -> str:
    """A row for every amount of filler: what is right of each kind of question, and the highest control among them."""
    if not found:
        return missing("this task")
    rows: dict[tuple[str, str], dict[str, list[Score]]] = {}
    for (places, kind), scores in grouped(found).items():
        if kind in KINDS:
            before, _, after = _filler(places)
            rows.setdefault((before, after), {})[kind] = scores
    cells = []
    for place, here in rows.items():
        scores = [f"**{_score(here[kind])}**" if kind in here else "-" for kind in KINDS]
        old = spread([s.details["old"] for s in here.get("corrected facts", [])])
        cells.append([*place, *scores, old, f"{100 * max(_highest(scores) for scores in here.values()):.1f}"])
    header = ["filler before", "filler after", "one segment, %", "first of two", "second of two"]
    header += ["corrected: the new value", "the old value", "highest control"]
    return markdown(header, cells) + "\n" + _note(found)


def full(found: Sequence[Record]) -> str:
    """Every kind of question at every place beside every control, and what is right without binding."""
    if not found:
        return missing("this task")
    controls = list(found[0].scores[0].controls)
    rows = []
    for (places, kind), scores in grouped(found).items():
        row = [kind, *_filler(places), f"{scores[0].tokens:,}", f"**{_score(scores)}**"]
        row += [spread([s.controls[name] for s in scores]) for name in controls]
        rows.append([*row, spread([s.floors[UNBOUND] for s in scores])])
    header = ["asked for", "filler before", "between", "after", "tokens", "with memory, %", *controls, UNBOUND]
    return markdown(header, rows) + "\n" + _note(found)


def claims(found: Sequence[Record]) -> str:
    """The whitepaper's four claims as numbers: correctness, directness, conciseness, consistency."""
    if not found:
        return missing("this task")
    rows, means = [], []
    for (places, kind), scores in grouped(found).items():
        if kind != "facts":
            continue
        before, _, after = _filler(places)
        details = [score.details for score in scores]
        means.append([score.score for score in scores])
        rows.append(
            [
                *(before, after, _score(scores)),
                spread([each["margin_nats"] for each in details], 1, 2),
                spread([each["found_in_8_tokens"] for each in details]),
                spread([each["tokens_until_value"] for each in details if "tokens_until_value" in each], 1, 2),
            ]
        )
    spreads = [max(seed) - min(seed) for seed in zip(*means, strict=True)]
    header = ["filler before", "after", "exact, %", "margin, nats", "found in 8 tokens, %", "tokens until the value"]
    return markdown(header, rows) + f"\n\nConsistency: the score moves by {spread(spreads)} points over these places."


def _filler(places: Places) -> tuple[str, str, str]:
    """Segments of filler before, between and after, as cells."""
    if places.anywhere:
        return "any", "any", "any"
    return f"{places.before:,}", f"{places.between:,}" if places.segments > 1 else "-", f"{places.after:,}"


def _score(scores: Sequence[Score]) -> str:
    return spread([score.score for score in scores])


def _highest(scores: Sequence[Score]) -> float:
    return max(sum(score.controls[name] for score in scores) / len(scores) for name in scores[0].controls)


def _note(found: Sequence[Record]) -> str:
    """What else is known of all scores, and where they are from."""
    first, machine = found[0], found[0].machine
    scores = [score for record in found for score in record.scores]
    means = {
        name: [sum(s.floors[name] for s in group) / len(group) for group in grouped(found).values()]
        for name in scores[0].floors
    }
    floors = "; ".join(
        f"{name} {100 * min(each):.1f}" + (f" to {100 * max(each):.1f}" if max(each) - min(each) > 5e-4 else "")
        for name, each in means.items()
    )
    ceilings = [score.ceiling for score in scores if score.ceiling is not None]
    examples = sorted(score.examples for score in scores)
    seeds = ", ".join(str(record.seed) for record in found)
    where = machine["accelerator"] or f"{machine['cores']} {machine['processor']} cores"
    return (
        f"\nFloors: {floors}. Ceiling, everything in one window without a memory: {spread(ceilings)}. "
        f"{examples[0]:,} to {examples[-1]:,} questions a cell and seed. "
        f"Training: {spread([record.seconds['training'] / 60 for record in found], 1)} minutes.\n"
        f"\nMade by `{first.command}`; seeds {seeds}; {where}; mean and, in brackets, least and most over seeds."
    )
