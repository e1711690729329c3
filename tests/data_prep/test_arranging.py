"""Photographs or arrays: what flags and a look at the files decide, and what contradicts itself."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import images
from data_prep.arranging import Looked, arrange, keeps_values
from data_prep.sources import open_source
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.rasters.containers import Kind
from fasthpm.errors import UserError
from fasthpm.files import read_json
from tests.helpers.data_fixtures import image_folder, picture, prepare
from tests.helpers.odd_files import png
from tests.helpers.rasters import dicom, save_dicom, stored_arrays

ONE = ("--num_workers", "1")


def kinds(*found: tuple[str, int, bool]) -> list[Looked]:
    return [Looked(str(k), Kind(*kind)) for k, kind in enumerate(found)]


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ([("uint8", 3, True)], False),
        ([("uint16", 1, False)], True),
        ([("uint16", 1, False), ("uint8", 3, True)], False),
        ([("uint16", 4, False), ("uint16", 5, False)], True),
        ([("uint16", 4, False), ("float32", 4, False)], True),
        ([("uint16", 1, False), ("float32", 2, False)], False),
        ([("uint8", 4, False)], True),
        ([], False),
    ],
)
def test_values_are_kept_of_files_that_are_alike(found: list, kept: bool) -> None:
    assert keeps_values("auto", kinds(*found)) is kept
    assert keeps_values("keep", kinds(*found))
    assert not keeps_values("8bit", kinds(*found))


def sixteen(folder: Path, count: int = 2) -> Path:
    folder.mkdir()
    for k in range(count):
        values = np.linspace(k, 60000, 40 * 48).reshape(40, 48).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{k}.png")
    return folder


def test_sixteen_bits_are_kept_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(sixteen(tmp_path / "in"), tmp_path / "a.beton", *ONE)
    assert (
        "values are kept: 1 channel of uint16, raw; --values 8bit makes photographs of them" in capsys.readouterr().out
    )
    assert stored_arrays(out)["0.png"].max() == 60000
    eight = prepare(tmp_path / "in", tmp_path / "b.beton", *ONE, "--values", "8bit")
    assert "dtype" not in open_beton(eight).sidecar
    windowed = prepare(
        tmp_path / "in", tmp_path / "c.beton", *ONE, "--values", "8bit", "--window", "0", "600", "--grey"
    )
    assert read_json(windowed.with_suffix(".json"))["mean"][0] > 0.98


def test_eight_bit_files_of_other_kinds_become_photographs(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    grey = np.asarray(picture(0, grey=True))
    save_dicom(tmp_path / "in" / "a.dcm", dicom(grey))
    np.save(tmp_path / "in" / "b.npy", np.asarray(picture(1)))
    picture(2).save(tmp_path / "in" / "c.png")
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *ONE)
    assert (open_beton(out).info.num_samples, open_beton(out).info.channels) == (3, 3)


def test_transparency_is_a_choice(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clear = np.zeros((20, 20, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "in" / "a.png")
    means = {
        ground: read_json(
            prepare(tmp_path / "in", tmp_path / f"{ground}.beton", *ONE, "--alpha", ground).with_suffix(".json")
        )
        for ground in ("white", "black", "keep")
    }
    assert (means["white"]["mean"][0], means["black"]["mean"][0], means["keep"]["channels"]) == (1, 0, 4)
    assert np.array_equal(stored_arrays(tmp_path / "keep.beton")["a.png"], clear)


def test_opacity_of_sixteen_bits_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).integers(0, 65536, (20, 20, 4)).astype(np.uint16)
    (tmp_path / "in" / "a.png").write_bytes(png(values))
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *ONE, "--alpha", "keep")
    assert np.array_equal(stored_arrays(out)["a.png"], values)
    white = stored_arrays(prepare(tmp_path / "in", tmp_path / "b.beton", *ONE))["a.png"]
    assert white.shape == (20, 20, 3)


def test_open_questions_are_asked_at_once(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    save_dicom(tmp_path / "in" / "a.dcm", dicom(np.zeros((3, 8, 8), np.uint16)))
    with pytest.raises(UserError, match=r"a.dcm: 3 pages or slices in one file: --pages channels, samples or first"):
        prepare(tmp_path / "in", tmp_path / "a.beton", *ONE)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "in" / "a.tif")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(UserError, match=r"tifffile.*pip install 'fasthpm\[tiff\]'"):
        prepare(tmp_path / "in", tmp_path / "a.beton", *ONE)
    assert not (tmp_path / "a.beton").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--log",), "--log is for values that are kept"),
        (("--window", "0", "1"), "--window is for values that are kept"),
        (("--write_mode", "lz4"), "lz4 is for values that are kept"),
        (("--stride", "8"), "give --tile PIXELS"),
        (("--tile", "-8"), "--tile -8 is negative"),
        (("--tile", "8", "--min_content", "2"), "expected 0 to 1"),
        (("--values", "8bit", "--alpha", "keep"), "--alpha keep keeps values"),
    ],
)
def test_flags_that_photographs_have_not(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    folder = image_folder(tmp_path / "in", 2)
    with pytest.raises(UserError, match=message):
        prepare(folder, tmp_path / "a.beton", *ONE, *flags)
    assert not (tmp_path / "a.beton").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--grey",), "--grey is for photographs"),
        (("--jpeg_quality", "80"), "--jpeg_quality is for photographs"),
        (("--write_mode", "jpg"), "values are kept raw or lz4"),
        (("--bands", "2"), r"--bands 2: no band '2'; expected 1 to 1"),
        (("--nodata", "x"), "--nodata x is no number"),
        (("--nodata", "-1"), "--nodata -1 is no value of uint16"),
    ],
)
def test_flags_that_arrays_have_not(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(sixteen(tmp_path / "in", 1), tmp_path / "a.beton", *ONE, *flags)


def test_few_files_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path / "in", 9)
    monkeypatch.setattr("data_prep.arranging.LOOKED_AT", 4)
    seen = []
    monkeypatch.setattr(
        "data_prep.arranging.kind_of", lambda blob, reading: seen.append(blob) or Kind("uint8", 3, True)
    )
    prepare(tmp_path / "in", tmp_path / "a.beton", *ONE)
    assert [Path(blob.path).stem for blob in seen] == ["000", "004", "001", "007"]  # sorted by class


def test_zarr_folders_are_samples_of_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in them is no sample of its own, and tells an unchanged set from a changed one."""
    zarr = pytest.importorskip("zarr")
    values = [np.full((8, 9, 3), 700 + k, np.uint16) for k in range(3)]
    stores = [tmp_path / "files" / name / f"{k}.zarr" for k, name in enumerate(("ant", "bee", "ant"))]
    for store, pixels in zip(stores, values, strict=True):
        zarr.save_array(str(store), pixels)
    words = (tmp_path / "files", tmp_path / "set.beton", "--values", "keep")
    prepare(*words)
    found = stored_arrays(tmp_path / "set.beton")
    assert sorted(found) == ["ant/0.zarr", "ant/2.zarr", "bee/1.zarr"]
    np.testing.assert_array_equal(found["bee/1.zarr"], values[1])
    assert read_json(tmp_path / "set.json")["classes"] == ["ant", "bee"]
    prepare(*words)  # it is there already
    zarr.open(str(stores[0]), mode="r+")[0, 0, 0] = 1
    with pytest.raises(UserError, match="changed"):
        prepare(*words)


# ------------------------------------------------------------------------------------------------------- idle flags
READ_BY = {  # what a flag of reading has an effect on
    ("--axes", "YX"): {"npy", "npz"},
    ("--key", "arr_0"): {"npz"},
    ("--level", "1"): {"tif"},
}


def files_of(folder: Path, kind: str) -> Path:
    """Three files of a kind, of 16 bits but for JPEG."""
    folder.mkdir(exist_ok=True)
    values = np.arange(40 * 48, dtype=np.uint16).reshape(40, 48)
    for k in range(3):
        path = folder / f"{k}.{kind}"
        if kind in ("npy", "npz"):
            (np.save if kind == "npy" else np.savez)(path, values)
        else:
            Image.fromarray(values if kind in ("png", "tif") else (values % 256).astype(np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "npy", "npz"])
@pytest.mark.parametrize("flag", READ_BY)
def test_flags_of_reading_are_refused_where_no_file_can_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: tuple[str, str], kind: str
) -> None:
    """Every flag with every kind of file; among others, one file that can is enough."""
    args = images.build_parser().parse_args(["in", "a.beton", *flag])
    monkeypatch.setattr("data_prep.arranging.look", lambda *_: (_ for _ in ()).throw(LookupError("looked at")))
    for name in ("in", "mixed"):
        files_of(tmp_path / name, kind)
    for number in range(100):
        picture(number).save(tmp_path / "mixed" / f"a{number}.jpg")
    for source in (tmp_path / "in", tmp_path / "mixed"):
        expected = LookupError if kind in READ_BY[flag] else UserError
        with pytest.raises(expected, match=f"looked at|{flag[0]} has no effect here: it is for"):
            arrange(open_source(str(source)), args)


def test_flags_of_reading_are_refused_for_photographs_that_are_read_as_they_are(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="--level has no effect here: these photographs are read as they are"):
        prepare(tmp_path / "a.tif", tmp_path / "a.beton", *ONE, "--level", "1")
    np.savez(tmp_path / "b.npz", images=np.ones((3, 20, 24), np.uint16))
    with pytest.raises(UserError, match=r"--key has no effect here: b\.npz::images names the array"):
        prepare(Path(f"{tmp_path / 'b.npz'}::images"), tmp_path / "b.beton", *ONE, "--key", "images")


@pytest.mark.parametrize("kind", ["folder", "list", "folders", "file", "tar"])
def test_a_label_column_is_refused_where_there_are_none(tmp_path: Path, kind: str) -> None:
    """All sources but parquet files and a file of arrays."""
    folder = image_folder(tmp_path / "in", 2)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in folder.rglob("*.png")))
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        packed.add(next(folder.rglob("*.png")), "0.png")
    sources = {"folder": folder, "list": tmp_path / "list.txt", "file": next(folder.rglob("*.png"))}
    source = str({**sources, "tar": tmp_path / "a.tar"}.get(kind, f"{folder}/*/"))
    with pytest.raises(UserError, match="--label_column has no effect here"):
        images.main([source, str(tmp_path / "a.beton"), *ONE, "--label_column", "label"])


def test_labels_beside_an_array_of_photographs_are_taken(tmp_path: Path) -> None:
    """As of values that are kept."""
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 9, 11, 3), np.uint8), labels=np.array([0, 1, 1, -1]))
    out = prepare(Path(f"{tmp_path / 'b.npz'}::images"), tmp_path / "b.beton", *ONE, "--label_column", "labels")
    assert "dtype" not in open_beton(out).sidecar
    assert read_json(tmp_path / "b.json")["counts"] == [1, 2]
