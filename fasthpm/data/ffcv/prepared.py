"""Prepared sets in mapped memory: one `.beton`, the shards of one, or several sets side by side, as one set.

Samples are numbered through in the order of the files. A sample is found by its absolute address, so that any number
of files costs no more than one; about 30 bytes of table per sample are all that stays in memory.
"""

import csv
import dataclasses
import mmap
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.ffcv.beton import (
    AGAIN,
    ARRAY,
    Beton,
    check_values,
    files_path,
    info_of,
    open_beton,
    read_index,
    sidecar_path,
    stores_arrays,
)
from fasthpm.data.sampling import Array
from fasthpm.data.sources import split_sources
from fasthpm.data.types import DatasetInfo
from fasthpm.data.values import Values
from fasthpm.errors import UserError

ALIKE = {"dtype": "uint8", "nodata": None, "bands": None, "log": False}  # of sets that can be used as one; defaults
SHARED = (*ALIKE, "codec")  # what an index of arrays has from its shards where it does not say it
COLUMNS = ("lengths", "modes", "heights", "widths", "labels")
MERGED_GAP = 256 * 1024  # bytes between two samples that one read may cover


@dataclass(frozen=True)
class PreparedSet:
    """N samples of F files."""

    info: DatasetInfo
    files: tuple[Path, ...]
    starts: Array  # int64 [F + 1], number of each file's first sample, and N
    maps: tuple[mmap.mmap, ...]  # the files' bytes
    bases: Array  # uint64 [F], their addresses
    addresses: Array  # uint64 [N], where a sample's pixels are
    lengths: Array  # uint64 [N], how many bytes they take
    modes: Array  # uint8 [N], JPEG or RAW; of arrays ARRAY or LZ4
    heights: Array  # uint16 [N], of arrays int64
    widths: Array  # the same
    labels: Array  # int64 [N]

    @property
    def holds_arrays(self) -> bool:
        """Whether the samples are arrays, no photographs."""
        return bool(self.modes[0] >= ARRAY)

    def name_of(self, sample: int) -> str:
        """The image file that `sample` was made of where the set has a list of them, else its file and number."""
        file = int(np.searchsorted(self.starts, sample, "right")) - 1
        path, row = self.files[file], sample - int(self.starts[file])
        try:
            with files_path(path).open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
                found = next(islice(csv.reader(lines), row + 1, None), [])  # after the header
        except (OSError, csv.Error):
            found = []
        source = " ".join(found[0].encode("utf-8", "backslashreplace").decode().split()) if found else ""
        return f"{source} ({path}, sample {row})" if source else f"{path}: sample {row}"

    def leave_neighbours(self) -> None:
        """Have the system read what is asked for and nothing around it, from here on.

        By itself it reads megabytes around each sample, many times the file per epoch where memory is short.
        """
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_RANDOM)

    def read_ahead(self, samples: Array) -> None:
        """Ask the system to read the bytes of `samples` into its cache, in the order of storage, without waiting."""
        samples = np.sort(samples)
        for file, part in enumerate(np.split(samples, np.searchsorted(samples, self.starts[1:-1]))):
            begin = (self.addresses[part] - self.bases[file]).astype(np.int64)
            for start, end in merged_ranges(begin, begin + self.lengths[part].astype(np.int64)):
                start -= start % mmap.PAGESIZE
                self.maps[file].madvise(mmap.MADV_WILLNEED, start, end - start)


def merged_ranges(begin: Array, end: Array) -> list[tuple[int, int]]:
    """Ranges [begin, end) in ascending order, those that touch or nearly touch (`MERGED_GAP`) made one."""
    if not len(begin):
        return []
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    new = np.flatnonzero(begin[1:] - end[:-1] > MERGED_GAP) + 1
    return list(zip(begin[np.r_[0, new]].tolist(), end[np.r_[new - 1, len(end) - 1]].tolist(), strict=True))


@dataclass(frozen=True)
class _Group:
    """One name of the list: a `.beton`, or all its shards."""

    path: Path
    sidecar: dict[str, Any]
    betons: tuple[Beton, ...]


def open_set(source: str | Path) -> PreparedSet:
    """Open `X.beton`, the shards that `X.json` lists in its place, or a comma list of such names, as one set.

    **Raises:** `UserError` for a file that is missing, truncated or foreign, and for sets that do not go together.
    """
    groups = [_open_group(Path(name)) for name in split_sources(str(source))]
    for other in groups[1:]:
        _check_alike(groups[0].path, groups[0].sidecar, other.path, other.sidecar)
    betons = [beton for group in groups for beton in group.betons]
    maps = tuple(_map(beton.path) for beton in betons)
    bases = np.array([np.frombuffer(mapped, np.uint8, 1).ctypes.data for mapped in maps], np.uint64)
    addresses = _joined([beton.positions + base for beton, base in zip(betons, bases, strict=True)])
    columns = [_joined([getattr(beton, name) for beton in betons]) for name in COLUMNS]
    starts = np.cumsum([0, *(beton.info.num_samples for beton in betons)])
    files = tuple(beton.path for beton in betons)
    return PreparedSet(_merged_info(groups), files, starts, maps, bases, addresses, *columns)


def _open_group(path: Path) -> _Group:
    index = read_index(path)
    if index is None:
        beton = open_beton(path)
        return _Group(path, beton.sidecar, (beton,))
    betons = tuple(_open_shard(path, path.parent / name) for name in index["shards"])
    if stores_arrays(betons[0].sidecar):
        index = {name: betons[0].sidecar.get(name) for name in SHARED} | index
        check_values(path, index)
    for beton in betons:
        _check_alike(path, index, beton.path, beton.sidecar)
    found = sum(beton.info.num_samples for beton in betons)
    if found != index["num_samples"]:
        raise UserError(
            f"the {len(betons)} shards of {path} hold {found} samples, {sidecar_path(path)} says "
            f"{index['num_samples']}: copy them again or {AGAIN}"
        )
    return _Group(path, index, betons)


def _open_shard(path: Path, shard: Path) -> Beton:
    if not shard.is_file():
        raise UserError(f"{shard} does not exist, but {sidecar_path(path)} lists it: copy it again or {AGAIN}")
    return open_beton(shard)


def _check_alike(path: Path, sidecar: dict[str, Any], other_path: Path, other: dict[str, Any]) -> None:
    if sidecar["channels"] != other["channels"]:
        raise UserError(
            f"{path} has {sidecar['channels']} channels, {other_path} has {other['channels']}; only sets of one kind "
            f"can be used as one"
        )
    for name, usual in ALIKE.items():
        mine, theirs = (one.get(name) or usual if name == "bands" else one.get(name, usual) for one in (sidecar, other))
        if mine != theirs:
            raise UserError(
                f"{path} has {name} {mine}, {other_path} has {theirs}; only sets with the same can be used as one"
            )
    if sidecar["classes"] != other["classes"]:
        raise UserError(
            f"{path} has {len(sidecar['classes'])} classes, {other_path} has {len(other['classes'])} or others; only "
            f"sets with the same classes can be used as one"
        )


def _merged_info(groups: list[_Group]) -> DatasetInfo:
    """One set's own info; of several, mean and std over all pixels (over all samples where pixels are not counted)."""
    infos = [info_of(group.sidecar) for group in groups]
    if len(infos) == 1:
        return infos[0]
    counts = [group.sidecar.get("pixels") for group in groups]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        counts = [info.num_samples for info in infos]
    weights = np.array(counts, np.float64) / sum(map(float, counts))  # type: ignore[arg-type]
    means, stds = np.array([info.mean for info in infos]), np.array([info.std for info in infos])
    mean = weights @ means
    std = np.sqrt(np.maximum(weights @ (stds**2 + means**2) - mean**2, 0))
    samples = sum(info.num_samples for info in infos)
    unlabelled = sum(info.unlabelled for info in infos)
    return DatasetInfo(
        samples,
        infos[0].channels,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        infos[0].classes,
        unlabelled,
        _merged_values([info.values for info in infos]),
    )


def _merged_values(values: list[Values]) -> Values:
    """Those of several sets, which pictures stretch so that nothing of any is cut off."""
    lows, highs = ([getattr(one, name) for one in values] for name in ("low", "high"))
    low = tuple(map(min, zip(*lows, strict=True))) if all(lows) else ()
    high = tuple(map(max, zip(*highs, strict=True))) if all(highs) else ()
    return dataclasses.replace(values[0], low=low, high=high)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be mapped into memory ({error.strerror})") from error


def _joined(columns: list[Array]) -> Array:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
