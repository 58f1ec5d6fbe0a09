"""`torch.compile`: each block as one whole graph (`fullgraph=True`), beside a memory that runs eagerly between them."""

from __future__ import annotations

import pytest
import torch

import mnemic
from example_scripts import run
from families import make
from helpers import CONFIGS, SEAMS, SEGMENT, assert_differ, assert_near, carrier, feed, host, stream, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE

# families of each kind, with a memory for each way through the segments: all at once, one after another, with memory
# tokens beside them, with keys of their own
CASES = [("llama", "emt-0"), ("gpt2", "emt-1"), ("gemma3", "rmt-0"), ("bloom", "fast-weights-0")]
cases = pytest.mark.parametrize(("name", "label"), CASES)


@pytest.fixture(autouse=True)
def counted():
    """Begins with nothing compiled, and counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model, backend="eager"):
    """The recipe of the documentation."""
    for block in mnemic.attached(model).anatomy.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    return model


def graphs():
    """How many were made; none was broken, or `fullgraph` would have raised."""
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(model, ids, labels):
    model.zero_grad()
    loss = mnemic.unroll(model, ids, labels).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in mnemic.attached(model).parameters()]


@cases
def test_training_with_compiled_blocks(name, label):
    # the second case of AOT autograd, which makes the backward's graph too; inductor would only write code from it
    backend = "aot_eager" if name == "llama" else "eager"
    model, ids = host(name, CONFIGS[label]), tokens(2, 4 * SEGMENT)
    labels = ids.clone()
    labels[:, :SEGMENT] = -100
    loss, expected = gradients(model, ids, labels)
    compiled(model, backend)
    for _ in range(2):
        again, found = gradients(model, ids, labels)
        assert_near(again, loss, 1e-6)
        for actual, wanted in zip(found, expected, strict=True):
            assert_near(actual, wanted, 1e-6)
    assert 0 < (first := graphs()) <= 8
    gradients(model, tokens(2, 4 * SEGMENT, 5), labels)
    assert graphs() == first  # other tokens need no other graph


def test_the_recipe(tmp_path):
    deep = {"num_hidden_layers": 9}  # more blocks than the 8 graphs that torch allows a function by itself
    make("llama", **deep).save_pretrained(tmp_path / "base")
    with torch._dynamo.config.patch(recompile_limit=8):
        left = run("compiled_blocks.py", tmp_path / "base", "eager")
    assert graphs() > 8
    plain = make("llama", **deep)
    mnemic.attach(plain, left["memory"].config).memory.load_state_dict(left["memory"].memory.state_dict())
    assert_near(mnemic.unroll(plain, left["ids"], left["ids"]).loss, left["loss"].detach(), 1e-6)


@torch.no_grad()
def test_generating_with_compiled_blocks():
    model, ids = host("llama", CONFIGS["emt-0"]), tokens(1, 11)
    greedy = {"max_new_tokens": SEGMENT, "min_new_tokens": SEGMENT, "do_sample": False}
    expected = model.generate(ids, **greedy)
    # a graph for each block and each shape that the cache takes: more than the 8 that torch allows a function
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled(model)
        assert torch.equal(model.generate(ids, **greedy), expected)
    assert graphs() > 2


@torch.no_grad()
def test_reading_with_keys_that_compiled_blocks_make_alone():
    # a block is left as soon as the keys of the memory's tokens are in the cache, which no graph can be
    model, ids = host("gpt2", CONFIGS["transformer-xl-0"]), tokens(2, 3 * SEGMENT)
    expected = feed(model, ids)
    assert_near(feed(compiled(model), ids), expected, 1e-6)
    assert graphs() > 0


# compiling takes seconds, and what breaks the graph is the seam, not the family nor what is computed
@pytest.mark.parametrize("config", [CONFIGS[label] for label in SEAMS], ids=SEAMS)
@torch.no_grad()
def test_a_model_compiled_whole_breaks_at_the_memory_alone(config):
    model, ids = host("llama", config), tokens(2, 21)
    eager, cache = carrier(model), carrier(model)
    expected = feed(model, ids, carried=eager)
    whole = torch.compile(model, backend="eager")
    assert_near(whole(input_ids=ids, **{CACHE: cache}).logits, expected, 1e-5)
    assert stream(cache).counts == stream(eager).counts
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks
    assert all("torch.compiler.disable" in reason for reason in breaks), breaks
    with mnemic.attached(model).disabled():
        assert_differ(feed(model, ids), expected)


@torch.no_grad()
def test_a_model_compiled_whole_as_one_graph_is_refused():
    model = torch.compile(host("llama", CONFIGS["emt-0"]), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        model(input_ids=tokens(2, SEGMENT))


def test_attaching_to_what_was_compiled_is_refused():
    whole = torch.compile(make("llama"), backend="eager")
    parts = make("llama")
    for block in mnemic.host.anatomy.examine(parts).blocks:
        block.compile(backend="eager")
    for model in (whole, parts):
        with pytest.raises(
            ValueError, match=r"torch\.compile has prepared the model without a memory; attach it before"
        ):
            mnemic.attach(model, CONFIGS["emt-0"])
    # compiled after attaching, a block's hooks are part of what was compiled, and have their effect
    model, ids = host("llama", CONFIGS["emt-0"]), tokens(1, 2 * SEGMENT)
    expected = feed(model, ids)
    with mnemic.attached(model).disabled():
        assert_differ(feed(model, ids), expected)
    for block in mnemic.attached(model).anatomy.blocks:
        block.compile(backend="eager")
    assert_near(feed(model, ids), expected, 1e-5)
