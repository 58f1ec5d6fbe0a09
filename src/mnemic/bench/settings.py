"""The settings of the published runs: what `mnemic demo` and `benchmarks/recall_facts.py` do."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemic.bench.experiments import Experiment, Recipe, Reporter, symbol_base
from mnemic.bench.recall import test_places
from mnemic.memories.emt import EMTConfig
from mnemic.tasks.facts import LanguageRecall, SymbolRecall

MakeBase = Callable[[Reporter], tuple[nn.Module, dict[str, float]]]

SYMBOLS = Recipe(steps=2500, rows=32, learning_rate=3e-3, hold=0.6, growth=2.0, pass_mark=0.8, segments=256)
DEMO = replace(SYMBOLS, steps=1400, learning_rate=4e-3, hold=0.5, pass_mark=0.7, segments=128)
LANGUAGE = Recipe(
    steps=2600,
    rows=240,
    longest=32,
    learning_rate=3e-3,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    hold=0.6,
    pass_mark=0.96,
    segments=512,
)


def symbols_experiment(seed: int, lengths: Sequence[int], far: int, rows: int) -> tuple[Experiment, MakeBase]:
    """Four pairs a segment, window 32; the base is trained with the same seed."""
    task = SymbolRecall()
    config = EMTConfig(
        slots=32,
        dim=64,
        heads=4,
        read_layers=[1, 2],
        write_layer=1,
        feedback=1.0,
        final_blend=1.0,
        gate_bias=1.0,
        segment_length=task.segment_length,
    )
    places = test_places(lengths, far, corrected=2)
    experiment = Experiment(task, config, SYMBOLS, places, rows=rows, batch=min(rows, 128), seed=seed)
    return experiment, lambda reporter: symbol_base(task, seed, reporter)


def demo_experiment(seed: int) -> tuple[Experiment, MakeBase]:
    """The same, shorter, for a first look."""
    experiment, make_base = symbols_experiment(seed, (0, 1, 8, 64), 256, 48)
    experiment.recipe, experiment.detail = DEMO, False
    experiment.places = [places for places in experiment.places if places.fillers != 256]
    return experiment, make_base


def language_experiment(
    model: str, filler: Path, seed: int, lengths: Sequence[int], far: int, rows: int
) -> tuple[Experiment, nn.Module, str]:
    """Two facts a segment, window 64; test streams are surrounded by text that training never sees."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = read_text(filler)
    seen = int(0.8 * len(text))
    task, test = LanguageRecall(tokenizer, text[:seen]), LanguageRecall(tokenizer, text[seen:])
    config = EMTConfig(
        slots=8,
        dim=128,
        heads=4,
        read_layers=[3, 4],
        write_layer=3,
        feedback=1.0,
        sharpness=8.0,
        whiten=True,
        segment_length=64,
    )
    experiment = Experiment(
        task, config, LANGUAGE, test_places(lengths, far, corrected=1), rows=rows, seed=seed, test_task=test
    )
    return experiment, base, Path(model).name


def read_text(path: Path, most: int = 4_000_000) -> str:
    """The text of a file, or of the `.txt` files in a tar archive, up to `most` characters, spread over all of them."""
    if not tarfile.is_tarfile(path):
        return path.read_text(errors="replace")[:most]
    with tarfile.open(path) as archive:
        members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
        parts = []
        for member in members:
            file = archive.extractfile(member)
            assert file is not None
            parts.append(file.read().decode(errors="replace")[5_000 : 5_000 + most // len(members)])
    return "\n".join(parts)
