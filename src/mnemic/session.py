"""A session: one stream's memory, explicit, named by nobody but its owner, small enough to keep for every user."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mnemic import compacting, folders, keeping
from mnemic.attachment import (
    check_same,
    default_window,
    is_attached,
    memory_cache,
    router_of,
)
from mnemic.bank import Bank
from mnemic.checks import check_written
from mnemic.chunks import Units
from mnemic.generating import answer, generate
from mnemic.history import Log
from mnemic.host.anatomy import examine
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache, MemoryLayer
from mnemic.host.call import carrying, reading
from mnemic.host.choosing import Choosing, TextPieces, check_taken, refuse_prompts
from mnemic.host.evaluating import evaluating
from mnemic.host.release import DynamicLayer
from mnemic.host.router import Router
from mnemic.host.wrappers import as_forward
from mnemic.locks import Lock, alone
from mnemic.sources import Sources, noting
from mnemic.spilling import RAM
from mnemic.state import from_bytes, to_bytes, write_file
from mnemic.stream import Stream
from mnemic.texts import Text, check_known, given, token_ids
from mnemic.turns import Messages, Turns
from mnemic.unrolling import can_read_ahead, read_segments


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

    `window` is the number of the latest tokens whose keys the base keeps; by default that of the memory's config, or as
    many as `default_window` says: until they are full the base sees all that was read. The first `sinks` tokens of the
    stream stay in it for ever; by default as many as `memory_cache` says. Text needs a `tokenizer`; token ids `[1, T]`
    do not. Sessions of one model share nothing, and run as in evaluation whatever mode the model is in.

    With `keep_text` the ids of all tokens are kept with the session and its file, 4 bytes a token, so that
    `mnemic.show` and `mnemic inspect` can tell in words what was written; without, nothing of the text but positions.

    The keys of the window are most of a file. With `keep_keys=False`, which needs `keep_text`, they are left out, and
    made again from the text when the session is loaded: as many tokens are read then as the window holds, and what
    comes next is not the same to the bit (`mnemic.rereading`). A window that cannot be read again is kept as keys.

    `notes` are the owner's: a dictionary of plain values (JSON, 1 MiB at most) that is kept with the session, in its
    file and in a store. What a service must know of exactly that version of a session has its place there.

    A text is a string, token ids, or what a tokenizer returns for one text, also as `read(**tokenizer(text))`. Ids are
    taken as they are. The first string of a new session begins as its tokenizer begins texts ("<s>"), later ones go on
    where the stream stands, and none gets an end. An encoder sees every text by itself, so there each gets both.

    One thread at a time: while one's call of this session runs, another's is refused with a `RuntimeError`. Calls that
    are to wait for each other hold `session.lock`, as does a thread that makes several calls one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        window: int | None = None,
        sinks: int | None = None,
        keep_text: bool = False,
        keep_keys: bool = True,
    ) -> None:
        if not (keep_text or keep_keys):
            raise ValueError("keep_keys is False, and keys are made again from the text; pass keep_text=True")
        self.model, self.tokenizer, self.keep_text, self.keep_keys = model, tokenizer, keep_text, keep_keys
        router = router_of(model)
        if window is None and router.causal:
            window = default_window(model)
        if window is not None and not router.causal:
            raise ValueError(
                f"window is {window}, but {type(model).__name__} is an encoder and keeps no keys; leave it out"
            )
        if sinks and not router.causal:
            raise ValueError(
                f"sinks is {sinks}, but {type(model).__name__} is an encoder and keeps no keys; leave it out"
            )
        self.window, self._settings = window, router.settings
        self._cache: MemoryCache | None = memory_cache(model, window, sinks) if router.causal else None
        self.sinks = self._cache.settings[-1] if self._cache is not None else 0
        self._layer = MemoryLayer() if self._cache is None else self._cache.memory
        self._layer.log = self._empty_log
        self._bank: Bank | None = None
        """What a new stream's begins with, where it is not the usual one."""
        self.stored: Stored | None = None
        self.notes: dict[str, Any] = {}
        """Plain values of the owner's that go where the session goes: into its file, a store and its forks."""
        self.lock = Lock()
        self._before: int | None = 0
        """Tokens that the stream had when the window was made here; None where the text lacks some of the window's."""

    def __repr__(self) -> str:
        if not is_attached(self.model):
            return f"<mnemic.Session of a {type(self.model).__name__} that has no memory any more>"
        seen, written = (self.stream.seen[0], self.stream.written[0]) if self.stream is not None else (0, 0)
        window = "" if self.window is None else f", window {self.window:,}"
        return (
            f"<mnemic.Session {self._router.config.kind} of {type(self.model).__name__}: {seen:,} tokens read, "
            f"{written:,} segments of {self._router.segment_length:,} tokens written{window}, {self.nbytes:,} bytes>"
        )

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
    def is_new(self) -> bool:
        """Whether it has taken in nothing yet: its first text begins as texts begin."""
        return self.stream is None and (self._cache is None or self._cache.window is None)

    @property
    def nbytes(self) -> int:
        """Bytes carried: the memory's state, tokens that wait for their segment to fill, and the window's keys.

        The history comes on top, and the text where it is kept: `mnemic.show` and `mnemic inspect` name their bytes.
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

    def _begun(self) -> Stream:
        """The stream, or a new one with its history."""
        return self.stream or self._layer.begin(self._router.new_stream(1))

    @property
    def _log(self) -> Log | None:
        return self.stream.logs[0] if self.stream is not None else None

    @property
    def _empty_log(self) -> Log:
        return Log(text=() if self.keep_text else None)

    def ids(self, text: Text) -> Int[Tensor, "1 t"]:
        """The token ids that a text would be read as, on the model's device; raises `ValueError` for anything else."""
        causal = self._cache is not None
        ids = token_ids(text, self.tokenizer, start=self.is_new or not causal, end=not causal)
        check_known(ids, self.model)
        return ids.to(self._router.device)

    def read(self, text: Text | None = None, **encoded: Any) -> int:
        """Takes in a text of any length, segment by segment, in constant memory; returns the number of tokens.

        If anything fails on the way, the session is as it was before. An empty text is nothing to read, and no error.
        """
        wanted = given(text, encoded)
        if encoded:
            raise TypeError(f"read takes one text, and no {', '.join(encoded)}")
        with self._call(), torch.no_grad():
            ids = self.ids(wanted)
            if ids.shape[1]:
                with reading():
                    as_forward(self.model, self._take_in, ids)
        return ids.shape[1]

    def _take_in(self, ids: Tensor) -> None:
        trunk, router = examine(self.model).trunk, self._router
        if can_read_ahead(self.model, self._cache, self.stream):
            whole = ids.shape[1] - ids.shape[1] % router.segment_length
            if whole:
                self._layer.stream = read_segments(self.model, ids[:, :whole], self._begun())
            ids = ids[:, whole:]
        # the head is not needed to read, and a bounded call bounds what a read holds at once
        longest = router.segment_length if self._cache is None else 8 * router.segment_length
        for start in range(0, ids.shape[1], longest):
            self._feed(trunk, ids[:, start : start + longest])

    def _feed(self, module: nn.Module, ids: Tensor, **kwargs: Any) -> Any:
        """What `module` puts out for tokens that the session takes in, each of them once."""
        refuse_prompts(module)
        stream, before = self.stream, self._taken
        if self._cache is not None:
            output = module(input_ids=ids, **with_cache(module, self._cache), **kwargs)
        else:
            with carrying(self._layer):
                output = module(input_ids=ids, **kwargs)
        if self._cache is not None or self.stream is not stream:  # an encoder that is switched off takes in nothing
            check_taken(module, self._taken - before, ids.shape[1])
        return output

    @property
    def _taken(self) -> int:
        """Tokens that came through the model so far."""
        if self._cache is not None:
            return self._cache.window.taken[0] if self._cache.window is not None else 0
        return self.stream.seen[0] if self.stream is not None else 0

    def forward(self, text: Text | None = None, **kwargs: Any) -> Any:
        """The model's outputs for new tokens, which the session takes in as `read` does; `kwargs` are the model's.

        The outputs have the gradients of this call; what is carried on to the next one is outside any.
        """
        wanted = given(text, kwargs)
        with self._call():
            output = self._feed(self.model, self._some(wanted), **kwargs)
            if torch.is_grad_enabled():
                (self._layer if self._cache is None else self._cache).detach()
        return output

    def generate(self, prompt: Text | None = None, **kwargs: Any) -> Any:
        """Continues a prompt with `model.generate`; the session takes in the prompt and the answer, each token once.

        Returns the answer: a string for a string, else token ids `[1, T]`. `kwargs` are those of `generate`. With beams
        or several sequences the session goes on with the first one returned.

        Raises:
            RuntimeError: the model was fed other tokens than the prompt's and the answer's; see `check_taken`.
        """
        wanted = given(prompt, kwargs)
        with self._call(), torch.no_grad():
            ids = self._some(wanted)
            output, said = generate(self, ids, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        if isinstance(prompt, str):
            return self.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        return sequences[:, ids.shape[1] :] if isinstance(output, Tensor) else output

    def answer(self, prompt: Text | None = None, **kwargs: Any) -> Iterator[Any]:
        """`generate`, a piece at a time: text as it comes for a string, else token ids.

        The loop over it may be left at any time: the session has then taken in the prompt and exactly the pieces that
        were given out, whether the loop ends, `break`s, or is interrupted in the middle of a step (Ctrl-C, an error).
        Before the first piece it is as it was. `kwargs` are those of `generate`, without beams, several sequences and a
        streamer.

        Raises:
            ValueError: a way of generating that does not choose one token after another.
            RuntimeError: in the loop, when it or another thread has used the session for something else; use a fork
                for that.
        """
        wanted = given(prompt, kwargs)
        with self.lock.use():
            ids = self._some(wanted)
            choosing = Choosing(self.model, ids, self.cache, **kwargs)
            text = TextPieces(self.tokenizer) if isinstance(prompt, str) else None
            return answer(self, ids, choosing, text)

    def chat(self, messages: Messages, **kwargs: Any) -> str:
        """Says something to the model in the words of its chat template, and returns the answer.

        `messages` are what is new: a user's text, or a list of `{"role": ..., "content": ...}`; what was said before is
        in the session. The answer is closed as the template closes answers: the next turn begins where a turn begins.
        `kwargs` are those of `generate`; an answer has at most 512 tokens unless they say otherwise.

        Raises:
            ValueError: no tokenizer, or messages that its template does not take.
        """
        if self.tokenizer is None:
            raise ValueError("a chat needs a tokenizer: Session(model, tokenizer)")
        turns = Turns(self.tokenizer)
        with self._call():
            prompt = turns.message(messages, first=self.is_new)
            with torch.no_grad():
                _, whole = generate(self, self._some(prompt), **turns.ways(self.model, kwargs))
            said = whole[0, prompt.shape[1] :]
            if (closing := turns.closing(said.tolist())) is not None:
                self.read(closing)
        return self.tokenizer.decode(said, skip_special_tokens=True)

    @contextlib.contextmanager
    def sources(self) -> Iterator[Sources]:
        """Within it is noted which of the tokens that left the window the next answers attend to. `passages` tells it
        in words where the session keeps its text. It costs the attention to them once more.

            with session.sources() as found:
                session.generate("What was the ship called?")
            found.passages(3)

        Raises:
            ValueError: the memory keeps no tokens (recall does).
        """
        if not self._router.memory.keeps:
            raise ValueError(
                f"{type(self._router.memory).__name__} keeps no tokens that could be attended to, so there are no "
                "passages to tell of; attach recall, or look at session.history"
            )
        with noting(self._layer, lambda: self._log, self.tokenizer) as found:
            yield found

    def flush(self) -> None:
        """Ends the running segment now: what waits is written, and a window of one segment starts anew."""
        with self._call(), torch.no_grad():
            if self.stream is None or not self.stream.counts[0]:
                return
            if self._cache is not None:
                self._router.flush(examine(self.model).trunk, self._cache, (0,))
            else:
                self._layer.stream = self.stream.commit(self._router.memory, [0])

    def compact(self, ratio: float, asking: Text | None = None) -> int:
        """Makes `ratio` of the window's keys into one, now: those of each block and head of keys become so many fewer
        keys with a bias and a new value each, as the memory makes them of what leaves the window. What follows attends
        to these. Returns how many tokens' keys they were made of. For the memory `compact`.

            session.read(book)
            session.compact(8, "Who was the captain?")

        The sinks and the newest tokens (`mnemic.compacting.NEWEST`) stay as they are. No segment ends, and nothing else
        changes: a fork from before goes on with all its keys.

        Keys are made for queries: those of the tokens that wait for their segment to fill, or of `asking`, a text as
        what will follow, which is read for this and not taken in. It has fewer tokens than a segment.

        The memory has room for so many keys as its config says (`keys`): where there are more, fewer are kept of these
        and of those from before. Blocks that keep none (sliding ones, others than `read_layers`) see no more of the
        window than what stays.

        Raises:
            ValueError: another kind of memory, or one that is or was off; a ratio that is not above 1; a window of few
                tokens, all of which stay; no token that waits and no text; a text that is too long.
        """
        with self._call(), torch.no_grad():
            return compacting.compact(self, ratio, None if asking is None else self._some(asking))

    def forget(self, first: int, last: int) -> int:
        """Forgets the tokens at positions `first` to `last` of the stream, as `history` numbers them; returns how many
        were kept of them. For memories inside attention, which keep tokens one by one.

        Their keys, values and text are gone. What later tokens took from them while they were read is part of those
        tokens' own keys and stays.

        Raises:
            ValueError: another kind of memory, or tokens that are still in the window, as its sinks always are.
        """
        with self._call():
            return keeping.forget(self, first, last)

    def spill_to(self, folder: str | os.PathLike[str], ram: int = RAM) -> None:
        """From now on lays keys and values that left the window into files of `folder` whenever those in RAM take more
        than `ram` bytes. The files are mapped: what is used of them is in RAM while there is room. For memories inside
        attention, and for this session and its forks; files of sessions, and what is loaded, know nothing of it.

        The files hold what was read, as a session's file does. Each goes when no session holds it any more. A call that
        cannot write them raises `OSError` and leaves the session as it was.

        Raises:
            ValueError: another kind of memory, a model on a GPU, or `ram` below 0.
        """
        with self._call():
            keeping.spill_to(self, Path(folder), ram)

    @alone
    def reset(self) -> None:
        """Forgets everything."""
        if self._cache is not None:
            self._cache.reset()
        self._layer.reset()
        self._before, self.notes = 0, {}

    @alone
    def fork(self) -> Session:
        """An independent session that begins with what this one has read."""
        settings = {"keep_text": self.keep_text, "keep_keys": self.keep_keys}
        other = Session(self.model, self.tokenizer, window=self.window, sinks=self.sinks, **settings)
        other._bank, other._settings = self._bank, self._settings
        if self._cache is not None:
            other._adopt(self._cache.fork())
        other._layer.stream = self._layer.stream
        other.stored, other._before, other.notes = self.stored, self._before, copy.deepcopy(self.notes)
        return other

    # --- keeping it --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session; a process that loads it continues with identical logits.

        A path is that of one safetensors file, which holds the memory's state, the tokens that wait and the window's
        keys; after `flush` with a window of one segment it is the memory's state alone. Where the path is a folder, or
        ends as one ("alice/"), the keys and values that left the window lie in files of their own there, and of them a
        save writes what is new: for sessions that carry much.

        Raises:
            StateError: what `load` would refuse, such as a state that is not finite; what is there stays then.
            OSError: it could not be written, as where the disk is full; what is there stays too.
        """
        if folders.is_folder(path):
            folders.save(path, *self.parted())
        else:
            write_file(path, *self.checked())

    def to_bytes(self) -> bytes:
        """What `save` writes, as bytes: for a database of one's own. `mnemic.SessionStore` is one."""
        return to_bytes(*self.checked())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Any = None, *, strict: bool = True
    ) -> Session:
        """The session that `save` wrote, as a file or as a folder.

        Keys and values that left the window stay in the file, or files, which are mapped: they may be replaced or
        deleted, but not be written into. They are read when they are used, and all of them are checked then: whatever
        uses them raises `StateError` if they were changed.

        Raises:
            FileNotFoundError: there is none.
            StateError: another base model (unless `strict=False`), another memory or its config, an edited or truncated
                file, a missing one of a folder, and contents that this model and memory would not make. Nothing is
                loaded then.
        """
        return keeping.restored(cls, *keeping.opened(path), path, model, tokenizer, strict)

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
        return keeping.restored(cls, *from_bytes(data, source), (), source, model, tokenizer, strict)

    def checked(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`contents`, once it has passed what `load` checks; raises `StateError` for what it would refuse."""
        tensors, meta = self.contents()
        check_written(tensors, meta, self.model)
        return tensors, meta

    @alone
    def parted(self) -> tuple[dict[str, Tensor], dict[str, Any], Units]:
        """`checked` contents as a head and the units of what left the window (`mnemic.chunks`)."""
        tensors, meta, units = keeping.parted(self)
        check_written(tensors, meta, self.model, units.tensors)
        return tensors, meta, units

    @alone
    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` writes, as tensors and their description."""
        return keeping.contents(self)

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _router(self) -> Router:
        return router_of(self.model)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """One use of the session: alone, as in evaluation, and as if it had not been where it fails."""
        with self.lock.use():
            check_same(self._router, self._settings)
            restore = self._snapshot()
            try:
                with evaluating(self.model):
                    yield
            except BaseException:
                restore()
                raise

    def _some(self, text: Text) -> Int[Tensor, "1 t"]:
        """Its ids, of which there must be one at least."""
        ids = self.ids(text)
        if not ids.shape[1]:
            raise ValueError("the input is empty (no token), and the model needs one to go on from")
        return ids

    def _adopt(self, cache: MemoryCache) -> None:
        self._cache, self._layer = cache, cache.memory
        self._layer.log, self._layer.bank = self._empty_log, self._bank

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
