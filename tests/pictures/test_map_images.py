"""Difficulty maps of image folders: the right map to the right image, rankings, saliency, nothing half-written."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fasthpm
from fasthpm import recipes
from fasthpm.checkpoint.weights import load_weights
from fasthpm.data import build_loader, read_info
from fasthpm.difficulty import ask_by, fixed_noise
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.patches import NormalizedPatches
from fasthpm.pictures import map_images
from fasthpm.pictures.panels import random_masks
from fasthpm.probes import difficulty_head
from fasthpm.probes.answers import load_asked
from fasthpm.recipe import Recipe
from tests.helpers import reference
from tests.helpers.data_fixtures import picture, prepare
from tests.helpers.reference_views import cross_entropy
from tests.helpers.runs import away, lone_encoder, run_of
from tests.helpers.videos import video_run


def test_a_folder_becomes_maps_ranking_and_overlays(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    map_images.main([str(run), "--data_path", str(folder), "-o", str(out), "--true_loss", "2", "--batch_size", "4"])
    found = np.load(out / "maps.npz")
    names = [Path(name).stem for name in found["names"]]
    assert names == ["flat", "half", "noise", "small", "wide"]
    assert found["predicted"].shape == found["true_loss"].shape == (5, 7, 7)
    model, recipe, asked = load_asked(run)
    assert asked.way == "masked_query"
    loader = build_loader(
        str(folder), batch_size=6, image_size=(28, 28), channels=1, train=False, whole=True, max_bad_samples=1.0
    )
    batch = next(iter(loader))
    loader.close()
    images = batch.images[~batch.replaced]
    features = difficulty_head.target_features(model, recipe, run)
    want = map_images.difficulty(model, recipe, read_info("synthetic:128"), images, 2, features)
    for kind, values in zip(("predicted", "true_loss"), want, strict=True):
        if kind == "predicted":  # the true loss draws its masks per batch
            np.testing.assert_allclose(found[kind].reshape(5, 49), values, atol=1e-5)
    rows = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
    assert [row["hardest"] for row in rows] == ["1", "2", "3", "4", "5"]
    losses = [float(row["true_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    by_name = {Path(row["name"]).stem: row for row in rows}
    assert by_name["flat"]["emptiest"] == "1"
    assert by_name["flat"]["near_constant"] == "1"
    assert by_name["half"]["emptiest"] == "2"
    assert 0.3 < float(by_name["half"]["empty_patches"]) < 0.6
    assert by_name["noise"]["near_constant"] == "0"
    with Image.open(out / "overlays" / "00000001-flat.png") as picture:
        assert picture.size == (28 * 3, 28)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is there already"):
        map_images.main([str(run), "--data_path", str(folder), "-o", str(out)])


def difficulty_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "difficulty.json").read_text())  # type: ignore[no-any-return]


def test_maps_say_how_they_were_asked_and_how_true_they_are(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured on these images with --true_loss, else said not to be."""
    result = fasthpm.maps(run, data_path=folder, output=tmp_path / "plain", overlays=0)
    assert (result.difficulty, result.difficulty_spearman, result.head) == ("masked_query", None, None)
    shown = capsys.readouterr().out
    assert "difficulty masked_query (the run's own: paper), by the student; difficulty_spearman not measured" in shown
    assert "--true_loss 10 measures it on these images" in shown
    assert difficulty_of(tmp_path / "plain")["difficulty_spearman"] is None
    keywords = {"data_path": folder, "overlays": 0, "difficulty": "paper", "true_loss": 12, "batch_size": 2}
    result = fasthpm.maps(run, output=tmp_path / "paper", **keywords)
    found = np.load(tmp_path / "paper" / "maps.npz")
    predicted, true = (torch.from_numpy(found[kind]).flatten(1) for kind in ("predicted", "true_loss"))
    assert result.difficulty_spearman == pytest.approx(reference.spearman(predicted, true), abs=1e-5)
    figures = difficulty_of(tmp_path / "paper")
    assert figures == {
        "difficulty": "paper",
        "own": "paper",
        "weights": "student",
        "difficulty_spearman": result.difficulty_spearman,
        "difficulty_auc": result.difficulty_auc,
        "measured": "on these 5 images, over 12 masks",
    }
    assert f"difficulty_spearman {result.difficulty_spearman:.3f}, difficulty_auc" in capsys.readouterr().out


@torch.no_grad()
def test_measured_maps_are_averaged_over_looks(folder: Path, tmp_path: Path) -> None:
    """MAE's, too, which has nobody to ask but itself."""
    changes: dict[str, Any] = {"mask_policy": "random", "predict_loss": "none"}
    run, model = run_of(tmp_path / "run", dataclasses.replace(recipes.debug(), **changes))
    result = fasthpm.maps(run, data_path=folder, output=tmp_path / "out", overlays=0)
    assert result.difficulty == "measured"
    found = np.load(tmp_path / "out" / "maps.npz")
    assert list(found) == ["names", "ids", "predicted"]
    loader = build_loader(
        str(folder), batch_size=6, image_size=(28, 28), channels=1, train=False, whole=True, max_bad_samples=1.0
    )
    batch = next(iter(loader))
    loader.close()
    patches = NormalizedPatches(recipes.debug(), read_info("synthetic:128"))(batch.images[~batch.replaced])
    ask_by(model, "measured")
    looks = [model.predict_loss(patches, noise=fixed_noise(patches, number)) for number in range(4)]
    np.testing.assert_allclose(found["predicted"].reshape(5, 49), sum(looks) / 4, atol=1e-4)


def test_the_loss_alone_of_a_run_that_nobody_can_ask(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"mask_policy": "random", "predict_loss": "none", "target": "ema"}
    run, _ = run_of(tmp_path / "run", dataclasses.replace(recipes.debug(), **changes))
    flags: dict[str, Any] = {"data_path": folder, "output": tmp_path / "out", "overlays": 1}
    with pytest.raises(UserError, match=r"has no loss predictor, .* SET, or add --true_loss 10 for the loss alone"):
        fasthpm.maps(run, **flags)
    result = fasthpm.maps(run, true_loss=2, **flags)
    assert (result.difficulty, result.difficulty_spearman) == ("", None)
    assert list(np.load(tmp_path / "out" / "maps.npz")) == ["names", "ids", "true_loss"]


@pytest.mark.parametrize("flags", [{}, {"true_loss": 3}, {"fit_head": 1}, {"true_loss": 1, "difficulty": "measured"}])
def test_no_maps_of_a_decoder_that_was_never_trained(flags: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Nor are they advised."""
    run = lone_encoder(tmp_path / "run", recipes.debug(), 1)
    with pytest.raises(UserError, match=r"was imported without its decoder, .*; import all of the checkpoint$"):
        fasthpm.maps(run, data_path=folder, output=tmp_path / "out", **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


IBOT: dict[str, Any] = {
    "input_size": "12",
    "patch_size": 4,
    "prototypes": 6,
    "head_hidden": 8,
    "local_crops": 0,
    "mask_ratio": 0.4,
    "mask_ratio_spread": 0.0,
}


def ibot_run(folder: Path, name: str, centres: bool = True) -> tuple[Path, Recipe, HPMViT, Tensor]:
    """A run of iBOT that learnt nothing, with another teacher, and its centres of patches."""
    recipe = dataclasses.replace(recipes.from_name(name), **IBOT)
    teacher = away(recipe, seed=9)
    values = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)) / 10
    run, _ = run_of(folder, recipe, teacher, {"centres": values} if centres else None)
    return run, recipe, teacher, values[1]


@pytest.mark.parametrize("name", ["ibot_demo", "hpm_ibot_demo"])
def test_maps_of_ibot_are_its_heads_and_its_losses_the_teachers(name: str, folder: Path, tmp_path: Path) -> None:
    """Of the student: cross-entropy to the teacher's distributions, by plain code; without HPM, the loss alone."""
    run, recipe, teacher, centre = ibot_run(tmp_path / "run", name)
    result = fasthpm.maps(run, data_path=folder, output=tmp_path / "out", true_loss=3, overlays=0, batch_size=8)
    found = np.load(tmp_path / "out" / "maps.npz")
    assert result.difficulty == ("in_place" if name == "hpm_ibot_demo" else "")
    assert ("predicted" in found) == (name == "hpm_ibot_demo")
    model, _ = load_weights(run)
    options = recipe.loader_options(batch_size=6, train=False, whole=True, num_workers=1, max_bad_samples=1.0)
    loader = build_loader(str(folder), options)
    batch = next(iter(loader))
    loader.close()
    patches = NormalizedPatches(recipe, loader.info)(batch.images[~batch.replaced])
    with torch.no_grad():
        wanted = ((teacher.decoder_pred(teacher.encode(patches))[:, 1:] - centre) / recipe.temperature).softmax(-1)
        total, count = torch.zeros(5, recipe.num_patches), torch.zeros(5, recipe.num_patches)
        for mask in random_masks(recipe, 5, 3):
            logits = model.decoder_pred(model.encode_in_place(patches, mask))[:, 1:]
            pairs = zip(logits.flatten(0, 1), wanted.flatten(0, 1), strict=True)
            losses = torch.stack([cross_entropy(*pair) for pair in pairs]).view(mask.shape)
            total, count = total + losses * mask, count + mask
    np.testing.assert_allclose(found["true_loss"].reshape(5, -1), total / count.clamp_min(1), rtol=1e-4, atol=1e-5)


def test_without_hpm_or_centres_ibot_has_no_maps_and_says_so(folder: Path, tmp_path: Path) -> None:
    run, *_ = ibot_run(tmp_path / "run", "ibot_demo", centres=False)
    flags: dict[str, Any] = {"data_path": folder, "output": tmp_path / "out"}
    with pytest.raises(UserError, match="has no loss predictor, and its losses are of distributions; fit a head"):
        fasthpm.maps(run, **flags)
    with pytest.raises(UserError, match="holds no teacher with its centres, without which there are no losses"):
        fasthpm.maps(run, true_loss=2, **flags)
    assert not (tmp_path / "out").exists()


def test_a_head_is_fitted_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(recipes.debug(), input_size="12")
    run, _ = run_of(tmp_path / "run", recipe)
    flags: dict[str, Any] = {"data_path": "synthetic:90", "batch_size": 16}
    head = fasthpm.maps(run, fit_head=2, **flags)
    assert isinstance(head, difficulty_head.HeadResult)
    assert (head.path, head.updates) == (run / "difficulty_head.safetensors", 2)
    shown = capsys.readouterr().out
    assert (
        f"the head {head.difficulty_spearman:.3f} ({head.before:.3f} before), paper {head.others['paper']:.3f}" in shown
    )
    assert "from now on: difficulty " in shown
    flags |= {"overlays": 0, "difficulty": "in_place"}
    result = fasthpm.maps(run, fit_head=1, output=tmp_path / "out", **flags)
    assert (result.difficulty, result.head.updates, result.images) == ("in_place", 1, 90)
    assert result.difficulty_spearman == result.head.difficulty_spearman != head.difficulty_spearman
    assert difficulty_of(tmp_path / "out")["measured"].startswith("when difficulty_head.safetensors was fitted")
    assert fasthpm.maps(run, output=tmp_path / "more", **flags).difficulty_auc == result.head.difficulty_auc


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "out", "--fit_head", "-1"], "fit_head is -1, expected 0 or more"),
        (["-o", "out", "--true_loss", "-1"], "true_loss is -1, expected 0 or more"),
        (["-o", "out", "--batch_size", "0"], "batch_size is 0, expected 1 or more"),
        ([], "-o is missing; say where the maps go, or use --fit_head N to train a head only"),
        (["-o", "out", "--difficulty", "hardly"], "invalid choice: 'hardly'"),
    ],
)
def test_arguments_that_are_refused(run: Path, folder: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        map_images.main([str(run), "--data_path", str(folder), *flags])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("true_loss", 0), ("masks", "objects"), ("show", "1"), ("overlays", -1), ("difficulty", "measured")],
)
def test_a_head_alone_has_no_maps_to_say_anything_of(run: Path, flag: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--{flag} has no effect here: no maps are made without -o"):
        fasthpm.maps(run, data_path="synthetic:90", fit_head=1, **{flag: value})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output is .*/file/a/m, which would lie in .*/file, and that is a file"):
        fasthpm.maps(run, data_path="synthetic:90", output=tmp_path / "file" / "a" / "m")


def test_maps_of_videos_are_refused_before_a_head_is_fitted(tmp_path: Path) -> None:
    run, _ = video_run(tmp_path)
    with pytest.raises(UserError, match=r"maps are of images, and .* was trained on videos; use fasthpm visualize"):
        fasthpm.maps(run, data_path="synthetic:90", output=tmp_path / "out", fit_head=1)


NAMES = [b"n" * 250, b"\xc3\xa9" * 125, b"caf\xe9" * 30, b"\xe9" * 200 + b"nnn", b"[a] b;c", b"new\nline"]


def test_names_of_any_kind(run: Path, tmp_path: Path) -> None:
    """As long as names may be, and of bytes that are not UTF-8; of a folder and of a set prepared from it."""
    (tmp_path / "in").mkdir()
    for index, name in enumerate(NAMES):
        with open(os.fsencode(tmp_path / "in") + b"/" + name + b".png", "wb") as file:
            picture(index, (28, 28), grey=True).save(file, "PNG")
    for data in (tmp_path / "in", prepare(tmp_path / "in", tmp_path / "set.beton")):
        out = tmp_path / f"of_{data.stem}"
        fasthpm.maps(run, data_path=data, output=out)
        with (out / "images.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            listed = [row["name"] for row in csv.DictReader(lines)]
        for names in (listed, np.load(out / "maps.npz")["names"].tolist()):
            assert sorted(os.fsencode(Path(name).stem) for name in names) == sorted(NAMES)
        drawn = sorted(os.listdir(os.fsencode(out / "overlays")))
        assert len(drawn) == len(NAMES)
        for number, name in enumerate(np.load(out / "maps.npz")["names"].tolist()):
            stem = os.fsencode(Path(name).stem)
            assert drawn[number].startswith(b"%08d-%s" % (number, stem[:230]))
            assert drawn[number].endswith(b".png")
            assert os.fsdecode(drawn[number]).count("\udcc3") == 0  # no half a character


def test_masks_that_fit_nothing_are_told_before_the_work(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left behind."""

    def work(*_: object) -> None:
        raise RuntimeError("work was done")

    monkeypatch.setattr(map_images, "map_batches", work)
    masks = tmp_path / "masks"
    masks.mkdir()
    flags: dict[str, Any] = {"data_path": folder, "output": tmp_path / "out", "masks": masks}
    Image.new("L", (9, 9)).save(masks / "half.png")
    Image.new("L", (9, 9), 255).save(masks / "noise.png")
    with pytest.raises(UserError, match=r"all 2 masks of .*masks are empty, or nothing but object"):
        fasthpm.maps(run, **flags)
    mask = Image.new("L", (9, 9))
    mask.paste(255, (0, 0, 4, 4))
    mask.save(masks / "small.png")
    with pytest.raises(RuntimeError, match="work was done"):
        fasthpm.maps(run, **flags)
    for left in masks.iterdir():
        left.unlink()
    with pytest.raises(UserError, match="no file of --masks is named like an image: there are images, and no masks"):
        fasthpm.maps(run, **flags)
    mask.save(masks / "zzz.png")
    with pytest.raises(UserError, match=r"there are .*broken.png, and masks like .*zzz.png; expected .*/NAME.png"):
        fasthpm.maps(run, **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]
