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
    ids = log.last(window.context[0])
    if ids is None or sum(map(len, log.text or ())) != seen or bool((ids < 0).any()):
        return None
    return torch.from_numpy(ids).long()[None]


@torch.no_grad()
def reread(model: nn.Module, cache: MemoryCache, window: Window, ids: Int[Tensor, "1 k"], segment_length: int) -> None:
    """Puts the keys of `ids` into an empty cache, which then has this window; its stream stays as it is."""
    trunk, layer, stream = examine(model).trunk, cache.memory, cache.memory.stream
    first = window.position[0] - window.context[0]
    empty = replace(window, valid=window.valid[:, :0], context=(0,), running=(0,), position=(first,))
    # pieces shorter than a segment, each with the memory as it is: none fills a segment, so nothing is written
    idle = None if stream is None else replace(stream, waiting=stream.waiting[:, :0], counts=(0,), logs=())
    cache.window = None
    with evaluating(model), reading():
        for piece in ids.split(segment_length - 1, 1):
            layer.stream = idle
            cache.window = replace(cache.window or empty, running=(0,))
            trunk(input_ids=piece, **with_cache(trunk, cache))
    layer.stream, layer.replay = stream, None
    assert cache.window is not None
    cache.window = replace(window, valid=cache.window.valid, taken=(0,))
