"""What `test_accelerate` does in one process and, under `accelerate launch`, in two: each takes a share of a batch."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import Dataset

import mnemic
from example_scripts import run
from families import make
from helpers import CONFIGS, SEGMENT, tokens, trained
from mnemic.host.anatomy import fingerprint
from mnemic.host.release import GENERATE_CACHE as CACHE

STEPS = 3
Found = dict[str, Any]


def batch(step: int, segments: int = 4) -> tuple[Tensor, Tensor]:
    """Four streams, the same in every process; as many labels in each half of them."""
    ids = tokens(4, segments * SEGMENT, step)
    labels = ids.clone()
    labels[:, : (segments - 2) * SEGMENT] = -100
    return ids, labels


def model_with(label: str, name: str = "llama", freeze: bool = True, **changes: Any) -> Any:
    model = make(name, **changes)
    trained(model, CONFIGS[label])
    for parameter in model.parameters() if not freeze else ():
        parameter.requires_grad_(True)
    return model.train()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What trains, whole."""
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named}


def steps(accelerator: Accelerator, model: nn.Module, loss_of: Any, optimizer: Any, count: int = STEPS) -> Found:
    """A training loop as anyone writes it."""
    losses = []
    for step in range(count):
        ids, labels = (part.chunk(accelerator.num_processes)[accelerator.process_index].clone() for part in batch(step))
        loss = loss_of(model, ids, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    return {"losses": torch.stack(losses), "weights": weights(model)}


def unrolled(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    found = mnemic.unroll(model, ids, labels, bptt_segments=2)
    return found.loss + found.auxiliary


def called(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """One call of the model: on a cache with a window its segments run one after another inside."""
    cache = mnemic.memory_cache(model, SEGMENT)
    return model(input_ids=ids, labels=labels, **{CACHE: cache}, use_cache=True).loss


# --- jobs: each gives the same in one process and in two -------------------------------------------------------------


def plain(label: str, loss_of: Any = unrolled, checkpointing: bool = False) -> Found:
    """A loop with accelerate."""
    accelerator = Accelerator(cpu=True)
    model = model_with(label)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(mnemic.attached(model).parameters(), 0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    return steps(accelerator, model, loss_of, optimizer)


def sharded(label: str, folder: Path, freeze: bool = True) -> Found:
    """A loop over a model that FSDP2 shards; the memory is saved from its shards."""
    accelerator = Accelerator(cpu=True)
    model = model_with(label, freeze=freeze)
    attachment = mnemic.attached(model)
    if accelerator.num_processes > 1:
        for block in attachment.anatomy.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    found = steps(accelerator, model, unrolled, optimizer)
    attachment.save_pretrained(folder / f"{label}-{freeze}-{accelerator.num_processes}")
    return found | {"fingerprint": fingerprint(model)}


class Streams(Dataset):
    """Rows with different numbers of labels."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tokens(1, 4 * SEGMENT, index)[0]
        labels = ids.clone()
        labels[: 2 * SEGMENT + index] = -100
        return {"input_ids": ids, "labels": labels}


def trainer(kind: type[transformers.Trainer], label: str, folder: Path) -> Found:
    """A Trainer, which takes a batch of four from two processes with two rows each."""
    model = model_with(label)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4 // Accelerator(cpu=True).num_processes,
        learning_rate=0.1,
        optim="sgd",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    made = kind(model=model, args=arguments, train_dataset=Streams())
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {"losses": torch.tensor(losses), "weights": weights(model)}


def jobs(folder: Path) -> dict[str, Found]:
    """All of them, by name."""
    return {
        "all at once": plain("emt-0"),
        "one after another": plain("emt-1"),
        "tokens beside": plain("rmt-0"),
        "a loss of its own": plain("compressive-2"),
        "a state that grows": plain("memoria-0"),
        "one call": plain("emt-0", called),
        "gradient checkpointing": plain("emt-0", checkpointing=True),
        "sharded, all at once": sharded("emt-0", folder),
        "sharded, one after another": sharded("emt-1", folder),
        "sharded, tokens beside": sharded("rmt-0", folder),
        "sharded, the base trains": sharded("emt-0", folder, freeze=False),
        "mnemic.Trainer": trainer(mnemic.Trainer, "emt-0", folder),
        "transformers.Trainer": trainer(transformers.Trainer, "emt-0", folder),
    }


# --- what two processes alone can show -------------------------------------------------------------------------------


def error_of(function: Any) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def apart() -> Found:
    """Streams of one process are not seen by the other: DDP broadcasts buffers, and a memory keeps no state in any."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model_with("emt-0").eval())
    inner = accelerator.unwrap_model(model)
    session = mnemic.Session(inner)
    ids = tokens(1, 3 * SEGMENT, 10 + accelerator.process_index)
    session.read(ids[:, : 2 * SEGMENT])
    model(input_ids=tokens(2, SEGMENT))  # broadcasts what there is to broadcast
    session.read(ids[:, 2 * SEGMENT :])
    return {"logits": accelerator.gather(session.forward(tokens(1, 5)).logits)}


def unused() -> Found:
    """One segment writes what nobody reads: DDP has to be told that some weights may get no gradient."""
    ids, labels = (part.chunk(2)[0] for part in batch(0, 2))
    ids, labels = ids[:, :SEGMENT], labels[:, :SEGMENT]
    found: Found = {}
    for handlers in ([], [DistributedDataParallelKwargs(find_unused_parameters=True)]):
        accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
        model = accelerator.prepare(model_with("emt-0"))

        def twice(accelerator: Accelerator = accelerator, model: nn.Module = model) -> None:
            for _ in range(2):
                accelerator.backward(mnemic.unroll(model, ids, labels).loss)

        found["told" if handlers else "untold"] = error_of(twice)
    return found


def shards() -> Found:
    """A sharded model answers as a whole one, and so do its sessions, in all processes at once."""
    ids, found = tokens(1, 3 * SEGMENT), {}
    for label in ("emt-0", "emt-1"):
        model = model_with(label).eval()
        for block in mnemic.attached(model).anatomy.blocks:
            fully_shard(block)
        fully_shard(model)
        session = mnemic.Session(model)
        session.read(ids)
        found[label] = {
            "session": session.forward(ids[:, :5]).logits,
            "answer": model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False),
        }
    # weights in half precision, sums of gradients in full
    lower = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = model_with("emt-0")
    for block in mnemic.attached(model).anatomy.blocks:
        fully_shard(block, mp_policy=lower)
    fully_shard(model, mp_policy=lower)
    loss = unrolled(model, *batch(0))
    loss.backward()
    found["lower"] = loss.detach()
    found["gradients"] = all(parameter.grad is not None for parameter in mnemic.attached(model).parameters())
    return found


def late() -> Found:
    """Attaching to what was prepared without a memory."""
    config, bare = CONFIGS["emt-0"], Accelerator(cpu=True).prepare(make("llama"))
    shards = make("llama")
    fully_shard(shards)
    return {
        "ddp": error_of(lambda: mnemic.attach(bare, config)),
        "fsdp": error_of(lambda: mnemic.attach(shards, config)),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = jobs(folder) | {"apart": apart(), "unused": unused(), "shards": shards(), "late": late()}
    for name in ("accelerate_loop", "fsdp2_loop"):
        run(f"{name}.py", folder / "base", folder / name)
    if Accelerator(cpu=True).is_main_process:
        torch.save(found, folder / "found.pt")
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
