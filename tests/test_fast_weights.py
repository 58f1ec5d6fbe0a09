"""What is fast weights' own: chunks against the loop over tokens, what each rule keeps, what is asked."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import mnemic
from capacity import answers
from families import make
from helpers import CONFIGS, SEGMENT, assert_differ, assert_equals_naive, host, shake, tokens
from mnemic.memories.fast_weights import (
    EPSILON,
    FEATURES,
    FastWeightsConfig,
    read_pairs,
    shifted,
    write_pairs,
)
from mnemic.memories.rules import RULES
from mnemic.memory import Site
from mnemic.state import nbytes
from mnemic.tasks.capacity import Capacity

RULE = {
    "sum": RULES["sum"],
    "decay": RULES["decay"],
    "delta": RULES["delta"],
    "gated delta": RULES["delta"],
    "infini": RULES["infini"],
    "infini delta": RULES["infini-delta"],
}
"""The rule of `rules.py` that each of ours is, token by token."""

FORMS = [
    {"rule": "sum"},
    {"rule": "sum", "shift": False},
    {"rule": "decay", "decay": 0.9},
    {"rule": "delta"},
    {"rule": "gated delta", "forget_bias": 1.0},
    {"rule": "infini"},
    {"rule": "infini", "features": "elu1"},
    {"rule": "infini delta"},
    {"rule": "infini delta", "features": "elu1"},
    {"rule": "infini delta", "features": "elu1", "correct": "segment", "shift": False},
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())))
every_rule = pytest.mark.parametrize("rule", RULE)


def build(width=32, depth=2, dim=16, heads=2, shaken=True, **settings):
    memory = FastWeightsConfig(segment_length=SEGMENT, dim=dim, heads=heads, **settings).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def written(memory, *segments, state=None):
    """The state after segments `[b, t, d]`."""
    state = memory.init_state(len(segments[0])) if state is None else state
    for segment in segments:
        state = memory.write(segment, state)
    return state


# --- chunks are the loop ---------------------------------------------------------------------------------------------


def drawn(rule, time, dtype, rows=2, heads=3, width=5, values=4):
    """Raw keys, values, rates, logarithms of what is kept, a state that is not empty, and which tokens are real."""
    key = torch.randn(rows, heads, time, width, dtype=dtype)
    if rule not in ("infini", "infini delta"):
        key = F.normalize(key, dim=-1)
    value = torch.randn(rows, heads, time, values, dtype=dtype)
    rate = None if rule.startswith("infini") else torch.rand(rows, heads, time, dtype=dtype)
    log_keep = None
    if rule == "decay":
        log_keep = torch.full((rows, heads, time), RULES["decay"].keep, dtype=dtype).log()
    if rule == "gated delta":
        log_keep = F.logsigmoid(torch.randn(rows, heads, time, dtype=dtype) + 2)
    state = {"matrix": torch.randn(rows, heads, width, values, dtype=dtype)}
    if rule.startswith("infini"):
        state["normaliser"] = 5 * torch.rand(rows, heads, width, dtype=dtype)
    return key, value, rate, log_keep, state, torch.rand(rows, time) < 0.7


def by_token(rule, key, value, rate, log_keep, state, keep):
    """`rules.py`, pair after pair; rows where a token is padding stay as they are."""
    state = {"weights" if name == "matrix" else name: tensor for name, tensor in state.items()}
    for t in range(key.shape[2]):
        more = {} if rate is None else {"rate": rate[:, :, t, None]}
        if log_keep is not None:
            more["keep"] = log_keep[:, :, t, None].exp()
        after = RULE[rule].write(state, key[:, :, t], value[:, :, t], **more)
        for name, tensor in after.items():
            real = keep[:, t].view(-1, *[1] * (tensor.ndim - 1))
            after[name] = torch.where(real, tensor, state[name])
        state = after
    return {"matrix" if name == "weights" else name: tensor for name, tensor in state.items()}


def by_chunk(rule, key, value, rate, log_keep, state, keep, **settings):
    feature = RULE[rule].features(key) * keep[:, None, :, None]
    log_keep = None if log_keep is None else log_keep * keep[:, None]
    return write_pairs(state, feature, value, rate, log_keep, delta=rule.endswith("delta"), **settings)


@every_rule
@pytest.mark.parametrize("time", [1, 2, 17, 63, 64, 65, 70])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_equal_the_loop_over_tokens(rule, time, padded):
    *given, state, keep = drawn(rule, time, torch.float64)
    keep = keep if padded else torch.ones_like(keep)
    results = []
    for way in (by_chunk, by_token):
        leaves = [None if each is None else each.clone().requires_grad_() for each in given]
        begun = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
        after = way(rule, *leaves, begun, keep)
        weights = torch.Generator().manual_seed(1)
        loss = sum((after[name] * torch.randn(after[name].shape, generator=weights)).sum() for name in sorted(after))
        wanted = [each for each in [*leaves, *begun.values()] if each is not None]
        # a state without a share kept passes on; keys of a normaliser that nothing divides by have a gradient too
        results.append((after, torch.autograd.grad(loss, wanted)))
    (after, gradients), (expected, expected_gradients) = results
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], atol=1e-10, rtol=1e-10)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-9)
    if padded and time > 2:
        everything = by_chunk(rule, *given, state, torch.ones_like(keep))
        assert_differ(after["matrix"], everything["matrix"])


@every_rule
def test_chunks_equal_the_loop_in_single_precision(rule):
    *given, state, keep = drawn(rule, 70, torch.float32)
    after, expected = by_chunk(rule, *given, state, keep), by_token(rule, *given, state, keep)
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], atol=1e-5, rtol=1e-5)


@every_rule
def test_the_length_of_chunks_changes_nothing(rule):
    *given, state, keep = drawn(rule, 70, torch.float64)
    expected = by_chunk(rule, *given, state, keep)
    for chunk in (1, 16, 70):
        for name, tensor in by_chunk(rule, *given, state, keep, chunk=chunk).items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-10, rtol=1e-10)


@every_rule
def test_reads_are_those_of_the_rule(rule):
    key, *_, state, _ = drawn(rule, 6, torch.float64)
    named = {"weights" if name == "matrix" else name: tensor[:, :, None] for name, tensor in state.items()}
    torch.testing.assert_close(read_pairs(state, RULE[rule].features(key)), RULE[rule].read(named, key))


@every_form
@pytest.mark.parametrize("time", [1, 5, 70])
def test_the_module_is_its_equations(form, time):
    memory = build(**form).double()
    hidden, keep = torch.randn(2, time, 32, dtype=torch.float64, requires_grad=True), torch.rand(2, time) < 0.7
    state = written(memory, torch.randn(2, 9, 32, dtype=torch.float64))
    state = {name: tensor.detach().double() for name, tensor in state.items()}
    assert_equals_naive(memory, Site(0), hidden, state, keep, 32)


# --- what the rules do -----------------------------------------------------------------------------------------------


def test_delta_overwrites_and_sum_adds():
    key = F.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(-1, -1, 2, -1)
    value, empty = torch.randn(1, 1, 2, 8), {"matrix": torch.zeros(1, 1, 8, 8)}
    last, both = value[:, :, 1:], value.sum(2, keepdim=True)
    for delta, expected in ((True, last), (False, both)):
        state = write_pairs(empty, key, value, delta=delta)
        torch.testing.assert_close(read_pairs(state, key[:, :, :1]), expected)


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("pairs", [8, 64])
@every_rule
def test_capacity_is_that_of_the_rule(rule, pairs, rewrites):
    drawn_writes = Capacity(pairs, rewrites).examples(20, "test")
    keys, values = drawn_writes.pairs()
    state = {name: tensor[:, None] for name, tensor in RULE[rule].init_state(20, 32, 32).items()}
    state["matrix"] = state.pop("weights")
    log_keep = torch.full(keys.shape[:-1], RULE[rule].keep)[:, None].log() if rule == "decay" else None
    feature = RULE[rule].features
    state = write_pairs(state, feature(keys)[:, None], values[:, None], None, log_keep, delta=rule.endswith("delta"))
    said = drawn_writes.decode(read_pairs(state, feature(drawn_writes.keys)[:, None])[:, 0])
    expected = answers(RULE[rule], drawn_writes)
    # two entries of the codebook may be as near but for rounding
    assert (said == expected)[drawn_writes.asked].double().mean() > 0.995
    if rule == "delta":
        assert drawn_writes.right(said).double().mean() > {8: 0.97, 64: 0.35}[pairs]


def silent(memory):
    """The memory with rates of 0: it writes nothing."""
    torch.nn.init.zeros_(memory.writer.rate.weight)
    torch.nn.init.constant_(memory.writer.rate.bias, -1e9)
    return memory


@torch.no_grad()
def test_decay_keeps_a_share_with_every_token():
    for rule, kept in (("decay", 0.9), ("sum", 1.0), ("delta", 1.0)):
        memory = silent(build(rule=rule, **({"decay": kept} if rule == "decay" else {})))
        state = {"matrix": torch.randn(2, 2, 8, 8)}
        keep = torch.arange(SEGMENT) < torch.tensor([[3], [SEGMENT]])
        after = memory.write(torch.randn(2, SEGMENT, 32), state, keep)
        for row, count in enumerate((3, SEGMENT)):
            torch.testing.assert_close(after["matrix"][row], kept**count * state["matrix"][row])


@torch.no_grad()
def test_the_forget_gate_is_open_at_first_and_empties_when_shut():
    hidden = torch.randn(2, SEGMENT, 32)
    (*_, log_keep), _ = build(rule="gated delta", shaken=False).writer(hidden, None, None)
    assert log_keep.shape == (2, 2, SEGMENT)
    assert log_keep.exp().min() > 0.99
    assert_differ(log_keep[:, 0], log_keep[:, 1], 1e-6)
    # shut, it leaves the last pair alone, which nothing is corrected by
    shut = build(rule="gated delta", forget_bias=-1e4)
    (key, value, rate, _), _ = shut.writer(hidden, None, None)
    last = rate[..., -1, None, None] * key[..., -1, :, None] * value[..., -1, None, :]
    after = shut.write(hidden, {"matrix": torch.randn(2, 2, 8, 8)})
    torch.testing.assert_close(after["matrix"], last)


def test_gated_delta_without_forgetting_is_delta():
    state = {"matrix": torch.randn(2, 2, 8, 8)}
    hidden = torch.randn(2, 70, 32)
    gated, plain = build(rule="gated delta", forget_bias=1e4), build(rule="delta")
    plain.load_state_dict(gated.state_dict(), strict=False)
    torch.testing.assert_close(gated.write(hidden, state), plain.write(hidden, state))


def test_infini_attention_as_its_paper_has_it():
    config = FastWeightsConfig.infini_attention(segment_length=SEGMENT, dim=16, heads=2)
    assert (config.rule, config.features, config.shift, config.correct) == ("infini delta", "elu1", False, "segment")
    memory = config.build(32, 2).double()
    shake(memory)
    hidden = torch.randn(2, SEGMENT, 32, dtype=torch.float64)
    state = {"matrix": torch.randn(2, 2, 8, 8).double(), "normaliser": torch.rand(2, 2, 8).double() + 1}
    normed = memory.writer.norm(hidden)
    key = FEATURES["elu1"](memory.writer.key(normed).unflatten(-1, (2, 8))).transpose(1, 2)
    value = memory.writer.value(normed).unflatten(-1, (2, 8)).transpose(1, 2)
    there = key @ state["matrix"] / (key @ state["normaliser"][..., None] + EPSILON)
    after = memory.write(hidden, state)
    torch.testing.assert_close(after["matrix"].double(), state["matrix"] + key.mT @ (value - there), atol=1e-5, rtol=0)
    torch.testing.assert_close(after["normaliser"].double(), state["normaliser"] + key.sum(2), atol=1e-5, rtol=0)
    # with one token a segment both ways are one, with more they are not
    by_token_ = config.replace(correct="token").build(32, 2).double()
    by_token_.load_state_dict(memory.state_dict())
    parts = hidden.split(1, 1)
    one = written(memory, *parts, state=state)
    torch.testing.assert_close(one, by_token_.write(hidden, state), atol=1e-4, rtol=0)
    assert_differ(one["matrix"], after["matrix"])


@every_form
@torch.no_grad()
def test_low_precision_is_for_the_projections_only(form):
    memory, hidden = build(**form), torch.randn(2, 70, 32)
    state, plain = written(memory, hidden), memory.read(Site(0), hidden, written(memory, hidden))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after, read = memory.write(hidden, memory.init_state(2)), memory.read(Site(0), hidden, state)
    lowered = copy.deepcopy(memory).bfloat16()
    for found in (after, lowered.write(hidden.bfloat16(), lowered.init_state(2))):
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert (tensor - state[name]).norm() < 0.05 * state[name].norm()
    torch.testing.assert_close(read, plain, atol=0.1, rtol=0.1)
    # a share kept of 0.999 is 1 in bfloat16
    slow = build(rule="decay", decay=0.999).bfloat16()
    torch.testing.assert_close(slow.writer(hidden.bfloat16(), None, None)[0][-1].exp(), torch.full((2, 2, 70), 0.999))


@every_form
@torch.no_grad()
def test_long_streams_stay_finite(form):
    memory = build(**form)
    segments = torch.randn(300, 2, SEGMENT, 32)
    segments[:, 0] = segments[0, 0]  # the same again and again
    state = written(memory, *segments)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    read = memory.read(Site(0), segments[0], state) - segments[0]
    assert bool(read.isfinite().all())
    assert 1e-3 < read.abs().max() < 100


# --- the seam --------------------------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_an_empty_memory_adds_nothing(form):
    memory, hidden = build(**form), torch.randn(2, SEGMENT, 32)
    assert torch.equal(memory.read(Site(0), hidden, memory.init_state(2)), hidden)
    assert_differ(memory.read(Site(0), hidden, written(memory, hidden)), hidden)


@every_form
def test_every_parameter_gets_a_gradient(form):
    memory, hidden = build(**form), torch.randn(2, SEGMENT, 32)
    state = written(memory, hidden, torch.randn(2, SEGMENT, 32))
    memory.read(Site(0), hidden, state).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in memory.parameters())


@torch.no_grad()
def test_a_token_asks_for_what_followed_it_before_anything_is_learned():
    words = torch.randn(1, 8, 64)
    memory = build(width=64, dim=64, heads=1, shaken=False)
    reader = memory.readers["0"]
    state = written(memory, words)  # word 1 follows word 0, and so on
    query = F.normalize(reader.query(reader.norm(words[:, 0::2])), dim=-1)[:, None]
    value = memory.writer.value(memory.writer.norm(words))[0]
    found = F.normalize(read_pairs(state, query)[0, 0], dim=-1) @ F.normalize(value, dim=-1).T
    assert found.argmax(-1).tolist() == [1, 3, 5, 7]
    # without the shift, for itself
    memory = build(width=64, dim=64, heads=1, shaken=False, shift=False)
    assert torch.equal(memory.readers["0"].query.weight, memory.writer.key.weight)


def test_the_token_before_is_the_last_real_one():
    hidden = torch.arange(1.0, 13).reshape(2, 6, 1)
    assert shifted(hidden, None)[..., 0].tolist() == [[0, 1, 2, 3, 4, 5], [0, 7, 8, 9, 10, 11]]
    keep = torch.tensor([[False, True, False, False, True, True], [True] * 6])
    assert shifted(hidden, keep)[..., 0].tolist() == [[0, 0, 2, 2, 2, 5], [0, 7, 8, 9, 10, 11]]


@every_form
@torch.no_grad()
def test_padding_leaves_no_trace(form):
    memory = build(**form)
    plain, state = torch.randn(1, 5, 32), written(memory, torch.randn(1, SEGMENT, 32))
    spread, keep = torch.randn(1, SEGMENT, 32), torch.zeros(1, SEGMENT, dtype=torch.bool)
    keep[0, [1, 2, 4, 6, 7]] = True
    spread[keep] = plain[0]
    torch.testing.assert_close(memory.write(spread, state, keep), memory.write(plain, state), atol=1e-5, rtol=1e-5)
    # and a segment of nothing else changes nothing
    nothing = memory.write(spread, state, torch.zeros_like(keep))
    assert all(torch.equal(nothing[name], state[name]) for name in state)


def test_placement():
    for depth, middle in ((1, 0), (2, 0), (3, 1), (12, 5)):
        memory = FastWeightsConfig().build(64, depth)
        assert memory.reads == memory.writes == (Site(middle),)
        assert not memory.writes_see_reads
        assert memory.starts_empty
    memory = FastWeightsConfig(read_layers=[-1, 0], write_layer=-12).build(64, 12)
    assert (memory.reads, memory.writes) == ((Site(0), Site(11)), (Site(0),))
    assert FastWeightsConfig(read_layers=[0], write_layer=1).build(64, 2).writes_see_reads
    memory = FastWeightsConfig(read_layers=[0], write_layer="embeddings").build(64, 2)
    assert (memory.reads, memory.writes, memory.writes_see_reads) == ((Site(0),), (Site(0, "input"),), False)
    encoder = FastWeightsConfig(read_layers=[0, 1], write_layer=1).build(64, 2, causal=False)
    assert encoder.reads_own_segment
    assert not encoder.starts_empty
    assert not encoder.writes_see_reads


def test_embeddings_are_written_as_they_are_and_blocks_with_what_stands_before():
    ids = tokens(1, SEGMENT)
    for layer, mixed in (("embeddings", False), (0, True)):
        config = FastWeightsConfig(segment_length=SEGMENT, dim=16, heads=2, rule="sum", shift=False, write_layer=layer)
        session = mnemic.Session(host("llama", config), window=SEGMENT)
        states = []
        for order in (ids, ids.flip(1)):
            session.reset()
            session.read(order)
            states.append(session.stream.state["matrix"])
        assert states[0].abs().max() > 0
        assert torch.allclose(*states, atol=1e-5) != mixed


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_what_enters_the_first_block_can_be_watched(name):
    model, ids = make(name), tokens(2, SEGMENT)
    config = CONFIGS["fast-weights-0"].replace(write_layer="embeddings", read_layers=[0])
    anatomy = mnemic.attach(model, config).anatomy
    wanted = {}
    with anatomy.blocks[0].register_forward_pre_hook(lambda block, args: wanted.update(entered=args[0])):
        model(ids)
    seen = mnemic.attached(model).router.watch(anatomy, ids, [Site(0, "input"), Site(0)])
    assert torch.equal(seen[Site(0, "input")], wanted["entered"])
    assert_differ(seen[Site(0)], seen[Site(0, "input")])


def test_bytes_law():
    for heads, dim in ((1, 12), (3, 12)):
        for rows in (1, 4):
            plain = build(heads=heads, dim=dim).init_state(rows)
            assert nbytes(plain) == rows * (heads * (dim // heads) ** 2 + dim) * 4
            assert nbytes(build(heads=heads, dim=dim, shift=False).init_state(rows)) == nbytes(plain) - rows * dim * 4
            normalised = build(heads=heads, dim=dim, rule="infini", features="elu1").init_state(rows)
            assert nbytes(normalised) == nbytes(plain) + rows * dim * 4
    assert nbytes(FastWeightsConfig().build(64, 2).init_state(1)) == 65 * 1024
    sizes = [FastWeightsConfig.small(SEGMENT, 64, size).build(64, 2).most_bytes(9) for size in (1, 2, 3, 32, 33)]
    assert sizes == sorted(set(sizes))
    assert FastWeightsConfig.small(SEGMENT, 64).build(64, 2).most_bytes(9) == sizes[3]
    session = mnemic.Session(host("llama", CONFIGS["fast-weights-0"]), window=SEGMENT)
    session.read(tokens(1, 10 * SEGMENT))
    assert session.nbytes == 2 * 8 * 8 * 4 + 16 * 4


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "hebb"}, "rule is 'hebb'; use 'sum' or 'decay' or 'delta'"),
        ({"features": "relu"}, "features is 'relu'; use 'l2' or 'elu1'"),
        ({"correct": "never"}, "correct is 'never'; use 'token' or 'segment'"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"dim": 10}, "dim 10 is not divisible by 4 heads; set heads= to a divisor"),
        ({"rule": "decay", "decay": 1.0}, r"decay is 1.0; the share that a token keeps lies in \(0, 1\)"),
        ({"features": "elu1"}, "features 'elu1' need Infini-attention's normaliser, which rule 'delta' lacks"),
        ({"correct": "segment"}, "correct='segment' is stable with rule='infini delta' and features='elu1' only"),
        ({"write_layer": "head"}, "write_layer is 'head'; use int or 'embeddings' or None"),
        ({"read_layers": []}, "read_layers is empty; name at least one block"),
        ({"segment_length": 0}, "segment_length is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FastWeightsConfig(**settings)


def test_layers_that_the_host_lacks_are_refused():
    with pytest.raises(ValueError, match="write_layer is 2, but the model has 2 blocks"):
        FastWeightsConfig(write_layer=2).build(64, 2)


@every_form
def test_configs_go_to_plain_values_and_back(form):
    config = FastWeightsConfig(**form)
    assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config
