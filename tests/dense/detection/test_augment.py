"""Large-scale jitter: masks, boxes and pixels stay together; against a slow twin."""

import numpy as np
import pytest
import torch

from fasthpm.dense.detection.augment import FILL, Fit, Jitter, Window, collate, draw_window, show, show_masks
from fasthpm.dense.detection.coco import Seen
from fasthpm.dense.detection.masks import tight_boxes

SIDE = 48


def scene(seed: int, shape: tuple[int, int] = (60, 80)) -> Seen:
    """Grey ground with rectangles of a colour of their own, whose masks say where they are."""
    generator = np.random.default_rng(seed)
    pixels = np.full((*shape, 3), 10, np.uint8)
    masks = np.zeros((4, *shape), np.uint8)
    for number in range(4):
        top, left = (int(generator.integers(0, length - 12)) for length in shape)
        tall, wide = generator.integers(8, 12, 2)
        masks[:, top : top + tall, left : left + wide] = 0
        masks[number, top : top + tall, left : left + wide] = 1
        pixels[top : top + tall, left : left + wide] = (60 * number + 40, 255 - 60 * number, 90)
    kept = masks.any((1, 2))
    return Seen(pixels, masks[kept], (np.arange(4) + 1)[kept], seed)


@pytest.mark.parametrize("seed", range(20))
def test_masks_boxes_and_pixels_agree(seed: int) -> None:
    """Inside an object's mask, but for its border, are its colours; its box is tight."""
    seen = scene(seed)
    image, target = Jitter(SIDE, (0.5, 2.0))(seen, np.random.default_rng(seed))
    assert image.shape == (3, SIDE, SIDE)
    assert image.dtype == torch.uint8
    assert target["masks"].shape == (len(target["labels"]), SIDE, SIDE)
    assert np.array_equal(target["boxes"], tight_boxes(target["masks"].numpy()))
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64
    for label, mask in zip(target["labels"].tolist(), target["masks"].numpy(), strict=True):
        inner = mask.copy()
        for axis in (0, 1):
            for way in (1, -1):
                inner &= np.roll(mask, way, axis) & np.roll(mask, 2 * way, axis)
        inner[:2] = inner[-2:] = inner[:, :2] = inner[:, -2:] = 0
        colour = (60 * (label - 1) + 40, 255 - 60 * (label - 1), 90)
        seen_there = image.numpy()[:, inner > 0]
        assert np.abs(seen_there - np.array(colour)[:, None]).max(initial=0) <= 2


@pytest.mark.parametrize("seed", range(10))
def test_a_window_as_loops(seed: int) -> None:
    """Each output pixel shows the image's nearest one; what lies outside is grey, and no object's."""
    seen = scene(seed)
    window = draw_window((60, 80), SIDE, (0.1, 2.0), np.random.default_rng(seed))
    masks, pixels = show_masks(seen.masks, window, SIDE), show(seen.pixels, window, SIDE)
    for row in range(SIDE):
        for column in range(SIDE):
            if row >= window.height or column >= window.width:
                assert not masks[:, row, column].any()
                assert (pixels[row, column] == FILL).all()
                continue
            y = int(window.top + (row + 0.5) / window.scale[1])
            x = int(window.left + (column + 0.5) / window.scale[0])
            assert 0 <= y < 60
            assert 0 <= x < 80
            assert np.array_equal(masks[:, row, column], seen.masks[:, y, x])


def test_scales_and_places_are_vitdets() -> None:
    """The longer side is S times a scale from .1 to 2; of larger images every place is cut out."""
    windows = [draw_window((60, 80), SIDE, (0.1, 2.0), np.random.default_rng(seed)) for seed in range(2000)]
    scales = np.array([window.scale[0] * 80 / SIDE for window in windows])
    assert scales.min() < 0.12
    assert scales.max() > 1.98
    assert abs(np.mean(scales) - 1.05) < 0.05
    large = [window for window in windows if window.scale[0] * 80 / SIDE > 1.9]
    offsets = np.array([(window.left * window.scale[0], window.top * window.scale[1]) for window in large])
    rooms = np.array([(window.scale[0] * 80 - SIDE, window.scale[1] * 60 - SIDE) for window in large])
    shares = offsets / rooms
    assert (shares >= -1e-9).all()
    assert (shares <= 1 + 1e-9).all()
    assert (shares.min(0) < 0.1).all()
    assert (shares.max(0) > 0.9).all()
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.3  # drawn for both axes
    small = [window for window in windows if window.scale[0] * 80 <= SIDE]
    assert all((window.left, window.top) == (0, 0) for window in small)


def test_the_whole_image_as_it_is() -> None:
    """Scale 1 of a square of S pixels is the image itself; its mirror image is mirrored."""
    seen = scene(3, (SIDE, SIDE))
    found = [Jitter(SIDE, (1.0, 1.0))(seen, np.random.default_rng(seed)) for seed in range(20)]
    plain = torch.from_numpy(seen.pixels).permute(2, 0, 1)
    flipped = [torch.equal(image, plain.flip(2)) for image, _ in found]
    assert all(flip or torch.equal(image, plain) for flip, (image, _) in zip(flipped, found, strict=True))
    assert 4 < sum(flipped) < 16
    masks = torch.from_numpy(seen.masks)
    for flip, (_, target) in zip(flipped, found, strict=True):
        assert torch.equal(target["masks"], masks.flip(2) if flip else masks)
    image, _ = Jitter(SIDE, (1.0, 1.0), flip=False)(seen, np.random.default_rng(flipped.index(True)))
    assert torch.equal(image, plain)


def test_the_same_numbers_give_the_same_sample() -> None:
    once, again, other = (Jitter(SIDE)(scene(0), np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1]["masks"], again[1]["masks"])
    assert not torch.equal(once[0], other[0])


def test_tiny_objects_are_left_out() -> None:
    """Those of which the crop leaves nothing, and those with a side below `least_side`."""
    seen = scene(1)
    small = Jitter(SIDE, (0.1, 0.1))(seen, np.random.default_rng(0))[1]
    sides = small["boxes"][:, 2:] - small["boxes"][:, :2]
    assert (sides >= 1).all()
    fewer = Jitter(SIDE, (0.1, 0.1), least_side=20.0)(seen, np.random.default_rng(0))[1]
    assert fewer["boxes"].shape == (0, 4)
    assert fewer["masks"].shape == (0, SIDE, SIDE)
    assert fewer["labels"].shape == (0,)


def test_no_object_at_all() -> None:
    seen = Seen(scene(0).pixels, np.zeros((0, 60, 80), np.uint8), np.zeros(0, np.int64), 0)
    _, target = Jitter(SIDE)(seen, np.random.default_rng(0))
    assert target["boxes"].shape == (0, 4)


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (200, 10), (7, 1000), (1, 1)])
def test_tests_show_the_whole_image(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 100, (*shape, 3), np.uint8)
    seen = Seen(pixels, np.zeros((0, *shape), np.uint8), np.zeros(0, np.int64), 9)
    image, target = Fit(SIDE)(seen, np.random.default_rng(0))
    height, width = target["shown"].tolist()
    assert max(height, width) == SIDE
    assert min(height, width) == max(round(SIDE * min(shape) / max(shape)), 1)
    assert target["original"].tolist() == list(shape)
    assert int(target["sample"]) == 9
    assert (image[:, height:] == FILL).all()
    assert (image[:, :, width:] == FILL).all()
    assert int(image[:, :height, :width].max()) < 100


def test_windows_know_their_box() -> None:
    window = Window(10.0, 20.0, (2.0, 4.0), 8, 12)
    assert window.box() == (10.0, 20.0, 14.0, 23.0)


def test_batches() -> None:
    images, targets = collate([Jitter(SIDE)(scene(k), np.random.default_rng(k)) for k in range(3)])
    assert images.shape == (3, 3, SIDE, SIDE)
    assert len(targets) == 3
    assert collate([])[0].shape == (0, 3, 0, 0)
