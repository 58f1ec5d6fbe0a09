"""PEFT: adapters on the base beside a memory, in both orders, saved, loaded and merged; and what must be refused."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import mnemic
from example_scripts import run
from families import make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_differ,
    assert_near,
    feed,
    host,
    matrix,
    shake,
    tokens,
    trained,
    trains,
)
from mnemic.host.anatomy import fingerprint

LORA = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
OUTSIDE = r".*\bmnemic\b.*"


def lora(**settings):
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)


def tune(model, seed=1):
    """Moves the adapters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@matrix(LORA)
def test_a_memory_over_adapters(config, name, tmp_path):
    ids, settings = tokens(2, 3 * SEGMENT), lora(target_modules=LORA[name])
    expected = feed(host(name, config), ids)
    model = peft.get_peft_model(make(name), settings)
    attachment = trained(model, config)
    assert_near(feed(model, ids), expected, 0)  # LoRA starts as the identity
    mnemic.Session(model).read(ids[:1])
    assert model.generate(ids[:, :11], max_new_tokens=3, min_new_tokens=3).shape == (2, 14)
    # a memory saved over the adapter fits the bare base, and the other way round
    attachment.save_pretrained(tmp_path)
    bare = make(name)
    mnemic.from_pretrained(bare, tmp_path)
    assert torch.equal(feed(bare, ids), expected)
    wrapped = peft.get_peft_model(make(name), settings)
    mnemic.from_pretrained(wrapped, tmp_path)
    assert torch.equal(feed(wrapped, ids), expected)
    # attaching with freeze=False leaves the adapter to train beside the memory
    both = peft.get_peft_model(make(name), settings)
    mnemic.attach(both, config, freeze=False)
    both(ids, labels=ids).loss.backward()
    moved = {key for key, parameter in both.named_parameters() if parameter.grad is not None}
    assert any("lora_" in key for key in moved)
    assert any(".mnemic." in key for key in moved) or not trains(model)
    assert all("lora_" in key or ".mnemic." in key for key in moved)


def adapted(order, name="llama", label="emt-0"):
    """A model with a memory and adapters that both train, wrapped and attached in this order."""
    settings = lora(target_modules="all-linear", exclude_modules=OUTSIDE)
    if order == "memory last":
        model = peft.get_peft_model(make(name), settings)
        mnemic.attach(model, CONFIGS[label], freeze=False)
    else:
        model = make(name)
        mnemic.attach(model, CONFIGS[label])
        model = peft.get_peft_model(model, settings)
        mnemic.attached(model).memory.requires_grad_(True)
    return model


@pytest.mark.parametrize("order", ["memory last", "memory first"])
def test_saved_loaded_and_merged(order, tmp_path):
    ids = tokens(2, 3 * SEGMENT)
    model, base = adapted(order), make("llama")
    assert fingerprint(model) == fingerprint(base)
    assert all("lora_" in key or ".mnemic." in key for key in trainable(model))
    assert not any("lora_" in key and ".mnemic." in key for key, _ in model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        mnemic.unroll(model, ids, ids).loss.backward()
        optimizer.step()
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert any("lora_B" in key for key in moved)
    assert any(".mnemic." in key for key in moved)
    tune(model)
    shake(mnemic.attached(model).memory)
    expected = feed(model, ids)
    with mnemic.attached(model).disabled():
        assert_differ(feed(model, ids), expected)
    with model.disable_adapter():
        assert_differ(feed(model, ids), expected)

    # two folders; a fresh base takes them in either order
    model.save_pretrained(tmp_path / "adapter")
    mnemic.attached(model).save_pretrained(tmp_path / "memory")
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "adapter")
    mnemic.from_pretrained(again, tmp_path / "memory")
    assert torch.equal(feed(again, ids), expected)
    other = make("llama")
    mnemic.from_pretrained(other, tmp_path / "memory")
    other = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(feed(other, ids), expected)

    # a session belongs to base and memory; adapters do not change whose it is
    session = mnemic.Session(model)
    session.read(ids[:1])
    session.save(tmp_path / "alice.memory")
    continued = mnemic.Session.load(tmp_path / "alice.memory", again)
    assert torch.equal(continued.forward(ids[1:]).logits, session.forward(ids[1:]).logits)

    # merged, the memory stays where it is; the base is another one now, and is saved without the memory
    merged = model.merge_and_unload()
    assert_near(feed(merged, ids), expected)
    attachment = mnemic.attached(merged)
    attachment.save_pretrained(tmp_path / "merged-memory")
    kept = feed(merged, ids)
    attachment.detach()
    merged.save_pretrained(tmp_path / "merged-base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-base").eval()
    with pytest.raises(mnemic.StateError, match="was written for base model"):
        mnemic.from_pretrained(loaded, tmp_path / "memory")
    mnemic.from_pretrained(loaded, tmp_path / "merged-memory")
    assert torch.equal(feed(loaded, ids), kept)


def test_the_recipe(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    left = run("lora_and_memory.py", tmp_path / "base", tmp_path)
    ids = tokens(2, 3 * SEGMENT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = feed(left["again"], ids)
    with mnemic.attached(left["again"]).disabled():
        assert_differ(feed(left["again"], ids), expected, 1e-6)
    mnemic.from_pretrained(merged, tmp_path / "merged-memory")
    assert_near(feed(merged, ids), expected)


def test_adapters_inside_a_memory_are_refused(tmp_path):
    model, ids = host("llama", CONFIGS["emt-0"]), tokens(2, 2 * SEGMENT)
    model = peft.get_peft_model(model, lora(target_modules="all-linear"))
    assert any("lora_" in name for name, _ in mnemic.attached(model).memory.named_parameters())
    for use in (
        lambda: model(ids, labels=ids),
        lambda: mnemic.unroll(model, ids, ids),
        lambda: mnemic.attached(model).save_pretrained(tmp_path / "memory"),
    ):
        with pytest.raises(ValueError, match=r"PEFT put Linear around the memory's .*exclude_modules"):
            use()
    assert not (tmp_path / "memory").exists()
    # what the message says mends it
    mended = peft.get_peft_model(
        host("llama", CONFIGS["emt-0"]), lora(target_modules="all-linear", exclude_modules=OUTSIDE)
    )
    assert torch.equal(feed(mended, ids), feed(host("llama", CONFIGS["emt-0"]), ids))


def test_a_memory_among_modules_to_save_is_refused():
    model, ids = host("llama", CONFIGS["emt-0"]), tokens(2, SEGMENT)
    model = peft.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["mnemic"]))
    for use in (lambda: model(ids, labels=ids), lambda: mnemic.Session(model)):
        with pytest.raises(RuntimeError, match="a ModulesToSaveWrapper stands in the memory's place"):
            use()


def test_a_memory_that_peft_froze_says_so():
    model, ids = host("llama", CONFIGS["emt-0"]), tokens(2, 2 * SEGMENT)
    model = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    assert all("lora_" in key for key in trainable(model))
    with pytest.warns(UserWarning, match="the memory is frozen while other weights train"):
        mnemic.unroll(model, ids, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mnemic.attached(model).memory.requires_grad_(True)
        mnemic.unroll(model, ids, ids).loss.backward()
        # frozen on purpose, with nothing else that trains, is no reason to warn
        alone = host("llama", CONFIGS["emt-0"])
        mnemic.attached(alone).memory.requires_grad_(False)
        alone(ids, labels=ids)
    assert all(parameter.grad is not None for parameter in mnemic.attached(model).parameters())


ADAPTERS = {
    "lora": lora(target_modules=["q_proj"]),
    "dora": lora(target_modules=["q_proj"], use_dora=True),
    "head": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=2),
    "loha": peft.LoHaConfig(target_modules=["q_proj"], r=2),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_leave_the_base_the_same_base(kind):
    base = make("llama")
    expected = fingerprint(base)
    assert fingerprint(peft.get_peft_model(base, ADAPTERS[kind])) == expected
