"""The dense probe beside a training."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm import pretrain, ranks, recipes
from fasthpm.data.statistics import PixelStatistics
from fasthpm.dense import online, patchwise, probe
from fasthpm.dense.pairs import IGNORED
from fasthpm.errors import UserError
from fasthpm.patches import NormalizedPatches
from fasthpm.recipe import Recipe
from fasthpm.run.records import read_metrics
from tests.helpers.finetuning import SHORT, refused, same_weights, start
from tests.helpers.pairs import scenes_folder
from tests.helpers.runs import away
from tests.helpers.videos import tiny

SIZE = ("--input_size", "16", "--patch_size", "4")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of five classes, of another size than the runs'; a quarter is ignored."""
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1, 2, 3, 4, 255, 255], (5, 6)).astype(np.uint8).repeat(4, 0).repeat(5, 1) for _ in range(7)]
    return scenes_folder(tmp_path_factory.mktemp("masked"), masks)


class Wrapped:
    """What the probe needs of a step."""

    def __init__(self, recipe: Recipe) -> None:
        self.student = away(recipe)
        self.normalized_patches = NormalizedPatches(recipe, PixelStatistics((0.5,), (0.25,)))


def observer(recipe: Recipe, rank: int = 0, world_size: int = 1) -> online.OnlineDenseProbe:
    step: Any = Wrapped(recipe)
    return online.OnlineDenseProbe(recipe, step, ranks.Launch(rank, rank, world_size, world_size, torch.device("cpu")))


def recipe_of(masked: Path) -> Recipe:
    changes: dict[str, Any] = {"input_size": "16", "patch_size": 4, "dense_path": str(masked), "dense_every": 2}
    return dataclasses.replace(recipes.debug(), steps_per_epoch=3, **changes)


def test_it_leaves_training_as_it_is(masked: Path, tmp_path: Path) -> None:
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    words = (*SHORT, *SIZE, "--epochs", "2")
    start(pretrain, *words, "--output_dir", plain)
    asked = ("--dense_path", masked, "--dense_every", "1", "--output_dir", probed)
    start(pretrain, *words, *asked)
    assert same_weights(plain / "encoder.safetensors", probed / "encoder.safetensors")
    straight, watched = read_metrics(plain), read_metrics(probed)
    assert [record["loss"] for record in straight] == [record["loss"] for record in watched]
    figures = {record["step"]: record for record in watched if "dense_knn_miou" in record}
    assert list(figures) == [4, 8]
    assert all(0 <= record["dense_knn_accuracy"] <= 100 for record in figures.values())
    assert "dense_knn_miou" not in straight[-1]


def test_the_figures_are_the_commands(masked: Path) -> None:
    """Of the same images and the same k."""
    recipe = recipe_of(masked)
    watching = observer(recipe)
    assert [done for done in range(1, 13) if watching.due(done)] == [6, 12]
    assert watching.read(5) == {}
    found = watching.read(6)
    step: Any = watching.step
    step.student.pixels = PixelStatistics((0.5,), (0.25,))
    sets = [online.open_set(recipe, split) for split in online.IMAGES]
    encoder = patchwise.PatchEncoder(step.student, recipe, sets[0], torch.device("cpu"))
    train, val = (encoder.whole(pairs) for pairs in sets)
    scaled = probe.scaler_of(train.rows[train.labels != IGNORED])
    known = train.labels != IGNORED
    votes = probe.nearest_votes(scaled(train.rows[known]), train.labels[known], scaled(val.rows), 5, [online.K])
    figures = probe.figures_of(val, votes[online.K], 5)
    assert found == {"dense_knn_miou": figures["miou"], "dense_knn_accuracy": figures["accuracy"]}
    assert watching.read(6) == found


def test_any_number_of_ranks_has_the_same_patches(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(masked)
    monkeypatch.setitem(online.MOST, "val", 30)
    whole = {split: observer(recipe)._patches(split) for split in online.IMAGES}
    assert len(whole["val"][1]) == 30
    watching = [observer(recipe, rank, 2) for rank in range(2)]
    for split, (rows, labels) in whole.items():
        shares = [one._shares[split] for one in watching]
        features = [one._features(share.images) for one, share in zip(watching, shares, strict=True)]
        columns = iter([features, [share.labels for share in shares], [share.places for share in shares]])
        monkeypatch.setattr(online, "gather_rows", lambda column, size, columns=columns: torch.cat(next(columns)))
        found = watching[1]._patches(split)
        torch.testing.assert_close(found[0], rows)
        assert torch.equal(found[1], labels)


def test_what_does_not_fit_is_one_line(masked: Path, tmp_path: Path) -> None:
    words = (*SHORT, *SIZE, "--output_dir", tmp_path / "out")
    zero3 = ("--deepspeed_config", "ds_configs/zero3_bf16.json")
    assert "use ZeRO 0, 1 or 2" in refused(pretrain, *words, "--dense_path", masked, *zero3)
    assert "has no train/masks and is no ADE" in refused(pretrain, *words, "--dense_path", tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="dense_path is for images, and this recipe is of videos"):
        online.check(tiny(dense_path=str(masked)), {})
    with pytest.raises(UserError, match=r"has 7 images, fewer than ranks \(9\)"):
        observer(recipe_of(masked), 8, 9)
