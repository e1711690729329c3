"""`fasthpm segment`, `detect` and `dense` on images that are not 8-bit RGB: files as the training's were prepared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep import images
from fasthpm import pretrain
from fasthpm.checkpoint import load_weights
from fasthpm.data import shown
from fasthpm.data.rasters.files import FileReader
from fasthpm.dense import detection, probe, segmentation
from tests.helpers.finetuning import FLOAT32, read, refused, start
from tests.helpers.pairs import write

SIDE, BANDS = 28, 5
TAKEN = (5, 3, 2, 1)  # of the files' bands
CLASSES = ("box", "disc")
FAST = ("--input_size", SIDE, "--steps", 4, "--batch_size", 2, "--global_batch_size", 4, "--num_workers", 1)
SHORT = (*FAST, *FLOAT32, "--log_every", 2, "--eval_every", 0, "--save_every", 4, "--pictures", 2, "--show", "4,1,2")
SQUARE = ("--input_size", 32)  # of detection: its coarsest map needs two cells
Boxes = list[tuple[int, tuple[int, int, int, int]]]


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, Boxes]:
    """uint16 [28, 28, 5], two things on noise and a corner of nodata 0; its mask; (label, box) of each thing."""
    random = np.random.default_rng(seed)
    pixels, mask, boxes = random.integers(2000, 2400, (SIDE, SIDE, BANDS)), np.zeros((SIDE, SIDE), np.uint8), []
    for label, band in ((1, 4), (2, 0)):
        top, left = (int(value) for value in random.integers(0, SIDE - 12, 2))
        pixels[top : top + 12, left : left + 12, band] += 9000
        mask[top : top + 12, left : left + 12] = label
        boxes.append((label, (left, top, 12, 12)))
    pixels[:3, :3] = 0
    return pixels.astype(np.uint16), mask, boxes


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", metadata=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with masks and, of the same scenes, with boxes."""
    root = tmp_path_factory.mktemp("values") / "data"
    for split, first, count in (("train", 0, 12), ("val", 100, 4)):
        listed, rows = [], []
        for number in range(first, first + count):
            pixels, mask, boxes = scene(number)
            save(root / split / "images" / f"{number}.tif", pixels)
            write(root / split / "masks" / f"{number}.png", mask)
            listed.append({"id": number, "file_name": f"{number}.tif", "height": SIDE, "width": SIDE})
            for label, (x, y, w, h) in boxes:
                row = {"id": len(rows) + 1, "image_id": number, "category_id": label, "bbox": [x, y, w, h]}
                rows.append(row | {"area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
        content = {"images": listed, "annotations": rows, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run on the same kind of files, of which preparation took four bands, clipped."""
    out = data.parent / "set.beton"
    bands = ",".join(map(str, TAKEN))
    words = (data / "train" / "images", out, "--bands", bands, "--nodata", 0, "--window", 1, 9000, "--num_workers", 1)
    images.main([str(word) for word in words])
    words = ("--recipe", "debug", "--channels", 4, "--input_size", SIDE, "--epochs", 1, "--panel_every", 0)
    words += ("--batch_size", 4, "--warmup_epochs", 0, "--num_workers", 1, *FLOAT32)
    start(pretrain, *words, "--data_path", out, "--output_dir", data.parent / "run")
    return data.parent / "run"


def test_the_checkpoint_says_how_files_are_read(run: Path, data: Path) -> None:
    pixels = load_weights(run, "student")[0].pixels
    assert pixels is not None
    raw = scene(0)[0]
    found = FileReader(pixels.values, 4)(data / "train" / "images" / "0.tif")
    want = raw[..., [number - 1 for number in TAKEN]].clip(max=9000)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, want)


def picture_of(path: Path) -> np.ndarray:
    with Image.open(path) as sheet:
        return np.asarray(sheet.convert("RGB"))


def no_dark_rectangle(path: Path) -> None:
    pixels = picture_of(path)
    assert (pixels == shown.NOTHING).all(-1).any()  # the corner without data
    assert pixels[20:180, 10:180].std() > 30


def test_segmentation_trains_and_is_tested_again(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(segmentation, run, "--data_path", data, *SHORT, "--head_width", 8, "--output_dir", out)
    assert [row["class"] for row in read(out / "result.json")["classes"]] == ["background", *CLASSES]
    no_dark_rectangle(out / "pictures.png")
    first = read(out / "result.json")["miou"]
    flags = ("--evaluate", "--data_path", data, "--output_dir", out, "--show", "1", "--num_workers", 1)
    assert start(segmentation, run, *flags).figures["miou"] == first
    grey = picture_of(out / "evaluate" / "pictures.png")[20:180, 10:180]
    assert (grey[..., 0] == grey[..., 1])[(grey != shown.NOTHING).any(-1)].all()


def test_detection_trains_and_is_tested_again(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(detection, run, "--data_path", data, *SHORT, *SQUARE, "--output_dir", out)
    no_dark_rectangle(out / "pictures.png")
    first = read(out / "result.json")["box_ap"]
    flags = ("--evaluate", "--data_path", data, "--output_dir", out, "--num_workers", 1)
    assert start(detection, run, *flags).figures["box_ap"] == first


def test_the_dense_probe_tells_what_one_band_shows(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = start(probe, run, "--data_path", data, "--num_workers", 1, "--output_dir", out, "--show", "4,1,2")
    figures = found.figures["student"]
    assert figures["linear"]["accuracy"] > figures["majority"]["accuracy"] + 5
    pixels = picture_of(out / "student" / "examples.png")
    assert pixels[20:180, 10:180].std() > 30


def test_the_dense_probe_watches_a_pretraining(run: Path, data: Path, tmp_path: Path) -> None:
    words = ("--recipe", "debug", "--channels", 4, "--input_size", SIDE, "--epochs", 1, "--panel_every", 0)
    words += ("--batch_size", 4, "--warmup_epochs", 0, "--num_workers", 1, *FLOAT32, "--log_every", 1)
    words += ("--dense_path", data, "--dense_every", 1, "--data_path", data.parent / "set.beton")
    start(pretrain, *words, "--output_dir", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["dense_knn_miou"] <= 100


TASKS: dict[str, tuple[Any, tuple[object, ...]]] = {
    "segment": (segmentation, (*SHORT, "--head_width", 8)),
    "detect": (detection, (*SHORT, *SQUARE)),
    "dense": (probe, ("--num_workers", 1)),
}


def photographs(path: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(path)


def one_band(path: Path) -> None:
    save(path, scene(0)[0][..., 0])


def floats(path: Path) -> None:
    save(path, scene(0)[0].astype(np.float32))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (photographs, "3 channels of uint8, and the model was trained on 4 of uint16"),
        (one_band, "1 channel of uint16, and the model was trained on channels 5,3,2,1"),
        (floats, "4 channels of float32, and the model was trained on 4 of uint16"),
    ],
)
def test_other_images_are_refused_by_name(
    run: Path, data: Path, tmp_path: Path, task: str, spoil: Callable[[Path], None], said: str
) -> None:
    command, flags = TASKS[task]
    names = [path.name for path in sorted((data / "train" / "images").iterdir())]
    folder = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
            for path in (data / split / kind).iterdir():
                (folder / split / kind / path.name).symlink_to(path)
        (folder / f"{split}.json").symlink_to(data / f"{split}.json")
    (folder / "classes.txt").symlink_to(data / "classes.txt")
    spoiled = folder / "train" / "images" / names[0]
    spoiled.unlink()
    spoil(spoiled.with_suffix(".png") if spoil is photographs else spoiled)
    if spoil is photographs:
        spoiled.with_suffix(".png").rename(spoiled)
    found = refused(command, run, "--data_path", folder, *flags, "--output_dir", tmp_path / "out")
    assert f"image {spoiled} has " in found
    assert said in found


def test_pictures_of_channels_that_are_not_there_are_refused(run: Path, data: Path, tmp_path: Path) -> None:
    for command, flags in TASKS.values():
        words = (run, "--data_path", data, *flags, "--output_dir", tmp_path / "out")
        assert refused(command, *words, "--show", 9).startswith("show '9' is no channel; expected 1 to 4")
        assert refused(command, *words, "--show", "1/2").startswith("show '1/2' asks for 2 pictures of an image")
