"""Arrays in .npy, .npz, HDF5, zarr and NIfTI: axes, keys, rescaling, limits."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fasthpm.data.rasters import stores
from fasthpm.data.rasters.raster import Blob, Raster, Reading

VALUES = np.random.default_rng(0).integers(0, 60000, (20, 30, 5)).astype(np.uint16)


def whole(raster: Raster, number: int = 0) -> np.ndarray:
    return raster.read(number, raster.whole())


def test_npy_with_channels_first_or_last(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    np.save(tmp_path / "b.npy", VALUES.transpose(2, 0, 1).astype(">u2"))
    for name in "ab":
        raster = stores.open_npy(Blob(str(tmp_path / f"{name}.npy")), Reading())
        assert np.array_equal(whole(raster), VALUES)
        assert np.array_equal(raster.read(0, (2, 3, 4, 5)), VALUES[2:6, 3:8])
    asked = stores.open_npy(Blob(str(tmp_path / "a.npy")), Reading("samples", axes="ZYX"))
    assert (asked.slices, asked.height, asked.width) == (20, 30, 5)
    inside = stores.open_npy(Blob("a.npy", (tmp_path / "a.npy").read_bytes()), Reading())
    assert np.array_equal(whole(inside), VALUES)


def test_objects_in_npy_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickle|object"):
        stores.open_npy(Blob(str(tmp_path / "a.npy")), Reading())


def test_npz_by_key(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=VALUES, other=VALUES[..., 0])
    blob = Blob(str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match=r"several arrays.*images, other: say --key"):
        stores.open_npz(blob, Reading())
    assert np.array_equal(whole(stores.open_npz(blob, Reading(key="images"))), VALUES)
    assert np.array_equal(stores.read_array(blob, "other"), VALUES[..., 0])


def test_arrays_that_declare_too_much_are_refused() -> None:
    with pytest.raises(ValueError, match="can only be read as a whole"):
        stores.Lazy((100_000, 100_000), np.uint16, list)


def test_hdf5_by_path_cut_by_cut(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("set/images", data=np.stack([VALUES, VALUES + 1]), chunks=(1, 8, 8, 5))
        file["set/labels"] = np.arange(2)
    blob = Blob(str(tmp_path / "a.h5"), key="set/images")
    raster = stores.open_hdf5(blob, Reading("samples", numbered=True))
    assert (raster.slices, raster.windowed) == (2, True)
    assert np.array_equal(raster.read(1, (2, 3, 4, 5)), VALUES[2:6, 3:8] + 1)
    raster.close()
    assert stores.read_array(blob, "set/labels").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"no array 'nothing'.*set/images"):
        stores.open_hdf5(Blob(blob.path, key="nothing"), Reading())


def test_zarr_by_path(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("images", data=VALUES, chunks=(8, 8, 5))
    raster = stores.open_zarr(Blob(str(tmp_path / "a.zarr"), key="images"), Reading())
    assert np.array_equal(whole(raster), VALUES)
    assert np.array_equal(raster.read(0, (2, 3, 4, 5)), VALUES[2:6, 3:8])


@pytest.mark.parametrize("packed", [False, True])
def test_nifti_slices(tmp_path: Path, packed: bool) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = VALUES.astype(np.int16)  # X, Y, Z
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    assert stores.is_nifti(path.name, path.read_bytes()[:512])
    raster = stores.open_nifti(Blob(str(path)), Reading("samples"))
    assert (raster.slices, raster.height, raster.width, raster.dtype) == (5, 30, 20, "int16")
    assert np.array_equal(whole(raster, 3)[..., 0], volume[:, :, 3].T)
    image = nibabel.Nifti1Image(volume % 100, np.eye(4))
    image.header.set_slope_inter(2, -50)
    data = image.to_bytes()
    scaled = stores.open_nifti(Blob(path.name, gzip.compress(data) if packed else data), Reading("channels"))
    assert scaled.dtype == "int16"
    assert np.array_equal(whole(scaled), (volume % 100 * 2 - 50).transpose(1, 0, 2))


def test_nifti_that_unpacks_to_more_is_refused() -> None:
    nibabel = pytest.importorskip("nibabel")
    data = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes()
    bomb = Blob("a.nii.gz", gzip.compress(data + bytes(4 << 20)))
    with pytest.raises(ValueError, match="more than its header declares"):
        whole(stores.open_nifti(bomb, Reading("samples")))
