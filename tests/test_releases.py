"""One code for several releases of transformers: what they call the cache, and what is said of those to come."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, feed, host, tokens
from mnemic.host import release
from mnemic.host.release import CACHE_NAMES, GENERATE_CACHE, OUTPUT_CACHE, cache_name, renamed


def test_what_the_cache_is_called_is_found_and_not_guessed():
    name = "cache" if release.RELEASE >= (5, 24) else "past_key_values"
    assert name == GENERATE_CACHE == OUTPUT_CACHE
    assert cache_name(make("llama")) == GENERATE_CACHE
    assert cache_name(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("called", CACHE_NAMES)
def test_a_trunk_takes_the_cache_under_either_name(called):
    model, ids = host("gpt2", CONFIGS["emt-0"]), tokens(1, 3 * SEGMENT)
    expected = feed(model, ids, [SEGMENT + 3, 2 * SEGMENT - 3])
    cache = DynamicCache(config=model.config)
    model.transformer(ids[:, : SEGMENT + 3], **{called: cache})
    hidden = model.transformer(ids[:, SEGMENT + 3 :], **{called: cache})[0]
    torch.testing.assert_close(model.lm_head(hidden), expected[:, SEGMENT + 3 :], atol=1e-5, rtol=1e-5)


def test_of_two_names_the_one_that_holds_a_cache_counts():
    model, cache = make("llama"), DynamicCache()
    own = cache_name(model)
    other = next(name for name in CACHE_NAMES if name != own)
    assert renamed(model, {other: cache})[own] is cache
    assert renamed(model, {own: cache, other: None}) == {own: cache}
    assert renamed(model, {own: None, other: cache}) == {own: cache}


class OlderTrunk(torch.nn.Module):
    """As code that comes with a checkpoint was written before 5.24."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None):
        return past_key_values


def test_code_that_comes_with_a_checkpoint_keeps_its_own_name():
    assert renamed(OlderTrunk(), {"cache": 1, "use_cache": True}) == {"past_key_values": 1, "use_cache": True}


def test_no_word_of_deprecation(caplog):
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            model, ids = host("llama", CONFIGS["emt-0"]), tokens(1, 2 * SEGMENT)
            session, other = mnemic.Session(model), mnemic.Session(model)
            session.read(ids)
            session.generate(ids[:, :3], max_new_tokens=2, do_sample=False)
            list(session.answer(ids[:, :3], max_new_tokens=2, do_sample=False))
            mnemic.batch([session, other]).generate([ids, ids[:, :4]], max_new_tokens=2, do_sample=False)
            mnemic.batch([session, other]).forward([ids, ids[:, :4]])
            labels = ids.clone()
            next(iter(mnemic.train(model, lambda step: mnemic.Batch(ids, labels), steps=1)))
            feed(host("llama", CONFIGS["rmt-0"]), ids)
    finally:
        transformers.utils.logging.disable_propagation()
        transformers.logging.set_verbosity_error()
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


def test_a_release_to_come_is_named_where_something_is_missing(monkeypatch):
    class Trunk(type(make("llama").model)):
        def forward(self, input_ids=None, history=None, **kwargs):
            raise AssertionError

    model = make("llama")
    model.model.__class__ = Trunk
    with pytest.raises(ValueError, match=r"takes no cache of keys \(cache or past_key_values\), which a memory rides$"):
        mnemic.attach(model, CONFIGS["emt-0"])
    monkeypatch.setattr(release, "RELEASE", (6, 1))
    monkeypatch.setattr(release, "VERSION", "6.1.0")
    known = ".".join(map(str, release.KNOWN))
    with pytest.raises(
        ValueError, match=rf"transformers 6\.1\.0 is newer than {known}, .* 'transformers=={known}\.\*'"
    ):
        mnemic.attach(model, CONFIGS["emt-0"])


@pytest.mark.parametrize(
    ("config", "cls", "kept"),
    [
        (transformers.MambaConfig, transformers.MambaForCausalLM, "without attention"),
        (transformers.FalconH1Config, transformers.FalconH1ForCausalLM, "LinearAttention"),
    ],
)
def test_recurrent_caches_are_told_by_what_they_keep(config, cls, kept):
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 97, "intermediate_size": 64}
    if config is transformers.FalconH1Config:
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4}
        settings |= {"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    with pytest.raises(ValueError, match=kept):
        mnemic.attach(cls(config(**settings)), CONFIGS["emt-0"])
