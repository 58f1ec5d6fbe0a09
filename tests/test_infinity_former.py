"""What is the infinity-former's own: basis functions, the fit, contraction, sticky samples, reads in closed form."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import mnemic
from helpers import SEGMENT, assert_differ, host, shake, tokens
from mnemic.memories.infinity_former import (
    LEAST_VARIANCE,
    InfinityFormerConfig,
    evaluate,
    expectation,
    masses,
    middles,
    quantiles,
    regression,
)
from mnemic.memory import Site
from mnemic.state import concatenate, nbytes, select
from mnemic.unrolling import unroll

FORMS = [{}, {"sticky": True, "bins": 10}, {"gate": True, "detach": False, "widths": [1.0], "tau": 0.75}]
every_form = pytest.mark.parametrize("form", FORMS, ids=["default", "sticky", "gate"])
LIKE = torch.empty(0, dtype=torch.float64)


def build(width=32, depth=2, shaken=True, **settings):
    settings = {"bases": 24, "samples": 24, "dim": 16, "heads": 2, **settings}
    memory = InfinityFormerConfig(segment_length=SEGMENT, **settings).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def written(memory, *segments, state=None):
    """The state after segments `[b, t, d]`, each of them read before it is written."""
    state = memory.init_state(len(segments[0])) if state is None else state
    for segment in segments:
        _, traces = memory.read_and_trace(memory.reads[0], segment, state)
        state = memory.write(
            segment, {name: t + traces[name].sum(1) if name in traces else t for name, t in state.items()}
        )
    return state


def signal(memory, state, places):
    """x(t) `[b, p, d]` at places `[p]`."""
    return evaluate(places.double(), memory.config) @ state["coefficients"].double()


def wave(places):
    """Two sines and a slope `[p, 3]`."""
    return torch.stack([(2 * math.pi * 2 * places).sin(), (2 * math.pi * 5 * places + 1).sin(), 2 * places - 1], -1)


PLUS, MINUS, CROSS = torch.ones(8), -torch.ones(8), torch.tensor([1.0, -1.0] * 4)
MARK, BLANK = torch.cat([PLUS, MINUS]), torch.cat([CROSS, CROSS])
"""Two orthogonal vectors of mean 0 and variance 1, which the scaling of hidden states leaves alone."""


def turning(places):
    """A smooth path `[p, 16]` of vectors that have mean 0 and variance 1, too: one turn, and two."""
    angles = 2 * math.pi * places[:, None] * torch.tensor([1.0, 1, 2, 2])
    angles = angles + torch.tensor([0, 1.0, 2.0, 3.0])
    return math.sqrt(2) * torch.cat([angles.cos(), angles.sin(), -angles.cos(), -angles.sin()], -1)


def filled(vector, time=64):
    return vector.expand(1, time, -1)


def share_of_mark(memory, state):
    """∫ x(t) . MARK dt / |MARK|²: how much of the signal is the marker's."""
    return (signal(memory, state, middles(4000, LIKE)) @ MARK.double() / 16).mean(1)


# --- basis functions and reads in closed form ------------------------------------------------------------------------


def test_the_grid_is_the_papers():
    config = InfinityFormerConfig()
    peaks = 1 / (math.sqrt(2 * math.pi) * torch.tensor([0.005, 0.01], dtype=torch.float64))
    psi = evaluate((torch.arange(256, dtype=torch.float64) + 0.5) / 256, config)
    own = torch.stack([psi[i, 2 * i : 2 * i + 2] for i in range(256)])
    torch.testing.assert_close(own, peaks.expand(256, 2))


def test_basis_functions_are_densities():
    config = InfinityFormerConfig(bases=12, widths=[0.5, 1.0, 3.0])
    places = torch.linspace(-6, 7, 70_001, dtype=torch.float64)
    torch.testing.assert_close(
        torch.trapezoid(evaluate(places, config), places, dim=0), torch.ones(12, dtype=torch.float64)
    )


@pytest.mark.parametrize("deviation", [0.01, 0.05, 0.8])
@pytest.mark.parametrize("mean", [0.0, 0.3, 0.97])
def test_expectation_is_the_integral(mean, deviation):
    config = InfinityFormerConfig(bases=24, samples=4)
    found = expectation(torch.tensor(mean).double(), torch.tensor(deviation).double() ** 2, config)
    places = torch.linspace(mean - 9 * deviation, mean + 9 * deviation, 40_001, dtype=torch.float64)
    density = torch.distributions.Normal(mean, deviation).log_prob(places).exp()
    integral = torch.trapezoid(density[:, None] * evaluate(places, config), places, dim=0)
    torch.testing.assert_close(found, integral, atol=1e-9, rtol=1e-7)


def test_expectation_is_the_mean_of_draws():
    config, mean, deviation = InfinityFormerConfig(bases=8), 0.4, 0.2
    drawn = mean + deviation * torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = expectation(torch.tensor(mean).double(), torch.tensor(deviation).double() ** 2, config)
    values = evaluate(drawn, config)
    assert ((values.mean(0) - found).abs() < 4 * values.std(0) / len(drawn) ** 0.5).all()
    assert (values.std(0) / len(drawn) ** 0.5).max() < 3e-3


@torch.no_grad()
def test_a_read_is_the_expected_value_of_the_signal():
    memory = build().double()
    hidden = torch.randn(2, SEGMENT, 32).double()
    state = written(memory, hidden, torch.randn(2, SEGMENT, 32).double())
    reader = memory.readers["0"]
    mean, variance = reader.densities(hidden, state)
    places = torch.linspace(-12, 13, 200_001, dtype=torch.float64)
    values = (signal(memory, state, places) @ reader.value.weight.T).unflatten(-1, (2, 8))
    for row, head, token in ((0, 0, 0), (1, 1, 3), (1, 0, 7)):
        density = torch.distributions.Normal(mean[row, head, token], variance[row, head, token].sqrt())
        expected = torch.trapezoid(density.log_prob(places).exp()[:, None] * values[row, :, head], places, dim=0)
        # of one head alone
        chosen = copy.deepcopy(memory)
        chosen.readers["0"].output.weight.zero_()
        chosen.readers["0"].output.weight[:8, 8 * head : 8 * head + 8] = torch.eye(8)
        added = chosen.read(Site(0), hidden, state) - hidden
        torch.testing.assert_close(added[row, token, :8], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_narrow_read_is_the_value_at_its_place():
    memory = build(width=16, bases=64, shaken=False)
    state = written(memory, turning(middles(256, LIKE))[None].float())
    reader = memory.readers["0"]
    reader.output.weight.copy_(torch.eye(16))
    for affine, bias in ((reader.mean, math.log(0.3 / 0.7)), (reader.variance, -20.0)):
        affine.weight.zero_()
        affine.bias.fill_(bias)
    hidden = torch.randn(1, 3, 16)
    assert (reader.densities(hidden, state)[1] == LEAST_VARIANCE).all()
    value = signal(memory, state, torch.tensor([0.3]))[0] @ reader.value.weight.T.double()
    added = memory.read(Site(0), hidden, state) - hidden
    torch.testing.assert_close(added[0], value.float().expand(3, -1), atol=0.02, rtol=0)
    assert_differ(added, torch.zeros_like(added), 0.1)


# --- the fit ---------------------------------------------------------------------------------------------------------


def test_reconstruction_gets_better_with_the_number_of_basis_functions():
    places, x = middles(256, LIKE), wave(middles(256, LIKE))
    errors = []
    for bases in (4, 8, 16, 32, 64):
        config = InfinityFormerConfig(bases=bases)
        fitted = regression(bases, tuple(config.widths), 0.5, 0, 256, 0.0) @ x
        errors.append(float((evaluate(places, config) @ fitted - x).square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3  # 2 places cannot hold 5 periods
    assert errors[-1] < 0.01


def test_the_fit_is_the_minimum_of_the_ridge_loss():
    config, ridge = InfinityFormerConfig(bases=10, widths=[0.7]), 0.3
    places = torch.cat([0.4 * middles(6, LIKE), 0.4 + 0.6 * middles(9, LIKE)])
    x = torch.randn(15, 4, dtype=torch.float64)
    fitted = (regression(10, (0.7,), ridge, 6, 9, 0.4) @ x).requires_grad_()
    loss = (evaluate(places, config) @ fitted - x).square().sum() + ridge * fitted.square().sum()
    (slope,) = torch.autograd.grad(loss, fitted)
    assert slope.abs().max() < 1e-9


def test_a_larger_ridge_keeps_less():
    sizes = [regression(16, (1.28, 2.56), ridge, 0, 16, 0.0).norm() for ridge in (0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_one_width_tells_more_tokens_apart_than_two_at_the_same_places():
    errors = []
    for widths in ((1.28, 2.56), (1.28,)):
        config = InfinityFormerConfig(bases=64, widths=list(widths))
        seen = evaluate(middles(64, LIKE), config) @ regression(64, widths, 0.5, 0, 64, 0.0)
        errors.append(float((seen - torch.eye(64)).square().sum(1).mean().sqrt()))
    assert errors[1] < 0.8 * errors[0]


def test_the_cached_fit_serves_training_after_inference():
    memory = build(bases=22, gate=True)
    with torch.inference_mode():
        written(memory, torch.randn(1, 7, 32), torch.randn(1, 7, 32))
    state = written(memory, torch.randn(1, 7, 32), torch.randn(1, 7, 32))
    state["coefficients"].square().sum().backward()
    assert memory.gate.weight.grad.abs().sum() > 0


# --- contraction -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_segment_fills_the_signal_and_then_makes_room():
    memory = build(width=16, bases=256, samples=256)
    x = turning(middles(256, LIKE)).float()
    first, places = written(memory, x[None]), middles(50, LIKE)
    torch.testing.assert_close(signal(memory, first, places)[0], turning(places), atol=0.02, rtol=0)
    second = written(memory, -x[None], state=first)
    inner = places[3:-3]  # at the border of two segments the signal jumps
    old, new = (signal(memory, second, at)[0] for at in (inner / 2, 0.5 + inner / 2))
    torch.testing.assert_close(old, turning(inner), atol=0.05, rtol=0)
    torch.testing.assert_close(new, -turning(inner), atol=0.05, rtol=0)


@pytest.mark.parametrize("tau", [0.5, 0.75])
@torch.no_grad()
def test_what_is_left_of_a_segment_is_tau_to_the_power_of_those_after_it(tau):
    memory = build(width=16, bases=256, samples=256, tau=tau)
    state = written(memory, filled(MARK))
    for count in range(7):
        share = float(share_of_mark(memory, state))
        assert share == pytest.approx(tau**count, abs=0.01)
        if tau**count > 0.05:
            # where it stands: in the first tau^count, and nowhere else
            at = torch.tensor([0.5 * tau**count, 1.2 * tau**count]).double().clamp_max(1)
            found = signal(memory, state, at)[0] @ MARK.double() / 16
            assert found[0] == pytest.approx(1, abs=0.05)
            assert count == 0 or found[1] == pytest.approx(0, abs=0.2)
        state = written(memory, filled(BLANK), state=state)


@torch.no_grad()
def test_the_newest_token_is_at_the_end():
    memory = build(width=16, bases=128, samples=64)
    segment = filled(BLANK, 16).clone()
    segment[0, -1] = MARK
    for state in (written(memory, segment), written(memory, filled(BLANK, 16), segment)):
        track = signal(memory, state, middles(200, LIKE))[0] @ MARK.double() / 16
        assert track.argmax() > 190
        assert track.max() > 0.7


# --- sticky memory ---------------------------------------------------------------------------------------------------


def test_masses_are_integrals():
    mean, variance = torch.rand(3, 2).double(), torch.rand(3, 2).double().square() + 1e-4
    found = masses(mean, variance, 5)
    for i in range(5):
        places = torch.linspace(i / 5, (i + 1) / 5, 20_001, dtype=torch.float64)
        density = torch.distributions.Normal(mean[..., None], variance[..., None].sqrt()).log_prob(places).exp()
        torch.testing.assert_close(found[..., i], torch.trapezoid(density, places), atol=1e-6, rtol=1e-6)


def test_quantiles_of_known_histograms():
    flat, none = torch.full((1, 8), 0.3).double(), torch.zeros(1, 8).double()
    torch.testing.assert_close(quantiles(flat, 6)[0], middles(6, LIKE))
    torch.testing.assert_close(quantiles(none, 6)[0], middles(6, LIKE))
    both = torch.tensor([[0, 0, 1.0, 0], [3.0, 0, 0, 1.0]]).double()
    expected = [[0.5 + 0.25 * (m + 0.5) / 4 for m in range(4)], [1 / 24, 3 / 24, 5 / 24, 0.875]]
    torch.testing.assert_close(quantiles(both, 4), torch.tensor(expected).double())
    # as many samples in every bin as it has attention
    attention = torch.rand(3, 16).double()
    counts = torch.stack([torch.histc(row, 16, 0, 1) for row in quantiles(attention, 10_000)])
    torch.testing.assert_close(counts / 10_000, attention / attention.sum(1, keepdim=True), atol=2e-4, rtol=0)


@torch.no_grad()
def test_flat_attention_is_the_uniform_memory():
    uniform, sticky = build(), build(sticky=True, bins=10)
    state = written(uniform, torch.randn(2, SEGMENT, 32))
    segment = torch.randn(2, SEGMENT, 32)
    expected = uniform.write(segment, state)
    for attention in (torch.zeros(2, 10), torch.full((2, 10), 0.7)):
        after = sticky.write(segment, {**state, "attention": attention})
        torch.testing.assert_close(after["coefficients"], expected["coefficients"], atol=1e-5, rtol=1e-4)
        assert not after["attention"].any()
    steep = sticky.write(segment, {**state, "attention": torch.arange(10.0).square().expand(2, -1)})
    assert_differ(steep["coefficients"], expected["coefficients"])


@pytest.mark.parametrize("tau", [0.5, 0.75])
@torch.no_grad()
def test_attention_keeps_a_marker(tau):
    # a quarter of a segment is the marker, and afterwards all attention is on it
    settings = {"width": 16, "bases": 256, "samples": 256, "tau": tau}
    segment = torch.cat([filled(BLANK, 48), filled(MARK, 16)], 1)
    uniform, sticky = build(**settings), build(**settings, sticky=True, bins=64)
    plain, held = written(uniform, segment), written(sticky, segment)
    assert float(share_of_mark(sticky, held)) == pytest.approx(0.25, abs=0.02)
    first, last = 48, 64
    for count in range(1, 9):
        plain = uniform.write(filled(BLANK), plain)
        assert float(share_of_mark(uniform, plain)) == pytest.approx(0.25 * tau**count, abs=0.02)
        held["attention"][:, first:last] = 1
        held = sticky.write(filled(BLANK), held)
        assert float(share_of_mark(sticky, held)) == pytest.approx(tau, abs=0.06)
        first, last = 0, int(64 * tau) - 1
    assert float(share_of_mark(uniform, plain)) < 0.04


@torch.no_grad()
def test_what_a_token_attends_to_is_left_behind():
    memory = build(sticky=True, bins=10, heads=2)
    hidden = torch.randn(3, SEGMENT, 32)
    empty = memory.init_state(3)
    assert not memory.read_and_trace(Site(0), hidden, empty)[1]["attention"].any()
    state = written(memory, hidden)
    state = concatenate([select(state, torch.tensor([0, 1])), select(empty, torch.tensor([2]))])
    read, traces = memory.read_and_trace(Site(0), hidden, state)
    assert torch.equal(read, memory.read(Site(0), hidden, state))
    mean, variance = memory.readers["0"].densities(hidden, state)
    torch.testing.assert_close(traces["attention"][:2], masses(mean, variance, 10).mean(1)[:2])
    assert not traces["attention"][2].any()
    assert traces["attention"].sum(-1).max() <= 1
    assert memory.read_and_trace(Site(0), hidden, state)[1].keys() == {"attention"}
    assert not build().read_and_trace(Site(0), hidden, state)[1]


@pytest.mark.parametrize(("name", "reads", "write"), [("gpt2", [0, 1], 1), ("bert", [1], 0), ("bert", [0, 1], 0)])
@torch.no_grad()
def test_attention_reaches_the_write(name, reads, write, monkeypatch):
    config = InfinityFormerConfig.tiny()[1].replace(read_layers=reads, write_layer=write)
    model = host(name, config)
    memory, seen, left = mnemic.attached(model).memory, [], []
    own_write, own_read = type(memory).write, type(memory).read_and_trace

    def write_and_note(self, hidden, state, keep=None):
        seen.append(state["attention"].sum(1))
        return own_write(self, hidden, state, keep)

    def read_and_note(self, layer, hidden, state):
        read, traces = own_read(self, layer, hidden, state)
        left.append(traces["attention"].sum((1, 2)))
        return read, traces

    monkeypatch.setattr(type(memory), "write", write_and_note)
    monkeypatch.setattr(type(memory), "read_and_trace", read_and_note)
    session = mnemic.Session(model)
    for part in tokens(1, 3 * SEGMENT).split(SEGMENT, 1):
        session.read(part)
    assert len(seen) == 3
    assert not seen[0].any()
    assert seen[2].all()
    # every token's attention is counted, once
    last = session.stream.state["attention"].sum(1)
    torch.testing.assert_close(torch.stack(left).sum(0), torch.stack(seen).sum(0) + last)


def test_nothing_is_drawn():
    memory = build(sticky=True, bins=10)
    hidden = torch.randn(2, SEGMENT, 32)
    before = torch.get_rng_state()
    first = written(memory, hidden, -hidden, hidden)
    assert torch.equal(torch.get_rng_state(), before)
    again = written(memory, hidden, -hidden, hidden)
    assert all(torch.equal(first[name], again[name]) for name in first)


@torch.no_grad()
def test_queries_look_at_different_places_from_the_start():
    memory = build(bases=64, samples=64, shaken=False)
    hidden = torch.randn(4, 32, 32)
    mean, _ = memory.readers["0"].densities(hidden, written(memory, hidden, -hidden))
    assert mean.std(-1).min() > 0.02


# --- the regulariser -------------------------------------------------------------------------------------------------


def test_the_regulariser_is_the_divergence_from_the_prior():
    memory = build(prior=0.2, regularise=3.0)
    hidden = torch.randn(3, SEGMENT, 32)
    state = written(memory, hidden)
    state["written"][2] = 0
    mean, variance = memory.readers["0"].densities(hidden, state)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, variance.sqrt()), normal(mean, 0.2)).mean(1)
    found = memory.auxiliary(hidden, state)
    torch.testing.assert_close(found, 3 * expected.mean(1) * torch.tensor([1.0, 1.0, 0.0]))
    keep = torch.ones(3, SEGMENT, dtype=torch.bool)
    keep[0, 3:] = False
    torch.testing.assert_close(memory.auxiliary(hidden, state, keep)[0], 3 * expected[0, :3].mean())
    with torch.no_grad():
        memory.readers["0"].variance.weight.zero_()
        memory.readers["0"].variance.bias.fill_(math.log(math.expm1(0.2**2)))
    assert memory.auxiliary(hidden, state).abs().max() < 1e-5
    assert build(regularise=0.0).auxiliary(hidden, state) is None


def test_the_regulariser_makes_reads_narrow():
    model = host("gpt2", InfinityFormerConfig.tiny()[0].replace(regularise=1.0))
    optimiser = torch.optim.Adam(mnemic.attached(model).parameters(), lr=0.05)
    ids, seen = tokens(2, 3 * SEGMENT), []
    for _ in range(8):
        result = unroll(model, ids, ids)
        (result.loss + result.auxiliary).backward()
        optimiser.step()
        optimiser.zero_grad()
        seen.append(result.auxiliary.item())
    assert seen[-1] < 0.5 * seen[0]


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
def test_detached_writes_are_constants(detach):
    memory = build(gate=True, detach=detach)
    hidden = torch.randn(2, SEGMENT, 32, requires_grad=True)
    state = {**written(memory, torch.randn(2, SEGMENT, 32))}
    before = state["coefficients"].detach().requires_grad_()
    after = memory.write(hidden, {**state, "coefficients": before})["coefficients"]
    found = torch.autograd.grad(after.square().sum(), [hidden, before, memory.gate.weight], allow_unused=True)
    assert [each is None for each in found] == [detach, detach, False]
    assert memory.gradient_reach == (1 if detach else None)


@every_form
def test_every_parameter_gets_a_gradient(form):
    memory, hidden = build(**form), torch.randn(2, SEGMENT, 32)
    state = written(memory, hidden, torch.randn(2, SEGMENT, 32))
    memory.read(Site(0), hidden, state).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in memory.parameters())


# --- the seam --------------------------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_an_empty_memory_adds_nothing(form):
    memory, hidden = build(**form), torch.randn(2, SEGMENT, 32)
    assert torch.equal(memory.read(Site(0), hidden, memory.init_state(2)), hidden)
    assert_differ(memory.read(Site(0), hidden, written(memory, hidden)), hidden)


@every_form
@torch.no_grad()
def test_padding_leaves_no_trace(form):
    memory = build(**form)
    plain, state = torch.randn(1, 5, 32), written(memory, torch.randn(1, SEGMENT, 32))
    spread, keep = torch.randn(1, SEGMENT, 32), torch.zeros(1, SEGMENT, dtype=torch.bool)
    keep[0, [1, 2, 4, 6, 7]] = True
    spread[keep] = plain[0]
    for start in (state, memory.init_state(1)):
        after, expected = memory.write(spread, start, keep), memory.write(plain, start)
        assert all(torch.allclose(after[name], expected[name], atol=1e-5) for name in start)
    # and a segment of nothing else changes nothing
    nothing = memory.write(spread, state, torch.zeros_like(keep))
    assert all(torch.equal(nothing[name], state[name]) for name in state)


@torch.no_grad()
def test_the_gate_scales_what_is_written():
    plain, gated, segment = build(), build(gate=True, shaken=False), torch.randn(1, SEGMENT, 32)
    expected = written(plain, segment)["coefficients"]
    gated.gate.weight.zero_()
    for bias, share in ((0.0, 0.5), (20.0, 1.0)):
        gated.gate.bias.fill_(bias)
        torch.testing.assert_close(written(gated, segment)["coefficients"], share * expected)
    # by its neighbours: a channel of the last token closes it, seen one token before
    gated.gate.weight[:, 3, 2] = -1e6
    closed = segment.clone()
    closed[..., 3] = -5.0
    closed[:, -1, 3] = 5.0
    scaled = torch.nn.functional.layer_norm(closed, (32,))
    scaled[:, -2] = 0
    fit = regression(24, (1.28, 2.56), 0.5, 0, SEGMENT, 0.0).float()
    torch.testing.assert_close(written(gated, closed)["coefficients"], fit @ scaled, atol=1e-5, rtol=1e-4)


@every_form
@torch.no_grad()
def test_rows_of_any_length_and_age_share_a_batch(form):
    memory = build(**form)
    lengths, ages = [8, 3, 8, 1, 0, 5], [0, 1, 2, 1, 1, 0]
    states = [memory.init_state(1)] * 6
    for row, age in enumerate(ages):
        states[row] = (
            written(memory, memory.init_state(1)["coefficients"][:, :1] + torch.randn(1, 4, 32)) if age else states[row]
        )
        states[row] = written(memory, torch.randn(1, 4, 32), state=states[row]) if age > 1 else states[row]
    hidden = torch.randn(6, SEGMENT, 32)
    keep = torch.arange(SEGMENT) < torch.tensor(lengths)[:, None]
    together = memory.write(hidden, concatenate(states), keep)
    for row, length in enumerate(lengths):
        alone = memory.write(hidden[row : row + 1, :length], states[row]) if length else states[row]
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name][row : row + 1], tensor, atol=1e-5, rtol=1e-4)
    assert together["written"].tolist() == [age + (length > 0) for age, length in zip(ages, lengths, strict=True)]


@every_form
@torch.no_grad()
def test_low_precision_is_for_the_projections_only(form):
    memory, hidden = build(**form), torch.randn(2, 20, 32)
    state = written(memory, hidden, -hidden)
    plain = memory.read(Site(0), hidden, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after, read = written(memory, hidden, -hidden), memory.read(Site(0), hidden, state)
    lowered = copy.deepcopy(memory).bfloat16()
    for found in (after, written(lowered, hidden.bfloat16(), -hidden.bfloat16())):
        assert found["coefficients"].dtype == torch.float32
        difference = (found["coefficients"] - state["coefficients"]).norm()
        assert difference < 0.05 * state["coefficients"].norm()
    torch.testing.assert_close(read, plain, atol=0.1, rtol=0.1)


@every_form
@torch.no_grad()
def test_long_streams_stay_finite(form):
    memory = build(**form)
    segments = torch.randn(300, 2, SEGMENT, 32)
    segments[:, 0] = segments[0, 0]  # the same again and again
    state = written(memory, *segments)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert state["coefficients"].abs().max() < 10
    read = memory.read(Site(0), segments[0], state) - segments[0]
    assert 1e-3 < read.abs().max() < 100


def test_placement():
    for depth, middle in ((1, 0), (2, 0), (3, 1), (12, 5)):
        memory = InfinityFormerConfig(bases=4, samples=4).build(64, depth)
        assert memory.reads == memory.writes == (Site(middle),)
        assert not memory.writes_see_reads
        assert memory.starts_empty
    sticky = InfinityFormerConfig(bases=4, samples=4, sticky=True)
    assert sticky.build(64, 2).writes_see_reads
    assert InfinityFormerConfig(bases=4, samples=4, read_layers=[0], write_layer=1).build(64, 2).writes_see_reads
    encoder = sticky.replace(read_layers=[0, 1], write_layer=0).build(64, 2, causal=False)
    assert encoder.reads_own_segment
    assert not encoder.starts_empty
    assert not encoder.writes_see_reads


def test_bytes_law():
    for rows in (1, 4):
        assert nbytes(build(width=12).init_state(rows)) == rows * (24 * 12 * 4 + 8)
        assert nbytes(build(width=12, sticky=True, bins=7).init_state(rows)) == rows * (24 * 12 * 4 + 8 + 28)
    sizes = [InfinityFormerConfig.small(SEGMENT, 64, size).build(64, 2).most_bytes(9) for size in (1, 2, 3, 32, 33)]
    assert sizes == sorted(set(sizes))
    assert InfinityFormerConfig.small(SEGMENT, 64).build(64, 2).most_bytes(9) == sizes[3]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bases": 0}, "bases is 0; it must be at least 1"),
        ({"bases": 7}, "bases 7 is not divisible by the 2 widths that stand at each place; set bases= to a multiple"),
        ({"widths": []}, r"widths are \[\]; give at least one, all above 0"),
        ({"widths": [1.0, 0.0]}, r"widths are \[1.0, 0.0\]; give at least one, all above 0"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"bins": 0, "sticky": True}, "bins is 0; it must be at least 1"),
        ({"dim": 10}, "dim 10 is not divisible by 4 heads; set heads= to a divisor"),
        ({"ridge": 0.0}, "ridge is 0.0; it must be above 0"),
        ({"prior": -1.0}, "prior is -1.0; it must be above 0"),
        ({"tau": 1.0}, r"tau is 1.0; the share of the signal that the past keeps lies in \(0, 1\)"),
        ({"read_layers": []}, "read_layers is empty; name at least one block"),
        ({"segment_length": 0}, "segment_length is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InfinityFormerConfig(**settings)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="write_layer is 2, but the model has 2 blocks"):
        InfinityFormerConfig(write_layer=2).build(64, 2)
    config = InfinityFormerConfig(bases=4, sticky=True, read_layers=[0, 1], write_layer=0)
    with pytest.raises(ValueError, match="read layer 1 lies above write_layer 0: a sticky memory is written after all"):
        config.build(64, 2)


@every_form
def test_configs_go_to_plain_values_and_back(form):
    config = InfinityFormerConfig(**form)
    assert mnemic.MemoryConfig.from_dict(config.to_dict()) == config
