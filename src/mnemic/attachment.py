"""Joining a memory to a model and parting them again; saving and loading the memory's weights."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mnemic.host.anatomy import MEMORY_NAME, Anatomy, examine, fingerprint, fingerprints, trained_positions
from mnemic.host.cache import MemoryCache
from mnemic.host.opening import refuse_paged
from mnemic.host.router import Router
from mnemic.host.wrappers import check_whole, execution_device, misplaced, refuse_late, unwrapped, whole
from mnemic.memories.registry import CONFIGS
from mnemic.memory import Memory, MemoryConfig, UnknownSetting
from mnemic.state import META_LIMIT, StateError, is_finite, nbytes, read_file, strict_json, to_bytes, write_all

CONFIG_FILE, WEIGHTS_FILE = "memory_config.json", "memory_model.safetensors"
PAGED = "init_continuous_batching"
"""What all of paged generation begins with; there an error is raised in the caller's thread."""
WINDOW = 2048
"""Tokens whose keys a session keeps unless it is told otherwise."""
LARGEST = 2**30
"""Most bytes of what a memory from a file begins with beside its weights."""


class Attachment:
    """A memory attached to a model. The model's own weights are frozen while it is attached.

    It holds no state of any stream: that lives in the cache or the session.
    """

    def __init__(self, model: nn.Module, config: MemoryConfig) -> None:
        self.model, self.config = model, config

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

    @property
    def trained(self) -> bool:
        """Whether its weights are others than it was made with; True where it has none.

        A new memory tells the model nothing: a projection of it is 0. Those without one are told by a mark of what they
        were made with, which a memory that was saved untrained does not have.
        """
        memory = self.memory
        zero = any(parameter.ndim > 1 and not bool(parameter.any()) for parameter in memory.parameters())
        return not zero and (_mark(memory) != self.router.made_with or not list(memory.parameters()))

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, of how many."""
        own = sum(parameter.numel() for parameter in self.parameters())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"trainable params: {own:,} || all params: {total:,} || trainable%: {100 * own / total:.4f}")

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model is its base again: nothing is read or written. Windows go on moving.

        It holds for the thread or asynchronous task that is in it, and for no other.
        """
        with self.router.disabled():
            yield

    def detach(self) -> None:
        """Removes the memory and its hooks; the model is what it was, and trains what it trained before."""
        router = self.router
        _save_whole(self.model)
        router.remove(self.anatomy)
        vars(unwrapped(self.model)).pop(PAGED, None)
        for parameter in router.frozen:
            parameter.requires_grad_(True)
        # by name too: `resize_token_embeddings` puts new parameters in the place of others
        for name, parameter in unwrapped(self.model).named_parameters():
            if name in router.frozen_names:
                parameter.requires_grad_(True)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `memory_config.json` and `memory_model.safetensors`, without any stream's state.

        A model that is sharded (FSDP2) must be saved by all processes at once, as weights are gathered; the first one
        writes.

        Raises:
            StateError: what `from_pretrained` would refuse, such as weights that are NaN. Nothing is replaced then.
            ValueError: PEFT changed the memory's modules or accelerate offloaded its weights.
        """
        self._save(folder)

    def _save(self, folder: str | os.PathLike[str], main: bool = True) -> None:
        """`save_pretrained` in the `main` process: of a sharded model always the first."""
        check_whole(self.memory)
        check_unedited(self.router)
        weights = self.memory.state_dict()
        sharded = any(isinstance(tensor, DTensor) for tensor in weights.values())
        name = getattr(unwrapped(self.model).config, "_name_or_path", "") or None  # pyright: ignore
        description = {"memory": self.config.to_dict(), "base_model": name, "base_fingerprint": fingerprint(self.model)}
        weights = {name: whole(tensor) for name, tensor in weights.items()}
        _fitting(self.model, description["memory"], weights, "this memory")
        if torch.distributed.get_rank() == 0 if sharded else main:
            folder, text = Path(folder), json.dumps(description, indent=2) + "\n"
            folder.mkdir(parents=True, exist_ok=True)
            write_all({folder / WEIGHTS_FILE: to_bytes(weights, description), folder / CONFIG_FILE: text.encode()})
        if sharded:
            torch.distributed.barrier()


class SavePretrained:
    """`model.save_pretrained` while a memory is attached: the base alone in Hugging Face's files, as `from_pretrained`
    of its class loads it, and the memory in its own beside them, as `mnemic.from_pretrained` does.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)  # a model that is let go of is freed at once

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self.model(),)  # a copy's is the copied model's

    def __call__(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *given: Any, **options: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`; raises what `Attachment.save_pretrained` does, before anything else."""
        model = self.model()
        assert model is not None
        attached(model)._save(save_directory, is_main_process)
        type(model).save_pretrained(model, save_directory, is_main_process, *given, **options)


def _carriers(model: nn.Module) -> Iterator[tuple[PreTrainedModel, set[str]]]:
    """The parts of a model that Hugging Face can save, and the names of the memory's weights in each."""
    for module in unwrapped(model).modules():
        if isinstance(module, PreTrainedModel):
            tensors = (*module.named_parameters(), *module.named_buffers())
            if names := {name for name, _ in tensors if MEMORY_NAME in name.split(".")}:
                yield module, names


def _save_apart(model: nn.Module) -> None:
    """From now on the memory's weights are not saved among the base's."""
    for module, names in _carriers(model):
        module._keys_to_ignore_on_save = {*(module._keys_to_ignore_on_save or ()), *names}
        module.save_pretrained = SavePretrained(module)  # pyright: ignore[reportAttributeAccessIssue]


def _save_whole(model: nn.Module) -> None:
    """Undoes `_save_apart`."""
    for module, names in _carriers(model):
        module._keys_to_ignore_on_save = {*(module._keys_to_ignore_on_save or ())} - names
        vars(module).pop("save_pretrained", None)


def attach(model: nn.Module, config: MemoryConfig | Sequence[MemoryConfig], *, freeze: bool = True) -> Attachment:
    """Attaches a new memory to a Hugging Face model and, unless `freeze=False`, freezes the model's own weights.

    With several configs several memories are attached, in this order, each with its own state.

    The model's outputs do not change until the memory is trained (mechanisms that cannot promise this say so). Attach
    before `torch.compile`, DDP or FSDP2 prepare the model, and after PEFT.

    Raises:
        ValueError: a family that cannot be served, a layer the model does not have, a memory already attached, or a
            model that was prepared already.
    """
    anatomy = examine(model)
    refuse_late(model)
    # checked again, as it may have been edited; and a copy, as a later change to the caller's is none to the memory
    config = copy.deepcopy(config if isinstance(config, MemoryConfig) else one_of(config)).replace()
    if hasattr(anatomy.trunk, MEMORY_NAME):
        raise ValueError(f"{type(model).__name__} already has a memory; detach it first")
    check_segment(model, config)
    memory = config.build(anatomy.width, len(anatomy.blocks), anatomy.causal).to(execution_device(anatomy.blocks[0]))
    check_segment(model, config, memory.beside)
    router = Router(memory, config, anatomy)
    router.train(model.training)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    trained = {name for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad}
    router.install(anatomy)  # may refuse the model, which then is as it was
    for parameter in frozen:
        parameter.requires_grad_(False)
    router.made_with = _mark(memory)
    router.frozen = frozen  # a list of the router's own, so that copies of a model know theirs
    router.frozen_names = trained if freeze else set()
    vars(unwrapped(model))[PAGED] = refuse_paged
    _save_apart(model)
    return Attachment(model, config)


def one_of(configs: Sequence[MemoryConfig]) -> MemoryConfig:
    """The config of several memories as one."""
    if not configs or not all(isinstance(each, MemoryConfig) for each in configs):
        raise ValueError(f"{configs!r} is no config and no list of some; pass e.g. mnemic.RecallConfig()")
    if len(configs) == 1:
        return configs[0]
    return CONFIGS["several"](memories=[each.to_dict() for each in configs])  # pyright: ignore[reportCallIssue]


def _mark(memory: Memory) -> list[float]:
    """A few values of each weight, from its middle."""
    few = [parameter.detach().flatten()[parameter.numel() // 2 :][:4] for parameter in memory.parameters()]
    return torch.cat(few).float().tolist() if few else []


def check_segment(model: nn.Module, config: MemoryConfig, beside: int = 0) -> None:
    """Raises `ValueError` for a segment that is longer than the model's positions, with memory tokens `beside` it, and
    for a window of an encoder.
    """
    trained = trained_positions(model)
    if config.window is not None and not examine(model).causal:
        raise ValueError(
            f"window is {config.window}, but {type(model).__name__} is an encoder and keeps no keys; leave it out"
        )
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
    return Attachment(model, router_of(model).config)


def is_attached(model: nn.Module) -> bool:
    """Whether a model has a memory."""
    return any(MEMORY_NAME in module._modules for module in model.modules())


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
    source = folder / WEIGHTS_FILE
    if description.keys() != kinds.keys() or not all(isinstance(description[name], kinds[name]) for name in kinds):
        raise StateError(
            f"{source} does not describe a memory's weights as this release of mnemic does; load what its "
            "save_pretrained wrote"
        )
    check_fingerprint(model, description, folder, strict=strict)
    attachment = attach(model, _fitting(model, description["memory"], tensors, source))
    attachment.memory.load_state_dict(tensors)
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


def config_of(settings: object, source: object) -> MemoryConfig:
    """The config that a file tells of; raises `StateError`. A setting that it does not name has its default."""
    if not isinstance(settings, dict):
        raise StateError(f"{source} does not say which memory it is of")
    try:
        return MemoryConfig.from_file(settings)
    except UnknownSetting as error:
        raise StateError(
            f"{source} was written by a later release of mnemic (or with a mechanism that was not imported), or it is "
            f"damaged: {error}"
        ) from error
    except Exception as error:  # whatever a config does that nobody would write
        raise StateError(f"{source} has a config that makes no memory: {str(error)[:500]}") from error


def check_settings(settings: object, config: MemoryConfig, source: object) -> None:
    """Raises `StateError` unless a file's settings are those of a memory's config."""
    if (found := config_of(settings, source)) != config:
        told = _differences(found.to_dict(), config.to_dict(), "there", "here")
        raise StateError(f"{source} was written with another memory ({told}); load the memory it was written with")


def check_unedited(router: Router) -> None:
    """Raises `StateError` where a config was changed after it was attached: the memory is not what it says."""
    if (now := router.config.to_dict()) != router.settings:
        told = _differences(router.settings, now, "then", "now")
        raise StateError(
            f"the config was edited after it was attached ({told}), which changes no memory; detach, and attach "
            "config.replace(...)"
        )


def check_same(router: Router, settings: dict[str, Any]) -> None:
    """Raises `ValueError` where a model has got a memory of other settings than those a session was read with."""
    if router.settings != settings:
        told = _differences(settings, router.settings, "then", "now")
        raise ValueError(
            f"this session has been read with another memory ({told}); attach that one again, or begin a new session"
        )


def _differences(theirs: dict[str, Any], mine: dict[str, Any], there: str, here: str) -> str:
    names = [name for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r} {there}, {mine.get(name)!r} {here}" for name in names)


def _fitting(model: nn.Module, settings: object, weights: dict[str, Tensor], source: object) -> MemoryConfig:
    """The config that a file tells of, once `weights` are those of such a memory on this model; raises `StateError`.

    The memory is built without values, so settings that would fill the machine fill nothing.
    """
    anatomy, config = examine(model), config_of(settings, source)
    try:
        check_segment(model, config)
        with torch.device("meta"):
            memory = config.build(anatomy.width, len(anatomy.blocks), anatomy.causal)
        check_segment(model, config, memory.beside)
        besides = nbytes(dict(memory.named_buffers())) + nbytes(memory.init_state(1, torch.device("meta")))
    except Exception as error:  # likewise
        raise StateError(f"{source} has a config that makes no memory of this model: {str(error)[:500]}") from error
    if besides > LARGEST:
        raise StateError(f"{source} has a config whose memory begins with {besides:,} bytes; the most are {LARGEST:,}")
    check_weights(weights, memory, source)
    return config


def check_weights(weights: dict[str, Tensor], memory: Memory, source: object) -> None:
    """Raises `StateError` unless `weights` are such as `memory` has, and finite."""
    expected = memory.state_dict()
    if weights.keys() != expected.keys():
        names = ", ".join(sorted(weights.keys() ^ expected.keys()))
        raise StateError(f"{source} does not fit its own config, by which there is or is not {names[:500]}")
    for name, tensor in weights.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            found = f"{list(tensor.shape)} of {tensor.dtype}"
            raise StateError(f"{source}: {name} is {found}, by its config it is {list(wanted.shape)} of {wanted.dtype}")
        if not is_finite(tensor):
            raise StateError(f"{source}: {name} is NaN or infinite somewhere")


def check_fingerprint(model: nn.Module, description: dict[str, Any], path: object, *, strict: bool) -> None:
    """Raises `StateError` when something saved for one base model is loaded into another."""
    expected, (found, earlier) = description["base_fingerprint"], fingerprints(model)
    if strict and expected not in (found, earlier):
        narrow = ""
        if unwrapped(model).dtype == torch.float16:
            narrow = (
                " in float16, whose rounding makes another base of wider weights (bfloat16 and float32 are the same)"
            )
        raise StateError(
            f"{path} was written for base model {description.get('base_model')!r} ({expected}), this one is {found}"
            f"{narrow}; load the base it was trained on, or pass strict=False if you know they fit"
        )


def default_window(model: nn.Module) -> int:
    """How many of the latest tokens a session's base sees where nobody says: the window of the memory's config, or
    `WINDOW`, at least four segments, and no more than the base was trained for.

    One segment where memory tokens stand beside it: they are made for a base that sees no earlier words.
    """
    router, trained = router_of(model), trained_positions(model)
    length = router.segment_length
    if router.config.window is not None or router.memory.beside:
        return router.config.window or length
    wanted = max(WINDOW, 4 * length)
    return wanted if trained is None else min(wanted, trained)


def memory_cache(model: nn.Module, window: int | None = None, sinks: int | None = None) -> MemoryCache:
    """A cache for new streams of a model with a memory, which keeps the base's keys of the last `window` tokens.

    `window=None` keeps all of them, as far as the model has positions. Batch size is that of the first call. The first
    `sinks` keys of a stream never leave: by default 4 where the window is longer than a segment; none where the memory
    says itself which keys a token sees (recall, which has sinks of its own; Transformer-XL with `same_length`), and
    where the model's rotary embedding depends on the length of a text.

    Raises:
        ValueError: a window longer than the model's positions, or shorter than a segment; more sinks than it has room
            for.
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
    most = router.most_sinks(window)
    if sinks is not None and not (isinstance(sinks, int) and 0 <= sinks <= most):
        why = router.sinkless or f"beside a segment of {router.segment_length} a window of {window} has room for {most}"
        why = "without a window all keys stay" if window is None else why
        raise ValueError(f"sinks is {sinks!r}, and {why}; use {f'0 to {most}' if most else '0'}, or leave it out")
    return router.new_cache(window, sinks)
