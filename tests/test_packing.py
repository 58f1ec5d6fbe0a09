"""Keys and values kept in a byte a number: how far off they are, and that they are packed once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_near, random_cuts, tokens
from mnemic.bank import Bank
from mnemic.memories.recall import RecallConfig
from mnemic.memory import Site
from mnemic.packing import pack, products, unpack
from test_recall_choice import SMALL, asked_of, assert_equals_naive

PACKED = ["int8", "fp8"]
every_packing = pytest.mark.parametrize("stored", PACKED)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def recalling(stored, **settings):
    model = make("llama")
    mnemic.attach(model, RecallConfig(**{**SMALL, "budget": 8, "stored": stored, **settings}))
    return model


def never(*_):
    raise AssertionError("packed again")


@every_packing
def test_what_is_packed_is_as_near_as_its_codes_are(stored):
    x = numbers(2, 3, 50, 8) * torch.logspace(-12, 12, 50)[:, None]
    x[0, 0, 3], x[1, 2, 5, 1:] = 0, 0
    packed = pack("keys", x, stored)
    again, scale, most = unpack("keys", packed), packed["keys_scale"], x.abs().amax(-1, keepdim=True)
    bound = scale / 2 if stored == "int8" else torch.maximum(x.abs() / 16, scale / 1024)
    assert ((again - x).abs() <= bound * (1 + 1e-4)).all()
    assert not again[x == 0].any()
    assert_near(again.abs().amax(-1, keepdim=True) / most.clamp_min(1e-30), (most > 0).float(), 1e-5)
    if stored == "fp8":
        assert torch.equal(packed["keys"].view(torch.float8_e4m3fn).float() * scale, again)
    assert sum(t.numel() * t.element_size() for t in packed.values()) == 2 * 3 * 50 * (8 + 4)


@pytest.mark.parametrize("stored", ["base", *PACKED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_with_the_numbers_again(dtype, stored, monkeypatch):
    monkeypatch.setattr("mnemic.packing.AT_ONCE", 5)
    query, packed = numbers(3, 4, 8), pack("keys", numbers(3, 17, 8, seed=1).to(dtype), stored)
    assert_near(products(query, "keys", packed), query @ unpack("keys", packed).float().mT, 1e-5)
    none = {name: tensor[:, :0] for name, tensor in packed.items()}
    assert products(query, "keys", none).shape == (3, 4, 0)


@every_packing
def test_a_bank_packs_once_however_tokens_come(stored, monkeypatch):
    for name, value in {"CHUNK": 64, "LEAST": 4, "STEP": 16}.items():
        monkeypatch.setattr(f"mnemic.bank.{name}", value)
    keys, values = numbers(2, 3, 150, 8), numbers(2, 3, 150, 4, seed=1)
    whole = Bank(stored=stored).append(keys, values)
    for seed in range(3):
        bank = Bank(stored=stored)
        cuts = random_cuts(150, seed)
        for its_keys, its_values in zip(keys.split(cuts, 2), values.split(cuts, 2), strict=True):
            bank.append(its_keys + 1, its_values)  # a fork, which reads on first
            bank = bank.append(its_keys, its_values)
        assert_same(bank, whole)
    monkeypatch.setattr("mnemic.bank.pack", never)
    for again in (Bank.of(whole.tensors(), stored), pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert again.stored == stored
        assert_same(again, whole)
        assert torch.equal(again.means(0, 2), whole.means(0, 2))
    shorter = whole.without(10, 139)
    assert torch.equal(shorter.tensors()["keys"], whole.tensors()["keys"][:, :, :, [*range(10), *range(140, 150)]])
    assert whole.without(0, 149).stored == stored
    assert not torch.cat(whole.zeroed().keys(0), 1).any()
    assert whole.nbytes == 2 * 3 * 150 * (8 + 4 + 4 + 4)


@every_packing
def test_a_bank_gives_the_numbers_again(stored, monkeypatch):
    for name, value in {"CHUNK": 64, "LEAST": 4, "STEP": 16}.items():
        monkeypatch.setattr(f"mnemic.bank.{name}", value)
    keys, values = numbers(2, 3, 150, 8), numbers(2, 3, 150, 4, seed=1)
    bank = Bank(stored=stored).append(keys, values)
    for given, came in ((bank.keys, keys), (bank.values, values)):
        assert_near(torch.cat(given(1), 1), came[1], 0.1)
    first = bank.first(1, 70)
    assert torch.equal(first[0], torch.cat(bank.keys(1), 1)[:, :70])
    start = torch.tensor([0, 20, 64, 146])[None, None].expand(3, 2, -1)
    place = (start[0, 0, :, None] + torch.arange(2)).flatten()
    assert torch.equal(bank.runs("values", 1, start, 2)[:, 1], torch.cat(bank.values(1), 1)[:, place])
    query = numbers(3, 5, 8)
    assert_near(bank.products(query, 1), query @ torch.cat(bank.keys(1), 1).mT, 1e-5)


def assert_same(bank, expected):
    kept = expected.tensors()
    assert bank.tensors().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in bank.tensors().items())


@pytest.mark.parametrize("settings", [{}, {"search": "candidates", "wider": 1}, {"choice": "bounds"}])
@every_packing
def test_fast_equals_naive(stored, settings, monkeypatch):
    monkeypatch.setattr("mnemic.bank.LEAST", 8)
    memory, asked = (
        RecallConfig(**SMALL, budget=12, stored=stored, **settings).build(64, 1),
        asked_of(41, stored=stored),
    )
    assert_equals_naive(memory, asked)
    assert memory.further(Site(0, "attention"), asked).keys_ktms.dtype == torch.float32


def assert_as_near_as_keys_are(bank, expected):
    """The base's keys of two cuts differ in their last bits, which now and then makes another code of one."""
    kept, wanted = bank.tensors(), expected.tensors()
    for name in ("keys", "values"):
        assert_near(kept[f"{name}_scale"], wanted[f"{name}_scale"], 1e-5)
        assert (kept[name] != wanted[name]).float().mean() < 0.002
        assert_near(unpack(name, kept), unpack(name, wanted), float(wanted[f"{name}_scale"].max()) * 40)


# --- sessions --------------------------------------------------------------------------------------------------------


@every_packing
@torch.no_grad()
def test_any_cut_of_a_call_and_any_batch_keeps_the_same(stored):
    model, ids = recalling(stored), tokens(2, 9 * SEGMENT + 3)
    alone = []
    for row in ids:
        session = mnemic.Session(model)
        session.read(row[None])
        alone.append(session)
    for seed in range(2):
        session = mnemic.Session(model)
        for part in ids[:1].split(random_cuts(ids.shape[1], seed), 1):
            session.read(part)
        assert_as_near_as_keys_are(session.stream.banks[0], alone[0].stream.banks[0])
    both = [mnemic.Session(model), mnemic.Session(model)]
    mnemic.batch(both).read(list(ids[:, None]))
    for session, its in zip(both, alone, strict=True):
        assert_as_near_as_keys_are(session.stream.banks[0], its.stream.banks[0])


@every_packing
@torch.no_grad()
def test_a_saved_session_goes_on_to_the_bit(stored, tmp_path, monkeypatch):
    model, question = recalling(stored), tokens(1, 5, 3)
    session = mnemic.Session(model)
    session.read(tokens(1, 12 * SEGMENT + 3))
    session.save(tmp_path / "s.memory")
    with monkeypatch.context() as patched:
        patched.setattr("mnemic.bank.pack", never)
        again = mnemic.Session.load(tmp_path / "s.memory", model)
        (bank,), (before,) = again.stream.banks, session.stream.banks
        assert_same(bank, before)
        tensors = again.contents()[0]
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in session.contents()[0].items())
    for each in (again, session):
        each.read(tokens(1, 4 * SEGMENT, 7))
    assert_same(again.stream.banks[0], session.stream.banks[0])
    assert torch.equal(again.fork().forward(question).logits, session.forward(question).logits)
    # a base in another dtype goes on with the same codes
    lower = copy.deepcopy(model).to(torch.bfloat16)
    other = mnemic.Session.load(tmp_path / "s.memory", lower, strict=False)
    assert_same(other.stream.banks[0], bank)
    assert other.forward(question).logits.dtype == torch.bfloat16
    # nor does it forget how, when nothing is left
    assert again.forget(0, SEGMENT - 1) == SEGMENT
    assert again.forget(SEGMENT, again.stream.seen[0] - again.cache.window.context[0] - 1) > 0
    again.read(tokens(1, 4 * SEGMENT, 7))
    assert again.stream.banks[0].stored == stored


CHANGES = {
    "codes": (lambda t: t | {"bank.keys": t["bank.keys"].float()}, "bank.keys is .* of torch.int8"),
    "bytes": (lambda t: t | {"bank.keys": t["bank.keys"].view(torch.uint8)}, "bank.keys is .* of torch.int8"),
    "lost": (lambda t: {n: x for n, x in t.items() if n != "bank.keys_scale"}, "it lacks bank.keys_scale"),
    "half": (lambda t: t | {"bank.values_scale": t["bank.values_scale"].half()}, "bank.values_scale is .*float32"),
    "short": (lambda t: t | {"bank.values_scale": t["bank.values_scale"][..., 1:, :]}, "bank.values_scale is"),
    "nan": (lambda t: t | {"bank.keys_scale": t["bank.keys_scale"] * torch.nan}, "bank.keys_scale is NaN"),
    "below": (lambda t: t | {"bank.keys_scale": -t["bank.keys_scale"]}, "scales are 0 or more"),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_packed_bank_that_no_session_makes_is_refused(change, tmp_path):
    model = recalling("int8")
    session = mnemic.Session(model)
    session.read(tokens(1, 6 * SEGMENT))
    tensors, meta = session.contents()
    edit, said = CHANGES[change]
    mnemic.state.write_file(tmp_path / "s.memory", edit(tensors), meta)
    with pytest.raises(mnemic.StateError, match=said):  # numbers are looked at when they are used
        mnemic.Session.load(tmp_path / "s.memory", model).forward(tokens(1, 2))
    with pytest.raises(mnemic.StateError, match=said):
        mnemic.Session.from_bytes((tmp_path / "s.memory").read_bytes(), model)


@pytest.mark.parametrize(("mine", "theirs"), [("base", "int8"), ("int8", "base"), ("int8", "fp8")])
@torch.no_grad()
def test_a_bank_stored_in_another_way_is_refused(mine, theirs):
    session = mnemic.Session(recalling(mine))
    session.read(tokens(1, 6 * SEGMENT))
    model = recalling(theirs)
    with pytest.raises(mnemic.StateError, match="stored"):
        mnemic.Session.from_bytes(session.to_bytes(), model)
    with pytest.raises(mnemic.StateError, match="bank"):
        mnemic.Session.from_bytes(session.to_bytes(), model, strict=False)
    two = make("llama")
    config = RecallConfig(**SMALL, budget=8, stored=mine)
    mnemic.attach(two, [config, mnemic.EMTConfig(segment_length=SEGMENT, window=16, slots=4, dim=16)])
    session = mnemic.Session(two)
    session.read(tokens(1, 6 * SEGMENT))
    assert session.stream.banks[0].stored == mine
