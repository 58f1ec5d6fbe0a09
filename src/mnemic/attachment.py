"""Joining a memory to a model and parting them again; saving and loading the memory's weights."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mnemic.host.anatomy import MEMORY_NAME, Anatomy, examine, fingerprint, trained_positions
from mnemic.host.cache import MemoryCache
from mnemic.host.router import Router
from mnemic.host.wrappers import check_whole, execution_device, misplaced, refuse_late, unwrapped, whole
from mnemic.memories.base import Memory, MemoryConfig
from mnemic.state import META_LIMIT, StateError, nbytes, read_file, strict_json, write_file

CONFIG_FILE, WEIGHTS_FILE = "memory_config.json", "memory_model.safetensors"
LARGEST = 2**30
"""Most bytes of what a memory from a file begins with beside its weights."""


class Attachment:
    """A memory attached to a model. The model's own weights are frozen while it is attached.

    It holds no state of any stream: that lives in the cache or the session.
    """

    def __init__(self, model: nn.Module, config: MemoryConfig, frozen: list[nn.Parameter]) -> None:
        self.model, self.config = model, config
        self._frozen = frozen

    def __repr__(self) -> str:
        try:
            size = f"{sum(parameter.numel() for parameter in self.parameters()):,} parameters"
        except RuntimeError:
            size = "detached"
        window = self.config.window or self.config.segment_length
        return (
            f"<mnemic.Attachment {self.config.kind} on {type(self.model).__name__}: {size}, segments of "
            f"{self.config.segment_length:,} tokens, window {window:,}>"
        )

    @property
    def anatomy(self) -> Anatomy:
        """The host's parts."""
        return examine(self.model)

    @property
    def router(self) -> Router:
        """The hooks' owner on the model; raises `RuntimeError` once detached."""
        return router_of(self.model)

    @property
    def memory(self) -> Memory:
        """The mechanism's module."""
        return self.router.memory

    def parameters(self) -> list[nn.Parameter]:
        """What training moves."""
        return list(self.memory.parameters())

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, of how many."""
        own = sum(parameter.numel() for parameter in self.parameters())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"trainable params: {own:,} || all params: {total:,} || trainable%: {100 * own / total:.4f}")

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model is its base again: nothing is read or written. Windows go on moving."""
        router = self.router
        before, router.enabled = router.enabled, False
        try:
            yield
        finally:
            router.enabled = before

    def detach(self) -> None:
        """Removes the memory and its hooks; the model is what it was, and trains what it trained before."""
        self.router.remove(self.anatomy)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `memory_config.json` and `memory_model.safetensors`, without any stream's state.

        A model that is sharded (FSDP2) must be saved by all processes at once, as weights are gathered; the first one
        writes. Raises `ValueError` where PEFT changed the memory's modules or accelerate offloaded its weights.
        """
        check_whole(self.memory)
        weights = self.memory.state_dict()
        sharded = any(isinstance(tensor, DTensor) for tensor in weights.values())
        name = getattr(unwrapped(self.model).config, "_name_or_path", "") or None  # pyright: ignore
        description = {"memory": self.config.to_dict(), "base_model": name, "base_fingerprint": fingerprint(self.model)}
        weights = {name: whole(tensor) for name, tensor in weights.items()}
        if not sharded or torch.distributed.get_rank() == 0:
            self._write(Path(folder), weights, description)
        if sharded:
            torch.distributed.barrier()

    def _write(self, folder: Path, weights: dict[str, Tensor], description: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / WEIGHTS_FILE, weights, description)
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def attach(model: nn.Module, config: MemoryConfig, *, freeze: bool = True) -> Attachment:
    """Attaches a new memory to a Hugging Face model and, unless `freeze=False`, freezes the model's own weights.

    The model's outputs do not change until the memory is trained (mechanisms that cannot promise this say so). Attach
    before `torch.compile`, DDP or FSDP2 prepare the model, and after PEFT.

    Raises:
        ValueError: a family that cannot be served, a layer the model does not have, a memory already attached, or a
            model that was prepared already.
    """
    anatomy = examine(model)
    refuse_late(model)
    if hasattr(anatomy.trunk, MEMORY_NAME):
        raise ValueError(f"{type(model).__name__} already has a memory; detach it first")
    check_segment(model, config)
    memory = config.build(anatomy.width, len(anatomy.blocks), anatomy.causal).to(execution_device(anatomy.blocks[0]))
    check_segment(model, config, memory.beside)
    router = Router(memory, config, anatomy)
    router.train(model.training)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    router.install(anatomy)
    return Attachment(model, config, frozen)


def check_segment(model: nn.Module, config: MemoryConfig, beside: int = 0) -> None:
    """Raises `ValueError` for a segment that is longer than the model's positions, with memory tokens `beside` it."""
    trained = trained_positions(model)
    if trained is not None and config.segment_length > trained:
        raise ValueError(
            f"segment_length {config.segment_length} is longer than the model's {trained} positions; "
            f"set segment_length to at most {trained}"
        )
    if trained is not None and config.segment_length + beside > trained:
        raise ValueError(
            f"a segment of {config.segment_length} tokens with {beside} memory tokens beside it is longer than "
            f"the model's {trained} positions; make either smaller"
        )


def attached(model: nn.Module) -> Attachment:
    """The handle of a model that has a memory: for copies and unpickled models, whose first handle is elsewhere."""
    return Attachment(model, router_of(model).config, [])


def router_of(model: nn.Module) -> Router:
    """The router on a model's trunk; raises `RuntimeError` when the model has no memory."""
    for module in model.modules():  # quicker than to examine it: this is asked for every batch
        router = module._modules.get(MEMORY_NAME)
        if isinstance(router, Router):
            return router
        if router is not None:
            raise misplaced(router)
    examine(model)  # a model that cannot have one says why
    raise RuntimeError(f"{type(model).__name__} has no memory; attach one with mnemic.attach(model, config)")


def from_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, strict: bool = True) -> Attachment:
    """Attaches the memory that `save_pretrained` wrote; nothing is attached when anything is wrong.

    Raises:
        StateError: another base model (unless `strict=False`), an edited or truncated file.
        FileNotFoundError: no saved memory in the folder.
    """
    folder = Path(folder)
    tensors, description = read_file(folder / WEIGHTS_FILE)
    check_beside(folder / CONFIG_FILE, description)
    kinds = {"memory": dict, "base_model": str | None, "base_fingerprint": str}
    if description.keys() != kinds.keys() or not all(isinstance(description[name], kinds[name]) for name in kinds):
        raise StateError(f"{folder / WEIGHTS_FILE} does not describe a memory's weights; save_pretrained writes them")
    check_fingerprint(model, description, folder, strict=strict)
    config = _fitting(model, description["memory"], tensors, folder / WEIGHTS_FILE)
    attachment = attach(model, config)
    try:
        attachment.memory.load_state_dict(tensors)
    except RuntimeError as error:
        attachment.detach()
        raise StateError(f"{folder / WEIGHTS_FILE} does not fit its own config: {error}") from error
    return attachment


def check_beside(path: Path, description: dict[str, Any]) -> None:
    """Raises `StateError` unless the config beside the weights says what they say; `FileNotFoundError` without one."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    if path.stat().st_size > META_LIMIT:
        raise StateError(f"{path} has more than {META_LIMIT:,} bytes; it was not written by save_pretrained")
    try:
        beside = strict_json(path.read_text())
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path} is not JSON ({str(error)[:200]})") from error
    if beside != description:
        raise StateError(f"{path} does not belong to {WEIGHTS_FILE} beside it: it was edited or mixed up")


def _fitting(model: nn.Module, settings: dict[str, Any], weights: dict[str, Tensor], path: Path) -> MemoryConfig:
    """The config that a file tells of, once `weights` are those of such a memory on this model; raises `StateError`.

    The memory is built without values, so settings that would fill the machine fill nothing.
    """
    anatomy = examine(model)
    try:
        config = MemoryConfig.from_dict(settings)
        check_segment(model, config)
        with torch.device("meta"):
            memory = config.build(anatomy.width, len(anatomy.blocks), anatomy.causal)
        check_segment(model, config, memory.beside)
        expected = memory.state_dict()
        besides = nbytes(dict(memory.named_buffers())) + nbytes(memory.init_state(1, torch.device("meta")))
    except Exception as error:  # whatever a config does that nobody would write
        raise StateError(f"{path} has a config that makes no memory of this model: {str(error)[:500]}") from error
    if besides > LARGEST:
        raise StateError(f"{path} has a config whose memory begins with {besides:,} bytes; the most are {LARGEST:,}")
    if weights.keys() != expected.keys():
        names = ", ".join(sorted(weights.keys() ^ expected.keys()))
        raise StateError(f"{path} does not fit its own config, by which there is or is not {names[:500]}")
    for name, tensor in weights.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            found = f"{list(tensor.shape)} of {tensor.dtype}"
            raise StateError(f"{path}: {name} is {found}, by its config it is {list(wanted.shape)} of {wanted.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StateError(f"{path}: {name} is NaN or infinite somewhere")
    return config


def check_fingerprint(model: nn.Module, description: dict[str, Any], path: object, *, strict: bool) -> None:
    """Raises `StateError` when something saved for one base model is loaded into another."""
    expected, found = description["base_fingerprint"], fingerprint(model)
    if strict and expected != found:
        raise StateError(
            f"{path} was written for base model {description.get('base_model')!r} ({expected}), this one is {found}; "
            "load the base it was trained on, or pass strict=False if you know they fit"
        )


def memory_cache(model: nn.Module, window: int | None = None) -> MemoryCache:
    """A cache for new streams of a model with a memory, which keeps the base's keys of the last `window` tokens.

    `window=None` keeps all of them, as far as the model has positions. Batch size is that of the first call.

    Raises:
        ValueError: a window longer than the model's positions, or shorter than a segment.
    """
    router, trained = router_of(model), trained_positions(model)
    if not router.causal:
        raise ValueError(f"{type(model).__name__} is an encoder and keeps no keys; use mnemic.Session")
    if window is not None:
        if window < router.segment_length:
            raise ValueError(
                f"segment_length {router.segment_length} is longer than the window of {window}; "
                f"set window to at least {router.segment_length}"
            )
        if trained is not None and window > trained:
            raise ValueError(
                f"window {window} is larger than the model's {trained} positions; set it to at most {trained}"
            )
    return router.new_cache(window)
