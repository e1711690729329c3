"""Which reader opens a file, and files of every family with bits flipped and ends cut off: a reason, or values."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasthpm.data.rasters.containers import Kind, blob_of, container_of, kind_of, open_raster
from fasthpm.data.rasters.raster import MAX_BYTES, AmbiguousPages, Blob, Reading, check_size
from tests.helpers.odd_files import png, saved
from tests.helpers.rasters import dicom

VALUES = np.random.default_rng(0).integers(0, 60000, (24, 20, 3)).astype(np.uint16)
CASES = 60  # mutations of each kind of file


def tiff(values: np.ndarray = VALUES, **more: Any) -> bytes:
    tifffile, buffer = pytest.importorskip("tifffile"), io.BytesIO()
    tifffile.imwrite(buffer, values, **({"photometric": "minisblack", "metadata": None} | more))
    return buffer.getvalue()


def packed(name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "npz":
        np.savez_compressed(buffer, a=VALUES)
    elif name == "npy":
        np.save(buffer, VALUES)
    elif name == "dcm":
        pytest.importorskip("pydicom")
        dicom(VALUES[..., 0]).save_as(buffer, enforce_file_format=True)
    elif name == "nii":
        return pytest.importorskip("nibabel").Nifti1Image(VALUES[..., 0].astype(np.int16), np.eye(4)).to_bytes()
    elif name == "h5":
        with pytest.importorskip("h5py").File(buffer, "w") as file:
            file.create_dataset("a", data=VALUES, chunks=(8, 8, 3), compression="gzip", fletcher32=True)
    return buffer.getvalue()


FILES = {
    "zlib.tif": lambda: tiff(compression="zlib", tile=(16, 16), planarconfig="contig"),
    "lzw.tif": lambda: tiff(compression="lzw", rowsperstrip=5, planarconfig="contig", predictor=True),
    "plain.tif": lambda: tiff(np.ascontiguousarray(VALUES.transpose(2, 0, 1)), planarconfig="separate", byteorder=">"),
    "jpeg.tif": lambda: tiff((VALUES[..., 0] >> 8).astype(np.uint8), compression="jpeg", tile=(16, 16)),
    "a.png": lambda: png(VALUES),
    **{f"a.{name}": lambda name=name: packed(name) for name in ("npy", "npz", "dcm", "nii", "h5")},
}


def read(name: str, data: bytes) -> np.ndarray:
    """What a file holds."""
    reading = Reading("channels", max_pixels=10**6)
    raster = open_raster(Blob(name, data), reading)
    try:
        check_size(raster, reading, raster.whole())
        values = raster.read(0, raster.whole())
    finally:
        raster.close()
    assert values.shape == (raster.height, raster.width, raster.channels)
    return values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_have_a_reason_or_are_read(name: str) -> None:
    whole, rng = FILES[name](), np.random.default_rng(len(name))
    expected = read(name, whole)
    same = rejected = 0
    for case in range(CASES):
        data = bytearray(whole)
        if case % 3 == 0:
            del data[int(rng.integers(0, len(data))) :]
        else:
            start = int(rng.integers(0, len(data) if case % 3 == 1 else min(600, len(data))))
            for at in range(start, min(start + int(rng.integers(1, 9)), len(data))):
                data[at] ^= int(rng.integers(1, 256))
        try:
            values = read(name, bytes(data))
        except (MemoryError, AssertionError):
            raise
        except Exception:
            rejected += 1
        else:
            same += values.shape == expected.shape
    assert rejected > CASES / 4
    assert same + rejected > CASES / 2


def test_files_are_known_by_what_they_are(tmp_path: Path) -> None:
    names = {name: container_of(Blob(name, make())).name for name, make in FILES.items()}
    assert names == {
        **dict.fromkeys(("zlib.tif", "lzw.tif", "plain.tif", "jpeg.tif"), "TIFF"),
        "a.png": "picture",
        "a.npy": "npy",
        "a.npz": "npz",
        "a.dcm": "DICOM",
        "a.nii": "NIfTI",
        "a.h5": "HDF5",
    }
    (tmp_path / "a.zarr").mkdir()
    assert container_of(Blob(str(tmp_path / "a.zarr"))).name == "zarr"
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    assert container_of(Blob("a.docx", buffer.getvalue())).name == "picture"


def test_kinds_by_headers() -> None:
    assert kind_of(Blob("a.png", png(VALUES)), Reading()) == Kind("uint16", 3, False, size=(24, 20))
    photograph = Image.fromarray(VALUES.astype(np.uint8))
    for form in ("PNG", "JPEG", "TIFF", "BMP"):
        assert kind_of(Blob("a", saved(photograph, form)), Reading()).photograph
    assert kind_of(Blob("a.tif", tiff(np.zeros((8, 9, 4), np.uint8), planarconfig="contig")), Reading()).channels == 4
    several = tiff(np.zeros((4, 8, 9), np.uint8))
    assert kind_of(Blob("a.tif", several), Reading()).photograph  # one is taken, as ever
    assert kind_of(Blob("a.tif", several), Reading("channels")) == Kind("uint8", 4, False, size=(8, 9))
    with pytest.raises(AmbiguousPages):
        kind_of(Blob("a.tif", tiff(np.zeros((4, 8, 9), np.uint16))), Reading())


def test_keys_in_paths(tmp_path: Path) -> None:
    assert blob_of("a.h5::b/c") == Blob("a.h5", key="b/c")
    (tmp_path / "a::b.png").touch()
    assert blob_of(str(tmp_path / "a::b.png")).key == ""


@pytest.mark.parametrize(
    ("shape", "limit", "message"),
    [
        ((9, 12, 1), 100, "12 x 9 pixels, more than --max_pixels 100"),
        ((8, 9, 65), 100, "65 channels, expected 1 to 64"),
    ],
)
def test_declared_sizes_are_limits(shape: tuple[int, ...], limit: int, message: str) -> None:
    reading = Reading(axes="YXC")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, np.uint8))
    raster = open_raster(Blob("a.npy", buffer.getvalue()), reading)
    with pytest.raises(ValueError, match=message):
        check_size(raster, Reading(max_pixels=limit), raster.whole())
    raster.channels, raster.height, raster.width = 4, 20_000, 20_000
    with pytest.raises(ValueError, match=f"more than {MAX_BYTES}"):
        check_size(raster, Reading(max_pixels=10**9), raster.whole())
