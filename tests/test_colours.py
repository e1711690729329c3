"""Colours of views: batched on the device against pixel by pixel."""

import numpy as np
import pytest
import torch

from fasthpm import colours
from fasthpm.mask import sample_noise
from tests.helpers import reference_views as reference


@pytest.mark.parametrize("channels", [1, 3])
def test_every_change_is_the_plain_one(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 9, 7, channels), generator=generator, dtype=torch.uint8)
    images[3] = 77  # no hue at all
    numbers = torch.rand(12, colours.NUMBERS, generator=generator)
    often = torch.full((12,), 0.5)
    found = colours.change_colours(images, numbers, often, often)
    for crop in range(12):
        wanted = reference.change_colours(images[crop].numpy(), numbers[crop].double().tolist(), 0.5, 0.5)
        assert np.abs(found[crop].numpy() - wanted).max() < 0.05, crop
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 255


def test_crops_that_nothing_changes_keep_their_pixels() -> None:
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    none = torch.zeros(4)
    numbers = torch.full((4, colours.NUMBERS), 0.99)
    assert (colours.change_colours(images, numbers, none, none) - images).abs().max() < 1e-3


def test_first_view_others_and_local_crops_have_chances_of_their_own() -> None:
    here = torch.device("cpu")
    assert colours.chances(2, 2, (1.0, 0.1, 0.5), here).tolist() == pytest.approx([1.0, 0.1, 1.0, 0.1])
    assert colours.chances(0, 3, (1.0, 0.1, 0.5), here).tolist() == [0.5] * 3


def test_numbers_are_of_the_sample_and_not_of_its_place() -> None:
    step, ids = torch.tensor(3), torch.tensor([5, 9])
    numbers = sample_noise(1, step, ids, colours.NUMBERS, draws=1)[0]
    turned = sample_noise(1, step, ids.flip(0), colours.NUMBERS, draws=1)[0]
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    often = torch.full((2,), 0.5)
    one = colours.change_colours(images, numbers, often, often)
    assert torch.equal(colours.change_colours(images.flip(0), turned, often, often).flip(0), one)
