"""Labels and features of patches, by plain loops."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasthpm import recipes
from fasthpm.data.statistics import PixelStatistics
from fasthpm.dense import patchwise
from fasthpm.dense.pairs import PairFiles, PairSet, open_pairs
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe
from tests.helpers.pairs import scenes_folder
from tests.helpers.runs import away


def small(**changes: object) -> Recipe:
    return dataclasses.replace(recipes.debug(), input_size="16x24", patch_size=4, **changes)  # type: ignore[arg-type]


@pytest.fixture
def pairs(tmp_path: Path) -> PairSet:
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 5, (side, 30)).astype(np.uint8) for side in (16, 20, 33)]
    return open_pairs(PairFiles(str(scenes_folder(tmp_path, masks))), "train", channels=1)


def test_pixels_are_counted_patch_by_patch() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (2, 8, 12)).astype(np.uint8)
    labels[0, :4, :4] = [[0, 0, 1, 1]] * 4  # as many of both: the first
    labels[1, 4:, 8:] = [[255, 255, 2, 2]] * 4  # as many ignored ones: no reason to leave it out
    labels[1, 4:, 4:8] = 255
    counts = patchwise.count_pixels(torch.from_numpy(labels), 4, 3)
    want, classes = [], []
    for image in labels:
        for top in range(0, 8, 4):
            for left in range(0, 12, 4):
                found = Counter(image[top : top + 4, left : left + 4].ravel().tolist())
                want.append([found[0], found[1], found[2], found[255]])
                classes.append(max((0, 1, 2, 255), key=lambda label, found=found: found[label]))
    assert counts.tolist() == want
    assert patchwise.majority(counts).tolist() == classes
    assert classes[0] == 0
    assert classes[-1] == 2
    assert classes[-2] == 255


def test_images_are_resized_whatever_their_proportions(pairs: PairSet) -> None:
    found = patchwise.read_resized(pairs, [2, 0], (16, 24), workers=2)
    assert found.images.shape == (2, 16, 24, 1)
    for place, sample in enumerate((2, 0)):
        image, labels = pairs.read(sample)
        resized = Image.fromarray(image[..., 0]).resize((24, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(found.images[place, ..., 0], np.asarray(resized))
        assert np.array_equal(
            found.labels[place], np.asarray(Image.fromarray(labels).resize((24, 16), Image.Resampling.NEAREST))
        )


def test_features_are_the_models(pairs: PairSet) -> None:
    recipe = small()
    model = away(recipe)
    model.pixels = PixelStatistics((0.4,), (0.3,))
    encoder = patchwise.PatchEncoder(model, recipe, pairs, torch.device("cpu"))
    found = encoder.whole(pairs)
    images, labels = (torch.from_numpy(part) for part in patchwise.read_resized(pairs, range(3), (16, 24)))
    tokens = model.encode(((images.float() / 255 - 0.4) / 0.3).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.rows.view(3, 24, -1), tokens[:, 1:], atol=2e-5, rtol=1e-4)
    assert torch.equal(found.labels, patchwise.majority(patchwise.count_pixels(labels, 4, 5)))
    assert found.counts.sum().item() == 3 * 16 * 24


def test_pixels_of_unknown_statistics_are_normalised_by_those_of_the_images(pairs: PairSet) -> None:
    model = away(small())
    patchwise.PatchEncoder(model, small(), pairs, torch.device("cpu"))
    images = patchwise.read_resized(pairs, range(3), (16, 24)).images
    assert model.pixels is not None
    np.testing.assert_allclose(model.pixels.mean, images.mean() / 255)
    np.testing.assert_allclose(model.pixels.std, images.std() / 255)


def test_a_sample_that_cannot_be_read_is_one_line(pairs: PairSet) -> None:
    Path(pairs.name(1)).write_bytes(b"x")
    with pytest.raises(UserError, match=r"1\.png needs .*1\.png, which is damaged or no image .*; repair or remove it"):
        patchwise.read_resized(pairs, range(3), (16, 24))
