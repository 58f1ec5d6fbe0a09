"""`mnemic bench`: the commands behind the numbers in the documentation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import Show, Table, console
from mnemic.cli.suite import SuiteGroup, suite

bench = typer.Typer(
    cls=SuiteGroup, no_args_is_help=True, help="A suite by name or file, or one of the other measurements."
)
bench.command("suite", hidden=True)(suite)

Out = Annotated[Path, typer.Option(help="Folder for the result files.")]
Seeds = Annotated[str, typer.Option(help="Seeds, separated by commas.")]
Lengths = Annotated[str, typer.Option(help="Filler before, between and after facts, in segments: 0,1,8.")]
Far = Annotated[int, typer.Option(min=0, help="Segments of filler before the facts alone, and after them alone.")]
Checkpoints = Annotated[Path | None, typer.Option(help="Folder for checkpoints; a run that was stopped goes on there.")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(word.replace("_", "")) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


@bench.command("recall-symbols")
def recall_symbols(
    seeds: Seeds = "0,1,2",
    lengths: Lengths = "0,1,8,64",
    far: Far = 1024,
    rows: Annotated[int, typer.Option(help="Streams a length.")] = 128,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Four pairs of symbols a segment, a window of 32 tokens, a tiny base trained on the spot and frozen."""
    from mnemic.bench.settings import symbols_experiment

    for seed in _numbers(seeds):
        experiment, make_base = symbols_experiment(seed, _numbers(lengths), far, rows)
        with Show(f"recall of symbols, seed {seed}: answers exactly right, %") as show:
            model, base = make_base(show)
            checkpoint = checkpoints / f"recall-symbols-{seed}.safetensors" if checkpoints else None
            _, record = experiment.run(model, "GPT-2, 3 blocks, width 64, trained on the spot", show, checkpoint)
        record.seconds["base"] = base["seconds"]
        record.measures["base"] = base
        console.print(f"results {record.save(out)}")


@bench.command("recall-language")
def recall_language(
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
    from mnemic.bench.settings import language_experiment

    for seed in _numbers(seeds):
        experiment, base, name = language_experiment(model, filler, seed, _numbers(lengths), far, rows)
        with Show(f"recall of sentences, seed {seed}: answers exactly right, %") as show:
            checkpoint = checkpoints / f"recall-language-{seed}.safetensors" if checkpoints else None
            _, record = experiment.run(base, name, show, checkpoint)
        console.print(f"results {record.save(out)}")


@bench.command()
def overhead(
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 9,
    device: str = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads for PyTorch; all cores by default.")] = None,
    out: Out = Path("results"),
) -> None:
    """Forward with a memory against without, on the shape of GPT-2 small; the token write against plain loops."""
    import torch

    from mnemic.bench.cost import against_naive
    from mnemic.bench.cost import overhead as measure
    from mnemic.memories.emt import EMTConfig

    torch.set_num_threads(threads or os.cpu_count() or 1)
    suffix = "" if device == "cpu" else f"-{device}"
    settings = {"segment": (EMTConfig(), 512), "token": (EMTConfig.whitepaper(), 256)}
    for name, (config, tokens) in settings.items():
        with Show("") as show:
            record = measure(config, name, batch=4, tokens=tokens, runs=runs, device=device, reporter=show)
        for key in ("with memory / base", "memory alone / base"):
            console.print(f"{name} write, {key}: {record.measures[key]['median']:.3f}")
        console.print(f"results {record.save(out, f'overhead-{name}{suffix}.json')}")
    record = against_naive()
    console.print(
        f"token write, largest difference to plain loops: {max(record.measures['largest difference'].values()):.1e}"
    )
    console.print(f"results {record.save(out, 'naive-token.json')}")


@bench.command()
def stream(
    tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1_000_000, out: Out = Path("results")
) -> None:
    """One session without end: what it and the process hold along the way, and whether anything turns NaN."""
    from mnemic.bench.cost import endless

    with Show("") as show:
        show.phase("read", tokens)
        record = endless(tokens, progress=show.advance)
    console.print(f"results {record.save(out, 'endless-stream.json')}")


@bench.command("zero-shot")
def zero_shot(
    model: Annotated[str, typer.Option(help=CAUSAL, callback=found)],
    text: Annotated[Path, typer.Option(help="A text file.")],
    tokens: Annotated[int, typer.Option(help="Tokens to predict.")] = 32_768,
    out: Out = Path("results"),
) -> None:
    """Does the whitepaper's untrained memory help? Bits a token with it, without it, and with controls."""
    from mnemic.bench.zero_shot import measure

    with Show("") as show:
        record = measure(model, text, tokens, reporter=show)
    for name, value in record.measures["bits per token"].items():
        console.print(f"{name:<40} {value:.4f} bits per token")
    console.print(f"results {record.save(out, 'zero-shot.json')}")


@bench.command("language")
def language(
    novels: Annotated[Path, typer.Option(help="Novels, named author first: a folder or archive of .txt files.")],
    model: Annotated[str | None, typer.Option(help=CAUSAL, callback=found)] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Without a model: whose tokens a small one learns; or bytes.")
    ] = "bytes",
    seeds: Seeds = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Training steps, if not those of the published runs.")] = None,
    segments: Annotated[int, typer.Option(help="Segments read of each test novel.")] = 64,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Memoria on novels: bits a byte with a novel's own memory and with every control, by position.

    On a frozen base, or, without --model, on a small one that is trained with its memory and once more without.
    """
    from mnemic.bench.language import published

    for seed in _numbers(seeds):
        experiment = published(model, tokenizer, seed, steps, segments)
        with Show(f"{experiment.task}, seed {seed}") as show:
            record = experiment.run(novels, show, checkpoints)
        table = Table("from segment", *("memory", *record.scores[0].controls))
        for score in record.scores:
            table.add_row(str(score.length), *(f"{value:.4f}" for value in (score.score, *score.controls.values())))
        console.print(table)
        for name, excess in record.measures["above memory"].items():
            console.print(
                f"{name}: {excess['mean']:+.4f} bits a byte above memory, {excess['low']:+.4f} to "
                f"{excess['high']:+.4f}, above in {excess['documents']:.0f} of {excess['of']:.0f} novels"
            )
        name = f"language-{record.mechanism}-{record.task.removeprefix('novels-')}-seed{seed}.json"
        console.print(f"results {record.save(out, name)}")


@bench.command("classify")
def classify(
    model: Annotated[str, typer.Option(help="An encoder: local folder or hub id.")],
    articles: Annotated[Path, typer.Option(help="The archive or folder of SemEval-2019 task 4, by article.")],
    seeds: Seeds = "0,1,2,3,4",
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Hyperpartisan news with Memoria on a frozen encoder, beside the encoder cut at its window: macro F1."""
    from mnemic.bench.classification import published

    experiment = published(model)
    with Show("hyperpartisan") as show:
        encoded = experiment.encode(articles, show, checkpoints / "articles.safetensors" if checkpoints else None)
        records = []
        for seed in _numbers(seeds):
            records.append(experiment.run(encoded, seed, show))
            records[-1].save(out)
    table = Table("macro F1", *(f"seed {record.seed}" for record in records), "mean")
    for name in records[0].measures["macro F1"]:
        values = [record.measures["macro F1"][name] for record in records]
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{sum(values) / len(values):.3f}")
    console.print(table)
    console.print(f"results in {out}")


@bench.command("sorting")
def sorting(
    segments: Annotated[str, typer.Option(help="Segments of 256 symbols a prompt, separated by commas.")] = "4,8",
    seed: Annotated[int, typer.Option(help="Of weights and streams.")] = 0,
    rule: Annotated[str, typer.Option(help="How Memoria is reminded while it learns: paper, seeds or lift.")] = "paper",
    rows: Annotated[int, typer.Option(help="Test streams a length.")] = 256,
    out: Out = Path("results"),
    checkpoints: Checkpoints = None,
) -> None:
    """Sorting by frequency: Memoria and a small base trained together; controls, ablations, rules and floors."""
    from mnemic.bench.settings import sorting_experiment

    experiment = sorting_experiment(seed, rule, _numbers(segments), rows)
    name = f"sorting-{rule}-{seed}"
    with Show(name) as show:
        _, record = experiment.run(show, checkpoints / f"{name}.safetensors" if checkpoints else None)
    table = Table("right symbols, %", *(f"{score.length} segments" for score in record.scores))
    table.add_row("memory", *(f"{100 * score.score:.1f}" for score in record.scores), style="bold")
    for kind in ("controls", "floors"):
        table.add_section()
        for row in getattr(record.scores[0], kind):
            table.add_row(row, *(f"{100 * getattr(score, kind)[row]:.1f}" for score in record.scores))
    console.print(table)
    console.print(f"results {record.save(out, f'sorting-memoria-{rule}-seed{seed}.json')}")


@bench.command("generators")
def generators(out: Out = Path("results")) -> None:
    """Tokens a second that every task makes, over those that a GPT-2 of 4 blocks and width 128 trains on."""
    from mnemic.bench.throughput import throughput

    def report(name: str, value: float) -> None:
        console.print(f"{name:<24} {value:>10,.1f}")

    with Show("") as show:
        record = throughput(report, threads=os.cpu_count() or 1, reporter=show)
    console.print(f"results {record.save(out, 'generators.json')}")
