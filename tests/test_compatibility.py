"""Invariant 10 of the matrix: a model with a memory does everything that its base does in Hugging Face's own hands."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

import mnemic
from families import DECODERS, FAMILIES, make
from helpers import (
    SEGMENT,
    assert_differ,
    assert_near,
    carrier,
    every_trained_kind,
    feed,
    first_forms,
    host,
    matrix,
    other,
    over_all,
    over_decoders,
    stream,
    tokens,
    trained,
    trains,
)
from mnemic.host.release import GENERATE_CACHE as CACHE

# Encoders do not generate, so everything about `generate` runs over decoders only.
NEW = 7  # with a prompt of 11 tokens two segments end, one of them while the answer is made
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
SCORED = {"return_dict_in_generate": True, "output_logits": True}
# one family of each kind of position and each shape of block output, where the whole list would only cost time
SOME = ["gpt2", "llama", "gemma3", "bloom"]


def generate(model, ids, **kwargs):
    """The sequences and the logits `[b, new, v]` of a greedy answer."""
    output = model.generate(ids, **{**GREEDY, **SCORED, **kwargs})
    return output.sequences, torch.stack(output.logits, 1)


def plain(model, ids):
    """A greedy answer without any cache: each step reads everything anew, which is the definition."""
    with torch.no_grad():
        logits = []
        for _ in range(NEW):
            scores = model(ids, use_cache=False).logits[:, -1].clone()
            logits.append(scores)
            scores[:, 2] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits, 1)


def logits_near(actual, expected):
    finite = torch.isfinite(expected)
    assert_near(actual[finite], expected[finite])


@over_decoders
def test_generate_greedy(config, name):
    model, ids = host(name, config), tokens(2, 11)
    sequences, logits = plain(model, ids)
    for kwargs in ({}, {CACHE: DynamicCache()}, {"use_cache": False}):  # the second time is no other
        again, again_logits = generate(model, ids, **kwargs)
        assert torch.equal(again, sequences)
        logits_near(again_logits, logits)
    with mnemic.attached(model).disabled():
        assert_differ(generate(model, ids, max_new_tokens=1, min_new_tokens=1)[1][:, 0], logits[:, 0])


@matrix([name for name, family in DECODERS.items() if family.static], forms=False)
def test_generate_with_a_static_cache(config, name):
    model, ids = host(name, config), tokens(2, 11)
    sequences, logits = generate(model, ids)
    static = {"cache_implementation": "static", "disable_compile": True}
    if mnemic.attached(model).memory.beside:
        with pytest.raises(ValueError, match=r"tokens beside its segments cannot join a StaticCache.*memory_cache"):
            generate(model, ids, **static)
        return
    for _ in range(2):
        again, again_logits = generate(model, ids, **static)
        assert torch.equal(again, sequences)
        logits_near(again_logits, logits)


@first_forms(DECODERS)
def test_generate_sampled_under_a_seed(config, name):
    model, ids = host(name, config), tokens(2, 11)

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, **kwargs)

    first = sample(1)
    assert torch.equal(sample(1), first)
    assert torch.equal(sample(1, use_cache=False), first)
    assert not torch.equal(sample(2), first)


@over_decoders
def test_generate_with_beams(config, name):
    model, ids = host(name, config), tokens(2, 11)
    beams = {"num_beams": 3, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    beams |= {"return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(ids, use_cache=False, **beams)
    output = model.generate(ids, **beams)
    assert torch.equal(output.sequences, expected.sequences)
    assert_near(output.sequences_scores, expected.sequences_scores)


@over_decoders
def test_generate_over_left_padding(config, name):
    model, short = host(name, config), tokens(1, 6)
    ids, mask = tokens(2, 11, 1), torch.ones(2, 11, dtype=torch.long)
    ids[0, :5], mask[0, :5], ids[0, 5:] = 0, 0, short[0]
    expected, logits = generate(model, short)
    sequences, padded = generate(model, ids, attention_mask=mask)
    assert torch.equal(sequences[0, 11:], expected[0, 6:])
    logits_near(padded[0], logits[0])
    if DECODERS[name].static and not mnemic.attached(model).memory.beside:
        static = {"cache_implementation": "static", "disable_compile": True}
        sequences, padded = generate(model, ids, attention_mask=mask, **static)
        assert torch.equal(sequences[0, 11:], expected[0, 6:])
        logits_near(padded[0], logits[0])


@first_forms(DECODERS)
def test_generate_with_prompt_lookup(config, name):
    model = host(name, config)
    ids = tokens(1, 7).repeat(1, 3)
    expected, logits = generate(model, ids)
    if mnemic.attached(model).memory.beside:
        # transformers 5.24 asks the cache beforehand and says it in its own words
        with pytest.raises(ValueError, match=r"cannot take tokens back|requires a cache that can be cropped"):
            generate(model, ids, prompt_lookup_num_tokens=3)
        return
    sequences, looked_up = generate(model, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(sequences, expected)
    logits_near(looked_up, logits)


@first_forms(DECODERS)
@torch.no_grad()
def test_generate_past_the_window_and_the_positions(config, name):
    # 16 positions where a table bounds them; the answer alone is longer than that
    key = "n_positions" if name in ("gpt2", "gptj") else "max_position_embeddings"
    beside = config.build(64, 2).beside
    short = {} if name == "bloom" else {key: 2 * SEGMENT + beside}
    model, ids, new = host(name, config, **short), tokens(2, 11), 4 * SEGMENT
    cache = mnemic.memory_cache(model, 2 * SEGMENT)
    greedy = {**GREEDY, "max_new_tokens": new, "min_new_tokens": new}
    sequences, logits = generate(model, ids, **{CACHE: cache}, **greedy)
    assert sequences.shape == (2, 11 + new)
    assert cache.window.kept <= 2 * SEGMENT + beside
    # one forward over what was said, through a new cache, gives the same logits
    again = feed(model, sequences[:, :-1], carried=mnemic.memory_cache(model, 2 * SEGMENT))
    logits_near(logits, again[:, 10:])


@over_decoders
@torch.no_grad()
def test_generate_continues_a_memory_cache(config, name):
    model = host(name, config)
    long, prompt = tokens(2, 5 * SEGMENT), tokens(2, 5, 3)
    cache = mnemic.memory_cache(model, 2 * SEGMENT)
    feed(model, long, carried=cache)
    once = {"max_new_tokens": 1, "min_new_tokens": 1}
    _, logits = generate(model, prompt, **{CACHE: cache}, **once)
    again = feed(model, torch.cat([long, prompt], 1), carried=mnemic.memory_cache(model, 2 * SEGMENT))
    assert_near(logits[:, 0], again[:, -1])
    _, fresh = generate(model, prompt, **once)
    assert_differ(fresh[:, 0], logits[:, 0])


# --- copies ----------------------------------------------------------------------------------------------------------


@over_all
@torch.no_grad()
def test_copies_keep_their_own_memory(config, name):
    model, ids = host(name, config), tokens(2, 2 * SEGMENT)
    expected = feed(model, ids)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(feed(again, ids), expected)
        for parameter in mnemic.attached(again).parameters():
            parameter.zero_()
        if trains(model):
            assert_differ(feed(again, ids), expected)
        assert torch.equal(feed(model, ids), expected)
        mnemic.attached(again).detach()
        assert torch.equal(feed(model, ids), expected)


# --- training in other hands -----------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train_two_steps(model, length, folder, checkpointing):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        logging_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(tokens(4, length))).train()


@first_forms(["gpt2", "llama", "bert"])
def test_trainer(config, name, tmp_path):
    # No dropout here, so recomputation must give the same numbers. Where segments run one after another on the base's
    # keys, checkpointing (which drops keys) is refused beyond one segment.
    quiet = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if name == "gpt2" else {}
    if name == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    results = []
    for checkpointing in (False, True):
        model = host(name, config, **quiet)
        attachment = mnemic.attached(model)
        memory = attachment.memory
        if not trains(model):
            pytest.skip("nothing of this memory trains: with a frozen host there is nothing for a trainer to do")
        # a call of an encoder is one segment; what starts empty learns nothing from a single one
        one = name == "bert" or (memory.writes_see_reads and not memory.starts_empty)
        length = SEGMENT if one else 3 * SEGMENT
        before = [parameter.clone() for parameter in attachment.parameters()]
        base = {k: v.clone() for k, v in model.state_dict().items() if ".mnemic." not in k}
        if checkpointing and memory.writes_see_reads and not memory.beside and not one:
            with pytest.raises(ValueError, match=r"gradient checkpointing drops the base's keys.*MemoryCache"):
                train_two_steps(model, length, tmp_path, checkpointing)
            return
        train_two_steps(model, length, tmp_path, checkpointing)
        after = model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in base.items())
        assert any(not torch.equal(p, b) for p, b in zip(attachment.parameters(), before, strict=True))
        results.append([parameter.detach().clone() for parameter in attachment.parameters()])
    for plain_parameter, checkpointed in zip(*results, strict=True):
        assert_near(checkpointed, plain_parameter, 1e-5)


@matrix(SOME)
def test_gradient_checkpointing(config, name):
    # the first parameter gradients with and without recomputation, over several segments: in one call, or, where that
    # is refused, in a call a segment on a cache of that window, as the error says
    gradients, ids = [], tokens(2, 3 * SEGMENT)
    for checkpointing in (False, True):
        model = host(name, config)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for key in ("attention_dropout", "attn_dropout"):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, 0.0)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if not trains(model):
            pytest.skip("nothing of this memory trains")
        memory = mnemic.attached(model).memory
        if memory.writes_see_reads and not memory.beside:
            if checkpointing:
                with pytest.raises(ValueError, match=r"gradient checkpointing drops the base's keys.*MemoryCache"):
                    model(ids, labels=ids)
            cache = mnemic.memory_cache(model, SEGMENT)
            parts = ids.split(SEGMENT, 1)
            loss = sum(model(part, labels=part, **{CACHE: cache}).loss for part in parts)
        else:
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append([parameter.grad for parameter in mnemic.attached(model).parameters()])
    for plain_gradient, checkpointed in zip(*gradients, strict=True):
        assert_near(checkpointed, plain_gradient, 1e-5, size=float(plain_gradient.abs().max()))
        assert plain_gradient.abs().sum() > 0 or plain_gradient.numel() <= 64


@every_trained_kind
def test_unrolling_in_other_hands(config):
    # unrolling's gradients with recomputation in both of torch's ways, under autocast, and in half precision
    ids = tokens(2, 4 * SEGMENT)
    labels = ids.clone()
    labels[:, :SEGMENT] = -100

    def unrolled(prepare=lambda model: None, **settings):
        model = host("llama", config).train()
        prepare(model)
        found = mnemic.unroll(model, ids, labels, **settings)
        found.loss.backward()
        gradients = [parameter.grad for parameter in mnemic.attached(model).parameters()]
        assert all(t.dtype == torch.float32 for t in found.stream.state.values() if t.is_floating_point())
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        return found.loss.detach().float(), gradients

    loss, expected = unrolled()
    for reentrant in (True, False):
        again, gradients = unrolled(lambda m, r=reentrant: m.activation_checkpointing_enable({"use_reentrant": r}))
        assert_near(again, loss, 1e-6)
        for actual, wanted in zip(gradients, expected, strict=True):
            assert_near(actual, wanted, 1e-5, size=float(wanted.abs().max()))
    # bfloat16 keeps 8 bits
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = unrolled()
        assert_near(mixed, loss, 2e-2)
        assert mixed != loss
        if mnemic.unrolling.obstacle_to_parallel(host("llama", config), SEGMENT) is None:
            assert_near(unrolled(parallel=True)[0], unrolled(parallel=False)[0], 1e-3)
    assert_near(unrolled(lambda m: m.to(torch.bfloat16))[0], loss, 2e-2)


# --- in half precision -------------------------------------------------------------------------------------


@over_all
@torch.no_grad()
def test_bfloat16(config, name):
    model, ids = make(name).to(torch.bfloat16), tokens(2, SEGMENT)
    expected = model(ids).logits
    attachment = mnemic.attach(model, config)
    for dtype in (torch.float32, torch.bfloat16):  # the memory may be kept wider than its base
        attachment.memory.to(dtype)
        if not attachment.memory.beside:
            assert torch.equal(model(ids).logits, expected)
    attachment.detach()
    attachment = trained(model, config)
    longer = tokens(2, 3 * SEGMENT)
    # beside the same weights in float32: bfloat16 keeps 8 bits, so a few per cent of the logits' size
    wide = copy.deepcopy(model).float()
    assert mnemic.attached(wide).memory.parameter_dtype() == torch.float32
    carried = carrier(model)
    logits, reference = feed(model, longer, carried=carried), feed(wide, longer)
    assert logits.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in stream(carried).state.values() if t.is_floating_point())
    error = (logits.float() - reference).abs().mean() / reference.abs().mean()
    assert error < 0.1, error
    changed = longer.clone()
    changed[:, :SEGMENT] = other(changed[:, :SEGMENT])
    if name in FAMILIES and name in DECODERS:
        window = mnemic.memory_cache(model, SEGMENT), mnemic.memory_cache(model, SEGMENT)
        one, two = (feed(model, given, carried=c) for given, c in zip((longer, changed), window, strict=True))
        assert_differ(one[:, 2 * SEGMENT :].float(), two[:, 2 * SEGMENT :].float())
