"""A session: one stream's memory, explicit, named by nobody but its owner, small enough to keep for every user."""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from mnemic.attachment import check_fingerprint, memory_cache, router_of
from mnemic.host.anatomy import examine, fingerprint
from mnemic.host.cache import MemoryCache, MemoryLayer, Window
from mnemic.host.call import carrying
from mnemic.host.router import Router
from mnemic.state import StateError, read_file, write_file
from mnemic.stream import Stream
from mnemic.unrolling import obstacle_to_parallel, read_segments


class Session:
    """One stream through a model with a memory: read any length, generate, save, load, fork, reset.

    `window` is the number of the latest tokens whose keys the base keeps; by default the window of the memory's config,
    which is the one it was trained with. Text needs a `tokenizer`; token ids `[1, T]` do not. Sessions of one model
    share nothing.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, window: int | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        router = router_of(model)
        if window is None and router.causal:
            window = router.config.window or router.segment_length
        self.window = window
        self._cache: MemoryCache | None = memory_cache(model, window) if router.causal else None
        self._layer = MemoryLayer() if self._cache is None else self._cache.memory

    # --- using it ----------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> MemoryCache:
        """For `model.generate(new_ids, past_key_values=session.cache)` and `model(new_ids, past_key_values=...)`."""
        if self._cache is None:
            raise ValueError(f"{type(self.model).__name__} is an encoder and has no cache; use Session.read or forward")
        return self._cache

    @property
    def stream(self) -> Stream | None:
        """What is carried; None before the first token."""
        return self._layer.stream

    @property
    def nbytes(self) -> int:
        """Bytes carried: the memory's state, tokens that wait for their segment to fill, and the window's keys."""
        stream = self.stream.nbytes if self.stream is not None else 0
        keys = sum(
            tensor.numel() * tensor.element_size()
            for layer in (self._cache.layers if self._cache is not None else [])
            if isinstance(layer, DynamicLayer) and layer.is_initialized
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )
        return stream + keys

    def ids(self, text: str | Tensor | list[int]) -> Int[Tensor, "1 t"]:
        """Token ids of a text, or ids as they are, on the model's device; raises `ValueError` if there are none."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("text needs a tokenizer: Session(model, tokenizer); or pass token ids [1, T]")
            text = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.as_tensor(text, dtype=torch.long)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            raise ValueError(f"a session is one stream: expected token ids [1, T] with T >= 1, got {list(ids.shape)}")
        return ids.to(self._router.device)

    def read(self, text: str | Tensor | list[int]) -> int:
        """Takes in a text of any length, segment by segment, in constant memory; returns the number of tokens.

        If anything fails on the way, the session is as it was before.
        """
        ids, done = self.ids(text), 0
        trunk, router = examine(self.model).trunk, self._router
        restore = self._snapshot()
        try:
            with torch.no_grad():
                if self._can_read_ahead():
                    whole = ids.shape[1] - ids.shape[1] % router.segment_length
                    if whole:
                        self._layer.stream = read_segments(self.model, ids[:, :whole], self.stream)
                    ids, done = ids[:, whole:], whole
                # the head is not needed to read, and a bounded call bounds what a read holds at once
                longest = router.segment_length if self._cache is None else 8 * router.segment_length
                for start in range(0, ids.shape[1], longest):
                    part = ids[:, start : start + longest]
                    if self._cache is not None:
                        trunk(input_ids=part, past_key_values=self._cache, use_cache=True)
                    else:
                        with carrying(self._layer):
                            trunk(input_ids=part)
        except BaseException:
            restore()
            raise
        return done + ids.shape[1]

    def _can_read_ahead(self) -> bool:
        """Whether whole segments may go through the base as one batch: none is begun, and none depends on another."""
        return (
            self.window is not None
            and (self.stream is None or not self.stream.counts[0])
            and obstacle_to_parallel(self.model, self.window) is None
        )

    def forward(self, text: str | Tensor | list[int], **kwargs: Any) -> Any:
        """The model's outputs for new tokens, which the session takes in as `read` does."""
        ids = self.ids(text)
        restore = self._snapshot()
        try:
            if self._cache is not None:
                return self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **kwargs)
            with carrying(self._layer):
                return self.model(input_ids=ids, **kwargs)
        except BaseException:
            restore()
            raise

    def generate(self, prompt: str | Tensor | list[int], **kwargs: Any) -> Any:
        """Continues a prompt with `model.generate`; the session takes in the prompt and the answer.

        Returns the answer: a string for a string, else token ids `[1, T]`. `kwargs` are those of `generate`.
        """
        ids = self.ids(prompt)
        restore = self._snapshot()
        try:
            # generate works on a fork: it leaves out its last token, and with beams or several sequences it has many
            # rows; the session then reads what was said, once
            cache = self.cache.fork()
            rows = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
            if rows > 1 and cache.window is not None:
                cache.batch_repeat_interleave(rows)
            output = self.model.generate(ids, past_key_values=cache, **kwargs)  # pyright: ignore[reportCallIssue]
            sequences = output if isinstance(output, Tensor) else output.sequences
            if rows == 1 and sequences.shape[1] > ids.shape[1]:
                self._adopt(cache)
                self.read(sequences[:, -1:])
            else:
                self.read(sequences[:1])
        except BaseException:
            restore()
            raise
        if isinstance(prompt, str):
            return self.tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return sequences[:, ids.shape[1] :] if isinstance(output, Tensor) else output

    def flush(self) -> None:
        """Ends the running segment now: what waits is written, and a window of one segment starts anew."""
        if self.stream is not None and self.stream.counts[0]:
            with torch.no_grad():
                if self._cache is not None:
                    self._router.flush(examine(self.model).trunk, self._cache, (0,))
                else:
                    self._layer.stream = self.stream.commit(self._router.memory, [0])

    def reset(self) -> None:
        """Forgets everything."""
        if self._cache is not None:
            self._cache.reset()
        self._layer.reset()

    def fork(self) -> Session:
        """An independent session that begins with what this one has read."""
        other = Session(self.model, self.tokenizer, window=self.window)
        if self._cache is not None:
            other._adopt(self._cache.fork())
        other._layer.stream = self._layer.stream
        return other

    # --- keeping it --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session as one safetensors file; a process that loads it continues with identical logits.

        It holds the memory's state, the tokens that wait and the window's keys; after `flush` with a window of one
        segment it is the memory's state alone.
        """
        tensors, meta = {}, self._description()
        if self.stream is not None:
            stream = self.stream.detach()
            tensors |= stream.tensors()
            meta["stream"] = {"counts": stream.counts, "written": stream.written, "seen": stream.seen}
        if self._cache is not None and (window := self._cache.window) is not None:
            meta["running"] = {"context": window.context, "running": window.running, "position": window.position}
            tensors["window.valid"] = window.valid
            for index, layer in enumerate(self._cache.layers):
                if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None:
                    assert layer.values is not None
                    tensors |= {f"keys.{index}": layer.keys, f"values.{index}": layer.values}
        write_file(path, tensors, meta)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Any = None, *, strict: bool = True
    ) -> Session:
        """The session that `save` wrote.

        Raises:
            StateError: another base model (unless `strict=False`), another memory or its config, an edited or truncated
                file. Nothing is loaded then.
        """
        tensors, meta = read_file(path)
        if meta.get("content") != "session":
            raise StateError(f"{path} holds {meta.get('content')!r}, not a session")
        check_fingerprint(model, meta, path, strict=strict)
        session = cls(model, tokenizer, window=meta["window"])
        mine = session._description()
        if strict and (mine["memory"], mine["memory_fingerprint"]) != (meta["memory"], meta["memory_fingerprint"]):
            raise StateError(
                f"{path} was written with another memory ({_differences(meta['memory'], mine['memory'])}); "
                "load the memory it was written with"
            )
        session._fill(tensors, meta)
        return session

    def _fill(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        router = self._router
        tensors = {name: tensor.to(router.device) for name, tensor in tensors.items()}
        if (ledger := meta.get("stream")) is not None:
            state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
            self._layer.stream = Stream(state, tensors["waiting"], **{name: tuple(v) for name, v in ledger.items()})
        if self._cache is not None and (ledger := meta.get("running")) is not None:
            ledgers = {name: tuple(values) for name, values in ledger.items()}
            self._cache.window = Window(*self._cache.settings, tensors["window.valid"], **ledgers)
            for index, layer in enumerate(self._cache.layers):
                if f"keys.{index}" in tensors:
                    assert isinstance(layer, DynamicLayer)
                    layer.lazy_initialization(tensors[f"keys.{index}"], tensors[f"values.{index}"])
                    layer.keys, layer.values = tensors[f"keys.{index}"], tensors[f"values.{index}"]

    def _description(self) -> dict[str, Any]:
        router = self._router
        return {
            "content": "session",
            "window": self.window,
            "memory": router.config.to_dict(),
            "memory_fingerprint": fingerprint_of(router),
            "base_fingerprint": fingerprint(self.model),
            "base_model": getattr(self.model.config, "_name_or_path", "") or None,  # pyright: ignore
        }

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _router(self) -> Router:
        return router_of(self.model)

    def _adopt(self, cache: MemoryCache) -> None:
        self._cache, self._layer = cache, cache.memory

    def _snapshot(self) -> Any:
        cache, layer = self._cache, self._layer
        stream, keys = layer.stream, cache.snapshot() if cache is not None else None

        def restore() -> None:
            self._cache, self._layer = cache, layer
            layer.stream = stream
            if keys is not None:
                keys()

        return restore


def fingerprint_of(router: Router) -> str:
    """The hash of a memory's own weights: a state belongs to the memory that wrote it."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(router.memory.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    names = [name for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r} there, {mine.get(name)!r} here" for name in names) or "other weights"
