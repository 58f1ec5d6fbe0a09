"""What is ARMT's own: the correction, segments written at once, the place of reads and writes, memory tokens."""

from __future__ import annotations

import copy

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_differ, assert_equals_naive, assert_near, feed, shake, tokens
from mnemic.memories.armt import ARMTConfig, look_up, new_share
from mnemic.memories.rules import RULES, dpfp3
from mnemic.memory import Site
from mnemic.state import nbytes
from mnemic.tasks.capacity import Capacity

FORMS = [{}, {"correct": False}, {"norm": False}, {"tokens": 1, "dim": 5}]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form)) or "default")
both = pytest.mark.parametrize("correct", [True, False])


def build(width=16, depth=2, shaken=True, **settings):
    torch.manual_seed(0)
    memory = ARMTConfig(segment_length=SEGMENT, **{"tokens": 3, "dim": 8, **settings}).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def behind(memory, rows=2, seed=0):
    """What the blocks make of the memory tokens of one segment."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, memory.config.tokens, memory.width * memory.depth, generator=source)


def written(memory, *segments):
    """The state after segments `[b, n, l * d]`."""
    state = memory.init_state(len(segments[0]))
    for segment in segments:
        state = memory.write(segment, state)
    return state


def bare(size=32, correct=True):
    """A memory of one block without trained parts: a token is `[key; value]`, a value is found where it stood."""
    memory = build(2 * size, 1, tokens=1, dim=size, norm=False, correct=correct, shaken=False)
    block, eye = memory.block(0), torch.eye(size)
    with torch.no_grad():
        for linear in (block.query, block.key):
            linear.weight.copy_(torch.cat([eye, torch.zeros(size, size)], 1))
        block.value.weight.copy_(torch.block_diag(torch.zeros(size, size), eye))
        block.rate.weight.zero_()
        block.rate.bias.fill_(100.0)  # a rate of 1
    return memory


def pair(key, value):
    """Keys and values `[b, d]` as the one memory token of a segment."""
    return torch.cat([key, value], -1)[:, None]


def answers(memory, state, keys):
    """What is read under keys `[b, t, d]`."""
    asked = torch.cat([keys, torch.zeros_like(keys)], -1)
    return (memory.read(Site(0, "input"), asked, state) - asked)[..., keys.shape[-1] :]


# --- the rule --------------------------------------------------------------------------------------------------------


@both
@torch.no_grad()
def test_a_token_a_segment_is_the_rule_that_the_probe_runs(correct):
    memory, rule = bare(8, correct), RULES["armt" if correct else "armt-uncorrected"]
    keys, values = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).unbind()
    keys[:, 6:] = keys[:, :6]
    state, expected = memory.init_state(3), rule.init_state(3, 8, 8)
    for t in range(12):
        state = memory.write(pair(keys[:, t], values[:, t]), state)
        expected = rule.write(expected, keys[:, t], values[:, t])
        torch.testing.assert_close(state["matrix_0"][..., 8:], expected["weights"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state["normaliser_0"], expected["normaliser"])
        said = answers(memory, state, keys[:, t : t + 1])[:, 0]
        torch.testing.assert_close(said, rule.read(expected, keys[:, t]), atol=1e-4, rtol=1e-4)
    assert not state["matrix_0"][..., :8].any()


@torch.no_grad()
def test_capacity_where_keys_are_rewritten():
    # the probe's own figures for 32 pairs written four times on average: 97 % with the correction, 44 % without
    writes = Capacity(32, rewrites=True).examples(32, "test", 0)
    keys, values = writes.pairs()
    right = {}
    for correct in (True, False):
        memory = bare(32, correct)
        state = written(memory, *(pair(keys[:, t], values[:, t]) for t in range(keys.shape[1])))
        said = writes.decode(answers(memory, state, writes.keys))
        right[correct] = writes.right(said).double().mean().item()
    assert abs(right[True] - 0.97) < 0.03
    assert abs(right[False] - 0.44) < 0.06


@torch.no_grad()
def test_a_key_written_again_has_its_new_value_and_leaves_the_normaliser():
    key, values = torch.randn(2, 8), torch.randn(6, 2, 8)
    read, size = {}, {}
    for correct in (True, False):
        memory = bare(8, correct)
        state = written(memory, *(pair(key, value) for value in values))
        read[correct], size[correct] = answers(memory, state, key[:, None])[:, 0], state["normaliser_0"]
    torch.testing.assert_close(size[True], dpfp3(key))
    torch.testing.assert_close(size[False], 6 * dpfp3(key))
    torch.testing.assert_close(read[True], values[-1], atol=1e-3, rtol=1e-3)
    # z holds the key as often as it was written, so too little is found under it, and too little taken away
    held = values[0]
    for count, value in enumerate(values[1:], 1):
        held = held + value - held / count
    torch.testing.assert_close(read[False], held / 6, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_first_segment_finds_nothing():
    memory, plain = build(), build(correct=False)
    once = written(memory, behind(memory))
    for block, m in enumerate(behind(memory).split(16, -1)):
        key, value, rate = memory.block(block)(m)
        torch.testing.assert_close(once[f"matrix_{block}"], key.mT @ (rate * value))
        torch.testing.assert_close(once[f"normaliser_{block}"], key.sum(1))
    uncorrected = written(plain, behind(memory))
    assert all(torch.equal(once[name], uncorrected[name]) for name in once)
    again, uncorrected = (written(each, behind(memory), behind(memory, seed=1)) for each in (memory, plain))
    assert_differ(again["normaliser_0"], uncorrected["normaliser_0"])
    x = torch.randn(2, 5, 16)
    assert torch.equal(memory.read(Site(0, "input"), x, memory.init_state(2)), x)


@torch.no_grad()
def test_tokens_of_a_segment_all_correct_what_it_found():
    memory = build()
    state, m = written(memory, behind(memory)), behind(memory, seed=1)
    after = memory.write(m, state)
    # in any order
    for name, tensor in memory.write(m.flip(1), state).items():
        torch.testing.assert_close(tensor, after[name])
    # each alone adds what it adds among the others
    for name, tensor in after.items():
        alone = sum(memory.write(m[:, i : i + 1], state)[name] - state[name] for i in range(3))
        torch.testing.assert_close(tensor, state[name] + alone, atol=1e-5, rtol=1e-5)
    # one after another is something else
    one_by_one = state
    for i in range(3):
        one_by_one = memory.write(m[:, i : i + 1], one_by_one)
    assert_differ(one_by_one["matrix_0"], after["matrix_0"])


@torch.no_grad()
def test_shares_lie_between_nothing_and_all():
    key = dpfp3(torch.randn(1, 4, 8))
    held = key[:, 0]
    share = new_share(key, held)
    assert share[0, 0] < 1e-5
    torch.testing.assert_close(share, (1 - key @ held[..., None] / key.square().sum(-1, keepdim=True)).clamp(0, 1))
    assert torch.equal(new_share(key, 100 * held)[0, 0], torch.zeros(1))
    assert torch.equal(new_share(key, torch.zeros_like(held)), torch.ones(1, 4, 1))
    assert torch.equal(new_share(torch.zeros(1, 1, 48), held), torch.ones(1, 1, 1))


def test_no_gradient_passes_through_the_share():
    memory = bare(8)
    state = written(memory, pair(torch.randn(1, 8), torch.randn(1, 8)))
    state = {name: tensor.detach() for name, tensor in state.items()}
    m = pair(torch.randn(1, 8), torch.randn(1, 8)).requires_grad_()
    key = memory.block(0)(m)[0]
    share = new_share(key, state["normaliser_0"])
    assert not share.requires_grad
    assert 0 < share < 1
    found = torch.autograd.grad(memory.write(m, state)["normaliser_0"].sum(), m)[0]
    torch.testing.assert_close(found, share * torch.autograd.grad(key.sum(), m)[0])


def test_an_unseen_key_reads_as_nothing():
    feature, matrix = torch.ones(1, 2, 6), torch.ones(1, 6, 4)
    assert not look_up(feature, 0 * matrix, torch.zeros(1, 6)).any()
    assert not look_up(0 * feature, matrix, torch.ones(1, 6)).any()
    torch.testing.assert_close(look_up(feature, matrix, torch.ones(1, 6)), torch.ones(1, 2, 4), atol=1e-5, rtol=1e-5)


@every_form
@pytest.mark.parametrize("padded", [False, True])
def test_the_module_is_its_equations(form, padded):
    memory = build(**form).double()
    count, hidden = memory.config.tokens, behind(memory).double().requires_grad_()
    keep = torch.rand(2, count, generator=torch.Generator().manual_seed(2)) < 0.6 if padded else None
    state = written(memory, behind(memory, seed=1).double(), behind(memory, seed=2).double())
    state = {name: tensor.detach().double() for name, tensor in state.items()}
    assert_equals_naive(memory, Site(0, "input"), hidden, state, keep, 16)


# --- the seam --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, memory, ids):
    """Segments of `[words; memory tokens]` through the bare model: read before, written after each block."""
    state, handles = memory.init_state(len(ids)), []

    def before(block):
        def hook(module, args):
            x = args[0]
            feature = memory.block(block).ask(x)
            return (x + look_up(feature, state[f"matrix_{block}"], state[f"normaliser_{block}"]), *args[1:])

        return hook

    def after(block):
        def hook(module, args, output):
            outputs[block] = (output[0] if isinstance(output, tuple) else output)[:, -memory.config.tokens :]

        return hook

    for block, module in enumerate(model.model.layers):
        handles += [module.register_forward_pre_hook(before(block)), module.register_forward_hook(after(block))]
    logits = []
    for segment in ids.split(SEGMENT, 1):
        outputs = {}
        both = torch.cat([model.get_input_embeddings()(segment), memory.tokens.expand(len(ids), -1, -1)], 1)
        logits.append(model(inputs_embeds=both, use_cache=False).logits[:, :SEGMENT])
        state = memory.write(torch.cat([outputs[block] for block in range(memory.depth)], -1), state)
    for handle in handles:
        handle.remove()
    return torch.cat(logits, 1)


@torch.no_grad()
def test_it_reads_before_and_writes_after_every_block():
    model, ids = make("llama"), tokens(2, 4 * SEGMENT)
    plain = copy.deepcopy(model)
    memory = mnemic.attach(model, ARMTConfig(segment_length=SEGMENT, tokens=3, dim=16)).memory
    shake(memory)
    assert memory.reads == (Site(0, "input"), Site(1, "input"))
    assert memory.writes == (Site(0), Site(1))
    expected = by_hand(plain, memory, ids)
    cache = mnemic.memory_cache(model, SEGMENT)
    assert_near(feed(model, ids, carried=cache), expected, 1e-4)
    assert_differ(plain(ids).logits[:, SEGMENT:], expected[:, SEGMENT:])


@torch.no_grad()
def test_words_do_not_see_the_tokens_behind_them():
    model, ids = make("llama"), tokens(2, 2 * SEGMENT)
    memory = mnemic.attach(model, ARMTConfig(segment_length=SEGMENT, tokens=3, dim=16)).memory
    # before training nothing is remembered, whatever the tokens are
    first = feed(model, ids, carried=mnemic.memory_cache(model, SEGMENT))
    memory.tokens += 1
    assert torch.equal(feed(model, ids, carried=mnemic.memory_cache(model, SEGMENT)), first)
    shake(memory)
    after = feed(model, ids, carried=mnemic.memory_cache(model, SEGMENT))
    assert torch.equal(after[:, :SEGMENT], first[:, :SEGMENT])
    assert_differ(after[:, SEGMENT:], first[:, SEGMENT:])
    memory.tokens += 1
    assert_differ(feed(model, ids, carried=mnemic.memory_cache(model, SEGMENT))[:, SEGMENT:], after[:, SEGMENT:])


def test_gradients_pass_through_all_segments():
    memory, x = build(), torch.randn(2, 5, 16)
    first = behind(memory).requires_grad_()
    state = written(memory, first, *(behind(memory, seed=seed) for seed in range(1, 9)))
    memory.read(Site(0, "input"), x, state).square().sum().backward()
    assert first.grad[..., :16].abs().max() > 1e-6
    assert all(parameter.grad.abs().sum() > 0 for parameter in memory.block(0).parameters())


@every_form
@torch.no_grad()
def test_padding_leaves_no_trace(form):
    memory = build(**{**form, "tokens": 4})
    state, m = written(memory, behind(memory)), behind(memory, seed=1)
    keep = torch.tensor([[True, False, True, False]] * 2)
    for name, tensor in memory.write(m[:, [0, 2]], state).items():
        torch.testing.assert_close(memory.write(m, state, keep)[name], tensor)
    nothing = memory.write(m, state, torch.zeros_like(keep))
    assert all(torch.equal(nothing[name], state[name]) for name in state)


@torch.no_grad()
def test_low_precision_is_for_the_projections_only():
    memory, x = build(dim=32), torch.randn(2, 5, 16)
    segments = [behind(memory, seed=seed) for seed in range(3)]
    state = written(memory, *segments)
    plain = memory.read(Site(0, "input"), x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered, read = written(memory, *segments), memory.read(Site(0, "input"), x, state)
    low = copy.deepcopy(memory).bfloat16()
    for found in (lowered, written(low, *(segment.bfloat16() for segment in segments))):
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert (tensor - state[name]).norm() < 0.05 * state[name].norm()
    assert (read - plain).norm() < 0.05 * plain.norm()
    assert low.read(Site(0, "input"), x.bfloat16(), state).dtype == torch.bfloat16


@torch.no_grad()
def test_long_streams_stay_finite():
    memory = build(dim=16)
    segments = [behind(memory, seed=seed) for seed in range(300)]
    for segment in segments:
        segment[0] = segments[0][0]  # the same again and again
    state, x = written(memory, *segments), torch.randn(2, SEGMENT, 16)
    read = memory.read(Site(0, "input"), x, state) - x
    assert bool(read.isfinite().all())
    assert 1e-3 < read.abs().max() < 1000


def test_bytes_law():
    for dim, depth in ((8, 2), (5, 3)):
        memory = build(dim=dim, depth=depth)
        assert nbytes(memory.init_state(1)) == 24 * dim * (16 + 1) * depth == memory.most_bytes(99)
        assert nbytes(memory.init_state(3)) == 3 * memory.most_bytes(0)


# --- settings --------------------------------------------------------------------------------------------------------


def test_small_settings():
    config = ARMTConfig.small(4, 64)
    assert (config.tokens, config.dim, config.correct, config.norm) == (4, 32, True, True)
    assert ARMTConfig.small(100, 64).tokens == 16
    sizes = [ARMTConfig.small(8, 64, size).build(64, 2).most_bytes(9) for size in (1, 2, 32, 33)]
    assert sizes == sorted(set(sizes))


def test_the_tokens_start_as_wide_as_asked():
    tokens = build(width=64, tokens=64, deviation=0.5, shaken=False).tokens
    assert abs(tokens.std().item() - 0.5) < 0.05
    assert not build(shaken=False).block(1).value.weight.any()


def test_encoders_are_refused():
    with pytest.raises(ValueError, match="attach it to a causal model"):
        mnemic.attach(make("bert"), ARMTConfig(segment_length=SEGMENT))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"deviation": 0.0}, "deviation is 0.0; tokens that start alike stay alike"),
        ({"segment_length": 0}, "segment_length is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ARMTConfig(**settings)


@every_form
def test_configs_go_to_plain_values_and_back(form):
    config = ARMTConfig(**form)
    assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config
