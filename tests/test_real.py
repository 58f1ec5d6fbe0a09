"""On a real chat model, SmolLM2-135M-Instruct in bfloat16. It is fetched once, and found in the cache after that."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemic
from runs import prose

pytestmark = pytest.mark.real

CONFIG = mnemic.EMTConfig(segment_length=32, slots=8, dim=64, window=256)
TEXT = "Alice lives in Lisbon with her two cats. " * 12
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder():
    try:
        return mnemic.fetch("smollm2")
    except (mnemic.FetchError, ModuleNotFoundError) as error:
        pytest.skip(f"no SmolLM2 here: {error}")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def model(loaded):
    """The model, without a memory before and after a test."""
    yield loaded[0]
    with contextlib.suppress(RuntimeError):
        mnemic.attached(loaded[0]).detach()


def asked(tokenizer):
    message = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]


def test_the_checkpoint_is_what_it_says(loaded):
    """A Llama in bfloat16, tokens for a conversation, and an answer that is right and ends."""
    model, tokenizer = loaded
    assert model.dtype == torch.bfloat16
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (model.generation_config.eos_token_id, model.config.rope_parameters["rope_theta"]) == (2, 100_000)
    assert tokenizer("in  2024").tokens() == ["in", "ĠĠ", "2", "0", "2", "4"]
    ids = asked(tokenizer)
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@torch.no_grad()
def test_a_new_memory_changes_nothing(loaded, model):
    ids = loaded[1](TEXT, return_tensors="pt").input_ids[:, : CONFIG.segment_length]
    expected = model(ids).logits
    for config in (CONFIG, mnemic.MemoriaConfig(segment_length=32), mnemic.FastWeightsConfig(segment_length=32)):
        attachment = mnemic.attach(model, config)
        assert torch.equal(model(ids).logits, expected), config.kind
        attachment.detach()
    assert torch.equal(model(ids).logits, expected)


UNTRAINED = {
    "emt": mnemic.EMTConfig(segment_length=64),
    "memoria": mnemic.MemoriaConfig(segment_length=64),
    "fast-weights": mnemic.FastWeightsConfig(segment_length=64),
    "knn": mnemic.KNNConfig(segment_length=64),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", UNTRAINED)
def test_a_session_with_an_untrained_memory_says_what_the_base_says(kind, loaded, model):
    """A prompt of 300 tokens and 200 greedy ones, over many segments: the base's own, all of them."""
    ids = loaded[1](prose(2000), return_tensors="pt").input_ids[:, :300]
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    expected = model.generate(ids, **options)[0, 300:]
    mnemic.attach(model, UNTRAINED[kind])
    session = mnemic.Session(model)
    assert session.window >= 500
    assert torch.equal(session.generate(ids, **options)[0], expected)


def test_read_generate_save_and_go_on_elsewhere(folder, loaded, model, tmp_path):
    """In another process the same tokens come next, from a file and from a store, and nothing warns."""
    tokenizer = loaded[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        attachment = mnemic.attach(model, CONFIG)
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        attachment.save_pretrained(tmp_path / "memory")
        session = mnemic.Session(model, tokenizer, keep_text=True)
        count = session.read(TEXT)
        assert count > 3 * CONFIG.segment_length
        session.generate("Alice lives in", max_new_tokens=5, do_sample=False)
        assert session.stream.seen[0] > count + 3
        assert CONFIG.card.title in str(mnemic.show(session))
        session.save(tmp_path / "alice.memory")
        with mnemic.SessionStore(f"sqlite:///{tmp_path}/s.db") as store:
            store.put("alice", session)
            here = store.get("alice", model, tokenizer)
        (tmp_path / "job.json").write_text(json.dumps([str(folder), str(tmp_path)]))
        answers = [each.generate(" and", max_new_tokens=6, do_sample=False) for each in (session, here)]
    there = subprocess.run([sys.executable, "-W", "error", __file__, str(tmp_path)], capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    assert answers[0]
    assert [*json.loads(there.stdout), *answers[1:]] == [answers[0]] * 3
    assert there.stderr == ""


@pytest.mark.long
def test_a_chat_through_a_pipe(folder, tmp_path):
    """Two runs of the command are one conversation."""
    command = [str(Path(sys.executable).with_name("mnemic")), "chat", str(folder), "--greedy", "--max-new-tokens", "10"]
    told = []
    for line in (QUESTION, "And of Italy?"):
        run = subprocess.run(
            [*command, "--store", f"sqlite:///{tmp_path}/m.db"], input=line, capture_output=True, text=True, check=True
        )
        assert run.stderr == ""
        told.append(run.stdout)
    assert "is new" in told[0]
    assert "Paris" in told[0]
    assert "goes on after" in told[1]
    assert "Rome" in told[1]


def elsewhere(folder: Path) -> None:
    """What the other process does: goes on from the file and from the store, and says what comes next."""
    checkpoint, _ = json.loads((folder / "job.json").read_text())
    model, tokenizer = load(checkpoint)
    mnemic.from_pretrained(model, folder / "memory")
    with mnemic.SessionStore(f"sqlite:///{folder}/s.db") as store:
        sessions = [
            mnemic.Session.load(folder / "alice.memory", model, tokenizer),
            store.get("alice", model, tokenizer),
        ]
    print(json.dumps([each.generate(" and", max_new_tokens=6, do_sample=False) for each in sessions]))


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    import transformers

    transformers.logging.disable_progress_bar()
    elsewhere(Path(sys.argv[1]))
