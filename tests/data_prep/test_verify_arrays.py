"""Verifying sets of arrays: every byte counts; tables, lists and compressed values with bits flipped are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify
from data_prep.array_form import RECORD
from fasthpm.data import build_loader
from fasthpm.data.ffcv.beton import ARRAY_FIELDS, ARRAY_ROW, DESCRIPTOR, HEADER, open_beton
from fasthpm.errors import UserError
from fasthpm.files import file_hash
from tests.helpers.data_fixtures import prepare
from tests.helpers.rasters import satellite, slides

pytest.importorskip("tifffile")
CASES = 25  # mutations of each region


@pytest.fixture(scope="module", params=["raw", "lz4"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    flags = ("--num_workers", "1", "--nodata", "0", "--write_mode", request.param)
    return prepare(satellite(folder / "in", 6, size=16, bands=3), folder / "a.beton", *flags)


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Which bytes of the file are what."""
    beton = open_beton(path)
    rows_at = HEADER.itemsize + len(ARRAY_FIELDS) * DESCRIPTOR.itemsize
    return {
        "header": (0, HEADER.itemsize + DESCRIPTOR.itemsize),
        "rows": (rows_at, rows_at + len(beton.labels) * ARRAY_ROW.itemsize),
        "values": (int(beton.positions.min()), int((beton.positions + beton.lengths).max())),
        "table": (path.stat().st_size - 24 * len(beton.labels), path.stat().st_size),
    }


def attempt(path: Path) -> str:
    """What opening, verifying and reading a set says."""
    try:
        verify.verify(path, 1)
    except UserError as error:
        return str(error)
    return ""


def attempt_reading(path: Path) -> str:
    """What reading all batches says."""
    try:
        loader = build_loader(path, batch_size=3, image_size=(8, 8), channels=3, train=False, num_workers=1)
        try:
            for batch in loader:
                assert batch.images.shape[1:] == (8, 8, 3)
        finally:
            loader.close()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("region", ["header", "rows", "values", "table"])
@pytest.mark.parametrize("agrees", [False, True])
def test_no_change_crashes_or_passes_unnoticed(original: Path, tmp_path: Path, region: str, agrees: bool) -> None:
    """With a sidecar that agrees to the changed bytes, what is changed is still read without a crash."""
    data, (start, stop) = original.read_bytes(), regions(original)[region]
    rng, path = np.random.default_rng(start + agrees), tmp_path / "a.beton"
    for name in ("a.json", "a.files.csv"):
        shutil.copy(original.with_name(name), tmp_path)
    sidecar = json.loads(original.with_suffix(".json").read_text())
    path.write_bytes(data)
    assert attempt(path) == ""
    for _ in range(CASES):
        changed = bytearray(data)
        first = int(rng.integers(start, stop))
        for at in range(first, min(first + int(rng.integers(1, 20)), len(data))):
            changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        if not agrees:
            said = attempt(path)
            assert said
            assert "\n" not in said
            continue
        path.with_suffix(".json").write_text(json.dumps(sidecar | {"sha256": file_hash(path)}))
        assert "\n" not in attempt(path)
        assert "\n" not in attempt_reading(path)


def test_lists_of_tiles_are_checked(tmp_path: Path) -> None:
    source = slides(tmp_path / "in", 1, size=64, stains=2, tile=16)
    out = prepare(source, tmp_path / "a.beton", "--num_workers", "1", "--tile", "32")
    verify.main([str(out)])
    listed = (tmp_path / "a.files.csv").read_text()
    for wrong in (
        listed.replace(",32,32", ",32,x", 1),
        listed.replace(",32,32", ",32", 1),
        listed.replace("top", "up"),
    ):
        (tmp_path / "a.files.csv").write_text(wrong)
        with pytest.raises(UserError, match=r"a\.files\.csv line \d+ is"):
            verify.verify(out, 1)


def test_compressed_values_are_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num_workers", "1", "--write_mode", "lz4")
    out = prepare(satellite(tmp_path / "in", 4, size=16, bands=3), tmp_path / "a.beton", *flags)
    verify.main([str(out)])
    assert "4 images (uint16, lz4), 2 classes, 3 channels" in capsys.readouterr().out
    beton, data = open_beton(out), bytearray(out.read_bytes())
    data[int(beton.positions[1]) : int(beton.positions[1]) + 8] = b"\xff" * 8
    out.write_bytes(data)
    out.with_suffix(".json").write_text(json.dumps(beton.sidecar | {"sha256": file_hash(out)}))
    with pytest.raises(UserError, match=r"1 of 4 images do not decode, the first is sample 1 \((ant|bee)/tile"):
        verify.verify(out, 1)
    assert RECORD.itemsize == 48
