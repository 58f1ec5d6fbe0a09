"""Trainings that a test runs in processes of their own and kills. Each writes its loss curve line by line."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import string
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

import mnemic
from families import VOCABULARY, make
from helpers import CONFIGS, SEGMENT, tokens
from mnemic.bench import drift
from mnemic.cli import app
from mnemic.state import read_file
from mnemic.tasks.base import generator
from mnemic.tasks.facts import SymbolRecall
from mnemic.trainer import last_checkpoint

STEPS = 12
TASK = SymbolRecall(segment_length=SEGMENT, pairs=2)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["runs"])  # imported once, and not in every process


def process(run: Callable[[Path, int], None], folder: Path, seed: int) -> Any:
    """Starts a training in a process of its own."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()  # in Python 3.11 it looks for what it imports in its environment alone
    finally:
        os.environ.pop("PYTHONPATH")
        if before:
            os.environ["PYTHONPATH"] = before
    started = PROCESSES.Process(target=run, args=(folder, seed))
    started.start()
    return started


def new_model(seed: int = 0, name: str = "gpt2", kind: str = "emt-0", **options: Any) -> Any:
    """A tiny model, with the dropout of its family, and a new memory, the same for the same seed."""
    torch.manual_seed(seed)
    model = make(name)
    mnemic.attach(model, CONFIGS[kind], **options)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Two steps on two rows each, nothing saved, nothing drawn."""
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **(settings | changes))


def tell(path: Path, step: int, value: Any) -> None:
    """Adds a line to a curve."""
    with path.open("a") as file:
        file.write(json.dumps([step, value]) + "\n")


class Telling(TrainerCallback):
    """Tells every step of a Trainer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tell(self.path, state.global_step, None)


def trainer_run(folder: Path, seed: int) -> None:
    """`mnemic.Trainer` with all that a checkpoint has to keep: dropout, shuffled rows of several epochs, accumulation,
    a schedule, a curriculum, evaluations. A process that goes on makes another new memory, from `seed`.
    """
    torch.set_num_threads(1)
    rows = [{"input_ids": row} for row in tokens(14, 3 * SEGMENT)]
    settings = arguments(
        folder / "run",
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=5,
        warmup_steps=3,
        weight_decay=0.1,
    )
    trainer = mnemic.Trainer(
        new_model(seed),
        settings,
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=[mnemic.SegmentCurriculum([(0, 1), (4, 2), (8, 3)]), Telling(folder / "curve")],
        controls=("no_memory",),
    )
    last = last_checkpoint(folder / "run")
    trainer.train(resume_from_checkpoint=last is not None)
    trainer.save_model(str(folder / "memory"))
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_loss_no_memory")
    curve = [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]
    (folder / "result").write_text(json.dumps(curve))


def train_run(folder: Path, seed: int) -> None:
    """`mnemic.train` from its checkpoint on."""
    torch.set_num_threads(1)
    model = new_model(seed, "llama")

    def batches(step: int) -> mnemic.Batch:
        return mnemic.Batch(*TASK.stream(4, step % 3, generator(step)))

    steps = mnemic.train(
        model, batches, steps=STEPS, average=0.9, checkpoint=folder / "checkpoint", checkpoint_seconds=0
    )
    for step in steps:
        tell(folder / "curve", step.step, [step.loss, step.learning_rate])
    mnemic.attached(model).save_pretrained(folder / "memory")
    (folder / "result").write_text("done")


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character."""
    vocabulary = {character: number for number, character in enumerate(string.printable[:95] + "\n")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])))
    assert len(tokenizer) <= VOCABULARY
    return tokenizer


def tiny_host(folder: Path) -> Path:
    """The folder of a tiny model with its tokenizer."""
    make("llama").save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


def prose(length: int, seed: int = 0) -> str:
    """Lines of made-up words, `length` characters, the same for the same seed."""
    source = random.Random(seed)
    words = ["".join(source.choices("aeioulnrst", k=source.randint(2, 7))) for _ in range(30)]
    return "".join(source.choice(words) + source.choice("    ,.\n") for _ in range(length))[:length]


def cli_words(host: Path, book: Path | None, out: Path, steps: int = 6) -> list[Any]:
    """A small run of `mnemic train`."""
    words: list[Any] = ["train", host, "--set", f"segment_length={SEGMENT}", "--segments", 2, "--rows", 4]
    words += ["--steps", steps, "--save-steps", 1, "--out", out]
    return words if book is None else [*words, "--data", book]


def cli_run(folder: Path, seed: int) -> None:
    """`mnemic train --resume`, which tells every step."""
    torch.set_num_threads(1)
    step = drift._Watch.on_step_end

    def telling(watch: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step(watch, args, state, control, **kwargs)
        tell(folder / "curve", state.global_step, None)

    drift._Watch.on_step_end = telling
    host, book = folder.parent / "host", folder.parent / "book.txt"
    if not book.is_file():
        tiny_host(host)
        book.write_text(prose(1000))
    words = cli_words(host, book, folder / "out", 8)
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--resume"]])
    assert result.exit_code == 0, result.output
    (folder / "result").write_text("done")


def finish(run: Callable[[Path, int], None], folder: Path) -> None:
    """Runs a training to its end in a process of its own."""
    folder.mkdir()
    started = process(run, folder, 0)
    started.join()
    assert started.exitcode == 0


def kill_until_done(run: Callable[[Path, int], None], folder: Path, kills: int) -> int:
    """Runs a training again and again, killed by SIGKILL at random moments behind some step, and then to its end.
    Returns how often it was killed at work.
    """
    folder.mkdir()
    source = random.Random(0)
    for killed in range(kills + 1):
        before = _lines(folder / "curve")
        started = process(run, folder, 1 + killed)
        if killed < kills:
            while started.is_alive() and _lines(folder / "curve") <= before + killed % 2:
                time.sleep(0.001)
            time.sleep(source.uniform(0, 0.03))
            started.kill()
        started.join()
        if (folder / "result").is_file():
            return killed
        assert started.exitcode == -9, "it failed by itself"
    raise AssertionError("it did not come to its end")


def assert_same_memory(one: Path, two: Path) -> None:
    """Bit-equal weights and one description; files differ in the order of their header."""
    (tensors, meta), (others, other) = (read_file(folder / "memory_model.safetensors") for folder in (one, two))
    assert meta == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0
