"""The capacity probe: update rules against their equations, what is drawn, and the numbers of an independent run."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from capacity import SETUPS, Setup, answers, app, capacity, picture, probe, table, table_of_earlier
from mnemic.bench.results import Record
from mnemic.memories.rules import RULES, Rule, dpfp3, elu_plus_one
from mnemic.tasks.base import generator
from mnemic.tasks.capacity import Capacity, Writes, unit_vectors
from task_checks import chi_square


def random_pairs(*lead: int, key: int = 5, value: int = 4, seed: int = 0):
    source = generator(seed)
    return torch.randn(*lead, key, generator=source), torch.randn(*lead, value, generator=source)


# --- rules against their equations -----------------------------------------------------------------------------------


def test_sum_is_the_product_of_keys_and_values():
    keys, values = random_pairs(3, 7)
    state = RULES["sum"].write_all(RULES["sum"].init_state(3, 5, 4), keys, values)
    torch.testing.assert_close(state["weights"], keys.mT @ values)
    torch.testing.assert_close(RULES["sum"].read(state, keys[:, 2]), (values.mT @ keys @ keys[:, 2, :, None])[..., 0])


def test_decay_weighs_by_age():
    keys, values = random_pairs(3, 7)
    state = RULES["decay"].write_all(RULES["decay"].init_state(3, 5, 4), keys, values)
    weight = 0.95 ** torch.arange(6, -1, -1)
    torch.testing.assert_close(state["weights"], (weight[:, None] * keys).mT @ values)


def test_delta_overwrites_exactly_with_orthonormal_keys():
    keys = torch.linalg.qr(torch.randn(6, 6, generator=generator(0)))[0]
    first, second = torch.randn(2, 6, 4, generator=generator(1))
    order = torch.tensor([0, 3, 0, 5, 3, 3, 1])
    rule = RULES["delta"]
    state = rule.write_all(rule.init_state(1, 6, 4), keys[None], first[None])
    state = rule.write_all(state, keys[order][None], (second[order] + torch.arange(7)[:, None])[None])
    expected = first.clone()
    for place, which in enumerate(order.tolist()):
        expected[which] = second[which] + place
    torch.testing.assert_close((keys @ state["weights"])[0], expected, atol=1e-5, rtol=1e-5)


def test_gated_delta_forgets_first_and_then_corrects():
    keys, values = random_pairs(2, 3)
    rule, rates, keeps = RULES["delta"], torch.tensor([[0.2], [0.9]]), torch.tensor([[0.5], [0.8]])
    state = rule.write_all(rule.init_state(2, 5, 4), keys, values)
    got = rule.write(state, keys[:, 0], values[:, 1], rates, keeps)["weights"]
    for row in range(2):
        k, v, (beta,), (keep,) = keys[row, 0], values[row, 1], rates[row], keeps[row]
        # S = S α (I - β k kᵀ) + β v kᵀ, as in the paper, with S = Wᵀ
        s = keep * state["weights"][row].T @ (torch.eye(5) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        torch.testing.assert_close(got[row], s.T)


def test_a_rate_for_each_value_dimension():
    (key, value), rule = random_pairs(2), RULES["delta"]
    state = rule.write_all(rule.init_state(2, 5, 4), *random_pairs(2, 3, seed=1))
    rate, keep = torch.rand(2, 2, 4, generator=generator(3))
    got = rule.write(state, key, value, rate, keep)["weights"]
    for column in range(4):
        one = {"weights": state["weights"][..., column : column + 1]}
        part = slice(column, column + 1)
        expected = rule.write(one, key, value[:, part], rate[:, part], keep[:, part])["weights"]
        torch.testing.assert_close(got[..., part], expected)


@pytest.mark.parametrize("delta", [False, True])
def test_infini_attention_is_its_equations(delta: bool):
    keys, values = random_pairs(1, 6)
    rule = RULES["infini-delta" if delta else "infini"]
    state = rule.write_all(rule.init_state(1, 5, 4), keys, values)
    m, z = torch.zeros(5, 4), torch.zeros(5)
    for k, v in zip(keys[0], values[0], strict=True):
        s = torch.where(k > 0, k + 1, k.exp())
        m = m + torch.outer(s, v - (s @ m) / (s @ z + 1e-5) if delta else v)
        z = z + s
    torch.testing.assert_close(state["weights"][0], m)
    torch.testing.assert_close(state["normaliser"][0], z)
    q = elu_plus_one(keys[0, 0])
    torch.testing.assert_close(rule.read(state, keys[:, 0])[0], (q @ m) / (q @ z + 1e-5))


def test_armt_is_its_equations():
    keys, values = random_pairs(1, 9)
    rates = torch.rand(9, generator=generator(2))
    rule = RULES["armt"]
    state = rule.init_state(1, 5, 4)
    w, z = torch.zeros(30, 4), torch.zeros(30)
    for place in range(9):
        state = rule.write(state, keys[:, place], values[:, place], rates[place].reshape(1, 1))
        r = [max(x, 0.0) for x in keys[0, place].tolist()] + [max(-x, 0.0) for x in keys[0, place].tolist()]
        k = torch.tensor([r[i] * r[(i - j) % 10] for j in (1, 2, 3) for i in range(10)])
        old = (w.T @ k) / (z @ k + 1e-5)
        gamma = min(max(1 - float(z @ k) / float(k @ k), 0.0), 1.0)
        w = w + rates[place] * torch.outer(k, values[0, place] - old)
        z = z + gamma * k
    torch.testing.assert_close(state["weights"][0], w)
    torch.testing.assert_close(state["normaliser"][0], z)


def test_armt_writes_a_key_again_without_growing_its_normaliser():
    # without the correction the normaliser grows with every write and the new value only joins the old ones
    key, _ = random_pairs(1)
    values = torch.eye(4)
    read, size = {}, {}
    for name in ("armt", "armt-uncorrected"):
        rule = RULES[name]
        states = [rule.init_state(1, 5, 4)]
        for value in values:
            states.append(rule.write(states[-1], key, value[None]))
        read[name] = rule.read(states[-1], key)[0]
        size[name] = [float(state["normaliser"].sum() / dpfp3(key).sum()) for state in states]
    assert size["armt"] == pytest.approx([0, 1, 1, 1, 1], abs=1e-4)
    assert size["armt-uncorrected"] == pytest.approx([0, 1, 2, 3, 4], abs=1e-4)
    torch.testing.assert_close(read["armt"], values[-1], atol=1e-3, rtol=0)
    assert read["armt-uncorrected"][-1] < 0.5


def test_the_correction_takes_no_gradient():
    keys, values = random_pairs(1, 2)
    keys.requires_grad_(True)
    rule = RULES["armt"]
    state = rule.write_all(rule.init_state(1, 5, 4), keys, values)
    (got,) = torch.autograd.grad(state["normaliser"].sum(), keys)
    # z = φ(k_1) + γ φ(k_2) with γ a constant
    fixed = keys.detach().requires_grad_(True)
    first, second = dpfp3(fixed[0, 0]), dpfp3(fixed[0, 1])
    gamma = (1 - first.detach() @ second.detach() / second.detach().square().sum()).clamp(0, 1)
    (expected,) = torch.autograd.grad((first + gamma * second).sum(), fixed)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", RULES)
def test_an_empty_memory_reads_as_zero_and_an_empty_key_leaves_no_nan(name: str):
    rule, (key, value) = RULES[name], random_pairs(3)
    state = rule.init_state(3, 5, 4)
    assert {n: tuple(t.shape[1:]) for n, t in state.items()} == rule.state_shape(5, 4)
    assert (rule.read(state, key) == 0).all()
    state = rule.write(state, torch.zeros_like(key), value)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert rule.read(state, key).isfinite().all()


@pytest.mark.parametrize("name", RULES)
def test_heads_are_rows(name: str):
    rule, (keys, values) = RULES[name], random_pairs(2, 3, 6)
    state = rule.write_all(rule.init_state((2, 3), 5, 4), keys, values)
    flat = rule.write_all(rule.init_state(6, 5, 4), keys.flatten(0, 1), values.flatten(0, 1))
    for part in state:
        torch.testing.assert_close(state[part].flatten(0, 1), flat[part])


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match="map is 'relu'; choose one of identity"):
        Rule("relu")
    with pytest.raises(ValueError, match="normaliser is 'softmax'"):
        Rule(normaliser="softmax")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        Rule(keep=1.5)
    with pytest.raises(ValueError, match="with a normaliser"):
        Rule(keep=0.5, normaliser="sum")
    key, value = random_pairs(1)
    with pytest.raises(ValueError, match="leave it out"):
        RULES["armt"].write(RULES["armt"].init_state(1, 5, 4), key, value, keep=0.5)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_distinct_writes_every_key_once():
    writes = Capacity(12).examples(50)
    assert (writes.order.sort(1).values == torch.arange(12)).all()
    assert writes.asked.all()
    assert (writes.age.sort(1).values == torch.arange(12)).all()


def test_rewrites_draw_keys_with_replacement_and_the_last_value_counts():
    writes = Capacity(12, rewrites=True).examples(300)
    assert writes.order.shape == (300, 48)
    # Binomial(48, 1/12): a key is left out with probability (11/12)^48 = 1.5 %
    assert float((~writes.asked).double().mean()) == pytest.approx((11 / 12) ** 48, abs=0.006)
    for row in range(20):
        last = dict(zip(writes.order[row].tolist(), writes.values[row].tolist(), strict=True))
        assert {key: value for key, value in enumerate(writes.answer[row].tolist()) if value >= 0} == last


def test_keys_and_values_are_balanced():
    writes = Capacity(16, rewrites=True).examples(1000)
    # critical values at p = 0.001 with 15 and 255 degrees of freedom
    assert chi_square(writes.order.flatten().bincount(minlength=16)) < 37.7
    assert chi_square(writes.values.flatten().bincount(minlength=256)) < 330.5
    # and after a key at place 0 no key is more frequent than another: drawn with replacement
    following = writes.order[:, 1:][writes.order[:, :-1] == 0]
    assert chi_square(following.bincount(minlength=16)) < 37.7


def test_vectors_are_of_length_one_and_point_everywhere():
    vectors = unit_vectors((4000, 32), generator(0))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4000))
    # mean 0, covariance I / 32; standard errors are 0.0028 and 0.0005 / 0.0007
    assert vectors.mean(0).abs().max() < 0.012
    assert (vectors.T @ vectors / 4000 - torch.eye(32) / 32).abs().max() < 0.004
    # dot products of two directions in 32 dimensions have kurtosis 3 * 32 / 34
    dots = (vectors[:2000] * vectors[2000:]).sum(1) * math.sqrt(32)
    assert float((dots**4).mean()) == pytest.approx(3 * 32 / 34, abs=0.5)


def test_a_seed_gives_the_same_everywhere():
    writes = Capacity(5, rewrites=True, key_width=4, value_width=3, codebook=9).examples(2)
    again = Capacity(5, rewrites=True, key_width=4, value_width=3, codebook=9).examples(2)
    assert (writes.order == again.order).all()
    assert (writes.keys == again.keys).all()
    assert writes.order[0, :8].tolist() == ORDER
    assert writes.values[0, :8].tolist() == VALUES
    torch.testing.assert_close(writes.keys[0, 0], torch.tensor(KEY), atol=1e-6, rtol=0)
    other = Capacity(5, rewrites=True, key_width=4, value_width=3, codebook=9).examples(2, "train")
    assert not (other.order == writes.order).all()


ORDER, VALUES = [2, 3, 3, 2, 2, 1, 4, 1], [7, 4, 2, 2, 2, 3, 8, 2]
KEY = [-0.6676267, 0.2032766, 0.2436014, 0.6735069]


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("pairs", [1, 2, 7, 40])
def test_the_oracle_is_always_right_and_exact_vectors_decode(pairs: int, rewrites: bool):
    task = Capacity(pairs, rewrites, codebook=2 if pairs == 7 else 256)
    assert task.floors(30)["oracle"] == 1
    writes = task.examples(30)
    exact = writes.codebook.gather(1, writes.answer.clamp_min(0)[..., None].expand(-1, -1, 32))
    assert writes.right(writes.decode(3 * exact)).all()
    assert not writes.earlier(writes.decode(exact)).any()


def test_floors_are_what_they_are_in_closed_form():
    floors = Capacity(16).floors(1000)
    one, eight = 1 / 16, 1 / 2
    assert floors["uniform"] == 1 / 256
    assert floors["majority"] == pytest.approx(1 / 256, abs=0.002)
    assert floors["last write"] == pytest.approx(one + (1 - one) / 256, abs=0.003)
    assert floors["last 8 writes"] == pytest.approx(eight + eight / 256, abs=0.003)
    assert floors["8 writes at random"] == pytest.approx(eight + eight / 256, abs=0.003)
    assert floors["any value written"] == pytest.approx(one + (1 - one) / 256, abs=0.006)
    assert floors["any value of the key"] == 1
    floors = Capacity(16, rewrites=True).floors(600)
    # a key has n values with probability Binomial(64, 1/16), given n > 0
    chance = [math.comb(64, n) * one**n * (1 - one) ** (64 - n) for n in range(65)]
    right = sum(p * (1 / n + (1 - 1 / n) / 256) for n, p in enumerate(chance) if n) / (1 - chance[0])
    assert floors["any value of the key"] == pytest.approx(right, abs=0.01)
    written = 1 / (16 * (1 - chance[0]))
    assert floors["last write"] == pytest.approx(written + (1 - written) / 256, abs=0.004)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="pairs is 0; use at least 1"):
        Capacity(0)
    with pytest.raises(ValueError, match="codebook is 1; a choice needs at least 2 values"):
        Capacity(codebook=1)


def test_earlier_values_are_told_from_wrong_ones():
    writes = Writes(
        torch.zeros(1, 2, 1), torch.zeros(1, 9, 1), torch.tensor([[0, 1, 0, 0]]), torch.tensor([[5, 6, 7, 8]])
    )
    assert writes.answer.tolist() == [[8, 6]]
    assert writes.age.tolist() == [[0, 2]]
    assert writes.earlier(torch.tensor([[5, 5]])).tolist() == [True, False]
    assert writes.earlier(torch.tensor([[8, 6]])).tolist() == [False, False]


# --- the numbers -----------------------------------------------------------------------------------------------------

REFERENCE = {
    "sum": {16: (1.00, 0.27), 32: (0.96, 0.18)},
    "decay, 0.95 kept at a write": {16: (0.98, 0.66), 32: (0.72, 0.51)},
    "delta": {16: (0.97, 0.93), 32: (0.76, 0.72)},
    "Infini-attention, keys of length 1": {16: (0.06, 0.02), 32: (0.03, 0.01)},
    "Infini-attention, length 5.7": {16: (0.15, 0.03), 32: (0.07, 0.01)},
    "Infini-attention, length 17": {16: (0.40, 0.05), 32: (0.17, 0.02)},
    "Infini-attention with delta, length 17": {16: (0.60, 0.16), 32: (0.31, 0.06)},
    "ARMT": {16: (0.97, 0.99), 32: (0.96, 0.97)},
    "ARMT without its correction": {32: (0.99, 0.44)},
    "delta, keys as wide as ARMT's features": {32: (1.00, 1.00)},
}
"""Right answers, keys written once and with rewrites, by the number of pairs: an independent run, to two digits."""


@pytest.fixture(scope="module")
def record() -> Record:
    return capacity(lambda _: None, (16, 32), seeds=(0, 1), reads=4096)


def test_the_numbers_of_an_independent_run_come_out(record: Record):
    for rule in record.measures["rules"]:
        for pairs, expected in REFERENCE[rule["label"]].items():
            got = [statistics.mean(rule[mode][pairs]["right"]) for mode in ("distinct", "rewrites")]
            assert got == pytest.approx(expected, abs=0.03), f"{rule['label']}, {pairs} pairs"


def test_the_numbers_tell_wrong_rules_apart():
    # what the comparison above would catch: each change moves its cell by far more than the tolerance
    writes = Capacity(32, rewrites=True).examples(32)
    right = {name: float(writes.right(answers(rule, writes)).double().mean()) for name, rule in RULES.items()}
    assert right["armt"] - right["armt-uncorrected"] > 0.4
    assert right["delta"] - right["decay"] > 0.15
    assert right["delta"] - right["sum"] > 0.4
    assert probe(Setup("", "infini", key_norm=17), writes)["right"] < 0.06


def test_ages_and_counts_add_up(record: Record):
    for rule in record.measures["rules"]:
        for mode in ("distinct", "rewrites"):
            cell = rule[mode][32]
            assert sum(asked for _, asked, _ in cell["ages"].values()) == sum(cell["asked"])
            right = sum(right for right, _, _ in cell["ages"].values())
            assert right == pytest.approx(sum(r * n for r, n in zip(cell["right"], cell["asked"], strict=True)))
    decay = next(rule for rule in record.measures["rules"] if rule["rule"] == "decay")["distinct"][32]["ages"]
    newest, oldest = (decay[each] for each in (0, 5))
    assert newest[0] / newest[1] > 0.95
    assert oldest[0] / oldest[1] < 0.6


def test_states_are_as_large_as_said():
    for setup in SETUPS:
        state = RULES[setup.rule].init_state(1, setup.key_width, setup.value_width)
        assert sum(tensor.numel() for tensor in state.values()) == setup.floats
    sizes = {setup.label: setup.floats for setup in SETUPS}
    assert sizes["sum"] == 32 * 32
    assert sizes["ARMT"] == 192 * 32 + 192
    assert sizes["delta, keys as wide as ARMT's features"] == 192 * 32


def test_the_command_writes_a_record_that_tables_and_pictures_are_made_of(tmp_path):
    done = CliRunner().invoke(app, ["--pairs", "4,32", "--seeds", "0,1", "--reads", "256", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, ["--pairs", "0", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "pairs is 0" in refused.output
    record = Record.load(tmp_path / "capacity.json")
    assert record.config["seeds"] == [0, 1]
    made = table([record])
    assert len(made.split("\n\n")[0].splitlines()) == 2 + len(SETUPS) + 8
    assert "*any value of the key*" in made
    assert "ARMT" in table_of_earlier([record])
    assert "Not measured yet" in table([])
    pytest.importorskip("matplotlib")
    assert picture([record], tmp_path / "capacity.png").stat().st_size > 10_000


def test_elu_plus_one_is_positive():
    keys = torch.randn(1000, generator=generator(0)) * 5
    assert (elu_plus_one(keys) > 0).all()
    torch.testing.assert_close(elu_plus_one(keys), F.elu(keys) + 1)
