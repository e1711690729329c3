"""Pictures that 8 bits cannot tell apart, in both forms, and the table."""

from pathlib import Path

import numpy as np
import pytest

from bench import evidence_sixteen_bits
from fasthpm.data import read_info
from fasthpm.errors import UserError
from tests.helpers.prepared_sets import idx_files, stored


def test_eight_bits_keep_nothing_of_a_garment() -> None:
    garment = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    seen, ground = (
        evidence_sixteen_bits.picture(one, np.random.default_rng(1)) for one in (garment, np.zeros_like(garment))
    )
    assert seen.dtype == np.uint16
    assert np.array_equal(seen - ground, garment // 2)
    assert np.array_equal(np.rint(seen / 257), ground / 257)
    rng = np.random.default_rng(2)
    assert len({int(evidence_sixteen_bits.picture(garment, rng).max()) for _ in range(20)}) == 3


def test_the_same_files_become_both_sets(tmp_path: Path) -> None:
    idx_files(tmp_path / "idx")
    arguments = evidence_sixteen_bits.build_parser().parse_args(
        ["--source", str(tmp_path / "idx"), "--work", str(tmp_path / "work"), "--train", "12", "--val", "4"]
    )
    evidence_sixteen_bits.prepare(arguments)
    found = {bits: read_info(tmp_path / "work" / f"train{bits}.beton") for bits in ("16", "8")}
    assert {bits: (info.num_samples, info.values.dtype) for bits, info in found.items()} == {
        "16": (12, "uint16"),
        "8": (12, "uint8"),
    }
    assert all(set(np.unique(image)) <= {99, 100, 101} for image in stored(tmp_path / "work" / "val8.beton"))


def test_the_table() -> None:
    rows = [{"bits": 16, "untrained": 60.0, "student": 70.25}, {"bits": 8, "untrained": 10.0, "student": 11.0}]
    assert "| 16 | 60.0 | 70.2 |" in evidence_sixteen_bits.markdown(rows)
    with pytest.raises(UserError, match="train is 0, expected 1 or more"):
        evidence_sixteen_bits.main(["--train", "0"])
