"""A segment's border is no border between tokens: the first token of a segment knows the one before it."""

from __future__ import annotations

import pytest
import torch

import mnemic
from helpers import CONFIGS

SHIFTED = {
    "fast-weights": mnemic.FastWeightsConfig(segment_length=8, dim=16, heads=2),
    "gated delta": mnemic.FastWeightsConfig(segment_length=8, dim=16, heads=2, rule="gated delta"),
    "knn": mnemic.KNNConfig(segment_length=8, dim=16, heads=2, size=64),
    "titans": mnemic.TitansConfig(segment_length=8, dim=16, heads=2, chunk=1),
}


@pytest.mark.small
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("config", SHIFTED.values(), ids=list(SHIFTED))
@torch.no_grad()
def test_two_segments_are_one(config, padding):
    memory = config.build(64, 2)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden, first = torch.randn(2, 8, 64), memory.init_state(2)
    whole, parts = memory.write(hidden, first), first
    for part in hidden.split(4, 1):
        padded = torch.cat([torch.randn(2, padding, 64), part, torch.randn(2, padding, 64)], 1)
        keep = torch.zeros(2, 4 + 2 * padding, dtype=torch.bool)
        keep[:, padding : padding + 4] = True
        parts = memory.write(padded, parts, keep if padding else None)
    assert whole.keys() == parts.keys() == first.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=1e-5)
    # the border would be one without it
    alone = memory.write(hidden[:, 4:], memory.write(hidden[:, :4], first) | {"last": first["last"]})
    assert any((alone[name].float() - tensor.float()).abs().max() > 1e-3 for name, tensor in whole.items())


def test_names_that_earlier_files_lack_are_of_the_state():
    """Of every mechanism that has such names, one of its forms has them."""
    for kind, cls in mnemic.CONFIGS.items():
        if kind == "several":  # whose names are those of its members
            continue
        memories = [config.build(64, 2) for config in cls.tiny()]
        states = [memory.init_state(1) for memory in memories]
        for memory in memories:
            assert all(any(name in state for state in states) for name in memory.newer), kind
    assert "last" in CONFIGS["fast-weights-0"].build(64, 2).newer
