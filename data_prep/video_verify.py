"""Check a prepared video set: tables, manifest, sha256 of every file, and that every frame decodes at its size.

Of sets with --copy, the copies of up to `COMPARED` videos are decoded as DALI does it, and some of their frames are
compared with the stored ones.
"""

import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.ffmpeg import pick_frames
from data_prep.sets import byte_bar, progress_bar, read_csv
from data_prep.verify_pixels import decode_jpeg
from fasthpm.data.labels import count_unlabelled, counts_of
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array
from fasthpm.data.video.prepared import (
    AGAIN,
    INFO,
    MANIFEST,
    MANIFEST_FILE,
    VideoSet,
    copied_file,
    file_within,
    open_videos,
)
from fasthpm.errors import UserError
from fasthpm.files import file_hash

COMPARED = 64
BLOCK = 8  # pixels
MOST_SHIFT = 4.0  # levels by which the mean colours of blocks may differ on average
MOST_APART = 20.0  # mean difference of levels: two encodings of one picture
SURELY_NEARER = 1.5


def verify_videos(path: Path, num_workers: int = 0) -> VideoSet:
    """Check everything; returns the set.

    **Raises:** `UserError` at the first thing that does not match.
    """
    data = open_videos(path)
    _check_counts(data)
    _check_hashes(data)
    _check_manifest(data)
    _check_frames(data, count_workers(num_workers))
    _check_copies(data, count_workers(num_workers))
    return data


def compared_copies(data: VideoSet) -> Array:
    """The videos whose copies are compared, evenly spread: int64 [up to COMPARED]; none where there is no ffmpeg."""
    copied = np.flatnonzero(data.videos["copied"])
    if shutil.which("ffmpeg") is None or not len(copied):
        return copied[:0]
    return copied[np.linspace(0, len(copied) - 1, min(len(copied), COMPARED)).astype(np.int64)]


def _check_counts(data: VideoSet) -> None:
    labels = data.videos["label"]
    if counts_of(labels, len(data.info.classes)) != data.sidecar["counts"]:
        raise UserError(f"{data.path / INFO}: videos per class differ from its counts: {AGAIN}")
    if count_unlabelled(labels) != data.sidecar.get("num_unlabelled", 0):
        raise UserError(f"{data.path / INFO}: unlabelled videos differ from its num_unlabelled: {AGAIN}")


def _check_hashes(data: VideoSet) -> None:
    hashes = data.sidecar["sha256"]
    with byte_bar(data.sidecar["bytes"], "hash") as bar:
        for name, expected in hashes.items():
            if Path(name).name != name or not (data.path / name).is_file():
                raise UserError(f"{data.path / INFO} names {name!r}, which is not there: copy the set again or {AGAIN}")
            if file_hash(data.path / name, bar.update) != expected:
                raise UserError(f"{data.path / name} has another sha256 than info.json says: copy it again or {AGAIN}")


def _check_manifest(data: VideoSet) -> None:
    """Rows fit the table; files that are named are there and within the set; untouched ones have the source's hash."""
    rows = list(read_csv(data.path / MANIFEST_FILE))
    if not rows or rows[0] != list(MANIFEST) or len(rows) != len(data.videos) + 1:
        raise UserError(f"{data.path / MANIFEST_FILE} has {len(rows)} lines, expected {len(data.videos) + 1}: {AGAIN}")
    for video, (cells, known) in enumerate(zip(rows[1:], data.videos, strict=True)):
        row = dict(zip(MANIFEST, cells, strict=False))
        if [row.get(name) for name in ("frames", "height", "width", "label")] != [
            str(known[name]) for name in ("frames", "height", "width", "label")
        ]:
            raise UserError(f"{data.path / MANIFEST_FILE} line {video + 2} differs from videos.npy: {AGAIN}")
        if known["copied"]:
            if not row.get("copy"):
                raise UserError(f"{data.path / MANIFEST_FILE} line {video + 2} lacks the copy's name: {AGAIN}")
            file_within(data, row["copy"])


def _check_frames(data: VideoSet, num_workers: int) -> None:
    """Decode every frame, video by video, in parallel."""
    with ThreadPoolExecutor(num_workers) as pool, progress_bar(len(data.videos), "decode", "video") as bar:
        for video, bad in enumerate(pool.map(lambda video: _undecodable(data, video), range(len(data.videos)))):
            bar.update()
            if bad >= 0:
                raise UserError(f"{data.name_of(video)}: frame {bad} does not decode: copy the set again or {AGAIN}")


def _undecodable(data: VideoSet, video: int) -> int:
    """The first frame of a video that is no sound JPEG of the video's size, or -1."""
    row = data.videos[video]
    size = (int(row["width"]), int(row["height"]))
    for frame in range(int(row["frames"])):
        try:
            decode_jpeg(data.jpeg(int(row["first"]) + frame).tobytes(), size)
        except Exception:  # decoders raise nearly anything for damaged data
            return frame
    return -1


# ------------------------------------------------------------------------------------------------------- copies
def _check_copies(data: VideoSet, num_workers: int) -> None:
    chosen = compared_copies(data)
    with ThreadPoolExecutor(num_workers) as pool, progress_bar(len(chosen), "compare copies", "video") as bar:
        for video, why in zip(chosen, pool.map(lambda video: _difference(data, int(video)), chosen), strict=True):
            bar.update()
            if why:
                raise UserError(f"{data.name_of(int(video))}: its copy {why}: copy the set again or {AGAIN}")


def _difference(data: VideoSet, video: int) -> str:
    """How the copy of `video` differs from its stored frames; empty if it does not."""
    row, path = data.videos[video], copied_file(data, video)
    count, first, size = int(row["frames"]), int(row["first"]), (int(row["height"]), int(row["width"]))
    some = sorted({0, count // 2, count - 1})
    try:
        pictures, found = pick_frames(path, [frame * data.stride for frame in some], size)
    except ValueError as error:
        return f"does not decode ({error})"
    if not (count - 1) * data.stride < found <= count * data.stride + 1:
        return f"has {found} frames, expected {(count - 1) * data.stride + 1} to {count * data.stride}"
    for frame, picture in zip(some, pictures, strict=True):
        near = range(max(frame - 1, 0), min(frame + 2, count))
        off = {other: picture.astype(np.int16) - _stored(data, first + other) for other in near}
        far = {other: float(np.abs(values).mean()) for other, values in off.items()}
        if far[frame] > MOST_APART or far[frame] > min(far.values()) + SURELY_NEARER:
            return f"has other frames than those that are stored (frame {frame})"
        shift = _shift(off[frame])
        if shift > MOST_SHIFT:
            return f"has other colours than its stored frames, by {shift:.0f} of 255 levels (frame {frame})"
    return ""


def _shift(off: Array) -> float:
    """How far colours differ, levels: of blocks' means, in which noise and edges are gone. `off`: int16 [h, w, 3]."""
    height, width = (max(side // BLOCK, 1) for side in off.shape[:2])
    rows, columns = (
        np.linspace(0, side, count, endpoint=False).astype(int)
        for side, count in zip(off.shape[:2], (height, width), strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(off.astype(np.int64), rows, 0), columns, 1)
    areas = np.diff(np.r_[rows, off.shape[0]])[:, None] * np.diff(np.r_[columns, off.shape[1]])
    return float(np.abs(sums / areas[..., None]).mean())


def _stored(data: VideoSet, frame: int) -> Array:
    """A stored frame: int16 [h, w, 3]."""
    return np.asarray(Image.open(io.BytesIO(data.jpeg(frame).tobytes())).convert("RGB")).astype(np.int16)
