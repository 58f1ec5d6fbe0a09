"""Training: two ways through the same segments, what is kept, and a run that goes on where it was stopped."""

from __future__ import annotations

import copy

import pytest
import torch

import mnemic
from families import make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_differ,
    assert_near,
    assert_same_stream,
    call,
    every_kind,
    every_trained_kind,
    feed,
    host,
    shake,
    tokens,
)
from mnemic import training, unrolling
from mnemic.memories.emt_writers import Whitening
from mnemic.memory import Site
from mnemic.tasks.base import generator
from mnemic.tasks.facts import SymbolRecall
from mnemic.training import Batch, calibrate, hold_then_fall, train
from mnemic.unrolling import IGNORED, FeatureMemo, features, unroll

CONFIG = CONFIGS["emt-0"]
TASK = SymbolRecall(segment_length=SEGMENT, pairs=2)


def segments(count, batch, seed=0):
    """Random segments `[s, b, t]`."""
    return tokens(batch, count * SEGMENT, seed).unflatten(1, (-1, SEGMENT)).transpose(0, 1)


def batches(step):
    """The batch of a step."""
    return Batch(*TASK.stream(4, step % 3, generator(step)))


def start(seed=0, config=CONFIG):
    """A tiny GPT-2 with a new memory, the same for the same seed."""
    torch.manual_seed(seed)
    model = make("gpt2")
    mnemic.attach(model, config)
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in mnemic.attached(model).memory.named_parameters()}


def run(model, steps, **more):
    return list(train(model, batches, steps=steps, learning_rate=0.01, **more))


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def apart(one, two):
    return max(float((tensor - two[name]).abs().max()) for name, tensor in one.items())


# --- what the base makes of segments ---------------------------------------------------------------------------------


def test_a_memo_equals_features():
    model = host("gpt2", CONFIG)
    memo, pool = FeatureMemo(model), segments(12, 1).flatten(0, 1)
    for seed in range(6):
        source = generator(seed)
        ids = pool[torch.randint(12, (5, 3), generator=source)]
        ids[0] = tokens(3, SEGMENT, 100 + seed)  # some that never come again
        assert_near(memo(ids), features(model, ids), 1e-5)
    assert 0 < len(memo.kept) <= 12


def test_a_memo_computes_what_came_twice_no_third_time(monkeypatch):
    model = host("gpt2", CONFIG)
    memo, ids = FeatureMemo(model), segments(4, 2)
    computed = []

    def counted(model, ids_sbt):
        computed.append(ids_sbt.flatten(0, 1).shape[0])
        return features(model, ids_sbt)

    monkeypatch.setattr(unrolling, "features", counted)
    second = [memo(ids), memo(ids)][1]
    third = memo(ids)
    assert torch.equal(third, second), "what was kept is not what was computed"
    assert computed == [8, 8]
    mixed = torch.cat([segments(1, 2, 9), ids])
    assert torch.equal(memo(mixed)[1:], second)
    assert computed == [8, 8, 2]


def test_a_memo_tells_segments_of_the_same_tokens_apart():
    model = host("gpt2", CONFIG)
    memo, ids = FeatureMemo(model), segments(1, 1)
    turned = ids.flip(-1)
    both = torch.cat([ids, turned])
    for _ in range(3):
        result = memo(both)
    assert_near(result, features(model, both), 1e-5)
    assert_differ(result[0], result[1])


def test_a_memo_respects_most_bytes():
    model = host("gpt2", CONFIG)
    each, ids = SEGMENT * 64 * 4, segments(6, 1)
    memo, nothing = FeatureMemo(model, most_bytes=3 * each), FeatureMemo(model, most_bytes=0)
    for _ in range(4):
        assert_near(memo(ids), features(model, ids), 1e-5)
        assert_near(nothing(ids), features(model, ids), 1e-5)
    assert len(memo.kept) == 3
    assert memo.bytes == sum(tensor.numel() * tensor.element_size() for tensor in memo.kept) == 3 * each
    assert nothing.bytes == len(nothing.kept) == 0


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("label", ["emt-0", "emt-2"])
def test_read_segments_equals_one_after_another(name, label):
    model, ids = host(name, CONFIGS[label]), tokens(3, 7 * SEGMENT)
    cache = mnemic.memory_cache(model, SEGMENT)
    feed(model, ids, [SEGMENT] * 7, carried=cache)
    for part in (64, 2, 1):
        assert_same_stream(mnemic.read_segments(model, ids, part=part), cache.memory.stream, 1e-5)
    halves = mnemic.read_segments(model, ids[:, : 3 * SEGMENT])
    assert_differ(halves.state["slots"], cache.memory.stream.state["slots"])
    assert_same_stream(mnemic.read_segments(model, ids[:, 3 * SEGMENT :], halves), cache.memory.stream, 1e-5)


def test_read_segments_refuses_where_segments_depend_on_each_other():
    with pytest.raises(ValueError, match="reads before it writes"):
        mnemic.read_segments(host("gpt2", CONFIGS["emt-1"]), tokens(1, 16))
    with pytest.raises(ValueError, match="encoder"):
        mnemic.read_segments(host("bert", CONFIG), tokens(1, 16))


@torch.no_grad()
def test_a_session_reads_whole_segments_and_the_rest_as_token_by_token(monkeypatch):
    model, ids, question = host("llama", CONFIG), tokens(1, 5 * SEGMENT + 3), tokens(1, 4, 7)
    ahead = []
    read = unrolling.read_segments
    monkeypatch.setattr("mnemic.session.read_segments", lambda *given: ahead.append(given[1].shape[1]) or read(*given))
    one, two = mnemic.Session(model, window=SEGMENT), mnemic.Session(model, window=SEGMENT)
    assert one.read(ids) == 43
    assert ahead == [40], "whole segments were not read at once"
    for token in ids.split(1, 1):
        two.forward(token)
    assert_same_stream(one.stream, two.stream, 1e-5)
    assert one.stream.counts == (3,)
    assert_near(one.forward(question).logits, two.forward(question).logits)
    # a segment that is begun is finished first, token by token
    one.read(tokens(1, 30, 8))
    for token in tokens(1, 30, 8).split(1, 1):
        two.forward(token)
    assert ahead == [40]
    assert_same_stream(one.stream, two.stream, 2e-5)


# --- losses ----------------------------------------------------------------------------------------------------------


def labelled(batch=3, count=6, at=(2, 3)):
    """A batch with labels in the middle segments."""
    ids = tokens(batch, count * SEGMENT)
    labels = torch.full_like(ids, IGNORED)
    for s in at:
        labels[:, s * SEGMENT + 2 : s * SEGMENT + 6] = ids[:, s * SEGMENT + 2 : s * SEGMENT + 6]
    return ids, labels


def gradients(model, ids, labels, **more):
    memory = mnemic.attached(model).memory
    memory.zero_grad()
    unrolled = unroll(model, ids, labels, **more)
    unrolled.loss.backward()
    found = {name: p.grad.clone() for name, p in memory.named_parameters() if p.grad is not None}
    return unrolled, found


@every_trained_kind
@pytest.mark.parametrize("reach", [None, 1])
def test_without_advance_loss_and_gradients_are_the_same(reach, config):
    model, (ids, labels) = host("gpt2", config), labelled()
    whole, one = gradients(model, ids, labels, bptt_segments=reach)
    short, two = gradients(model, ids, labels, bptt_segments=reach, advance=False)
    assert_near(short.loss, whole.loss, 1e-6)
    assert one.keys() == two.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 1e-3
    for name, gradient in one.items():
        assert_near(two[name], gradient, 1e-6)
    assert whole.stream.written == (6,) * 3
    assert short.stream.written == (3,) * 3, "the stream stands where the last labelled segment begins"


def test_a_memo_changes_no_loss():
    model, (ids, labels) = host("gpt2", CONFIG), labelled()
    memo = FeatureMemo(model)
    plain, one = gradients(model, ids, labels)
    for _ in range(3):
        kept, two = gradients(model, ids, labels, memo=memo)
        assert_near(kept.loss, plain.loss, 1e-6)
        for name, gradient in one.items():
            assert_near(two[name], gradient, 1e-6)


@every_kind
def test_rows_and_targets_go_together(config):
    model, (ids, labels) = host("gpt2", config), labelled()
    unrolled = unroll(model, ids, labels)
    assert unrolled.rows.tolist() == [row for row in range(3) for _ in range(8)]
    assert torch.equal(unrolled.targets, labels[labels != IGNORED])
    assert torch.equal(unrolled.correct, unrolled.logits.argmax(-1) == unrolled.targets)
    with torch.no_grad():
        logits = feed(model, ids, [SEGMENT] * 6, carried=mnemic.memory_cache(model, config.window or SEGMENT))
    assert_near(unrolled.logits, logits[:, :-1][labels[:, 1:] != IGNORED])


# --- the trainer -----------------------------------------------------------------------------------------------------


@every_trained_kind
def test_training_lowers_the_loss(config):
    model, fixed = start(config=config), batches(0)
    base = {name: p.clone() for name, p in training.base_parameters(model).items()}
    steps = list(train(model, lambda step: fixed, steps=40, learning_rate=0.01))
    assert [step.step for step in steps] == list(range(40))
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[-1].accuracy > steps[0].accuracy
    assert steps[0].accuracy == steps[0].correct.float().mean().item()
    assert steps[0].rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    for name, parameter in training.base_parameters(model).items():
        assert torch.equal(parameter, base[name]), f"the base's {name} moved"


@pytest.mark.parametrize("reach", [None, 1])
def test_a_disabled_memory_leaves_the_base_alone(reach):
    model, (ids, labels) = make("gpt2"), labelled()
    attachment = mnemic.attach(model, CONFIG, freeze=False)
    with attachment.disabled():
        results = []
        for parallel in (True, False):
            model.zero_grad()
            result = unroll(model, ids, labels, parallel=parallel, bptt_segments=reach)
            result.loss.backward()
            results.append((result, {k: p.grad.clone() for k, p in training.base_parameters(model).items()}))
    (one, gradients_one), (other, gradients_other) = results
    assert_near(one.loss, other.loss, 1e-6)
    assert one.stream.seen == other.stream.seen == (0,) * 3
    for name, gradient in gradients_one.items():
        assert_near(gradients_other[name], gradient, 1e-6)


@pytest.mark.parametrize("reach", [None, 0, 1])
def test_the_base_trains_all_at_once_as_one_after_another(reach):
    model, (ids, labels) = make("llama"), labelled()
    attachment = mnemic.attach(model, CONFIG, freeze=False)
    shake(attachment.memory)
    results = []
    for parallel in (True, False):
        model.zero_grad()
        unroll(model, ids, labels, parallel=parallel, bptt_segments=reach).loss.backward()
        results.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert_near(results[1][name], gradient, 1e-5)


def test_a_memory_without_weights_trains_its_host():
    model = make("llama")
    mnemic.attach(model, mnemic.TransformerXLConfig(segment_length=SEGMENT, size=SEGMENT), freeze=False)
    steps = list(train(model, lambda step: batches(0), steps=20, learning_rate=0.01))
    assert steps[-1].loss < 0.5 * steps[0].loss
    frozen = make("llama")
    mnemic.attach(frozen, mnemic.TransformerXLConfig(segment_length=SEGMENT, size=SEGMENT))
    with pytest.raises(ValueError, match="nothing trains: this memory has no weights and the model's own are frozen"):
        next(train(frozen, batches, steps=1))


class Penalised(mnemic.memories.emt.EMT):
    """An EMT with a loss of its own: the mean square of what it writes, by its first parameter."""

    calls = 0

    def auxiliary(self, hidden_btd, state, keep_bt=None):
        Penalised.calls += 1
        return next(self.parameters()).square().sum() * hidden_btd.detach().square().mean((1, 2))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("reach", [None, 0, 1])
@pytest.mark.parametrize("advance", [True, False])
def test_auxiliary_losses_are_the_mean_over_segments_and_rows(parallel, reach, advance, monkeypatch):
    model, (ids, labels) = host("gpt2", CONFIG), labelled()
    memory = mnemic.attached(model).memory
    plain = unroll(model, ids, labels, parallel=parallel, bptt_segments=reach)
    assert plain.auxiliary == 0
    monkeypatch.setattr(type(memory), "auxiliary", Penalised.auxiliary)
    Penalised.calls = 0
    result = unroll(model, ids, labels, parallel=parallel, bptt_segments=reach, advance=advance)
    assert_near(result.loss, plain.loss, 1e-6)
    # every segment that is written once, whatever is run again for gradients
    count = Penalised.calls
    assert count == (6 if advance else 3)
    hidden = features(model, ids.unflatten(1, (-1, SEGMENT)).transpose(0, 1))[:count]
    expected = next(memory.parameters()).square().sum() * hidden.square().mean((2, 3)).mean()
    assert_near(result.auxiliary, expected, 1e-5)
    (gradient,) = torch.autograd.grad(result.auxiliary, [next(memory.parameters())])
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert unroll(model, ids, labels, parallel=parallel).auxiliary == 0
    assert Penalised.calls == count


def test_the_learning_rate_holds_then_falls():
    rates = [step.learning_rate for step in run(start(), 8, schedule=lambda p: hold_then_fall(p, 0.5))]
    assert rates == pytest.approx([0.01] * 5 + [0.0075, 0.005, 0.0025])


@pytest.mark.parametrize(
    ("progress", "hold", "expected"),
    [(0, 0.5, 1), (0.49, 0.5, 1), (0.5, 0.5, 1), (0.75, 0.5, 0.5), (1, 0.5, 0.01), (0.8, 0.6, 0.5), (0.5, 0, 0.5)],
)
def test_hold_then_fall(progress, hold, expected):
    assert hold_then_fall(progress, hold) == pytest.approx(expected)


def test_hold_then_fall_ends_at_the_floor():
    assert hold_then_fall(1, floor=0.2) == 0.2
    assert hold_then_fall(0.85, floor=0.2) == pytest.approx(0.3)


def test_the_gate_learns_faster():
    """Without a clip, AdamW's first step moves every weight by its own rate."""
    model = start()
    before = weights(model)
    run(model, 2, clip=1e9, schedule=lambda progress: 1.0 if progress == 0 else 0.0)
    moved = {name: float((p - before[name]).abs().max()) for name, p in weights(model).items()}
    gates = [name for name in moved if ".gate." in name]
    others = [name for name in moved if ".gate." not in name and moved[name] > 0]
    assert others
    assert all(moved[name] == pytest.approx(0.01, rel=0.05) for name in others)
    # the reader's output starts at zero, so the first step teaches the writer nothing
    assert all(moved[name] == 0 for name in gates)
    trained_model = host("gpt2", CONFIG)
    before = weights(trained_model)
    run(trained_model, 1, clip=1e9)
    moved = {name: float((p - before[name]).abs().max()) for name, p in weights(trained_model).items()}
    assert gates
    assert all(moved[name] == pytest.approx(0.05, rel=0.05) for name in gates)


def test_a_loss_that_is_nan():
    model = start()
    memory = mnemic.attached(model).memory
    before = weights(model)
    with torch.no_grad():
        next(iter(memory.readers["0"])).contract.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        run(model, 3)
    after = {name: p for name, p in weights(model).items() if torch.isfinite(p).all()}
    assert len(after) == len(before) - 1
    assert_equal(after, {name: before[name] for name in after})


def test_the_average_of_the_last_fifth(monkeypatch):
    plain, averaged, seen = start(), start(), []
    for step in train(plain, batches, steps=10, learning_rate=0.01):
        if step.step >= 8:
            seen.append(weights(plain))
    run(averaged, 10, average=0.9)
    expected = {name: seen[0][name].lerp(seen[1][name], 0.1) for name in seen[0]}
    assert apart(weights(averaged), expected) < 1e-6
    assert apart(weights(averaged), seen[1]) > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_average_of_a_few_steps(steps):
    assert len(run(start(), steps, average=0.9)) == steps


# --- going on --------------------------------------------------------------------------------------------------------


@every_trained_kind
@pytest.mark.parametrize(("steps", "stop", "average"), [(8, 4, 0.0), (8, 4, 0.9), (10, 9, 0.9)])
def test_a_resumed_run_equals_a_straight_one(tmp_path, steps, stop, average, config):
    """(10, 9) is stopped within the last fifth, so the checkpoint holds an average that is begun."""
    more = {"steps": steps, "learning_rate": 0.01, "weight_decay": 0.1, "average": average}
    straight = start(config=config)
    losses = [step.loss for step in train(straight, batches, **more)]
    file, first, notes, model = tmp_path / "sub" / "run.safetensors", [], {"stage": 0.0}, start(config=config)
    for step in train(model, batches, notes=notes, checkpoint=file, checkpoint_seconds=-1, **more):
        if step.step == stop:
            break  # the checkpoint tells of the `stop` steps before
        first.append(step.loss)
        notes["stage"] = step.step + 0.5
    assert first == losses[:stop]
    notes["stage"] = -1.0
    resumed, restored = start(1, config), {"stage": 0.0}
    assert apart(weights(resumed), weights(start(config=config))) > 0.1, (
        "the new process would begin like the old one anyway"
    )
    rest = train(resumed, batches, notes=restored, checkpoint=file, checkpoint_seconds=1e9, **more)
    step = next(rest)
    assert restored == {"stage": stop - 0.5}
    assert [step.loss, *(step.loss for step in rest)] == losses[stop:]
    assert_equal(weights(resumed), weights(straight))
    # a finished run has nothing left to do and gives its result
    again = start(2, config)
    assert list(train(again, batches, checkpoint=file, **more)) == []
    assert_equal(weights(again), weights(straight))


def test_time_goes_on_after_a_stop(tmp_path):
    file = tmp_path / "run.safetensors"
    last = run(start(), 3, checkpoint=file)[-1]
    (step,) = list(train(start(1), batches, steps=4, checkpoint=file))
    assert step.step == 3
    assert step.seconds > last.seconds


def test_without_a_checkpoint_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(start(), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_memory(tmp_path):
    file = tmp_path / "run.safetensors"
    run(start(), 2, checkpoint=file)
    for changes in ({"slots": 5}, {"stack": 2}, {"write": "token"}):
        other = start(config=CONFIG.replace(**changes))
        before = weights(other)
        with pytest.raises(mnemic.StateError, match="not a checkpoint of this memory's training"):
            run(other, 3, checkpoint=file)
        assert_equal(weights(other), before)


def test_a_session_is_no_checkpoint(tmp_path):
    file, model = tmp_path / "session", host("gpt2", CONFIG)
    session = mnemic.Session(model)
    session.read(tokens(1, 20))
    session.save(file)
    with pytest.raises(mnemic.StateError, match="not a checkpoint"):
        run(model, 2, checkpoint=file)


# --- calibration -----------------------------------------------------------------------------------------------------


def varied(rows=512):
    """Streams of three segments, the last one asks."""
    ids = tokens(rows, 3 * SEGMENT)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -4:] = ids[:, -4:]
    return Batch(ids, labels)


@torch.no_grad()
def test_calibrated_write_features_are_white():
    model = make("llama")
    memory = mnemic.attach(model, CONFIGS["emt-1"]).memory
    batch = varied()
    calibrate(model, batch)
    writer = memory.writers[0]
    silent = batch.input_ids[:, : 2 * SEGMENT].unflatten(1, (-1, SEGMENT)).flatten(0, 1)
    hidden = mnemic.attached(model).router.watch(training.examine(model), silent, [Site(1)])[Site(1)].flatten(0, 1)
    white, plain = writer.prepare(hidden), writer.norm_hidden(hidden)
    covariance, before = torch.cov(white.T), torch.cov(plain.T)
    assert white.mean(0).abs().max() < 1e-2
    # LayerNorm leaves nothing along (1, ..., 1), and the ridge keeps directions of little variance below 1
    values, vectors = torch.linalg.eigh(before.double())
    ample = values > 0.15 * values.mean()
    assert ample.sum() > 40
    basis = vectors[:, ample].float()
    assert_near(basis.T @ covariance @ basis, torch.eye(int(ample.sum())), 1e-2)
    assert_differ(basis.T @ before @ basis, torch.eye(int(ample.sum())), 0.5)
    shrunk = values / (values + 1e-3 * values.mean())
    assert_near(torch.diagonal(vectors.T.float() @ covariance @ vectors.float()), shrunk.float(), 1e-2)


@torch.no_grad()
def test_readers_are_fitted_where_they_are_asked():
    model = make("llama")
    memory = mnemic.attach(model, CONFIGS["emt-1"]).memory
    batch = varied()
    calibrate(model, batch)
    asking = batch.input_ids[:, -SEGMENT:]
    router = mnemic.attached(model).router
    seen = router.watch(training.examine(model), asking, memory.reads)
    for site, hidden in seen.items():
        (reader,) = memory.readers[str(site.layer)]
        # the tokens from which the last four are predicted
        expected = reader.norm_hidden(hidden[:, -5:-1].flatten(0, 1)).mean(0)
        assert_near(reader.whiten.mean, expected, 1e-4)
        assert_differ(reader.whiten.mean, reader.norm_hidden(hidden.flatten(0, 1)).mean(0), 1e-3)


@torch.no_grad()
def test_calibration_moves_whitening_alone_and_without_it_nothing():
    for label in ("emt-0", "emt-1", "emt-2"):
        model = host("gpt2", CONFIGS[label])
        memory, ids = mnemic.attached(model).memory, tokens(2, 3 * SEGMENT)
        before, logits = copy.deepcopy(memory.state_dict()), feed(model, ids)
        calibrate(model, varied(64))
        changed = {name for name, tensor in memory.state_dict().items() if not torch.equal(tensor, before[name])}
        whiten = CONFIGS[label].whiten
        expected = {
            f"{name}.{part}"
            for name, module in memory.named_modules()
            if isinstance(module, Whitening)
            for part in ("mean", "matrix")
        }
        assert changed == expected
        assert bool(changed) == whiten
        (assert_differ if whiten else assert_near)(feed(model, ids), logits)


@pytest.mark.parametrize("label", ["recall-0", "knn-lm-0", "compact-0", "rmt-0"])
def test_where_nothing_is_fitted_calibration_does_nothing(label):
    model = host("llama", CONFIGS[label])
    before = copy.deepcopy(mnemic.attached(model).memory.state_dict())
    calibrate(model, varied(4))
    after = mnemic.attached(model).memory.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_unfitted_whitening_is_the_identity():
    ids = torch.randn(5, 7)
    assert torch.equal(Whitening(7, bound=False)(ids), ids)


def test_calibration_writes_nothing_and_leaves_the_memory_on():
    model = host("gpt2", CONFIGS["emt-1"])
    calibrate(model, varied(16))
    attachment = mnemic.attached(model)
    assert attachment.router.enabled
    cache = mnemic.memory_cache(model, SEGMENT)
    with torch.no_grad():
        call(model, tokens(1, SEGMENT), cache)
    assert cache.memory.stream.written == (1,)


def test_where_every_segment_has_a_loss_a_training_base_runs_them_one_after_another(monkeypatch):
    model, (ids, labels) = make("gpt2"), labelled()
    mnemic.attach(model, CONFIG, freeze=False)
    seen = []
    monkeypatch.setattr(unrolling, "_one_after_another", lambda *a: seen.append("one"))
    monkeypatch.setattr(unrolling, "_all_at_once", lambda *a: seen.append("all"))
    for given in (ids, labels):
        with pytest.raises(TypeError):  # the stand-ins return nothing
            unroll(model, ids, given)
    with torch.no_grad(), pytest.raises(TypeError):
        unroll(model, ids, ids)
    assert seen == ["one", "all", "all"]


def test_an_empty_batch_is_named_so():
    model, ids = host("llama", CONFIGS["emt-0"]), tokens(2, 3 * SEGMENT)
    for empty in (ids[:0], ids[:0, :5]):
        with pytest.raises(ValueError, match=r"the batch is empty \(0 rows\)"):
            next(mnemic.train(model, lambda _, empty=empty: mnemic.Batch(empty, empty), steps=1))
