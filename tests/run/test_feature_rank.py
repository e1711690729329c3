"""RankMe: how many directions features use."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm import recipes
from fasthpm.data import Batch, DatasetInfo
from fasthpm.patches import model_of
from fasthpm.ranks.launch import Launch
from fasthpm.run.feature_rank import CHUNK, FeatureRank, rank_me
from fasthpm.step import Step


def watched(**changes: Any) -> tuple[FeatureRank, Any]:
    """An observer of a run that stands still, and the student that it watches."""
    recipe = dataclasses.replace(recipes.debug(), **changes).resolve(128, 1)
    torch.manual_seed(0)
    step = Step(model_of(recipe), recipe, DatasetInfo(128, 1, (0.5,), (0.2,), ()))
    run: Any = SimpleNamespace(recipe=recipe, step=step, teacher=None)
    run.launch = Launch(0, 0, 1, 1, torch.device("cpu"))
    return FeatureRank(run), step.student


def batch(count: int) -> Batch:
    images = torch.randint(0, 256, (count, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(count)
    return Batch(images, numbers, numbers, torch.zeros(count, 5), torch.zeros(count, 2), numbers < 0)


def test_orthogonal_features_use_all_directions_and_equal_ones_one() -> None:
    assert float(rank_me(torch.eye(6))) == pytest.approx(6, rel=1e-5)
    assert float(rank_me(torch.ones(6, 4))) == pytest.approx(1, abs=1e-3)
    two = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert float(rank_me(two)) == pytest.approx(2, rel=1e-5)


def test_it_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    features = np.random.default_rng(3).normal(size=(9, 5)) + 1
    squares = np.linalg.eigvalsh(features.T @ features)  # another way to the singular values
    values = [math.sqrt(max(square, 0.0)) for square in squares]
    entropy = -sum(value / sum(values) * math.log(value / sum(values)) for value in values)
    assert float(rank_me(torch.from_numpy(features))) == pytest.approx(math.exp(entropy), rel=1e-9)


@torch.no_grad()
def test_the_features_are_the_students_mean_tokens_whatever_the_method() -> None:
    for changes in ({"mask_policy": "random", "predict_loss": "none"}, {"model": "simmim_vit_nano_patch4_28"}):
        observer, student = watched(rankme_every=4, **changes)
        seen = batch(CHUNK + 3)  # more than one forward takes
        observer.after_update(4, seen)
        expected = student.encode(observer.run.step.normalized_patches(seen.images))[:, 1:].mean(dim=1)
        found = observer.read(4)["rankme"]
        assert found == pytest.approx(float(rank_me(expected)), rel=1e-4)
        assert 1 < found <= len(seen.images)


@torch.no_grad()
def test_a_collapsed_encoder_has_one() -> None:
    observer, student = watched(rankme_every=1)
    student.norm.weight.zero_()
    student.norm.bias.normal_()
    observer.after_update(1, batch(8))
    assert observer.read(1)["rankme"] == pytest.approx(1, abs=1e-3)


def test_it_is_measured_when_it_is_due_and_at_the_end_alone() -> None:
    observer, _ = watched(rankme_every=5)
    last = observer.run.recipe.total_steps
    assert [done for done in range(1, last + 1) if observer.due(done)] == [*range(5, last, 5), last]
    for done in (4, 5):
        observer.after_update(done, batch(4))
    assert set(observer.read(5)) == {"rankme"}
    observer.after_update(6, batch(4))
    assert observer.read(6) == {}  # drawing and saving read at other updates too
    assert observer.read(10) == {}  # the update was left out


def test_features_that_are_not_finite_are_left_to_the_check_of_the_loss() -> None:
    observer, student = watched(rankme_every=1)
    with torch.no_grad():
        student.norm.bias[0] = torch.nan
    observer.after_update(1, batch(4))
    assert observer.read(1) == {}
