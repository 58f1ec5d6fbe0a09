"""The Trainer for streams, its curriculum and evaluation, and runs that are killed and go on."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import mnemic
from families import make
from helpers import CONFIGS, SEGMENT, assert_differ, assert_near, every_kind, feed, host, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.trainer import SegmentCurriculum, Trainer, last_checkpoint
from mnemic.unrolling import IGNORED, unroll
from runs import (
    STEPS,
    arguments,
    assert_same_memory,
    characters,
    finish,
    kill_until_done,
    new_model,
    prose,
    train_run,
    trainer_run,
)

QUIET = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


def rows(count, segments=3, seed=0):
    return [{"input_ids": row} for row in tokens(count, segments * SEGMENT, seed)]


def fit(model, folder, data=None, **changes):
    """A Trainer that has trained."""
    own = {name: changes.pop(name) for name in ("callbacks", "bptt_segments", "window") if name in changes}
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=data or rows(8), **own)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in mnemic.attached(model).memory.named_parameters()}


# --- the loss --------------------------------------------------------------------------------------------------------


def test_a_step_is_a_step_of_unroll(tmp_path):
    """The loss, the gradient, its clip, and the rates that a memory scales."""
    one, two = (host("gpt2", CONFIGS["emt-0"], **QUIET) for _ in range(2))
    data = rows(2)
    trainer = fit(one, tmp_path, data, max_steps=1, optim="adamw_torch", max_grad_norm=0.1)
    memory = mnemic.attached(two).memory
    named = dict(memory.named_parameters())
    groups = [{"params": [p], "lr": 1e-2 * memory.rate_scale(name)} for name, p in named.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batch = mnemic.collate(data, SEGMENT)
    unrolled = unroll(two, batch["input_ids"], batch["labels"])
    loss, outputs = trainer.compute_loss(two, batch, return_outputs=True)
    assert loss == unrolled.loss
    assert torch.equal(outputs["logits"], unrolled.logits)
    unrolled.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 0.1)
    optimizer.step()
    assert losses(trainer) == [pytest.approx(unrolled.loss.item(), rel=1e-5)]
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.1
    for name, parameter in weights(one).items():
        assert_near(parameter, named[name].detach(), 1e-5)
    assert len({memory.rate_scale(name) for name in named}) > 1, "nothing here learns faster"


def test_accumulated_batches_count_by_their_labels(tmp_path):
    """Rows of different lengths: one batch of four equals two of two."""
    data = [{"input_ids": tokens(1, length, length)[0]} for length in (5, 24, 17, 8)]
    results = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        model = host("gpt2", CONFIGS["emt-0"], **QUIET)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        results.append((losses(fit(model, tmp_path, data, **settings)), weights(model)))
    for curve, found in results[1:]:
        assert curve == pytest.approx(results[0][0], rel=1e-5)
        for name, parameter in found.items():
            assert_near(parameter, results[0][1][name], 5e-4)


class Penalised(mnemic.memories.emt.EMT):
    """An EMT with a loss of its own."""

    def auxiliary(self, hidden_btd, state, keep_bt=None):
        return next(self.parameters()).square().sum().expand(len(hidden_btd))


def test_a_memorys_own_loss_is_part_of_it(tmp_path, monkeypatch):
    model = host("gpt2", CONFIGS["emt-0"], **QUIET)
    plain = losses(fit(model, tmp_path, rows(4), max_steps=1, per_device_train_batch_size=4))
    model = host("gpt2", CONFIGS["emt-0"], **QUIET)
    memory = mnemic.attached(model).memory
    own = next(memory.parameters()).square().sum().item()
    monkeypatch.setattr(type(memory), "auxiliary", Penalised.auxiliary)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2}
    assert losses(fit(model, tmp_path, rows(4), **settings)) == pytest.approx([plain[0] + own], rel=1e-5)


def test_truncated_backpropagation_reaches_as_far_as_asked(tmp_path):
    found = {}
    for reach in (None, 0, 1):
        model = host("gpt2", CONFIGS["emt-0"], **QUIET)
        fit(model, tmp_path, bptt_segments=reach, max_steps=1)
        found[reach] = weights(model)
    fresh = weights(host("gpt2", CONFIGS["emt-0"]))
    writers = [name for name in fresh if name.startswith("writers")]
    assert all(torch.equal(found[0][name], fresh[name]) for name in writers), "no write has a gradient at reach 0"
    assert any(not torch.equal(found[1][name], fresh[name]) for name in writers)
    assert any(not torch.equal(found[1][name], found[None][name]) for name in writers)


def test_a_window_is_used(tmp_path):
    curves = [
        losses(fit(host("gpt2", CONFIGS["emt-0"], **QUIET), tmp_path, window=size, max_steps=1))
        for size in (None, SEGMENT, 2 * SEGMENT)
    ]
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("kind", ["emt-0", "rmt-0"])
def test_flags_of_the_arguments(tmp_path, kind):
    curves = {}
    for flag in ("plain", "bf16", "activation_checkpointing"):
        model = host("llama", CONFIGS[kind])
        curves[flag] = losses(fit(model, tmp_path, **({} if flag == "plain" else {flag: True})))
        assert all(parameter.dtype == torch.float32 for parameter in mnemic.attached(model).parameters())
    assert curves["activation_checkpointing"] == pytest.approx(curves["plain"], rel=1e-5)
    assert curves["bf16"] == pytest.approx(curves["plain"], rel=0.02)
    assert curves["bf16"] != curves["plain"]


def test_checkpointing_with_a_longer_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient checkpointing drops the base's keys"):
        fit(host("llama", CONFIGS["emt-0"]), tmp_path, window=2 * SEGMENT, activation_checkpointing=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"torch_compile": True}, "torch_compile is True"),
        ({"fsdp": True}, "fsdp is .*, which mnemic.Trainer does not serve"),
    ],
)
def test_what_would_be_passed_over_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(new_model(), arguments(tmp_path, **changes))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process cannot train on 2 GPUs; start one for each"):
        Trainer(new_model(), arguments(tmp_path))


def test_models_that_cannot_be_trained(tmp_path):
    with pytest.raises(RuntimeError, match="has no memory"):
        Trainer(make("gpt2"), arguments(tmp_path))
    with pytest.raises(ValueError, match="is an encoder"):
        Trainer(host("bert", CONFIGS["emt-0"]), arguments(tmp_path))
    with pytest.raises(ValueError, match="compute_loss_func"):
        Trainer(new_model(), arguments(tmp_path), compute_loss_func=print)
    with pytest.raises(ValueError, match="unknown controls nothing"):
        Trainer(new_model(), arguments(tmp_path), controls=("nothing",))
    frozen = make("llama")
    mnemic.attach(frozen, mnemic.TransformerXLConfig(segment_length=SEGMENT, size=SEGMENT))
    with pytest.raises(ValueError, match="nothing trains"):
        fit(frozen, tmp_path)


def test_a_loss_that_is_nan(tmp_path):
    model = host("gpt2", CONFIGS["emt-0"])
    with torch.no_grad():
        next(iter(mnemic.attached(model).memory.readers["0"])).contract.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        fit(model, tmp_path)


def test_without_accelerate_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"mnemic.Trainer needs accelerate: pip install 'mnemic\[train\]'"):
        _ = mnemic.Trainer
    with pytest.raises(AttributeError, match="no attribute 'Trainers'"):
        _ = mnemic.Trainers


def test_rows_of_the_package_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = [{"input_ids": tokens(1, n, n)[0].tolist()} for n in (5, 24, 17, 8)]
    table = datasets.Dataset.from_list([row | {"text": "not the model's"} for row in data])
    curves = [losses(fit(host("gpt2", CONFIGS["emt-0"]), tmp_path, rows)) for rows in (data, table)]
    assert curves[0] == curves[1]


def test_the_plain_trainer_with_this_collator(tmp_path):
    """Its rows are single calls, in which the base sees everything: as if rows were padded by hand."""
    data = [{"input_ids": tokens(1, length, length)[0]} for length in (5, 24)]
    padded = [
        {
            "input_ids": F.pad(row["input_ids"], (0, 24 - len(row["input_ids"]))),
            "labels": F.pad(row["input_ids"], (0, 24 - len(row["input_ids"])), value=IGNORED),
        }
        for row in data
    ]
    found = []
    for rows, collator in ((data, mnemic.SegmentCollator(SEGMENT)), (padded, None)):
        model = host("gpt2", CONFIGS["emt-0"], **QUIET)
        trainer = transformers.Trainer(model, arguments(tmp_path), data_collator=collator, train_dataset=rows)
        trainer.train()
        found.append((losses(trainer), weights(model)))
    assert found[0][0] == found[1][0]
    fresh = weights(host("gpt2", CONFIGS["emt-0"]))
    for name, parameter in found[0][1].items():
        assert torch.equal(parameter, found[1][1][name])
    assert any(not torch.equal(parameter, fresh[name]) for name, parameter in found[0][1].items())


def test_the_documentations_recipes(tmp_path, monkeypatch):
    """Every example of the page, one after another, on a tiny model and a made-up book."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(prose(4000))
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: make("gpt2"))
    monkeypatch.setattr(mnemic, "fetch", lambda name: name)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: characters())
    names = {}
    for block in blocks:
        exec(compile(block, "training.md", "exec", dont_inherit=True), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 20
    assert last_checkpoint("run/trainer").name == "checkpoint-20"
    mnemic.from_pretrained(make("gpt2"), "my-memory")


# --- curriculum ------------------------------------------------------------------------------------------------------


def test_rows_grow_with_the_curriculum(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mnemic.trainer.unroll", lambda model, ids, *a, **k: seen.append(ids.shape) or unroll(model, ids, *a, **k)
    )
    curriculum = SegmentCurriculum([(0, 1), (2, 2), (3, 9)])
    trainer = fit(new_model(), tmp_path, max_steps=4, callbacks=[curriculum], gradient_accumulation_steps=2)
    assert [shape[1] // SEGMENT for shape in seen] == [1, 1, 1, 1, 2, 2, 3, 3], "a row has no more than it has"
    assert {shape[0] for shape in seen} == {2}
    # a mean over the labels that are left: cut before they are counted
    assert losses(trainer)[0] == pytest.approx(math.log(97), rel=0.2)


@pytest.mark.parametrize("stages", [[], [(1, 1)], [(0, 1), (0, 2)], [(0, 1), (5, 2), (3, 3)], [(0, 0)]])
def test_stages_that_are_none(stages):
    with pytest.raises(ValueError, match="from step 0 on, in order"):
        SegmentCurriculum(stages)


# --- evaluation ------------------------------------------------------------------------------------------------------


def reference(model, data, state=None, disabled=False):
    """Loss and accuracy over all rows, segment by segment, with a state put in place of each segment's own."""
    batch = mnemic.collate(data, SEGMENT)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    cache, logits = mnemic.memory_cache(model, SEGMENT), []
    router = mnemic.attached(model).router
    for part in batch["input_ids"].split(SEGMENT, 1):
        if disabled:
            with mnemic.attached(model).disabled():
                logits.append(model(part, use_cache=False).logits)
            continue
        branch = mnemic.memory_cache(model, SEGMENT)
        own = (cache.memory.stream or router.new_stream(len(part))).state
        branch.memory.stream = router.new_stream(len(part), own if state is None else state(own))
        logits.append(model(part, **{CACHE: branch}).logits)
        model(part, **{CACHE: cache})
    whole = torch.cat(logits, 1)
    kept = targets != IGNORED
    right = (whole.argmax(-1) == targets)[kept].float().mean().item()
    return F.cross_entropy(whole[kept], targets[kept]).item(), right


def test_evaluation_reports_every_control(tmp_path):
    model = host("llama", CONFIGS["emt-0"])
    data = [{"input_ids": tokens(1, n, n)[0]} for n in (5, 24, 17, 8)]
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=data)
    found = trainer.evaluate()
    with torch.no_grad():
        pairs = [data[:2], data[2:]]
        counts = [sum(len(row["input_ids"]) - 1 for row in pair) for pair in pairs]
        for name, options in {
            "": {},
            "_no_memory": {"disabled": True},
            "_zeroed": {"state": lambda own: {k: torch.zeros_like(v) for k, v in own.items()}},
            "_other_stream": {"state": lambda own: {k: v.flip(0) for k, v in own.items()}},
        }.items():
            parts = [reference(model, pair, **options) for pair in pairs]
            for place, measure in enumerate(("loss", "accuracy")):
                mean = sum(part[place] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
                assert found[f"eval_{measure}{name}"] == pytest.approx(mean, abs=1e-5), (measure, name)
    assert len({found[f"eval_loss{name}"] for name in ("", "_no_memory", "_zeroed", "_other_stream")}) == 4
    assert mnemic.attached(model).router.enabled


@every_kind
def test_every_mechanism_is_evaluated(config, tmp_path):
    """With the own memory it is the loss of `unroll`, in its window and in a longer one; controls have their effect."""
    model = host("llama", config)
    data = rows(3, 4)
    batch = mnemic.collate(data, SEGMENT)
    batch["labels"][:, : 2 * SEGMENT] = IGNORED
    data = [{name: tensor[row] for name, tensor in batch.items()} for row in range(3)]
    for window in (None, 2 * SEGMENT):
        trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=3), eval_dataset=data, window=window)
        found = trainer.evaluate()
        with torch.no_grad():
            own = unroll(model, batch["input_ids"], batch["labels"], window=window)
            with mnemic.attached(model).disabled():
                alone = unroll(model, batch["input_ids"], batch["labels"], window=window)
        assert found["eval_loss"] == pytest.approx(own.loss.item(), abs=1e-5)
        assert found["eval_accuracy"] == pytest.approx(own.correct.float().mean().item())
        assert found["eval_loss_no_memory"] == pytest.approx(alone.loss.item(), abs=1e-5)
        assert found["eval_loss_no_memory"] != pytest.approx(found["eval_loss"], abs=1e-5)
        if window is None:  # in a longer one, a memory of one segment may be seen by nobody
            assert found["eval_loss_other_stream"] != pytest.approx(found["eval_loss"], abs=1e-6)


def test_evaluation_ends_with_a_verdict(tmp_path, capsys):
    model = host("llama", CONFIGS["emt-0"])
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=rows(4))
    found = trainer.evaluate()
    gain = found["eval_loss_other_stream"] - found["eval_loss"]
    assert f"{gain:+.4f} nats a token over 4 rows" in trainer.verdict
    assert trainer.verdict.endswith(" is remembered")
    assert capsys.readouterr().out.splitlines()[-1] == trainer.verdict
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.evaluate()
    assert capsys.readouterr().out == ""
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows(4), controls=("zeroed",))
    trainer.evaluate()
    assert trainer.verdict is None


@pytest.mark.parametrize("lengths", [[5], [SEGMENT, 3, SEGMENT], [SEGMENT + 1]])
def test_rows_of_a_segment_or_less_are_refused(lengths, tmp_path):
    """Nothing is read before the second segment, and its first token is predicted from before."""
    model = host("llama", CONFIGS["emt-0"])
    short = [{"input_ids": tokens(1, n, n)[0]} for n in lengths]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=short)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"none of the first {len(lengths)} rows has a label .*mnemic.Streams"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    Trainer(model, arguments(tmp_path), train_dataset=[*short, {"input_ids": tokens(1, 10)[0]}]).train()


def test_what_else_leaves_nothing_to_remember_is_refused(tmp_path):
    def trainer(data, collator=None, **options):
        return Trainer(host("llama", CONFIGS["emt-0"]), arguments(tmp_path), collator, train_dataset=data, **options)

    early = rows(2)
    for row in early:
        row["labels"] = row["input_ids"].clone()
        row["labels"][SEGMENT:] = IGNORED
    short = [{"input_ids": tokens(1, 6)[0]}]
    for made, match in (
        (trainer(early), "labels there"),
        (trainer(short, lambda rows: mnemic.collate(rows, SEGMENT)), "longer rows"),
        (trainer(rows(2), mnemic.SegmentCollator(SEGMENT, segments=1)), "the SegmentCollator more segments than 1"),
        (
            trainer(rows(2), callbacks=[SegmentCurriculum([(0, 1)])]),
            "the SegmentCurriculum never goes beyond 1 segment",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            made.train()
    trainer(rows(2), callbacks=[SegmentCurriculum([(0, 1), (1, 2)])]).train()


def test_a_collator_s_padding_and_labels_are_looked_at(tmp_path):
    def stack(batch, **more):
        ids = torch.stack([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids, **more}

    def left(batch):
        mask = torch.ones(len(batch), 3 * SEGMENT, dtype=torch.long)
        mask[0, :2] = 0
        return stack(batch, attention_mask=mask)

    def unlabelled(batch):
        return {"input_ids": stack(batch)["input_ids"]}

    for collator, match in ((left, "left put padding before tokens"), (unlabelled, "unlabelled made no labels")):
        trainer = Trainer(host("llama", CONFIGS["emt-0"]), arguments(tmp_path), collator, train_dataset=rows(4))
        with pytest.raises(ValueError, match=match):
            trainer.train()


def test_each_of_several_datasets_has_its_verdict_once(tmp_path, capsys):
    data = {"one": rows(4), "two": rows(4, seed=1)}
    model = host("llama", CONFIGS["emt-0"])
    Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=data).evaluate()
    assert capsys.readouterr().out.count(" is remembered") == 2


def test_another_collator_s_rows_are_told_from_segments(tmp_path):
    def stack(batch):
        ids = torch.stack([row["input_ids"][:13] for row in batch])
        return {"input_ids": ids, "labels": ids}

    trainer = Trainer(host("llama", CONFIGS["emt-0"]), arguments(tmp_path), stack, train_dataset=rows(4))
    with pytest.raises(ValueError, match=r"stack made rows of 13 tokens, .*mnemic\.SegmentCollator\(8\)"):
        trainer.train()


def test_a_step_is_told_in_a_line():
    ids = tokens(2, 3 * SEGMENT)
    step = next(mnemic.train(host("llama", CONFIGS["emt-0"]), lambda _: mnemic.Batch(ids, ids), steps=1))
    assert re.fullmatch(r"step 0: loss \d\.\d{4}, \d+\.\d% right, \d+\.\d s", str(step))
    assert "tensor" not in repr(step)


def test_a_batch_of_one_row_has_no_other_stream(tmp_path):
    model = host("llama", CONFIGS["emt-0"])
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=rows(3))
    with pytest.warns(UserWarning, match="eval_loss_other_stream is left out: .*per_device_eval_batch_size"):
        found = trainer.evaluate()
    assert "eval_loss_other_stream" not in found
    assert "eval_accuracy_other_stream" not in found
    assert "over 2 rows" in trainer.verdict
    assert all(math.isfinite(found[f"eval_loss{name}"]) for name in ("", "_no_memory", "_zeroed"))


def test_prediction_gives_logits_beside_their_labels(tmp_path):
    model = host("gpt2", CONFIGS["emt-0"])
    data = rows(4)
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2), controls=())
    found = trainer.predict(data)
    ids = torch.stack([row["input_ids"] for row in data])
    expected = feed(model.eval(), ids, [SEGMENT] * 3, carried=mnemic.memory_cache(model, SEGMENT))
    assert_near(torch.from_numpy(found.predictions), expected, 1e-4)
    assert found.label_ids.tolist() == ids.tolist()
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert found.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert "test_loss_no_memory" not in found.metrics


def test_metrics_of_ones_own(tmp_path):
    model = host("gpt2", CONFIGS["emt-0"])

    def measure(prediction):
        return {"right": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    settings = arguments(tmp_path, per_device_eval_batch_size=2)
    found = Trainer(model, settings, eval_dataset=rows(4), compute_metrics=measure).evaluate()
    assert found["eval_right"] == pytest.approx(found["eval_accuracy"])


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_only_the_memory_is_saved(tmp_path):
    model = new_model()
    trainer = fit(model, tmp_path / "run", save_strategy="steps", save_steps=1)
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    kept = {"memory_config.json", "memory_model.safetensors"}
    assert names == kept | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    trainer.save_model(tmp_path / "memory")
    assert {path.name for path in (tmp_path / "memory").iterdir()} == kept
    again = make("gpt2")
    mnemic.from_pretrained(again, tmp_path / "memory")
    ids = tokens(2, 2 * SEGMENT, 7)
    assert torch.equal(feed(again, ids), feed(model.eval(), ids))


def test_a_base_that_trains_is_saved_beside_its_memory(tmp_path):
    model = new_model(name="llama", freeze=False)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = fit(model, tmp_path / "run", **settings)
    straight.save_model(tmp_path / "both")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert not [name for name in again.state_dict() if "mnemic" in name]
    mnemic.from_pretrained(again, tmp_path / "both")
    ids = tokens(2, 2 * SEGMENT, 7)
    assert torch.equal(feed(again, ids), feed(model.eval(), ids))
    assert_differ(feed(again, ids), feed(new_model(name="llama"), ids))
    # and it goes on with both
    other = new_model(1, "llama", freeze=False)
    resumed = Trainer(other, arguments(tmp_path / "run", **settings), train_dataset=rows(8))
    resumed.train(str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(straight)
    assert torch.equal(feed(other.eval(), ids), feed(model, ids))


def test_adapters_are_saved_beside_the_memory(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        torch.manual_seed(seed)
        model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
        mnemic.attach(model, CONFIGS["emt-0"], freeze=False)
        return model

    model, settings = adapted(0), {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = fit(model, tmp_path / "run", **settings)
    straight.save_model(tmp_path / "both")
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"adapter_model.safetensors", "memory_model.safetensors"} <= names
    assert "model.safetensors" not in names
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "both")
    mnemic.from_pretrained(again, tmp_path / "both")
    ids = tokens(2, 2 * SEGMENT, 7)
    assert torch.equal(feed(again.eval(), ids), feed(model.eval(), ids))
    other = adapted(1)
    resumed = Trainer(other, arguments(tmp_path / "run", **settings), train_dataset=rows(8))
    resumed.train(str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(straight)
    assert torch.equal(feed(other.eval(), ids), feed(model, ids))


def test_the_best_memory_is_loaded_at_the_end(tmp_path):
    """The one of the highest loss, so that it is not the last."""
    model, data = new_model(), rows(8)
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=3,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,
            **settings,
        ),
        train_dataset=data,
        eval_dataset=data,
        controls=(),
    )
    trainer.train()
    curve = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(curve) != curve[-1], "the last is the best, so nothing is shown"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(curve), rel=1e-6)


def test_a_checkpoint_of_another_memory(tmp_path):
    fit(new_model(), tmp_path, save_strategy="steps", save_steps=2)
    other = new_model(kind="emt-2")
    before = weights(other)
    trainer = Trainer(other, arguments(tmp_path, max_steps=4), train_dataset=rows(8))
    with pytest.raises(mnemic.StateError, match="was written with another memory"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in weights(other).items())


def test_the_last_whole_checkpoint(tmp_path):
    trainer = fit(new_model(), tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:200])
    assert last_checkpoint(tmp_path).name == "checkpoint-2", "one that was being written is taken for whole"
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    resumed = Trainer(new_model(1), arguments(tmp_path, max_steps=3), train_dataset=rows(8))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(trainer)
    shutil.rmtree(tmp_path)
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        Trainer(new_model(), arguments(tmp_path), train_dataset=rows(8)).train(resume_from_checkpoint=True)


def test_a_run_that_has_ended_makes_no_step_more(tmp_path):
    """Neither in the middle of an epoch nor at its end."""
    for steps in (2, 4):
        folder, model = tmp_path / str(steps), new_model()
        trainer = fit(model, folder, save_strategy="steps", save_steps=1, max_steps=steps)
        again = Trainer(new_model(1), arguments(folder, max_steps=steps), train_dataset=rows(8))
        again.train(resume_from_checkpoint=True)
        assert losses(again) == losses(trainer)
        assert again.state.global_step == steps
        assert all(torch.equal(parameter, weights(model)[name]) for name, parameter in weights(again.model).items())


# --- killed and gone on ----------------------------------------------------------------------------------------------


def test_a_trainer_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(trainer_run, straight)
    assert kill_until_done(trainer_run, broken, kills=4) >= 3
    curve = json.loads((straight / "result").read_text())
    assert len(curve) == STEPS + 4, "every step, three evaluations and a summary"
    assert json.loads((broken / "result").read_text()) == curve
    assert_same_memory(broken / "memory", straight / "memory")


def test_train_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(train_run, straight)
    assert kill_until_done(train_run, broken, kills=4) >= 3
    curve = dict(map(json.loads, (straight / "curve").read_text().splitlines()))
    assert list(curve) == list(range(STEPS))
    for line in (broken / "curve").read_text().splitlines():
        step, values = json.loads(line)
        assert values == curve[step], f"step {step} went another way"
    assert_same_memory(broken / "memory", straight / "memory")
