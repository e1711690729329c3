"""Check a prepared video set: tables, manifest, sha256 of every file, and that every frame decodes at its size."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.sets import byte_bar, progress_bar, read_csv
from data_prep.verify_pixels import decode_jpeg
from fasthpm.data.labels import count_unlabelled, counts_of
from fasthpm.data.options import count_workers
from fasthpm.data.video.prepared import AGAIN, INFO, MANIFEST, MANIFEST_FILE, VideoSet, copied_file, open_videos
from fasthpm.errors import UserError
from fasthpm.files import file_hash


def verify_videos(path: Path, num_workers: int = 0) -> VideoSet:
    """Check everything; returns the set.

    **Raises:** `UserError` at the first thing that does not match.
    """
    data = open_videos(path)
    _check_counts(data)
    _check_hashes(data)
    _check_manifest(data)
    _check_frames(data, count_workers(num_workers))
    return data


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
            copied_file(data, video)


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
