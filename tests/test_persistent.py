"""What is M.1 to M.6's own: how each writes, forgets, reads and begins, and what spoils the study's form."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import mnemic
from families import make
from helpers import SEGMENT, assert_differ, assert_equals_naive, assert_near, shake, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.persistent import Method, PersistentConfig
from mnemic.memory import Site
from mnemic.state import nbytes

METHODS = get_args(Method)
every_method = pytest.mark.parametrize("method", METHODS)
by_tokens = pytest.mark.parametrize("method", ["prefix", "key-value", "hebbian", "slots"])

STUDY = {"keys": "content", "trained_write": False}
"""The study's own writes."""


OWN = {"hebbian": {"dim": 12}, "slots": {"top": 2}}
"""Settings that one method alone has."""


def configured(method, **settings):
    return PersistentConfig(
        **{"segment_length": SEGMENT, "method": method, "rows": 6, **OWN.get(method, {}), **settings}
    )


def build(method, width=16, depth=2, shaken=True, **settings):
    torch.manual_seed(0)
    memory = configured(method, **settings).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def written(memory, *segments, state=None):
    state = memory.init_state(len(segments[0])) if state is None else state
    for segment in segments:
        state = memory.write(segment, state)
    return state


def normed(hidden):
    return (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def effective_rank(matrix):
    """The exponential of the entropy of the singular values' shares."""
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return float((-shares * shares.clamp_min(1e-30).log()).sum().exp())


# --- writes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["rows", "content"])
@torch.no_grad()
def test_every_token_shares_its_value_among_the_rows(keys):
    memory = build("prefix", keys=keys)
    one, two = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    state = written(memory, one)
    after = memory.write(two, state)["rows"]
    writer, z = memory.writer, normed(two)
    chosen_by = writer.key if keys == "rows" else state["rows"] @ writer.key
    shares = torch.einsum("btd,de,bne->btn", z, writer.query, chosen_by.expand(2, 6, 16)).div(4).softmax(2)
    expected = 0.95 * state["rows"] + torch.einsum("btn,btd,de->bne", shares, z, writer.value)
    assert_near(after, expected, 1e-5)
    # whatever the rows are, together they get every value once
    assert_near(after.sum(1) - 0.95 * state["rows"].sum(1), (z @ writer.value).sum(1), 1e-5)


@torch.no_grad()
def test_hebbian_is_a_sum_of_outer_products_no_longer_than_one():
    memory = build("hebbian", decay=0.7)
    segments = [0.1 * torch.randn(2, length, 16) for length in (8, 5, 3)]
    for name in ("key", "value"):
        memory.writer.get_parameter(name).mul_(0.1)
    matrix = torch.zeros(2, 12, 12)
    for age, segment in zip((2, 1, 0), segments, strict=True):
        z = normed(segment)
        keys, values = z @ memory.writer.key, z @ memory.writer.value
        matrix += 0.7**age * torch.einsum("btk,btv->bkv", keys, values) / segment.shape[1]
    assert matrix.flatten(1).norm(dim=1).max() < 1
    assert_near(written(memory, *segments)["matrix"], matrix, 1e-6)
    memory.writer.key.mul_(1e3)
    state = written(memory, *segments)
    assert_near(state["matrix"].flatten(1).norm(dim=1), torch.ones(2), 1e-6)
    # the last segment outweighs the rest, so the direction is its own
    direction = torch.einsum("btk,btv->bkv", normed(segments[-1]) @ memory.writer.key, z @ memory.writer.value)
    assert F.cosine_similarity(state["matrix"].flatten(1), direction.flatten(1)).min() > 0.9


@pytest.mark.parametrize("keys", ["rows", "content"])
@torch.no_grad()
def test_slots_are_written_where_the_mean_token_points(keys):
    memory = build("slots", keys=keys, decay=0.6)
    state = written(memory, torch.randn(3, 5, 16))
    segment = torch.randn(3, 4, 16)
    after = memory.write(segment, state)["rows"]
    mean = normed(segment).mean(1)
    chosen_by = memory.writer.key if keys == "rows" else state["rows"] @ memory.writer.key
    logits = torch.einsum("bd,de,bne->bn", mean, memory.writer.query, chosen_by.expand(3, 6, 16))
    for row in range(3):
        best = set(logits[row].argsort(descending=True)[:2].tolist())
        for slot in range(6):
            if slot in best:
                expected = 0.6 * state["rows"][row, slot] + 0.4 * (mean[row] @ memory.writer.value)
                assert_near(after[row, slot], expected, 1e-5)
            else:
                assert torch.equal(after[row, slot], state["rows"][row, slot])


@pytest.mark.parametrize("method", ["prefix", "gated", "slots"])
def test_rows_that_choose_by_what_they_hold_are_their_equations(method):
    # the matrix has them untrained only: trained at random, what they choose hangs on the last digit
    memory = build(method, keys="content").double()
    state = {"rows": torch.randn(2, 6, 16, dtype=torch.float64)}
    hidden, keep = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True), torch.rand(2, 5) < 0.8
    found = assert_equals_naive(memory, Site(0), hidden, state, keep, 16)
    assert sum(each is not None for each in found) >= 4


@pytest.mark.parametrize("method", ["prefix", "hebbian"])
@torch.no_grad()
def test_what_was_written_is_left_to_the_power_of_the_segments_since(method):
    memory, decay = build(method, decay=0.8).double(), 0.8
    if method == "hebbian":
        memory.writer.key.mul_(1e-3)  # far below length one
    fact, other = torch.randn(2, 1, SEGMENT, 16, dtype=torch.float64)
    fillers = torch.randn(12, 1, SEGMENT, 16, dtype=torch.float64)
    told, untold = written(memory, fact), written(memory, other)
    first = told[memory.name] - untold[memory.name]
    for age, filler in enumerate(fillers, 1):
        told, untold = memory.write(filler, told), memory.write(filler, untold)
        left = (told[memory.name] - untold[memory.name]) / first.abs().max()
        assert_near(left, decay**age * first / first.abs().max(), 1e-5)


@torch.no_grad()
def test_a_slot_forgets_when_it_is_chosen_and_only_then():
    memory, decay = build("slots", decay=0.8), 0.8
    memory.writer.value.zero_()  # nothing new comes, so what is left is what was there
    first = {"rows": torch.randn(1, 6, 16)}
    state, times = first, torch.zeros(1, 6)
    for segment in torch.randn(15, 1, SEGMENT, 16):
        after = memory.write(segment, state)
        changed = (after["rows"] != state["rows"]).any(-1)
        assert changed.sum() == 2
        state, times = after, times + changed
    assert times.max() > times.min()
    assert_near(state["rows"], decay ** times[..., None] * first["rows"], 1e-5)


# --- what spoils the study's form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [16, 160])
@pytest.mark.parametrize("common", [0.0, 1.0])
@torch.no_grad()
def test_rows_without_keys_of_their_own_hold_one_vector(rows, common):
    # `common`: hidden states of a model have a part that is the same for all
    generator = torch.Generator().manual_seed(0)
    part = common * torch.randn(32, generator=generator)
    segments = torch.randn(100, 1, SEGMENT, 32, generator=generator) + part
    held = {}
    for name, settings in (("content", STUDY), ("rows", {"keys": "rows", "trained_write": False})):
        memory = build("prefix", width=32, shaken=False, rows=rows, **settings)
        held[name] = written(memory, *segments)["rows"][0]
    content, own = held["content"], held["rows"]
    alike = F.cosine_similarity(content[:, None], content[None], dim=-1)
    assert alike.mean() > 0.99
    assert effective_rank(content) < (1.05 if common else 1.5)
    # more rows are more copies: all of it together is the one vector that a single row would hold
    single = build("prefix", width=32, shaken=False, rows=1, **STUDY)
    single.writer.value.copy_(build("prefix", width=32, shaken=False, rows=rows, **STUDY).writer.value)
    one = written(single, *segments)["rows"][0]
    assert F.cosine_similarity(content.sum(0, keepdim=True), one).item() > 0.99
    assert effective_rank(own) > (2.5 if common else 10)


@torch.no_grad()
def test_slots_that_keys_choose_are_the_same_ones_where_tokens_have_much_in_common():
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(32, generator=generator)

    def share_of_two(common):
        memory = build("slots", width=32, shaken=False, rows=32, trained_write=False)
        state, times = memory.init_state(1), torch.zeros(32)
        for segment in torch.randn(60, 1, SEGMENT, 32, generator=generator) + common * part:
            after = memory.write(segment, state)
            state, times = after, times + (after["rows"] != state["rows"]).any(-1)[0]
        return float(times.sort(descending=True).values[:4].sum() / times.sum())

    assert share_of_two(0.0) < 0.4
    assert share_of_two(3.0) > 0.9


@pytest.mark.parametrize("method", ["hebbian", "slots"])
@torch.no_grad()
def test_without_a_mask_short_segments_are_thinned_by_padding(method):
    segment, keep = torch.randn(1, SEGMENT, 16), torch.arange(SEGMENT)[None] < 5
    masked, plain = build(method), build(method, write_mask=False)
    plain.load_state_dict(masked.state_dict())
    for memory in (masked, plain):
        if method == "hebbian":
            memory.writer.key.mul_(1e-2)
    (held,), (thin,) = (each.write(segment, each.init_state(1), keep).values() for each in (masked, plain))
    assert_near(thin, 5 / SEGMENT * held, 1e-6)
    assert torch.equal(plain.write(segment[:, :5], plain.init_state(1))[plain.name], thin)
    (held,), (thin,) = (each.write(segment, each.init_state(1)).values() for each in (masked, plain))
    assert torch.equal(thin, held)


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("prefix", 768**2),
        ("cross-attention", 4 * 768**2 + 12),
        ("key-value", 768**2),
        ("hebbian", 2 * 768 * 256 + 64 * 768),  # the last are what asks, which is ours
        ("gated", 5 * 768**2 + 768),
        ("slots", 768**2),
    ],
)
def test_the_sizes_that_the_study_gives(method, expected):
    settings = {"trained_write": False} if method == "hebbian" else STUDY
    memory = PersistentConfig(method=method, **settings).build(768, 12)
    assert sum(p.numel() for p in memory.parameters()) == expected
    assert nbytes(memory.init_state(2)) == 2 * 4 * (256 * 256 if method == "hebbian" else 64 * 768)
    assert not list(memory.writer.parameters())


@every_method
def test_gradients_pass_through_trained_writes_only(method):
    for trained in (True, False):
        memory = build(method, trained_write=trained)
        segments = [torch.randn(2, SEGMENT, 16, requires_grad=True) for _ in range(3)]
        held = written(memory, *segments)[memory.name]
        assert held.requires_grad == trained
        assert memory.gradient_reach == (None if trained else 0)
        if trained:
            found = torch.autograd.grad(held.square().sum(), [*segments, *memory.writer.parameters()])
            assert all(each.abs().sum() > 0 for each in found)
        else:
            assert not list(memory.writer.parameters())
            assert {"writer.key", "writer.value"} < {*memory.state_dict()}


@every_method
def test_not_everything_is_zero_at_first(method):
    # what is read starts at zero; its product with another zero would have no gradient ever
    memory = build(method, shaken=False)
    state = written(memory, torch.randn(2, SEGMENT, 16))
    if memory.behind:
        hidden = torch.randn(2, SEGMENT, 16)
        output = memory.read(Site(0), hidden, state)
        assert torch.equal(output, hidden)
        zeros = [memory.beta] if method == "cross-attention" else [memory.value]
    else:
        output = memory.tokens_before(state).embeddings
        assert not output.any()
        zeros = [memory.project]
    found = torch.autograd.grad((output * torch.randn_like(output)).sum(), zeros)
    assert all(each.abs().max() > 0 for each in found)


# --- reads -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cross_attention_behind_every_block():
    memory = build("cross-attention", depth=3)
    state, hidden = written(memory, torch.randn(2, SEGMENT, 16)), torch.randn(2, 5, 16)
    rows = normed(state["rows"])
    read = F.scaled_dot_product_attention(normed(hidden) @ memory.query, rows @ memory.key, rows @ memory.value)
    assert memory.reads == (Site(0), Site(1), Site(2))
    for layer in range(3):
        assert_near(memory.read(Site(layer), hidden, state), hidden + memory.beta[layer] * (read @ memory.output), 1e-5)
    memory.beta[1] = 0
    assert torch.equal(memory.read(Site(1), hidden, state), hidden)


@torch.no_grad()
def test_a_gate_for_every_number():
    memory = build("gated")
    state, hidden = written(memory, torch.randn(2, SEGMENT, 16)), torch.randn(2, 5, 16)
    rows, z = normed(state["rows"]), normed(hidden)
    read = F.scaled_dot_product_attention(z @ memory.query, rows @ memory.key, rows @ memory.value)
    gate = torch.sigmoid(z @ memory.gate[:16] + read @ memory.gate[16:] + memory.gate_bias)
    assert_near(memory.read(Site(0), hidden, state), hidden + gate * read, 1e-5)
    memory.gate_bias.fill_(-1e4)
    assert torch.equal(memory.read(Site(0), hidden, state), hidden)
    fresh = build("gated", shaken=False)
    assert torch.equal(fresh.gate_bias, torch.full((16,), -2.0))


@torch.no_grad()
def test_an_empty_memory_is_not_there():
    for method in ("slots", "hebbian"):
        memory = build(method)
        state = memory.init_state(2)
        assert memory.tokens_before(state) is None
        state = memory.write(torch.randn(2, SEGMENT, 16), state)
        assert memory.tokens_before(state).keep.all()
        state[memory.name][1] = 0
        assert memory.tokens_before(state).keep.tolist() == [[True] * 6, [False] * 6]
    # rows that choose by what they hold begin with noise, the same for every stream
    content = build("slots", keys="content")
    state = content.init_state(2)
    assert torch.equal(state["rows"][0], state["rows"][1])
    assert 0.01 < state["rows"].std() < 0.03
    assert content.tokens_before(state).keep.all()
    again = build("slots", keys="content")
    again.first.zero_()
    again.load_state_dict(content.state_dict())
    assert torch.equal(again.init_state(2)["rows"], state["rows"])


def streamed(model, one, two):
    """Logits of two segments, and the memory between them."""
    cache = mnemic.memory_cache(model, SEGMENT)
    first = model(one, **{CACHE: cache}).logits
    return first, cache.memory.stream.state, model(two, **{CACHE: cache}).logits


@by_tokens
@torch.no_grad()
def test_the_base_attends_to_the_memory_with_its_own_projections(method):
    model = make("gpt2")
    torch.manual_seed(0)
    attachment = mnemic.attach(model, configured(method, **({"top": 6} if method == "slots" else {})))
    shake(attachment.memory)
    memory, (one, two) = attachment.memory, (tokens(2, SEGMENT, seed) for seed in (0, 1))
    first, state, logits = streamed(model, one, two)
    attachment.detach()
    assert torch.equal(first, model(one).logits)
    given = memory.tokens_before(state)
    assert given.keep.all()
    if method == "prefix":
        assert not given.inputs
        assert_near(given.embeddings, state["rows"] @ memory.project, 1e-6)
        words = torch.cat([given.embeddings, model.transformer.wte(two)], 1)
        expected = model(inputs_embeds=words).logits[:, 6:]
    else:
        held = state["matrix"] if method == "hebbian" else state["rows"]
        asked = memory.asking @ memory.query @ held if method == "hebbian" else held
        # M.3 as it is defined: keys and values in front of the base's own, here in its cache
        cache = DynamicCache()
        for layer, block in enumerate(model.transformer.h):
            _, key, value = block.attn.c_attn(block.ln_1(asked @ memory.project)).split(64, 2)
            key, value = (each.unflatten(2, (4, -1)).transpose(1, 2) for each in (key, value))
            cache.update(key, value, layer)
        expected = model(two, **{CACHE: cache}).logits
    assert_near(logits, expected, 1e-4)
    assert_differ(logits, model(two).logits, 1e-2)


@pytest.mark.parametrize("method", ["cross-attention", "gated"])
@torch.no_grad()
def test_an_encoder_can_read_behind_its_blocks(method):
    model, ids = make("bert"), tokens(1, SEGMENT)
    expected = model(ids).logits
    attachment = mnemic.attach(model, configured(method))
    assert torch.equal(model(ids).logits, expected)
    shake(attachment.memory)
    assert_differ(model(ids).logits, expected)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "suffix"}, "method is 'suffix'; use 'prefix' or"),
        ({"keys": "none"}, "keys is 'none'; use 'rows' or 'content'"),
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"method": "hebbian", "dim": 0}, "dim is 0"),
        ({"method": "slots", "top": 0}, "top is 0"),
        ({"decay": 0.0}, r"decay is 0\.0"),
        ({"decay": 1.5}, r"decay is 1\.5"),
        ({"method": "slots", "rows": 4}, "top is 8, but there are 4 slots; set top to at most that"),
        ({"method": "slots", "decay": 1.0}, "decay is 1, and 1 - decay of a slot is written"),
        (
            {"method": "hebbian", "keys": "content"},
            "keys is 'content', but nothing here uses it; leave it out, or use a method that writes rows",
        ),
        (
            {"method": "gated", "write_mask": False},
            "write_mask is False, but nothing here uses it; leave it out, or use a method that writes means",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PersistentConfig(**settings)


@by_tokens
def test_encoders_are_refused_where_tokens_stand_before_the_text(method):
    with pytest.raises(ValueError, match="attach it to a causal model, or use 'cross-attention' or 'gated'"):
        mnemic.attach(make("bert"), configured(method))


@every_method
def test_small_takes_a_size(method):
    for size in (1, 5, 40):
        own = {"hebbian": {"dim": size}, "slots": {"top": 1}}.get(method, {})
        memory = PersistentConfig.small(32, 64, size).replace(method=method, **own).build(64, 2)
        expected = size * size if method == "hebbian" else size * 64
        assert nbytes(memory.init_state(1)) == 4 * expected
