"""Bytes of samples come back from shared memory as they were, whatever fits."""

import multiprocessing
from typing import Any

import numpy as np

from data_prep.arena import Arena, Parcel
from data_prep.array_form import StoredArray
from data_prep.partial import Chunk


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
