"""Sites: their order, what is refused, and that a host installs what a memory names and nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import mnemic
from families import DEPTH, WIDTH, make
from helpers import CONFIGS, FIRST_FORMS, SEGMENT, assert_near, feed, shake, stream, tokens
from mnemic import Site
from mnemic.host.cache import DynamicCache
from mnemic.host.sites import check
from mnemic.memories.emt import EMT, EMTConfig
from mnemic.memories.recall import RecallConfig


def test_sites_are_ordered_as_a_forward_pass_meets_them():
    places = ["input", "attention", "ffn", "output", "logits"]
    sites = [Site(layer, at) for layer in (0, 1) for at in places]
    assert sorted([*sites[5:], *sites[:5]]) == sites
    assert Site(3) == Site(3, "output")
    assert str(Site(3)) == "output of block 3"


@pytest.mark.small
def test_importing_the_contract_loads_no_mechanism():
    script = (
        "import sys, mnemic.memory\n"
        "print(*sorted(name for name in sys.modules if name.startswith(('mnemic.memories.', 'transformers'))))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["mnemic.memories.registry", "mnemic.memories.settings"]


class Elsewhere(EMT):
    """An EMT that names sites as it is told."""

    at: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args) -> None:
        super().__init__(*args)
        vars(self).update(self.at)

    def read(self, site, hidden_btd, state):
        return super().read(Site(0), hidden_btd, state)


def elsewhere(monkeypatch, name, **at):
    """A model with such a memory."""
    monkeypatch.setattr(Elsewhere, "at", at)
    monkeypatch.setattr(EMTConfig, "build", lambda self, width, depth, causal=True: Elsewhere(self, width, depth))
    model = make(name)
    torch.manual_seed(0)
    shake(mnemic.attach(model, FIRST_FORMS["emt"]).memory)
    return model


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            {"reads": (Site(0, "ffn"),)},
            "Elsewhere reads ffn of block 0, which is not served: no mechanism",
        ),
        ({"writes": (Site(1, "ffn"),)}, "writes ffn of block 1, .*; there are input, attention, output, logits"),
        ({"reads": (Site(0, "logits"),)}, "reads logits of block 0, but those stand behind the last block, 1"),
        ({"writes": (Site(0, "logits"),)}, "writes logits of block 0, but those stand behind the last block, 1"),
        ({"writes": (), "takes_ids": True}, "takes the ids of tokens that are written, and writes none"),
        (
            {"writes": (Site(0, "attention"),)},
            "writes inside attention, when keys leave the window, and has other sites",
        ),
        ({"reads": (Site(2),)}, r"reads output of block 2, but the model has blocks 0 \.\. 1"),
        ({"reads": (Site(-1),)}, r"reads output of block -1, but the model has blocks 0 \.\. 1"),
        ({"writes": (Site(1), Site(0))}, "writes output of block 0 after output of block 1; name sites in their order"),
    ],
)
def test_a_site_that_is_not_served_is_refused(monkeypatch, at, message):
    plain = make("llama")
    with pytest.raises(ValueError, match=message):
        elsewhere(monkeypatch, "llama", **at)
    assert not any(module._forward_hooks for module in plain.modules())


def test_a_memory_that_reads_hidden_states_says_how():
    memory = RecallConfig(segment_length=SEGMENT, window=SEGMENT).build(64, 2)
    check(memory, 2)
    memory.reads = (Site(0), *memory.reads)
    with pytest.raises(ValueError, match=r"Recall reads output of block 0 and has no way to; write its read\(\)"):
        check(memory, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert"])
def test_what_enters_a_block_is_what_the_one_before_it_puts_out(monkeypatch, name):
    ids, results = tokens(2, 4 * SEGMENT), []
    for at in (Site(0), Site(1, "input")):
        model = elsewhere(monkeypatch, name, reads=(at,), writes=(at,))
        carried = None if name == "bert" else DynamicCache(config=model.config)
        logits = feed(model, ids, carried=carried)
        results.append((logits, None if carried is None else stream(carried).state["slots"]))
    (one, slots), (other, its) = results
    assert torch.equal(one, other)
    assert slots is None or torch.equal(slots, its)


@torch.no_grad()
def test_what_is_written_before_it_is_read_may_come_from_the_same_block(monkeypatch):
    # read at the input of block 1 and written at the output of block 0: nothing lies between
    ids, results = tokens(2, 4 * SEGMENT), []
    for reads, writes in ((Site(0), Site(0)), (Site(1, "input"), Site(0))):
        model = elsewhere(monkeypatch, "llama", reads=(reads,), writes=(writes,))
        assert not mnemic.attached(model).memory.writes_see_reads
        results.append(feed(model, ids))
    assert_near(*results)


def hooks_of(model: nn.Module) -> dict[str, int]:
    """How many hooks each block has before and after it."""
    blocks = mnemic.attached(model).anatomy.blocks
    before = {f"input_{i}": len(block._forward_pre_hooks) for i, block in enumerate(blocks)}
    after = {f"output_{i}": len(block._forward_hooks) for i, block in enumerate(blocks)}
    return before | after | {f"logits_{len(blocks) - 1}": len(model.lm_head._forward_hooks)}


@pytest.mark.parametrize("label", CONFIGS)
def test_hooks_stand_where_a_memory_names_sites(label):
    memory = CONFIGS[label].build(WIDTH, DEPTH)
    if memory.beside:
        pytest.skip("memory tokens enter every block")
    model = make("llama")
    mnemic.attach(model, CONFIGS[label])
    between = [site for site in (*memory.hidden_reads, *memory.writes) if site.at not in ("attention", "logits")]
    named = {f"{site.at}_{site.layer}" for site in (*between, *memory.logits_reads)}
    assert {place for place, count in hooks_of(model).items() if count} == named
