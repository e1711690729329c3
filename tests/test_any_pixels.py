"""Every command on a set of 4 channels of 16 bits with nodata: it does its work, or refuses in one line."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import fasthpm
from fasthpm import pretrain
from fasthpm.data import shown
from fasthpm.data.ffcv.beton import files_path
from fasthpm.exchange import exporting, importing
from fasthpm.pictures import map_images, visualize
from fasthpm.probes import embed, knn, linear
from fasthpm.probes import finetune as finetune_room
from tests.helpers.array_sets import array_picture, write_arrays
from tests.helpers.finetuning import FLOAT32, refused, start

BANDS = ["blue", "green", "red", "nir"]
SIDE, CHANNELS = 24, 4


def tiles(path: Path, count: int, seed: int) -> Path:
    """A set of tiles of two scenes; each has a corner of nodata."""
    arrays = [array_picture(seed + k, (SIDE, SIDE), CHANNELS, "uint16") for k in range(count)]
    for array in arrays[::2]:
        array[:4, :4] = 0
    write_arrays(path, arrays, nodata=0, bands=BANDS)
    with files_path(path).open("w", newline="") as file:
        rows = [[f"scene{k % 2}.tif", 0, SIDE // 2 * (k // 2), SIDE, SIDE] for k in range(count)]
        csv.writer(file).writerows([["path", "top", "left", "height", "width"], *rows])
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    tiles(folder / "train.beton", 24, 0)
    tiles(folder / "val.beton", 8, 100)
    return folder


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A pretraining of 3 updates, with its panel."""
    words: tuple[Any, ...] = ("--recipe", "debug", "--channels", CHANNELS, "--input_size", 12, "--epochs", 1)
    words += ("--batch_size", 8, "--warmup_epochs", 0, "--show", "red,green,blue/nir", "--num_workers", 1, *FLOAT32)
    start(pretrain, *words, "--data_path", data / "train.beton", "--output_dir", data / "run")
    return data / "run"


def sets(data: Path) -> tuple[object, ...]:
    return "--train_path", data / "train.beton", "--val_path", data / "val.beton", "--num_workers", 1


def test_the_panel_is_no_dark_rectangle(run: Path) -> None:
    (panel,) = (run / "panels").glob("*.png")
    with Image.open(panel) as picture:
        pixels = np.asarray(picture)
    assert (pixels == shown.NOTHING).all(-1).any()  # the corners without data
    cell = pixels[22:134, 4:116]
    assert cell.std() > 30


def test_wrong_channels_are_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    words = (
        "--recipe",
        "debug",
        "--data_path",
        data / "train.beton",
        "--output_dir",
        tmp_path / "run",
        "--batch_size",
        8,
    )
    assert "--channels 4" in refused(pretrain, *words)
    said = refused(pretrain, *words, "--channels", CHANNELS, "--show", "xyz0")
    assert said.startswith("show 'xyz0' is no channel; expected 1 to 4, or blue, green, red, nir")
    assert not (tmp_path / "run").exists()


def test_probes(run: Path, data: Path, tmp_path: Path) -> None:
    found = start(knn, run, *sets(data), "--k", 3, "--weights", "student", "untrained", "--batch_size", 8)
    assert 0 <= found.accuracy <= 100
    flags = ("--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8, "--global_batch_size", 8)
    assert start(linear, run, *sets(data), *flags, "--output_dir", tmp_path / "linear").finished
    words = (*flags, "--output_dir", tmp_path / "tuned", *FLOAT32)
    assert start(finetune_room, run, *sets(data), *words).finished


def test_embedding_is_by_the_models_pixels(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    start(embed, run, "--data_path", data / "val.beton", "-o", out, "--num_workers", 1)
    found = np.load(out)
    assert np.isfinite(found["features"]).all()
    assert found["features"].std() > 0.01
    assert list(found["names"][:3]) == ["scene0.tif#0,0", "scene1.tif#0,0", "scene0.tif#0,12"]
    assert json.loads(str(found["info"]))["mean"] == json.loads((data / "train.json").read_text())["mean"]


def test_maps_are_put_together(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    found = fasthpm.maps(run, data_path=data / "val.beton", output=out, show="nir", num_workers=1, true_loss=2)
    assert sorted(path.name for path in found.scenes.iterdir()) == [
        f"00000{k}-scene{k}.{kind}" for k in (0, 1) for kind in ("npz", "png")
    ]
    scene = np.load(out / "scenes" / "000000-scene0.npz")
    assert scene["predicted"].shape == scene["true_loss"].shape == (3, 8)  # tiles of 3 cells, every half a tile
    maps = np.load(out / "maps.npz")
    first = maps["predicted"][maps["ids"] == 0][0]
    np.testing.assert_allclose(scene["predicted"][:, 0], first[:, 0], rtol=1e-5)
    for kind in ("predicted", "true_loss"):
        missing = np.isnan(maps[kind][np.argsort(maps["ids"])])
        assert missing[::2, 0, 0].all()  # the corners without data, and nothing else
        assert missing.sum() == len(missing) / 2
    with (out / "images.csv").open(newline="") as file:
        figures = [float(row[kind]) for row in csv.DictReader(file) for kind in ("difficulty", "true_loss")]
    assert np.isfinite(figures).all()
    assert -1 <= found.difficulty_spearman <= 1
    (tmp_path / "masks").mkdir()
    words = ("--data_path", data / "val.beton", "--masks", tmp_path / "masks", "-o", tmp_path / "no")
    assert refused(map_images, run, *words).startswith("--masks are of whole images")


def test_visualize_shows_groups_and_refuses_photographs(run: Path, data: Path, tmp_path: Path) -> None:
    start(visualize, run, "--show", "3,2,1/4", "--num_images", 2, "-o", tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as picture:
        assert picture.size[0] == 4 + 7 * (120 + 4)
    (tmp_path / "a.png").touch()
    said = refused(visualize, run, "--images", tmp_path / "a.png")
    assert said.startswith("--images are photographs, and this model takes 4 channels of uint16")


FORMS = ("timm", "mae", "safetensors", "timm_samvit", "mmseg", "onnx", "hf_vit", "hf_vitmae", "hf_beit")


@pytest.mark.parametrize("form", FORMS)
def test_exports_say_what_pixels_are(run: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is compared with what its library computes; ONNX does so in float32."""
    path = tmp_path / exporting.named_form(form).default
    assert start(exporting, run, "--format", form, "-o", path).difference < (1e-4 if form == "onnx" else 1e-8)
    said = capsys.readouterr().out
    assert "uint16" in said
    assert "nodata 0" in said
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            notes = {
                name: json.loads(text) for name, text in file.metadata().items() if name not in ("recipe", "model")
            }
        assert (notes["dtype"], notes["bands"], notes["nodata"]) == ("uint16", BANDS, 0)
        assert min(notes["mean"]) > 1000


def test_what_knows_rgb_alone_is_refused(run: Path, tmp_path: Path) -> None:
    said = refused(exporting, run, "--format", "torchvision", "-o", tmp_path / "a.safetensors")
    assert "3 channels, this model has 4" in said


def test_an_export_comes_back_with_its_pixels(run: Path, data: Path, tmp_path: Path) -> None:
    start(exporting, run, "--format", "safetensors", "-o", tmp_path / "model.safetensors")
    start(importing, tmp_path / "model.safetensors", "-o", tmp_path / "back")
    both = enumerate((run, tmp_path / "back"))
    ours, theirs = (start(knn, one, *sets(data), "--k", 3, "-o", tmp_path / f"{k}.json") for k, one in both)
    assert ours.accuracies == theirs.accuracies
