"""What is done to values: clipping, logarithm, nodata, shrinking, content; refusals with counts."""

import math
from typing import Any

import numpy as np
import pytest

from data_prep.changes import ArrayOptions, changed, content_of, eight_bits, shrunk
from fasthpm.errors import UserError


def options(dtype: str = "uint16", channels: int = 2, **more: Any) -> ArrayOptions:
    return ArrayOptions(dtype, channels, **more)


def ramp(dtype: str = "uint16") -> np.ndarray:
    """[4, 6, 2], 0 to 47."""
    return np.arange(48).reshape(4, 6, 2).astype(dtype)


def test_nothing_asked_changes_nothing() -> None:
    assert np.array_equal(changed(ramp(), options()), ramp())


def test_a_window_clips_and_leaves_nodata() -> None:
    out = changed(ramp(), options(window=(10.5, 20.0), nodata=3))
    expected = np.clip(ramp(), 11, 20)
    expected.reshape(-1)[3] = 3
    assert out.dtype == np.uint16
    assert np.array_equal(out, expected)
    assert changed(ramp("int16"), options("int16", window=(-1e9, 1e9))).max() == 47  # beyond the type


def test_limits_are_each_channels_own() -> None:
    out = changed(ramp(), options(clip_percentiles=(1, 99)), np.array([[4.0, 9.0], [0.0, 5.0]]))
    assert (out[..., 0].min(), out[..., 0].max(), out[..., 1].max()) == (4, 9, 5)


def test_logarithms_mark_nodata_as_nan() -> None:
    asked = options(log="float32", nodata=0)
    out = changed(ramp(), asked)
    assert (asked.stored_dtype, asked.stored_nodata) == ("float32", "nan")
    assert np.isnan(out[0, 0, 0])
    assert np.allclose(np.expm1(out.reshape(-1)[1:].astype(np.float64)), np.arange(1, 48), rtol=1e-5)
    with pytest.raises(ValueError, match=r"2 pixels of -1 or less"):
        changed(np.full((1, 2, 2), -1, np.int16), options("int16", log="float32"))


def test_what_is_not_finite_is_refused_or_nodata() -> None:
    values = ramp("float32")
    values[1, 2, 0], values[1, 3, 1] = np.nan, -np.inf
    with pytest.raises(ValueError, match=r"2 of 24 pixels are NaN or infinite; --nodata nan"):
        changed(values, options("float32"))
    assert np.isnan(changed(values, options("float32", nodata="nan"))).sum() == 2
    assert (changed(values, options("float32", nodata=-1)) == -1).sum() == 2


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_shrinking_averages_areas_and_spreads_nodata(dtype: str) -> None:
    values = np.random.default_rng(0).integers(1, 200, (9, 12, 2)).astype(dtype)
    values[4, 5, 1] = 0
    out = shrunk(values, 0.0, 5)
    assert out.shape == (3, 5, 2)
    for i in range(3):
        for j in range(5):
            for c in range(2):
                total, area, missing = 0.0, 0.0, False
                for y in range(9):
                    for x in range(12):
                        high = min(3 * i + 3, y + 1) - max(3 * i, y)
                        wide = min(2.4 * j + 2.4, x + 1) - max(2.4 * j, x)
                        if high > 1e-9 and wide > 1e-9:
                            missing |= values[y, x, c] == 0
                            total, area = total + high * wide * float(values[y, x, c]), area + high * wide
                near = 0.501 if dtype == "uint16" else 1e-3
                assert out[i, j, c] == 0 if missing else abs(out[i, j, c] - total / area) < near
    assert (out == 0).sum() >= 1
    assert shrunk(values, 0.0, 12).shape == values.shape


def test_content_is_what_is_measured_and_not_flat() -> None:
    flat = np.full((8, 10, 2), 7, np.uint16)
    assert content_of(flat, None) == 0
    noisy = np.random.default_rng(0).integers(0, 9999, (8, 10, 2)).astype(np.uint16)
    assert content_of(noisy, None) > 0.99
    half = noisy.copy()
    half[:, 5:] = 7
    assert 0.5 <= content_of(half, None) < 0.62
    assert content_of(half, 7.0) == pytest.approx(0.5, abs=0.02)
    holes = np.full((8, 10, 2), np.nan, np.float32)
    assert content_of(holes, math.nan) == 0
    assert content_of(noisy[:1, :1], None) == 0


def test_eight_bits_of_a_range_that_is_known() -> None:
    assert eight_bits(np.array([[[0], [257], [65535]]], np.uint16), None).tolist() == [[0, 1, 255]]
    assert eight_bits(np.array([[[-160], [40], [900]]], np.int16), (-160, 240)).tolist() == [[0, 128, 255]]
    assert eight_bits(np.array([[[0.0], [1.0]]], np.float32), None).tolist() == [[0, 255]]
    with pytest.raises(ValueError, match="--window"):
        eight_bits(np.array([[[-1]]], np.int16), None)
    with pytest.raises(ValueError, match="expected 1 or 3"):
        eight_bits(np.zeros((1, 1, 4), np.uint8), None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"nodata": -1}, "--nodata -1 is no value of uint16"),
        ({"nodata": "nan"}, "--nodata nan is no value of uint16"),
        ({"nodata": 0.5}, r"--nodata 0.5 is no value"),
        ({"nodata": 7, "window": (7.0, 9.0)}, "would turn values into nodata 7"),
        ({"window": (9.0, 7.0)}, "LOW below HIGH"),
        ({"clip_percentiles": (2.0, 101.0)}, "from 0 to 100"),
        ({"window": (0.0, 7.0), "clip_percentiles": (2.0, 98.0)}, "choose one"),
        ({"channels": 65}, "channels is 65, expected 1 to 64"),
        ({"codec": "zip"}, "one of raw, lz4"),
    ],
)
def test_options_that_cannot_be(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**({"channels": 2} | more))
