"""The hooks: what happens to one call of the trunk on its way through a model with a memory.

Before the trunk runs, the call is bound to its cache and cut at segment ends. Where the memory writes, the new tokens
join the running segment and full segments are written; where it reads, tokens read the slots of their segment's start.
After the trunk, and only if nothing failed, the new stream is stored in the cache.

Where the memory reads before it writes, or the cache has a window, a segment can only run once the one before it
is written: the trunk is then called once a segment, and its outputs are joined, so the caller sees one call.

Memory tokens join the words of such a call as embeddings, before and behind them, and are cut out of its output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.host import sites
from mnemic.host.anatomy import MEMORY_NAME, Anatomy
from mnemic.host.arguments import bound, flat_mask, joined, part_of, with_cache
from mnemic.host.beside import Wordless, words_of
from mnemic.host.cache import MemoryCache
from mnemic.host.call import Call, SeenError, Watch, disabling, eager, is_disabled, thread
from mnemic.host.guard import Guard
from mnemic.host.opening import arrange, goes_by_segment, open_call
from mnemic.host.passing import counted
from mnemic.host.release import OUTPUT_CACHE, DynamicCache
from mnemic.host.ropes import length_dependent, rotations
from mnemic.host.sites import attention
from mnemic.host.sites.input import Input
from mnemic.host.sites.output import Output
from mnemic.host.turning import Turning, turnings
from mnemic.host.wrappers import check_present, check_whole, misplaced, warn_frozen
from mnemic.memory import Memory, MemoryConfig, Site
from mnemic.state import State
from mnemic.stream import Stream, cut


class Router(nn.Module):
    """Lives on the trunk as `mnemic`; owns the memory's parameters. Hooks are bound methods of submodules, so copying
    or pickling a model keeps each copy's hooks with its own memory.
    """

    like: Tensor

    def __init__(self, memory: Memory, config: MemoryConfig, anatomy: Anatomy) -> None:
        super().__init__()
        self.memory = memory
        self.config, self.segment_length = config, config.segment_length
        self.settings = config.to_dict()  # as they were attached: a config can be edited
        self.depth, self.width, self.causal = len(anatomy.blocks), anatomy.width, anatomy.causal
        self.positions, self.takes_positions, self.slides = anatomy.positions, anatomy.takes_positions, anatomy.slides
        self.cache_name = anatomy.cache_name
        self.register_buffer("like", torch.empty(0, dtype=anatomy.dtype), persistent=False)  # follows `model.to(dtype)`
        if memory.span is not None and (self.slides or self.positions is None):
            raise ValueError(
                f"a span of {memory.span} keys cannot join a model that has its own (sliding layers, ALiBi); "
                "leave it out"
            )
        self.frozen: list[nn.Parameter] = []
        self.frozen_names: set[str] = set()
        self.made_with: list[float] = []
        sites.check(memory, self.depth)
        self.attended = attention.served(anatomy, [site.layer for site in memory.attention_reads])
        self.turnings: list[Turning] = []
        hooks = {"input": Input, "output": Output}
        self.hooks = nn.ModuleDict(
            {f"{site.at}_{site.layer}": hooks[site.at](site, self) for site in sites.named(memory, self.depth)}
        )

    def install(self, anatomy: Anatomy) -> None:
        """Registers the hooks."""
        handles = [
            anatomy.trunk.register_forward_pre_hook(self.before, with_kwargs=True),
            anatomy.trunk.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        for hook in self.hooks.values():
            assert isinstance(hook, Input | Output)
            handles.append(hook.install(anatomy.blocks[hook.site.layer]))
        for rotary in length_dependent(anatomy.trunk):
            handles.append(rotary.register_forward_hook(self.rotate, with_kwargs=True))
        object.__setattr__(self, "handles", handles)
        setattr(anatomy.trunk, MEMORY_NAME, self)
        Guard.install(anatomy.trunk)
        try:
            if self.attended:
                attention.install(anatomy)
                self.turnings = turnings(anatomy, self.attended, self.disabled)
        except BaseException:
            self.remove(anatomy)
            raise

    def remove(self, anatomy: Anatomy) -> None:
        """Takes the hooks away again. They are found by their owner, so this works on copies of a model too."""
        for module in (anatomy.trunk, *anatomy.blocks, *length_dependent(anatomy.trunk)):
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) in (self, *self.hooks.values()):
                        del hooks[key]
                        for marks in (
                            module._forward_hooks_with_kwargs,
                            module._forward_hooks_always_called,
                            module._forward_pre_hooks_with_kwargs,
                        ):
                            marks.pop(key, None)
        Guard.remove(anatomy.trunk)
        attention.remove(anatomy.trunk)
        delattr(anatomy.trunk, MEMORY_NAME)

    @property
    def enabled(self) -> bool:
        """False within `Attachment.disabled`, in the thread or task that is in it."""
        return not is_disabled(self)

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Within it nothing is read or written, in this thread or task alone."""
        return disabling(self)

    @property
    def dtype(self) -> torch.dtype:
        """That of the base's hidden states, as they are now."""
        return self.like.dtype

    # --- one call ----------------------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """This thread's running calls, innermost last."""
        return thread.calls.setdefault(id(self), [])

    @property
    def running(self) -> Call | None:
        """The innermost of them, where the memory takes part in it."""
        return self.calls[-1] if self.enabled and self.calls else None

    @eager
    def before(
        self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """The trunk's pre-hook: binds the call, runs all segments but the last, prepares the last."""
        call, calls = Call(self, trunk.config, opening=True), self.calls
        while calls and not calls[-1].opening:
            calls.pop().restore()  # interrupted in somebody else's hook, behind which torch calls none
        call.wordless, thread.wordless = thread.wordless, None
        calls.append(call)
        with self.undone_when_interrupted(call):
            arguments = self._opened(call, trunk, bound(trunk, args, kwargs))
        call.opening = False
        return (), arguments

    def _opened(self, call: Call, trunk: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the call's last segment, when all before it have run."""
        if thread.watch is not None and thread.watch.router is self:
            return arguments
        if (found := trunk._modules.get(MEMORY_NAME)) is not self:
            raise misplaced(found)
        if torch.is_grad_enabled():
            check_whole(self.memory)
            warn_frozen(self.memory, trunk)
        open_call(self, call, trunk, arguments)
        if len(call.pieces) > 1 and goes_by_segment(self, call):
            if call.cache is None:
                call.cache = arguments[self.cache_name] = DynamicCache(config=trunk.config)  # pyright: ignore
                arguments["use_cache"] = call.private_cache = True
            if arguments.get("output_attentions", trunk.config.output_attentions):  # pyright: ignore
                raise ValueError(
                    "attention weights cannot be joined across segments; "
                    "call without output_attentions, or a segment a call"
                )
            seen = int(call.cache.get_seq_length())  # a static cache counts in place
            mask = arguments.get("attention_mask")
            if isinstance(mask, dict) or call.cache.is_compileable:
                # masks made for the whole call do not fit its parts; from a flat one the trunk makes its own
                arguments["attention_mask"] = flat_mask(mask, call.time, call.cache)
            for piece in call.pieces[:-1]:
                call.earlier.append(trunk(**part_of(arguments, piece, seen, call.time)))
            arguments = part_of(arguments, call.pieces[-1], seen, call.time)
            open_call(self, call, trunk, arguments)
        if isinstance(call.cache, MemoryCache):
            if self.attended and self.enabled:
                attention.check_asked(self, call, trunk)
            arrange(self, call, trunk, arguments)
        return arguments

    @contextlib.contextmanager
    def undone_when_interrupted(self, call: Call) -> Iterator[None]:
        """Takes a call back when something other than an `Exception` leaves it (Ctrl-C, `SystemExit`): torch's hooks do
        not run then.
        """
        try:
            yield
        except Exception:
            raise
        except BaseException:
            if call in self.calls:
                self.calls.remove(call)
            call.restore()
            raise

    @eager
    def after(self, trunk: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The trunk's hook: stores the new stream, moves the window, joins outputs. Undoes everything on an error."""
        call = self.calls.pop()
        if output is None:
            call.restore()
            return None
        try:
            return self._closed(call, output)
        except BaseException:
            call.restore()
            raise

    def _closed(self, call: Call, output: Any) -> Any:
        """The output of the whole call, when its stream and its window have moved on."""
        if call.layer is not None and call.stream is not None:
            stream = call.stream
            if not self.memory.writes:  # where tokens are written they are counted
                stream = counted(self, call)
            call.layer.stream = stream.leave(call.traces, call.keep).read(call.ids, call.keep)
        if isinstance(call.cache, MemoryCache):
            call.cache.inside = False
            call.cache.memory.off |= bool(self.attended) and not self.enabled
            window = call.cache.window
            assert window is not None
            pieces = cut(window.running, call.time, self.segment_length, call.keep)
            beside = call.beside
            if beside is None:
                call.cache.window = window.advance(call.keep, call.time)
            else:
                call.cache.window = window.advance(beside.keep, beside.width, beside.words)
            self.close_segment(call.cache, pieces[-1].ended if pieces else call.pieces[-1].ended)
        if call.beside is not None:
            output = words_of(output, call.beside.words_in)
        if call.earlier:
            output = joined([*call.earlier, output])
        if call.private_cache:
            output[OUTPUT_CACHE] = None
        return output

    @eager
    def rotate(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook of rotary embeddings that change with the length of what is seen: that is the window's, not the
        stream's.
        """
        cache = self.calls[-1].cache if self.calls else None
        if not isinstance(cache, MemoryCache):
            return output
        size, _, _, beside = cache.settings
        return rotations(rotary, args, kwargs, None if size is None else size + beside)

    def new_cache(self, window: int | None) -> MemoryCache:
        """A cache for new streams, with keys of the last `window` tokens."""
        return MemoryCache(window, self.segment_length, self.positions, self.depth, self.memory.beside)

    def flush(self, trunk: nn.Module, cache: MemoryCache, rows: tuple[int, ...]) -> None:
        """Ends the running segment of `rows`, which have tokens in it: what they have read is written."""
        stream = cache.memory.stream
        assert stream is not None
        if not self.memory.writes_tokens_behind:
            cache.memory.stream = stream.commit(self.memory, rows)
            self.close_segment(cache, rows)
            return
        self.run_wordless(trunk, cache, Wordless(ending=rows))

    def close_segment(self, cache: MemoryCache, rows: Sequence[int]) -> None:
        """`rows` end their segment: of the keys that leave the window, a memory that keeps keys gets those it keeps."""
        if self.attended and self.enabled:
            attention.take_leaving(self, cache, rows)
        cache.close_segment(rows)

    def run_wordless(self, trunk: nn.Module, cache: MemoryCache, wordless: Wordless) -> None:
        """A call of memory tokens alone."""
        stream = cache.memory.stream
        assert stream is not None
        nothing = torch.empty(stream.batch, 0, self.width, dtype=self.dtype, device=self.device)
        thread.wordless = wordless
        try:
            trunk(inputs_embeds=nothing, **with_cache(trunk, cache))
        finally:
            thread.wordless = None

    def new_stream(self, batch: int, state: State | None = None) -> Stream:
        """`batch` streams at their beginning, or at a segment's end with `state`."""
        check_present(self.memory)
        like = torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        stream = Stream.new(self.memory, batch, like)
        return stream if state is None else replace(stream, state=state)

    def watch(self, anatomy: Anatomy, input_ids: Tensor, watched: Iterable[Site]) -> dict[Site, Tensor]:
        """The hidden states of the base alone at some sites `[b, t, d]`, for rows that it sees on their own."""
        seen = self._seen(anatomy.trunk, input_ids, Watch(self, frozenset(watched)))
        return {site: hidden_btd.detach() for site, hidden_btd in seen.items()}

    def record(self, trunk: nn.Module, input_ids: Tensor) -> Tensor:
        """What is written of rows that the base sees on their own `[b, t, d]`, several sites joined; what comes later
        in the pass does not run.
        """
        writes = self.memory.writes
        seen = self._seen(trunk, input_ids, Watch(self, frozenset(writes), leaves=True))
        return torch.cat([seen[site] for site in writes], -1)

    def _seen(self, trunk: nn.Module, input_ids: Tensor, watch: Watch) -> dict[Site, Tensor]:
        """What a watch saw in a call of the base alone; raises `ValueError` for sites the memory does not touch."""
        thread.watch = watch
        try:
            trunk(input_ids=input_ids, use_cache=False)
        except SeenError:
            pass
        finally:
            thread.watch = None
        if unseen := sorted(watch.sites - watch.seen.keys()):
            raise ValueError(
                f"{', '.join(map(str, unseen))} cannot be watched: this memory does not read or write there"
            )
        return watch.seen

    @property
    def device(self) -> torch.device:
        """Where the memory lives."""
        return self.memory.place.device
