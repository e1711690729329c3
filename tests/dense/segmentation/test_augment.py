"""Crops for segmentation against plain loops, image and mask side by side, and all from the given numbers."""

import colorsys
from typing import Any

import numpy as np
import pytest

from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.segmentation.augment import (
    Array,
    Augmentation,
    distorted,
    fitted,
    for_test,
    recoloured,
    resized_image,
    resized_mask,
)

PLAIN: dict[str, Any] = {"flip": False, "distort": False, "cat_max_ratio": 1.0}


def picture(seed: int = 0, size: tuple[int, int] = (40, 60), channels: int = 3) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


def squares(size: tuple[int, int] = (48, 64), side: int = 16) -> tuple[Array, Array]:
    """An image of squares of few colours, and its mask: the label is the red channel over 30."""
    rows, columns = (np.arange(length) // side for length in size)
    labels = ((rows[:, None] * 3 + columns) % 7 + 1).astype(np.uint8)
    return np.stack([labels * 30, np.full_like(labels, 9), 255 - labels * 30], axis=2), labels


def bilinear_by_loops(image: Array, size: tuple[int, int]) -> Array:
    height, width = image.shape[:2]
    out = np.zeros((*size, image.shape[2]), np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            value = np.zeros(image.shape[2])
            for i, share_y in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
                for j, share_x in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
                    value += share_y * share_x * image[i, j].astype(float)
            out[row, column] = np.floor(value + 0.5)
    return out


@pytest.mark.parametrize("size", [(53, 80), (17, 25), (40, 61)])
def test_resizing_is_bilinear_by_loops(size: tuple[int, int]) -> None:
    image, corner, kept = picture(), (4, 7), (12, 15)
    whole = resized_image(image, size, (0, 0), size)
    difference = np.abs(whole.astype(int) - bilinear_by_loops(image, size).astype(int))
    assert difference.max() <= 1  # float32 against float64, at a half
    assert (difference > 0).mean() < 0.01
    part = resized_image(image, size, corner, kept)
    assert (part == whole[4 : 4 + 12, 7 : 7 + 15]).all()


@pytest.mark.parametrize("size", [(53, 80), (17, 25), (40, 60)])
def test_masks_take_the_label_that_lies_there(size: tuple[int, int]) -> None:
    mask = picture()[..., 0]
    found = resized_mask(mask, size, (1, 2), (9, 11))
    for row in range(9):
        for column in range(11):
            y, x = (1 + row + 0.5) * 40 / size[0], (2 + column + 0.5) * 60 / size[1]
            assert found[row, column] == mask[int(y), int(x)]


def test_sizes_are_mmcvs() -> None:
    assert fitted((683, 512), 2048, 512) == (683, 512)
    assert fitted((100, 200), 2048, 512) == (512, 1024)
    assert fitted((100, 900), 2048, 512) == (228, 2048)  # the long side limits
    assert fitted((512, 683), 1024, 256) == (256, 342)


@pytest.mark.parametrize("seed", range(8))
def test_image_and_mask_stay_side_by_side(seed: int) -> None:
    augment = Augmentation((32, 40), 32, distort=False, fill=(1, 2, 3))
    image, mask = augment(squares(), np.random.default_rng(seed))
    assert image.shape == (3, 32, 40)
    assert mask.shape == (32, 40)
    outside = mask == IGNORED
    assert ((image == np.array([1, 2, 3])[:, None, None]).all(0) == outside).all()
    derived = np.rint(image[0] / 30)
    agree = (derived == mask)[~outside]
    assert agree.mean() > 0.75  # not where colours are mixed, between two squares
    inner = np.ones_like(mask, bool)
    inner[:, 1:] &= mask[:, 1:] == mask[:, :-1]
    inner[1:] &= mask[1:] == mask[:-1]
    inner[:, :-1] &= mask[:, 1:] == mask[:, :-1]
    inner[:-1] &= mask[1:] == mask[:-1]
    inner[[0, -1]] = inner[:, [0, -1]] = False
    assert (derived == mask)[inner & ~outside].mean() > 0.98


def test_the_same_numbers_give_the_same_crop_and_others_another() -> None:
    augment, sample = Augmentation((32, 32), 32), squares()
    before = [part.copy() for part in sample]
    np.random.seed(1)  # noqa: NPY002  (what it must not depend on)
    first = augment(sample, np.random.default_rng(3))
    np.random.seed(2)  # noqa: NPY002
    again, other = augment(sample, np.random.default_rng(3)), augment(sample, np.random.default_rng(4))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[0] == other[0]).all()
    assert all((a == b).all() for a, b in zip(sample, before, strict=True))


def test_factors_corners_and_mirrors_cover_their_ranges() -> None:
    sample = (np.zeros((64, 64, 3), np.uint8) + 200, np.zeros((64, 64), np.uint8))
    small = Augmentation((128, 128), 64, **PLAIN)  # larger than any resized image: what is not filled is the image
    sides = [int((small(sample, np.random.default_rng(i))[1] == 0).sum() ** 0.5) for i in range(200)]
    assert 31 <= min(sides) < 36
    assert 124 < max(sides) <= 128
    place = np.arange(64 * 64).reshape(64, 64)
    image = np.stack([place // 64, place % 64, place * 0], axis=2).astype(np.uint8)
    crop = Augmentation((32, 32), 64, factors=(1.0, 1.0), **(PLAIN | {"flip": True}))
    found = [crop((image, place.astype(np.uint8)), np.random.default_rng(i))[0] for i in range(200)]
    rows, mirrored = [int(one[0].min()) for one in found], [bool(one[1, 0, 0] > one[1, 0, 1]) for one in found]
    assert set(rows) == set(range(33))
    assert 70 < sum(mirrored) < 130


def test_crops_of_one_class_are_drawn_again() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[40:, 40:] = 1
    mask[:8] = IGNORED
    sample = (picture(1, (64, 64)), mask)

    def largest(ratio: float) -> list[float]:
        augment = Augmentation((24, 24), 64, factors=(1.0, 1.0), **(PLAIN | {"cat_max_ratio": ratio}))
        found = []
        for seed in range(60):
            crop = augment(sample, np.random.default_rng(seed))[1]
            counts = np.bincount(crop[crop != IGNORED], minlength=2)
            found.append(counts.max() / max(counts.sum(), 1))
        return found

    chosen, any_crop = largest(0.75), largest(1.0)
    assert np.mean(np.array(chosen) < 0.75) > 2 * np.mean(np.array(any_crop) < 0.75)
    assert max(chosen) == 1.0  # ten tries, then whatever comes


def test_an_image_that_is_ignored_as_a_whole_still_gives_a_crop() -> None:
    mask = np.full((20, 30), IGNORED, np.uint8)
    image, cut = Augmentation((16, 16), 16)((picture(2, (20, 30)), mask), np.random.default_rng(0))
    assert image.shape == (3, 16, 16)
    assert (cut == IGNORED).all()


def test_colours_are_changed_in_half_of_all_images_and_grey_ones_stay_grey() -> None:
    image = np.full((4, 4, 3), (200, 90, 40), np.uint8)
    draws = [distorted(image, np.random.default_rng(seed)) for seed in range(400)]
    same = np.mean([(draw == image).all() for draw in draws])
    assert 0.02 < same < 0.12  # (1/2)^4
    means = np.array([draw.mean() for draw in draws])
    assert means.min() < 0.55 * image.mean()
    assert means.max() > 1.3 * image.mean()
    grey = distorted(picture(3, (5, 5), 1), np.random.default_rng(1))
    assert grey.shape == (5, 5, 1)


@pytest.mark.parametrize("seed", range(6))
def test_hue_and_saturation_by_colorsys(seed: int) -> None:
    image = picture(seed, (3, 5))
    random = np.random.default_rng(seed)
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = int(random.integers(-18, 18)) if random.random() < 0.5 else 0
    found = recoloured(image, np.random.default_rng(seed))
    for row in range(3):
        for column in range(5):
            h, s, v = colorsys.rgb_to_hsv(*(image[row, column] / 255))
            expected = np.array(colorsys.hsv_to_rgb((h + hue / 180) % 1, min(s * saturation, 1), v)) * 255
            assert np.abs(found[row, column] - expected).max() < 12  # 8-bit hues and saturations are coarse


def test_images_are_tested_at_a_size_of_their_own_with_their_mask_as_it_is() -> None:
    image, mask = squares((48, 64))
    found, truth = for_test((image, mask), 24)
    assert found.shape == (3, 24, 32)
    assert truth is mask
    assert (for_test((image, mask), 48)[0] == image.transpose(2, 0, 1)).all()
