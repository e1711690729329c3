"""Samples cut out of files: bands put together, slices, tiles; what does not fit is rejected by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cuts import boxes_of
from data_prep.sets import read_csv, rejected_path
from fasthpm.data.ffcv.beton import JPEG, files_path, open_beton
from fasthpm.data.rasters.channels import laid_over, numbers_of
from fasthpm.data.rasters.raster import Raster
from fasthpm.errors import UserError
from fasthpm.files import read_json
from tests.helpers.data_fixtures import picture, prepare
from tests.helpers.prepared_sets import blobs
from tests.helpers.rasters import slide_pixels, slides, stored_arrays

tifffile = pytest.importorskip("tifffile")
ONE = ("--num_workers", "1")
RNG = np.random.default_rng(0)


def reasons(out: Path) -> dict[str, str]:
    return {Path(path).name: why for path, why in list(read_csv(rejected_path(out)))[1:]}


@pytest.mark.parametrize(
    ("size", "tile", "stride", "expected"),
    [
        ((8, 8), 4, 4, [0, 4]),
        ((9, 9), 4, 4, [0, 4, 5]),
        ((9, 9), 4, 5, [0, 5]),
        ((3, 3), 4, 4, [0]),
        ((8, 8), 4, 2, [0, 2, 4]),
    ],
)
def test_tiles_cover_a_picture(size: tuple[int, int], tile: int, stride: int, expected: list[int]) -> None:
    boxes = boxes_of(*size, tile, stride)
    assert boxes[:, :2].tolist() == [[top, left] for top in expected for left in expected]
    assert (boxes[:, 2:] == min(tile, size[0])).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


def test_tiles_of_a_slide_have_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = slides(tmp_path / "in", 2, size=100, stains=3, tile=16)
    out = prepare(source, tmp_path / "a.beton", *ONE, "--tile", "32", "--stride", "34", "--min_content", "0.7")
    found = stored_arrays(out)
    rows = list(read_csv(files_path(out)))
    assert rows[0] == ["path", "top", "left", "height", "width"]
    for name, values in found.items():
        path, top, left, height, width = name.split(",")
        whole = slide_pixels(int(path[-9]), int(path[-9]), size=100, stains=3).transpose(1, 2, 0)
        assert np.array_equal(values, whole[int(top) :, int(left) :][: int(height), : int(width)])
    sidecar = read_json(tmp_path / "a.json")
    assert sidecar["num_skipped"] == 18 - len(found) > 0
    assert sidecar["bands"] == ["stain0", "stain1", "stain2"]
    assert sidecar["cutting"] == {"tile": 32, "stride": 34, "min_content": 0.7}
    assert f"{sidecar['num_skipped']} tiles with less" in capsys.readouterr().out


def test_photographs_are_cut_too(tmp_path: Path) -> None:
    scene = np.asarray(picture(0, (60, 90)))
    (tmp_path / "in").mkdir()
    Image.fromarray(scene).save(tmp_path / "in" / "a.png")
    tifffile.imwrite(tmp_path / "in" / "b.tif", scene, tile=(16, 16), photometric="rgb")
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *ONE, "--tile", "30", "--write_mode", "raw")
    assert open_beton(out).info.channels == 3
    for blob, (_, top, left, *_) in zip(blobs(out), list(read_csv(files_path(out)))[1:], strict=True):
        pixels = np.frombuffer(blob, np.uint8).reshape(30, 30, 3)
        assert np.array_equal(pixels, scene[int(top) :, int(left) :][:30, :30])
    single = prepare(tmp_path / "in" / "a.png", tmp_path / "b.beton", *ONE, "--tile", "30")
    assert (open_beton(single).modes == JPEG).sum() == 6


def test_tiles_of_a_scene_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    source = slides(tmp_path / "in", 4, size=64, stains=2, tile=16)
    out = prepare(source, tmp_path / "a.beton", *ONE, "--tile", "32", "--val_count", "2")
    inside, outside = ({name.split(",")[0] for name in stored_arrays(path)} for path in (out, tmp_path / "a_val.beton"))
    assert len(inside) == len(outside) == 2
    assert not inside & outside


def test_bands_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    planes = RNG.integers(0, 9999, (3, 4, 10, 12)).astype(np.uint16)
    for k, bands in enumerate(planes):
        for band, plane in enumerate(bands):
            tifffile.imwrite(tmp_path / "in" / f"t{k}_B{band + 2:02d}.tif", plane)
    (tmp_path / "in" / "t2_B04.tif").unlink()
    (tmp_path / "in" / "t1_B02.tif").unlink()
    tifffile.imwrite(tmp_path / "in" / "t1_B02.tif", planes[1, 0, ::2])
    (tmp_path / "in" / "readme.txt").write_text("x")
    endings = ("--band_files", "_B02.tif,_B03.tif,_B04.tif,_B05.tif", "--bands", "B04,1")
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *ONE, *endings, "--max_rejected", "2")
    found = stored_arrays(out)
    assert list(found) == ["t0_B02.tif"]
    assert np.array_equal(found["t0_B02.tif"], planes[0][[2, 0]].transpose(1, 2, 0))
    assert read_json(tmp_path / "a.json")["bands"] == ["B04", "B02"]
    assert "there is no file t2_B04.tif" in reasons(out)["t2_B02.tif"]
    assert "resample them to one size" in reasons(out)["t1_B02.tif"]


def test_slices_and_numbered_arrays(tmp_path: Path) -> None:
    stack = RNG.integers(-500, 500, (5, 9, 11)).astype(np.int16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    out = prepare(tmp_path / "a.tif", tmp_path / "a.beton", *ONE, "--pages", "samples")
    found = stored_arrays(out)
    assert sorted(found) == [f"a.tif#{k}" for k in range(5)]
    assert np.array_equal(found["a.tif#3"][..., 0], stack[3])
    np.savez(tmp_path / "b.npz", images=stack, labels=np.array([0, 1, 1, 0, -1]))
    keyed = f"{tmp_path / 'b.npz'}::images"
    out = prepare(Path(keyed), tmp_path / "b.beton", *ONE, "--label_column", "labels")
    assert np.array_equal(stored_arrays(out)["b.npz::images#2"][..., 0], stack[2])
    assert read_json(tmp_path / "b.json")["counts"] == [2, 2]


def test_mixed_files_are_rejected_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for k in range(5):
        np.save(tmp_path / "in" / f"{k}.npy", np.full((6, 7, 4), k, np.uint16))
    np.save(tmp_path / "in" / "odd.npy", np.ones((6, 7, 2), np.uint16))
    tifffile.imwrite(
        tmp_path / "in" / "wide.tif", np.ones((6, 7, 65), np.uint16), planarconfig="contig", photometric="minisblack"
    )
    (tmp_path / "in" / "cut.npy").write_bytes((tmp_path / "in" / "0.npy").read_bytes()[:-8])
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *ONE, "--max_rejected", "3")
    assert "mixed: 4 channels of uint16 (5, such as 0.npy)" in capsys.readouterr().out
    assert reasons(out)["odd.npy"] == ("ValueError: 2 channels of uint16, where the set has 4 of uint16, such as 0.npy")
    assert "65 channels, expected 1 to 64" in reasons(out)["wide.tif"]
    assert "cut.npy" in reasons(out)
    for k in range(3):
        (tmp_path / "in" / f"{k}.npy").unlink()
    with pytest.raises(UserError, match="no kind is that of most: "):
        prepare(tmp_path / "in", tmp_path / "b.beton", *ONE, "--values", "keep")


def test_declared_sizes_are_limited(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "in" / f"{name}.npy", np.zeros((20, 30 + ord(name)), np.uint16))
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *ONE, "--max_pixels", "2550", "--max_rejected", "1")
    assert "more than --max_pixels 2550" in reasons(out)["b.npy"]


def test_opacity_is_laid_over_a_ground() -> None:
    values = np.array([[[1000, 0], [1000, 65535], [1000, 32768]]], np.uint16)
    raster = Raster(1, 3, 2, "uint16", lambda number, box: values, alpha=1)
    assert laid_over(values, raster, "white")[0, :, 0].tolist() == [65535, 1000, 33267]
    assert laid_over(values, raster, "black")[0, :, 0].tolist() == [0, 1000, 500]
    assert laid_over(values, raster, "keep") is values
    raster.premultiplied = True
    assert laid_over(values, raster, "black")[0, :, 0].tolist() == [1000, 1000, 1000]


def test_bands_by_number_or_name() -> None:
    assert numbers_of(["3", "nir"], 4, ["r", "g", "b", "nir"]) == [2, 3]
    assert numbers_of([], 4, []) is None
    for wrong in ("0", "5", "swir"):
        with pytest.raises(ValueError, match=f"no band '{wrong}'; expected 1 to 4, or r, g"):
            numbers_of([wrong], 4, ["r", "g"])
