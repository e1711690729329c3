"""Which reader opens a file, and what its pixels are, by names, first bytes and headers."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from fasthpm.data import png
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters import dicoms, pictures, stores, tiffs
from fasthpm.data.rasters.raster import AmbiguousPages, Blob, Raster, Reading
from fasthpm.data.values import are_photographs

KEY = "::"


@dataclass(frozen=True)
class Container:
    """A family of files."""

    name: str
    accepts: Callable[[str, bytes], bool]  # by name and first bytes
    open: Callable[[Blob, Reading], Raster]


ARRAYS = (
    Container("npy", stores.is_npy, stores.open_npy),
    Container("npz", stores.is_npz, stores.open_npz),
    Container("HDF5", stores.is_hdf5, stores.open_hdf5),
    Container("zarr", stores.is_zarr, stores.open_zarr),
    Container("NIfTI", stores.is_nifti, stores.open_nifti),
    Container("DICOM", dicoms.is_dicom, dicoms.open_dicom),
)
TIFF = Container("TIFF", tiffs.is_tiff, tiffs.open_tiff)
PICTURE = Container("picture", lambda name, start: True, pictures.open_wide)  # whatever Pillow opens
CONTAINERS = (*ARRAYS, TIFF, PICTURE)  # the first that accepts a file opens it


@dataclass(frozen=True)
class Kind:
    """What a file's pixels are, by its header."""

    dtype: str
    channels: int
    photograph: bool  # 8 bits, grey or colour, opacity aside: what is stored as FFCV's images
    nodata: float | None = None
    bands: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    alpha: bool = False  # whether one of the channels is opacity


def blob_of(path: str, data: bytes | None = None) -> Blob:
    """The file at `path`, which may end in `::key`."""
    if data is None and KEY in path and not os.path.exists(path):
        head, _, key = path.rpartition(KEY)
        return Blob(head, key=key)
    return Blob(path, data)


def container_of(blob: Blob) -> Container:
    """Its family."""
    name, start = blob.path.lower(), blob.start()
    return next(container for container in CONTAINERS if container.accepts(name, start))


@quietly()
def open_raster(blob: Blob, reading: Reading) -> Raster:
    """A file with its own numbers.

    **Raises:** `ValueError`, or whatever its library raises, for one that is damaged, unknown or has no values;
    `UserError` if the library is not installed.
    """
    return container_of(blob).open(blob, reading)


@quietly()
def kind_of(blob: Blob, reading: Reading) -> Kind:
    """What a file's pixels are. **Raises:** as `open_raster`."""
    container = container_of(blob)
    if container is PICTURE and not _is_wide(blob):
        return Kind("uint8", 3, True)
    simple = container is TIFF and tiffs.is_photograph(blob)
    try:
        raster = container.open(blob, reading)
    except AmbiguousPages:
        if simple:  # several 8-bit pictures: one of them is taken, as ever
            return Kind("uint8", 3, True)
        raise
    except Exception:
        if simple:  # Pillow's matter
            return Kind("uint8", 3, True)
        raise
    raster.close()
    channels = raster.channels - (raster.alpha is not None)
    plain = are_photographs(raster.dtype, channels) or (simple and reading.pages != "channels" and channels == 4)
    own = (raster.height, raster.width)
    return Kind(raster.dtype, raster.channels, plain, raster.nodata, raster.bands, own, raster.alpha is not None)


def _is_wide(blob: Blob) -> bool:
    """Whether a picture of Pillow's may have more than 8 bits, by its header."""
    start = blob.start()
    if start.startswith(png.SIGNATURE):
        return start[pictures.PNG_DEPTH] > 8
    if start[:2] == b"\xff\xd8":
        return False
    return pictures.mode_of(blob) in pictures.WIDE
