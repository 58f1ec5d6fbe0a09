"""Copying on a real model: which memories learn to write and read at all, in minutes.

A segment of a novel, then the same segment again, with a loss on all of the second; the base is frozen and sees one
segment at a time. What falls below the base alone came through the memory, or is an adapter's: the memory of another
stream in its place tells the two apart. One record a memory, with the nats at every tenth step.

    python benchmarks/copying.py emt fast-weights --data novels.tar.xz --out results
    python benchmarks/copying.py --list

A run that was stopped goes on from its checkpoint under `runs/copying`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemic
from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.drift import hold_out
from mnemic.bench.lessons import CALIBRATED
from mnemic.bench.results import Record, Score, records
from mnemic.checkpoints import folder_of
from mnemic.cli.show import Show, Table, console
from mnemic.controls import CONDITIONS, measure, parts
from mnemic.memories import MemoryConfig
from mnemic.state import nbytes
from mnemic.tasks.base import seed_of
from mnemic.tasks.documents import novels, tokenize
from mnemic.tasks.told import Copying, pool_of
from mnemic.training import calibrate, train

LENGTH, ROWS, TEST_ROWS = 32, 16, 64
RATE = 2e-3
SHARP = 20
"""How many times as long Memoria's learned queries begin in `memoria-sharp`."""
READS = [8, 12, 16, 20, 24, 28]
PLACES = {"write_layer": 8, "read_layers": READS}

ALLOCATION = {"write": "allocation", "slots": 64, "dim": 256, "heads": 1, "whiten": True, **PLACES}
MEMORIES: dict[str, dict[str, Any]] = {
    "emt": {"kind": "emt", **ALLOCATION},
    "emt-segment": {"kind": "emt", "write": "segment", "slots": 64, "dim": 256, **PLACES},
    "emt-token": {"kind": "emt", "write": "token", "slots": 64, "dim": 256, **PLACES},
    "fast-weights": {"kind": "fast-weights", "dim": 512, "rate_bias": -2.0, **PLACES},
    "titans": {"kind": "titans", "dim": 512, "layers": 1, "context": "layer", **PLACES},
    "memoria": {"kind": "memoria", "working": 32, "reminded_stm": 32, "reminded_ltm": 32, "read_layers": [8, 16, 24]},
    "armt": {"kind": "armt", "tokens": 16, "dim": 64},
    "rmt": {"kind": "rmt", "tokens": 16},
    "knn": {"kind": "knn", "layer": 12},
    "infinity-former": {"kind": "infinity-former", "bases": 64, **PLACES},
    "memory-prompt": {"kind": "memory-prompt"},
    "compressive": {"kind": "compressive", "size": 32, "compressed": 32},
    "persistent": {"kind": "persistent", "rows": 64},
}
"""What is compared, by name; each with as much state as its kind has about that of 64 slots of 256, or more."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "emt-block-content": MEMORIES["emt"],
    "emt-untied": MEMORIES["emt"],
    "emt-shared-slots": MEMORIES["emt"],
    "emt-not-whitened": {**MEMORIES["emt"], "whiten": False},
    "emt-wide": {**MEMORIES["emt"], "dim": 512},
    "emt-usage": {**MEMORIES["emt"], "usage_weight": 1.0},
    "emt-128-slots": {**MEMORIES["emt"], "slots": 128},
    "emt-four-heads": {**MEMORIES["emt"], "heads": 4},
    "emt-no-late-read": {**MEMORIES["emt"], "read_layers": READS[:-1]},
    "fast-weights-no-shift": {**MEMORIES["fast-weights"], "shift": False},
    "memoria-sharp": MEMORIES["memoria"],
}
"""A memory with one thing changed; `changed` does what no setting does."""


def changed(name: str, memory: Any) -> None:
    """Does what an ablation is named for, before calibration and training."""
    if name == "memoria-sharp":  # else every engram begins as the mean of all tokens
        memory.abstractor.query.data *= SHARP
    if name == "emt-block-content":
        memory.writes = memory.writes[-1:] * 2  # contents of the written block in place of the embeddings
    if name == "emt-shared-slots":
        for writer in memory.writers:
            writer.allocate = lambda cosine_bts, keep_bt1, scale, taken_bs: (
                ((scale * cosine_bts).softmax(-1) * keep_bt1).mT
            )
    if name == "emt-untied":
        memory._tie = lambda: None
        for reader in (each for readers in memory.readers.values() for each in readers):
            for linear in (reader.query, reader.key, reader.value):
                linear.reset_parameters()
            torch.nn.init.zeros_(reader.output.weight)
            torch.nn.init.ones_(reader.alpha)


def main(
    memories: Annotated[list[str] | None, typer.Argument(help="Names of --list; all by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text: a .txt file, a folder or a tar archive of them.")] = None,
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Constant.")] = RATE,
    seed: Annotated[int, typer.Option(help="Of weights and streams.")] = 0,
    bf16: Annotated[bool, typer.Option(help="The base in bfloat16.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("runs/copying"),
    listed: Annotated[bool, typer.Option("--list", help="Name what can be compared.")] = False,
) -> None:
    """Trains memories on copying and writes a record for each."""
    known = MEMORIES | ABLATIONS
    if listed:
        console.print("\n".join(known))
        return
    if data is None:
        raise typer.BadParameter("give --data, a text")
    if unknown := sorted(set(memories or ()) - known.keys()):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    folder = folder_of(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    learnt, held = (
        torch.cat([pool_of(tokenize(text[len(text) // 4 :][:60_000], tokenizer).ids, LENGTH) for _, text in texts[:24]])
        for texts in hold_out(novels(data), 0.3)
    )
    for name in memories or known:
        config = MemoryConfig.from_dict({"segment_length": LENGTH, **known[name]})
        with Show(name) as show:
            record = run(name, config, folder, learnt, held, steps, learning_rate, seed, show, bf16)
        table = Table(title=f"{name}: nats a token of {TEST_ROWS} copies, {steps} steps", title_justify="left")
        for condition in ("own memory", *CONDITIONS[1:]):
            table.add_column(condition, justify="right")
        score = record.scores[0]
        table.add_row(f"{score.score:.3f}", *(f"{value:.3f}" for value in score.controls.values()))
        console.print(table)
        console.print(record.save(out, f"copying-{name}{'-bf16' * bf16}-seed{seed}.json"))


def run(
    name: str,
    config: MemoryConfig,
    folder: str,
    learnt: torch.Tensor,
    held: torch.Tensor,
    steps: int,
    learning_rate: float,
    seed: int,
    show: Show,
    bf16: bool = False,
) -> Record:
    """One memory from its first weights on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    torch.manual_seed(seed)
    attachment = mnemic.attach(model, config)
    changed(name, attachment.memory)
    task, test = Copying(learnt), Copying(held)
    calibrate(model, task.batch(CALIBRATED, seed))
    checkpoint = Path("runs/copying") / f"{name}-{steps}-{learning_rate:g}{'-bf16' * bf16}-seed{seed}.safetensors"
    curve, notes, seconds = [], {}, 0.0
    show.phase(name, steps)
    done = 0
    for step in train(
        model,
        lambda number: task.batch(ROWS, seed * 1_000_003 + number),
        steps=steps,
        learning_rate=learning_rate,
        schedule=lambda progress: 1.0,
        notes=notes,
        checkpoint=checkpoint,
    ):
        notes[f"{step.step:06d}"] = step.loss
        seconds = step.seconds
        show.advance(step.step + 1 - done, loss=step.loss)  # a resumed run has come far
        done = step.step + 1
    losses = [loss for _, loss in sorted(notes.items())]
    for start in range(0, len(losses), 10):
        part = losses[start : start + 10]
        curve.append([start + len(part), round(sum(part) / len(part), 4)])
    nats, labelled = torch.zeros(len(CONDITIONS), dtype=torch.float64), 0.0
    right = torch.zeros_like(nats)
    begun = time.monotonic()
    for place, part in enumerate(parts(TEST_ROWS, 16)):
        batch = test.batch(part.stop - part.start, seed_of("test", place))
        found = measure(model, batch.input_ids, batch.labels)
        nats, right, labelled = (
            nats + found.nats.sum(0),
            right + found.right.sum(0),
            labelled + float(found.labelled.sum()),
        )
    scores = dict(zip(CONDITIONS, (nats / labelled).tolist(), strict=True))
    shares = dict(zip(CONDITIONS, (right / labelled).tolist(), strict=True))
    record = Record(
        task="copying",
        mechanism=name,
        host=f"{Path(folder).name}, frozen",
        seed=seed,
        config={
            "memory": config.to_dict(),
            "steps": steps,
            "learning_rate": learning_rate,
            "rows": ROWS,
            "segment_length": LENGTH,
            "bf16": bf16,
            "model": Path(folder).name,
            "test rows": TEST_ROWS,
        },
        scores=[
            Score(
                length=0,
                tokens=2 * LENGTH,
                examples=int(labelled),
                score=scores.pop("memory"),
                controls=scores,
                floors={},
                ceiling=None,
                details={f"{condition}, right": share for condition, share in shares.items()},
            )
        ],
        measures={"nats by step": curve, "parameters": sum(each.numel() for each in attachment.parameters())},
        state_bytes=nbytes(attachment.memory.init_state(1)),
        seconds={"training": seconds, "asking": time.monotonic() - begun},
    )
    rate = "" if learning_rate == RATE else f" --learning-rate {learning_rate:g}"
    record.command = f"python benchmarks/copying.py {name} --steps {steps}{rate}{' --bf16' * bf16} --seed {seed}"
    return record


STEPS = (20, 40, 60, 80, 100, 150, 200)
"""At which steps the curve of copying is shown."""


def table(found: Sequence[Record]) -> str:
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


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"copying": table(records(results, "copying"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
