"""What is the Compressive Transformer's own: which tokens are where, what compression makes of them, what trains it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from helpers import SEGMENT, assert_differ, assert_near, feed, shake, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.compressive import CompressiveConfig
from mnemic.memories.transformer_xl import TransformerXLConfig
from mnemic.state import nbytes
from mnemic.unrolling import unroll

DEPTH, WIDTH = 2, 16
COMPRESSIONS = ["mean", "max", "convolution", "most used"]
every_compression = pytest.mark.parametrize("compression", COMPRESSIONS)


def build(size=8, compressed=6, rate=4, compression="mean", width=WIDTH, **settings):
    config = CompressiveConfig(SEGMENT, None, size, compressed, rate, compression, **settings)
    return config.build(width, DEPTH)


def drawn(time, rows=1, seed=0):
    """What entered each block, `[rows, time, depth * width]`."""
    return torch.randn(rows, time, DEPTH * WIDTH, generator=torch.Generator().manual_seed(seed))


def written(memory, hidden, lengths=None):
    """The state after segments of these lengths."""
    state = memory.init_state(len(hidden))
    for part in hidden.split(lengths or SEGMENT, 1):
        state = memory.write(part, state)
    return state


# --- which tokens are where ------------------------------------------------------------------------------------------

LENGTHS = [[SEGMENT] * 9, [1] * 30, [3, 8, 8, 1, 7, 8, 2, 8, 5, 8], [SEGMENT] * 2]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}-segments")
@pytest.mark.parametrize(("size", "compressed", "rate"), [(8, 6, 4), (6, 5, 3), (0, 4, 5), (20, 2, 1), (8, 100, 2)])
def test_the_queue_is_exact(size, compressed, rate, lengths):
    memory, hidden = build(size, compressed, rate), drawn(sum(lengths))
    state = memory.init_state(1)
    for part, time in zip(hidden.split(lengths, 1), torch.tensor(lengths).cumsum(0).tolist(), strict=True):
        state = memory.write(part, state)
        gone = max(0, time - size) // rate
        assert torch.equal(state["memory"], hidden[:, gone * rate : time])
        # the oldest state that is left was made of group `gone - compressed`
        groups = [hidden[:, j * rate : (j + 1) * rate].mean(1) for j in range(max(0, gone - compressed), gone)]
        assert state["compressed"].shape[1] == len(groups)
        if groups:
            torch.testing.assert_close(state["compressed"], torch.stack(groups, 1))
        assert state["memory_count"].tolist() == [time - gone * rate]
        assert state["compressed_count"].tolist() == [len(groups)]


@every_compression
@torch.no_grad()
def test_what_does_not_fill_a_group_waits_and_stays_visible(compression):
    # 8 tokens fill two groups of 3, and two are left over: nothing is padded, nothing is lost
    memory, hidden = build(9, 9, 3, compression), drawn(3 * SEGMENT)
    state = written(memory, hidden)
    assert state["compressed_count"].tolist() == [5]
    assert torch.equal(state["memory"], hidden[:, 15:])
    assert memory.tokens_before(state).embeddings.shape == (1, 5 + 9, WIDTH)
    more = memory.write(drawn(1, seed=1), state)
    assert torch.equal(more["memory"][:, :9], hidden[:, 15:])
    assert torch.equal(more["compressed"], state["compressed"])
    # the third of its kind takes the two with it
    assert memory.write(drawn(3, seed=1), state)["compressed_count"].tolist() == [6]


@every_compression
@torch.no_grad()
def test_rows_with_more_and_with_less(compression):
    memory, lengths = build(8, 5, 3, compression), (0, 3, 8, 11, 24, 40)
    alone = [written(memory, drawn(length, seed=length)) for length in lengths]
    state = mnemic.state.concatenate(alone)
    for step in range(4):
        hidden = drawn(SEGMENT, len(lengths), 100 + step)
        keep = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(step)) < 0.7
        state = memory.write(hidden, state, keep)
        before = memory.tokens_before(state)
        for row, one in enumerate(alone):
            alone[row] = one = memory.write(hidden[row : row + 1, keep[row]], one)
            for name, tensor in one.items():
                mine = state[name][row : row + 1]
                if name.endswith("_count"):
                    assert torch.equal(mine, tensor)
                else:
                    assert_near(mine[:, : tensor.shape[1]], tensor, 1e-5)
                    assert not mine[:, tensor.shape[1] :].any()
            # seen as if it were alone: compressed states, then tokens, then the segment without a gap
            both = torch.cat([one["compressed"], one["memory"]], 1)
            count = both.shape[1]
            assert before.keep is None or before.keep[row].tolist() == [False] * (len(before.keep[row]) - count) + (
                [True] * count
            )
            for block, seen in before.inputs.items():
                part = both[0, :, block * WIDTH : (block + 1) * WIDTH]
                assert_near(seen[row, seen.shape[1] - count :], part, 1e-5)


def test_without_compression_it_is_transformer_xl():
    # groups of one token are what they were
    ids, results = tokens(2, 5 * SEGMENT), []
    for config in (
        CompressiveConfig(SEGMENT, size=8, compressed=12, rate=1),
        TransformerXLConfig(SEGMENT, size=20),
        TransformerXLConfig(SEGMENT, size=8),
    ):
        model = make("llama")
        mnemic.attach(model, config)
        results.append(feed(model, ids))
    assert torch.equal(results[0], results[1])
    assert_differ(results[0], results[2])


def test_what_has_left_is_in_no_storage():
    state = written(build(size=0, compressed=2, rate=4), drawn(5 * SEGMENT))
    for tensor in state.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# --- what compression makes of them ----------------------------------------------------------------------------------


@every_compression
@torch.no_grad()
def test_constant_states_are_kept_exactly(compression):
    memory, constant = build(compression=compression), drawn(1)
    if memory.convolution is not None:
        memory.convolution.weight.copy_(torch.eye(WIDTH).expand_as(memory.convolution.weight) / 4)
    state = written(memory, constant.expand(-1, 7 * SEGMENT, -1))
    assert state["compressed"].shape[1] == 6
    torch.testing.assert_close(state["compressed"], constant.expand(-1, 6, -1), atol=0, rtol=1e-6)


@torch.no_grad()
def test_pooling():
    hidden = drawn(2 * SEGMENT)
    groups = hidden[:, :SEGMENT].unflatten(1, (2, 4))
    torch.testing.assert_close(written(build(), hidden)["compressed"], groups.sum(2) / 4)
    assert torch.equal(written(build(compression="max"), hidden)["compressed"], groups.max(2).values)


@torch.no_grad()
def test_convolution_is_one_of_kernel_and_stride_c_for_each_block():
    memory, hidden = build(compression="convolution"), drawn(2 * SEGMENT, 3)
    new = written(memory, hidden)["compressed"]
    # next to mean pooling at first
    mean = hidden[:, :SEGMENT].unflatten(1, (2, 4)).mean(2)
    assert 0.03 < (new - mean).square().mean() / mean.square().mean() * 10 < 0.3
    shake(memory)
    new = written(memory, hidden)["compressed"].unflatten(-1, (DEPTH, WIDTH))
    for block in range(DEPTH):
        old = hidden[:, :SEGMENT].unflatten(-1, (DEPTH, WIDTH))[:, :, block].mT
        # conv1d has [out, in, kernel]
        weight, bias = memory.convolution.weight[block].permute(2, 1, 0), memory.convolution.bias[block]
        torch.testing.assert_close(new[:, :, block].mT, F.conv1d(old, weight, bias, stride=4), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_most_used_keeps_what_the_segment_attended_to():
    memory = build(size=8, rate=4, compression="most used")
    first, later = drawn(SEGMENT).unflatten(-1, (DEPTH, WIDTH)), drawn(SEGMENT, seed=1).unflatten(-1, (DEPTH, WIDTH))
    # block 0 asks for tokens 6 and 3, block 1 for 2 alone, and then a little for 0; they are kept in their order
    for block, asked in enumerate([[6, 3, 6, 3, 6, 3, 6, 3], [2, 2, 2, 2, 2, 2, 2, 0]]):
        later[:, :, block] = first[:, asked, block]
    state = written(memory, torch.cat([first, later], 1).flatten(2))
    kept = state["compressed"].unflatten(-1, (DEPTH, WIDTH))
    assert torch.equal(kept[:, :, 0], first[:, [3, 6], 0])
    assert torch.equal(kept[:, :, 1], first[:, [0, 2], 1])


@torch.no_grad()
def test_what_padding_asks_for_is_not_used():
    memory = build(size=8, rate=4, compression="most used")
    first = drawn(SEGMENT)
    state = memory.write(first, memory.init_state(1))
    # 4 real tokens push one group out, tokens 0 to 3; they ask for 2, and the padding for 0
    keep = torch.arange(SEGMENT)[None] % 2 == 0
    after = memory.write(torch.where(keep[..., None], first[:, 2:3], first[:, :1]), state, keep)
    assert torch.equal(after["compressed"], first[:, 2:3])


# --- what trains the compression -------------------------------------------------------------------------------------

OBJECTIVES = ["attention", "auto-encoding"]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def learner(objective, **settings):
    torch.manual_seed(0)
    return build(compression="convolution", objective=objective, **settings)


def attention(hidden, memory):
    """attn(h, m) of one row and block, one token at a time."""

    def normed(x):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()

    outputs = []
    for h in hidden:
        scores = [(torch.dot(normed(h), normed(m)) / math.sqrt(WIDTH)).exp() for m in memory]
        outputs.append(sum(s * normed(m) for s, m in zip(scores, memory, strict=True)) / sum(scores))
    return torch.stack(outputs)


@every_objective
def test_the_loss_is_its_equation(objective):
    memory = learner(objective, size=6, rate=3)
    shake(memory)
    memory.double()
    # all rows but the last have tokens; of the new ones row 1 has two, which fill a group, and row 2 has none
    state = mnemic.state.concatenate([written(memory, drawn(SEGMENT, 3)), memory.init_state(1)])
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    hidden, keep = drawn(SEGMENT, 4, 1).double(), torch.ones(4, SEGMENT, dtype=torch.bool)
    keep[1, 2:], keep[2] = False, False
    expected, after = [], memory.write(hidden, state, keep)
    for row, groups in enumerate((3, 1, 0, 0)):
        words, count = hidden[row, keep[row]], int(after["compressed_count"][row])
        queue = torch.cat([state["memory"][row, : state["memory_count"][row]], words])
        errors = []
        for block in range(DEPTH if groups else 0):
            part = slice(block * WIDTH, (block + 1) * WIDTH)
            old, new = queue[: 3 * groups, part], after["compressed"][row, count - groups : count, part]
            if objective == "attention":
                errors.append(attention(words[:, part], old) - attention(words[:, part], new))
            else:
                weight, bias = memory.decoder.weight[block], memory.decoder.bias[block]
                errors.append(torch.stack([state @ each + bias for state in new for each in weight]) - old)
        expected.append(torch.stack(errors).square().mean() if groups else hidden.new_zeros(()))
    loss = memory.auxiliary(hidden, state, keep)
    torch.testing.assert_close(loss, torch.stack(expected), atol=1e-9, rtol=1e-9)
    alone = memory.auxiliary(hidden[:1], {name: tensor[:1] for name, tensor in state.items()})
    torch.testing.assert_close(alone, loss[:1], atol=1e-9, rtol=1e-9)


@every_objective
def test_the_loss_trains_the_compression_alone(objective):
    memory, hidden = learner(objective), drawn(SEGMENT, 2, 1).requires_grad_()
    state = written(memory, drawn(3 * SEGMENT, 2))
    state = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in state.items()}
    memory.auxiliary(hidden, state).sum().backward()
    assert hidden.grad is None
    assert all(tensor.grad is None for tensor in state.values())
    assert hidden.requires_grad
    names = {name for name, p in memory.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    decoder = {"decoder.weight", "decoder.bias"} if objective == "auto-encoding" else set()
    assert names == {"convolution.weight", "convolution.bias"} | decoder


@every_objective
def test_the_loss_of_what_loses_nothing_is_nothing(objective):
    memory = learner(objective)
    with torch.no_grad():
        for filter, scale in ((memory.convolution, 1 / 4), (memory.decoder, 1)):
            if filter is not None:
                filter.weight.copy_(scale * torch.eye(WIDTH).expand_as(filter.weight))
    constant = drawn(1)
    state = memory.write(constant.expand(-1, SEGMENT, -1), memory.init_state(1))
    assert memory.auxiliary(drawn(SEGMENT, 1, 1), state) < 1e-10
    state = memory.write(drawn(SEGMENT), memory.init_state(1))
    assert memory.auxiliary(drawn(SEGMENT, 1, 1), state) > 1e-3


@every_objective
def test_nothing_compressed_is_no_loss(objective):
    memory = learner(objective)
    loss = memory.auxiliary(drawn(SEGMENT, 2), memory.init_state(2))
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert not memory.convolution.weight.grad.any()
    memory.zero_grad()
    # and beside a row that compresses, one that does not leaves its gradient alone
    state = written(memory, drawn(SEGMENT, 2))
    keep = torch.tensor([[True] * SEGMENT, [False] * SEGMENT])
    loss = memory.auxiliary(drawn(SEGMENT, 2, 1), state, keep)
    assert loss[0] > 0
    assert loss[1] == 0
    loss.sum().backward()
    both = memory.convolution.weight.grad.clone()
    memory.zero_grad()
    memory.auxiliary(drawn(SEGMENT, 2, 1)[:1], {name: tensor[:1] for name, tensor in state.items()}).sum().backward()
    assert_near(memory.convolution.weight.grad, both, 1e-5)


@pytest.mark.parametrize("settings", [{}, {"compression": "max"}, {"compression": "convolution", "objective": "task"}])
def test_no_loss_of_its_own(settings):
    memory = build(**settings)
    assert memory.auxiliary(drawn(SEGMENT), written(memory, drawn(2 * SEGMENT))) is None


@every_objective
def test_the_loss_can_be_learned(objective):
    # of every 4 tokens one says something and is asked for: a convolution finds out which, mean pooling drowns it
    memory, direction = learner(objective, size=8, rate=4), 2 * drawn(1)
    optimizer = torch.optim.Adam(memory.parameters(), lr=1e-2)

    def loss(seed):
        first, later = drawn(2 * SEGMENT, 16, seed).split(SEGMENT, 1)
        telling = (torch.arange(SEGMENT) % 4 == 2)[:, None]
        first, later = torch.where(telling, first + direction, 0.1 * first - direction), later + direction
        return memory.auxiliary(later, memory.write(first, memory.init_state(16))).mean()

    before = loss(1000).item()
    for step in range(150):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert loss(1000) < 0.5 * before


def grown(segments, seed=0):
    """Ids of some segments, and labels in the last."""
    ids = tokens(2, segments * SEGMENT, seed)
    labels = ids.clone()
    labels[:, : 1 - SEGMENT] = -100
    return ids, labels


@pytest.mark.parametrize("objective", [*OBJECTIVES, "task"])
def test_the_task_trains_the_compression_only_if_it_should(objective):
    model = make("llama")
    settings = {"size": 8, "compressed": 6, "compression": "convolution", "objective": objective}
    memory = mnemic.attach(model, CompressiveConfig(SEGMENT, **settings), freeze=False).memory
    unroll(model, *grown(4)).loss.backward()
    for name, parameter in memory.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == (objective == "task"), name
    # tokens are constants to every objective, and what is made of them keeps no graph that nothing goes back through
    hidden = drawn(2 * SEGMENT).repeat(1, 1, 4).requires_grad_()
    state = memory.write(hidden, memory.init_state(1))
    assert not state["memory"].requires_grad
    assert state["compressed"].requires_grad == (objective == "task")


@every_objective
def test_training_a_frozen_host_trains_the_compression(objective):
    model = make("llama")
    settings = {"size": 8, "compressed": 6, "compression": "convolution", "objective": objective}
    torch.manual_seed(0)
    attachment = mnemic.attach(model, CompressiveConfig(SEGMENT, **settings))
    before = {key: each.clone() for key, each in model.state_dict().items()}

    def batch(step):
        ids, labels = grown(4, step)
        ids[:, torch.arange(4 * SEGMENT) % 4 != 2] = 5  # one of every four tokens says something
        return mnemic.Batch(ids, labels)

    def loss():
        return sum(unroll(model, *vars(batch(1000 + seed)).values()).auxiliary.item() for seed in range(4))

    first = loss()
    for _ in mnemic.train(model, batch, steps=40, learning_rate=1e-2):
        pass
    assert loss() < 0.9 * first
    moved = {key for key, each in model.state_dict().items() if not torch.equal(each, before[key])}
    assert {key.rpartition(".mnemic.memory.")[2] for key in moved} == {
        n for n, _ in attachment.memory.named_parameters()
    }


def test_learning_rates_go_by_what_a_filter_sums_up():
    memory = build(rate=4, compression="convolution", objective="auto-encoding")
    scales = {name: memory.rate_scale(name) for name, _ in memory.named_parameters()}
    weight = 1 / math.sqrt(4 * WIDTH)
    assert scales == {
        "convolution.weight": weight,
        "convolution.bias": 1,
        "decoder.weight": weight,
        "decoder.bias": 1,
    }


@pytest.mark.parametrize(("name", "keys"), [("llama", ["k_proj", "v_proj"]), ("gpt2", ["attn.c_attn"])])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_keys_and_values_learn_after_the_first_compression(name, keys, objective):
    # a well-known implementation detaches its key and value weights in place when it first compresses, so that from the
    # second segment on they are frozen for good
    model = make(name)
    settings = {"size": 8, "compressed": 6, "compression": "convolution", "objective": objective}
    mnemic.attach(model, CompressiveConfig(SEGMENT, **settings), freeze=False)
    weights = {key: p for key, p in model.named_parameters() if any(f"{each}.weight" in key for each in keys)}
    assert len(weights) == DEPTH * len(keys)
    asked = {key: p.requires_grad for key, p in model.named_parameters()}
    for segments in (1, 2, 3, 5):
        model.zero_grad()
        result = unroll(model, *grown(segments))
        (result.loss + result.auxiliary).backward()
        assert (result.auxiliary > 0) == (segments > 1)
        for key, parameter in weights.items():
            assert parameter.requires_grad, key
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        assert {key: p.requires_grad for key, p in model.named_parameters()} == asked
    # not only from the segment's own words: keys and values are also made of what is compressed
    gradients = []
    for state in (
        result.stream.state,
        {**result.stream.state, "compressed": result.stream.state["compressed"].flip(-1)},
    ):
        cache = mnemic.memory_cache(model)
        cache.memory.stream = mnemic.attached(model).router.new_stream(2, mnemic.state.detach(state))
        model.zero_grad()
        ids = tokens(2, SEGMENT, 5)
        model(ids, labels=ids, **{CACHE: cache}).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in weights.items()})
    for key in weights:
        assert_differ(gradients[0][key], gradients[1][key], 1e-5)


# --- the seam --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_block_sees_compressed_states_then_tokens_then_words():
    # the host's own attention over [cm ; m ; h], written out for the first block of a llama
    model = make("llama")
    memory = mnemic.attach(model, CompressiveConfig(SEGMENT, size=4, compressed=5, rate=2)).memory
    ids, cache = tokens(1, 2 * SEGMENT), mnemic.memory_cache(model)
    model(ids[:, :SEGMENT], **{CACHE: cache})
    state, seen = cache.memory.stream.state, []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids[:, SEGMENT:], **{CACHE: cache})
    handle.remove()
    block, words = model.model.layers[0], model.model.embed_tokens(ids[:, SEGMENT:])
    both = torch.cat([state["compressed"][..., :64], state["memory"][..., :64], words], 1)
    assert both.shape[1] == 2 + 4 + SEGMENT
    # keys are made of all of them, in one pass or in several
    torch.testing.assert_close(torch.cat(seen, 1), block.input_layernorm(both))
    assert cache.get_seq_length() == 0
    assert memory.beside == 4 + 2 - 1 + 5


def test_bytes_law():
    for size, compressed, rate in ((8, 6, 4), (6, 5, 3), (0, 4, 5)):
        memory, state = build(size, compressed, rate), build().init_state(1)
        for step in range(1, 20):
            state = memory.write(drawn(SEGMENT), state)
            held = step * SEGMENT - max(0, step * SEGMENT - size) // rate * rate
            made = min(compressed, max(0, step * SEGMENT - size) // rate)
            assert nbytes(state) == (held + made) * DEPTH * WIDTH * 4 + 16
            assert nbytes(state) <= memory.most_bytes(step)
        assert memory.most_bytes(100) == (size + rate - 1 + compressed) * DEPTH * WIDTH * 4 + 16
    sizes = [
        CompressiveConfig.small(SEGMENT, WIDTH, size).build(WIDTH, DEPTH).most_bytes(9) for size in (1, 2, 3, 8, 9)
    ]
    assert sizes == sorted(set(sizes))
    assert CompressiveConfig.small(SEGMENT, WIDTH).build(WIDTH, DEPTH).most_bytes(9) == sizes[3]


@every_compression
@torch.no_grad()
def test_low_precision_is_for_the_host_only(compression):
    trained = {"objective": "task"} if compression == "convolution" else {}
    memory = build(compression=compression, **trained)
    hidden = drawn(6 * SEGMENT)
    state = written(memory, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = written(memory, hidden)
    lowered = build(compression=compression)
    lowered.load_state_dict(memory.state_dict())
    for found in (after, written(lowered.bfloat16(), hidden)):
        assert found["compressed"].dtype == found["memory"].dtype == torch.float32
        if compression != "most used":
            assert_near(found["compressed"], state["compressed"], 0.05)
    assert lowered.tokens_before(state).inputs[0].dtype == torch.bfloat16


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": -1}, "size is -1; it must be at least 0"),
        ({"compressed": 0}, "compressed is 0; it must be at least 1"),
        ({"rate": 0}, "rate is 0; it must be at least 1"),
        ({"compression": "median"}, "compression is 'median'; use 'mean' or 'max' or 'convolution' or 'most used'"),
        ({"objective": "both"}, "objective is 'both'; use 'attention' or 'auto-encoding' or 'task'"),
        ({"compression": "most used", "size": 7}, "size 7 is smaller than a segment of 8.* set size to at least 8"),
        ({"window": 16}, "window is 16, so the base would keep keys that the memory holds too"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CompressiveConfig(segment_length=SEGMENT, **settings)


def test_encoders_are_refused():
    with pytest.raises(ValueError, match="attach it to a causal model"):
        mnemic.attach(make("bert"), CompressiveConfig(SEGMENT))
