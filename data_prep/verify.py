"""Check prepared sets against their sidecars: `python -m data_prep.verify OUT.beton`.

Size, header, allocation table, labels per class, OUT.files.csv and sha256 must match, and every image must decode; of a
sharded set every shard, and the index. A folder that `data_prep.videos` wrote is checked in the same way: tables,
manifest, sha256, every frame, and of its copies (up to 64 videos') some against the frames. Exit status 2 and one line
if not.
"""

import argparse
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cuts import BOX_COLUMNS
from data_prep.sets import byte_bar, members, progress_bar, read_csv, read_index, require_set
from data_prep.verify_pixels import decode_array, decode_jpeg
from data_prep.video_verify import compared_copies, verify_videos
from fasthpm.cli import Parser, run_command
from fasthpm.data.ffcv.beton import AGAIN, JPEG, RAW, Beton, files_path, open_beton, sidecar_path
from fasthpm.data.labels import UNLABELLED, count_unlabelled, counts_of
from fasthpm.data.options import count_workers
from fasthpm.data.quiet import quietly
from fasthpm.data.sampling import Array
from fasthpm.data.sources import is_video_set
from fasthpm.data.values import are_photographs
from fasthpm.data.video.prepared import VideoSet
from fasthpm.errors import UserError
from fasthpm.files import file_hash

CHUNK = 64
SUMMED = ("num_samples", "counts", "num_unlabelled", "pixels")  # entries of an index that the shards' must add up to


def verify(path: Path, num_workers: int = 0) -> list[Beton]:
    """Check everything; returns the tables of the set's files.

    **Raises:** `UserError` at the first thing that does not match.
    """
    require_set(path)
    betons = [open_beton(member) for member in members(path)]
    index = read_index(path)
    if index is not None:
        _check_index(path, index, [beton.sidecar for beton in betons])
    for beton in betons:
        _check_labels(beton)
        _check_files(beton)
        _check_hash(beton)
        _check_pixels(beton, count_workers(num_workers))
    return betons


def _check_index(path: Path, index: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Whether the index says of the union what its shards say of themselves."""
    for name in ("classes", "channels", "dtype", "codec", "nodata", "bands", "log"):
        other = next((k for k, shard in enumerate(shards) if shard.get(name) != index.get(name)), None)
        if other is not None:
            raise UserError(f"{sidecar_path(path)}: {name} differ from those of {index['shards'][other]}: {AGAIN}")
    for name in (*SUMMED, *(("missing",) if "missing" in index else ())):
        if index.get(name, 0) != np.sum([shard.get(name, 0) for shard in shards], 0).tolist():
            raise UserError(f"{sidecar_path(path)}: {name} differ from the sum of the shards': {AGAIN}")
    weights = np.stack([_measured(shard) for shard in shards])
    weights = weights / np.maximum(weights.sum(0), 1)
    means = np.array([shard["mean"] for shard in shards])
    squares = means**2 + np.array([shard["std"] for shard in shards]) ** 2
    mean = (weights * means).sum(0)
    std = np.sqrt(np.maximum((weights * squares).sum(0) - mean**2, 0))
    near = 1e-6 * (1 if "dtype" not in index else 1 + np.abs(mean) + np.array(index["std"]))
    if (np.abs(mean - index["mean"]) > near).any() or (np.abs(std - index["std"]) > 10 * near).any():
        raise UserError(f"{sidecar_path(path)}: mean and std differ from the union of the shards': {AGAIN}")


def _measured(sidecar: dict[str, Any]) -> Array:
    """Pixels of each channel that are not nodata: int64 [C]."""
    return sidecar["pixels"] - np.array(sidecar.get("missing", [0] * sidecar["channels"]))


def _check_labels(beton: Beton) -> None:
    classes = len(beton.info.classes)
    outside = (beton.labels < UNLABELLED) | (beton.labels >= classes)
    if outside.any():
        raise UserError(
            f"{beton.path}: sample {int(outside.argmax())} has label {beton.labels[outside][0]}, but there "
            f"are {classes} classes: {AGAIN}"
        )
    if counts_of(beton.labels, classes) != beton.sidecar.get("counts"):
        raise UserError(f"{beton.path}: samples per class differ from the sidecar's counts: {AGAIN}")
    if count_unlabelled(beton.labels) != beton.sidecar.get("num_unlabelled", 0):
        raise UserError(f"{beton.path}: unlabelled samples differ from the sidecar's num_unlabelled: {AGAIN}")


def _check_files(beton: Beton) -> None:
    """The list of sources; older sets have none."""
    path, rows, columns = files_path(beton.path), -1, 1
    if not path.exists():
        return
    for rows, row in enumerate(read_csv(path)):
        columns = len(row) if rows == 0 else columns
        head = row in (["path"], ["path", *BOX_COLUMNS])
        if len(row) != columns or not (head if rows == 0 else all(place.isdecimal() for place in row[1:])):
            raise UserError(f"{path} line {rows + 1} is {row}, expected a header and one path a line: {AGAIN}")
    if rows != beton.info.num_samples:
        raise UserError(f"{path} lists {max(rows, 0)} files, but there are {beton.info.num_samples} samples: {AGAIN}")


def _check_hash(beton: Beton) -> None:
    with byte_bar(beton.sidecar["bytes"], "hash") as bar:
        digest = file_hash(beton.path, bar.update)
    if digest != beton.sidecar["sha256"]:
        raise UserError(
            f"{beton.path} has sha256 {digest}, its sidecar says {beton.sidecar['sha256']}: its content has "
            f"changed; copy it again or {AGAIN}"
        )


def _check_pixels(beton: Beton, num_workers: int) -> None:
    """Decode every JPEG and what is compressed, in parallel; raw pixels have nothing to decode."""
    data, bad = np.memmap(beton.path, np.uint8, "r"), []
    ids = np.flatnonzero(beton.modes != RAW if is_array(beton) else beton.modes == JPEG)
    chunks = np.split(ids, range(CHUNK, len(ids), CHUNK))
    with ThreadPoolExecutor(num_workers) as pool, progress_bar(len(ids), "decode", "img") as bar:
        for chunk, damaged in zip(chunks, pool.map(lambda some: _undecodable(beton, data, some), chunks), strict=True):
            bad += damaged
            bar.update(len(chunk))
    if bad:
        raise UserError(
            f"{beton.path}: {len(bad)} of {beton.info.num_samples} images do not decode, the first is sample {bad[0]}"
            f"{_source_of(beton.path, bad[0])}: {AGAIN}"
        )


@quietly()
def _undecodable(beton: Beton, data: Array, ids: Array) -> list[int]:
    """Those of `ids` that are no sound JPEG, or array, of the size that the table says."""
    bad, arrays = [], is_array(beton)
    for index in ids.tolist():
        start, length = int(beton.positions[index]), int(beton.lengths[index])
        size = (int(beton.widths[index]), int(beton.heights[index]))
        try:
            if arrays:
                decode_array(data[start : start + length].tobytes(), beton.sidecar, size)
            else:
                decode_jpeg(data[start : start + length].tobytes(), size)
        except Exception:  # decoders raise nearly anything for damaged data
            bad.append(index)
    return bad


def is_array(beton: Beton) -> bool:
    """Whether a set is one of arrays."""
    return not are_photographs(beton.info.values.dtype, beton.info.channels)


def _source_of(path: Path, sample: int) -> str:
    with contextlib.suppress(OSError):
        for row, (name, *_) in enumerate(read_csv(files_path(path))):
            if row == sample + 1:
                return f" ({name})"
    return ""


def _copies(data: VideoSet) -> str:
    copied, compared = int(data.videos["copied"].sum()), len(compared_copies(data))
    return f", copies of {compared} of {copied} videos compared with their frames" if copied else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Check a set and print a summary."""
    parser: argparse.ArgumentParser = Parser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("path", type=Path, metavar="OUT.beton", help="prepared set; its .json lies beside it")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="threads; 0 = all cores (default)")
    args = parser.parse_args(argv)
    if is_video_set(args.path):
        data = verify_videos(args.path, args.num_workers)
        print(
            f"{args.path} is sound: {len(data.videos)} videos, {len(data.positions) - 1} frames, "
            f"{len(data.info.classes)} classes, {data.info.channels} channels, {len(data.frames)} bytes{_copies(data)}",
            flush=True,
        )
        return
    betons = verify(args.path, args.num_workers)
    images, jpegs = sum(len(beton.modes) for beton in betons), sum(int((b.modes == JPEG).sum()) for b in betons)
    first, shards = betons[0].sidecar, f" in {len(betons)} shards" if read_index(args.path) else ""
    how = f"{jpegs} JPEG, {images - jpegs} raw"
    if is_array(betons[0]):
        how = f"{first['dtype']}, {first['codec']}"
    print(
        f"{args.path} is sound{shards}: {images} images ({how}), {len(first['classes'])} "
        f"classes, {first['channels']} channels, {sum(b.sidecar['bytes'] for b in betons)} bytes, sha256 "
        f"{first['sha256'][:16]}…",
        flush=True,
    )


if __name__ == "__main__":
    run_command(main)
