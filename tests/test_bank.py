"""The bank: what was appended stays, over chunks and forks."""

from __future__ import annotations

import copy
import random

import torch

from mnemic.bank import CHUNK, Bank


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32).view(1, 1, count, 1).expand(2, 3, count, 4)


def test_a_bank_holds_what_was_appended_across_chunks():
    bank, sizes = Bank(), [5, CHUNK - 7, 3, 2 * CHUNK + 1, 9]
    for size in sizes:
        bank = bank.append(numbered(bank.length, size), -numbered(bank.length, size))
    assert bank.length == sum(sizes)
    keys = bank.tensors()["keys"]
    assert torch.equal(keys[0], numbered(0, sum(sizes)))
    assert torch.equal(torch.cat(bank.values(1), 1), -numbered(0, sum(sizes))[1])
    starts = torch.tensor([[[0, CHUNK - 4, CHUNK, 2 * CHUNK + 8]]]).expand(3, 2, -1)
    found, values = (bank.runs(name, 0, starts, 4) for name in ("keys", "values"))
    wanted = (starts[..., None] + torch.arange(4)).flatten(2)
    assert torch.equal(found[..., 0], wanted.float())
    assert torch.equal(values[..., 0], -wanted.float())
    lower = bank.append(numbered(0, 1).bfloat16(), numbered(0, 1).bfloat16())
    assert lower.tensors()["keys"].dtype == torch.float32
    assert bank.nbytes == 2 * 2 * 3 * sum(sizes) * 4 * 4
    again = Bank.of(bank.tensors())
    assert torch.equal(again.tensors()["values"], bank.tensors()["values"])
    assert not bank.zeroed().tensors()["keys"].any()


def test_forks_of_a_bank_share_chunks_and_do_not_see_each_other():
    first = Bank().append(numbered(0, 6), numbered(0, 6))
    one, two = first.append(numbered(6, 3), numbered(6, 3)), first.append(numbered(50, 3), numbered(50, 3))
    assert one.chunks[0] is first.chunks[0]
    assert two.chunks[0] is not first.chunks[0]
    assert torch.equal(first.tensors()["keys"][0], numbered(0, 6))
    assert torch.equal(one.tensors()["keys"][0], numbered(0, 9))
    assert torch.equal(two.tensors()["keys"][0, :, :, 6:], numbered(50, 3))
    copied = copy.deepcopy(first).append(numbered(6, 3), numbered(6, 3))
    assert copied.chunks[0].used == 9, "a copy has nothing of what forks have read"
    longer = one.append(numbered(9, 1), numbered(9, 1))
    assert longer.chunks[0] is one.chunks[0]
    assert torch.equal(copied.append(numbered(9, 1), numbered(9, 1)).tensors()["keys"], longer.tensors()["keys"])


def test_any_forks_of_forks_hold_their_own(monkeypatch):
    for name, value in {"CHUNK": 64, "LEAST": 4, "STEP": 16}.items():
        monkeypatch.setattr(f"mnemic.bank.{name}", value)
    source = random.Random(0)
    known = [(Bank(), torch.zeros(2, 3, 0, 4))]
    for number in range(40):
        bank, keys = source.choice(known)
        more = torch.randn(2, 3, source.choice([1, 3, 4, 17, 40, 90]), 4, generator=torch.manual_seed(number))
        known.append((bank.append(more, -more), torch.cat([keys, more], 2)))
        if number % 2:
            known[-1][0].means(1, 2)
    for bank, keys in known[1:]:
        count, whole = keys.shape[2], keys.shape[2] // 4 * 4
        assert torch.equal(bank.tensors()["keys"][0], keys)
        assert torch.equal(bank.tensors()["values"][0], -keys)
        assert torch.equal(bank.means(1, 2), keys[1, :, :whole].unflatten(1, (-1, 2)).mean(2).mT)
        assert torch.equal(bank.first(0, 21)[0], keys[0, :, :21])
        start = torch.randint(0, -(-count // 2), (3, 2, 5), generator=torch.manual_seed(count)) * 2
        found = bank.runs("keys", 1, start, 2)
        for head in range(3):
            place = (start[head, ..., None] + torch.arange(2)).flatten(1).clamp_max(count - 1)
            there = (start[head, ..., None] + torch.arange(2)).flatten(1) < count
            assert torch.equal(found[head][there], keys[1, head][place][there])


def test_forks_that_read_on_first_leave_few_chunks(monkeypatch):
    for name, value in {"CHUNK": 512, "LEAST": 4, "STEP": 128}.items():
        monkeypatch.setattr(f"mnemic.bank.{name}", value)
    bank, source = Bank(), random.Random(0)
    for _ in range(300):
        more = numbered(bank.length, source.choice([1, 4, 5, 30]))
        bank.append(-more, more)
        before, bank = bank, bank.append(more, -more)
        if source.random() < 0.3:
            bank.means(0, 2)
            before.append(-more, more)
    assert bank.length > 2000
    assert len(bank.chunks) < 2 * bank.length / 512 + 7
    assert torch.equal(bank.tensors()["keys"][0], numbered(0, bank.length))
    assert torch.equal(bank.means(0, 2), Bank.of(bank.tensors()).means(0, 2))
