"""A window made short on demand: a memory that writes inside attention gets its keys now, not when they would leave."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from mnemic.host.anatomy import examine
from mnemic.host.arguments import with_cache
from mnemic.host.call import reading
from mnemic.host.sites.attention import leaving

if TYPE_CHECKING:
    from mnemic.session import Session

NEWEST = 16
"""How many of the latest tokens keep their keys."""


def compact(session: Session, ratio: float, ids: Int[Tensor, "1 t"] | None) -> int:
    """`Session.compact`, in a call of the session; `ids` are those of the text that asks."""
    router, cache, stream = session._router, session._cache, session.stream
    if not router.memory.writes_inside:
        raise ValueError(
            f"a memory of kind {router.config.kind!r} makes nothing of the window's keys; attach mnemic.CompactConfig()"
        )
    if not router.enabled or session._layer.off:
        raise ValueError("the memory is off, or was while tokens of the window were read; it takes none of their keys")
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio is {ratio}; use a number above 1, of how many keys are to become one")
    window = None if cache is None else cache.window
    held = 0 if window is None else window.context[0]
    stay = NEWEST + (0 if window is None else min(window.sinks, held))
    if held <= stay:
        raise ValueError(f"the window holds {held} keys, of which {stay} stay as they are; read more than that first")
    assert cache is not None
    assert window is not None
    assert stream is not None
    shorter = window.shortened((stay,))
    query_btd, begins = stream.waiting[:, : stream.counts[0]], window.position[0] - window.running[0]
    if ids is not None:
        query_btd, begins = _asking(session, ids), window.position[0]
    left = leaving(router, cache, window, 0, (window.valid & ~shorter.valid)[0])
    known = router.memory.known(None, [replace(left, begins=begins, ratio=ratio)])
    state = router.memory.write(query_btd, stream.state, **known)
    session._layer.stream = replace(stream, state=state, held=())
    session._layer.replay = None  # which knows the stream as it was
    cache.window = shorter
    cache.pack()
    return held - stay


def _asking(session: Session, ids: Int[Tensor, "1 t"]) -> Float[Tensor, "1 t d"]:
    """The queries of a text that would come next, without their positions; it is read for them alone."""
    assert session._cache is not None
    assert session.stream is not None
    cache, trunk = session._cache.fork(), examine(session.model).trunk
    assert cache.window is not None
    room = session._router.segment_length - 1  # with one more its segment would end
    if cache.window.limit is not None:
        room = min(room, cache.window.limit - cache.window.position[0])
    if ids.shape[1] > room:
        raise ValueError(f"the text that asks has {ids.shape[1]} tokens; use {room} at most")
    cache.window = replace(cache.window, running=(0,))
    nothing = session.stream.waiting[:, :0]
    cache.memory.stream = replace(session.stream, waiting=nothing, counts=(0,), logs=(None,), held=())
    with reading():
        trunk(input_ids=ids, **with_cache(trunk, cache))
    return cache.memory.stream.waiting
