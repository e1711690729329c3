"""Masks against pycocotools and against loops."""

from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch

from fasthpm.dense.detection import masks
from fasthpm.errors import UserError

HEIGHT, WIDTH = 30, 40


def polygons(generator: np.random.Generator, spread: float) -> list[list[float]]:
    """One to three polygons of three to nine corners, partly outside the image."""
    return [
        ((generator.random((int(generator.integers(3, 10)), 2)) * spread - (spread - 1) / 2) * [WIDTH, HEIGHT])
        .ravel()
        .tolist()
        for _ in range(int(generator.integers(1, 4)))
    ]


def reference(segmentation: Any) -> np.ndarray:
    lengths = pycocotools.mask.frPyObjects(segmentation, HEIGHT, WIDTH)
    return pycocotools.mask.decode(pycocotools.mask.merge(lengths) if isinstance(lengths, list) else lengths)


@pytest.mark.parametrize("spread", [1.0, 1.6, 8.0])
def test_polygons_are_pycocotools(spread: float) -> None:
    """To the pixel, clipped at the image's border."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        segmentation = polygons(generator, spread)
        assert masks.problem_of(segmentation, HEIGHT, WIDTH) == ""
        found = masks.decode([segmentation], HEIGHT, WIDTH)
        assert found.dtype == np.uint8
        assert np.array_equal(found[0], reference(segmentation))


def test_run_lengths_both_forms_and_back() -> None:
    mask = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    plain = {"size": [HEIGHT, WIDTH], "counts": np.diff(ends, prepend=0).tolist()}
    packed = pycocotools.mask.encode(np.asfortranarray(mask))
    text = {"size": packed["size"], "counts": packed["counts"].decode()}
    for form in (plain, text):
        assert masks.problem_of(form, HEIGHT, WIDTH) == ""
        assert np.array_equal(masks.decode([form], HEIGHT, WIDTH)[0], mask)
    assert masks.encode(mask[None])[0]["counts"] == packed["counts"]
    assert masks.encode(mask[:0][None].repeat(0, 0)) == []
    assert masks.decode([], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("counts", [[20, 30], [20, 3000], "zz", "", "!!", [-5, 1205]])
def test_run_lengths_that_do_not_fill_the_image(counts: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        masks.decode([{"size": [HEIGHT, WIDTH], "counts": counts}], HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        (None, "no mask"),
        ([], "no mask"),
        ([[1, 1, 5, 5]], "without three corners"),
        ([[1, 1, 5, 5, 3, 8, 2]], "without three corners"),
        ([[1, 1, 5, 5, float("nan"), 8]], "far outside"),
        ([[1, 1, 5, 5, 1e9, 8]], "far outside"),
        ([[1, 1, 5, 5, -1e9, 8]], "far outside"),
        ([[1, 1, 5, 5, "x", 8]], "other things than numbers"),
        ([5, 5, 5], "without three corners"),
        ({"size": [4, 5], "counts": [20]}, "a mask of"),
        ({"size": [HEIGHT, WIDTH]}, "without counts"),
    ],
)
def test_broken_ones_are_named(segmentation: Any, said: str) -> None:
    assert said in masks.problem_of(segmentation, HEIGHT, WIDTH)


def test_boxes_are_tight() -> None:
    generator = np.random.default_rng(0)
    made = (generator.random((20, HEIGHT, WIDTH)) < 0.003).astype(np.uint8)
    made[3] = 0
    for box, mask in zip(masks.tight_boxes(made), made, strict=True):
        rows, columns = np.nonzero(mask)
        wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == wanted
    assert masks.tight_boxes(made[:0]).shape == (0, 4)


def test_detections_are_pasted_as_loops_do() -> None:
    """Bilinear between the mask's cells, zero outside it, read at the pixels' centres."""
    made = torch.Generator().manual_seed(0)
    probabilities = torch.rand(6, 1, 4, 4, generator=made)
    corners = torch.rand(6, 2, generator=made) * 20
    boxes = torch.cat([corners, corners + torch.rand(6, 2, generator=made) * 20 + 0.5], dim=1)
    boxes[0] = torch.tensor([0.0, 0.0, WIDTH, HEIGHT])
    found = masks.paste(probabilities, boxes, HEIGHT, WIDTH)
    for mask, probability, (left, top, right, bottom) in zip(found, probabilities[:, 0], boxes.tolist(), strict=True):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                across = (column + 0.5 - left) / (right - left) * 4 - 0.5
                down = (row + 0.5 - top) / (bottom - top) * 4 - 0.5
                value = 0.0
                for r in range(4):
                    for c in range(4):
                        value += float(probability[r, c]) * max(1 - abs(across - c), 0) * max(1 - abs(down - r), 0)
                if abs(value - 0.5) > 1e-4:
                    assert mask[row, column] == (value > 0.5), (row, column)


def test_a_whole_mask_fills_its_box() -> None:
    found = masks.paste(torch.ones(1, 1, 28, 28), torch.tensor([[3.0, 4.0, 11.0, 9.0]]), HEIGHT, WIDTH)
    assert masks.tight_boxes(found).tolist() == [[3, 4, 11, 9]]
    assert found.sum() == 8 * 5
    outside = masks.paste(torch.ones(1, 1, 28, 28), torch.tensor([[50.0, 4.0, 60.0, 9.0]]), HEIGHT, WIDTH)
    assert outside.sum() == 0


def test_the_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval.core.mask", None)
    with pytest.raises(UserError, match=r"faster-coco-eval.*pip install"):
        masks.coco_library("mask")
