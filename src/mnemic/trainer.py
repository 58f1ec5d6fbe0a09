"""`mnemic.Trainer`: the Hugging Face Trainer, for rows that are streams of whole segments.

What it changes of its parent: the loss (`unroll`), what is saved (the memory alone, where nothing else trains), the
learning rates that a memory scales, evaluation under controls, and that a killed run finds its last whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from mnemic.attachment import WEIGHTS_FILE, Attachment, attached, check_settings, check_weights, router_of
from mnemic.controls import CONTROLS, measure, verdict
from mnemic.data import SegmentCollator
from mnemic.host.anatomy import MEMORY_NAME
from mnemic.host.router import Router
from mnemic.state import read_file
from mnemic.unrolling import IGNORED, base_trains, unroll

STATE_FILE = "trainer_state.json"
PRINTING = {"PrinterCallback", "ProgressCallback", "NotebookProgressCallback"}
"""What prints measures; the last cannot be imported outside of a notebook."""


class SegmentCurriculum(TrainerCallback):
    """Lets rows grow while `mnemic.Trainer` trains: `[(0, 1), (500, 2), (1500, 4)]` takes one segment of each row from
    step 0 on, two from step 500 on, four from step 1500 on. A row is cut at its end, so it keeps its beginning.

    How many there are depends on the step alone, so a run that goes on from a checkpoint is where it was.

    Raises:
        ValueError: stages that do not begin at step 0, are not in order, or have less than 1 segment.
    """

    def __init__(self, stages: Sequence[tuple[int, int]]) -> None:
        self.stages = [(int(step), int(segments)) for step, segments in stages]
        steps = [step for step, _ in self.stages]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)) or min(n for _, n in self.stages) < 1:
            raise ValueError(
                f"stages are {list(stages)}; give pairs of a step and a number of segments, from step 0 on, in order, "
                "such as [(0, 1), (500, 2)]"
            )
        self.segments = self.stages[0][1]

    def at(self, step: int) -> int:
        """The number of segments at a step."""
        return next(segments for start, segments in reversed(self.stages) if start <= step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the run begins or goes on."""
        self.segments = self.at(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The stage of the next step."""
        self.segments = self.at(state.global_step)


class Trainer(transformers.Trainer):
    """The Hugging Face Trainer for a causal model with a memory. Rows are streams (see `SegmentCollator`, which is the
    collator unless one is given); a step unrolls them segment by segment.

    `window` is how many of the latest tokens the base sees, that of the memory's config by default. `bptt_segments` is
    how many segments back a loss sends its gradient, all by default (see `unroll`).

    Checkpoints and `save_model` hold the memory, as `mnemic.from_pretrained` loads it, beside it the base where it
    trains and the adapters of a PEFT model. A run that goes on from a checkpoint equals one that was not interrupted;
    `train(resume_from_checkpoint=True)` takes the last checkpoint that was written to its end.

    `evaluate` and `predict` report loss (nats a labelled token) and accuracy with the stream's own memory, and under
    `controls`, some of `mnemic.controls.CONTROLS`: with the memory switched off, with every value of it zero, with that
    of another row of the batch, which is left out, with a warning, where a batch has a row without another; `fresh` is
    a memory that begins with each segment. Each control costs about one more pass. `verdict` then says in a line
    whether anything is remembered; `evaluate` prints it where it prints its measures.

    Raises:
        RuntimeError: the model has no memory.
        ValueError: an encoder, unknown controls, or arguments that this Trainer does not serve.
    """

    verdict: str | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        *given: Any,
        window: int | None = None,
        bptt_segments: int | None = None,
        controls: Sequence[str] = ("no_memory", "zeroed", "other_stream"),
        **options: Any,
    ) -> None:
        if unknown := set(controls) - set(CONTROLS):
            raise ValueError(f"unknown controls {', '.join(sorted(unknown))}; choose from {', '.join(CONTROLS)}")
        if args is not None:
            _refuse(args, options)
        super().__init__(model, args, data_collator, *given, **options)  # pyright: ignore[reportArgumentType]
        router = self.router
        if not router.causal:
            raise ValueError(f"{type(self.model).__name__} is an encoder; mnemic.Trainer serves causal models")
        if data_collator is None:
            self.data_collator = SegmentCollator(router.segment_length)
        self.args.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns where there is none
        self.window, self.bptt_segments, self.controls = window, bptt_segments, tuple(controls)
        # the loss is normalized by the labels of all accumulated batches, and it predicts the next token
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._counted: list[Tensor] = []

    @property
    def router(self) -> Router:
        """The hooks' owner on the model."""
        assert self.model is not None
        return router_of(self.model)

    @property
    def _attachment(self) -> Attachment:
        return attached(self.accelerator.unwrap_model(self.model))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss at the labelled tokens of a batch of streams, and the memory's own.

        Raises:
            ValueError: rows that are not whole segments, without labels, or padded on the left.
            FloatingPointError: the loss became NaN or infinite.
        """
        self._check_batch(inputs)
        # what runs outside of the model's forward, such as writes of a whole row, needs mixed precision too
        with self.accelerator.autocast():
            unrolled = unroll(
                model,
                inputs["input_ids"],
                inputs["labels"],
                window=self.window,
                bptt_segments=self.bptt_segments,
                advance=return_outputs,
            )
        loss, auxiliary = unrolled.loss, unrolled.auxiliary
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower learning_rate or max_grad_norm"
            )
        if num_items_in_batch is not None:
            loss = loss * len(unrolled.targets) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
            auxiliary = auxiliary / self.current_gradient_accumulation_steps
        loss = loss + auxiliary
        return (loss, {"loss": loss, "logits": unrolled.logits}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step, cut to the stage of a curriculum: here, as loaders collate batches ahead. No batch for
        a run that goes on where it has ended, of which the parent would make another step.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        stages = [each for each in self.callback_handler.callbacks if isinstance(each, SegmentCurriculum)]
        if not stages:
            return batches, count
        most = min(stage.segments for stage in stages) * self.router.segment_length
        batches = [{name: tensor[:, :most] for name, tensor in batch.items()} for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments; parameters that a memory wants to learn faster do so (`rate_scale`).

        Raises:
            ValueError: nothing trains.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        router = router_of(trained)
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise ValueError(
                "nothing trains: this memory has no weights and the model's own are frozen; attach with freeze=False"
            )
        optimizer = super().create_optimizer(model)
        scales = {parameter: router.memory.rate_scale(name) for name, parameter in router.memory.named_parameters()}
        for group in list(optimizer.param_groups):
            parameters = group["params"]
            group["params"] = [each for each in parameters if scales.get(each, 1.0) == 1.0]
            for scale in sorted({scales[each] for each in parameters if each in scales} - {1.0}):
                faster = [each for each in parameters if scales.get(each) == scale]
                optimizer.add_param_group({**group, "params": faster, "lr": group["lr"] * scale})
        return optimizer

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the parent's; loss and accuracy are means over labelled tokens, under every control."""
        self._counted, self.verdict = [], None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        names = ("", *(f"_{control}" for control in self.controls))
        if self._counted and output.metrics is not None:
            rows = torch.cat(self._counted)
            if "other_stream" in self.controls:
                self.verdict = verdict(rows[:, 0], rows[:, 1], rows[:, 2 + self.controls.index("other_stream")])
            count, *sums = rows.sum(0).tolist()
            for place, name in enumerate(names):
                nats, right = sums[place], sums[len(names) + place]
                if math.isnan(nats):
                    warnings.warn(
                        f"{metric_key_prefix}_loss{name} is left out: a batch had a row and no other, with another "
                        "text, to take a memory from; set per_device_eval_batch_size so that every batch has two",
                        stacklevel=2,
                    )
                else:
                    output.metrics[f"{metric_key_prefix}_loss{name}"] = nats / max(count, 1)
                    output.metrics[f"{metric_key_prefix}_accuracy{name}"] = right / max(count, 1)
        self._counted = []
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; ends with the verdict, where measures are printed."""
        metrics = super().evaluate(*args, **kwargs)
        given = kwargs.get("eval_dataset", args[0] if args else None)
        several = isinstance(self.eval_dataset if given is None else given, dict)  # of which each was told by itself
        printing = PRINTING & {type(each).__name__ for each in self.callback_handler.callbacks}
        if self.verdict is not None and printing and not several and self.is_world_process_zero():
            print(self.verdict)
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits `[b, t, v]` and labels `[b, t]` of a batch; position t has the logits behind its token."""
        inputs = self._prepare_inputs(inputs)
        self._check_batch(inputs)
        ids, labels = inputs["input_ids"], inputs["labels"]
        with self.accelerator.autocast():
            found = measure(
                self.accelerator.unwrap_model(model),
                ids,
                labels,
                window=self.window,
                controls=self.controls,
                keep_logits=not prediction_loss_only,
            )
        counted = torch.cat([found.labelled[:, None], found.nats, found.right], 1)
        gathered: Any = self.accelerator.gather_for_metrics(counted)
        self._counted.append(gathered.cpu())
        loss = (found.nats[:, 0].sum() / found.labelled.sum().clamp_min(1)).float()
        return (loss, None, None) if prediction_loss_only else (loss, found.logits, labels)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; `resume_from_checkpoint` is a checkpoint's folder, or True for the last whole one in `output_dir`.

        Raises:
            ValueError: True, and there is none; rows with no label behind their first segment.
            StateError: a checkpoint of another memory.
        """
        if self.train_dataset is not None:
            self._check_lengths(self.train_dataset)
        if resume_from_checkpoint is True:
            last = last_checkpoint(self.args.output_dir)  # pyright: ignore[reportArgumentType]
            if last is None:
                raise ValueError(f"no whole checkpoint in {self.args.output_dir}; train without resume_from_checkpoint")
            resume_from_checkpoint = str(last)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_lengths(self, rows: Any, most: int = 256) -> None:
        """Raises `ValueError` where nothing that the first rows ask for can come from a memory, which is read from the
        second segment on. A dataset that can only be gone through is left alone: some can be once.
        """
        length, collator = self.router.segment_length, self.data_collator
        stages = [each for each in self.callback_handler.callbacks if isinstance(each, SegmentCurriculum)]
        if stages and min(max(count for _, count in each.stages) for each in stages) < 2:
            raise ValueError(
                "the SegmentCurriculum never goes beyond 1 segment, and a memory is read from the second on"
            )
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            return
        seen = min(len(rows), most)
        for place in range(seen):
            try:
                labels = collator([rows[place]])["labels"]
            except Exception:
                if isinstance(collator, SegmentCollator):
                    raise
                return  # it wants more than a row of the dataset; what it makes is checked when it trains
            if bool((labels[:, length + 1 :] != IGNORED).any()):
                return
        if seen:
            mend = (
                "longer rows, such as those of mnemic.Streams, or labels there; or attach with a shorter segment_length"
            )
            if isinstance(collator, SegmentCollator) and collator.segments == 1:
                mend = "the SegmentCollator more segments than 1"
            raise ValueError(
                f"none of the first {seen} rows has a label behind its first segment of {length} tokens, and what is "
                f"written there is read from the next one on: nothing could be remembered. Give {mend}"
            )

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Raises `ValueError` for a batch that is none of streams."""
        length, made_by = self.router.segment_length, _called(self.data_collator)
        mend = f"leave data_collator out, or use mnemic.SegmentCollator({length})"
        if missing := {"input_ids", "labels"} - inputs.keys():
            raise ValueError(f"{made_by} made no {' and no '.join(sorted(missing))}; {mend}")
        if (found := inputs["input_ids"].shape[1]) % length:
            raise ValueError(f"{made_by} made rows of {found} tokens, which are not whole segments of {length}; {mend}")
        if (mask := inputs.get("attention_mask")) is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ValueError(f"{made_by} put padding before tokens, which would be read as text; {mend}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder, model = output_dir or self.args.output_dir or ".", self._attachment.model
        adapted, whole = hasattr(model, "peft_config"), base_trains(model)
        if adapted or not whole:
            self._attachment.save_pretrained(folder)  # first, as it refuses what could not be loaded
        if adapted or whole:
            model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        whole = self._attachment.model
        load_memory(whole, Path(resume_from_checkpoint))
        if hasattr(whole, "peft_config") or base_trains(whole):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # the memory has its own file
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if f"{MEMORY_NAME}." not in name]
        super()._issue_warnings_after_load(load_result)


def _called(collator: Any) -> str:
    """What a collator is called in a message."""
    return getattr(collator, "__name__", type(collator).__name__)


def _refuse(args: TrainingArguments, options: dict[str, Any]) -> None:
    """Raises `ValueError` for what would be passed over silently: this loss is not the model's."""
    for name in ("label_smoothing_factor", "use_liger_kernel", "torch_compile", "deepspeed", "fsdp"):
        if value := getattr(args, name, None):
            raise ValueError(f"{name} is {value!r}, which mnemic.Trainer does not serve; leave it out, or see unroll")
    if options.get("compute_loss_func") is not None:
        raise ValueError("mnemic.Trainer computes its own loss; leave compute_loss_func out or override compute_loss")
    if args.n_gpu > 1:
        raise ValueError(f"one process cannot train on {args.n_gpu} GPUs; start one for each with accelerate launch")


def load_memory(model: nn.Module, folder: Path) -> None:
    """Loads saved weights into the memory that a model has.

    Raises:
        FileNotFoundError: no saved memory in the folder.
        StateError: they are of another memory, or the file is damaged.
    """
    path, router = folder / WEIGHTS_FILE, router_of(model)
    tensors, description = read_file(path)
    check_settings(description.get("memory"), router.config, path)
    check_weights(tensors, router.memory, path)
    router.memory.load_state_dict(tensors)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in a folder that was written to its end; None where there is none.

    A run that is killed while it writes a checkpoint leaves a part of it; the state of the run is written last.
    """
    found = sorted(
        (int(name[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    for step, path in reversed(found):
        with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
            if json.loads((path / STATE_FILE).read_text())["global_step"] == step:
                return path
    return None
