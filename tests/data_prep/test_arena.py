"""Bytes of samples come back from shared memory as they were, whatever fits."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import pool
from data_prep.arena import Arena, Parcel
from data_prep.array_form import StoredArray
from data_prep.partial import Chunk
from tests.helpers.data_fixtures import prepare
from tests.helpers.rasters import stored_arrays


def chunk_of(*blobs: Any) -> Chunk:
    samples: list[Any] = [StoredArray(blob, 1, len(blob)) for blob in blobs]
    numbers = np.arange(len(blobs))
    return Chunk(numbers, numbers, samples, [(9, "torn")], skipped=2)


def test_what_fits_is_laid_down_and_the_rest_is_carried() -> None:
    arena = Arena(3, 10)
    blobs = (b"abcd", np.arange(5, dtype=np.uint8).data, b"xyz", b"!")
    packed = arena.packed(chunk_of(*blobs), 1)
    kinds = [stored.blob for stored in packed.samples]
    assert kinds == [Parcel(10, 4), Parcel(14, 5), b"xyz", Parcel(19, 1)]
    found = arena.unpacked(packed)
    assert [bytes(stored.blob) for stored in found.samples] == [bytes(blob) for blob in blobs]
    assert [stored.width for stored in found.samples] == [4, 5, 3, 1]
    assert (found.rejected, found.skipped) == ([(9, "torn")], 2)


def test_slots_do_not_touch() -> None:
    arena = Arena(3, 8)
    packed = [arena.packed(chunk_of(bytes([65 + slot]) * 8), slot) for slot in range(3)]
    assert [bytes(arena.unpacked(one).samples[0].blob) for one in packed] == [b"A" * 8, b"B" * 8, b"C" * 8]


@pytest.mark.parametrize("shared", [True, False])
def test_sets_are_the_same_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Where the system gives no memory, and in memory that holds a part of a chunk."""
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((8, 9, 3), 700 + number, np.uint16))
    sizes = iter([400] if shared else [])

    def small(slots: int, size: int) -> Arena:
        return Arena(slots, next(sizes, 1 << 55))

    monkeypatch.setattr(pool, "Arena", small)
    prepare(tmp_path, tmp_path / "set.beton")
    found = stored_arrays(tmp_path / "set.beton")
    assert {name: int(pixels[0, 0, 0]) for name, pixels in found.items()} == {f"{k}.npy": 700 + k for k in range(3)}
    assert all((pixels == pixels[0, 0, 0]).all() and pixels.shape == (8, 9, 3) for pixels in found.values())


def _fill(arena: Arena, results: Any) -> None:
    results.send(arena.packed(chunk_of(b"from a process"), 1))


def test_another_process_fills_it() -> None:
    context = multiprocessing.get_context("fork")
    arena, (ours, theirs) = Arena(2, 64), context.Pipe()
    process = context.Process(target=_fill, args=(arena, theirs))
    process.start()
    found = arena.unpacked(ours.recv())
    process.join()
    assert [bytes(stored.blob) for stored in found.samples] == [b"from a process"]
