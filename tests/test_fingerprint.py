"""Whose a file is: fingerprints of bases and memories in every dtype and shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mnemic
from families import FAMILIES, make
from helpers import CONFIGS, SEGMENT, every_kind, host, tokens, trained
from mnemic.host.anatomy import fingerprint
from mnemic.host.remembered import remembered
from mnemic.keeping import fingerprint_of

PACKED = [torch.uint4, torch.float4_e2m1fn_x2, torch.bits8]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_is_the_same_in_float32_and_bfloat16(name):
    first = fingerprint(make(name).to(torch.bfloat16))
    assert first == fingerprint(make(name)) == fingerprint(make(name).double())
    assert first != fingerprint(make(name, seed=1).to(torch.bfloat16))


def test_float16_is_a_base_of_its_own_unless_it_rounds_nothing(tmp_path):
    exact = make("llama")
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.to(torch.float16))
    known = fingerprint(exact)
    assert fingerprint(exact.to(torch.float16)) == known == fingerprint(exact.to(torch.float32))
    model, narrow = host("llama", CONFIGS["emt-0"]), make("llama").to(torch.float16)
    mnemic.attached(model).save_pretrained(tmp_path)
    with pytest.raises(
        mnemic.StateError, match=r"this one is .* in float16, whose rounding makes another base of wider weights"
    ):
        mnemic.from_pretrained(narrow, tmp_path)
    mnemic.from_pretrained(narrow, tmp_path, strict=False).save_pretrained(tmp_path)
    mnemic.from_pretrained(make("llama").to(torch.float16), tmp_path)


@pytest.mark.parametrize("dtype", [*DTYPES, *PACKED], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 0), (3,), (40, 33)], ids=str)
def test_any_dtype_and_shape(dtype, shape):
    def base(fill: int) -> nn.Module:
        model = make("llama")
        if dtype in PACKED:
            tensor = torch.full(shape, fill, dtype=torch.uint8).view(dtype)
        else:
            tensor = torch.full(shape, fill, dtype=torch.float32).to(dtype)
        model.odd = nn.Parameter(tensor, requires_grad=False)
        return model

    one, other = base(1), base(0)
    assert fingerprint(one) == fingerprint(base(1))
    assert (fingerprint(one) != fingerprint(other)) is bool(one.odd.numel())
    assert "=" not in fingerprint(one)


def test_strides_are_no_part_of_it():
    plain, strided = make("llama"), make("llama")
    strided.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().T.contiguous().T)
    assert not strided.lm_head.weight.is_contiguous()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert fingerprint(plain.to(dtype)) == fingerprint(strided.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool], ids=str)
def test_what_is_remembered_is_told_from_what_changed(dtype):
    module, asked = nn.Module(), []
    module.weight = nn.Parameter(torch.zeros(40).to(dtype), requires_grad=False)
    module.scale = nn.Parameter(torch.tensor(torch.nan))

    def compute() -> str:
        asked.append(1)
        return str(len(asked))

    assert remembered(module, compute) == remembered(module, compute) == "1"
    module.weight.data[18:24] = torch.ones(6).to(dtype)
    assert remembered(module, compute) == "2"


# --- sessions --------------------------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_a_session_goes_on_in_the_other_dtype(config):
    """Of the same base with the same memory, both ways, window and all."""
    models = {dtype: make("llama").to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for model in models.values():
        trained(model, config)
    assert len({fingerprint_of(mnemic.attached(model).router) for model in models.values()}) == 1
    for there, here in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        session = mnemic.Session(models[there], window=2 * SEGMENT)
        session.read(tokens(1, 21))
        again = mnemic.Session.from_bytes(session.to_bytes(), models[here])
        expected, logits = (each.forward(tokens(1, 4, 3)).logits.float() for each in (session, again))
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits, expected, atol=0.2, rtol=0.1)
        again.read(tokens(1, 20, 4))
        assert mnemic.Session.from_bytes(again.to_bytes(), models[here]).stream.seen == (45,)
