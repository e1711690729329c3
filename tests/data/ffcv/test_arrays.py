"""Sets of arrays through the loader: crops of every way up, gains of channels, nodata, refusals."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.data import build_loader, read_info, sampling
from fasthpm.data.augmented import Augmentation, AugmentedLoader
from fasthpm.data.ffcv.array_kernel import HORIZONTAL, TRANSPOSED, VERTICAL
from fasthpm.data.ffcv.beton import ARRAY_ROW, open_beton
from fasthpm.data.options import LoaderOptions
from fasthpm.data.values import DTYPES
from fasthpm.errors import UserError
from tests.helpers.array_sets import array_picture, arrays_of, exact_crop, is_nodata, turned, write_arrays
from tests.helpers.loaders import break_sample, joined, overwrite

N = 12


def loader_of(path: Path | str, **options: Any) -> Any:
    channels = options.pop("channels", 0) or read_info(str(path)).channels
    return build_loader(str(path), **{"batch_size": 4, "image_size": (16, 16), "channels": channels, **options})


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_hold_what_the_crops_say_in_the_stored_type(dtype: str, tmp_path: Path) -> None:
    arrays = arrays_of(N, 5, dtype)
    path = write_arrays(tmp_path / "a.beton", arrays, codec="lz4" if dtype == "uint16" else "raw")
    loader = loader_of(path, flip_vertical=True, rotate90=True)
    assert loader.info.values.dtype == dtype
    batch = joined(list(loader))
    assert batch.images.dtype == getattr(torch, dtype)
    assert len(set(batch.crops[:, 4].tolist())) > 3
    for image, sample, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.tolist(), strict=True):
        exact, _ = exact_crop(arrays[sample], crop, (16, 16), "bicubic")
        limits = (-np.inf, np.inf) if np.dtype(dtype).kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        assert np.abs(exact.clip(*limits) - image).max() <= max(0.6, 1e-3 * np.abs(exact).max())
        assert np.array_equal(loader.stored(sample), arrays[sample])
    first = batch.ids.tolist().index(3)
    assert np.array_equal(loader.drawn(0, 3), batch.images[first].numpy())
    loader.close()


def test_turning_changes_no_box_and_the_codes_are_those_of_the_kernel(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.beton", arrays_of(N, 2))
    plain, other = (joined(list(loader_of(path, **options))) for options in ({}, {"flip_vertical": True}))
    assert torch.equal(plain.crops[:, :4], other.crops[:, :4])
    assert torch.equal(plain.crops[:, 4], other.crops[:, 4] & 1)
    assert set(other.crops[:, 4].tolist()) == {0, 1, 2, 3}
    assert (sampling.HORIZONTAL, sampling.VERTICAL, sampling.TRANSPOSED) == (HORIZONTAL, VERTICAL, TRANSPOSED)
    image = np.arange(18).reshape(3, 3, 2)
    for quarter, code in enumerate(sampling.QUARTERS.tolist()):
        assert np.array_equal(sampling.turned(image, code), np.rot90(image, quarter))
    assert all(np.array_equal(sampling.turned(image, code), turned(image, code)) for code in range(8))
    codes = sampling.turn_crops(1, 2, np.arange(400), np.zeros((400, 5), np.int64), False, True)[:, 4]
    assert np.bincount(codes, minlength=8)[sampling.QUARTERS].min() > 60


def test_photographs_are_turned_too() -> None:
    options = {"batch_size": 4, "image_size": (12, 12), "channels": 3, "flip": False}
    plain = joined(list(build_loader("synthetic:12", **options)))
    other = joined(list(build_loader("synthetic:12", **options, flip_vertical=True, rotate90=True)))
    assert len(set(other.crops[:, 4].tolist())) > 3
    for image, upright, code in zip(
        other.images.numpy(), plain.images.numpy(), other.crops[:, 4].tolist(), strict=True
    ):
        assert np.array_equal(image, turned(upright, code))


def test_channels_are_dropped_to_their_mean_and_vary_around_it_but_never_all(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.beton", arrays_of(N, 4))
    plain, dropped = (joined(list(loader_of(path, channel_dropout=share))) for share in (0.0, 0.7))
    info, count = read_info(str(path)), 0
    for one, other in zip(plain.images.numpy(), dropped.images.numpy(), strict=True):
        gone = [bool((other[..., c] == round(info.mean[c])).all()) for c in range(4)]
        count += sum(gone)
        assert not all(gone)
        assert all(gone[c] or np.array_equal(one[..., c], other[..., c]) for c in range(4))
    assert 0.4 < count / (4 * N) < 0.8
    gains = sampling.channel_gains(5, 0, np.arange(2000), 3, 0.2, 0.3)
    assert (gains == 0).mean() == pytest.approx(0.2, abs=0.02)
    kept = gains[gains != 0]
    assert (kept.min() >= 0.7) & (kept.max() <= 1.3) & (np.abs(kept.mean() - 1) < 0.01)
    assert sampling.channel_gains(5, 0, np.arange(9), 1, 0.99, 0.0).all()
    varied = joined(list(loader_of(path, channel_jitter=0.5)))
    assert not torch.equal(varied.images, plain.images)
    assert torch.equal(varied.images, joined(list(loader_of(path, channel_jitter=0.5, num_workers=2))).images)
    assert torch.equal(joined(list(loader_of(path, train=False, channel_jitter=0.5))).images,
                       joined(list(loader_of(path, train=False))).images)  # fmt: skip


def test_nodata_stays_nodata(tmp_path: Path) -> None:
    arrays = arrays_of(N, 3, "float32")
    for array in arrays:
        array[:9, :7, 1] = np.nan
    path = write_arrays(tmp_path / "a.beton", arrays, nodata=float("nan"))
    loader = loader_of(path, interpolation="area", channel_jitter=0.2)
    batch = joined(list(loader))
    assert np.isnan(loader.info.values.nodata)
    for image, sample, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.tolist(), strict=True):
        touched = exact_crop(arrays[sample], crop, (16, 16), "area", np.nan)[1]
        assert np.array_equal(is_nodata(image, np.nan), touched)


def test_what_does_not_suit_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.beton", arrays_of(N, 4))
    grey = write_arrays(tmp_path / "b.beton", arrays_of(N, 1))
    for options, message in (
        ({"channels": 3}, "a.beton has 4 channels of uint16, and the model takes 3: use --channels 4"),
        ({"color_jitter": 0.4}, "color_jitter is 0.4, and is of photographs.*use --channel_jitter"),
        ({"rotate90": True, "image_size": (16, 24)}, "expected a square with rotate90"),
        ({"channel_dropout": 1.0}, "channel_dropout is 1.0, expected"),
    ):
        with pytest.raises(UserError, match=message) as error:
            loader_of(path, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"b\.beton has 1 channel of uint16, and the model takes 3: use --channels 1"):
        loader_of(grey, channels=3)
    with pytest.raises(
        UserError, match=r"channel_jitter is 0\.1, and synthetic:9 holds photographs; use --color_jitter"
    ):
        build_loader("synthetic:9", batch_size=4, image_size=(8, 8), channels=3, channel_jitter=0.1)
    with pytest.raises(UserError, match="rotate90 is True, and is of images; leave it out with 4 frames"):
        LoaderOptions(batch_size=1, image_size=(8, 8), channels=3, num_frames=4, rotate90=True)


def test_bad_samples_are_replaced(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.beton", arrays_of(N, 3), codec="lz4")
    break_sample(path, 5)
    loader = loader_of(path, max_bad_samples=0.5)
    batch = joined(list(loader))
    assert batch.replaced.sum() == 1
    assert 5 not in batch.ids.tolist()
    assert [bad.sample for bad in loader.bad_samples()] == [5]
    assert loader.stored(5) is None


def test_sets_of_one_kind_are_used_as_one_whatever_their_codec(tmp_path: Path) -> None:
    arrays = arrays_of(N, 2)
    a = write_arrays(tmp_path / "a.beton", arrays[:6], codec="lz4", nodata=9)
    b = write_arrays(tmp_path / "b.beton", arrays[6:], nodata=9)
    info = read_info(f"{a},{b}")
    assert info.values.nodata == 9
    assert info.values.low == tuple(map(min, zip(read_info(a).values.low, read_info(b).values.low, strict=True)))
    batch = joined(list(loader_of(f"{a},{b}", train=False, whole=True, image_size=(40, 48))))
    assert np.array_equal(batch.images[8].numpy(), arrays[8])
    other = write_arrays(tmp_path / "c.beton", arrays[6:], nodata=8)
    floats = write_arrays(tmp_path / "d.beton", arrays_of(3, 2, "float32"))
    for path, message in (
        (other, "a.beton has nodata 9, .*c.beton has 8"),
        (floats, "has dtype uint16, .*has float32"),
    ):
        with pytest.raises(UserError, match=message):
            read_info(f"{a},{path}")


def test_fine_tuning_sees_crops_that_are_normalised(tmp_path: Path) -> None:
    arrays = arrays_of(N, 4)
    arrays[0][:20] = 0
    path = str(write_arrays(tmp_path / "a.beton", arrays, nodata=0))
    options = LoaderOptions(batch_size=4, image_size=(16, 16), channels=4, num_workers=1)
    loader = AugmentedLoader(path, dataclasses.replace(Augmentation(), random_erasing=0.0), options)
    key = (0, 3, 0)
    pixels, label, sample, replaced = loader.images[key]
    drawn, info = loader.base.drawn(0, 3).astype(np.float64), loader.info
    expected = np.where(drawn == 0, 0, (drawn - info.mean) / info.std)
    assert (label, sample, replaced, tuple(pixels.shape)) == (1, 3, False, (4, 16, 16))
    np.testing.assert_allclose(pixels.numpy(), expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-4)
    erased = AugmentedLoader(path, dataclasses.replace(Augmentation(), random_erasing=1.0), options).images[key][0]
    assert not torch.equal(erased, pixels)


# ------------------------------------------------------------------------------------------------------------ files
def test_ffcvs_own_reader_finds_the_bytes(tmp_path: Path) -> None:
    """Its loader does too; that takes half a minute of compiling, and leaves files open."""
    from ffcv.reader import Reader

    arrays = arrays_of(6, 3, sizes=((10, 12), (7, 5)))
    path = write_arrays(tmp_path / "a.beton", arrays)
    theirs, data = Reader(str(path)), path.read_bytes()
    assert theirs.field_names == ["image", "label", "height", "width"]
    names = [type(handler).__name__ for handler in theirs.handlers.values()]
    assert names == ["BytesField", "IntField", "IntField", "IntField"]
    assert theirs.metadata.dtype.itemsize == ARRAY_ROW.itemsize
    for row, table, array in zip(theirs.metadata, theirs.alloc_table, arrays, strict=True):
        (at, size), _, height, width = row
        assert (at, size) == (table["ptr"], table["size"])
        found = np.frombuffer(data, np.uint16, size // 2, at).reshape(int(height), int(width), 3)
        assert np.array_equal(found, array)


def test_damaged_and_foreign_files_of_arrays_are_refused(tmp_path: Path) -> None:
    arrays = [array_picture(k, (9, 8), 4, "uint16") for k in range(3)]
    path = write_arrays(tmp_path / "a.beton", arrays)
    table, whole, sidecar = open_beton(path), path.read_bytes(), path.with_suffix(".json").read_text()
    rows_at = whole.index(table.positions[:1].astype("<u8").tobytes())

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_beton(path)
        assert "\n" not in str(error.value)

    for at, number in ((8, 1), (24, 10), (24, -1), (32, 0), (32, 2**40), (0, 5)):  # size, height, width, position
        overwrite(path, rows_at + at, int(number).to_bytes(8, "little", signed=True))
        refused("damaged: 1 of 3 samples, the first of them 0")
        path.write_bytes(whole)
    for a, b, message in (
        ('"dtype": "uint16"', '"dtype": "int64"', "has dtype 'int64', which this version cannot read"),
        ('"codec": "raw"', '"codec": "zip"', "has codec 'zip'"),
        ('"nodata": null', '"nodata": [1]', r"has nodata \[1\]"),
        ('"bands": []', '"bands": ["a"]', r"has bands \['a'\]"),
        ('"dtype": "uint16"', '"dtype": "float32"', "damaged: 3 of 3"),
    ):
        path.with_suffix(".json").write_text(sidecar.replace(a, b))
        refused(message)
    photograph = sidecar.replace('"dtype": "uint16"', '"dtype": "uint8"').replace('"channels": 4', '"channels": 3')
    path.with_suffix(".json").write_text(photograph.replace('"mean": [', '"mean": [1],"x":['))
    refused("contradicts itself")
