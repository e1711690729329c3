"""FFCV's files, truncated, foreign or with impossible entries."""

from pathlib import Path

import numpy as np

from fasthpm.data.ffcv.beton import ALLOCATION, JPEG, open_beton
from tests.helpers.loaders import N, overwrite, refused


def test_truncated_and_foreign_files_are_refused(beton: Path) -> None:
    whole = beton.read_bytes()
    beton.write_bytes(whole[:-100])
    refused(beton, "truncated")
    beton.write_bytes(whole[: len(whole) // 2])
    refused(beton, "truncated")
    beton.write_bytes(bytes(len(whole)))
    refused(beton, "not an FFCV file")
    beton.write_bytes(whole)
    overwrite(beton, 16, bytes(8))
    refused(beton, "incomplete")
    beton.write_bytes(whole)
    overwrite(beton, len(whole) - 8, (2**40).to_bytes(8, "little"))
    refused(beton, "damaged: 1 of 23")


def test_table_entries_of_impossible_length_are_refused(beton: Path) -> None:
    """Of a JPEG, whose length nothing else tells; 2**64 - 1 makes its end wrap around to inside the file."""
    whole = beton.read_bytes()
    sample = int((open_beton(beton).modes == JPEG).argmax())
    table_at = len(whole) - N * ALLOCATION.itemsize
    entry = np.frombuffer(whole, ALLOCATION, N, table_at)["sample_id"].tolist().index(sample)
    for length in (2**64 - 1, 0):
        beton.write_bytes(whole)
        overwrite(beton, table_at + entry * ALLOCATION.itemsize + 16, length.to_bytes(8, "little"))
        refused(beton, f"damaged: 1 of 23 samples, the first of them {sample}")
