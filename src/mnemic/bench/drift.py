"""A memory trained on plain text, and what that does to the base: perplexity on text that was held out, which has no
fact in it that a memory could be asked for, with the memory untrained, trained and disabled.

A base with a memory that has learnt something else must not speak worse for it: `trained` above `disabled` is a drift.
Below it, the memory helps; whether by what it read, `another stream's` tells, and `zeroed` what it does without any.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, TrainingArguments

from mnemic.attachment import Attachment, attach
from mnemic.bench.experiments import Reporter, Silent
from mnemic.bench.results import Record, Score
from mnemic.data import Streams, collate
from mnemic.memory import MemoryConfig
from mnemic.state import nbytes
from mnemic.tasks.documents import Tokens, bits_per_byte, tokenize
from mnemic.trainer import SegmentCurriculum, Trainer, last_checkpoint
from mnemic.training import Batch, calibrate

Texts = Sequence[tuple[str, str]]

CONDITIONS = {
    "disabled": "trained eval_loss_no_memory",
    "untrained": "untrained eval_loss",
    "trained": "trained eval_loss",
    "trained, zeroed": "trained eval_loss_zeroed",
    "trained, another stream's": "trained eval_loss_other_stream",
}
"""What is reported, and the measure of `Trainer.evaluate` that it is."""

SETTINGS_FILE = "run.json"


@dataclass
class TextRun:
    """How a memory is trained on text: `steps` of AdamW on `rows` streams of `segments` segments, on the frozen base
    `model` (a folder or a hub id) or, with `freeze=False`, together with it. `stages` is a curriculum of segments.

    `test_rows` streams of the held-out text are measured, evenly chosen. A checkpoint is written every `save_steps`.
    """

    model: str
    config: MemoryConfig
    segments: int = 8
    steps: int = 1000
    rows: int = 8
    learning_rate: float = 2e-3
    bptt_segments: int | None = None
    stages: Sequence[tuple[int, int]] = field(default_factory=list)
    freeze: bool = True
    bf16: bool = False
    seed: int = 0
    save_steps: int = 100
    test_rows: int = 64

    def __post_init__(self) -> None:
        self.curriculum = [SegmentCurriculum(self.stages)] if self.stages else []

    def run(
        self,
        train: Texts,
        test: Texts,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        report: Reporter | None = None,
    ) -> tuple[Attachment, Record]:
        """Trains, measures, and writes the memory to `out`; checkpoints go to a folder in it, from which a run that was
        stopped goes on with `resume`. The record is not saved yet.

        Raises:
            ValueError: texts too short for a segment, a run in `out` that was made with other settings, or one that is
                begun and not to be resumed.
        """
        report, out, begun = report or Silent(), Path(out), time.monotonic()
        checkpoints = out / "checkpoints"
        last = last_checkpoint(checkpoints)
        if last is not None and not resume:
            raise ValueError(
                f"{out} holds a run at step {last.name.partition('-')[2]}; resume it, or give another folder"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        except OSError as error:
            raise OSError(f"cannot load {self.model}: {error}") from error
        learnt, held = self._tokens(train, tokenizer, report), self._tokens(test, tokenizer, report)
        length = self.config.segment_length
        rows = Streams([tokens.ids for tokens in learnt], length, self.segments)
        kept, size = self._test(held)
        described = self.described() | {
            "text": called(train),
            "held-out text": called(test),
            "digests": [_digest(learnt), _digest(held)],
        }
        if last is not None:
            self._check(out / SETTINGS_FILE, described)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        torch.manual_seed(self.seed)
        attachment = attach(model, self.config, freeze=self.freeze)
        calibrate(model, Batch(**collate([rows[i] for i in range(min(self.rows, len(rows)))], length)))
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS_FILE).write_text(json.dumps(described, indent=1) + "\n")
        watch = _Watch(report)
        trainer = Trainer(
            model,
            self._arguments(checkpoints),
            train_dataset=rows,
            eval_dataset=kept,  # pyright: ignore[reportArgumentType]
            bptt_segments=self.bptt_segments,
            callbacks=[*self.curriculum, watch],
        )
        trainer.remove_callback(PrinterCallback)
        batches = -(-len(kept) // self.rows)
        seconds = {}
        report.phase("held-out text, untrained", batches)
        found = {f"untrained {name}": value for name, value in trainer.evaluate().items()}
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        seconds["training"] = time.monotonic() - started
        trainer.save_model(str(out))
        report.phase("held-out text, trained", batches)
        found |= {f"trained {name}": value for name, value in trainer.evaluate().items()}
        seconds["all"] = time.monotonic() - begun
        nats = {name: found[measure] for name, measure in CONDITIONS.items() if measure in found}
        curve = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
        record = self._record(attachment, described, nats, curve, size, seconds)
        record.measures["verdict"] = trainer.verdict
        return attachment, record

    def described(self) -> dict[str, Any]:
        """The settings that decide a run's result."""
        return {
            "model": Path(self.model).name,
            "memory": self.config.to_dict(),
            "segments": self.segments,
            "steps": self.steps,
            "rows": self.rows,
            "learning_rate": self.learning_rate,
            "bptt_segments": self.bptt_segments,
            "stages": [list(stage) for stage in self.stages],
            "freeze": self.freeze,
            "bf16": self.bf16,
            "seed": self.seed,
            "test_rows": self.test_rows,
        }

    def _arguments(self, folder: Path) -> TrainingArguments:
        """Rates hold for half of the steps and then fall to nearly nothing, as in `mnemic.train`."""
        return TrainingArguments(
            str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.rows,
            per_device_eval_batch_size=self.rows,
            learning_rate=self.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": -(-self.steps // 2), "min_lr_ratio": 0.01, "decay_type": "linear"},
            bf16=self.bf16,
            seed=self.seed,
            logging_steps=max(1, self.steps // 100),
            save_strategy="steps",
            save_steps=self.save_steps,
            save_total_limit=2,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to=[],
            disable_tqdm=True,
        )

    def _tokens(self, texts: Texts, tokenizer: Any, report: Reporter) -> list[Tokens]:
        report.phase("tokenize, characters", sum(len(text) for _, text in texts))
        return [tokenize(text, tokenizer, advance=report.advance) for _, text in texts]

    def _test(self, held: Sequence[Tokens]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Rows of the held-out text, evenly chosen, how many tokens of them are predicted, and their bytes."""
        length = self.config.segment_length
        rows = Streams([tokens.ids for tokens in held], length, self.segments)
        lengths = Streams([tokens.lengths for tokens in held], length, self.segments)
        count = min(self.test_rows, len(rows))
        if count < 2:
            raise ValueError(
                f"the held-out text makes {count} row of {self.segments * length:,} tokens, and with less than two "
                "nothing can be compared with another stream's memory; give more of it (--held-out), or shorter rows "
                "(--segments, --set segment_length=)"
            )
        places = [place * len(rows) // count for place in range(count)]
        if count > 1 and count % self.rows == 1:
            places.pop()  # a batch of one row has no other stream
        size = {
            "tokens": sum(len(rows[place]["input_ids"]) - 1 for place in places),
            "bytes": sum(int(lengths[place]["input_ids"][1:].sum()) for place in places),
        }
        return [rows[place] for place in places], size

    def _check(self, path: Path, described: dict[str, Any]) -> None:
        """Raises `ValueError` where a run was begun with other settings."""
        known = json.loads(path.read_text())
        # what an earlier release did not name had its default
        known = {each.name: each.default for each in fields(self) if each.default is not MISSING} | known
        known["memory"] = MemoryConfig.from_file(known["memory"]).to_dict()
        for name, value in described.items():
            if known.get(name) != value:
                raise ValueError(
                    f"the run in {path.parent} was begun with {name} {known.get(name)}, not {value}; "
                    "go on with its settings, or give another folder"
                )

    def _record(
        self,
        attachment: Attachment,
        described: dict[str, Any],
        nats: dict[str, float],
        curve: list[list[float]],
        size: dict[str, int],
        seconds: dict[str, float],
    ) -> Record:
        perplexity = {name: math.exp(value) for name, value in nats.items()}
        own = sum(parameter.numel() for parameter in attachment.parameters())
        return Record(
            task="drift",
            mechanism=self.config.kind,
            host=described["model"] + (", frozen" if self.freeze else ", trained with its memory"),
            seed=self.seed,
            config=described,
            scores=[
                Score(
                    length=self.segments,
                    tokens=self.segments * self.config.segment_length,
                    examples=size["tokens"],
                    score=perplexity["trained"],
                    controls={name: value for name, value in perplexity.items() if name != "trained"},
                    floors={},
                    ceiling=None,
                )
            ],
            measures={
                "perplexity": perplexity,
                "bits per byte": {n: bits_per_byte(v * size["tokens"], size["bytes"]) for n, v in nats.items()},
                "tokens": size["tokens"],
                "bytes": size["bytes"],
                "parameters": own,
                "loss": curve,
            },
            state_bytes=nbytes(attachment.memory.init_state(1)),
            seconds=seconds,
        )


class _Watch(TrainerCallback):
    """Tells a reporter how training and evaluation go on."""

    def __init__(self, report: Reporter) -> None:
        self.report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report.phase("train", state.max_steps)
        self.report.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.report.advance(0, loss=logs["loss"])

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report.advance(1)


def hold_out(texts: Texts, share: float = 0.1) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The texts to learn from and, held out, the last of them, or the end of the only one, from a line end on.

    Raises:
        ValueError: a single text without a line end in its last part.
    """
    if len(texts) > 1:
        count = max(1, round(share * len(texts)))
        return list(texts[:-count]), list(texts[-count:])
    name, text = texts[0]
    place = text.find("\n", int((1 - share) * len(text)))
    if place < 0 or not text[place:].strip():
        raise ValueError(
            f"{name} has no line end in its last {share:.0%}, where it could be parted; give held-out text"
        )
    return [(name, text[:place])], [(f"the end of {name}", text[place:])]


def called(texts: Texts) -> str:
    """What texts are called together."""
    names = [Path(name).name for name, _ in texts]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _digest(tokens: Sequence[Tokens]) -> str:
    digest = hashlib.sha256()
    for each in tokens:
        digest.update(each.ids.numpy().tobytes() + b"|")
    return digest.hexdigest()[:16]
