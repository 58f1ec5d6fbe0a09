"""What is Titans' own: chunks against the loop over tokens, the gradient inside, momentum, decay and windows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import mnemic
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_differ,
    assert_equals_naive,
    host,
    shake,
    tokens,
)
from mnemic.memories.rules import RULES
from mnemic.memories.titans import TitansConfig
from mnemic.memories.titans_network import Pairs, activate, gradients, learn, network, recall, slope
from mnemic.memory import Site
from mnemic.state import nbytes

FORMS = [
    {},
    {"layers": 1, "context": "layer"},
    {"layers": 3, "expansion": 1, "clip": None},
    {"chunk": 1, "shift": False},
    {"chunk": 5, "window_tokens": 3},
    {"chunk": 1, "window_tokens": 7, "layers": 1},
    {"context": "tokens", "persistent": 1, "queries": 3, "chunk": 4},
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())) or "default")


def build(width=32, depth=2, dim=16, heads=2, shaken=True, **settings):
    memory = TitansConfig(segment_length=SEGMENT, dim=dim, heads=heads, **settings).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def written(memory, *segments, state=None):
    """The state after segments `[b, t, d]`."""
    state = memory.init_state(len(segments[0])) if state is None else state
    for segment in segments:
        state = memory.write(segment, state)
    return state


def draw(time, rows=2, heads=2, size=5, **given):
    """Pairs in float64 with gates of any strength; what is `given` for all tokens instead."""

    def gate():
        return torch.rand(rows, heads, time, dtype=torch.float64)

    drawn = {
        "key": F.normalize(torch.randn(rows, heads, time, size, dtype=torch.float64), dim=-1),
        "value": torch.randn(rows, heads, time, size, dtype=torch.float64),
        "rate": gate(),
        "log_momentum": gate().log(),
        "log_keep": gate().log() / 10,
        "share": gate(),
        "real": torch.ones(rows, 1, time, dtype=torch.float64),
    }
    full = {name: torch.full_like(drawn[name], float(value)) for name, value in given.items()}
    return Pairs(**{**drawn, **full})


def start(layers, rows=2, heads=2, size=5, expansion=2, written=True):
    """A state that is not empty unless `written=False`, and first weights, in float64."""
    config = TitansConfig(layers=layers, dim=heads * size, heads=heads, expansion=expansion)
    state = config.build(8, 2).init_state(rows)
    state.pop("last")  # which the network knows nothing of
    state = {name: (torch.randn if written else torch.zeros)(t.shape, dtype=torch.float64) for name, t in state.items()}
    return state, [torch.randn(heads, *shape, dtype=torch.float64) for shape in config.shapes]


NEVER = -1e4
"""The logarithm of a momentum of 0."""


# --- chunks are the loop ---------------------------------------------------------------------------------------------


def by_token(state, first, pairs, chunk, window_tokens, clip):
    """The equations token by token, on the gradients of autograd."""
    rows, heads, time = pairs.rate.shape
    count = len(first)
    learned, momentum = (
        [state[f"{name}_{layer}"] for layer in range(1, count + 1)] for name in ("learned", "momentum")
    )
    matrices = []
    for t in range(time):
        if t % chunk == 0:
            matrices = [f + m for f, m in zip(first, learned, strict=True)]
        push = [torch.zeros_like(each) for each in learned]
        for i in range(max(0, t - window_tokens + 1), t + 1):
            for b in range(rows):
                for h in range(heads):
                    own = [each[b, h] for each in matrices]
                    found = inner_gradient(own, pairs.key[b, h, i], pairs.value[b, h, i], clip)
                    weight = 1.0 if window_tokens == 1 else pairs.share[b, h, i]
                    for each, gradient in zip(push, found, strict=True):
                        each[b, h] += weight * gradient
        rate, kept = (each[:, :, t, None, None] for each in (pairs.rate, pairs.log_keep.exp()))
        goes_on = pairs.log_momentum.exp()[:, :, t, None, None]
        momentum = [goes_on * s - rate * g for s, g in zip(momentum, push, strict=True)]
        learned = [kept * m + s for m, s in zip(learned, momentum, strict=True)]
    after = {f"learned_{layer}": each for layer, each in enumerate(learned, 1)}
    return after | {f"momentum_{layer}": each for layer, each in enumerate(momentum, 1)}


def inner_gradient(matrices, key, value, clip=None):
    """Of ½ ‖M(key) - value‖², by autograd."""
    leaves = [each.detach().requires_grad_() for each in matrices]
    *hidden, last = leaves
    for matrix in hidden:
        key = activate(key @ matrix)
    found = torch.autograd.grad((key @ last - value).square().sum() / 2, leaves)
    length = sum(each.square().sum() for each in found)
    return [each if clip is None else each / (1 + length / clip**2).sqrt() for each in found]


@pytest.mark.parametrize("time", [1, 3, 9])
@pytest.mark.parametrize(("chunk", "window_tokens"), [(1, 1), (1, 3), (4, 1), (4, 3), (2, 6), (16, 2)])
@pytest.mark.parametrize(("layers", "clip"), [(1, None), (2, None), (2, 1.0), (3, 2.0)])
@torch.no_grad()
def test_chunks_equal_the_loop_over_tokens(layers, clip, chunk, window_tokens, time):
    (state, first), pairs = start(layers), draw(time)
    with torch.enable_grad():
        expected = by_token(state, first, pairs, chunk, window_tokens, clip)
    after = learn(state, first, pairs, chunk, window_tokens, clip)
    assert after.keys() == expected.keys() == state.keys()
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], atol=1e-10, rtol=1e-10)


@every_form
@pytest.mark.parametrize("time", [1, 5, 18])
def test_the_module_is_its_equations(form, time):
    memory = build(**form).double()
    hidden, keep = torch.randn(2, time, 32, dtype=torch.float64, requires_grad=True), torch.rand(2, time) < 0.7
    state = written(memory, torch.randn(2, 9, 32, dtype=torch.float64))
    state = {name: tensor.detach().double() for name, tensor in state.items()}
    assert_equals_naive(memory, Site(0), hidden, state, keep, 32)


@torch.no_grad()
def test_the_length_of_chunks_matters_as_gradients_are_taken_at_their_starts():
    (state, first), pairs = start(2), draw(8)
    one, four = learn(state, first, pairs, 1), learn(state, first, pairs, 4)
    assert_differ(one["learned_1"], four["learned_1"])
    # without a rate nothing is trained, and chunks only carry what is there
    pairs = draw(8, rate=0)
    for name, tensor in learn(state, first, pairs, 1).items():
        torch.testing.assert_close(tensor, learn(state, first, pairs, 4)[name])


# --- the gradient inside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_inner_gradient_is_that_of_autograd(layers, clip):
    (state, first), pairs = start(layers), draw(4)
    weights = network(state, first, torch.float64)
    found = gradients(weights, pairs.key, pairs.value, clip)
    for b, h, t in ((0, 0, 0), (1, 0, 3), (1, 1, 2)):
        expected = inner_gradient([each[b, h] for each in weights], pairs.key[b, h, t], pairs.value[b, h, t], clip)
        for (inputs, errors), wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.outer(inputs[b, h, t], errors[b, h, t]), wanted)


def test_a_clipped_gradient_points_the_same_way_and_is_never_longer():
    (state, first), pairs = start(2), draw(4)
    weights = network(state, first, torch.float64)
    plain, clipped = (gradients(weights, pairs.key, 1e4 * pairs.value, clip) for clip in (None, 3.0))
    long, short = (torch.cat([(x[..., None] * e[..., None, :]).flatten(3) for x, e in g], -1) for g in (plain, clipped))
    assert long.norm(dim=-1).min() > 100
    assert short.norm(dim=-1).max() <= 3.0
    torch.testing.assert_close(F.cosine_similarity(long, short, dim=-1), torch.ones(2, 2, 4).double())
    # what is short already is left alone
    small = gradients(weights, pairs.key, pairs.value, 1e6)
    for (_, errors), (_, wanted) in zip(small, gradients(weights, pairs.key, pairs.value, None), strict=True):
        torch.testing.assert_close(errors, wanted)


def test_slope_is_the_derivative():
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(slope(z), torch.autograd.grad(activate(z).sum(), z)[0])


def test_second_derivatives_reach_through_the_recurrence():
    (state, first), pairs = start(2, rows=1, heads=1, size=3), draw(3, rows=1, heads=1, size=3)
    names = ("key", "value", "rate", "log_momentum", "log_keep", "share")

    def loss(*leaves):
        changed = pairs._replace(**dict(zip(names, leaves[: len(names)], strict=True)))
        weights = list(leaves[len(names) : len(names) + 2])
        before = dict(zip(sorted(state), leaves[len(names) + 2 :], strict=True))
        return tuple(learn(before, weights, changed, 2, 2, 1.0).values())

    leaves = [getattr(pairs, name) for name in names] + first + [state[name] for name in sorted(state)]
    assert torch.autograd.gradcheck(loss, [each.clone().requires_grad_() for each in leaves])


# --- what the gates do -----------------------------------------------------------------------------------------------


def online(rate_by_pair, log_keep=0.0, time=12):
    """A linear memory without momentum, chunk 1, from zero: the state, and the pairs it saw."""
    state, first = start(1, written=False)
    pairs = draw(time, log_momentum=NEVER, log_keep=log_keep)._replace(rate=rate_by_pair)
    return learn(state, [torch.zeros_like(first[0])], pairs, 1), pairs


@torch.no_grad()
def test_a_linear_memory_without_momentum_and_decay_is_the_delta_rule():
    rate = torch.rand(2, 2, 12, dtype=torch.float64)
    after, pairs = online(rate)
    rule = {"weights": torch.zeros(2, 2, 5, 5, dtype=torch.float64)}
    for t in range(12):
        rule = RULES["delta"].write(rule, pairs.key[:, :, t], pairs.value[:, :, t], rate=rate[:, :, t, None])
    torch.testing.assert_close(after["learned_1"], rule["weights"])
    # at a rate of 1 the last pair is known by heart
    after, pairs = online(torch.ones_like(rate))
    said = recall(after, [torch.zeros(2, 5, 5, dtype=torch.float64)], pairs.key[:, :, -1:])
    torch.testing.assert_close(said, pairs.value[:, :, -1:])


@torch.no_grad()
def test_with_decay_the_gradient_is_taken_before_forgetting():
    rate, keep = torch.rand(2, 2, 12, dtype=torch.float64), 0.8
    after, pairs = online(rate, log_keep=float(torch.tensor(keep, dtype=torch.float64).log()))
    matrix = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    for t in range(12):
        key, value = pairs.key[:, :, t, :, None], pairs.value[:, :, t, None, :]
        missed = value - key.mT @ matrix
        matrix = keep * matrix + rate[:, :, t, None, None] * key * missed
    torch.testing.assert_close(after["learned_1"], matrix)


@torch.no_grad()
def test_momentum_goes_on_after_the_surprise():
    state, first = start(2, written=False)
    eta = 0.6
    pairs = draw(5, log_momentum=float(torch.tensor(eta).log()), log_keep=0)
    pairs = pairs._replace(rate=pairs.rate * (torch.arange(5) == 0))
    once = learn(state, first, pairs.cut(0, 1), 1)
    after = learn(state, first, pairs, 5)
    for layer in (1, 2):
        push = once[f"momentum_{layer}"]
        torch.testing.assert_close(once[f"learned_{layer}"], push)
        torch.testing.assert_close(after[f"momentum_{layer}"], eta**4 * push)
        torch.testing.assert_close(after[f"learned_{layer}"], (1 - eta**5) / (1 - eta) * push)


@torch.no_grad()
def test_decay_leads_back_to_the_first_weights():
    state, first = start(2)
    state |= {name: torch.zeros_like(tensor) for name, tensor in state.items() if name.startswith("momentum")}
    pairs = draw(7, rate=0, log_keep=float(torch.tensor(0.9, dtype=torch.float64).log()))
    after = learn(state, first, pairs, 4)
    for layer in (1, 2):
        torch.testing.assert_close(after[f"learned_{layer}"], 0.9**7 * state[f"learned_{layer}"])
    gone = learn(state, first, draw(7, rate=0, log_keep=NEVER), 4)
    for weights, expected in zip(network(gone, first, torch.float64), first, strict=True):
        torch.testing.assert_close(weights, expected.expand_as(weights))


@torch.no_grad()
def test_a_window_is_over_the_last_tokens_of_the_segment():
    state, first = start(2, written=False)
    pairs = draw(6, share=1, log_momentum=NEVER, log_keep=0)
    # only the last token trains, on the losses of the last three; the chunk before it has none
    pairs = pairs._replace(rate=(torch.arange(6) == 5).double().expand(2, 2, 6))
    after = learn(state, first, pairs, chunk=5, window_tokens=3)
    alone = [
        learn(state, first, pairs.cut(i, i + 1)._replace(rate=torch.ones(2, 2, 1).double()), 1)["learned_1"]
        for i in range(6)
    ]
    torch.testing.assert_close(after["learned_1"], alone[3] + alone[4] + alone[5])
    assert_differ(learn(state, first, pairs, 5, 4)["learned_1"], after["learned_1"])


@torch.no_grad()
def test_it_remembers_more_than_a_linear_memory_of_the_same_keys():
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(1, 1, 24, 8, generator=generator, dtype=torch.float64), dim=-1)
    values = torch.randn(1, 1, 24, 8, generator=generator, dtype=torch.float64)
    missed = {}
    for layers in (1, 2):
        wide = {"expansion": 8} if layers > 1 else {}
        state, first = start(layers, rows=1, heads=1, size=8, written=False, **wide)
        first[-1] = torch.zeros_like(first[-1])
        pairs = draw(24, 1, 1, 8, rate=0.3, log_momentum=-1, log_keep=0)._replace(key=keys, value=values)
        for _ in range(100):
            state = learn(state, first, pairs, 1)
        missed[layers] = float((recall(state, first, keys) - values).square().mean())
    # 24 pairs are more than 8 dimensions can hold apart
    assert missed[1] > 0.3
    assert missed[2] < 0.05


# --- numbers ---------------------------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_low_precision_is_for_the_projections_only(form):
    memory, hidden = build(**form), torch.randn(2, 20, 32)
    state, plain = written(memory, hidden), memory.read(Site(0), hidden, written(memory, hidden))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after, read = memory.write(hidden, memory.init_state(2)), memory.read(Site(0), hidden, state)
    lowered = copy.deepcopy(memory).bfloat16()
    for found in (after, lowered.write(hidden.bfloat16(), lowered.init_state(2))):
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert (tensor - state[name]).norm() < 0.1 * state[name].norm()
    torch.testing.assert_close(read, plain, atol=0.1, rtol=0.1)
    # a share kept of 0.9997 is 1 in bfloat16
    slow = build(shaken=False).bfloat16()
    torch.nn.init.zeros_(slow.writer.forget.weight)
    pairs, _ = slow.writer(hidden.bfloat16(), None, None)
    torch.testing.assert_close(pairs.log_keep.exp(), torch.full((2, 2, 20), 0.99966))


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_long_streams_stay_finite_with_a_limit_to_gradients(layers):
    segments = torch.randn(100, 2, SEGMENT, 32)
    segments[:, 0] = segments[0, 0, 0]  # one token for ever
    states = {}
    for clip in (10.0, None):
        memory = build(layers=layers, clip=clip)
        torch.nn.init.constant_(memory.writer.rate.bias, 0.0)
        states[clip] = written(memory, *segments)
        read = memory.read(Site(0), segments[0], states[clip]) - segments[0]
        if clip is not None:
            assert bool(read.isfinite().all())
            assert 1e-3 < read.abs().max() < 100
    assert all(bool(tensor.isfinite().all()) for tensor in states[10.0].values())
    assert not all(bool(tensor.isfinite().all()) for tensor in states[None].values())


@torch.no_grad()
def test_the_gates_at_first():
    hidden = torch.randn(2, SEGMENT, 32)
    for settings, rate in (({}, 1 / 32), ({"chunk": 1}, 1 / 2), ({"chunk": 4, "rate_bias": -3.0}, 0.0474)):
        memory = build(shaken=False, **settings)
        for gate in (memory.writer.rate, memory.writer.momentum, memory.writer.forget):
            torch.nn.init.zeros_(gate.weight)
        pairs, _ = memory.writer(hidden, None, None)
        torch.testing.assert_close(pairs.rate, torch.full((2, 2, SEGMENT), rate), atol=1e-4, rtol=0)
        torch.testing.assert_close(pairs.log_momentum.exp(), torch.full((2, 2, SEGMENT), 0.5))
        assert pairs.log_keep.exp().min() > 0.999
    for length, chunk in ((2, 1), (8, 2), (64, 16), (512, 16)):
        assert TitansConfig.small(length, 64).chunk == chunk
    # a key that fills a chunk is about what it should be after it
    state, first = start(1, written=False)
    pairs = draw(16, rate=1 / 32, log_momentum=float(torch.tensor(0.5).log()), log_keep=0)
    pairs = pairs._replace(**{name: getattr(pairs, name)[:, :, :1].expand(-1, -1, 16, -1) for name in ("key", "value")})
    said = recall(learn(state, [0 * first[0]], pairs, 16), [0 * first[0]], pairs.key)
    share = (said / pairs.value).mean()
    assert 0.85 < share < 1.0


# --- the seam --------------------------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_a_new_memory_says_nothing_and_learned_first_weights_do(form):
    memory, hidden = build(**form, shaken=False), torch.randn(2, SEGMENT, 32)
    reader = memory.readers["0"]
    torch.nn.init.normal_(reader.output.weight)
    assert torch.equal(memory.read(Site(0), hidden, memory.init_state(2)), hidden)
    assert_differ(memory.read(Site(0), hidden, written(memory, hidden)), hidden)
    torch.nn.init.normal_(memory.first[-1])
    assert_differ(memory.read(Site(0), hidden, memory.init_state(2)), hidden)
    assert not memory.starts_empty
    torch.nn.init.zeros_(reader.output.weight)
    assert torch.equal(memory.read(Site(0), hidden, written(memory, hidden)), hidden)


@torch.no_grad()
def test_gate_and_layer():
    hidden = torch.randn(2, SEGMENT, 32)
    gated, plain = build(), build(context="layer")
    plain.load_state_dict(gated.state_dict(), strict=False)
    state = written(gated, hidden)
    torch.nn.init.zeros_(gated.readers["0"].gate.weight)
    torch.nn.init.constant_(gated.readers["0"].gate.bias, 50.0)
    torch.testing.assert_close(gated.read(Site(0), hidden, state), plain.read(Site(0), hidden, state))
    torch.nn.init.constant_(gated.readers["0"].gate.bias, 0.0)
    added = plain.read(Site(0), hidden, state) - hidden
    torch.testing.assert_close(gated.read(Site(0), hidden, state), hidden + added / 2, atol=1e-5, rtol=1e-4)
    torch.nn.init.constant_(gated.readers["0"].gate.bias, -200.0)
    assert torch.equal(gated.read(Site(0), hidden, state), hidden)


@every_form
def test_every_parameter_gets_a_gradient(form):
    memory, hidden = build(**form), torch.randn(2, SEGMENT, 32)
    state = written(memory, hidden, torch.randn(2, SEGMENT, 32))
    loss = memory.read(Site(0), hidden, state).square().sum()
    if memory.beside:
        loss = loss + memory.tokens_before(state).embeddings.square().sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in memory.parameters())


@torch.no_grad()
def test_a_token_asks_for_what_followed_it_before_anything_is_learned():
    torch.manual_seed(0)
    words = torch.randn(1, 8, 64)
    for layers in (1, 2):
        memory = build(width=64, dim=64, heads=1, shaken=False, layers=layers)
        reader = memory.readers["0"]
        state = written(memory, words)  # word 1 follows word 0, and so on
        query = F.normalize(reader.query(reader.norm(words[:, 0::2])), dim=-1)[:, None]
        value = memory.writer.value(memory.writer.norm(words))[0]
        found = F.normalize(recall(state, list(memory.first), query)[0, 0], dim=-1) @ F.normalize(value, dim=-1).T
        assert found.argmax(-1).tolist() == [1, 3, 5, 7]
    memory = build(shaken=False, shift=False)
    assert torch.equal(memory.readers["0"].query.weight, memory.writer.key.weight)


@every_form
@torch.no_grad()
def test_padding_leaves_no_trace(form):
    memory = build(**form)
    plain, state = torch.randn(1, 7, 32), written(memory, torch.randn(1, SEGMENT, 32))
    spread, keep = torch.randn(1, 11, 32), torch.zeros(1, 11, dtype=torch.bool)
    keep[0, [1, 2, 4, 6, 7, 8, 10]] = True
    spread[keep] = plain[0]
    torch.testing.assert_close(memory.write(spread, state, keep), memory.write(plain, state), atol=1e-5, rtol=1e-5)
    # and a segment of nothing else changes nothing
    nothing = memory.write(spread, state, torch.zeros_like(keep))
    assert all(torch.equal(nothing[name], state[name]) for name in state)


def test_placement():
    for depth, middle in ((1, 0), (2, 0), (3, 1), (12, 5)):
        memory = build(depth=depth)
        assert memory.reads == memory.writes == (Site(middle),)
        assert not memory.writes_see_reads
        assert build(depth=depth, context="tokens", read_layers=[]).writes == (Site(middle),)
    memory = build(depth=12, read_layers=[-1, 0], write_layer=-12)
    assert (memory.reads, memory.writes) == ((Site(0), Site(11)), (Site(0),))
    assert build(read_layers=[0], write_layer=1).writes_see_reads
    encoder = TitansConfig(read_layers=[0, 1], write_layer=1).build(64, 2, causal=False)
    assert encoder.reads_own_segment
    assert not encoder.writes_see_reads


def test_bytes_law():
    for layers, expansion, count in ((1, 4, 64), (2, 3, 2 * 3 * 64), (3, 2, 64 * (2 + 4 + 2))):
        for rows in (1, 4):
            wide = {"expansion": expansion} if layers > 1 else {}
            state = build(layers=layers, **wide).init_state(rows)
            assert nbytes(state) == rows * (8 * 2 * count + 16 * 4)
            assert not any(tensor.any() for tensor in state.values())
    assert nbytes(TitansConfig().build(64, 2).init_state(1)) == 513 * 1024
    sizes = [TitansConfig.small(SEGMENT, 64, size).build(64, 2).most_bytes(9) for size in (1, 2, 3, 32, 33)]
    assert sizes == sorted(set(sizes))
    assert TitansConfig.small(SEGMENT, 64).build(64, 2).most_bytes(9) == sizes[3]
    session = mnemic.Session(host("llama", CONFIGS["titans-0"]), window=SEGMENT)
    session.read(tokens(1, 10 * SEGMENT))
    assert session.nbytes == 8 * 2 * 2 * 8 * 16 + 16 * 4


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": "mac"}, "context is 'mac'; use 'gate' or 'layer' or 'tokens'"),
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"expansion": 0}, "expansion is 0; it must be at least 1"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"window_tokens": 0}, "window_tokens is 0; it must be at least 1"),
        ({"dim": 10}, "dim 10 is not divisible by 4 heads; set heads= to a divisor"),
        ({"clip": 0.0}, "clip is 0.0; a gradient's greatest length is above 0, or None for no limit"),
        ({"read_layers": []}, "read_layers is empty; name at least one block"),
        ({"context": "tokens", "queries": 0}, "queries is 0; it must be at least 1"),
        ({"context": "tokens", "persistent": -1}, "persistent is -1; use 0 for no persistent tokens, or more"),
        ({"persistent": 0}, "persistent is 0, but nothing here uses it; leave it out, or set context='tokens'"),
        (
            {"context": "layer", "queries": 3},
            "queries is 3, but nothing here uses it; leave it out, or set context='tokens'",
        ),
        ({"segment_length": 0}, "segment_length is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TitansConfig(**settings)


def test_layers_that_the_host_lacks_are_refused():
    with pytest.raises(ValueError, match="write_layer is 2, but the model has 2 blocks"):
        TitansConfig(write_layer=2).build(64, 2)


@every_form
def test_configs_go_to_plain_values_and_back(form):
    config = TitansConfig(**form)
    assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config
