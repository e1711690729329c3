"""Sets of arrays from end to end: bytes and statistics whatever the processes, kills and shards; both codecs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_prep import array_form, copy, partial, verify
from data_prep.changes import ArrayOptions
from data_prep.tally import Tally
from fasthpm.data import read_info
from fasthpm.errors import UserError
from fasthpm.files import read_json
from tests.helpers.data_fixtures import prepare
from tests.helpers.rasters import NODATA, satellite, satellite_tile, stored_arrays, xrays

pytest.importorskip("tifffile")
FLAGS = ("--num_workers", "1", "--nodata", str(NODATA))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return satellite(tmp_path_factory.mktemp("tiles"), 8, size=24, bands=5)


def undated(path: Path) -> dict:
    return read_json(path.with_suffix(".json")) | {"written": ""}


@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_values_arrive_and_are_measured(tiles: Path, tmp_path: Path, codec: str) -> None:
    out = prepare(tiles, tmp_path / "a.beton", *FLAGS, "--write_mode", codec)
    found, tally = stored_arrays(out), Tally("uint16", 5, NODATA)
    assert len(found) == 8
    for name, values in found.items():
        seed = int(name[-7:-4])
        assert np.array_equal(values, satellite_tile(seed, seed % 2, size=24, bands=5))
        tally.add(values)
    sidecar = undated(out)
    assert {name: sidecar[name] for name in tally.statistics()} == tally.statistics()
    assert (sidecar["dtype"], sidecar["codec"], sidecar["nodata"], sidecar["channels"]) == ("uint16", codec, NODATA, 5)
    info = read_info(out)
    assert (info.values.nodata, info.values.dtype, len(info.values.low)) == (0, "uint16", 5)
    assert min(sidecar["missing"]) > 0
    verify.main([str(out), "--num_workers", "1"])
    copy.copy_sets([out], tmp_path / "copy")
    assert (tmp_path / "copy" / "a.beton").read_bytes() == out.read_bytes()


def test_processes_and_shards_make_no_difference(tiles: Path, tmp_path: Path) -> None:
    one = prepare(tiles, tmp_path / "one.beton", *FLAGS)
    two = prepare(tiles, tmp_path / "two.beton", *FLAGS[2:])
    assert one.read_bytes() == two.read_bytes()
    many = prepare(tiles, tmp_path / "many.beton", *FLAGS, "--shards", "3", "--val_count", "2")
    assert len(stored_arrays(many)) == 6
    verify.verify(many, 1)
    index = json.loads((tmp_path / "many.json").read_text())
    index["mean"][1] += 1
    (tmp_path / "many.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="mean and std differ"):
        verify.verify(many, 1)


@pytest.mark.parametrize("more", [(), ("--log", "--write_mode", "lz4", "--clip_percentiles", "1", "99")])
def test_a_killed_run_goes_on_with_the_same_bytes(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple
) -> None:
    monkeypatch.setattr(partial, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr("data_prep.arranging.MOST", 2)
    whole = prepare(tiles, tmp_path / "whole.beton", *FLAGS, *more)
    made, calls = array_form.encode, []

    def dying(values: np.ndarray, options: ArrayOptions) -> object:
        calls.append(1)
        if len(calls) > 5:
            os._exit(1)
        return made(values, options)

    monkeypatch.setattr(array_form, "encode", dying)
    with pytest.raises(UserError, match="died after 4 of 8"):
        prepare(tiles, tmp_path / "a.beton", *FLAGS, *more)
    monkeypatch.setattr(array_form, "encode", made)
    out = prepare(tiles, tmp_path / "a.beton", *FLAGS, *more)
    assert "going on after 4 of 8" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()
    assert undated(out) == undated(whole) | {"job": undated(out)["job"]}


def test_percentiles_and_logarithms_are_written_down(tiles: Path, tmp_path: Path) -> None:
    plain = stored_arrays(prepare(tiles, tmp_path / "a.beton", *FLAGS))
    flags = ("--clip_percentiles", "10", "90", "--log", "float16", "--bands", "4,2")
    out = prepare(tiles, tmp_path / "b.beton", *FLAGS, *flags)
    sidecar = undated(out)
    every = np.concatenate([values[..., [3, 1]].reshape(-1, 2) for values in plain.values()]).astype(np.float64)
    limits = sidecar["preparation"].pop("limits")
    for channel in range(2):
        kept = np.sort(every[every[:, channel] != NODATA, channel])
        low, high = (kept[int(np.ceil(share * len(kept))) - 1] for share in (0.1, 0.9))
        assert limits[channel] == [low, high]
    assert sidecar["preparation"] == {
        "clip_percentiles": [10, 90],
        "log": "float16",
        "bands": ["4", "2"],
        "source_dtype": "uint16",
    }
    assert (sidecar["dtype"], sidecar["nodata"], sidecar["log"]) == ("float16", "nan", True)
    for name, values in stored_arrays(out).items():
        source = plain[name][..., [3, 1]].astype(np.float64)
        expected = np.log1p(np.clip(source, *np.transpose(limits)))
        expected[source == NODATA] = np.nan
        assert np.array_equal(values, expected.astype(np.float16), equal_nan=True)


def test_dicoms_keep_16_bits_and_no_names(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    out = prepare(xrays(tmp_path / "in", 6, size=16), tmp_path / "a.beton", "--num_workers", "1")
    assert undated(out)["dtype"] == "uint16"
    for name in ("a.json", "a.files.csv", "a.beton"):
        assert b"SECRET" not in (tmp_path / name).read_bytes().upper()


def test_constant_and_empty_channels_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    values = np.stack([np.full((8, 9), 5), np.arange(72).reshape(8, 9) + 1, np.zeros((8, 9))], 2).astype(np.int16)
    np.save(tmp_path / "in" / "a.npy", values)
    out = prepare(tmp_path / "in", tmp_path / "a.beton", *FLAGS)
    said = capsys.readouterr().out
    assert "nodata everywhere: channel 3" in said
    assert "one value everywhere (std 0): channel 1" in said
    assert undated(out)["std"][::2] == [0, 0]
