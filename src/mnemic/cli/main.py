"""Commands and their options; the work is done elsewhere."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mnemic.cli.chat import chat
from mnemic.cli.compare import compare
from mnemic.cli.fetch import fetch
from mnemic.cli.inspect import inspect, look_inside
from mnemic.cli.serve import keys, serve
from mnemic.cli.show import Show, console, listing, need
from mnemic.cli.store import store_app
from mnemic.cli.suite import suite
from mnemic.cli.tasks import tasks_app
from mnemic.cli.train import train

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Persistent memory for any Hugging Face transformer."
)

RESEARCH = "Research"

app.command("bench", rich_help_panel=RESEARCH)(suite)
app.add_typer(tasks_app, name="tasks", rich_help_panel=RESEARCH)
app.command(rich_help_panel=RESEARCH)(compare)
app.add_typer(store_app, name="store")
app.command()(chat)
app.command()(serve)
app.command()(keys)
app.command()(train)
app.command()(fetch)
app.command()(inspect)


@app.callback()
def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads for PyTorch; small models run fastest with one.")] = 1,
    dirty: Annotated[
        bool, typer.Option("--dirty", help="Allow result files of sources with uncommitted changes in results/.")
    ] = False,
    files: Annotated[
        list[Path] | None, typer.Option("--import", metavar="FILE.py", help="A mechanism of your own; repeat it.")
    ] = None,
) -> None:
    """Options of every command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:  # it asks for these when it is imported, by commands that need it
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if dirty:
        os.environ["MNEMIC_DIRTY"] = "1"  # for the processes that work for this one, too
    for file in files or ():
        from mnemic.memories.registry import import_file

        try:
            import_file(file)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the result file.")] = Path("runs/demo"),
    seed: int = 0,
) -> None:
    """Trains a tiny base and a memory on the spot, then asks beyond the window: minutes, nothing downloaded."""
    from mnemic.analysis.curves import recall_curve
    from mnemic.bench.recall import beyond_chance
    from mnemic.bench.settings import demo_experiment

    need("matplotlib")
    begun = time.monotonic()
    experiment, make_base = demo_experiment(seed)
    console.print(
        "A tiny GPT-2 sees 32 tokens at a time. One or two segments of a stream tell it 4 pairs each, the second also\n"
        "new values for old keys; filler lies before, between and after them; the last segment asks for the pairs.\n"
        "The base is trained in its window first and then frozen; only the memory learns to carry the pairs.\n"
    )
    with Show("answers exactly right, %") as show:
        model, base = make_base(show)
        attachment, record = experiment.run(model, "GPT-2, 3 blocks, width 64, trained on the spot", show)
    record.seconds |= {"base": base["seconds"], "all": time.monotonic() - begun}
    path = record.save(out)
    attachment.save_pretrained(out / "memory")
    picture = recall_curve([record], out / "recall.png", "EMT on a frozen GPT-2 with a window of 32 tokens")
    page = look_inside(model, out, seed)
    above = [f"{name} {100 * share:.1f} %" for name, share in beyond_chance(record.scores).items()]
    console.print(
        f"\nBeyond chance: {', '.join(above)}. Do not believe this run."
        if above
        else "\nEvery control lies at chance: what is answered right came through the memory, "
        f"{record.state_bytes:,} bytes a stream."
    )
    console.print(
        f"picture {picture}\nresults {path}\nmemory  {out / 'memory'}\n"
        f"inside  {page}\n{record.seconds['all']:.0f} seconds"
    )


@app.command("list")
def list_mechanisms() -> None:
    """Every mechanism: its seam, what it trains, its bytes a session and its paper."""
    from mnemic.memories.registry import cards

    kinds = sorted(cards().items())
    facts = [{"seam": c.seam, "trains": c.trains, "bytes": c.bytes_law, "paper": c.paper} for _, c in kinds]
    console.print(listing((kind, card.title, told) for (kind, card), told in zip(kinds, facts, strict=True)))


@app.command(rich_help_panel=RESEARCH)
def report(folder: Annotated[Path, typer.Argument(help="Result files of yours.")]) -> None:
    """Prints the tables of result files, controls and floors beside every score. A file that was edited is refused."""
    from mnemic.cli.results import print_results

    print_results(folder)
