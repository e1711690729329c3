"""The bench of preparing arrays."""

import numpy as np
import pytest

from bench import prepare_arrays
from bench.prepare_arrays import COMPRESSIONS, report


def test_what_is_compared_is_the_same_work(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(prepare_arrays, "SIDE", 16)
    for name in COMPRESSIONS:
        source = prepare_arrays.draw_tiles(tmp_path / name, 2, name)
        (tmp_path / f"{name}-npy").mkdir()
        prepare_arrays.copy_plainly(source, tmp_path / f"{name}-npy")
        first = np.load(tmp_path / f"{name}-npy" / "00000.npy")
        assert np.array_equal(first, tifffile.imread(source / "00000.tif"))
        assert first.shape == (16, 16, 12)


def test_the_report_names_every_writer() -> None:
    one = {"median": 2.0, "low": 1.0, "high": 3.0}
    result = {
        "machine": {"device": "a CPU", "cores": 2, "commit": "0" * 40},
        "tiles": 4,
        "cpu_ms_per_tile": {"lzw": {"numpy": one, "raw": one, "lz4": one}},
        "ratio": {"lzw": {"raw": one, "lz4": one}},
    }
    assert "| TIFF lzw | data_prep.images, lz4 | 2.00 (1.00 to 3.00) | 2.00 (1.00 to 3.00) |" in report(result)
