"""Sorting, extended: the experiment runs from end to end at a small size, and its start is what it says."""

from __future__ import annotations

import pytest
import torch

import mnemic
from sorting_extended import ExtendedExperiment, Recipe, begin, extended_config, make_base, published

RECIPE = Recipe(stages=((1, 2, 2), (2, 2, 2)), windowed=2, inside=24)


def test_a_small_run_has_every_condition_and_floor(tmp_path):
    experiment = ExtendedExperiment(extended_config(64, working=2), RECIPE, width=16, rows=4)
    _, record = experiment.run(checkpoint=tmp_path / "run.safetensors")
    (score,) = record.scores
    assert (score.length, score.tokens, score.examples) == (2, 128, 80)
    assert {"other stream", "zeroed", "no memory", "working memory"} <= set(score.controls)
    assert {"uniform", "last 2 segments"} <= set(score.floors)
    assert len(score.outcomes["memory"]) == 80
    assert score.score == pytest.approx(score.outcomes["memory"].count("1") / 80)


def test_readers_begin_by_passing_engrams_on():
    model = make_base(32, 64, 2, RECIPE)
    attachment = mnemic.attach(model, extended_config(32, working=4), freeze=False)
    begin(attachment, RECIPE)
    reader = attachment.memory.readers["0"]
    hidden, engram = torch.randn(1, 5, 64), torch.randn(1, 1, 64)
    real = torch.ones(1, 1, dtype=torch.bool)
    added, weight = reader.attend(hidden, engram, real)
    torch.testing.assert_close(added, RECIPE.output * weight[:, 0] * engram, atol=1e-5, rtol=0)
    assert 0.3 < float(weight.detach().min()) < 0.7


def test_only_published_lengths_have_a_recipe():
    assert published(8, 0, 4).recipe.stages[-1][0] == 8
    with pytest.raises(ValueError, match="there is a recipe for 4 and 8 segments, not for 5"):
        published(5, 0, 4)
