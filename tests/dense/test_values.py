"""Images of any numbers, resized: nodata is never mixed, and nothing else becomes it."""

import numpy as np
import pytest
from PIL import Image

from fasthpm.dense import values
from tests.helpers.array_sets import array_picture, exact_crop


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_bicubic_is_the_exact_one_but_for_rounding(dtype: str) -> None:
    image = array_picture(1, (30, 41), 4, dtype)
    image[image == 7] = 8
    image[4:6, 9:11, 2] = 7
    found = values.resized(image, (17, 50), Image.Resampling.BICUBIC, 7)
    exact, touched = exact_crop(image, (0, 0, 30, 41, 0), (17, 50), "bicubic", 7)
    assert np.array_equal(found == 7, touched)
    limits = np.iinfo(dtype) if dtype != "float32" else np.finfo(dtype)
    error = np.abs(found[~touched] - exact.clip(limits.min, limits.max)[~touched]).max()
    assert error <= (1.1 if dtype != "float32" else 1e-4)


def test_what_comes_out_as_nodata_by_chance_is_moved() -> None:
    found = values.stored(np.array([4.6, 5.2, 9.0]), np.zeros(1, np.uint16), 5, np.array([False, False, True]))
    assert found.tolist() == [4, 4, 5]
