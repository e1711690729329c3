"""DICOM: pixels with their rescaling. Nothing else of a file goes anywhere: the rest is about people."""

from typing import Any

import numpy as np

from fasthpm.data.rasters.raster import Blob, Raster, Reading, fitting, is_whole, library, settle_pages
from fasthpm.data.sampling import Array

PREAMBLE, MAGIC = 128, b"DICM"
KINDS = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
DECODERS = {  # by the transfer syntax's name, what reads it beside pydicom
    "JPEG 2000": "pylibjpeg-openjpeg",
    "JPEG-LS": "pylibjpeg-libjpeg or pyjpegls",
    "JPEG": "pylibjpeg-libjpeg",
    "High-Throughput": "pylibjpeg-openjpeg",
}


def is_dicom(name: str, start: bytes) -> bool:
    """By its first bytes; some have no preamble, and are known by their name."""
    return start[PREAMBLE : PREAMBLE + 4] == MAGIC or (name.endswith((".dcm", ".dicom")) and bool(start))


def open_dicom(blob: Blob, reading: Reading) -> Raster:
    """Frames, upright as stored; what is integral after rescaling stays so, as int16 if it may be negative.

    **Raises:** `ValueError` for one without pixels, or whose pixels no installed codec reads.
    """
    pydicom = library("pydicom", "dicom", "DICOM files")
    with blob.open() as file:
        data = pydicom.dcmread(file, force=True)
    if "PixelData" not in data and "FloatPixelData" not in data and "DoubleFloatPixelData" not in data:
        raise ValueError("DICOM without pixel data")
    for name in ("Rows", "Columns"):
        if not isinstance(data.get(name), int):
            raise ValueError(f"DICOM without {name}")
    kind, samples = str(data.get("PhotometricInterpretation", "")), int(data.get("SamplesPerPixel", 1))
    if kind not in KINDS:
        raise ValueError(f"DICOM of {kind or 'no PhotometricInterpretation'}, expected {', '.join(KINDS)}")
    frames = int(data.get("NumberOfFrames", None) or 1)
    pages = settle_pages(reading.pages, frames, samples)
    dtype = _dtype(data)
    held: list[Array] = []

    def read(number: int, box: tuple[int, int, int, int]) -> Array:
        if not held:
            held.append(_pixels(data, dtype, (frames, samples)))
        top, left, height, width = box
        part = held[0][:, top : top + height, left : left + width]
        if pages == "channels":
            return np.ascontiguousarray(part[..., 0].transpose(1, 2, 0))
        return np.ascontiguousarray(part[number])

    return Raster(
        data.Rows,
        data.Columns,
        frames if pages == "channels" else samples,
        dtype,
        read,
        slices=frames if pages == "samples" else 1,
    )


def _rescaling(data: Any) -> tuple[float, float]:
    """Slope and intercept."""
    return float(data.get("RescaleSlope", None) or 1), float(data.get("RescaleIntercept", None) or 0)


def _dtype(data: Any) -> str:
    """By the header alone, so that all files of a scanner agree."""
    slope, intercept = _rescaling(data)
    if "PixelData" not in data or not (is_whole(slope) and is_whole(intercept)):
        return "float32"
    if data.get("ModalityLUTSequence"):
        return "uint16"
    signed = data.get("PixelRepresentation") == 1
    if int(data.get("BitsAllocated", 0)) <= 8 and not signed and (slope, intercept) == (1, 0):
        return "uint8"
    return "int16" if signed or slope < 0 or intercept < 0 else "uint16"


def _pixels(data: Any, dtype: str, count: tuple[int, int]) -> Array:
    """[frames, h, w, samples]."""
    from pydicom.pixels import apply_modality_lut

    stored = _decoded(data).reshape(count[0], data.Rows, data.Columns, count[1])
    if data.PhotometricInterpretation == "MONOCHROME1":
        stored = _inverted(data, stored)
    if data.get("ModalityLUTSequence"):
        return fitting(apply_modality_lut(stored, data), dtype)
    slope, intercept = _rescaling(data)
    if (slope, intercept) == (1, 0) and stored.dtype == dtype:
        return stored
    if dtype == "float32":
        return (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    return fitting(stored.astype(np.int64) * int(slope) + int(intercept), dtype)


def _decoded(data: Any) -> Array:
    try:
        return np.asarray(data.pixel_array)
    except MemoryError:
        raise
    except Exception as error:
        from pydicom.pixels import get_decoder

        syntax = data.file_meta.get("TransferSyntaxUID")
        name = getattr(syntax, "name", "")
        wanted = next((package for word, package in DECODERS.items() if name.startswith(word)), "")
        if wanted and not get_decoder(syntax).is_available:
            raise ValueError(f"DICOM of {name}, which no installed package reads; pip install {wanted}") from error
        raise


def _inverted(data: Any, stored: Array) -> Array:
    """White is the lowest value of the range that the header names: turned, so that white is high."""
    if stored.dtype.kind == "f":
        return -stored
    bits = int(data.BitsStored)
    total = -1 if data.get("PixelRepresentation") == 1 else 2**bits - 1  # the range's lowest and highest value
    return (total - stored.astype(np.int64)).astype(stored.dtype)
