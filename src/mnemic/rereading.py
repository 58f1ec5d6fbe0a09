"""A window kept as token ids instead of keys: small in a file, and read again when it is loaded.

The base reads the window's tokens with the memory as it stands now, where it once read each segment with the memory of
that time and with tokens that have left the window since. So keys above the first block are not the same. With an
untrained memory they are, up to rounding, as long as nothing has left the window.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mnemic.history import Log
from mnemic.host.anatomy import examine
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache, Window
from mnemic.host.call import reading
from mnemic.host.evaluating import evaluating


def window_ids(log: Log | None, seen: int, cache: MemoryCache, segment_length: int) -> Int[Tensor, "1 k"] | None:
    """The ids of the tokens whose keys a window of one row holds, from the text of its log, of a stream that has `seen`
    tokens; None where it cannot be read again: ids are missing, memory tokens have keys in it, or segments are of one
    token, each of which is written.
    """
    window = cache.window
    if window is None or log is None or window.beside or segment_length < 2:
        return None
    ids, count, sinks = log.last(seen), window.context[0], _sinks_in(window)
    if ids is None or sum(map(len, log.text or ())) != seen or count > seen:
        return None
    ids = torch.from_numpy(ids).long()
    ids = torch.cat([ids[:sinks], ids[seen - count + sinks :]])
    return None if bool((ids < 0).any()) else ids[None]


def _sinks_in(window: Window) -> int:
    """How many of the keys of its one row are sinks."""
    return min(window.sinks, window.context[0])


@torch.no_grad()
def reread(model: nn.Module, cache: MemoryCache, window: Window, ids: Int[Tensor, "1 k"], segment_length: int) -> None:
    """Puts the keys of `ids` into an empty cache, which then has this window; its stream stays as it is."""
    trunk, layer, stream = examine(model).trunk, cache.memory, cache.memory.stream
    sinks = _sinks_in(window)
    behind = window.position[0] - window.context[0] + sinks
    empty = replace(window, valid=window.valid[:, :0], context=(0,), running=(0,), position=(0,))
    # pieces shorter than a segment, each with the memory as it is: none fills a segment, so nothing is written
    idle = None
    if stream is not None:
        ids_waiting = None if stream.ids is None else stream.ids[:, :0]
        idle = replace(stream, waiting=stream.waiting[:, :0], ids=ids_waiting, counts=(0,), logs=())
    cache.window = empty
    with evaluating(model), reading():
        for first, part in ((0, ids[:, :sinks]), (behind, ids[:, sinks:])):
            for start in range(0, part.shape[1], segment_length - 1):
                layer.stream = idle
                assert cache.window is not None
                cache.window = replace(cache.window, running=(0,), position=(first + start,))
                trunk(input_ids=part[:, start : start + segment_length - 1], **with_cache(trunk, cache))
    layer.stream, layer.replay = stream, None
    cache.window = replace(window, valid=cache.window.valid, taken=(0,))
