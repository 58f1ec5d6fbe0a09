"""Recall of facts: pairs of symbols, or who has what in real text, asked for behind any amount of filler.

python benchmarks/recall_facts.py symbols --out results
python benchmarks/recall_facts.py language --model smollm2 --filler FILE.txt --out results
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemic.analysis import recall_tables
from mnemic.analysis.curves import recall_curve
from mnemic.bench.results import records
from mnemic.bench.settings import language_experiment, symbols_experiment
from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import Show
from scripts import Checkpoints, Out, Seeds, launch, numbers, saved, today

Lengths = Annotated[str, typer.Option(help="Filler before, between and after facts, in segments: 0,1,8.")]
Far = Annotated[int, typer.Option(min=0, help="Segments of filler before the facts alone, and after them alone.")]
PICTURES = {
    "recall-symbols": ("recall.png", "EMT on a frozen GPT-2 with a window of 32 tokens"),
    "recall-language": ("recall-language.png", "EMT on a frozen Llama of 260K parameters, window of 64 tokens"),
}
"""The file and the title of each task's picture."""

app = typer.Typer(add_completion=False, no_args_is_help=True)


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name: of each task a short one, all of it, and the whitepaper's claims."""
    made = {}
    for task in PICTURES:
        told = today(records(results, task), f"bench {task}", f"recall_facts.py {task.removeprefix('recall-')}")
        made |= {task: recall_tables.short(told), f"{task}-full": recall_tables.full(told)}
        made[f"{task}-claims"] = recall_tables.claims(told)
    return made


def pictures(results: Path, images: Path) -> None:
    """Draws the curve of each task that there are records of."""
    for task, (name, title) in PICTURES.items():
        if told := records(results, task):
            recall_curve(told, images / name, title)


@app.command("symbols")
def symbols(
    seeds: Seeds = "0,1,2",
    lengths: Lengths = "0,1,8,64",
    far: Far = 1024,
    rows: Annotated[int, typer.Option(help="Streams a length.")] = 128,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Four pairs of symbols a segment, a window of 32 tokens, a tiny base trained on the spot and frozen."""
    for seed in numbers(seeds):
        experiment, make_base = symbols_experiment(seed, numbers(lengths), far, rows)
        with Show(f"recall of symbols, seed {seed}: answers exactly right, %") as show:
            model, base = make_base(show)
            checkpoint = checkpoints / f"recall-symbols-{seed}.safetensors" if checkpoints else None
            _, record = experiment.run(model, "GPT-2, 3 blocks, width 64, trained on the spot", show, checkpoint)
        record.seconds["base"] = base["seconds"]
        record.measures["base"] = base
        saved(record, out)


@app.command("language")
def language(
    model: Annotated[str, typer.Option(help=CAUSAL, callback=found)],
    filler: Annotated[Path, typer.Option(help="Text to lie between facts: a .txt file or a tar archive of them.")],
    seeds: Seeds = "0",
    lengths: Lengths = "0,1,8,32",
    far: Far = 256,
    rows: Annotated[int, typer.Option(help="Streams a length.")] = 512,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Who has what, in sentences within real text, on any causal model, frozen."""
    for seed in numbers(seeds):
        experiment, base, name = language_experiment(model, filler, seed, numbers(lengths), far, rows)
        with Show(f"recall of sentences, seed {seed}: answers exactly right, %") as show:
            checkpoint = checkpoints / f"recall-language-{seed}.safetensors" if checkpoints else None
            _, record = experiment.run(base, name, show, checkpoint)
        saved(record, out)


if __name__ == "__main__":
    launch(app)
