"""Several sessions as one batch: each with its own length and padding, each left as if it had been alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mnemic.attachment import check_same, router_of
from mnemic.host.anatomy import examine
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache, MemoryLayer
from mnemic.host.call import carrying, reading
from mnemic.host.choosing import Choosing, check_taken, refuse_prompts
from mnemic.host.evaluating import evaluating
from mnemic.host.release import OUTPUT_CACHE
from mnemic.session import Session
from mnemic.state import shrink
from mnemic.stream import Stream
from mnemic.texts import Text, given
from mnemic.unrolling import can_read_ahead, read_segments

Texts = Sequence[Text] | Mapping[str, Any]
"""A text for each session, or what a tokenizer returns for a list of texts."""


def batch(sessions: Sequence[Session]) -> SessionBatch:
    """Sessions of one model, to be run as one batch: `mnemic.batch([alice, bob]).read(["...", "..."])`.

    They may stand anywhere in their segments and windows, hold memories of any size, and be new. Between two calls each
    of them is a session like any other.

    Raises:
        ValueError: no session, one of them twice, different models, or different windows or sinks.
    """
    return SessionBatch(sessions)


class SessionBatch:
    """What `mnemic.batch` returns. Texts and results are lists in the order of the sessions; texts may also be what a
    tokenizer returns for a list of them, as it is or as keywords.

    If a call fails, all sessions are as they were before it. It is refused while another thread uses one of them.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = list(sessions)
        if not self.sessions:
            raise ValueError("a batch of no sessions; pass at least one")
        first = self.sessions[0]
        for place, session in enumerate(self.sessions):
            if any(session is other for other in self.sessions[:place]):
                raise ValueError(f"session {place} is in the batch twice; use session.fork() to go two ways at once")
            if session.model is not first.model:
                raise ValueError(
                    f"session {place} is of another model ({type(session.model).__name__}) than session 0 "
                    f"({type(first.model).__name__}); make a batch for each model"
                )
            if session.window != first.window:
                raise ValueError(
                    f"session {place} has a window of {session.window} tokens, session 0 one of {first.window}; "
                    "make a batch for each window"
                )
            if session.sinks != first.sinks:
                raise ValueError(
                    f"session {place} keeps {session.sinks} sinks in its window, session 0 {first.sinks}; make a batch "
                    "for each number of sinks"
                )

    def __len__(self) -> int:
        return len(self.sessions)

    def __repr__(self) -> str:
        return f"<mnemic.SessionBatch of {len(self.sessions):,} sessions of {type(self.sessions[0].model).__name__}>"

    def read(self, texts: Texts | None = None, **encoded: Any) -> list[int]:
        """Each session takes in its text, of any length, in bounded memory; returns their numbers of tokens."""
        texts = given(texts, encoded)
        if encoded:
            raise TypeError(f"read takes texts, and no {', '.join(encoded)}")
        with self._all_or_none(), torch.no_grad():
            ids = self._ids(texts)
            some = [place for place, each in enumerate(ids) if each.shape[1]]
            if some:
                with reading():
                    self._read([self.sessions[place] for place in some], [ids[place] for place in some])
        return [each.shape[1] for each in ids]

    def _read(self, sessions: list[Session], left: list[Tensor]) -> None:
        rows = Rows(sessions)
        trunk, length = examine(rows.model).trunk, rows.router.segment_length
        while rows.places:
            # up to the end of each row's segment, so that from here on all rows end theirs together
            shortest = min(left[place].shape[1] for place in rows.places)
            whole = shortest - shortest % length
            if whole and can_read_ahead(rows.model, rows.cache, rows.stream):
                taken = dict.fromkeys(rows.places, whole)
                ids = torch.cat([left[place][:, :whole] for place in rows.places])
                rows.layer.stream = read_segments(rows.model, ids, rows.stream)
            else:
                running = dict(zip(rows.places, rows.running, strict=True))
                taken = {place: min(left[place].shape[1], length - running[place]) for place in rows.places}
                rows.call(trunk, [[left[place][:, : taken[place]]] for place in rows.places])
            left = [ids[:, taken.get(place, 0) :] for place, ids in enumerate(left)]
            rows.part_with([place for place in rows.places if not left[place].shape[1]])
        rows.give_back()

    def forward(self, texts: Texts | None = None, *, output_hidden_states: bool = False, **encoded: Any) -> list[Any]:
        """The model's outputs for each session's new tokens, in the model's own class: logits `[1, t, v]` (`[1, c]` of
        a classifier), hidden states `[1, t, d]`, and the session's own cache.
        """
        texts = given(texts, encoded)
        if encoded:
            raise TypeError(f"forward takes texts and output_hidden_states, and no {', '.join(encoded)}")
        with self._all_or_none():
            ids = self._some(texts)
            rows = Rows(self.sessions)
            wanted = {"output_hidden_states": True} if output_hidden_states else {}
            output, keep = rows.call(rows.model, rows.in_step(ids), **wanted)
            results = [_of_row(output, keep, row) for row in range(len(self))]
            rows.give_back()
            for session, result in zip(self.sessions, results, strict=True):
                if OUTPUT_CACHE in output:
                    result[OUTPUT_CACHE] = session.cache
        return results

    def generate(self, prompts: Texts | None = None, **kwargs: Any) -> list[Any]:
        """Continues each session's prompt as `Session.generate` would, with processors and criteria of its own.

        `kwargs` are those of `model.generate`, for all sessions, without beams and several sequences. Rows whose answer
        has ended leave the batch. Sampling draws from the global generator in the order of the sessions. Returns the
        answers: a string for a string, else token ids `[1, n]`.
        """
        prompts = given(prompts, kwargs)
        with self._all_or_none(), torch.no_grad():
            texts = self._some(prompts)
            rows = Rows(self.sessions)
            choosing = [
                Choosing(session.model, ids, session.cache, **kwargs)
                for session, ids in zip(self.sessions, texts, strict=True)
            ]
            logits = rows.call(rows.model, rows.in_step(texts), **choosing[0].forward)[0].logits[:, -1]
            while rows.places:
                tokens = [[choosing[place].choose(logits[row : row + 1])] for row, place in enumerate(rows.places)]
                # the last token too: the session has read what it said
                logits = rows.call(rows.model, tokens)[0].logits[:, -1]
                going = [row for row, place in enumerate(rows.places) if not choosing[place].done]
                logits = logits[going]
                rows.part_with([place for place in rows.places if choosing[place].done])
            rows.give_back()
        return [
            session.tokenizer.decode(chosen.answer[0], skip_special_tokens=True)
            if isinstance(prompt, str)
            else chosen.answer
            for session, prompt, chosen in zip(self.sessions, _each(prompts), choosing, strict=True)
        ]

    def _ids(self, texts: Any) -> list[Tensor]:
        texts = _each(texts)
        if isinstance(texts, str | Tensor) or len(texts) != len(self):
            count = "one text" if isinstance(texts, str | Tensor) else f"{len(texts)} text(s)"
            raise ValueError(f"{count} for {len(self)} session(s); pass a list with one for each")
        return [session.ids(text) for session, text in zip(self.sessions, texts, strict=True)]

    def _some(self, texts: Any) -> list[Tensor]:
        ids = self._ids(texts)
        if empty := [place for place, each in enumerate(ids) if not each.shape[1]]:
            raise ValueError(f"the text of session {empty[0]} is empty; leave the session out of this batch")
        return ids

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for session in self.sessions:
                stack.enter_context(session.lock.use())
                check_same(session._router, session._settings)
            restores = [session._snapshot() for session in self.sessions]
            try:
                with evaluating(self.sessions[0].model):
                    yield
            except BaseException:
                for restore in restores:
                    restore()
                raise


def _each(texts: Any) -> Any:
    """A tokenizer's dictionary of several texts as one of each."""
    if not isinstance(texts, Mapping):
        return texts
    names = [name for name in texts if texts[name] is not None]
    rows = zip(*(texts[name] for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


class Rows:
    """Some sessions as the rows of one batch while a call is under way. A session itself changes when its row leaves.

    `places[row]` is the session of a row; sessions that are through have no row any more. Others may join.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions, self.model = sessions, sessions[0].model
        self.router = router_of(self.model)
        self.places = list(range(len(sessions)))
        self.cache = None
        if self.router.causal:
            self.cache = MemoryCache.concatenate([session.cache for session in sessions], self.router.device)
        self.layer = MemoryLayer() if self.cache is None else self.cache.memory
        self.layer.stream = Stream.concatenate([session._begun() for session in sessions])
        self._least = self.router.new_stream(1).state
        self._pad = self.model.config.get_text_config().pad_token_id or 0  # pyright: ignore

    @property
    def stream(self) -> Stream:
        """What the rows carry."""
        assert self.layer.stream is not None
        return self.layer.stream

    @property
    def running(self) -> tuple[int, ...]:
        """How many tokens of its running segment each row has read."""
        if self.cache is not None and self.cache.window is not None:
            return self.cache.window.running  # it moves on while the memory is disabled, too
        return self.stream.counts

    def in_step(self, texts: Sequence[Tensor]) -> list[list[Tensor]]:
        """Each row's tokens, cut where its segments end."""
        length, parts = self.router.segment_length, []
        for ids, running in zip(texts, self.running, strict=True):
            first = length - running
            parts.append([ids[:, :first], *(ids[:, first:].split(length, 1) if ids.shape[1] > first else ())])
        return parts if self.cache is not None else [[ids] for ids in texts]

    def call(self, module: nn.Module, parts: Sequence[Sequence[Tensor]], **kwargs: Any) -> tuple[Any, Tensor]:
        """What `module` makes of tokens of every row, and which of its columns `[b, t]` are real ones.

        Of each row the parts that end together, the last with the last, stand flush right: so rows that do not stand
        at one place of their segment end it in one column all the same. For encoders padding is on the right, as their
        positions count from the left.
        """
        refuse_prompts(module)
        ids, keep = _columns(parts, self._pad, left=self.cache is not None)
        more = {} if bool(keep.all()) else {"attention_mask": keep.long()}
        if self.cache is None:
            with carrying(self.layer):
                return module(input_ids=ids, **more, **kwargs), keep
        before = self.cache.window.taken if self.cache.window is not None else (0,) * len(ids)
        output = module(input_ids=ids, **with_cache(module, self.cache), **more, **kwargs)
        after = self.cache.window.taken if self.cache.window is not None else before
        for now, then, count in zip(after, before, keep.sum(1).tolist(), strict=True):
            check_taken(module, now - then, count)
        return output, keep

    def part_with(self, places: Sequence[int]) -> None:
        """These sessions are through: each gets its row, as it would be without the others."""
        if not places:
            return
        for place in places:
            cache, stream = self._row(self.places.index(place))
            session = self.sessions[place]
            if cache is not None:
                session._adopt(cache)
            session._layer.stream = stream
        stay = [row for row, place in enumerate(self.places) if place not in places]
        self.places = [self.places[row] for row in stay]
        index = torch.tensor(stay, dtype=torch.long, device=self.router.device)
        if not stay:
            return
        if self.cache is not None:
            self.cache.batch_select_indices(index)
            if self.cache.window is not None and max(self.cache.window.context) < self.cache.window.kept:
                self.cache.pack()
        else:
            self.layer.batch_select_indices(index)

    def give_back(self) -> None:
        """All that are left are through."""
        if torch.is_grad_enabled():
            (self.layer if self.cache is None else self.cache).detach()
        self.part_with(self.places)

    def join(self, others: Rows) -> None:
        """Rows of decoders that have read something, as have these, come behind these and are through with where they
        were. Sessions have new places: those that are through are dropped.
        """
        assert self.cache is not None
        assert others.cache is not None
        both = (self, others)
        stream = Stream.concatenate([rows.stream for rows in both])
        self.sessions = [rows.sessions[place] for rows in both for place in rows.places]
        self.places = list(range(len(self.sessions)))
        self.cache = MemoryCache.concatenate([self.cache, others.cache], self.router.device)
        self.layer = self.cache.memory
        self.layer.stream = stream

    def _row(self, row: int) -> tuple[MemoryCache | None, Stream | None]:
        cache = self.cache.row(row) if self.cache is not None else None
        stream = self.stream.select([row])
        if not stream.seen[0]:
            return cache, None  # the session is new and the memory is disabled
        return cache, replace(stream, state=shrink(stream.state, self._least))


def _columns(
    parts: Sequence[Sequence[Tensor]], pad: int, *, left: bool
) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """The parts of every row in columns, those of the last column's rows last; and which are real tokens."""
    most = max(len(row) for row in parts)
    rows = [[row[0][:, :0]] * (most - len(row)) + list(row) for row in parts]
    ids, keep = [], []
    for column in zip(*rows, strict=True):
        widest = max(part.shape[1] for part in column)
        gaps = [(widest - part.shape[1], 0) if left else (0, widest - part.shape[1]) for part in column]
        padded = [nn.functional.pad(part, gap, value=pad) for part, gap in zip(column, gaps, strict=True)]
        real = [nn.functional.pad(torch.ones_like(part), gap) for part, gap in zip(column, gaps, strict=True)]
        ids.append(torch.cat(padded))
        keep.append(torch.cat(real).bool())
    return torch.cat(ids, 1), torch.cat(keep, 1)


def _of_row(output: Any, keep_bt: Bool[Tensor, "b t"], row: int) -> Any:
    """One row of a model's output, without the columns of padding."""

    def chosen(value: Float[Tensor, "b ..."]) -> Tensor:
        # what has a column for every token is [b, t, d]; what a pooling head puts out is [b, c]
        return value[row : row + 1, keep_bt[row]] if value.ndim == 3 else value[row : row + 1]

    found: dict[str, Any] = {
        name: chosen(output[name]) for name in ("logits", "last_hidden_state") if output.get(name) is not None
    }
    if output.get("hidden_states") is not None:
        found["hidden_states"] = tuple(chosen(hidden) for hidden in output["hidden_states"])
    return type(output)(**found)
