"""Prepared video sets on disk: a folder of JPEG frames, made by `data_prep.videos`, read with numpy alone.

    info.json      counts, classes, mean and std, settings, versions, hashes: see INFO_TYPES
    frames.bin     the stored frames of all videos, JPEG after JPEG, one video after the other
    frames.npy     uint64 [F + 1], where each of F frames begins, and the end
    videos.npy     VIDEO [N], of each video
    manifest.csv   the same for people, with source, sha256 and codec; MANIFEST
    videos/        with --copy: video files for a GPU's decoder, as the manifest says

N videos, F frames. Frames are found by position, so that a set of any size opens at once and takes no memory.
"""

import contextlib
import csv
import io
import json
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.ffcv.beton import info_of
from fasthpm.data.ffcv.prepared import merged_ranges
from fasthpm.data.labels import UNLABELLED
from fasthpm.data.sampling import Array
from fasthpm.data.types import DatasetInfo
from fasthpm.errors import UserError

FORMAT = "fasthpm-videos"
LAYOUT = 1
INFO, FRAMES, POSITIONS, VIDEOS, MANIFEST_FILE = "info.json", "frames.bin", "frames.npy", "videos.npy", "manifest.csv"
VIDEO = np.dtype(
    [("first", "<i8"), ("frames", "<i4"), ("height", "<u2"), ("width", "<u2"), ("label", "<i8"), ("copied", "?")],
    align=True,
)
MANIFEST = ("path", "frames", "fps", "seconds", "height", "width", "label", "codec", "sha256", "copy")
INFO_TYPES = {
    "num_samples": int,
    "channels": int,
    "mean": list,
    "std": list,
    "classes": list,
    "counts": list,
    "num_frames": int,
    "frame_stride": int,
    "bytes": int,
    "sha256": dict,
}
AGAIN = "prepare it again with python -m data_prep.videos"


@dataclass(frozen=True)
class VideoSet:
    """N videos of JPEG frames in mapped memory."""

    path: Path
    info: DatasetInfo
    sidecar: dict[str, Any]
    videos: Array  # VIDEO [N]
    positions: Array  # uint64 [F + 1]
    frames: mmap.mmap

    @property
    def stride(self) -> int:
        """Every how many-th frame of a video is stored."""
        return int(self.sidecar["frame_stride"])

    @property
    def address(self) -> int:
        """Of the first frame in this process's memory."""
        return int(np.frombuffer(self.frames, np.uint8, 1).ctypes.data)

    def jpeg(self, frame: int) -> Array:
        """The bytes of frame `frame` of the whole set: uint8 [n], a view."""
        start, end = int(self.positions[frame]), int(self.positions[frame + 1])
        return np.frombuffer(self.frames, np.uint8, end - start, start)

    def leave_neighbours(self) -> None:
        """Have the system read what is asked for and nothing around it, from here on."""
        self.frames.madvise(mmap.MADV_RANDOM)

    def read_ahead(self, frames: Array) -> None:
        """Ask the system to read these frames into its cache, in the order of storage, without waiting."""
        begin, end = self.positions[frames].astype(np.int64), self.positions[frames + 1].astype(np.int64)
        for start, stop in merged_ranges(begin, end):
            start -= start % mmap.PAGESIZE
            self.frames.madvise(mmap.MADV_WILLNEED, start, stop - start)

    @cached_property
    def _row_begins(self) -> Array:
        """Where each row of the manifest begins, header first, and the end: int64 [N + 2]. Names may hold newlines."""
        begins, position, quotes = [0], 0, 0
        with contextlib.suppress(OSError), (self.path / MANIFEST_FILE).open("rb") as lines:
            for line in lines:
                position, quotes = position + len(line), quotes + line.count(b'"')
                if quotes % 2 == 0:
                    begins.append(position)
        return np.array(begins)

    def row(self, video: int) -> dict[str, str]:
        """The manifest's row of `video`, found by its position; empty if there is none."""
        begin, end = self._row_begins[video + 1 : video + 3].tolist() if video + 2 < len(self._row_begins) else (0, 0)
        try:
            with (self.path / MANIFEST_FILE).open("rb") as file:
                file.seek(begin)
                text = file.read(end - begin).decode("utf-8", "surrogateescape")
            found = next(csv.reader(io.StringIO(text, newline="")), [])
        except (OSError, csv.Error):
            found = []
        return dict(zip(MANIFEST, found, strict=False))

    def name_of(self, video: int) -> str:
        """The file that `video` was made of, as far as the manifest tells."""
        source = self.row(video).get("path", "")
        plain = " ".join(source.encode("utf-8", "backslashreplace").decode().split())
        return f"{plain} ({self.path}, video {video})" if plain else f"{self.path}: video {video}"


def read_sidecar(path: Path) -> dict[str, Any]:
    """`info.json` of a set.

    **Raises:** `UserError` if it cannot be read or lacks something.
    """
    try:
        values = json.loads((path / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / INFO} cannot be read ({error}): copy the set again or {AGAIN}") from error
    for name, kind in INFO_TYPES.items():
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            raise UserError(f"{path / INFO} has no {kind.__name__} named {name!r}; {AGAIN}")
    if values.get("format") != FORMAT or values.get("layout") != LAYOUT:
        raise UserError(f"{path / INFO} is of format {values.get('format')}, {values.get('layout')}: {AGAIN}")
    if values["num_samples"] < 1 or not len(values["mean"]) == len(values["std"]) == values["channels"]:
        raise UserError(f"{path / INFO} contradicts itself: {AGAIN}")
    return values


def open_videos(path: Path) -> VideoSet:
    """Open a prepared set and check its tables; no frame is read (`data_prep.verify` does that).

    **Raises:** `UserError` for a set that is incomplete, truncated or contradicts itself.
    """
    sidecar = read_sidecar(path)
    videos, positions = _table(path / VIDEOS, VIDEO), _table(path / POSITIONS, np.dtype("<u8"))
    size = os.path.getsize(path / FRAMES) if (path / FRAMES).is_file() else -1
    if size != sidecar["bytes"]:
        found = f"has {size} bytes" if size >= 0 else "is not there"
        raise UserError(f"{path / FRAMES} {found}, info.json says {sidecar['bytes']}: copy the set again or {AGAIN}")
    _check_tables(path, sidecar, videos, positions)
    with (path / FRAMES).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return VideoSet(path, info_of(sidecar), sidecar, videos, positions, mapped)


def _table(path: Path, dtype: np.dtype[Any]) -> Array:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the set again or {AGAIN}") from error
    if table.dtype != dtype or table.ndim != 1:
        raise UserError(f"{path} holds {table.dtype} in {table.ndim} dimensions: {AGAIN}")
    return table


def _check_tables(path: Path, sidecar: dict[str, Any], videos: Array, positions: Array) -> None:
    frames = np.asarray(videos["frames"], np.int64)
    good = (
        len(videos) == sidecar["num_samples"]
        and len(positions) == sidecar["num_frames"] + 1
        and int(frames.sum()) == sidecar["num_frames"]
        and bool((frames > 0).all())
        and np.array_equal(videos["first"], np.cumsum(frames) - frames)
        and int(positions[0]) == 0
        and int(positions[-1]) == sidecar["bytes"]
        and bool((positions[1:] > positions[:-1]).all())
        and bool((videos["label"] >= UNLABELLED).all() and (videos["label"] < len(sidecar["classes"])).all())
    )
    if not good:
        raise UserError(f"{path / VIDEOS} and {POSITIONS} do not fit {INFO}: copy the set again or {AGAIN}")


def copied_file(data: VideoSet, video: int) -> Path:
    """The file of `video` for a GPU's decoder.

    **Raises:** `UserError` if the set has none, it is not there, or the manifest leads out of the set's folder.
    """
    name = data.row(video).get("copy", "")
    if not name:
        raise UserError(f"{data.name_of(video)} has no copy for a GPU's decoder; prepare the set with --copy")
    return file_within(data, name)


def file_within(data: VideoSet, name: str) -> Path:
    """The file that the manifest of a set calls `name`.

    **Raises:** `UserError` if it is not there, or outside the set's folder.
    """
    root, path = data.path.resolve(), (data.path / name).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{data.path / MANIFEST_FILE} names {name!r}, which lies outside the set: {AGAIN}")
    if not path.is_file():
        raise UserError(f"{path} is not there, but {data.path / MANIFEST_FILE} names it: copy the set again or {AGAIN}")
    return path
