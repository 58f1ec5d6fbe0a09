"""Blocks of even length or events by surprise: which cut of what is kept leaves more attention in a budget of tokens.

EM-LLM (arXiv 2407.09450) cuts a text where a token surprises the model, -log p(x_t | what was before) above mean +
gamma x deviation of the `PAST` tokens before it, and moves each cut between its neighbours to where keys are least
alike (modularity). Recall cuts every `unit` tokens. Here both choose for the same questions to the same documents:
events are scored by the mass that recall scores blocks by, those of most mass a token are taken until the budget is
full, and of the attention that a base with everything in its window would pay to all that is kept (keys at their true
distances) the share that falls on what is chosen is told. Gamma is such that events are as long as blocks on average.

    python benchmarks/recall_events.py --data novels.tar.xz --out results
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import hold_out
from mnemic.bench.results import Record, records
from mnemic.memories.recall import RecallConfig
from mnemic.memory import Asked, Further, Site
from mnemic.tasks.documents import novels
from real_model import opened
from recall_blocks import Case, drawn, read

PAST = 128
"""Tokens whose surprise a token's is compared with."""
SIZES = (8, 16, 32)
"""Tokens of a block, and of an event on average."""
CUTS = ("even", "surprise", "surprise, refined")
LONGEST = 8
"""Times the average that an event is long at most."""


def main(
    data: Annotated[Path | None, typer.Option(help="Text: a folder or a tar archive of .txt files.")] = None,
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    length: Annotated[int, typer.Option(help="Tokens of a document.")] = 4096,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    budgets: Annotated[str, typer.Option(help="Kept tokens that may be attended to, by commas.")] = "128,256,512",
    seed: Annotated[int, typer.Option(help="Draws the documents.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs"),
) -> None:
    """Compares the cuts and writes a record."""
    if data is None:
        raise typer.BadParameter("give --data, a text")
    host, tokenizer, name = opened(model)
    texts, _ = hold_out(novels(data), 0.3)
    told, cases = drawn(tokenizer, texts, length, documents, seed)
    config = {"length": length, "documents": documents, "sizes": SIZES, "past": PAST}
    record = Record("recall-events", "recall", f"{name}, untrained", seed, config)
    record.measures = measured(host, told, cases, [int(budget) for budget in budgets.split(",")])
    record.command = (
        f"python benchmarks/recall_events.py --data {data.name} --length {length} --documents {documents} "
        f"--budgets {budgets} --seed {seed}"
    )
    print(record.save(out, "recall-events.json"))


@torch.no_grad()
def measured(host: Any, told: list[Tensor], cases: list[Case], budgets: list[int]) -> dict[str, Any]:
    """Of every cut, size and budget the share of attention."""
    surprises = [surprise(host, ids) for ids in track(told, "surprise")]
    attachment = mnemic.attach(host, RecallConfig())
    sessions = read(host, told)
    memory: Any = attachment.memory
    plain, found = memory.further, defaultdict(list)
    for case in track(cases, "choosing"):

        def look(site: Site, asked: Asked, case: Case = case) -> Further | None:
            compare(memory, asked, surprises[case.document], budgets, found)
            return plain(site, asked)

        session = sessions[case.document].fork()
        session.forward(case.question)
        memory.further = look
        try:
            session.forward(case.answer[:, :-1])
        finally:
            memory.further = plain
    return {name: round(sum(shares) / len(shares), 4) for name, shares in sorted(found.items())}


def surprise(host: Any, ids: Int[Tensor, "1 t"]) -> Float[Tensor, " t"]:
    """-log p of each token given all before it, in nats; 0 for the first."""
    nats = torch.zeros(ids.shape[1])
    hidden = host.get_decoder()(input_ids=ids).last_hidden_state[0]
    for begin in range(0, len(hidden) - 1, 256):
        logits = host.lm_head(hidden[begin : begin + 256]).float()
        wanted = ids[0, begin + 1 : begin + 257]
        nats[begin + 1 : begin + 257] = torch.nn.functional.cross_entropy(
            logits[: len(wanted)], wanted, reduction="none"
        )
    return nats


def compare(
    memory: Any,
    asked: Asked,
    nats: Float[Tensor, " t"],
    budgets: list[int],
    found: dict[str, list[float]],
) -> None:
    """Adds what each cut would leave of the attention of one block."""
    bank, config = asked.bank, memory.config
    count, sinks = bank.length, config.sinks
    keys_kns = torch.cat(bank.keys(asked.place), 1).float()
    far_kgts = memory._far(asked).unflatten(0, (bank.heads, -1)) * asked.scale
    guess_kgtn = (far_kgts @ keys_kns[:, None].mT).softmax(-1)
    line = asked.turn(keys_kns, torch.arange(asked.first - count, asked.first))
    true_kgtn = (asked.turned_hts.unflatten(0, (bank.heads, -1)) * asked.scale @ line[:, None].mT).softmax(-1)
    total = likeness(keys_kns)
    for size in SIZES:
        cuts = {"even": torch.arange(sinks, count, size)}
        cuts["surprise"] = events(nats[bank.positions], sinks, size)
        cuts["surprise, refined"] = refined(total, cuts["surprise"])
        for name in CUTS:
            label_n = torch.zeros(count, dtype=torch.long)
            label_n[cuts[name]] = 1
            label_n = label_n.cumsum(0)  # 0 are the sinks
            for budget in budgets:
                chosen_ktn = choice(guess_kgtn, label_n, budget)
                seen = true_kgtn * chosen_ktn[:, None]
                found[f"{name}, {size} tokens, budget {budget}"].append(float(seen.sum() / true_kgtn.sum()))


def choice(guess_kgtn: Tensor, label_n: Int[Tensor, " n"], budget: int) -> Tensor:
    """Which tokens `[k, t, n]` are chosen: the sinks, and the blocks of most mass a token that fit into the budget."""
    heads, _, time, _ = guess_kgtn.shape
    blocks = int(label_n.max()) + 1
    mass = torch.zeros(*guess_kgtn.shape[:3], blocks).index_add_(3, label_n, guess_kgtn).amax(1)
    size_b = torch.bincount(label_n, minlength=blocks)
    order = (mass / size_b)[..., 1:].argsort(-1, descending=True) + 1
    taken = size_b[order].cumsum(-1) <= budget
    keep = torch.zeros(heads, time, blocks, dtype=torch.bool).scatter_(2, order, taken)
    keep[..., 0] = True
    return keep[..., label_n]


def events(nats: Float[Tensor, " n"], first: int, size: int) -> Int[Tensor, " e"]:
    """Where events begin, from `first` on: as many as there are blocks of `size`, or as few more as gamma allows."""
    past = torch.nn.functional.pad(nats, (PAST, 0), mode="constant", value=float(nats.mean())).unfold(0, PAST, 1)[:-1]
    mean, deviation = past.mean(1), past.std(1).clamp_min(1e-6)
    excess = (nats - mean) / deviation
    low, high = float(excess.min()), float(excess.max())
    begin = excess.new_zeros(0, dtype=torch.long)
    for _ in range(40):  # gamma by halving
        gamma = (low + high) / 2
        begin = _bounded((excess > gamma).nonzero().flatten(), first, len(nats), LONGEST * size)
        low, high = (gamma, high) if len(begin) > (len(nats) - first) / size else (low, gamma)
    return begin


def _bounded(begin: Tensor, first: int, count: int, longest: int) -> Tensor:
    """With further cuts in what would be longer than `longest`."""
    found, ends = [], [*begin[begin > first].tolist(), count]
    last = first
    for end in ends:
        found += range(last, end, longest)
        last = end
    return torch.tensor(found)


def likeness(keys_kns: Float[Tensor, "k n s"]) -> Float[Tensor, "n1 n1"]:
    """Sums over the first rows and columns of how much alike keys are: the cosine, of all heads on average, or 0 where
    it is less.
    """
    unit = torch.nn.functional.normalize(keys_kns, dim=-1)
    like = (unit @ unit.mT).mean(0).clamp_min(0)
    return torch.nn.functional.pad(like.double().cumsum(0).cumsum(1), (1, 0, 1, 0))


def refined(total: Float[Tensor, "n1 n1"], begin: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    """Each cut between its neighbours where the two events on its sides are of the greatest modularity."""

    def within(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """The sum over rows a to b and columns c to d."""
        return total[b, d] - total[a, d] - total[b, c] + total[a, c]

    cuts, ends = begin.tolist(), [*begin.tolist()[1:], len(total) - 1]
    for i in range(1, len(cuts)):
        start, stop = cuts[i - 1], ends[i]
        split = torch.arange(start + 1, stop)
        low, high = torch.full_like(split, start), torch.full_like(split, stop)
        all_of_it = within(low, high, low, high).clamp_min(1e-12)
        left, right = within(low, split, low, split), within(split, high, split, high)
        mixed_left, mixed_right = within(low, split, low, high), within(split, high, low, high)
        worth = (left + right) / all_of_it - (mixed_left / all_of_it) ** 2 - (mixed_right / all_of_it) ** 2
        cuts[i] = int(split[worth.argmax()])
    return torch.tensor(cuts)


def table(found: Sequence[Record]) -> str:
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


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"recall-events": table(records(results, "recall-events"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
