"""Joining a memory to a model and parting them again; saving and loading the memory's weights."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnemic.host.anatomy import MEMORY_NAME, Anatomy, examine, fingerprint, trained_positions
from mnemic.host.cache import MemoryCache
from mnemic.host.router import Router
from mnemic.memories.base import Memory, MemoryConfig
from mnemic.state import StateError, read_file, write_file

CONFIG_FILE, WEIGHTS_FILE = "memory_config.json", "memory_model.safetensors"


class Attachment:
    """A memory attached to a model. The model's own weights are frozen while it is attached.

    It holds no state of any stream: that lives in the cache or the session.
    """

    def __init__(self, model: nn.Module, config: MemoryConfig, frozen: list[nn.Parameter]) -> None:
        self.model, self.config = model, config
        self._frozen = frozen

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
        """Writes `memory_config.json` and `memory_model.safetensors`, without any stream's state."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = getattr(self.model.config, "_name_or_path", "") or None  # pyright: ignore[reportAttributeAccessIssue]
        description = {"memory": self.config.to_dict(), "base_model": name, "base_fingerprint": fingerprint(self.model)}
        write_file(folder / WEIGHTS_FILE, dict(self.memory.state_dict()), description)
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def attach(model: nn.Module, config: MemoryConfig, *, freeze: bool = True) -> Attachment:
    """Attaches a new memory to a Hugging Face model and, unless `freeze=False`, freezes the model's own weights.

    The model's outputs do not change until the memory is trained (mechanisms that cannot promise this say so). Attach
    before `torch.compile`, `accelerate` or FSDP wrap the model, and after PEFT.

    Raises:
        ValueError: a family that cannot be served, a layer the model does not have, or a memory already attached.
    """
    anatomy = examine(model)
    if hasattr(anatomy.trunk, MEMORY_NAME):
        raise ValueError(f"{type(model).__name__} already has a memory; detach it first")
    trained = trained_positions(model)
    if trained is not None and config.segment_length > trained:
        raise ValueError(
            f"segment_length {config.segment_length} is longer than the model's {trained} positions; "
            f"set segment_length to at most {trained}"
        )
    memory = config.build(anatomy.width, len(anatomy.blocks), anatomy.causal).to(_device(anatomy.blocks[0]))
    if trained is not None and config.segment_length + memory.beside > trained:
        raise ValueError(
            f"a segment of {config.segment_length} tokens with {memory.beside} memory tokens beside it is longer than "
            f"the model's {trained} positions; make either smaller"
        )
    router = Router(memory, config, anatomy)
    router.train(model.training)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    router.install(anatomy)
    return Attachment(model, config, frozen)


def attached(model: nn.Module) -> Attachment:
    """The handle of a model that has a memory: for copies and unpickled models, whose first handle is elsewhere."""
    return Attachment(model, router_of(model).config, [])


def router_of(model: nn.Module) -> Router:
    """The router on a model's trunk; raises `RuntimeError` when the model has no memory."""
    for module in model.modules():  # quicker than to examine it: this is asked for every batch
        router = module._modules.get(MEMORY_NAME)
        if isinstance(router, Router):
            return router
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
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {folder}")
    try:
        if json.loads((folder / CONFIG_FILE).read_text()) != description:
            raise StateError(
                f"{folder / CONFIG_FILE} does not belong to {WEIGHTS_FILE} beside it: it was edited or mixed up"
            )
    except json.JSONDecodeError as error:
        raise StateError(f"{folder / CONFIG_FILE} is not JSON ({error})") from error
    check_fingerprint(model, description, folder, strict=strict)
    attachment = attach(model, MemoryConfig.from_dict(description["memory"]))
    try:
        attachment.memory.load_state_dict(tensors)
    except RuntimeError as error:
        attachment.detach()
        raise StateError(f"{folder / WEIGHTS_FILE} does not fit its own config: {error}") from error
    return attachment


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


def _device(block: nn.Module) -> torch.device:
    # accelerate reports offloaded blocks on `meta` and names their real device in its hook
    execution = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
    return torch.device(execution) if execution is not None else next(block.parameters()).device
