"""Seconds a training step on told things, this checkout beside another one, such as a worktree of an earlier commit.

    git worktree add ../before COMMIT
    python benchmarks/lesson_speed.py --against ../before --data novels.tar.xz --out results

Both train fast weights on 16 streams of `--segments` segments with a fact and a question, on one thread, in processes
of their own that take turns; the ratios are those of the medians. Both are timed on the same streams, whose questions
stand anywhere in their segments, and this checkout on those of its lessons, too, most of which ask at a segment's
beginning, so that less has to be computed; both with the base in float32 and in bfloat16. The text around the facts
comes from a pool, as in training, and comes again, so the first `--warm` steps, which meet it first, do not count.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

if TYPE_CHECKING:
    from mnemic.bench.results import Record

LENGTH, ROWS = 32, 16
ANYWHERE, AS_IN_LESSONS = 0.0, 0.75
"""In how many of the batches questions stand at a segment's beginning."""
MEMORY = {"dim": 512, "heads": 4, "rate_bias": -2.0, "write_layer": 8, "read_layers": [8, 12, 16, 20, 24]}


def main(
    data: Annotated[Path | None, typer.Option(help="Text: a .txt file, a folder or a tar archive of them.")] = None,
    against: Annotated[Path | None, typer.Option(help="The other checkout.")] = None,
    turns: Annotated[int, typer.Option(min=2, help="Processes of each side.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps of a process; the first do not count.")] = 10,
    warm: Annotated[int, typer.Option(min=1, help="Steps that do not count.")] = 4,
    segments: Annotated[int, typer.Option(min=1, help="Segments before the question.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs"),
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
    dtype: Annotated[str, typer.Option(hidden=True)] = "float32",
) -> None:
    """Times both and writes a record."""
    if child is not None:
        print(json.dumps(timed(child, steps, dtype)[warm:]))
        return
    if data is None or against is None:
        raise typer.BadParameter("give --data and --against")
    from mnemic.bench.results import Record
    from mnemic.checkpoints import fetch

    here = Path(__file__).resolve().parents[1]
    sides = {
        "before": (against.resolve(), ANYWHERE, "float32"),
        "now": (here, ANYWHERE, "float32"),
        "now, as in lessons": (here, AS_IN_LESSONS, "float32"),
        "before, bfloat16": (against.resolve(), ANYWHERE, "bfloat16"),
        "now, bfloat16": (here, ANYWHERE, "bfloat16"),
        "now, bfloat16, as in lessons": (here, AS_IN_LESSONS, "bfloat16"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for early in (ANYWHERE, AS_IN_LESSONS):
            streams(fetch("smollm2"), data, steps, segments, early, Path(folder) / str(early))
        for _ in range(turns):
            for name, (root, early, numbers) in sides.items():
                words = [sys.executable, str(here / "benchmarks" / "lesson_speed.py"), "--child", f"{folder}/{early}"]
                words += ["--dtype", numbers]
                environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
                made = subprocess.run(
                    [*words, "--steps", str(steps), "--warm", str(warm)],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                seconds[name] += json.loads(made.stdout.splitlines()[-1])
                print(f"{name}: {statistics.median(seconds[name]):.2f} s a step", flush=True)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    commits = {
        name: subprocess.run(["git", "-C", root, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        for name, (root, *_) in sides.items()
    }
    measures: dict[str, Any] = {
        "seconds a step": median,
        "before / now": {name: median["before"] / median[name] for name in sides if name != "before"},
        "tokens a second": {name: ROWS * (segments + 1) * LENGTH / found for name, found in median.items()},
        "steps": {name: len(found) for name, found in seconds.items()},
        "commits": {name: found.stdout.strip() for name, found in commits.items()},
    }
    print(", ".join(f"before / {name} {ratio:.2f}" for name, ratio in measures["before / now"].items()))
    record = Record(
        "lesson-speed", "fast-weights", "smollm2, frozen", 0, {"memory": MEMORY, "rows": ROWS, "segments": segments}
    )
    record.measures = measures
    record.command = (
        f"python benchmarks/lesson_speed.py --against ../before --segments {segments} --turns {turns} --steps {steps} "
        f"--warm {warm} --data novels.tar.xz"
    )
    print(record.save(out, f"lesson-speed-{segments}.json"))


def streams(model: Path, data: Path, steps: int, segments: int, early: float, folder: Path) -> None:
    """The same streams for both, and where the model lies."""
    from transformers import AutoTokenizer

    from mnemic.tasks.documents import novels, tokenize
    from mnemic.tasks.told import ToldThings, pool_of

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = novels(data)[0][1]
    pool = pool_of(tokenize(text[len(text) // 4 :][:200_000], tokenizer).ids, LENGTH)[:64]
    made = ToldThings(tokenizer, pool, segments=(segments, segments), early=early)
    batches = [made.batch(ROWS, seed) for seed in range(100)]
    batches = [batch for batch in batches if batch.input_ids.shape[1] == (segments + 1) * LENGTH][:steps]
    folder.mkdir()
    torch.save([(batch.input_ids, batch.labels) for batch in batches], folder / "streams.pt")
    (folder / "model").write_text(str(model))


def timed(folder: Path, steps: int, dtype: str) -> list[float]:
    """Seconds of each step."""
    from transformers import AutoModelForCausalLM

    import mnemic

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained((folder / "model").read_text(), dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    mnemic.attach(model, mnemic.FastWeightsConfig(segment_length=LENGTH, **MEMORY))
    batches = [mnemic.Batch(*pair) for pair in torch.load(folder / "streams.pt", weights_only=True)]
    found, last = [], time.perf_counter()
    for _ in mnemic.train(model, lambda step: batches[step], steps=steps):
        now = time.perf_counter()
        found.append(now - last)
        last = now
    return found


def table(found: Sequence[Record]) -> str:
    """Seconds of a training step on told things, before and now."""
    from mnemic.analysis.markdown import markdown, missing

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


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    from mnemic.bench.results import records

    return {"lesson-speed": table(records(results, "lesson-speed"))}


if __name__ == "__main__":
    typer.run(main)
