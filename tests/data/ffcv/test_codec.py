"""Arrays as bytes and back, without loss."""

import numpy as np
import pytest

from fasthpm.data.ffcv import codec
from fasthpm.data.values import DTYPES
from fasthpm.errors import UserError
from tests.helpers.array_sets import array_picture


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_lost(dtype: str, name: str) -> None:
    for shape, channels in (((1, 1), 64), ((300, 200), 3), ((17, 5), 1), ((2, 40000), 2)):
        array = array_picture(1, shape, channels, dtype)
        for source in (array, array.astype(array.dtype.newbyteorder(">")), array[:, ::-1]):
            data = codec.compress(source, name)
            assert np.array_equal(codec.decompress(data, name, source.shape, dtype), source)


def test_smooth_arrays_become_small_and_noise_hardly_grows() -> None:
    smooth = np.round(array_picture(1, (256, 256), 2, "float32") * 3).astype(np.uint16)
    assert len(codec.compress(smooth, "lz4")) < 0.6 * smooth.nbytes
    noise = np.random.default_rng(0).integers(0, 1 << 16, (256, 256, 2)).astype(np.uint16)
    assert len(codec.compress(noise, "lz4")) < noise.nbytes + 200


def test_bands_have_whole_rows_of_about_their_bytes() -> None:
    assert codec.rows_of_band((512, 512, 1), 2) == 64
    assert codec.rows_of_band((3, 512, 1), 2) == 3
    assert codec.rows_of_band((512, 65535, 64), 4) == 1


def test_damage_is_an_error() -> None:
    array = array_picture(1, (64, 40), 2, "uint16")
    data = codec.compress(array, "lz4")
    for damaged in (data + b"x", data[:-1], bytes(4) + data[4:], b"\xff" * len(data)):
        with pytest.raises(ValueError):  # noqa: PT011  (lz4's and ours)
            codec.decompress(damaged, "lz4", array.shape, "uint16")


def test_unknown_codecs_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="codec is 'zip', expected one of raw, lz4"):
        codec.compress(np.zeros((1, 1, 1), np.uint16), "zip")
    monkeypatch.setattr(codec, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UserError, match="codec lz4 needs the package lz4; install it with pip install lz4"):
        codec.compress(np.zeros((1, 1, 1), np.uint16), "lz4")
