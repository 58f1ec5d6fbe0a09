"""What the tests share: the matrix of mechanisms and families, a memory with an effect, ways to feed a stream."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

import mnemic
from families import DECODERS, DEPTH, ENCODERS, FAMILIES, VOCABULARY, WIDTH, make
from mnemic.host.cache import MemoryLayer, memory_layer
from mnemic.host.call import carrying
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memory import Site
from mnemic.state import level
from mnemic.stream import Stream

SEGMENT = 8
"""The segment length of every `tiny()` config."""

CONFIGS: dict[str, mnemic.MemoryConfig] = {
    f"{kind}-{number}": config for kind, cls in mnemic.CONFIGS.items() for number, config in enumerate(cls.tiny())
}
FIRST_FORMS = {kind: CONFIGS[f"{kind}-0"] for kind in mnemic.CONFIGS}
INSIDE = {label for label, config in CONFIGS.items() if config.build(WIDTH, DEPTH).attention_reads}
"""Configs of memories inside attention: these have an effect once keys left the window, so they are tested with one."""
AT_THE_HEAD = {label for label, config in CONFIGS.items() if config.build(WIDTH, DEPTH).logits_reads}
"""Configs of memories that read the output distribution, which not every family has as its head puts it out."""
TRAINED = {kind: config for kind, config in FIRST_FORMS.items() if list(config.build(WIDTH, DEPTH).parameters())}


def _over(configs: dict[str, mnemic.MemoryConfig]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", list(configs.values()), ids=list(configs))


every_config = _over(CONFIGS)
every_config_that_writes = _over({label: config for label, config in CONFIGS.items() if label not in INSIDE})
every_kind_that_writes = _over({k: config for k, config in FIRST_FORMS.items() if f"{k}-0" not in INSIDE})
every_kind = _over(FIRST_FORMS)
"""The first config of each mechanism: where the core's ways are tested, and forms of a mechanism add nothing."""
every_trained_kind = _over(TRAINED)
"""Those of which something trains: of Transformer-XL nothing does, its host learns to use it."""

SHARED_FAMILIES = ("gpt2", "gemma3", "bert")
"""A table of positions, rotary ones with sliding layers, and an encoder: every mechanism meets these."""


def _seams() -> dict[tuple[bool, ...], str]:
    """The ways in which a memory is joined to a host, which is all that a family can meet of it; a config of each."""
    seams: dict[tuple[bool, ...], str] = {}
    for label, config in CONFIGS.items():
        memory = config.build(WIDTH, DEPTH)
        inside = len(memory.attention_reads) > 0
        seam = memory.writes_see_reads, memory.beside > 0, len(memory.writes) > 1, inside, len(memory.logits_reads) > 0
        seams.setdefault(seam, label)
    return seams


SEAMS = [label for _, label in sorted(_seams().items())]
"""A config of each seam, the plainest first."""
FIRST = {SEAMS[0], *(f"{kind}-0" for kind in FIRST_FORMS)}


MANY = 8
"""So few families are all met in each test."""
WHOLE = "MNEMIC_WHOLE_MATRIX" in os.environ
"""Whether every pair that can be met is met in every test: for a release, an hour or two."""


def matrix(families: Iterable[str], forms: bool = True) -> Callable[[Any], Any]:
    """Mechanisms over these families, with ids like `emt-0-llama`.

    What is between a family and a mechanism is the seam, and what is common to all is the core. So in each test every
    second family meets a mechanism of one seam, and every mechanism, in its first form and (with `forms`) another one,
    meets one of the shared families (the first family where there is none of them among these). Which ones differs from
    test to test, by its name: over all tests every family meets every seam and every form every shared family.

    Marked `small` are the families and the first forms.
    """
    families = list(families)
    shared = [name for name in families if name in SHARED_FAMILIES] or families[:1]

    def over(test: Any) -> Any:
        turn = zlib.crc32(test.__name__.encode())
        labels = [label for kind in FIRST_FORMS for label in _forms(kind, turn, forms)]
        met: dict[tuple[str, str], None] = {}
        for place, name in enumerate(families):
            if WHOLE or len(families) < MANY or (turn + place) % 2:
                serving = [label for label in SEAMS if refusal(label, name) is None and (forms or label in FIRST)]
                met |= dict.fromkeys((label, name) for label in _some(serving, turn + place))
        for place, label in enumerate(labels):
            served = [name for name in shared if refusal(label, name) is None]
            met |= dict.fromkeys((label, name) for name in _some(served, turn + place))
        small = {label: [pytest.mark.small] if label in FIRST else [] for label in CONFIGS}
        cases = [pytest.param(CONFIGS[label], name, id=f"{label}-{name}", marks=small[label]) for label, name in met]
        return pytest.mark.parametrize(("config", "name"), cases)(test)

    return over


def _forms(kind: str, turn: int, forms: bool) -> list[str]:
    """The first form of a mechanism and another one, the next with the next turn."""
    first, *others = [label for label in CONFIGS if label.rpartition("-")[0] == kind]
    return [first, *_some(others, turn)] if forms else [first]


def _some(found: list[str], turn: int) -> list[str]:
    """One of them, the next with the next turn; all of them for the whole matrix."""
    return found if WHOLE else [found[turn % len(found)]] if found else []


def first_forms(families: Iterable[str]) -> Callable[[Any], Any]:
    """The matrix without other forms: where the forms of a mechanism differ in nothing that is asked."""
    return matrix(families, forms=False)


@functools.cache
def _refusal(label: str, causal: bool, name: str | None) -> str | None:
    try:
        CONFIGS[label].build(WIDTH, DEPTH, causal=causal)
        if name is not None:
            mnemic.attach(make(name), CONFIGS[label])
    except ValueError as refused:
        return str(refused)
    return None


def refusal(label: str, name: str) -> str | None:
    """Why a mechanism does not serve a family; None where it does. Only inside attention and at the head does it depend
    on more than whether the family is a decoder.
    """
    looks = label in INSIDE | AT_THE_HEAD and name in DECODERS
    return _refusal(label, name in DECODERS, name if looks else None)


def trains(model: nn.Module) -> bool:
    """Whether the memory has anything that trains: Transformer-XL has not, its host learns to use it."""
    return bool(mnemic.attached(model).parameters())


def matrix_of_writes(families: Iterable[str]) -> Callable[[Any], Any]:
    """The matrix without mechanisms inside attention, which write no hidden states and do nothing without a window:
    `test_recall.py` asks the same of them in their own terms.
    """

    def over(test: Any) -> Any:
        mark = matrix(families)(test).pytestmark[-1]
        cases = [case for case in mark.args[1] if case.id.rpartition("-")[0] not in INSIDE]
        del test.pytestmark[-1]
        return pytest.mark.parametrize(mark.args[0], cases)(test)

    return over


over_all = matrix(FAMILIES)
over_all_that_write = matrix_of_writes(FAMILIES)
over_decoders_that_write = matrix_of_writes(DECODERS)
over_decoders = matrix(DECODERS)
over_encoders = matrix(ENCODERS)


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    """Random ids `[batch, time]` without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def other(ids: Tensor) -> Tensor:
    """Ids that differ from these at every place."""
    return (ids - 3 + 41) % (VOCABULARY - 3) + 3


def known(memory: mnemic.Memory, batch: int, time: int, seed: int = 0) -> dict[str, Tensor]:
    """Random ids as a memory takes them beside hidden states; nothing where it takes none."""
    return memory.known(tokens(batch, time, seed))


def shake(module: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Moves every parameter at random, as training would, so that a memory has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module, config: mnemic.MemoryConfig, seed: int = 0) -> mnemic.Attachment:
    """Attaches a memory that has an effect."""
    torch.manual_seed(seed)
    attachment = mnemic.attach(model, config)
    shake(attachment.memory, seed)
    return attachment


def host(name: str, config: mnemic.MemoryConfig, **changes: Any) -> Any:
    """A tiny model of the family with a memory that has an effect."""
    model = make(name, **changes)
    trained(model, config)
    return model


def carrier(model: nn.Module, window: int | None = None) -> Cache | MemoryLayer:
    """What carries a new batch of streams: the usual cache, one with a window, or an encoder's bare layer."""
    attachment = mnemic.attached(model)
    if not attachment.anatomy.causal:
        return MemoryLayer()
    if attachment.memory.attention_reads:
        window = attachment.router.config.window if window is None else window
    return DynamicCache(config=model.config) if window is None else mnemic.memory_cache(model, window)


def stream(carried: Cache | MemoryLayer) -> Stream:
    """The stream that a carrier holds."""
    found = carried.stream if isinstance(carried, MemoryLayer) else memory_layer(carried, 2).stream
    assert found is not None
    return found


def positions_of(mask: Tensor) -> Tensor:
    """Positions `[b, t]` that count real tokens only."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def call(model: nn.Module, ids: Tensor, carried: Cache | MemoryLayer | None, mask: Tensor | None = None) -> Tensor:
    """The logits of one call; `mask` covers everything so far, as Hugging Face wants it."""
    if isinstance(carried, MemoryLayer):
        with carrying(carried):
            return model(input_ids=ids, attention_mask=mask).logits
    more: dict[str, Any] = {}
    if mask is not None and not isinstance(carried, mnemic.MemoryCache) and model.config.model_type != "bloom":
        more["position_ids"] = positions_of(mask)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, **{CACHE: carried}, **more).logits


@torch.no_grad()
def feed(
    model: nn.Module,
    ids: Tensor,
    lengths: Sequence[int] | None = None,
    mask: Tensor | None = None,
    carried: Cache | MemoryLayer | None = None,
) -> Tensor:
    """The logits `[b, t, v]` of a stream given in calls of `lengths` tokens.

    By default one call; segment by segment for an encoder, whose call is a segment.
    """
    carried = carrier(model) if carried is None else carried
    if isinstance(carried, MemoryLayer):
        lengths = [SEGMENT] * (ids.shape[1] // SEGMENT) if lengths is None else lengths
    lengths = [ids.shape[1]] if lengths is None else lengths
    assert sum(lengths) == ids.shape[1]
    logits, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        # keys before the call are in the cache, so its mask begins with theirs; an encoder has none
        seen = None if mask is None else mask[:, part if isinstance(carried, MemoryLayer) else slice(0, part.stop)]
        logits.append(call(model, ids[:, part], carried, seen))
        start += length
    return torch.cat(logits, 1)


def random_cuts(time: int, seed: int) -> list[int]:
    """Lengths of 1 to 11 tokens that add up to `time`."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := time - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(1, 12, (1,), generator=generator))))
    return lengths


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-4, size: float = 0.0) -> None:
    """Within `tolerance`, or a tenth of it of large values (of `size` everywhere); whole numbers must be equal."""
    tolerance = tolerance if actual.is_floating_point() else 0
    atol = tolerance * max(1.0, size / 10)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=tolerance / 10)


def assert_differ(actual: Tensor, expected: Tensor, least: float = 1e-3) -> None:
    """The effect a test is about exists: without it the test could not fail."""
    assert (actual - expected).abs().max() > least


def assert_effect(model: nn.Module, ids: Tensor, expected: Tensor) -> None:
    """The attached memory changes what the model makes of `ids`, or with a memory inside attention of what left the
    window.
    """
    attachment = mnemic.attached(model)
    if attachment.memory.attention_reads:
        with torch.no_grad(), attachment.disabled():
            expected = feed(model, ids)
        assert_differ(feed(model, ids), expected)
    else:
        assert_differ(model(ids).logits, expected)


def assert_same_stream(actual: Stream, expected: Stream, tolerance: float = 2e-4) -> None:
    """Equal ledgers; tensors within `tolerance`, or a tenth of it of their largest value: an entry is a sum of such."""
    assert (actual.counts, actual.written, actual.seen) == (expected.counts, expected.written, expected.seen)
    assert actual.tensors().keys() == expected.tensors().keys()
    for bank, its in zip(actual.banks, expected.banks, strict=True):
        kept, wanted = ({} if each is None else each.tensors() for each in (bank, its))
        assert kept.keys() == wanted.keys()
        for key, tensor in kept.items():
            assert_near(tensor, wanted[key], tolerance)
    for key, tensor in actual.tensors().items():
        # a batch is as large as its fullest row needs, and zeros mean that there is nothing
        tensor, wanted = level([tensor, expected.tensors()[key]])
        assert_near(tensor, wanted, tolerance, size=float(wanted.abs().max()) if wanted.numel() else 0.0)


def assert_equal_stream(actual: Stream, expected: Stream) -> None:
    """Bit-equal."""
    assert_same_stream(actual, expected, 0.0)


def assert_equals_naive(
    memory: mnemic.Memory, site: Site, hidden: Tensor, state: dict[str, Tensor], keep: Tensor | None, width: int
) -> list[Tensor | None]:
    """In double precision `read` and `write` equal `naive`, as do their gradients, which are returned.

    `width` values of the leaf `hidden [b, t, d]` are read: what is written may be of several sites.
    """
    results = []
    for output, after in (
        (memory.read(site, hidden[..., :width], state), memory.write(hidden, state, keep)),
        memory.naive(hidden, state, keep),
    ):
        weights = torch.Generator().manual_seed(1)
        parts = [output, *(after[name] for name in sorted(after))]
        loss = sum((part.double() * torch.randn(part.shape, generator=weights)).sum() for part in parts)
        found = torch.autograd.grad(loss, [hidden, *memory.parameters()], allow_unused=True)
        results.append((output, after, found))
    (output, after, found), (expected, expected_after, wanted) = results
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
    for name, tensor in expected_after.items():
        # the state is float32 whatever the memory computes in, and so is what its gradient passes
        torch.testing.assert_close(after[name].double(), tensor.double(), atol=1e-5, rtol=1e-5)
    for gradient, its in zip(found, wanted, strict=True):
        # with one token there is none before it
        if gradient is None or its is None:
            assert all(each is None or not each.any() for each in (gradient, its))
        else:
            torch.testing.assert_close(gradient, its, atol=1e-4, rtol=1e-4)
    return list(found)
