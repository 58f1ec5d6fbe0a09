"""A model whose blocks lie on the disk: `device_map="auto"` and accelerate's hooks, before and after attaching."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import mnemic
from example_scripts import run
from families import make
from helpers import CONFIGS, SEGMENT, feed, host, tokens, trained
from mnemic.host.anatomy import fingerprint

# one that reads from blocks, one with memory tokens at the embeddings, one that calls blocks for keys alone
LABELS = ["emt-0", "rmt-0", "transformer-xl-0"]
TRUNKS = {"llama": ("model", "layers"), "gpt2": ("transformer", "h")}


def device_map(name, **more):
    """Blocks on the disk, the rest in memory."""
    trunk, blocks = TRUNKS[name]
    rest = {"llama": ["embed_tokens", "norm", "rotary_emb"], "gpt2": ["wte", "wpe", "ln_f"]}[name]
    return {
        **{f"{trunk}.{part}": "cpu" for part in rest},
        **{f"{trunk}.{blocks}.{index}": "disk" for index in range(2)},
        "lm_head": "cpu",
        **{f"{trunk}.{part}": device for part, device in more.items()},
    }


def loaded(name, folder):
    """As `from_pretrained` loads what does not fit: here all but 100 kB goes to the disk."""
    make(name).save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map="auto", max_memory={"cpu": 100_000}, offload_folder=folder / "offload"
    ).eval()


def dispatched(name, folder):
    return dispatch_model(make(name), device_map(name), offload_dir=folder / "offload")


def on_disk(name, folder):
    model = make(name)
    disk_offload(model, folder / "offload")
    return model


def in_ram(name, folder):
    return cpu_offload(make(name))


def offloaded_blocks(model):
    blocks = mnemic.host.anatomy.examine(model).blocks
    return sum(any(parameter.is_meta for parameter in block.parameters()) for block in blocks)


def check(model, reference, folder):
    """Whatever is asked of it, it answers as the model that lies in memory."""
    ids = tokens(2, 3 * SEGMENT)
    assert offloaded_blocks(model) > 0
    assert fingerprint(model) == fingerprint(reference)
    assert torch.equal(feed(model, ids), feed(reference, ids))
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), reference.generate(ids, **greedy))
    # a session goes from one to the other and back
    session, expected = mnemic.Session(model), mnemic.Session(reference)
    for each in (session, expected):
        each.read(ids[:1, :21])
    session.save(folder / "alice.memory")
    here = mnemic.Session.load(folder / "alice.memory", reference)
    expected.save(folder / "bob.memory")
    there = mnemic.Session.load(folder / "bob.memory", model)
    logits = [each.forward(ids[1:, :5]).logits for each in (session, expected, here, there)]
    assert all(torch.equal(each, logits[0]) for each in logits)
    assert offloaded_blocks(model) > 0


@pytest.mark.parametrize(("name", "label"), [("gpt2", "emt-0"), *(("llama", label) for label in LABELS)])
def test_attached_after_it_was_offloaded(name, label, tmp_path):
    ways = [loaded, dispatched] if label == "emt-0" else [dispatched]
    for number, way in enumerate(ways + ([on_disk, in_ram] if (name, label) == ("llama", "emt-0") else [])):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = way(name, folder)
        attachment = trained(model, CONFIGS[label])
        reference = host(name, CONFIGS[label])
        check(model, reference, folder)
        # a memory saved here fits the base that is not offloaded
        attachment.save_pretrained(folder / "memory")
        again = make(name)
        mnemic.from_pretrained(again, folder / "memory")
        ids = tokens(2, 2 * SEGMENT)
        assert torch.equal(feed(again, ids), feed(reference, ids))


@pytest.mark.parametrize("label", LABELS)
def test_attached_before_it_was_offloaded(label, tmp_path):
    model = dispatch_model(host("llama", CONFIGS[label]), device_map("llama", mnemic="cpu"), offload_dir=tmp_path)
    check(model, host("llama", CONFIGS[label]), tmp_path)


def test_the_recipe(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    left = run("offloaded.py", tmp_path / "base", tmp_path)
    assert offloaded_blocks(left["model"]) > 0
    again = mnemic.Session.load(tmp_path / "alice.memory", left["model"])
    assert again.stream.seen == left["session"].stream.seen
    assert 37 + 5 < again.stream.seen[0] <= 37 + 5 + 4


def test_an_offloaded_memory_is_refused(tmp_path):
    ids = tokens(1, SEGMENT)
    by_map = dispatch_model(
        host("llama", CONFIGS["emt-0"]), device_map("llama", mnemic="disk"), offload_dir=tmp_path / "map"
    )
    whole = host("llama", CONFIGS["emt-0"])
    disk_offload(whole, tmp_path / "disk")
    for model in (by_map, whole):
        for use in (
            lambda model=model: model(ids),
            lambda model=model: mnemic.Session(model).read(ids),
            lambda model=model: mnemic.attached(model).save_pretrained(tmp_path / "memory"),
        ):
            with pytest.raises(ValueError, match="the memory's weights were offloaded"):
                use()
    assert not (tmp_path / "memory").exists()


def test_training_over_an_offloaded_base(tmp_path):
    ids = tokens(2, 3 * SEGMENT)
    model, reference = dispatched("llama", tmp_path), host("llama", CONFIGS["emt-0"])
    trained(model, CONFIGS["emt-0"])
    for each in (model, reference):
        mnemic.unroll(each, ids, ids).loss.backward()
    gradients = [[p.grad for p in mnemic.attached(each).parameters()] for each in (model, reference)]
    for actual, expected in zip(*gradients, strict=True):
        assert expected.abs().sum() > 0
        assert torch.equal(actual, expected)


def test_weights_that_were_never_loaded_have_no_fingerprint():
    with torch.device("meta"):
        model = type(make("llama"))(make("llama").config)
    with pytest.raises(ValueError, match="on the meta device and nowhere else"):
        fingerprint(model)
    # nor are they those of another model, whose fingerprint is right however it is held
    assert fingerprint(make("llama", seed=1)) != fingerprint(make("llama"))
