"""The compiled loop over arrays against float64, for every type, and against damaged bytes."""

from typing import Any

import numpy as np
import pytest

from fasthpm.data.ffcv import array_kernel as kernel
from fasthpm.data.ffcv.beton import CODEC_MODES
from fasthpm.data.ffcv.codec import compress
from fasthpm.data.sampling import INTERPOLATIONS, random_crops
from fasthpm.data.values import DTYPES
from tests.helpers.array_sets import array_picture, exact_crop, is_nodata

SIZES = [(60, 47), (31, 90), (17, 16), (9, 5), (33, 40), (1, 3), (8, 8)]
OUTS = [(24, 40), (7, 19), (48, 48)]


class Samples:
    """Arrays in memory under a table like that of an open set."""

    def __init__(self, arrays: list[np.ndarray], codec: str = "raw", blobs: list[bytes] | None = None) -> None:
        self.arrays, self.dtype = arrays, arrays[0].dtype.name
        blobs = [compress(array, codec) for array in arrays] if blobs is None else blobs
        self.memory = [np.frombuffer(b"x" + blob, np.uint8)[1:] for blob in blobs]  # at an odd address
        self.sizes = np.array([array.shape[:2] for array in arrays], np.int64)
        self.table = (
            np.array([data.ctypes.data for data in self.memory], np.uint64),
            np.array([len(data) for data in self.memory], np.uint64),
            np.full(len(arrays), CODEC_MODES[codec], np.uint8),
            *np.ascontiguousarray(self.sizes.T),
        )

    def decode(
        self,
        crops: Any,
        size: tuple[int, int],
        how: str = "bicubic",
        nodata: float | None = None,
        gains: Any = None,
        means: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        crops, channels = np.array(crops, np.int64).reshape(-1, 5), self.arrays[0].shape[2]
        images = np.full((len(crops), *size, channels), 7, self.dtype)
        status = np.full(len(crops), -1, np.int32)
        gains = np.ones((len(crops), channels), np.float32) if gains is None else np.asarray(gains, np.float32)
        settings = kernel.settings_of(self.dtype, nodata, INTERPOLATIONS.index(how))
        means = np.arange(channels, dtype=np.float32) + 10 if means is None else np.asarray(means, np.float32)
        kernel.decode(self.table, np.arange(len(crops)), crops, gains, means, images, status, settings)
        return images, status


def largest_error(images: np.ndarray, exact: np.ndarray) -> float:
    """Of pixels, beyond the rounding of their type: in units of integers, else relative to the values' size."""
    dtype = images.dtype
    if dtype.kind != "f":
        limits = np.iinfo(dtype)
        return float(np.abs(exact.clip(limits.min, limits.max) - images).max() - 0.5)
    spacing = np.spacing(np.abs(images)).astype(np.float64)
    return float(((np.abs(exact - images.astype(np.float64)) - spacing / 2) / np.abs(exact).max()).max())


ALLOWED = {"uint8": 1e-3, "uint16": 1 / 16, "int16": 1 / 16, "float16": 1e-6, "float32": 1e-12}

STEP = {"uint8": 1, "uint16": 1, "int16": 1, "float16": 1e-3, "float32": 1e-7}


@pytest.mark.parametrize("how", ["area", "bicubic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_equal_a_float64_reference_to_rounding(dtype: str, how: str) -> None:
    for channels, codec in ((1, "raw"), (5, "lz4"), (12, "raw")):
        samples = Samples([array_picture(k, size, channels, dtype) for k, size in enumerate(SIZES)], codec)
        for epoch, out in enumerate(OUTS):
            crops = random_crops(1, epoch, np.arange(len(SIZES)), samples.sizes, 0.05, True)
            if out[0] == out[1]:
                crops[:, 4] = np.arange(len(SIZES)) + 1  # every way of turning but none
            images, status = samples.decode(crops, out, how)
            assert not status.any()
            for image, array, crop in zip(images, samples.arrays, crops, strict=True):
                assert largest_error(image, exact_crop(array, crop, out, how)[0]) <= ALLOWED[dtype]


@pytest.mark.parametrize("how", ["area", "bicubic"])
@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", 0), ("uint8", 255), ("int16", -9), ("float16", 3.5), ("float32", float("nan"))]
)
def test_nodata_spreads_as_far_as_weights_do_and_mixes_with_nothing(dtype: str, nodata: float, how: str) -> None:
    arrays = [array_picture(k, size, 3, dtype) for k, size in enumerate(SIZES)]
    for k, array in enumerate(arrays):
        array[is_nodata(array, nodata)] = 1
        array[np.random.default_rng(k).random(array.shape) < 0.02] = nodata
    samples = Samples(arrays, "lz4")
    for epoch, out in enumerate(OUTS):
        crops = random_crops(2, epoch, np.arange(len(SIZES)), samples.sizes, 0.1, True)
        crops[:, 4] = np.arange(len(SIZES)) if out[0] == out[1] else crops[:, 4]
        images, _ = samples.decode(crops, out, how, nodata)
        for image, array, crop in zip(images, arrays, crops, strict=True):
            exact, touched = exact_crop(array, crop, out, how, nodata)
            assert np.array_equal(is_nodata(image, nodata), touched)
            if not touched.all():
                error = largest_error(image[~touched], exact[~touched])
                assert error <= ALLOWED[dtype] + STEP[dtype]  # what comes out as nodata by chance moves on


def test_a_value_that_comes_out_as_nodata_by_chance_becomes_its_neighbour() -> None:
    for dtype, nodata, other in (("uint16", 5, 6), ("uint8", 255, 254), ("int16", -3, -2)):
        array = np.full((4, 4, 1), nodata - 1, dtype)
        array[:, 1::2] = nodata + 1 if nodata < 255 else 255 - 1
        array[array == nodata] = other
        images, _ = Samples([array]).decode([[0, 0, 4, 4, 0]], (2, 2), "area", nodata)
        assert not is_nodata(images, nodata).any()
    for dtype in ("float16", "float32"):
        array = np.tile(np.array([[[-1.0], [1.0]]], dtype), (2, 1, 1))
        images, _ = Samples([array]).decode([[0, 0, 2, 2, 0]], (1, 1), "area", 0.0)
        assert 0 < abs(images.item()) < 1e-6


def test_bands_of_lz4_give_the_same_as_raw() -> None:
    for dtype in ("uint16", "float32"):
        arrays = [array_picture(k, (300, 120), 3, dtype) for k in range(3)]
        arrays[1][:] = 3  # nothing but repeats
        arrays[2][:] = np.random.default_rng(0).integers(0, 60000, arrays[2].shape)
        crops = [[0, 0, 300, 120, 0], [100, 30, 60, 50, 1], [290, 0, 10, 120, 0]]
        raw, packed = (Samples(arrays, codec).decode(crops, (32, 40))[0] for codec in ("raw", "lz4"))
        assert np.array_equal(raw, packed)


def test_the_same_size_copies_and_one_pixel_sees_nothing_else() -> None:
    for dtype in DTYPES:
        array = array_picture(1, (33, 41), 4, dtype)
        for how in INTERPOLATIONS:
            images, _ = Samples([array]).decode([[3, 4, 20, 30, 0]], (20, 30), how)
            assert np.array_equal(images[0], array[3:23, 4:34])
            images, _ = Samples([array]).decode([[7, 9, 1, 1, 0]], (3, 5), how)
            assert (images[0] == array[7, 9]).all()


def test_every_float16_is_read_and_written_as_numpy_does() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    array = np.where(np.isfinite(values), values, 0).reshape(256, 256, 1).astype(np.float16)
    images, _ = Samples([array]).decode([[0, 0, 256, 256, 0]], (256, 256))
    assert np.array_equal(images[0], array)


def test_gains_move_channels_from_their_means() -> None:
    array = array_picture(2, (20, 20), 3, "uint16") // 4 + 100
    plain, _ = Samples([array]).decode([[0, 0, 20, 20, 0]], (20, 20))
    images, _ = Samples([array]).decode([[0, 0, 20, 20, 0]], (20, 20), gains=[[1, 0, 1.5]])
    assert np.array_equal(images[..., 0], plain[..., 0])
    assert (images[..., 1] == 11).all()  # its mean
    assert np.abs(12 + 1.5 * (plain[..., 2].astype(float) - 12) - images[..., 2]).max() <= 0.5


# ------------------------------------------------------------------------------------------------------------ damage
def test_bytes_of_another_length_and_crops_outside_are_refused() -> None:
    array = array_picture(3, (20, 30), 2, "uint16")
    blobs = [compress(array, "raw"), compress(array, "raw")[:-1], compress(array, "raw")]
    crops = [[0, 0, 20, 30, 0], [0, 0, 20, 30, 0], [1, 0, 20, 30, 0]]
    images, status = Samples([array] * 3, blobs=blobs).decode(crops, (8, 8))
    assert status.tolist() == [0, kernel.FOREIGN, kernel.FOREIGN]
    assert not images[1:].any()


def test_damaged_bands_are_reported_or_change_pixels_but_touch_nothing_else() -> None:
    """Whatever the bytes are, the loop stays inside of its memory; lengths that contradict are damage."""
    array = array_picture(4, (64, 40), 3, "uint16")
    good, rng = compress(array, "lz4"), np.random.default_rng(5)
    blobs = [good, good[:3], good[:40], bytes(len(good)), b"\xff" * len(good), good[: len(good) // 2]]
    for _ in range(300):
        damaged = bytearray(good)
        for at in rng.integers(0, len(good) if rng.random() < 0.5 else 60, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        blobs.append(bytes(damaged))
    images, status = Samples([array] * len(blobs), "lz4", blobs).decode([[0, 0, 64, 40, 0]] * len(blobs), (16, 16))
    assert status[0] == 0
    assert images[0].any()
    assert (status[1:6] == kernel.DAMAGED).all()
    assert set(status.tolist()) == {0, kernel.DAMAGED}
    assert not images[status != 0].any()


@pytest.mark.parametrize("how", ["area", "bicubic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [kernel.MANY, 20])
def test_many_channels_are_resized_as_each_alone(how: str, dtype: str, channels: int) -> None:
    """Bit for bit: the two ways to sum columns are one computation. With nodata, gains, turns, shrunk and enlarged."""
    array = array_picture(5, (61, 90), channels, dtype)
    array[10:14, 20:30, 1] = 7
    array[0, :40, channels - 1] = 7
    crops = [[3, 5, 50, 80, code] for code in range(8)] + [[20, 20, 9, 7, 1], [0, 0, 61, 90, 2]]
    gains = np.linspace(0.5, 1.5, channels, dtype=np.float32)[None].repeat(len(crops), 0)
    gains[::2] = 1
    found, status = Samples([array] * len(crops)).decode(crops, (24, 24), how, 7, gains)
    assert not status.any()
    means = np.arange(channels) + 10  # as `decode` has them
    for c in range(channels):
        alone = Samples([np.ascontiguousarray(array[..., c : c + 1])] * len(crops))
        own = np.ascontiguousarray(gains[:, c : c + 1])
        want, _ = alone.decode(crops, (24, 24), how, 7, own, means[c : c + 1])
        assert want.tobytes() == np.ascontiguousarray(found[..., c : c + 1]).tobytes()
