"""`prepare`: videos into a prepared set of JPEG frames (`fasthpm.data.video.prepared`), resumable, in bounded memory.

As with images (`writer.py`), processes read and encode, this one appends what comes back in order to an unfinished file
and a journal beside the output. The bytes depend on the videos, the options and ffmpeg's version, not on the number of
processes or on kills. The folder appears under its name when all is complete.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Stored, WriteOptions, check_opencv, encode
from data_prep.ffmpeg import TOOLS, Otherwise, check_tools, encode_h264, fits_nvdec, frames, probe, stored_size
from data_prep.partial import Chunk, Job, PartFile, locked, readable_write_errors
from data_prep.plan import count_allowed, package_versions, refuse_changed, stored_order
from data_prep.pool import Work, append_all, become_worker, reason_of
from data_prep.samples import Files
from data_prep.sets import write_csv
from data_prep.sidecars import statistics
from data_prep.video_facts import COMPLETE, Stream
from data_prep.video_filters import Treatment, treatment_of
from fasthpm import __version__
from fasthpm.data.labels import count_unlabelled, counts_of
from fasthpm.data.sampling import Array
from fasthpm.data.sources import is_video_set
from fasthpm.data.video import prepared
from fasthpm.data.video.prepared import FORMAT, LAYOUT, MANIFEST, VIDEO
from fasthpm.errors import UserError
from fasthpm.files import check_above, file_hash, fsync, read_json, write_json

FEWEST_FRAMES = 2
COPIES = "videos"
METHOD = 2  # raised when the same options give other frames
# Errors of the machine, not of the video that is being read: a disk that takes no more, too many files or processes.
OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class VideoOptions:
    """What is stored of each video."""

    short_side: int = 256  # larger videos are shrunk to it; 0 = never
    frame_stride: int = 2
    fps: float = 0.0  # 0 = each video's own average
    jpeg_quality: int = 90
    min_frames: int = 0  # of a video at its rate, before frame_stride
    max_seconds: float = 120.0
    copy: bool = False
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        self._check("short_side", self.short_side == 0 or self.short_side >= 16, "0 (off), or 16 or more")
        self._check("frame_stride", self.frame_stride >= 1, "1 (every frame) or more")
        self._check("fps", self.fps == 0 or 0.1 <= self.fps <= 240, "0 (its own), or 0.1 to 240")
        self._check("jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100")
        self._check("min_frames", self.min_frames >= 0, "0 (any) or more")
        self._check("max_seconds", self.max_seconds > 0, "more than 0")
        self._check("seed", self.seed >= 0, "0 or more")
        self._check("timeout", self.timeout > 0, "more than 0")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")


class FramePack(PartFile):
    """`frames.bin` in the making: JPEG after JPEG from the first byte on."""

    def __init__(self, path: Path, num_listed: int) -> None:
        super().__init__(path, num_listed)
        self.rows_path, self.offset = path.parent.parent / "frames.rows", 0
        path.parent.mkdir(exist_ok=True)

    def _place(self, size: int) -> int:
        at, self.offset = self.offset, self.offset + size
        return at

    def finish(self) -> Array:
        """The records; the file is whole and on the disk. May be repeated."""
        self._open()
        self.sync()
        self.close()
        return self.records()


# ------------------------------------------------------------------------------------------------------- one video
def read_video(path: str, options: VideoOptions, copy_to: Path | None) -> tuple[list[Stored], dict[str, Any]]:
    """The frames to store of a video, encoded, and what the manifest says of it.

    **Raises:** `ValueError` and `OSError` with the reason why it cannot be used.
    """
    stream = probe(path, options.max_seconds)
    size = stored_size(stream, options.short_side)
    fps = Fraction(options.fps).limit_denominator(1001) if options.fps else stream.fps
    stored, treatment = _decode(path, stream, size, fps, options)
    _check_length(len(stored), fps, stream, options)
    fact = {
        "fps": str(fps),
        "seconds": round(stream.seconds, 3),
        "height": size[0],
        "width": size[1],
        "codec": stream.codec,
        "sha256": file_hash(Path(path)),
        "cut": round(_left_out(stream, options), 3),
        "tone_mapped": bool(treatment.hdr),
        "copy": "",
    }
    if copy_to:
        fact["copy"] = _copy(path, stream, treatment, len(stored), fact | {"fps": fps}, options, copy_to)
    return stored, fact


def _decode(
    path: str, stream: Stream, size: tuple[int, int], fps: Fraction, options: VideoOptions
) -> tuple[list[Stored], Treatment]:
    """The encoded frames, and what was needed beyond the usual to get them."""
    treatment, coding = treatment_of(stream), WriteOptions(jpeg_quality=options.jpeg_quality, keep_jpeg=False)
    limits = {"stride": options.frame_stride, "seconds": options.max_seconds, "timeout": options.timeout}
    while True:
        pictures = frames(path, size, fps, **limits, stream=stream, treatment=treatment)  # type: ignore[arg-type]
        try:
            return [encode(picture, coding, 0.0) for picture in pictures], treatment
        except Otherwise as needed:
            treatment = needed.treatment


def _left_out(stream: Stream, options: VideoOptions) -> float:
    """Seconds beyond --max_seconds, at least."""
    length = max(stream.seconds, stream.timing.span + stream.timing.interval)
    return length - options.max_seconds if length > options.max_seconds + 0.5 / float(stream.fps) else 0.0


def _check_length(stored: int, fps: Fraction, stream: Stream, options: VideoOptions) -> None:
    stride, timing = options.frame_stride, stream.timing
    span = (stored - 1) * stride + 1
    if stored < FEWEST_FRAMES:
        kept = "1 frame" if stored == 1 else f"{stored} frames"
        raise ValueError(f"it has {kept} to store, expected {FEWEST_FRAMES} or more")
    promised = min(timing.span + timing.interval if timing.interval else stream.seconds, options.max_seconds)
    if span + stride < COMPLETE * promised * float(fps):
        raise ValueError(f"it ends early: about {span} frames of {promised * float(fps):.0f} can be decoded")
    if span < options.min_frames:
        raise ValueError(f"it has about {span} frames, fewer than --min_frames {options.min_frames}")


def _copy(
    path: str, stream: Stream, treatment: Treatment, stored: int, fact: dict[str, Any], options: VideoOptions, to: Path
) -> str:
    """Put a file that a GPU decodes at `to` (its ending is chosen here); its name within the set."""
    stride, fps = options.frame_stride, fact["fps"]
    count = len(stream.timing.times)
    same = not fact["cut"] and fps == stream.fps and treatment == Treatment()
    kept = same and (stored - 1) * stride < count <= stored * stride and fits_nvdec(path, stream)
    target = to.with_suffix(Path(path).suffix.lower() if kept else ".mp4")
    waiting = target.with_name(f".{target.name}")
    try:
        if kept:
            shutil.copyfile(path, waiting)
        else:
            size = fact["height"], fact["width"]
            limits = options.max_seconds, options.timeout
            encode_h264(path, waiting, size, fps, *limits, stream=stream, treatment=treatment)
        waiting.rename(target)
    finally:
        waiting.unlink(missing_ok=True)  # what is half-written takes room
    return f"{COPIES}/{target.name}"


_source: Any = None
_options = VideoOptions()
_copies: Path | None = None


def _enter_worker(source: Files, options: VideoOptions, copies: Path | None, lock: int) -> None:
    global _source, _options, _copies
    become_worker(lock)
    import cv2

    _source, _options, _copies = source, options, copies
    cv2.setNumThreads(0)


def _encode_video(indices: Array) -> Chunk:
    """A chunk of one video."""
    index = int(indices[0])
    label = int(_source.labels[index])
    try:
        stored, fact = read_video(_source.where(index), _options, _copies / f"{index:08d}" if _copies else None)
    except MemoryError:  # says nothing about the video
        raise
    except OSError as error:
        if error.errno in OURS or error.filename in TOOLS:
            raise
        return Chunk(np.zeros(0, np.int64), np.zeros(0, np.int64), [], [(index, reason_of(error))])
    except Exception as error:  # damaged files bring up nearly anything
        return Chunk(np.zeros(0, np.int64), np.zeros(0, np.int64), [], [(index, reason_of(error))])
    columns = np.full(len(stored), index), np.full(len(stored), label)
    return Chunk(*columns, stored, [], [{"index": index, **fact}])


# ------------------------------------------------------------------------------------------------------- all of them
@dataclass(frozen=True)
class _Task:
    source: Files
    out: Path
    options: VideoOptions
    description: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def rejected(self) -> Path:
        """The list of unusable videos while the set is not there; later it is in the set."""
        return self.out.with_name(f"{self.out.name}.rejected.csv")

    @property
    def job_id(self) -> str:
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


def prepare(
    source: Files,
    out: Path,
    options: VideoOptions,
    *,
    max_rejected: float = 0.0,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Write the folder `out`; returns the content of its info.json, or None if it is there already.

    **Args:** `max_rejected`: how many videos may be unusable, a share of them below 1, a number from 1 on.
    `num_workers`: processes, 0 = all cores.

    **Raises:** `UserError` if `out` is something else or being written, too many videos are unusable, or the disk is
    full; `KeyboardInterrupt` after SIGINT or SIGTERM. The same command then goes on.
    """
    check_opencv()
    version = check_tools()
    _check_output(out)
    task = _Task(source, out, options, _describe(source, options, version))
    with readable_write_errors(out, task.folder), locked(task.folder) as lock:
        pack = FramePack(task.folder / out.name / prepared.FRAMES, len(source))
        job = Job(task.folder, [pack], source.contents())
        try:
            if not job.is_complete(task.description):
                known = read_json(out / prepared.INFO)
                if known.get("job") == task.job_id and not overwrite:
                    refuse_changed(out, known, job.contents)
                    job.discard()
                    return None
                _refuse_existing(out, overwrite)
                _run(task, job, lock, max_rejected, num_workers)
            _publish(task, job)
        finally:
            if not job.has_progress():
                job.discard()
            job.close()
    return read_json(out / prepared.INFO)


def _describe(source: Files, options: VideoOptions, ffmpeg: str) -> dict[str, Any]:
    values: dict[str, Any] = {"files": source.fingerprint(), "root": source.root, "classes": list(source.classes)}
    values["versions"] = {"layout": LAYOUT, "frames": METHOD, "ffmpeg": ffmpeg} | package_versions(
        "numpy", "opencv-python"
    )
    flags = {f"--{name}": value for name, value in dataclasses.asdict(options).items() if name != "timeout"}
    return json.loads(json.dumps(values | flags))


def _check_output(out: Path) -> None:
    check_above(out, "output")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} of output {out.name} does not exist; create it")
    if out.suffix == ".beton" or (out.exists() and not out.is_dir()):
        raise UserError(f"output {out} should be a folder to write; choose another name")
    aside = (
        (out.with_name(f"{out.name}.rejected.csv"), Path.is_dir),
        (out.with_name(f".{out.name}.partial"), Path.is_file),
    )
    for path, taken in aside:
        if taken(path):
            raise UserError(f"{path} stands where preparation has to write; remove it, or choose another output")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"folder {out.parent} of output {out.name} is not writable")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite or not is_video_set(out):
        what = "a prepared set" if is_video_set(out) else "a folder with other things"
        raise UserError(f"output {out} exists, {what}; use --overwrite to replace a prepared set, or another name")


def _run(task: _Task, job: Job, lock: int, max_rejected: float, num_workers: int) -> None:
    order, total = stored_order(task.source, task.options.seed), len(task.source)

    def useless() -> str:
        if job.chunks == total and len(job.rejected) > count_allowed(max_rejected, total):
            return f"all videos were read before, {len(job.rejected)} of them unusable"
        return ""

    job.resume_same(task.description, useless)
    copies = task.folder / task.out.name / COPIES if task.options.copy else None
    if copies:
        copies.mkdir(exist_ok=True)
    setup = (task.source, task.options, copies, lock)
    work = Work(_encode_video, _enter_worker, setup, "videos", "video", "unusable", "--max_seconds")
    append_all(job, work, [(0, order[k : k + 1]) for k in range(job.chunks, total)], total, num_workers)
    _settle_rejected(task, job, max_rejected)
    _finish(task, job)


# ------------------------------------------------------------------------------------------------------- the end
def _settle_rejected(task: _Task, job: Job, max_rejected: float) -> None:
    """List the unusable videos, and stop if they are too many, or all."""
    total, count = len(task.source), len(job.rejected)
    task.rejected.unlink(missing_ok=True)
    allowed = count_allowed(max_rejected, total)
    if count > allowed or count == total:
        _write_rejected(task, job, task.rejected)
    if count == total:
        job.discard()
        raise UserError(f"there is no usable video at all; {task.rejected} says why")
    if count > allowed:
        raise UserError(
            f"{count} of {total} videos cannot be used, --max_rejected {max_rejected:g} allows {allowed}; "
            f"{task.rejected} lists them with reasons: repair or remove them, or raise --max_rejected (nothing is read "
            f"twice)"
        )


def _write_rejected(task: _Task, job: Job, path: Path) -> None:
    write_csv(path, ("path", "reason"), ((task.source.where(i), why) for i, why in sorted(job.rejected)))


def _finish(task: _Task, job: Job) -> None:
    """Write the tables beside the frames, and that all is complete."""
    (pack,) = job.parts
    records, folder = pack.finish(), pack.path.parent
    table = _video_table(records, job.facts)
    ends = (records["image"]["data_ptr"] + records["size"]).astype(np.uint64)
    np.save(folder / prepared.POSITIONS, np.concatenate([np.zeros(1, np.uint64), ends]))
    np.save(folder / prepared.VIDEOS, table)
    write_csv(folder / prepared.MANIFEST_FILE, MANIFEST, _manifest(task, table, job.facts))
    if job.rejected:
        _write_rejected(task, job, folder / "rejected.csv")
    names = (prepared.FRAMES, prepared.POSITIONS, prepared.VIDEOS, prepared.MANIFEST_FILE)
    hashes = {name: file_hash(folder / name) for name in names}
    for name in names:
        fsync(folder / name)
    write_json(folder / prepared.INFO, _info(task, job, table, records) | {"sha256": hashes}, durable=True)
    fsync(folder)
    fsync(job.folder)
    job.plan_publishing([task.out.name], [])


def _video_table(records: Array, facts: list[dict[str, Any]]) -> Array:
    """VIDEO [N]; records and facts are in stored order."""
    indices = np.array([fact["index"] for fact in facts])
    starts = np.flatnonzero(np.r_[True, records["index"][1:] != records["index"][:-1]])
    assert np.array_equal(records["index"][starts], indices)
    table = np.zeros(len(facts), VIDEO)
    table["first"], table["frames"] = starts, np.diff(np.r_[starts, len(records)])
    for name in ("height", "width"):
        table[name] = records["image"][name][starts]
    table["label"], table["copied"] = records["label"][starts], [bool(fact["copy"]) for fact in facts]
    return table


def _manifest(task: _Task, table: Array, facts: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row, fact in zip(table, facts, strict=True):
        values = fact | {"path": task.source.name(fact["index"]), "frames": row["frames"], "label": row["label"]}
        yield tuple(str(values[name]) for name in MANIFEST)


def _info(task: _Task, job: Job, table: Array, records: Array) -> dict[str, Any]:
    totals = job.parts[0].totals
    return {
        "format": FORMAT,
        "layout": LAYOUT,
        "num_samples": len(table),
        "num_frames": len(records),
        "num_rejected": len(job.rejected),
        "num_cut": sum(fact["cut"] > 0 for fact in job.facts),
        "seconds_cut": round(sum(fact["cut"] for fact in job.facts), 3),
        "num_tone_mapped": sum(fact["tone_mapped"] for fact in job.facts),
        **statistics(totals, grey=not totals.coloured),
        "classes": list(task.source.classes),
        "counts": counts_of(table["label"], len(task.source.classes)),
        "num_unlabelled": count_unlabelled(table["label"]),
        "fewest_frames": int(table["frames"].min()),
        "max_height": int(table["height"].max()),
        "max_width": int(table["width"].max()),
        "frame_stride": task.options.frame_stride,
        "bytes": int(records["size"].sum()),
        "options": dataclasses.asdict(task.options),
        "versions": {"fasthpm": __version__, "python": sys.version.split()[0], **task.description["versions"]},
        "job": task.job_id,
        "contents": job.contents,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _publish(task: _Task, job: Job) -> None:
    """Move the folder to its place, wherever that stopped before; an old one goes first."""
    made = task.folder / task.out.name
    if made.exists():
        if task.out.exists():
            shutil.rmtree(task.folder / "old", ignore_errors=True)
            task.out.rename(task.folder / "old")
        made.rename(task.out)
    fsync(task.out.parent)
    job.discard()
