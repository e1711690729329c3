"""Arrays in files: .npy and .npz, HDF5 and zarr, and NIfTI volumes. Only what is cut is read, where the format can."""

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from fasthpm.data.listing import STORE
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters.raster import (
    MAX_BYTES,
    Blob,
    Raster,
    Reading,
    fitting,
    guess_axes,
    is_whole,
    library,
    raster_of,
)
from fasthpm.data.sampling import Array

NPY, ZIP, HDF5 = b"\x93NUMPY", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
GZIP = b"\x1f\x8b"
NIFTI_MAGIC, NIFTI_MAGICS = 344, (b"n+1\0", b"n+2\0")
NIFTI_AXES = "XYZT"


class Lazy:
    """What is cut like an array, read whole when it is cut first."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, load: Callable[[], Any]) -> None:
        self.shape, self.dtype, self._load = shape, np.dtype(dtype), load
        self._held: Any = None
        size = int(np.prod(shape, dtype=np.float64)) * self.dtype.itemsize
        if size > MAX_BYTES:
            raise ValueError(f"an array of {size} bytes, more than {MAX_BYTES}, that can only be read as a whole")

    def __getitem__(self, index: Any) -> Any:
        if self._held is None:
            self._held = self._load()
        return self._held[index]


# ------------------------------------------------------------------------------------------------------- numpy
def is_npy(name: str, start: bytes) -> bool:
    """By its first bytes."""
    return start.startswith(NPY)


def open_npy(blob: Blob, reading: Reading) -> Raster:
    """A file of one array; pickled objects in it are not loaded."""
    if blob.data is None:
        values = np.load(blob.path, mmap_mode="r", allow_pickle=False)
    else:
        values = np.load(io.BytesIO(blob.data), allow_pickle=False)
    return _plain(values, reading, windowed=blob.data is None)


def is_npz(name: str, start: bytes) -> bool:
    """By name and first bytes: other formats are zip files too."""
    return name.endswith(".npz") and start.startswith(ZIP)


def open_npz(blob: Blob, reading: Reading) -> Raster:
    """One array of several, which `key` names."""
    with zipfile.ZipFile(blob.path if blob.data is None else io.BytesIO(blob.data)) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        key = _chosen(blob.key or reading.key, names)
        with archive.open(f"{key}.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(member)

    def load() -> Any:
        with np.load(blob.path if blob.data is None else io.BytesIO(blob.data), allow_pickle=False) as archive:
            return archive[key]

    return _plain(Lazy(shape, dtype, load), reading)


def _chosen(key: str, names: list[str]) -> str:
    if not key and len(names) == 1:
        return names[0]
    if key not in names:
        asked = f"no array {key!r}" if key else "several arrays, and none is named"
        raise ValueError(f"{asked}; it holds {', '.join(names[:8]) or 'none'}: say --key NAME")
    return key


def _plain(values: Any, reading: Reading, **facts: Any) -> Raster:
    if not 2 <= len(values.shape) <= 6:
        raise ValueError(f"an array of shape {tuple(values.shape)}; expected height and width, and perhaps channels")
    return raster_of(values, reading.axes or guess_axes(values.shape, samples=reading.numbered), reading, **facts)


@quietly()
def read_array(blob: Blob, key: str) -> Array:
    """A whole array, of labels for instance, out of a file of several."""
    name, start = blob.path.lower(), blob.start()
    if is_npz(name, start):
        with np.load(blob.path, allow_pickle=False) as archive:
            return np.asarray(archive[key])
    if is_hdf5(name, start):
        with library("h5py", "hdf5", "HDF5 files").File(blob.path, "r") as file:
            return np.asarray(file[key])
    return np.asarray(library("zarr", "zarr", "zarr folders").open(blob.path, mode="r")[key])


# ------------------------------------------------------------------------------------------------------- HDF5, zarr
def is_hdf5(name: str, start: bytes) -> bool:
    """By its first bytes."""
    return start.startswith(HDF5)


def open_hdf5(blob: Blob, reading: Reading) -> Raster:
    """An array of an HDF5 file, by its path in it."""
    h5py = library("h5py", "hdf5", "HDF5 files")
    file = h5py.File(blob.path if blob.data is None else io.BytesIO(blob.data), "r")
    try:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        values = file[_chosen((blob.key or reading.key).strip("/"), found)]
        return _plain(values, reading, windowed=True, close=file.close)
    except BaseException:
        file.close()
        raise


def is_zarr(name: str, start: bytes) -> bool:
    """By its name: it is a folder."""
    return name.rstrip("/").endswith(STORE)


def open_zarr(blob: Blob, reading: Reading) -> Raster:
    """An array of a zarr folder, by its path in it, or the folder itself if it is one."""
    zarr = library("zarr", "zarr", "zarr folders")
    if not os.path.isdir(blob.path):
        raise ValueError("no zarr folder")
    opened = zarr.open(blob.path, mode="r")
    if isinstance(opened, zarr.Group):
        names = [name for name, item in opened.members(max_depth=None) if isinstance(item, zarr.Array)]
        opened = opened[_chosen((blob.key or reading.key).strip("/"), names)]
    return _plain(opened, reading, windowed=True)


# ------------------------------------------------------------------------------------------------------- NIfTI
def is_nifti(name: str, start: bytes) -> bool:
    """By its first bytes or, packed, by its name."""
    return start[NIFTI_MAGIC : NIFTI_MAGIC + 4] in NIFTI_MAGICS or (name.endswith(".nii.gz") and start.startswith(GZIP))


def open_nifti(blob: Blob, reading: Reading) -> Raster:
    """A volume as stored, not turned: a slice is at one Z, its rows run along Y. Rescaled as the header says."""
    nibabel = library("nibabel", "nifti", "NIfTI files")
    with blob.open() as raw, gzip.open(raw) if blob.start(2) == GZIP else raw as file:
        header = file.read(544)
    kind = nibabel.Nifti2Image if header[4:8] == b"n+2\0" else nibabel.Nifti1Image
    made = kind.header_class.from_fileobj(io.BytesIO(header), check=False)
    shape, dtype = tuple(made.get_data_shape()), made.get_data_dtype()
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"a NIfTI volume of shape {shape}; expected X, Y, and perhaps Z and T")
    slope, intercept = made.get_slope_inter()
    scale = (1.0 if slope is None else float(slope), float(intercept or 0))
    target = _rescaled_dtype(dtype, scale)

    def load() -> Any:
        whole = kind.from_bytes(_unpacked(blob, shape, dtype))
        raw = np.asanyarray(whole.dataobj.get_unscaled())
        return _rescaled(raw, scale, target)

    return raster_of(Lazy(shape, target, load), NIFTI_AXES[: len(shape)], reading)


def _unpacked(blob: Blob, shape: tuple[int, ...], dtype: Any) -> bytes:
    """All bytes of a volume; of a packed one no more than its header declares."""
    if blob.start(2) != GZIP:
        return blob.all()
    most = int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize + (1 << 20)
    with blob.open() as raw, gzip.open(raw) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError("a NIfTI file that unpacks to more than its header declares")
    return data


def _rescaled_dtype(dtype: Any, scale: tuple[float, float]) -> Any:
    if scale == (1, 0):
        return np.dtype(dtype).newbyteorder("=")
    whole = np.dtype(dtype).kind in "iu" and all(map(is_whole, scale))
    return np.dtype(np.int16 if whole and np.dtype(dtype).itemsize <= 2 else np.float32)


def _rescaled(raw: Any, scale: tuple[float, float], target: Any) -> Any:
    if scale == (1, 0):
        return raw
    values = raw.astype(np.float64) * scale[0] + scale[1]
    if target == np.int16:
        return fitting(values, "int16")
    return values.astype(np.float32)
