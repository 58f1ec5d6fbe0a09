"""From a GGUF file to an ordinary Hugging Face folder, for the architectures of `mnemic.checkpoints`.

    folder/config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, chat_template

`transformers` reads GGUF too, but in minutes where this takes seconds, and without the file's rule for splitting
digits. Numbers are those that `transformers` reads, bit by bit; a test compares the two.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

VALUES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
"""How the format names the types of its values: numbers of `VALUES`, or one of these."""

CONTROL, USER_DEFINED = 3, 4
"""Tokens that text does not hold, and tokens that are taken out of text before any other."""

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "llama": {**BLOCK, "ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        **BLOCK,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
STEM = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Entry(NamedTuple):
    """One tensor of a file: its quantisation as the format numbers it, its shape, and its bytes."""

    kind: int
    shape: tuple[int, ...]
    start: int


class GGUF:
    """A GGUF file: `metadata` by name, `entries` of tensors by name. A context manager; closing it unmaps the file."""

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 0
        if self.data[:4] != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
        self.at = 4
        version, tensors, keys = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3 are read")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text()
            self.metadata[name] = self._value(self._number("<I"))
        found = {}
        for _ in range(tensors):
            name = self._text()
            shape = tuple(self._number("<Q") for _ in range(self._number("<I")))[::-1]
            found[name] = (self._number("<I"), shape, self._number("<Q"))
        alignment = self.metadata.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        self.entries = {name: Entry(kind, shape, begin + offset) for name, (kind, shape, offset) in found.items()}

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *_: object) -> None:
        self.data.close()

    def tensor(self, name: str) -> Any:
        """A tensor as a float32 numpy array of its own, whatever its quantisation."""
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        entry = self.entries[name]
        kind = GGMLQuantizationType(entry.kind)
        if kind == GGMLQuantizationType.F32:
            dtype, shape = np.dtype("<f4"), entry.shape
        elif kind == GGMLQuantizationType.F16:
            dtype, shape = np.dtype("<f2"), entry.shape
        else:
            dtype, shape = np.dtype("u1"), quant_shape_to_byte_shape(entry.shape, kind)
        size = int(np.prod(shape)) * dtype.itemsize
        stored = np.frombuffer(self.data[entry.start : entry.start + size], dtype).reshape(shape)
        return dequantize(stored, kind).astype(np.float32).reshape(entry.shape)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def _text(self) -> str:
        size = self._number("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self._number(VALUES[kind])
        of, count = self._number("<I"), self._number("<Q")
        if of not in VALUES:
            return [self._value(of) for _ in range(count)]
        form = f"<{count}{VALUES[of][1]}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)


def convert(path: str | Path, folder: str | Path) -> None:
    """Writes a GGUF file's model, in bfloat16, with its tokenizer and chat template, into a folder that is there.

    Raises:
        ValueError: the file is not GGUF, or holds another architecture or tokenizer than are known here.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    folder = Path(folder)
    with GGUF(path) as file:
        config = config_of(file)
        tensors = {}
        for name in file.entries:
            weight = torch.from_numpy(file.tensor(name))
            tensors[_renamed(file, name)] = _as_trained(file, name, weight).to(torch.bfloat16).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        tokenizer_of(file).save_pretrained(folder)


def config_of(file: GGUF) -> Any:
    """The config that a GGUF file describes: `LlamaConfig` or `Gemma3TextConfig`."""
    from transformers import Gemma3TextConfig, LlamaConfig

    architecture = file.metadata["general.architecture"]
    if architecture not in NAMES:
        raise ValueError(f"the file holds a model of architecture {architecture!r}; known are {', '.join(NAMES)}")

    def of(name: str) -> Any:
        return file.metadata[f"{architecture}.{name}"]

    heads, theta = of("attention.head_count"), of("rope.freq_base")
    common = {
        "vocab_size": len(file.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),  # as written before it was float32
        "tie_word_embeddings": "output.weight" not in file.entries,
        "dtype": "bfloat16",
        **{
            f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{long}_token_id")
            for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    if architecture == "llama":
        return LlamaConfig(
            **common,
            architectures=["LlamaForCausalLM"],
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    return Gemma3TextConfig(
        **common,
        architectures=["Gemma3ForCausalLM"],
        head_dim=of("attention.key_length"),
        query_pre_attn_scalar=of("attention.key_length"),
        sliding_window=of("attention.sliding_window"),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )


def tokenizer_of(file: GGUF) -> Any:
    """The tokenizer that a GGUF file describes, with its special tokens and its chat template, if there is one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def of(name: str) -> Any:
        return file.metadata.get(f"tokenizer.ggml.{name}")

    pieces, kinds, how = of("tokens"), of("token_type"), (of("model"), of("pre"))
    if how == ("gpt2", "smollm"):
        merges = [tuple(merge.split(" ")) for merge in of("merges")]
        tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    elif how == ("llama", "default"):
        pieces = [
            piece.replace(" ", "▁") if kind == USER_DEFINED else piece
            for piece, kind in zip(pieces, kinds, strict=True)
        ]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = _merges(vocabulary, kinds, of("scores"))
        unknown = pieces[of("unknown_token_id")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        raise ValueError(f"the file holds a tokenizer {how[0]!r} with rules {how[1]!r}, which is not known")
    for chosen in (CONTROL, USER_DEFINED):
        tokenizer.add_tokens(
            [
                AddedToken(piece, normalized=False, special=chosen == CONTROL)
                for piece, kind in zip(pieces, kinds, strict=True)
                if kind == chosen
            ]
        )
    special = {
        f"{name}_token": pieces[number]
        for name, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := of(f"{long}_token_id")) is not None
    }
    if of("add_bos_token"):
        begin = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin}:1 $B:1",
            special_tokens=[(begin, of("bos_token_id"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=file.metadata[f"{file.metadata['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        **special,
    )


def _merges(vocabulary: dict[str, int], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores stands for: every way to make a piece of two, best pieces first."""
    ways = []
    for piece, number in vocabulary.items():
        # the format gives tokens that come before all others the score of the worst
        score = 0.0 if kinds[number] == USER_DEFINED else scores[number]
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        found.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ways.extend((score, left, right) for left, right in found)
    ways.sort(key=lambda way: -way[0])
    return [(left, right) for _, left, right in ways]


def _renamed(file: GGUF, name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{STEM[parts[0]]}.{parts[1]}"
    return f"model.layers.{parts[1]}.{NAMES[file.metadata['general.architecture']][parts[2]]}.{parts[3]}"


def _as_trained(file: GGUF, name: str, weight: Any) -> Any:
    """Takes back what the format does to weights: pairs of rotated rows side by side (Llama), norms plus 1 (Gemma)."""
    architecture = file.metadata["general.architecture"]
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = file.metadata[f"llama.attention.head_count{'_kv' if '.attn_k.' in name else ''}"]
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return weight - 1
    return weight
