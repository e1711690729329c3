"""Probes on their own: schedules, layer decay, LARS, k-NN against published figures and plain loops; timm's logits."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fasthpm import recipes, schedule
from fasthpm.data import DatasetInfo, LoaderOptions
from fasthpm.data.augmented import Augmentation, AugmentedLoader
from fasthpm.errors import UserError
from fasthpm.layers import sincos_positions
from fasthpm.model import create_model
from fasthpm.probes import classifier, head, knn, result
from fasthpm.probes.finetune import settings
from fasthpm.probes.tokens import KeptTokens, select_tokens
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.launch import ROOT
from tests.helpers.reference import lars_step, layer_normalised_pool, selected_patches

CASES = json.loads((ROOT / "tests" / "golden" / "manifest.json").read_text())["cases"]
SCHEDULES = next(case for case in CASES if case["name"] == "mae_schedules")
NANO = {"img_size": 28, "patch_size": 4, "in_chans": 1}


# -------------------------------------------------------------------------------------------------- published figures
@pytest.mark.parametrize("decay", ["0.65", "0.75"])
def test_layer_decay_is_maes(decay: str) -> None:
    expected = SCHEDULES["layer_decay_vit_base"][decay]
    scales = [classifier.layer_scale(f"blocks.{i}.x", 2, 12, float(decay), 0.05)[0] for i in range(12)]
    ends = [classifier.layer_scale(name, 2, 12, float(decay), 0.05)[0] for name in ("pos_embed", "head.weight")]
    assert [ends[0], *scales, ends[1]] == pytest.approx(expected["scales_by_layer_id"], rel=1e-12)
    for group in expected["groups"]:
        for name in group.get("names", [group.get("first")]):
            ndim = 3 if name in ("cls_token", "pos_embed") else 1 if name.endswith("bias") or "norm" in name else 2
            scale, weight_decay = classifier.layer_scale(name, ndim, 12, float(decay), 0.05)
            assert scale == pytest.approx(group["lr_scale"], rel=1e-12)
            assert weight_decay == group["weight_decay"], name


def test_groups_hold_every_parameter_once() -> None:
    vit = classifier.build_classifier(create_model("hpm_vit_nano_patch4_28", in_chans=1), 5, image_size=(28, 28))
    groups = classifier.layer_decay_groups(vit, 0.5, 0.05)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in vit.parameters())
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(6)}
    assert sorted(g["weight_decay"] for g in groups if g["lr_scale"] == 1) == [0.0, 0.05]


@pytest.mark.parametrize("name", ["finetune_100", "linprobe_90"])
def test_learning_rates_are_maes(name: str) -> None:
    grid = SCHEDULES["lr_schedules"][name]
    steps = 1000
    plan = dataclasses.replace(
        recipes.debug(),
        epochs=grid["epochs"],
        warmup_epochs=grid["warmup_epochs"],
        lr=grid["lr"],
        min_lr=grid["min_lr"],
        steps_per_epoch=steps,
    )
    for epoch, expected, _ in grid["points"]:
        if name == "finetune_100":
            assert schedule.lr_at(plan, round(epoch * steps)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        else:
            found = head.lr_at(epoch, grid["lr"], grid["warmup_epochs"], grid["epochs"])
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_lars_is_maes() -> None:
    """Three steps of weight and bias against the plain loop: weights scaled by norm ratios, biases not."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4).double()
    optimizer = head.build_optimizer(layer, "mae")
    weights = [p.detach().clone() for p in layer.parameters()]
    momenta = [torch.zeros_like(p) for p in weights]
    for lr in (0.7, 0.4, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in weights]
        for parameter, grad in zip(layer.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        weights, momenta = lars_step(weights, grads, momenta, lr)
    for parameter, expected in zip(layer.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------- timm's ViT
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_logits_are_the_encoders(pool: str) -> None:
    """timm's ViT against our own encoder with pooling, norm and head spelled out, in float64."""
    model = create_model("hpm_vit_nano_patch4_28", in_chans=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    vit = classifier.build_classifier(model, 7, image_size=(28, 28), global_pool=pool).double().eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.startswith(("head", "fc_norm")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for name in ("cls_token", "norm.weight", "blocks.0.mlp.fc1.weight"):  # build_classifier rounds to float32
        if name in dict(vit.named_parameters()):
            torch.testing.assert_close(vit.get_parameter(name).float(), model.get_parameter(name).float())
    vit.load_state_dict({k: v for k, v in model.state_dict().items() if k in vit.state_dict()}, strict=False)
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    if pool == "token":
        expected = vit.head(model.encode(images)[:, 0])
    else:
        norm, model.norm = model.norm, nn.Identity()  # type: ignore[assignment]
        expected = vit.head(layer_normalised_pool(model.encode(images)[:, 1:], vit.fc_norm.weight, vit.fc_norm.bias))
        model.norm = norm
    torch.testing.assert_close(vit(images), expected, rtol=1e-9, atol=1e-9)


def test_positions_follow_the_picture_to_other_sizes_and_rectangles() -> None:
    table = sincos_positions(32, (4, 6))[None]
    assert torch.equal(classifier.resize_positions(table, (4, 6), (4, 6)), table)
    resized = classifier.resize_positions(table, (4, 6), (8, 3))
    grid = table[:, 1:].reshape(1, 4, 6, 32).permute(0, 3, 1, 2)
    plain = F.interpolate(grid, size=(8, 3), mode="bicubic", align_corners=False)
    assert torch.equal(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:], plain.permute(0, 2, 3, 1).reshape(1, 24, 32))
    model = create_model("hpm_vit_nano_patch4_28", in_chans=1)
    vit = classifier.build_classifier(model, 3, image_size=(36, 20))
    assert vit(torch.randn(2, 1, 36, 20)).shape == (2, 3)
    with pytest.raises(UserError, match=r"input_size 30x28 is not a multiple of patch_size 4; use e\.g\. 32x28"):
        classifier.build_classifier(model, 3, image_size=(30, 28))


# -------------------------------------------------------------------------------------------------- k-NN
def test_vote_is_scikit_learns_weighted_vote() -> None:
    generator = torch.Generator().manual_seed(1)
    bank, queries = (F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64)) for n in (300, 90))
    labels = torch.randint(0, 6, (300,), generator=generator)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance**2 / 2) / knn.TEMPERATURE)  # of unit vectors: similarity = 1 - distance^2 / 2

    for k, predicted in knn.vote(bank, labels, queries, 6).items():
        theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(bank.numpy(), labels.numpy())
        assert predicted.tolist() == theirs.predict(queries.numpy()).tolist()


# -------------------------------------------------------------------------------------------------- linear head
def test_feature_norm_is_batch_norm() -> None:
    ours, theirs = head.FeatureNorm(5), nn.BatchNorm1d(5, eps=1e-6, affine=False)
    for seed in range(3):
        rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 2
        torch.testing.assert_close(ours(rows), theirs(rows))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(rows), theirs(rows))
    torch.testing.assert_close(ours.mean, theirs.running_mean)


# -------------------------------------------------------------------------------------------------- tokens
def test_selected_tokens_are_the_plain_loops() -> None:
    difficulty = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    difficulty[:, 3] = difficulty[:, 7]  # a tie
    for policy in ("easiest", "hardest"):
        found = select_tokens(difficulty, 5, policy=policy)
        assert found.tolist() == [selected_patches(row.tolist(), 5, policy) for row in difficulty]
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(12)
    for _ in range(400):
        chosen = select_tokens(difficulty, 0.25, policy="random", generator=generator)
        assert chosen.shape == (5, 3)
        assert (chosen.diff(dim=1) > 0).all()
        counts += torch.bincount(chosen.flatten(), minlength=12)
    assert counts.min() / counts.max() > 0.8
    tokens = torch.arange(13.0)[None, :, None].expand(2, -1, 4)
    kept = KeptTokens()
    assert torch.equal(kept(tokens), tokens)
    kept.ids = torch.tensor([[0, 2], [5, 11]])
    assert kept(tokens)[:, :, 0].tolist() == [[0, 1, 3], [0, 6, 12]]


@pytest.mark.parametrize(("keep", "policy"), [(0, "random"), (13, "hardest"), (1.5, "easiest"), (5, "hardly")])
def test_impossible_selections_are_refused(keep: float, policy: str) -> None:
    with pytest.raises(UserError, match="expected"):
        select_tokens(torch.zeros(1, 12), keep, policy=policy)


# -------------------------------------------------------------------------------------------------- data and results
def test_augmented_images_do_not_depend_on_ranks_or_workers(tmp_path: Path) -> None:
    """One process against two ranks with a worker each; from a folder and from the set prepared of it, grey too."""
    folder = image_folder(tmp_path / "set", 12, grey=True)
    path = str(prepare(folder, tmp_path / "set.beton"))
    shared: dict[str, Any] = {"image_size": (16, 16), "channels": 1, "seed": 3}

    def first(batch_size: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        asked = LoaderOptions(batch_size=batch_size, **shared, **options)
        loader = AugmentedLoader(path, Augmentation(), asked)
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        return batch.images, batch.labels, batch.ids

    whole = first(8, num_workers=1)
    parts = [first(4, rank=rank, world_size=2, num_workers=1) for rank in (0, 1)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(pieces))
    assert whole[0].shape == (8, 1, 16, 16)
    loader = AugmentedLoader(path, Augmentation("", 0, flip=False, crop_min=1.0), LoaderOptions(8, **shared))
    plain = [loader.images[(epoch, 5, 0)][0] for epoch in (0, 1, 0)]
    assert torch.equal(plain[0], plain[2])
    assert loader.base.stored(5).shape == (40, 48, 1)  # type: ignore[union-attr]
    loader.close()


def test_wrong_labels_are_refused() -> None:
    info = DatasetInfo(10, 1, (0.5,), (0.5,), ("a", "b"))
    one = dataclasses.replace(info, classes=("photos",))
    result.check_sets(("t", info), ("v", info))
    with pytest.raises(UserError, match=r"t has 1 class \(photos\), expected 2 or more; labels are missing"):
        result.check_sets(("t", one), ("v", info))
    with pytest.raises(UserError, match="t has 2 classes, v has 3 or others"):
        result.check_sets(("t", info), ("v", dataclasses.replace(info, classes=("a", "b", "c"))))
    with pytest.raises(UserError, match="has the label -1, expected 0 to 1; labels are missing"):
        result.check_labels(torch.tensor([0, -1]), "t", 2)
    with pytest.raises(UserError, match="all 3 samples of t have the label 1"):
        result.check_labels(torch.tensor([1, 1, 1]), "t", 2)


def test_effective_epochs_count_samples() -> None:
    plan = dataclasses.replace(recipes.debug(), data_path="synthetic:100", global_batch_size=20, steps_per_epoch=3)
    assert result.effective_epochs(plan, 10) == 2.0
    gone = dataclasses.replace(plan, data_path="/nowhere.beton")
    assert result.effective_epochs(gone, 9) == 3.0


def test_presets_follow_size_and_start() -> None:
    small = create_model("hpm_vit_nano_patch4_28")
    large = create_model("mae_vit_tiny_patch16_224")
    assert settings.preset("auto", small, False)["epochs"] == settings.SMALL["epochs"]
    assert settings.preset("auto", large, False) == {}
    assert settings.preset("mae", small, True) == {"layer_decay": 1.0}
    assert settings.FineTune().layer_decay == 0.65
    assert math.isclose(settings.FineTune().reprob, 0.25)
    with pytest.raises(UserError, match="batch_size is 7, and mixup and cutmix pair images"):
        settings.FineTune(batch_size=7)
    with pytest.raises(UserError, match=r"drop_path is 1\.5, expected"):
        settings.FineTune(drop_path=1.5)
