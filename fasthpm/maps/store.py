"""The file that keeps one map per sample, and its header."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasthpm.data import DatasetInfo
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError
from fasthpm.files import writing

KINDS = ("attention", "difficulty")
MAGIC = b"FHPMMAP1"
HEADER_BYTES = 4096  # the maps begin on a page of their own


# ------------------------------------------------------------------------------------------------------ the file
@dataclass(frozen=True)
class MapHeader:
    """What a store's file holds."""

    kind: str  # one of KINDS
    num_samples: int  # N
    grid: tuple[int, int]  # (R, C)
    data: str  # `data_identity` of the set that the maps were made of
    epoch: int  # refreshed before the first update of this epoch

    @property
    def row_bytes(self) -> int:
        """Bytes of one map."""
        return 2 * self.grid[0] * self.grid[1]

    def to_bytes(self) -> bytes:
        """HEADER_BYTES bytes."""
        return (MAGIC + json.dumps(dataclasses.asdict(self)).encode()).ljust(HEADER_BYTES)


def data_identity(info: DatasetInfo) -> str:
    """Tells data sets apart by what their sidecars say, wherever they lie: 16 hexadecimal digits."""
    known = (info.num_samples, info.channels, list(info.mean), list(info.std), list(info.classes))
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


class MapStore:
    """A file of maps, read through memory mapping.

    **Raises:** `UserError` if it is missing, foreign or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)
        shape = (self.header.num_samples, *self.header.grid)
        self._maps: Array = np.memmap(path, np.dtype("<f2"), "r", HEADER_BYTES, shape)

    def check(self, wanted: MapHeader) -> None:
        """**Raises:** `UserError` if the file is of another data set, size, kind or epoch than `wanted`."""
        for name, meaning in (
            ("num_samples", "samples"),
            ("data", "data set"),
            ("grid", "grid of patches"),
            ("kind", "kind of map"),
            ("epoch", "epoch"),
        ):
            there, expected = getattr(self.header, name), getattr(wanted, name)
            if there != expected:
                raise UserError(
                    f"map store {self.path} is of another {meaning}: {there}, and this run has {expected}; give the "
                    f"data and the settings that it was made with, or use another --output_dir"
                )

    def read(self, ids: Tensor) -> Tensor:
        """The maps of samples `ids`, int64 [B] on the CPU: float16 [B, R, C]."""
        return torch.from_numpy(np.asarray(self._maps[ids.numpy()]))


def read_header(path: Path) -> MapHeader:
    """What a store says of itself. **Raises:** `UserError` as `MapStore`."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if not head.startswith(MAGIC):
            raise ValueError("it does not begin like one")
        values = json.loads(head[len(MAGIC) :])
        header = MapHeader(**{**values, "grid": (int(values["grid"][0]), int(values["grid"][1]))})
    except OSError as error:
        raise UserError(
            f"map store {path} cannot be read ({error.strerror}); put it back, or resume from a checkpoint of the "
            f"epoch of a refresh"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no map store ({error}); remove it") from error
    whole = HEADER_BYTES + header.num_samples * header.row_bytes
    if size != whole:
        raise UserError(f"map store {path} has {size} bytes, expected {whole}; it is truncated, remove it")
    return header


def write_rows(file: int, header: MapHeader, ids: Array, rows: Array) -> None:
    """Write maps [B, R, C] of the samples `ids` [B] into an open store, neighbours in one call.

    By `pwrite`, not through mapped memory: on network file systems ranks of other machines may share a page.
    """
    rows = np.ascontiguousarray(rows, np.dtype("<f2"))
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(ids) != 1) + 1):
        if len(part):
            write_all(file, rows[part].tobytes(), HEADER_BYTES + int(ids[part[0]]) * header.row_bytes)


def write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def naming_the_disk(path: Path) -> Iterator[None]:
    """**Raises:** `UserError` for every `OSError` inside; then `path` is deleted."""
    try:
        with writing(path, "make room in the output_dir and start again to resume"):
            yield
    except UserError:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR)
    try:
        yield file
    finally:
        os.close(file)


def reserve(path: Path, header: MapHeader) -> None:
    """A file of zeros of the full size, the disk's space included where the system can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = HEADER_BYTES + header.num_samples * header.row_bytes
    with path.open("wb") as file:
        file.write(header.to_bytes())
        file.truncate(size)
        with suppress(AttributeError):
            os.posix_fallocate(file.fileno(), 0, size)
