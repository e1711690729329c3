"""What libraries remark on readable files changes nothing, also where warnings are errors, as they are in tests."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep import images, photographs, things
from data_prep.writer import read_json
from fasthpm.data import decoding, plain
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters import containers, pictures, stores, tiffs
from fasthpm.data.rasters.files import FileReader
from fasthpm.data.rasters.raster import Reading
from fasthpm.data.values import Values
from fasthpm.dense import pairs


def remarking(function: Any) -> Any:
    def with_remark(*arguments: Any, **options: Any) -> Any:
        warnings.warn("an odd file", UserWarning, stacklevel=2)
        return function(*arguments, **options)

    return with_remark


@pytest.fixture
def remarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that have something to say of every file."""
    monkeypatch.setattr(Image, "open", remarking(Image.open))
    monkeypatch.setattr(Image.Image, "getexif", remarking(Image.Image.getexif))
    monkeypatch.setattr(tifffile, "TiffFile", remarking(tifffile.TiffFile))
    monkeypatch.setattr(np, "load", remarking(np.load))
    table = tiffs.TiffImagePlugin.ImageFileDirectory_v2
    monkeypatch.setattr(table, "load", remarking(table.load))


def raster(path: str) -> Any:
    found = containers.open_raster(containers.blob_of(path), Reading())
    try:
        with quietly():  # as workers and `FileReader` read it
            return found.read(0, found.whole()).tolist()
    finally:
        found.close()


READERS: dict[str, Callable[[str], Any]] = {
    "read": lambda path: decoding.read(Path(path).read_bytes()).pixels.tolist(),
    "open_picture": lambda path: decoding.open_picture(Path(path).read_bytes()).image.size,
    "size_of": decoding.size_of,
    "orientation_of": lambda path: decoding.orientation_of(decoding.open_picture(Path(path).read_bytes()).image),
    "read_pixels": lambda path: plain.read_pixels(path).tolist(),
    "kind_of": lambda path: containers.kind_of(containers.blob_of(path), Reading()),
    "open_raster": raster,
    "is_photograph": lambda path: tiffs.is_photograph(containers.blob_of(path)),
    "is_transparent": lambda path: pictures.is_transparent(Path(path).read_bytes()),
    "mode_of": lambda path: containers.kind_of(containers.blob_of(path), Reading()).photograph,
    "mask": lambda path: pairs._reading(Path(path), lambda path: pairs.read_mask(path.read_bytes())).tolist(),
    "headers": lambda path: pairs._problem(pairs.Pair(Path(path), Path(path))),
    "useful": lambda path: things.useful(Path(path), 64),
    "photograph": lambda path: photographs._size(Path(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_remarks_change_nothing(tmp_path: Path, request: pytest.FixtureRequest, reader: str, kind: str) -> None:
    path = str(tmp_path / f"a.{kind}")
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    expected = READERS[reader](path)
    request.getfixturevalue("remarks")
    assert READERS[reader](path) == expected


@pytest.mark.usefixtures("remarks")
def test_values_of_files_are_read(tmp_path: Path) -> None:
    values = np.arange(48, dtype=np.uint16).reshape(4, 4, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", metadata=None)
    np.savez(tmp_path / "a.npz", one=values)
    reader = FileReader(Values("uint16"), 3)
    for name in ("a.tif", "a.npz"):
        np.testing.assert_array_equal(reader(tmp_path / name), values)
        assert reader.look(tmp_path / name) == ((4, 4), "")
    np.testing.assert_array_equal(stores.read_array(containers.blob_of(str(tmp_path / "a.npz")), "one"), values)


@pytest.mark.usefixtures("remarks")
@pytest.mark.parametrize("deep", [False, True])
def test_preparation_rejects_nothing(tmp_path: Path, deep: bool) -> None:
    """In its workers, of photographs and of values that are kept."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        pixels = np.full((8, 8, 3), 9 + number, np.uint16 if deep else np.uint8)
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="rgb", metadata=None)
    images.main([str(folder), str(tmp_path / "set.beton"), "--num_workers", "1"])
    sidecar = read_json(tmp_path / "set.json")
    assert (sidecar["num_samples"], sidecar["num_rejected"]) == (3, 0)
    assert sidecar.get("dtype", "uint8") == ("uint16" if deep else "uint8")


def test_threads_that_overlap_leave_the_filters_as_they_were() -> None:
    before, inside, leave = list(warnings.filters), threading.Barrier(2), threading.Event()

    def first() -> None:
        with quietly():
            inside.wait(30)
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    with quietly():
        inside.wait(30)
        leave.set()
        thread.join(30)
        warnings.warn("not heard", UserWarning, stacklevel=1)
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)
