"""Tables of recall: how many facts a memory still has, by where they stood and what came after them."""

from __future__ import annotations

from collections.abc import Sequence

from mnemic.analysis.markdown import markdown, merged, missing, provenance, spread
from mnemic.bench.recall import KINDS, UNBOUND, Places, asked_for, places_of
from mnemic.bench.results import Record, Score
from mnemic.bench.significance import LEVEL, evidence

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
        scores = [_score(here[kind], marked=True) if kind in here else "-" for kind in KINDS]
        old = spread([s.details["old"] for s in here.get("corrected facts", [])])
        cells.append([*place, *scores, old, f"{100 * max(_highest(scores) for scores in here.values()):.1f}"])
    header = ["filler before", "filler after", "one segment, %", "first of two", "second of two"]
    header += ["corrected: the new value", "the old value", "highest control"]
    return markdown(header, cells) + "\n" + _note(found)


def full(found: Sequence[Record]) -> str:
    """Every kind of question at every place beside the controls, those that never differ as one, and what is right
    without binding. Where every answer is that of a row above, in all seeds, there is no row.
    """
    if not found:
        return missing("this task")
    controls = list(found[0].scores[0].controls)
    groups, again = _different(grouped(found))
    beside = merged({name: [spread([s.controls[name] for s in each]) for each in groups.values()] for name in controls})
    rows = []
    for number, ((places, kind), scores) in enumerate(groups.items()):
        row = [kind, *_filler(places), f"{scores[0].tokens:,}", _score(scores, marked=True)]
        row += [cells[number] for cells in beside.values()]
        rows.append([*row, spread([s.floors[UNBOUND] for s in scores])])
    header = ["asked for", "filler before", "between", "after", "tokens", "with memory, %", *beside, UNBOUND]
    said = f"\nLeft out, since every answer is that of a row above: {'; '.join(again)}.\n" if again else ""
    return markdown(header, rows) + "\n" + said + _note(found)


def _different(groups: Groups) -> tuple[Groups, list[str]]:
    """Those groups whose answers with the own memory are not all those of one before, and what the others are."""
    left, again = {}, []
    known: set[tuple[str, ...]] = set()
    for (places, kind), scores in groups.items():
        answers = (kind, *(score.outcomes.get("memory", "") for score in scores))
        if all(answers) and answers in known:
            before, _, after = _filler(places)
            again.append(f"{kind} with {before} of filler before and {after} after")
        else:
            left[places, kind] = scores
        known.add(answers)
    return left, again


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


def _score(scores: Sequence[Score], marked: bool = False) -> str:
    said, test = spread([score.score for score in scores]), evidence(scores) if marked else None
    return f"**{said}**" if test is not None and test.stands else said


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
        f"\nBold is evidence of a memory: better than with another stream's memory, and above the best floor, each at "
        f"{100 * LEVEL:.0f} %. {provenance(found)} "
        f"Made by `{first.command}`; seeds {seeds}; {where}; mean and, in brackets, least and most over seeds."
    )
