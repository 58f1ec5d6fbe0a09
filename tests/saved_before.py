"""Memories and sessions as some release saved them, under `saved/`. What was saved once must load ever after.

    python tests/saved_before.py

adds those of forms of mechanisms that are not there yet, and leaves the others as they are. Names of folders behind it
are of those that go on otherwise in this release, as their mechanism's write was mended: what they say is made anew of
what was saved. Weights are whole numbers divided, so that they are the same on every release of torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mnemic

SAVED = Path(__file__).parent / "saved"
EXPECTED = SAVED / "expected.safetensors"
"""What the model says of the `NEXT` tokens after a saved session, by the name of its folder."""
VOCABULARY, READ, NEXT = 31, 43, 13
"""Sessions have read five segments of 8 and a part of one; the next tokens end two."""

COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HOSTS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, num_key_value_heads=1)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**COMMON)),
}


def ids(first: int, count: int) -> Tensor:
    """The tokens `first` and following of the one stream `[1, t]`."""
    place = torch.arange(first, first + count)
    return ((place * place * 7 + place * 3) % 101 % (VOCABULARY - 3) + 3)[None]


def fill(module: nn.Module, scale: float) -> None:
    """Weights of up to `scale` to both sides of 0, of norms to those of 1."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            place = torch.arange(parameter.numel()) % 10_007
            whole = (place * place * 7919 + place * 1009 + number * 613) % 10_007
            middle = 1.0 if "norm" in name.lower() and name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_((middle + scale * (whole.double() / 5003 - 1)).view(parameter.shape))


def base(name: str) -> Any:
    """The host, the same everywhere."""
    model = HOSTS[name]().eval()
    fill(model, 0.5)
    return model


@torch.no_grad()
def said(session: mnemic.Session) -> Tensor:
    """The logits `[t, v]` of the next tokens, in two calls: that of an encoder is a segment at most."""
    return torch.cat([session.forward(part).logits[0] for part in ids(READ, NEXT).split(8, 1)])


def load(folder: Path) -> tuple[Any, mnemic.Session]:
    """A model with the saved memory, and the saved session."""
    model = base(folder.name.rpartition("-")[2])
    mnemic.from_pretrained(model, folder)
    return model, mnemic.Session.load(folder / "session.memory", model)


def _save(name: str, label: str, config: mnemic.MemoryConfig) -> Tensor | None:
    """What the model says after the session that this saves; None where the memory does not serve the host."""
    model = base(name)
    try:
        attachment = mnemic.attach(model, config)
    except ValueError:
        return None
    fill(attachment.memory, 0.4)
    folder = SAVED / f"{label}-{name}"
    attachment.save_pretrained(folder)
    session = mnemic.Session(model, window=16 if name == "llama" else None)
    session.read(ids(0, READ))
    session.save(folder / "session.memory")
    return said(session)


def main(*otherwise: str) -> None:
    """Adds what is missing: all forms of a mechanism on a decoder, the first on an encoder."""
    expected = load_file(EXPECTED) if EXPECTED.exists() else {}
    expected |= {name: said(load(SAVED / name)[1]) for name in otherwise}
    written = {path.parent.name: json.loads(path.read_text())["memory"] for path in SAVED.glob("*/memory_config.json")}
    there = [(folder, mnemic.MemoryConfig.from_file(memory)) for folder, memory in written.items()]
    for kind, cls in mnemic.CONFIGS.items():
        for number, config in enumerate(cls.tiny()):
            for name in ("llama",) if number else HOSTS:
                if not any(folder.endswith(f"-{name}") and memory == config for folder, memory in there):
                    logits = _save(name, f"{kind}-{number}", config)
                    expected |= {} if logits is None else {f"{kind}-{number}-{name}": logits}
    save_file(dict(sorted(expected.items())), EXPECTED)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
