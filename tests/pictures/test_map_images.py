"""Difficulty maps of image folders: the right map to the right image, rankings, saliency, nothing half-written."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fasthpm import recipes
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import weights as checkpoint_weights
from fasthpm.data import build_loader, read_info
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.pictures import drawing, map_images, visualize


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with untrained weights of the debug recipe, and its teacher."""
    output = tmp_path_factory.mktemp("maps") / "run"
    recipe = dataclasses.replace(recipes.debug(), output_dir=str(output))
    aside = checkpoint_folder.begin(output, 0)
    weights = {name: value.contiguous() for name, value in model_of(recipe).named_parameters()}
    for name in ("student", "teacher"):
        save_file(weights, aside / f"{name}.safetensors")
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(0, {}, 1, 1))
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five grey images of different sizes: flat, half flat, and noise; and one file that is no image."""
    target = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    half = noise.copy()
    half[:20] = 90
    pictures = {
        "noise": noise,
        "flat": np.full((28, 28), 90, np.uint8),
        "half": half,
        "small": noise[:9, :9],
        "wide": noise[:14],
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(target / f"{name}.png")
    (target / "broken.png").write_bytes(b"no image")
    return target


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


def test_visualize_draws_files(run: Path, folder: Path, tmp_path: Path) -> None:
    files = [str(folder / "noise.png"), str(folder / "wide.png")]
    columns = ["image", "true_loss", "predicted_loss", "hardest", "reconstruction"]
    visualize.main([str(run), "--images", *files, "--columns", *columns, "--attention", "-o", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] == 6 * (112 + drawing.GAP) + drawing.GAP
    with pytest.raises(UserError, match="both say what to draw"):
        visualize.main([str(run), "--images", *files, "--data_path", "synthetic:9"])


def test_evidence_summary_is_paired_by_seed() -> None:
    from bench import evidence

    cells = (("random", 0, 50.0), ("random", 1, 60.0), ("hpm", 0, 52.0), ("hpm", 1, 61.0))
    runs = [{"method": name, "seed": seed, "probes": dict.fromkeys(evidence.PROBES, x)} for name, seed, x in cells]
    summary = evidence.summarise(runs, evidence.TITLES, evidence.PROBES, evidence.BASELINE)
    assert summary["hpm"]["knn_mean"]["mean"] == 56.5
    assert summary["hpm"]["gain"]["knn_mean"] == {"mean": 1.5, "std": pytest.approx(0.5**0.5), "low": 1.0, "high": 2.0}
    assert evidence.ordering(summary, "knn_mean") == "random < hpm"
    settings = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 4, "bank": 10}
    assert "| HPM, α 0 → 0.5 | +1.50 ± 0.71 |" in evidence.markdown({"summary": summary, "settings": settings})
    assert json.dumps(summary)


def test_linear_accuracy_separates_what_is_separable() -> None:
    from bench import evidence

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.randn(60, 5, generator=generator) * 0.1 + torch.eye(3, 5)[labels] * 100 + 7
    assert evidence.linear_accuracy(rows, labels, rows, labels) == 100.0
    assert evidence.linear_accuracy(rows, labels, rows, (labels + 1) % 3) == 0.0
