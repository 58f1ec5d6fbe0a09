"""What enters a block: hidden states pass the memory, and memory tokens come in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mnemic.host.arguments import bound
from mnemic.host.beside import Beside, for_queries
from mnemic.host.cache import KeysTakenError, MemoryCache
from mnemic.host.call import eager
from mnemic.host.passing import passed
from mnemic.host.sites import Hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Input(Hook):
    """The pre-hook of a block; blocks take hidden states first, by place or by name."""

    def install(self, block: nn.Module) -> RemovableHandle:
        """Registers it."""
        return block.register_forward_pre_hook(self.enter, with_kwargs=True)

    @eager
    def enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the block, with what the memory puts there."""
        call = self.router.running
        cache = call.cache if call is not None else None
        if isinstance(cache, MemoryCache) and cache.taking:  # a block that makes keys for `keys_apart`
            return args, kwargs
        hidden_btd = args[0] if args else kwargs.pop("hidden_states")
        rest = args[1:]
        hidden_btd = passed(self.router, self.site, hidden_btd)
        beside = call.beside if call is not None else None
        if beside is not None and beside.apart:
            assert isinstance(cache, MemoryCache)
            hidden_btd, rest, kwargs = keys_apart(block, self.site.layer, beside, cache, hidden_btd, rest, kwargs)
        elif beside is not None:
            hidden_btd = beside.enter(self.site.layer, hidden_btd)
        return (hidden_btd, *rest), kwargs


def keys_apart(
    block: nn.Module,
    layer: int,
    beside: Beside,
    cache: MemoryCache,
    hidden_btd: Tensor,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Lets a block make keys of the tokens before, which it leaves as soon as they are in the cache, where it can be
    left: what it makes of their queries is not wanted. Returns its arguments for the words.
    """
    assert beside.before is not None
    assert cache.window is not None
    arguments = bound(block, (hidden_btd, *rest), kwargs)
    name = next(iter(arguments))
    del arguments[name]
    cache.taking = True
    try:
        # compiled code cannot be left on the way: a block whose forward is compiled runs to its end
        block._call_impl(
            beside.before.inputs[layer].to(hidden_btd),
            **for_queries(arguments, slice(0, beside.first), cache.window.kept, hidden_btd),
        )
    except KeysTakenError:
        pass
    finally:
        cache.taking = False
    words = for_queries(arguments, beside.words, cache.window.kept, hidden_btd)
    return hidden_btd[:, beside.words_in(hidden_btd)], (), words
