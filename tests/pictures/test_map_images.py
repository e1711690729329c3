"""Difficulty maps of image folders: the right map to the right image, rankings, saliency, nothing half-written."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasthpm.checkpoint import weights as checkpoint_weights
from fasthpm.data import build_loader, read_info
from fasthpm.errors import UserError
from fasthpm.pictures import map_images


def test_a_folder_becomes_maps_ranking_and_overlays(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    map_images.main([str(run), "--data_path", str(folder), "-o", str(out), "--true_loss", "2", "--batch_size", "4"])
    found = np.load(out / "maps.npz")
    names = [Path(name).stem for name in found["names"]]
    assert names == ["flat", "half", "noise", "small", "wide"]
    assert found["predicted"].shape == found["true_loss"].shape == (5, 7, 7)
    model, recipe = checkpoint_weights.load_weights(run)
    loader = build_loader(
        str(folder), batch_size=6, image_size=(28, 28), channels=1, train=False, whole=True, max_bad_samples=1.0
    )
    batch = next(iter(loader))
    loader.close()
    images = batch.images[~batch.replaced]
    want = map_images.difficulty(model, recipe, read_info("synthetic:128"), images, 2)
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


def test_a_failure_leaves_nothing(run: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    arguments = [str(run), "--data_path", str(folder), "-o", str(tmp_path / "out"), "--overlays", "0"]
    with pytest.raises(UserError, match="named like an image"):
        map_images.main([*arguments, "--masks", str(tmp_path / "masks")])
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


def test_a_map_that_is_the_mask_scores_best(tmp_path: Path) -> None:
    inside = np.zeros((28, 28), np.uint8)
    inside[4:12, 8:20] = 255
    Image.fromarray(inside).save(tmp_path / "a.png")
    for maps, area, best in (
        (inside[::4, ::4] / 255.0, 1.0, 1.0),
        (1 - inside[::4, ::4] / 255.0, 0.0, None),
        (np.zeros((7, 7)), 0.5, None),
    ):
        saliency = map_images.Saliency(tmp_path, (28, 28))
        saliency.add("x/a.jpg", {"predicted": maps})
        saliency.add("unknown.jpg", {"predicted": maps})
        scores = saliency.scores()["predicted"]
        assert scores["auc"] == area
        assert scores["images"] == 1
        assert best is None or scores["max_f"] == pytest.approx(best)


def test_auc_counts_pairs() -> None:
    numbers = np.random.default_rng(3)
    values, inside = numbers.integers(0, 6, 40).astype(float), numbers.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[inside] for b in values[~inside]]
    assert map_images.auc(values, inside) == pytest.approx(np.mean(pairs))
    curve = map_images.precision_recall(values, inside)
    for level in range(1, 6):
        chosen = values >= level
        want = (inside & chosen).sum() / chosen.sum(), (inside & chosen).sum() / inside.sum()
        place = 255 - int((level - values.min()) / (values.max() - values.min()) * 255)
        np.testing.assert_allclose(curve[:, place], want)
