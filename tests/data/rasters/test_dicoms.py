"""DICOM: rescaling, inverted grey, frames; what cannot be read is said; names of people go nowhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasthpm.data.rasters.dicoms import is_dicom, open_dicom
from fasthpm.data.rasters.raster import AmbiguousPages, Blob, Reading
from tests.helpers.rasters import dicom, save_dicom

pytest.importorskip("pydicom")
PIXELS = np.arange(60, dtype=np.uint16).reshape(6, 10)


def read(path: Path, data: Any, pages: str = "", number: int = 0) -> np.ndarray:
    raster = open_dicom(Blob(str(save_dicom(path / "a.dcm", data))), Reading(pages))
    values = raster.read(number, raster.whole())
    assert values.dtype == raster.dtype
    assert values.shape == (raster.height, raster.width, raster.channels)
    return values


@pytest.mark.parametrize(
    ("elements", "dtype", "expected"),
    [
        ({}, "uint16", PIXELS),
        ({"RescaleSlope": 2, "RescaleIntercept": -1024}, "int16", PIXELS.astype(int) * 2 - 1024),
        ({"RescaleSlope": "0.5", "RescaleIntercept": "-3"}, "float32", PIXELS * 0.5 - 3),
        ({"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}, "uint16", 4095 - PIXELS),
    ],
)
def test_values_are_rescaled_and_upright(tmp_path: Path, elements: dict, dtype: str, expected: np.ndarray) -> None:
    values = read(tmp_path, dicom(PIXELS, **elements))
    assert values.dtype == dtype
    assert np.array_equal(values[..., 0], expected)


def test_signed_pixels_stay_signed(tmp_path: Path) -> None:
    signed = PIXELS.astype(np.int16) - 30
    assert np.array_equal(read(tmp_path, dicom(signed))[..., 0], signed)
    inverted = read(tmp_path, dicom(signed, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted[..., 0], -1 - signed)


def test_rescaled_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside int16"):
        read(tmp_path, dicom(PIXELS + 60000, RescaleSlope=1, RescaleIntercept=-1024))


def test_frames_are_what_is_said(tmp_path: Path) -> None:
    frames = np.stack([PIXELS, PIXELS + 100, PIXELS + 200])
    with pytest.raises(AmbiguousPages, match="3 pages"):
        read(tmp_path, dicom(frames))
    assert np.array_equal(read(tmp_path, dicom(frames), "channels"), frames.transpose(1, 2, 0))
    assert np.array_equal(read(tmp_path, dicom(frames), "samples", 2)[..., 0], frames[2])


def test_without_pixels_or_a_codec_the_reason_says_so(tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

    empty = dicom(PIXELS)
    del empty.PixelData
    with pytest.raises(ValueError, match="without pixel data"):
        read(tmp_path, empty)
    packed = dicom(PIXELS)
    packed.file_meta.TransferSyntaxUID = JPEGLSLossless
    packed.PixelData = encapsulate([b"\xff\xd8\xff\xf7 no picture"])
    packed["PixelData"].VR = "OB"
    with pytest.raises(ValueError, match=r"JPEG-LS.*pip install pylibjpeg-libjpeg"):
        read(tmp_path, packed)
    packed.file_meta.TransferSyntaxUID = JPEG2000Lossless
    with pytest.raises(Exception, match=r".") as caught:  # there is a codec; the data is damaged
        read(tmp_path, packed)
    assert "pip install" not in str(caught.value)


def test_known_by_first_bytes_or_name(tmp_path: Path) -> None:
    start = save_dicom(tmp_path / "a", dicom(PIXELS)).read_bytes()[:512]
    assert is_dicom("a", start)
    assert is_dicom("a.dcm", b"\x08\0")
    assert not is_dicom("a.dcm", b"")
    assert not is_dicom("a.png", b"\x89PNG")
