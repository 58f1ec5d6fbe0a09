"""A session: one stream's memory, explicit, named by nobody but its owner, small enough to keep for every user."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mnemic.attachment import check_fingerprint, memory_cache, router_of
from mnemic.checks import check_contents, check_description, keys_of
from mnemic.history import Log
from mnemic.host.anatomy import examine, fingerprint
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache, MemoryLayer, Window
from mnemic.host.call import carrying
from mnemic.host.choosing import Choosing, TextPieces
from mnemic.host.release import GENERATE_CACHE, DynamicLayer
from mnemic.host.remembered import remembered
from mnemic.host.router import Router
from mnemic.host.wrappers import as_forward, unwrapped, whole
from mnemic.state import StateError, from_bytes, read_file, to_bytes, write_file
from mnemic.stream import Stream
from mnemic.unrolling import obstacle_to_parallel, read_segments

if TYPE_CHECKING:
    from mnemic.analysis.show import Shown


@dataclass(frozen=True)
class Stored:
    """Where a session stands in a `SessionStore`: which database, under which name, in which version.

    `birth` tells a session that was deleted and made anew from the one before it.
    """

    store: str
    name: str
    birth: int
    version: int


class Session:
    """One stream through a model with a memory: read any length, generate, save, load, fork, reset.

    `window` is the number of the latest tokens whose keys the base keeps; by default the window of the memory's config,
    which is the one it was trained with. Text needs a `tokenizer`; token ids `[1, T]` do not. Sessions of one model
    share nothing. With `keep_text` the ids of all tokens are kept with the session and its file, 4 bytes a token, so
    that `show` and `mnemic inspect` can tell in words what was written; without, nothing of the text but positions.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, window: int | None = None, keep_text: bool = False
    ) -> None:
        self.model, self.tokenizer, self.keep_text = model, tokenizer, keep_text
        router = router_of(model)
        if window is None and router.causal:
            window = router.config.window or router.segment_length
        self.window = window
        self._cache: MemoryCache | None = memory_cache(model, window) if router.causal else None
        self._layer = MemoryLayer() if self._cache is None else self._cache.memory
        self._layer.log = self._empty_log
        self.stored: Stored | None = None

    # --- using it ----------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> MemoryCache:
        """For `model.generate(new_ids, cache=session.cache)` and `model(new_ids, cache=...)`."""
        if self._cache is None:
            raise ValueError(f"{type(self.model).__name__} is an encoder and has no cache; use Session.read or forward")
        return self._cache

    @property
    def stream(self) -> Stream | None:
        """What is carried; None before the first token."""
        return self._layer.stream

    @property
    def nbytes(self) -> int:
        """Bytes carried: the memory's state, tokens that wait for their segment to fill, and the window's keys.

        The history comes on top, and the text where it is kept: `show` and `mnemic inspect` name their bytes.
        """
        stream = self.stream.nbytes if self.stream is not None else 0
        keys = sum(
            tensor.numel() * tensor.element_size()
            for layer in (self._cache.layers if self._cache is not None else [])
            if isinstance(layer, DynamicLayer) and layer.is_initialized
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )
        return stream + keys

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was written when: a record for each segment that the memory was written with, oldest first.

        `number` (from 1), `first` and `last` position in the stream, `time` (UTC, seconds since 1970), `alive` (how
        many engrams there were then; 0 where places never go), and `places`: the slots or engrams written, each with
        its number (`place`), the `share` of it that came with this write, how much of that is `left` after later
        writes, and the positions of the `tokens` that weighed most, with their `weights` (of all tokens of the segment
        they add up to 1). Mechanisms that cannot tell have no places.

        It is kept with the session, and bounded (see `mnemic.history`): of a long stream it lists the writes of which
        the memory holds most, and some of the others. It has no part in what the model computes.
        """
        log = self._log
        return [] if log is None else log.records()

    def show(self) -> Shown:
        """What the session holds, as `mnemic inspect` shows it: as the page in a notebook, else as in the terminal.

        With `keep_text` and a tokenizer it tells in words what was written.
        """
        from mnemic.analysis.show import Shown  # what looks at sessions stands above them

        return Shown.of(self)

    def _begun(self) -> Stream:
        """The stream, or a new one with its history."""
        return self.stream or self._layer.begin(self._router.new_stream(1))

    @property
    def _log(self) -> Log | None:
        return self.stream.logs[0] if self.stream is not None else None

    @property
    def _empty_log(self) -> Log:
        return Log(text=() if self.keep_text else None)

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
        ids, restore = self.ids(text), self._snapshot()
        try:
            with torch.no_grad():
                as_forward(self.model, self._take_in, ids)
        except BaseException:
            restore()
            raise
        return ids.shape[1]

    def _take_in(self, ids: Tensor) -> None:
        trunk, router = examine(self.model).trunk, self._router
        if self._can_read_ahead():
            whole = ids.shape[1] - ids.shape[1] % router.segment_length
            if whole:
                self._layer.stream = read_segments(self.model, ids[:, :whole], self._begun())
            ids = ids[:, whole:]
        # the head is not needed to read, and a bounded call bounds what a read holds at once
        longest = router.segment_length if self._cache is None else 8 * router.segment_length
        for start in range(0, ids.shape[1], longest):
            part = ids[:, start : start + longest]
            if self._cache is not None:
                trunk(input_ids=part, **with_cache(trunk, self._cache))
            else:
                with carrying(self._layer):
                    trunk(input_ids=part)

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
                return self.model(input_ids=ids, **with_cache(self.model, self._cache), **kwargs)
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
            output = self.model.generate(ids, **{GENERATE_CACHE: cache}, **kwargs)  # pyright: ignore[reportCallIssue]
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

    def answer(self, prompt: str | Tensor | list[int], **kwargs: Any) -> Iterator[Any]:
        """`generate`, a piece at a time: text as it comes for a string, else token ids.

        The loop over it may be left at any time: the session has then taken in the prompt and exactly the pieces that
        were given out, whether the loop ends, `break`s, or is interrupted in the middle of a step (Ctrl-C, an error).
        Before the first piece it is as it was. `kwargs` are those of `generate`, without beams, several sequences and a
        streamer.

        Raises:
            ValueError: a way of generating that does not choose one token after another.
            RuntimeError: in the loop, when it has used the session for something else; use a fork for that.
        """
        ids = self.ids(prompt)
        choosing = Choosing(self.model, ids, self.cache, **kwargs)
        return self._answer(ids, choosing, TextPieces(self.tokenizer) if isinstance(prompt, str) else None)

    def _answer(self, ids: Tensor, choosing: Choosing, text: TextPieces | None) -> Iterator[Any]:
        restore, logits, stood = self._snapshot(), None, self._standing()
        while not choosing.done:
            if any(now is not then for now, then in zip(self._standing(), stood, strict=True)):
                raise RuntimeError("the session was used while it answers; leave the loop first, or use session.fork()")
            try:
                with torch.no_grad():
                    if logits is None:
                        logits = self.forward(ids, **choosing.forward).logits[:, -1]
                    token = choosing.choose(logits)
                    logits = self.forward(token).logits[:, -1]
                piece = int(token) if text is None else text.more(choosing.answer[0], last=choosing.done)
            except BaseException:
                restore()
                raise
            stood = self._standing()
            if piece != "":
                restore = self._snapshot()
                yield piece

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
        other = Session(self.model, self.tokenizer, window=self.window, keep_text=self.keep_text)
        if self._cache is not None:
            other._adopt(self._cache.fork())
        other._layer.stream = self._layer.stream
        other.stored = self.stored
        return other

    # --- keeping it --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session as one safetensors file; a process that loads it continues with identical logits.

        It holds the memory's state, the tokens that wait and the window's keys; after `flush` with a window of one
        segment it is the memory's state alone.
        """
        write_file(path, *self.contents())

    def to_bytes(self) -> bytes:
        """What `save` writes, as bytes: for a database of one's own. `mnemic.SessionStore` is one."""
        return to_bytes(*self.contents())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Any = None, *, strict: bool = True
    ) -> Session:
        """The session that `save` wrote.

        Raises:
            StateError: another base model (unless `strict=False`), another memory or its config, an edited or truncated
                file, and contents that this model and memory would not make. Nothing is loaded then.
        """
        return cls._of(*read_file(path), path, model, tokenizer, strict)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        strict: bool = True,
        source: object = "these bytes",
    ) -> Session:
        """The session that `to_bytes` gave; raises `StateError` as `load` does. `source` is how errors name it."""
        return cls._of(*from_bytes(data, source), source, model, tokenizer, strict)

    @classmethod
    def _of(
        cls,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        source: object,
        model: nn.Module,
        tokenizer: Any,
        strict: bool,
    ) -> Session:
        check_description(meta, source)
        check_fingerprint(model, meta, source, strict=strict)
        router = router_of(model)
        mine = router.config.to_dict()
        if strict and (mine, fingerprint_of(router)) != (meta["memory"], meta["memory_fingerprint"]):
            raise StateError(
                f"{source} was written with another memory ({_differences(meta['memory'], mine)}); "
                "load the memory it was written with"
            )
        try:
            session = cls(model, tokenizer, window=meta["window"], keep_text=meta.get("keep_text", False))
        except ValueError as error:
            raise StateError(f"{source} has a window that this model cannot have: {error}") from error
        check_contents(tensors, meta, model, source)
        try:
            session._fill(tensors, meta)
        except StateError as error:
            raise StateError(f"{source}: {error}; restore it from a copy") from error
        return session

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` writes, as tensors and their description."""
        tensors, meta = {}, self._description()
        if self.stream is not None:
            stream = self.stream.detach()
            tensors |= stream.tensors()
            if (log := stream.logs[0]) is not None:
                tensors |= {f"history.{name}": tensor for name, tensor in log.tensors().items()}
            meta["stream"] = {"counts": stream.counts, "written": stream.written, "seen": stream.seen}
        if self._cache is not None and (window := self._cache.window) is not None:
            meta["running"] = {"context": window.context, "running": window.running, "position": window.position}
            tensors["window.valid"] = window.valid
            tensors |= keys_of(self._cache)
        return tensors, meta

    def _fill(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        router = self._router
        # keys of a base in float32 go on in the same base in bfloat16
        dtype: Any = unwrapped(self.model).dtype
        tensors = {
            name: tensor.to(router.device, dtype if name.startswith(("keys.", "values.")) else tensor.dtype)
            for name, tensor in tensors.items()
        }
        if (ledger := meta.get("stream")) is not None:
            state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
            noted = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("history.")}
            logs = (Log.of(noted) if noted else self._empty_log,)  # a file of before there were histories has none
            ledgers = {name: tuple(values) for name, values in ledger.items()}
            self._layer.stream = Stream(state, tensors["waiting"], **ledgers, logs=logs)
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
            "keep_text": self.keep_text,
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
        self._layer.log = self._empty_log

    def _standing(self) -> tuple[Any, ...]:
        """What becomes another object whenever the session takes in something."""
        return self._cache, self.stream, self._cache.window if self._cache is not None else None

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
    return remembered(router.memory, lambda: _hash(router.memory))


def _hash(memory: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(memory.state_dict().items()):
        digest.update(name.encode())
        digest.update(whole(tensor).to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    names = [name for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r} there, {mine.get(name)!r} here" for name in names) or "other weights"
