"""What happens to one call of the trunk on its way through a model with a memory.

The call is planned: bound to its cache and cut at segment ends. Then it runs. Where the memory writes, the new tokens
join the running segment and full segments are written; where it reads, tokens read the slots of their segment's start.
Behind it, and only if nothing failed, the new stream stands in the cache.

Where the memory reads before it writes, or the cache has a window, a segment can only run once the one before it
is written: the plan then has a pass for each, and their outputs are joined, so the caller sees one call.

Memory tokens join the words of such a pass as embeddings, before and behind them, and are cut out of its output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.host import sites
from mnemic.host.anatomy import MEMORY_NAME, Anatomy, attention_of, examine, trained_positions
from mnemic.host.arguments import bound, joined, with_cache
from mnemic.host.beside import Wordless, words_of
from mnemic.host.cache import MemoryCache
from mnemic.host.call import Call, SeenError, Watch, aside, disabling, eager, is_disabled, thread
from mnemic.host.guard import Guard
from mnemic.host.opening import opened, planned
from mnemic.host.passing import counted, passed
from mnemic.host.release import OUTPUT_CACHE
from mnemic.host.ropes import length_dependent, rotations
from mnemic.host.sites import attention, logits
from mnemic.host.sites.input import Input
from mnemic.host.sites.logits import Logits
from mnemic.host.sites.output import Output
from mnemic.host.turning import Turning, movable, turnings
from mnemic.host.wrappers import check_present, check_whole, warn_frozen
from mnemic.memory import Memory, MemoryConfig, Site
from mnemic.state import State
from mnemic.stream import Stream

SINKS = 4
"""How many of a stream's first keys stay in a window that is longer than a segment, where nobody says."""


class Router(nn.Module):
    """Lives on the trunk as `mnemic`; owns the memory's parameters. Hooks are bound methods of submodules, so copying
    or pickling a model keeps each copy's hooks with its own memory.
    """

    like: Tensor
    guards: tuple[Guard, ...]
    attentions: tuple[nn.Module, ...]

    def __init__(self, memory: Memory, config: MemoryConfig, anatomy: Anatomy) -> None:
        super().__init__()
        self.memory = memory
        self.config, self.segment_length = config, config.segment_length
        self.settings = config.to_dict()  # as they were attached: a config can be edited
        self.depth, self.width, self.causal = len(anatomy.blocks), anatomy.width, anatomy.causal
        self.positions, self.takes_positions, self.slides = anatomy.positions, anatomy.takes_positions, anatomy.slides
        self.cache_name, self.trained = anatomy.cache_name, trained_positions(anatomy.trunk)
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
        self.sinkless: str | None = None
        """Why a window has no sinks here."""
        everywhere = bool(self.attended) and self.attended == attention.served(anatomy, range(self.depth))
        if everywhere or memory.span is not None:
            self.sinkless = "this memory says itself which keys a token sees"
        elif length_dependent(anatomy.trunk):
            self.sinkless = "the model's rotary embedding is that of texts of the window's length"
        self.turnings: list[Turning] = []
        self.moving: tuple[dict[int, Turning] | None, ...] = ()  # looked up when first needed
        object.__setattr__(self, "attentions", ())  # the modules of `attended`, which are the trunk's
        self.logits_scale = 1.0  # found out when it is installed
        logits.check(memory, anatomy)
        hooks = {"input": Input, "output": Output, "logits": Logits}
        where = [*sites.named(memory, self.depth), *memory.logits_reads]
        self.hooks = nn.ModuleDict({f"{site.at}_{site.layer}": hooks[site.at](site, self) for site in where})

    def install(self, anatomy: Anatomy) -> None:
        """Registers the hooks."""
        handles = []
        for hook in self.hooks.values():
            assert isinstance(hook, Input | Output | Logits)
            module = anatomy.head if isinstance(hook, Logits) else anatomy.blocks[hook.site.layer]
            assert module is not None  # checked
            handles.append(hook.install(module))
        for rotary in length_dependent(anatomy.trunk):
            handles.append(rotary.register_forward_hook(self.rotate, with_kwargs=True))
        object.__setattr__(self, "handles", handles)
        setattr(anatomy.trunk, MEMORY_NAME, self)
        guarded = (anatomy.trunk, *((anatomy.model,) if self.memory.logits_reads else ()))
        object.__setattr__(self, "guards", tuple(Guard.install(module, anatomy.trunk) for module in guarded))
        try:
            if self.memory.logits_reads:
                self.logits_scale = logits.scale_of(anatomy, self.disabled)
            if self.attended:
                attention.install(anatomy)
                inside = [attention_of(anatomy.blocks[layer]) for layer in self.attended]
                object.__setattr__(self, "attentions", tuple(inside))
                self.turnings, self.memory.inside = turnings(anatomy, self.attended, self.disabled)
        except BaseException:
            self.remove(anatomy)
            raise

    def remove(self, anatomy: Anatomy) -> None:
        """Takes the hooks away again. They are found by their owner, so this works on copies of a model too."""
        heads = () if anatomy.head is None else (anatomy.head,)
        for module in (*anatomy.blocks, *length_dependent(anatomy.trunk), *heads):
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) in (self, *self.hooks.values()):
                        del hooks[key]
                        for marks in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                            marks.pop(key, None)
        for module in (anatomy.trunk, anatomy.model):
            Guard.remove(module)
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

    @aside
    def run(self, trunk: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the trunk: planned, carried out pass by pass, joined. Whatever ends it early takes it back."""
        arguments = bound(trunk, args, kwargs)
        if thread.watch is not None and thread.watch.router is self:
            output = forward(**arguments)
            self._leave(output)
            return output
        if torch.is_grad_enabled():
            check_whole(self.memory)
            warn_frozen(self.memory, trunk)
        # inside, outputs have names: what stands where in a tuple depends on what was asked for
        named = arguments.get("return_dict")
        named = getattr(trunk.config, "return_dict", True) if named is None else named
        if not named:
            arguments["return_dict"] = True
        outputs, reads, ahead = [], [], logits.ahead_of(self)
        with contextlib.ExitStack() as undo:
            plan = planned(self, trunk, arguments, undo)
            for number in range(len(plan.passes)):
                call = opened(self, trunk, plan, number)
                self.calls.append(call)
                try:
                    output = forward(**call.arguments)
                    self._leave(output)
                finally:
                    self.calls.remove(call)
                outputs.append(self._closed(trunk, call, output))
                reads += call.reads if ahead is not None else ()
            output = joined(outputs) if len(outputs) > 1 else outputs[0]
            undone = undo.pop_all()
            if ahead is not None:
                ahead.hidden_btd, ahead.reads, ahead.undo = output[0], reads, undone
        if plan.private_cache:
            output[OUTPUT_CACHE] = None
        if named or isinstance(output, tuple):
            return output
        return tuple(value for value in output.to_tuple() if value is not None)

    def run_whole(
        self, model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of the model around the trunk, for a memory that reads at its head."""
        return logits.around(self, model, forward, args, kwargs)

    @eager
    def _leave(self, output: Any) -> None:
        """Hidden states leave the trunk, for the head: where the memory writes them, they pass."""
        for site in self.memory.writes:
            if site.at == "logits":
                passed(self, site, output[0])

    @eager
    def _closed(self, trunk: nn.Module, call: Call, output: Any) -> Any:
        """The output of a pass, when its stream and its window have moved on."""
        layer, stream, cache, beside = call.plan.layer, call.stream, call.cache, call.beside
        if layer is not None and stream is not None:
            if not self.memory.writes or self.memory.writes_inside:  # elsewhere what is written is counted
                stream = counted(self, call)
            layer.stream = stream.leave(call.traces, call.keep).read(call.ids, call.keep).holding(call.held)
        if isinstance(cache, MemoryCache):
            cache.inside = False
            cache.memory.off |= bool(self.attended) and not self.enabled
            assert cache.window is not None
            if beside is None:
                cache.window = cache.window.advance(call.keep, call.time)
            else:
                cache.window = cache.window.advance(beside.keep, beside.width, beside.words)
            self.close_segment(trunk, cache, call.now.closing)
        return output if beside is None else words_of(output, beside.words_in)

    @eager
    def rotate(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook of rotary embeddings that change with the length of what is seen: that is the window's, not the
        stream's.
        """
        cache = self.calls[-1].cache if self.calls else None
        if not isinstance(cache, MemoryCache):
            return output
        size, _, _, beside, _ = cache.settings
        return rotations(rotary, args, kwargs, None if size is None else size + beside)

    def new_cache(self, window: int | None, sinks: int | None = None) -> MemoryCache:
        """A cache for new streams, with keys of the last `window` tokens, of which the first `sinks` stay: by default
        `SINKS`, as far as there is room.
        """
        sinks = min(SINKS, self.most_sinks(window)) if sinks is None else sinks
        # further away from its sinks than it was trained for a base is lost (Llama and all that rotate)
        limit = min(self.positions, self.trained) if sinks and self.positions and self.trained else self.positions
        return MemoryCache(window, self.segment_length, limit, self.depth, self.memory.beside, sinks)

    def most_sinks(self, window: int | None) -> int:
        """How many sinks a window has room for beside a segment: none where nothing leaves it."""
        if window is None or self.sinkless:
            return 0
        room = window if self.positions is None else min(window, self.positions - self.memory.beside)
        return max(0, room - self.segment_length)

    def flush(self, trunk: nn.Module, cache: MemoryCache, rows: tuple[int, ...]) -> None:
        """Ends the running segment of `rows`, which have tokens in it: what they have read is written."""
        stream = cache.memory.stream
        assert stream is not None
        if not self.memory.writes_tokens_behind:
            if not self.memory.writes_inside:  # which writes when keys leave
                cache.memory.stream = stream.commit(self.memory, rows)
            self.close_segment(trunk, cache, rows)
            return
        self.run_wordless(trunk, cache, Wordless(ending=rows))

    def close_segment(self, trunk: nn.Module, cache: MemoryCache, rows: Sequence[int]) -> None:
        """`rows` end their segment: the keys that leave the window go to a memory inside attention."""
        window, moved = cache.window, None
        if window is not None and window.sinks and any(window.runs_out(row) for row in rows):
            if not self.moving:
                self.moving = (movable(examine(trunk), self.disabled),)
            moved = self.moving[0]
        if self.attended and self.enabled:
            attention.take_leaving(self, cache, rows, moved is not None)
        cache.close_segment(rows, moved)

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
