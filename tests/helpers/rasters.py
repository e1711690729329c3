"""Small pictures that are not 8-bit RGB: satellite tiles, slides, X-rays. Seeded; in class folders, in their formats.

In each family the two classes differ in what every crop shows, so that a short training can tell them apart.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sets import members, read_csv
from fasthpm.data.ffcv.beton import files_path, open_beton
from fasthpm.data.ffcv.codec import decompress

CLASSES = ("ant", "bee")
NODATA = 0  # of satellite tiles
FAINT = 40  # steps of 16 bits between the two classes of X-rays: less than one of 8 bits, which is 257


def waves(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """Smooth fields in 0..1: float64 [height, width, count]."""
    y, x = np.mgrid[:height, :width] / 24
    a, b, c = rng.uniform(-2, 2, (3, count))
    return 0.5 + 0.5 * np.sin(x[..., None] * a + y[..., None] * b + c)


def satellite_tile(seed: int, label: int, *, size: int = 48, bands: int = 12) -> np.ndarray:
    """uint16 [size, size, bands] of reflectances 200..4200; every third one has a corner of `NODATA`."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0.2, 1, bands) if label == 0 else np.linspace(1, 0.2, bands)
    values = 200 + 4000 * slope * waves(rng, size, size, bands) + rng.uniform(0, 50, (size, size, bands))
    tile = np.rint(values).clip(1, 65535).astype(np.uint16)
    if seed % 3 == 0:
        y, x = np.mgrid[:size, :size]
        tile[x + y < size // 2] = NODATA
    return tile


def satellite(folder: Path, count: int = 12, *, size: int = 48, bands: int = 12, **options: Any) -> Path:
    """`count` tiles as TIFF files in class folders; `options`: of tifffile's `imwrite`, e.g. `byteorder=">"`."""
    import tifffile

    for index in range(count):
        label = index % 2
        path = folder / CLASSES[label] / f"tile_{index:03d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile = satellite_tile(index, label, size=size, bands=bands)
        given = {"photometric": "minisblack", "planarconfig": "contig", "metadata": None} | options
        planar = given["planarconfig"] == "separate"
        tifffile.imwrite(path, np.ascontiguousarray(tile.transpose(2, 0, 1)) if planar else tile, **given)
    return folder


def slide_pixels(seed: int, label: int, *, size: int = 256, stains: int = 5) -> np.ndarray:
    """uint16 [stains, size, size]: round cells on a background of 100, the right fifth of it empty."""
    rng = np.random.default_rng(1000 + seed)
    y, x = np.mgrid[:size, :size]
    pixels = np.full((stains, size, size), 100.0)
    for _ in range(size * size // 400):
        cy, cx = rng.uniform(0, size), rng.uniform(0, 0.75 * size)
        near = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (18 if label == 0 else 50))
        pixels += near * rng.uniform(2000, 9000, (stains, 1, 1))
    pixels[:, :, : 4 * size // 5] += rng.uniform(0, 60, (stains, size, 4 * size // 5))
    return np.rint(pixels).clip(0, 65535).astype(np.uint16)


def slides(folder: Path, count: int = 2, *, size: int = 256, stains: int = 5, tile: int = 64) -> Path:
    """`count` slides as tiled OME-TIFF files in class folders, a stain a page."""
    import tifffile

    for index in range(count):
        path = folder / CLASSES[index % 2] / f"slide_{index:02d}.ome.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = slide_pixels(index, index % 2, size=size, stains=stains)
        named = {"axes": "CYX", "Channel": {"Name": [f"stain{k}" for k in range(stains)]}}
        tifffile.imwrite(
            path, pixels, tile=(tile, tile), photometric="minisblack", metadata=named, compression="zlib", ome=True
        )
    return folder


def xray_pixels(seed: int, label: int, *, size: int = 64) -> np.ndarray:
    """uint16 [size, size] in 0..65535 whose classes differ by `FAINT` steps in stripes, on fields that are alike."""
    rng = np.random.default_rng(2000 + seed)
    stripes = (np.arange(size) // 4 % 2)[:, None] if label == 0 else (np.arange(size) // 4 % 2)[None]
    values = 257.0 * np.rint(30 + 4 * waves(rng, 1, 1, 1)[..., 0]) + FAINT * stripes
    return np.rint(values + np.zeros((size, size))).astype(np.uint16)


def dicom(pixels: np.ndarray, **elements: Any) -> Any:
    """`pixels` (integers of 8 or 16 bits, [h, w], or [frames, h, w]) as a pydicom data set, uncompressed.

    `elements`: more of them, by keyword, or others: `RescaleSlope=2`, `PhotometricInterpretation="MONOCHROME1"`.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"  # digital X-ray
    meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = "1.2.826.0.1.3680043.8.498.2"
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID, data.Modality = "Secret^Person", "SECRET-ID", "DX"
    data.Rows, data.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    bits = 8 * pixels.itemsize
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def save_dicom(path: Path, data: Any) -> Path:
    """Write a data set as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def xrays(folder: Path, count: int = 12, *, size: int = 64) -> Path:
    """`count` X-rays as DICOM files of 16 bits in class folders; every second of a class is MONOCHROME1."""
    for index in range(count):
        pixels, inverted = xray_pixels(index, index % 2, size=size), index % 4 >= 2
        kind = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
        data = dicom(65535 - pixels if inverted else pixels, **kind)
        save_dicom(folder / CLASSES[index % 2] / f"scan_{index:03d}.dcm", data)
    return folder


def stored_arrays(path: Path) -> dict[str, np.ndarray]:
    """What an arrays set holds, [h, w, C] by the rows of its files.csv, joined by commas."""
    found = {}
    for member in members(path):
        beton, data = open_beton(member), member.read_bytes()
        names = [",".join(row) for row in list(read_csv(files_path(member)))[1:]]
        for k, name in enumerate(names):
            start, shape = int(beton.positions[k]), (int(beton.heights[k]), int(beton.widths[k]), beton.info.channels)
            blob = data[start : start + int(beton.lengths[k])]
            found[name] = decompress(blob, beton.sidecar["codec"], shape, beton.info.values.dtype)
    return found
