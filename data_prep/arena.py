"""Memory that a preparation shares with its processes: what they make goes through it, and only its place by a pipe.

Pickled and piped, a megabyte of pixels costs as much as reading them from a plain TIFF did; laid down here it is copied
once. What does not fit is pickled.
"""

import mmap
from dataclasses import dataclass, replace
from typing import Any

from data_prep.partial import Chunk


@dataclass(frozen=True)
class Parcel:
    """Where a sample's bytes lie."""

    at: int
    length: int


def whole(chunk: Chunk) -> Chunk:
    """The chunk to be pickled without an `Arena`: views of memory become bytes."""
    if not any(isinstance(getattr(stored, "blob", None), memoryview) for stored in chunk.samples):
        return chunk
    return replace(chunk, samples=[replace(stored, blob=bytes(stored.blob)) for stored in chunk.samples])


class Arena:
    """`slots` pieces of `size` bytes each, of which a process fills one per chunk; pages are taken as they are filled.

    **Raises:** `OSError` where the system does not give so much.
    """

    def __init__(self, slots: int, size: int) -> None:
        self.slots, self.size = slots, size
        self._memory = memoryview(mmap.mmap(-1, slots * size))

    def packed(self, chunk: Chunk, slot: int) -> Chunk:
        """The chunk to be pickled: its samples' bytes lie in the slot, those of the last ones perhaps not."""
        at, end = slot * self.size, (slot + 1) * self.size
        samples: list[Any] = []
        for stored in chunk.samples:
            length = len(stored.blob)
            if at + length <= end:
                self._memory[at : at + length] = stored.blob
                samples.append(replace(stored, blob=Parcel(at, length)))
                at += length
            else:
                samples.append(replace(stored, blob=bytes(stored.blob)))
        return replace(chunk, samples=samples)

    def unpacked(self, chunk: Chunk) -> Chunk:
        """The chunk with its bytes, which are there until the slot is filled again."""
        samples: list[Any] = []
        for stored in chunk.samples:
            blob = stored.blob
            found = self._memory[blob.at : blob.at + blob.length] if isinstance(blob, Parcel) else blob
            samples.append(replace(stored, blob=found))
        return replace(chunk, samples=samples)
