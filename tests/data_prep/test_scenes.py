"""Things on photographs: the truth is true, and it is the same again."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import images, scenes, things
from data_prep.fashion_mnist import CLASSES
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.keys import Stream
from fasthpm.data.names import sample_names
from fasthpm.data.sampling import key_of
from fasthpm.errors import UserError
from tests.helpers.disk import mounted
from tests.helpers.prepared_sets import RAW_FLAGS, idx_files
from tests.helpers.run_lengths import decoded

FLAGS = ("--number", "70", "--val_number", "10", "--size", "32", "--objects", "1", "4", "--seed", "3")
KEY = key_of(5, 3, Stream.PREPARATION)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photographs`/0.jpg … of one colour each, with noise, but for a smooth one; `garments` as idx files."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "photographs").mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        noise = rng.integers(-30, 30, (30, 40, 1)) * (number != 4)
        pixels = np.clip(noise + np.array([40 + 20 * number, 100, 100]), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((200, 150), 0).save(folder / "photographs" / f"{number}.png")
    idx_files(folder / "garments", 200)
    return folder


@pytest.fixture
def ready(sources: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of a small set, whose photographs are our own."""
    monkeypatch.setattr(scenes, "sources", lambda: sorted((sources / "photographs").iterdir()))
    return [*FLAGS, "--garments", str(sources / "garments")]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def square_garments() -> tuple[np.ndarray, list[np.ndarray]]:
    """White garments of a shape per class."""
    garments = np.zeros((10, 28, 28), np.uint8)
    for label in range(10):
        garments[label, 3 : 12 + label, 5 : 24 - label] = 255
    return garments, [np.array([label]) for label in range(10)]


def material(*colours: tuple[int, int, int]) -> scenes.Material:
    grounds = [Image.new("RGB", (200, 150), colour) for colour in colours]
    return scenes.Material(grounds, things.Garments(*square_garments()), 10)


# -------------------------------------------------------------------------------------------------- the truth
def test_masks_are_where_garments_are() -> None:
    """White garments on black: a pixel's brightest channel says how much of it a garment is."""
    for number in range(40):
        scene = scenes.draw_scene(material((0, 0, 0)), KEY, number, 48, (1, 1))
        mask = scene.masks[0]
        share = scene.pixels.max(2) / 255
        sure = np.abs(share - 0.5) > 0.01
        assert sure.mean() > 0.9
        assert np.array_equal(mask[sure], share[sure] > 0.5)
        assert scene.labels == (number % 10,)
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert 0.3 * 48 - 1.5 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 0.6 * 48 + 1.5


def test_pixels_differ_from_the_ground_where_the_mask_says() -> None:
    """The same scene before anything was pasted, from the same numbers."""
    for number in range(20):
        scene = scenes.draw_scene(material((0, 0, 0)), KEY, number, 48, (1, 4))
        other = scenes.draw_scene(material((0, 0, 255)), KEY, number, 48, (1, 4))
        ground = np.array([0, 0, 255])
        assert np.array_equal(scene.masks, other.masks)  # the ground says nothing about places
        hidden = scene.masks.any(0)
        assert (np.abs(other.pixels[~hidden] - ground)[:, :2] < 200).all()
        # what shows of the ground is the difference between the two
        shows = (other.pixels[:, :, 2].astype(int) - scene.pixels[:, :, 2]) / 255
        assert (shows[hidden] < 0.51).all()
        far = ~hidden & (shows < 0.49)  # only where two soft edges lie over each other
        assert far.sum() <= (0 if len(scene.labels) == 1 else 40)


def test_overlapping_garments_have_disjoint_masks() -> None:
    counts = set()
    for number in range(60):
        scene = scenes.draw_scene(material((0, 0, 0)), KEY, number, 32, (2, 5))
        counts.add(len(scene.labels))
        assert scene.masks.sum(0).max() == 1
        assert scene.masks.any((1, 2)).all()
        assert len(scene.labels) == len(scene.masks)
        areas = dict.fromkeys(scene.labels, 0)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            areas[label] = max(areas[label], int(mask.sum()))
            assert (scene.classes[mask] == label + 1).all()
        assert areas[scene.label] == max(areas.values())
        assert np.array_equal(scene.classes > 0, scene.masks.any(0))
    assert counts == {2, 3, 4, 5}


def test_a_garment_is_pasted_where_it_hides_least() -> None:
    left = np.arange(48) < 24
    masks = np.broadcast_to(left, (1, 48, 48))
    drawn = np.random.default_rng(0).random((20, scenes.DRAWN - 1))
    for draws in drawn:
        overlaps = []
        for place in draws[7:].reshape(scenes.PLACES, 2):
            alone = np.concatenate([draws[:7], np.tile(place, scenes.PLACES)])
            overlaps.append(int(pasted(masks, alone)[:, left].sum()))
        assert int(pasted(masks, draws)[:, left].sum()) == min(overlaps)
        assert max(overlaps) > min(overlaps)


def pasted(masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mask of a garment among `masks`."""
    garments = things.Garments(*square_garments())
    return scenes.draw_thing(garments, 3, np.zeros((48, 48, 3), np.uint8), masks, draws)


def test_a_garment_that_is_not_seen_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = iter([(4, 4), (30, 3), (2, 10)])

    def drawn(*arguments: object) -> np.ndarray:
        mask = np.zeros((48, 48), bool)
        start, side = next(boxes)
        mask[start : start + side, start : start + side] = True
        return mask

    monkeypatch.setattr(scenes, "draw_thing", drawn)
    scene = scenes.draw_scene(material((0, 0, 0)), KEY, 6, 48, (3, 3))  # the third hides the first, of class 6
    assert scene.masks.sum((1, 2)).tolist() == [9, 100]
    assert len(scene.labels) == 2
    assert scene.label == scene.labels[1]


def test_an_image_is_a_function_of_its_number_alone() -> None:
    first = scenes.draw_scene(material((9, 9, 9), (90, 9, 9)), KEY, 7, 32, (1, 1))
    again = scenes.draw_scene(material((9, 9, 9), (90, 9, 9)), KEY, 7, 32, (1, 1))
    assert np.array_equal(first.pixels, again.pixels)
    others = [scenes.draw_scene(material((9, 9, 9), (90, 9, 9)), KEY, n, 32, (1, 1)).pixels for n in (6, 8, 17)]
    assert not any(np.array_equal(first.pixels, other) for other in others)


# -------------------------------------------------------------------------------------------------- the files
def test_the_files_say_the_same(ready: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    scenes.main([str(out), *ready, "--num_workers", "2"])
    assert "70 images of train, 10 of val" in capsys.readouterr().out
    assert (out / "classes.txt").read_text().splitlines() == list(CLASSES)
    for split, count in (("train", 70), ("val", 10)):
        told = json.loads((out / f"{split}.json").read_text())
        assert [category["name"] for category in told["categories"]] == list(CLASSES)
        assert [category["id"] for category in told["categories"]] == list(range(1, 11))
        assert [thing["id"] for thing in told["annotations"]] == list(range(1, len(told["annotations"]) + 1))
        lines = (out / f"{split}.txt").read_text().splitlines()
        assert len(lines) == len(told["images"]) == count
        for image, line in zip(told["images"], lines, strict=True):
            name, label = line.split("\t")
            assert name == f"{split}/images/{image['file_name']}"
            things = [thing for thing in told["annotations"] if thing["image_id"] == image["id"]]
            assert_agree(out / split, image["file_name"], things)
            largest = max(things, key=lambda thing: thing["area"])
            assert CLASSES[largest["category_id"] - 1] == label
            assert read(out / name).shape == (image["height"], image["width"], 3) == (32, 32, 3)


def assert_agree(folder: Path, name: str, things: list[dict]) -> None:
    """Boxes are tight, areas right, and the run lengths together are the masks in the files."""
    classes = np.zeros((32, 32), int)
    for thing in things:
        mask = decoded(thing["segmentation"])
        left, top, width, height = thing["bbox"]
        inner = mask[top : top + height, left : left + width]
        assert inner.sum() == mask.sum() == thing["area"] > 0
        assert all(side.any() for side in (inner[0], inner[-1], inner[:, 0], inner[:, -1]))
        assert thing["iscrowd"] == 0
        classes[mask] += thing["category_id"]
    stored = read(folder / "masks" / name)
    assert stored.dtype == np.uint8
    assert np.array_equal(stored, classes)
    assert np.array_equal(read(folder / "objects" / name), np.where(classes > 0, 255, 0))


def test_any_number_of_workers_and_images_makes_the_same_files(ready: list[str], tmp_path: Path) -> None:
    one, two, fewer = (tmp_path / name for name in ("one", "two", "fewer"))
    scenes.main([str(one), *ready, "--num_workers", "1"])
    scenes.main([str(two), *ready, "--num_workers", "2"])
    assert everything(one) == everything(two)
    scenes.main([str(fewer), *ready, "--number", "12"])
    images_of = {name: data for name, data in everything(fewer).items() if name.endswith(".png")}
    assert images_of.items() <= everything(one).items()
    scenes.main([str(tmp_path / "other"), *ready, "--number", "12", "--seed", "4"])
    other = everything(tmp_path / "other")
    assert not any(other[name] == data for name, data in images_of.items() if "/images/" in name)


def test_the_lists_become_prepared_sets(ready: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    scenes.main([str(out), *ready, "--objects", "1", "1"])
    for split in ("train", "val"):
        path = out / f"{split}_set.beton"
        images.main([str(out / f"{split}.txt"), str(path), *RAW_FLAGS, "--classes", str(out / "classes.txt")])
        beton = open_beton(path)
        assert beton.info.classes == CLASSES
        names = sample_names(str(path), len(beton.labels))
        labels = [int(Path(name).stem) % 10 for name in names]  # the first garment's class
        assert beton.labels.tolist() == labels
        masks = [read(out / name.replace("/images/", "/masks/")) for name in names]
        assert [mask.max() - 1 for mask in masks] == labels


def test_train_and_val_share_neither_photographs_nor_garments(ready: list[str], sources: Path) -> None:
    """Every photograph has a red of its own; the smooth one is left out."""
    args = scenes.build_parser().parse_args(["out", *ready])
    found = scenes.gather(args)
    reds = {
        split: {round((float(np.asarray(photograph)[..., 0].mean()) - 40) / 20) for photograph in part.photographs}
        for split, part in found.items()
    }
    assert reds == {"train": {0, 1, 2, 5, 6, 7}, "val": {3, 8}}
    train, val = ({garment.tobytes() for garment in garments_of(found[split])} for split in ("train", "val"))
    assert len(train) == len(val) == 200
    assert not train & val


def garments_of(part: scenes.Material) -> np.ndarray:
    assert isinstance(part.things, things.Garments)
    return part.things.images


# -------------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--number", "9"], "number is 9, expected 10 to"),
        (["--val_number", "0"], "val_number is 0, expected 10 to"),
        (["--size", "31"], "size is 31, expected 32 to 2048"),
        (["--size", "2049"], "size is 2049, expected 32 to 2048"),
        (["--seed", "-1"], "seed is -1, expected 0 to"),
        (["--num_workers", "-1"], "num_workers is -1, expected 0 to"),
        (["--objects", "0", "1"], "objects are 0 to 1, expected LOW and HIGH"),
        (["--objects", "3", "2"], "objects are 3 to 2, expected LOW and HIGH"),
        (["--objects", "1", "11"], "objects are 1 to 11, expected LOW and HIGH with 1 <= LOW <= HIGH <= 10"),
        (["--objects", "1"], "expected 2 arguments"),
        (["--number", "many"], "invalid int value: 'many'"),
        (["--garments", "nowhere"], "nowhere has no train-images-idx3-ubyte.gz; apt-get install"),
        (["--cliparts", "nowhere"], "--cliparts has no effect here: --source garments"),
        (["--source", "clipart"], "--garments has no effect here: --source clipart"),
    ],
)
def test_wrong_inputs_are_one_line(
    ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    """Before a photograph is looked at."""
    monkeypatch.setattr(scenes, "sources", lambda: pytest.fail("photographs were looked for"))
    with pytest.raises(UserError, match=message) as caught:
        scenes.main([str(tmp_path / "out"), *ready, *flags])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is there already; choose another OUT, or remove it"):
        scenes.main([str(tmp_path), *ready])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setattr(scenes, "sources", lambda: pytest.fail("photographs were looked for"))
    with pytest.raises(UserError, match=r"OUT is .*out, which would lie in .*file, and that is a file"):
        scenes.main([str(tmp_path / "file" / "out"), *ready])
    with pytest.raises(UserError, match="nowhere has no cliparts of recreation"):
        scenes.main([str(tmp_path / "out"), *FLAGS, "--source", "clipart", "--cliparts", "nowhere"])


def test_bad_photographs_are_named(ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = [tmp_path / f"{number}.png" for number in range(5)]
    for path in smooth:
        Image.new("RGB", (200, 150)).save(path)
    monkeypatch.setattr(scenes, "sources", lambda: smooth)
    with pytest.raises(UserError, match="0 of 5 photographs have texture, expected 4 or more"):
        scenes.main([str(tmp_path / "out"), *ready])
    smooth[2].write_bytes(smooth[2].read_bytes()[:40])
    with pytest.raises(UserError, match=r"photograph .*2\.png cannot be read"):
        scenes.main([str(tmp_path / "out"), *ready])
    assert not (tmp_path / "out").exists()


def test_a_class_without_garments_is_named(ready: list[str], tmp_path: Path) -> None:
    idx_files(tmp_path / "few", 12)
    with pytest.raises(UserError, match=r"few has no .* in train; download it again"):
        scenes.main([str(tmp_path / "out"), *ready, "--garments", str(tmp_path / "few")])


@pytest.mark.parametrize("reason", ["dies", "stopped"])
def test_an_unfinished_set_leaves_nothing(
    ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    @contextlib.contextmanager
    def told_to_stop() -> Iterator[object]:
        yield lambda: True

    def dying(*arguments: object) -> None:
        os._exit(9)

    expected: type[BaseException] = KeyboardInterrupt
    if reason == "dies":
        monkeypatch.setattr(scenes, "draw_scene", dying)
        expected = UserError
    else:
        monkeypatch.setattr(scenes, "asked_to_stop", told_to_stop)
    with pytest.raises(expected, match="a process died after 0 of 70 images" if reason == "dies" else None):
        scenes.main([str(tmp_path / "out"), *ready])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(ready: list[str], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 1) as disk:
        with pytest.raises(UserError, match=r"out cannot be written \(No space left on device\); make room"):
            scenes.main([str(disk / "out"), *ready, "--size", "96", "--number", "400"])
        assert list(disk.iterdir()) == []
