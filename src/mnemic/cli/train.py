"""`mnemic train`: a memory on plain text, and what it does to the base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from mnemic.cli.models import CAUSAL, found
from mnemic.cli.show import Show, Table, console


def train(
    model: Annotated[str, typer.Argument(help=CAUSAL, callback=found)],
    memory: Annotated[str, typer.Option(help="The mechanism; mnemic list names them.")] = "emt",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the mechanism; repeat it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text: a .txt file, a folder or a tar archive of them.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Or: wikitext, pg19, enwik8, NAME or NAME:CONFIG on the hub, or a folder that datasets wrote."
        ),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Of a dataset, take only so many documents.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Text to measure the base on; the last tenth of the data by default.")
    ] = None,
    segments: Annotated[int, typer.Option(min=1, help="Segments of a row.")] = 8,
    curriculum: Annotated[str, typer.Option(help="Segments from which step on, such as 0:1,500:2,1500:4.")] = "",
    lessons: Annotated[
        str,
        typer.Option(
            help="Teach it to keep what it is told, the text around that: copying:STEPS, then FACTSxSEGMENTS:STEPS, "
            "such as copying:200,1x8:500,1+4x8+64:2000; + for what is drawn anew for every step."
        ),
    ] = "",
    questions: Annotated[int, typer.Option(min=1, help="Of --lessons, questions of a stream.")] = 1,
    begin: Annotated[
        Path | None,
        typer.Option(help="Of --lessons, a folder that such a run wrote, with whose weights this one begins."),
    ] = None,
    until: Annotated[
        int | None, typer.Option(min=1, help="Of --lessons, ask after so many steps in all; --resume goes on later.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Held for half of the steps, then falling.")] = 2e-3,
    bptt_segments: Annotated[
        int | None, typer.Option(min=0, help="How many segments back a loss sends its gradient; all by default.")
    ] = None,
    train_base: Annotated[bool, typer.Option(help="Train the base's own weights too.")] = False,
    bf16: Annotated[bool, typer.Option(help="Mixed precision; of --lessons, the base in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of the memory's weights and of the order of rows.")] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="A checkpoint every so many steps.")] = 100,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out, if there is one.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the memory, its checkpoints and the result file.")] = Path(
        "runs/memory"
    ),
    test_rows: Annotated[int, typer.Option(min=2, help="Rows of held-out text to measure on at most.")] = 64,
    results: Annotated[Path | None, typer.Option(help="Another folder for the result file.")] = None,
) -> None:
    """Trains a memory on text, then measures the base: perplexity with the memory untrained, trained, disabled and with
    that of another stream, and says whether anything is remembered.
    """
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError:
        raise typer.BadParameter("training needs accelerate: pip install 'mnemic[train]'") from None
    from mnemic.bench.drift import TextRun
    from mnemic.bench.lessons import LessonRun
    from mnemic.bench.lessons import lessons as lessons_of

    try:
        if lessons:
            if curriculum or bptt_segments is not None or train_base:
                raise ValueError("--lessons says itself what is learnt when; leave out what plain text is learnt with")
            _teach(
                LessonRun(
                    model,
                    configured(memory, setting or []),
                    lessons_of(lessons),
                    rows=rows,
                    questions=questions,
                    learning_rate=learning_rate,
                    seed=seed,
                    test_rows=test_rows,
                    begin=begin,
                    bf16=bf16,
                ),
                texts(data, dataset, documents, held_out),
                out,
                results,
                until,
                resume,
            )
            return
        run = TextRun(
            model,
            configured(memory, setting or []),
            segments=segments,
            steps=steps,
            rows=rows,
            learning_rate=learning_rate,
            bptt_segments=bptt_segments,
            stages=stages(curriculum),
            freeze=not train_base,
            bf16=bf16,
            seed=seed,
            save_steps=save_steps,
            test_rows=test_rows,
        )
        learnt, held = texts(data, dataset, documents, held_out)
        console.print(
            f"{steps:,} steps of {rows} rows of {segments} segments of {run.config.segment_length} tokens: at most "
            f"{steps * rows * segments * run.config.segment_length:,} tokens, forward and backward through the base"
        )
        with Show("") as show:
            _, record = run.run(learnt, held, out, resume=resume, report=show)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        begun = (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir())
        begun = begun or (out / "checkpoint.safetensors").is_file()
        mend = f"the same command with --resume goes on from the last checkpoint in {out}"
        console.print(f"stopped; {mend if begun else 'nothing is saved yet'}")
        raise typer.Exit(130) from None
    console.print(table(record.measures))
    console.print(record.measures["verdict"], soft_wrap=True)
    words = (record.mechanism, record.config["text"], record.config["held-out text"], f"seed{seed}")
    name = re.sub(r"[^\w.-]+", "-", "-".join(("drift", *words))) + ".json"
    console.print(f"memory  {out}\nresults {record.save(results or out, name if results else 'drift.json')}")


def _teach(run: Any, found: tuple[Any, Any], out: Path, results: Path | None, until: int | None, resume: bool) -> None:
    """Lessons, and what is remembered of things that were told."""
    with Show("") as show:
        _, record = run.run(*found, out, until=until, resume=resume, report=show)
    shown = Table(title=f"whole values right of {run.test_rows} questions, in %", title_justify="left")
    for name in ("facts", "segments", "relations", "own memory", *record.scores[0].controls):
        shown.add_column(name, justify="right")
    for score in record.scores:
        values = (score.score, *score.controls.values())
        new = "new" if score.details["held-out relations"] else "known"
        shown.add_row(
            f"{score.details['facts']:.0f}", f"{score.length}", new, *(f"{100 * each:.1f}" for each in values)
        )
    console.print(shown)
    further = "-further" if run.begin else ""
    name = f"told-{record.mechanism}{further}-seed{record.seed}.json" if results else "told.json"
    console.print(f"memory  {out}\nresults {record.save(results or out, name)}")


def configured(kind: str, settings: list[str]) -> Any:
    """The config of a mechanism from words like `slots=16`; raises `ValueError` for what is none."""
    from mnemic.memories import MemoryConfig

    values: dict[str, Any] = {"kind": kind}
    for word in settings:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: write NAME=VALUE, such as slots=16")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return MemoryConfig.from_dict(values)


def stages(text: str) -> list[tuple[int, int]]:
    """`0:1,500:2` as pairs; raises `ValueError` for what is none."""
    try:
        pairs = [word.split(":") for word in text.split(",") if word]
        return [(int(step), int(segments)) for step, segments in pairs]
    except ValueError:
        raise ValueError(f"--curriculum {text}: write STEP:SEGMENTS,... such as 0:1,500:2") from None


def texts(data: Path | None, dataset: str | None, documents: int | None, held_out: Path | None) -> tuple[Any, Any]:
    """The texts to learn from, and those to measure on."""
    from mnemic.bench.drift import hold_out
    from mnemic.tasks.corpora import published
    from mnemic.tasks.documents import novels

    if (data is None) == (dataset is None):
        raise ValueError("give --data, a local text, or --dataset, one of the hub")
    if documents is not None and dataset is None:
        raise ValueError("--documents counts those of a --dataset")
    if dataset is not None:
        with console.status(f"loading {dataset}"):
            found = published(dataset, "train", documents)
    else:
        assert data is not None
        found = novels(data)
    return (found, novels(held_out)) if held_out is not None else hold_out(found)


def table(measures: dict[str, Any]) -> Table:
    """The drift of the base."""
    shown = Table(title=f"held-out text, {measures['tokens']:,} tokens", title_justify="left", title_style="bold")
    shown.add_column("memory")
    for name in ("perplexity", "bits per byte", "against disabled"):
        shown.add_column(name, justify="right")
    base = measures["perplexity"]["disabled"]
    for name, value in measures["perplexity"].items():
        bits = measures["bits per byte"][name]
        shown.add_row(name, f"{value:.3f}", f"{bits:.4f}", f"{100 * (value / base - 1):+.2f} %")
    return shown
