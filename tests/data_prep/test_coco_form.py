"""COCO's form of what was drawn, by the plain loop and by pycocotools."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep import coco_form
from tests.helpers.run_lengths import decoded


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [*(rng.random((5, 7)) < 0.5 for _ in range(20)), np.ones((2, 3), bool), np.eye(3) > 0]


def test_run_lengths_are_those_of_the_loop() -> None:
    for mask in masks():
        lengths = coco_form.run_lengths(mask)
        assert np.array_equal(decoded({"size": list(mask.shape), "counts": lengths}), mask)
        assert all(length > 0 for length in lengths[1:])


def test_pycocotools_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = pytest.importorskip("pycocotools.coco")
    objects = [[coco_form.annotation(k % 3, mask) for k, mask in enumerate(masks())], []]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(coco_form.coco(7, objects, ("ant", "bee", "fly"), "insect")))
    found = theirs.COCO(str(path))
    capsys.readouterr()
    assert [found.imgs[k]["file_name"] for k in found.getImgIds()] == ["00000000.png", "00000001.png"]
    assert [category["name"] for category in found.loadCats([1, 2, 3])] == ["ant", "bee", "fly"]
    for thing, mask in zip(found.loadAnns(found.getAnnIds(imgIds=[0])), masks(), strict=True):
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert thing["bbox"] == box
        packed = theirs.maskUtils.frPyObjects(thing["segmentation"], *mask.shape)
        assert np.array_equal(theirs.maskUtils.decode(packed), mask)
        assert theirs.maskUtils.area(packed) == thing["area"]
        assert theirs.maskUtils.toBbox(packed).tolist() == box
    assert found.getAnnIds(imgIds=[1]) == []
