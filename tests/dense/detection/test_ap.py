"""Average precision against pycocotools on random detections; gathering over ranks."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasthpm.dense.detection.ap import Found, average_precision, in_original, measure
from fasthpm.dense.detection.coco import Annotations, CocoSet, Image, Thing
from tests.helpers.launch import run_ranks

CLASSES, SIZE = 4, (180, 240)


def blob(generator: np.random.Generator, limit: int = 60) -> tuple[np.ndarray, list[float]]:
    """A random ellipse, and its box."""
    height, width = SIZE
    y, x = generator.random(2) * SIZE
    tall, wide = generator.integers(4, limit, 2) / 2
    rows, columns = np.mgrid[:height, :width]
    mask = (((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 <= 1).astype(np.uint8)
    mask[int(y), int(x)] = 1
    seen = np.nonzero(mask)
    top, left = (int(each.min()) for each in seen)
    return mask, [left, top, int(seen[1].max()) - left + 1, int(seen[0].max()) - top + 1]


def lengths(mask: np.ndarray) -> dict[str, Any]:
    return pycocotools.mask.encode(np.asfortranarray(mask))


def random_set(generator: np.random.Generator, images: int = 12, more: Any = None) -> CocoSet:
    """Ellipses of some sizes, a few of them crowds; one image without an object."""
    things = []
    for number in range(images):
        row = []
        for _ in range(0 if number == 3 else int(generator.integers(1, 7))):
            mask, box = blob(generator, 240)
            label, crowd = int(generator.integers(1, CLASSES + 1)), generator.random() < 0.15
            row.append(Thing(label, crowd, tuple(map(float, box)), float(mask.sum()), lengths(mask)))
        things.append(row)
    categories = [{"id": 10 * k, "name": f"c{k}"} for k in range(CLASSES)]
    rows = [Image(f"{k}.png", *SIZE, {}) for k in range(images)]
    return CocoSet(Annotations(rows, things, categories), "random", Path(), train=False)


def random_detections(generator: np.random.Generator, data: CocoSet, share: float = 0.7) -> list[dict[str, Any]]:
    """Objects moved a little, under the right class or another, and things that are not there."""
    found = []
    for sample in range(len(data)):
        masks = [(thing.label, pycocotools.mask.decode(thing.segmentation)) for thing in data.things(sample)]
        for label, mask in [*masks, *masks, *((1, blob(generator)[0]) for _ in range(3))]:
            moved = np.roll(mask, generator.integers(-4, 5, 2), (0, 1))
            if generator.random() > share or not moved.any():
                continue
            rows, columns = np.nonzero(moved)
            box = [columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
            found.append(
                {
                    "image_id": sample,
                    "category_id": label if generator.random() < 0.8 else int(generator.integers(1, CLASSES + 1)),
                    "score": round(generator.random(), 2),
                    "bbox": [float(value) for value in box],
                    "segmentation": lengths(moved),
                }
            )
    return found


def pycocotools_ap(truth: dict[str, Any], detections: list[dict[str, Any]], kind: str) -> tuple[list[float], Any]:
    """The six figures of pycocotools, and its table of precisions."""
    left_out = {"bbox": "segmentation", "segm": "bbox"}[kind]
    told = [{key: value for key, value in row.items() if key != left_out} for row in copy.deepcopy(detections)]
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        counter = COCOeval(known, known.loadRes(told), kind)
        counter.evaluate()
        counter.accumulate()
        counter.summarize()
    return counter.stats[:6].tolist(), counter.eval["precision"]


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_pycocotools(seed: int) -> None:
    """All six, of boxes and masks, and every class's, to 1e-6."""
    generator = np.random.default_rng(seed)
    data = random_set(generator)
    detections = random_detections(generator, data)
    found = Found(set(range(len(data))), detections)
    ours, table = average_precision(data, found)
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        wanted, precision = pycocotools_ap(data.truth(range(len(data))), detections, theirs)
        names = [f"{kind}_{name}" for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]
        theirs_ = [100 * value if value > -1 else None for value in wanted]
        assert [ours.get(name) for name in names] == pytest.approx(theirs_, abs=1e-6)
        assert 0 < ours[f"{kind}_ap"] < 100
        _, by_class = measure(data, found, kind)
        each = [100 * precision[:, :, k, 0, 2].mean() for k in range(CLASSES)]
        assert by_class == pytest.approx(each, abs=1e-6)
        assert [row[f"{kind}_ap"] for row in table] == pytest.approx(each, abs=1e-3)


def test_of_some_images_alone() -> None:
    """Images that were not looked at don't count."""
    generator = np.random.default_rng(0)
    data = random_set(generator)
    detections = random_detections(generator, data)
    some = [row for row in detections if row["image_id"] < 6]
    ours, _ = average_precision(data, Found(set(range(6)), some))
    assert ours["box_ap"] == pytest.approx(100 * pycocotools_ap(data.truth(range(6)), some, "bbox")[0][0], abs=1e-6)


def test_nothing_detected_is_zero() -> None:
    data = random_set(np.random.default_rng(0))
    figures, _ = average_precision(data, Found(set(range(len(data))), []))
    assert figures["mask_ap"] == figures["box_ap50"] == 0
    _, by_class = measure(data, Found(set(range(len(data))), []), "mask")
    assert by_class == [0.0] * CLASSES


def test_what_has_no_object_has_no_figure() -> None:
    thing = Thing(1, False, (0.0, 0.0, 10.0, 10.0), 100.0, lengths(np.eye(*SIZE, dtype=np.uint8)))
    categories = [{"id": k, "name": f"c{k}"} for k in range(2)]
    data = CocoSet(Annotations([Image("a", *SIZE, {})], [[thing]], categories), "x", Path(), train=False)
    figures, by_class = measure(data, Found({0}, []), "box")
    assert figures.keys() == {"box_ap", "box_ap50", "box_ap75", "box_ap_small"}
    assert by_class == [0.0, None]


def test_a_perfect_detector_has_all() -> None:
    generator = np.random.default_rng(1)
    data = random_set(generator)
    truth = data.truth(range(len(data)))["annotations"]
    detections = [{**row, "score": 0.9} for row in truth if not row["iscrowd"]]
    figures, _ = average_precision(data, Found(set(range(len(data))), detections))
    assert figures["box_ap"] == pytest.approx(100)
    assert figures["mask_ap"] == pytest.approx(100)


def test_boxes_return_to_the_image() -> None:
    """A 90 x 140 image shown in 32 x 50 pixels; what lies in the grey is cut."""
    boxes = torch.tensor([[0.0, 0.0, 50.0, 32.0], [10.0, 16.0, 60.0, 60.0], [5.0, 40.0, 9.0, 50.0]])
    found = in_original(boxes, torch.tensor([32, 50]), torch.tensor([90, 140]))
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 140.0, 90.0]))
    torch.testing.assert_close(found[1], torch.tensor([28.0, 45.0, 140.0, 90.0]))
    prediction = {
        "boxes": boxes,
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([1, 2, 3]),
        "masks": torch.ones(3, 1, 28, 28),
    }
    target = {"sample": torch.tensor(4), "shown": torch.tensor([32, 50]), "original": torch.tensor([90, 140])}
    kept = Found()
    kept.add([prediction, prediction], [target, target])
    assert kept.samples == {4}
    assert [row["category_id"] for row in kept.detections] == [1, 2]
    assert kept.detections[1]["bbox"] == pytest.approx([28, 45, 112, 45])
    mask = pycocotools.mask.decode(kept.detections[1]["segmentation"])
    assert mask.sum() == 112 * 45
    assert mask[45:, 28:].all()


GATHER = """
import json, sys
from pathlib import Path
from fasthpm import ranks
from fasthpm.dense.detection.ap import Found, gathered

with ranks.session() as launch:
    row = {"image_id": launch.rank, "category_id": 1, "score": 0.5, "bbox": [0, 0, 5, 5], "segmentation": {}}
    found = gathered(Found({launch.rank, 9}, [row, {**row, "image_id": 9}]))
    if launch.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps([sorted(found.samples), [one["image_id"] for one in found.detections]]))
"""


def test_ranks_are_gathered_once_each(tmp_path: Path) -> None:
    (tmp_path / "gather.py").write_text(GATHER)
    finished = run_ranks(tmp_path / "gather.py", tmp_path / "out.json", launcher="forked")
    assert finished.status == 0, finished.output
    assert json.loads((tmp_path / "out.json").read_text()) == [[0, 1, 9], [0, 9, 1]]
