"""Sets in COCO's form: what is read, what is left out and said, and what is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from fasthpm import errors
from fasthpm.dense.detection.coco import Packed, find_split, open_set
from fasthpm.dense.loader import Unreadable
from fasthpm.errors import UserError

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_noted", set())


def opened(path: Path, train: bool = True, **more: Any) -> Any:
    return open_set(path, path.with_suffix("") / "images", train=train, **more)


def test_a_sample_is_image_masks_and_labels(content: Any, write: Write) -> None:
    """Classes in the order of the ids, labels from 1; images without an object stay in tests."""
    path = write(content)
    data = opened(path)
    assert data.classes == ("dog", "cat")
    assert len(data) == 2
    assert data.repeats() is None
    assert data.source == str(path)
    seen = data.read(0)
    assert data.name(0).endswith("/images/0.png")
    assert np.array_equal(seen.pixels, np.asarray(Image.open(data.name(0))))
    assert seen.labels.tolist() == [2, 1]
    assert seen.masks.shape == (2, 40, 60)
    assert seen.masks[0].sum() == 20 * 10
    assert seen.masks[0, 6:16, 5:25].all()
    test = opened(path, train=False)
    assert len(test) == 3
    assert len(test.read(0).masks) == 0


def test_empty_images_are_said_or_kept(content: Any, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(content)
    assert len(opened(path)) == 2
    assert "1 of 3 images have no object to learn and are left out of training" in capsys.readouterr().err
    assert len(opened(path, keep_empty=True)) == 3
    assert capsys.readouterr().err == ""


def test_run_lengths_and_grey_images(content: Any, write: Write) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[3:9, 20:30] = 1
    packed = pycocotools.mask.encode(np.asfortranarray(mask))
    plain = {"size": [40, 60], "counts": [20 * 40 + 3, *([6, 34] * 9), 6, 0]}
    plain["counts"][-1] = 40 * 60 - sum(plain["counts"][:-1])
    content["annotations"][0]["segmentation"] = {"size": [40, 60], "counts": packed["counts"].decode()}
    content["annotations"][1]["segmentation"] = plain
    path = write(content)
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(path.with_suffix("") / "images" / "0.png")
    seen = opened(path).read(0)
    assert np.array_equal(seen.masks[0], mask)
    assert np.array_equal(seen.masks[1], mask)
    assert (seen.pixels == 77).all()


def test_crowds_and_broken_objects_are_left_out(content: Any, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """In training; tests keep all but broken masks, as COCO counts them."""
    rows = content["annotations"]
    rows += [{**rows[0], "id": 90 + k} for k in range(6)]
    rows[3] |= {"iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [2400]}}
    rows[4] |= {"bbox": [5, 5, 0, 10]}
    rows[5] |= {"bbox": [70, 5, 10, 10]}
    rows[6] |= {"segmentation": [[1, 1, 5, 5]]}
    rows[7] |= {"segmentation": [[1, 1, 5, 5, 3, 8, 2]]}
    rows[8] |= {"bbox": [float("nan"), 5, 10, 10]}
    path = write(content)
    assert len(opened(path).things(0)) == 2
    said = capsys.readouterr().err
    assert "6 of 9 objects are left out of training" in said
    assert "2 with a box of no area inside the image" in said
    assert "2 with a polygon without three corners" in said
    assert "1 of a crowd" in said
    assert "1 with a box that is not finite" in said
    assert len(opened(path, train=False).things(0)) == 5
    truth = opened(path, train=False).truth([0])
    assert [each["iscrowd"] for each in truth["annotations"]] == [0, 0, 1, 0, 0]
    assert truth["annotations"][0]["category_id"] == 2
    assert [each["id"] for each in truth["annotations"]] == [1, 2, 3, 4, 5]


def test_areas_are_counted_where_the_file_has_none(content: Any, write: Write) -> None:
    del content["annotations"][0]["area"]
    truth = opened(write(content), train=False).truth([0])
    assert truth["annotations"][0]["area"] == 200


def test_polygons_outside_the_image_are_clipped(content: Any, write: Write) -> None:
    content["annotations"][0]["segmentation"] = [[-20, -20, 100, -20, 100, 10, -20, 10]]
    seen = opened(write(content)).read(0)
    assert seen.masks[0].sum() == 60 * 10


def test_images_and_categories_of_one_name(content: Any, write: Write) -> None:
    content["categories"][0]["name"] = "dog"
    assert opened(write(content)).classes == ("dog (3)", "dog (7)")


def change(content: Any, key: str, row: int, **values: Any) -> Any:
    content[key][row] |= values
    return content


def without(content: Any, key: str, row: int, name: str) -> Any:
    del content[key][row][name]
    return content


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no json": (lambda c: "{", "is no JSON"),
    "a list": (lambda c: [], "has no list of images and of annotations and of categories"),
    "no categories": (lambda c: {**c, "categories": []}, "holds no categories"),
    "no images": (lambda c: {**c, "images": []}, "holds no images"),
    "an empty file": (lambda c: "", "is no JSON"),
    "no annotations": (lambda c: {k: v for k, v in c.items() if k != "annotations"}, "no list of annotations"),
    "no objects": (lambda c: {**c, "annotations": []}, "holds no object;"),
    "only crowds": (
        lambda c: {**c, "annotations": [{**each, "iscrowd": 1} for each in c["annotations"]]},
        r"holds no object that can be used \(3 of a crowd\)",
    ),
    "two categories of one id": (
        lambda c: change(c, "categories", 1, id=7),
        r"gives the category id 7 twice \(cat, dog\)",
    ),
    "two images of one id": (lambda c: change(c, "images", 1, id=10), r"gives the image id 10 twice \(0.png, 1.png\)"),
    "unknown image": (lambda c: change(c, "annotations", 1, image_id=99), "annotation 2 of .* is of image 99"),
    "unknown category": (lambda c: change(c, "annotations", 1, category_id=5), "annotation 2 of .* is of category 5"),
    "no box": (lambda c: without(c, "annotations", 0, "bbox"), "annotation 1 of .* has no bbox"),
    "a box of three": (lambda c: change(c, "annotations", 0, bbox=[1, 2, 3]), "no numbers where they belong"),
    "no image of an annotation": (lambda c: without(c, "annotations", 0, "image_id"), "has no image_id"),
    "an annotation that is a number": (lambda c: {**c, "annotations": [5]}, "annotation 5 of"),
    "no file": (lambda c: without(c, "images", 0, "file_name"), "an image without file_name"),
    "no height": (lambda c: without(c, "images", 0, "height"), "an image without height"),
    "no size": (lambda c: change(c, "images", 0, height=0), "an image without usable size"),
    "no id": (lambda c: without(c, "images", 2, "id"), "an image without id"),
    "no name": (lambda c: without(c, "categories", 0, "name"), "a category without id or name"),
    "a missing file": (lambda c: change(c, "images", 0, file_name="x.png"), r"names 1 of 3 files .* \(x.png\)"),
    "a missing folder": (lambda c: change(c, "images", 0, file_name="a/0.png"), r"names 1 of 3 files .* \(a/0.png\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_one_line(name: str, content: Any, write: Write) -> None:
    spoil, said = REFUSED[name]
    path = write(spoil(content))
    with pytest.raises(UserError, match=said) as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        open_set(tmp_path / "x.json", tmp_path, train=True)


def test_samples_that_cannot_be_read(content: Any, write: Write) -> None:
    content["annotations"][2]["segmentation"] = {"size": [50, 30], "counts": [7]}
    path = write(content)
    data = opened(path)
    with pytest.raises(Unreadable, match="has an object"):
        data.read(1)
    file = Path(data.name(0))
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(file)
    with pytest.raises(Unreadable, match=r"has 9x8 pixels, .* says 60x40"):
        data.read(0)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(Unreadable, match="cannot be read as an image"):
        data.read(0)
    file.unlink()
    with pytest.raises(Unreadable, match="cannot be read as an image"):
        data.read(0)


def test_layouts(tmp_path: Path) -> None:
    layouts = {
        "train.json": "train/images",
        "annotations/train.json": "train/images",
        "annotations/instances_train2017.json": "train2017",
        "annotations/lvis_v1_train.json": "",
        "lvis_v1_train.json": "",
    }
    for file, folder in layouts.items():
        path = tmp_path / "set" / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({}))
        assert find_split(tmp_path / "set", "train") == (path, tmp_path / "set" / folder)
        shutil.rmtree(tmp_path / "set")
    with pytest.raises(UserError, match=r"is no folder; give such a folder, or --val_json and --val_images"):
        find_split(tmp_path / "set", "val")
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"holds none of val.json"):
        find_split(tmp_path / "set", "val")


def test_a_prepared_sets_sidecar_is_no_file_of_objects(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "train.beton").touch()
    with pytest.raises(UserError, match="belongs to the prepared set beside it"):
        find_split(tmp_path, "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text("{}")
    assert find_split(tmp_path, "train")[0] == tmp_path / "annotations" / "train.json"


def test_files_named_by_their_address(content: Any, write: Write) -> None:
    """LVIS names no files."""
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
    path = write(content)
    data = open_set(path, path.with_suffix(""), train=True)
    assert data.read(0).pixels.shape == (40, 60, 3)


def test_packed_is_a_list() -> None:
    values = [[], "x", {"a": [1, 2]}, None]
    assert list(Packed(values)) == values
    assert len(Packed([])) == 0
