"""The system's ffmpeg: what a video file holds, its frames at a constant rate, and a copy that GPUs decode.

Files are named to ffmpeg as `file:…` and it may open no other protocol: a playlist that is called .mp4 reaches nothing.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.video_facts import Stream, stream_of
from data_prep.video_filters import Treatment, copy_filters, frame_filters
from data_prep.video_words import LEVEL, Report, plain_words, read_report
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

TOOLS = ("ffmpeg", "ffprobe")
OLDEST = (5, 1)  # the first with -fps_mode
PROBE_SECONDS = 300.0
NVDEC_CODECS = ("av1", "h264", "hevc", "mpeg4", "vp8", "vp9")
NVDEC_PIXELS = ("yuv420p",)
CONTAINERS = (".mkv", ".mov", ".mp4", ".webm")
GOP = 16  # frames between key frames of what we encode for NVDEC: a short way to any frame
MAX_SIDE = 65535
MAX_PIXELS = 100_000_000  # of a picture, as for images: refused by the header, before memory is taken for it
TOO_LARGE = b"exceeds specified max pixel count"  # what ffmpeg says then
PACKET = "packet=stream_index,pts_time,dts_time,duration_time,flags"
MARGIN_SECONDS = 5.0  # beyond what is stored, whose packets are looked at: enough to know that a video goes on
MOST_WORDS = 1 << 24
# DALI makes every video RGB by BT.601's matrix, on CPUs and GPUs alike; ffmpeg does so where the file says nothing.
DALI_MATRICES = ("smpte170m", "bt470bg", "unknown", "unspecified")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
DISK_PROBE = 1 << 20  # bytes
USUAL = Treatment()


class Otherwise(Exception):
    """Decoding found that a video has to be decoded with another `treatment`."""

    def __init__(self, treatment: Treatment) -> None:
        super().__init__(treatment)
        self.treatment = treatment


def check_tools() -> str:
    """The version of ffmpeg.

    **Raises:** `UserError` if ffmpeg or ffprobe is not there, does not run or is too old.
    """
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on PATH; install it, e.g. apt-get install ffmpeg")
    first = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True).stdout.split("\n")[0]
    version = first.removeprefix("ffmpeg version ").split(" ")[0]
    number = tuple(int(part) for part in version.lstrip("n").split("-")[0].split(".")[:2] if part.isdigit())
    if number and number < OLDEST:
        raise UserError(f"ffmpeg is version {version}, expected 5.1 or newer; install a newer one")
    return version or "unknown"


# ------------------------------------------------------------------------------------------------------- looking
def probe(path: str, seconds: float = 0.0) -> Stream:
    """What `path` holds.

    **Args:** `seconds`: look at the times of the pictures of the first so many, and a little more; 0 = all.

    **Raises:** `ValueError` with the reason for whatever is no video of a known codec, or ends before it should.
    """
    if not Path(path).is_file():
        raise ValueError("the file is not there")
    if not Path(path).stat().st_size:
        raise ValueError("the file is empty")
    command = ["ffprobe", "-v", "error", "-protocol_whitelist", "file", "-max_pixels", str(MAX_PIXELS)]
    command += ["-of", "json", "-show_streams", "-show_format", "-show_packets", "-show_entries", PACKET]
    limit = seconds + MARGIN_SECONDS if seconds else 0.0
    command += ["-read_intervals", f"%+{limit:g}"] if limit else []
    done = subprocess.run([*command, f"file:{path}"], capture_output=True, timeout=PROBE_SECONDS, process_group=0)
    if TOO_LARGE in done.stderr:
        raise ValueError(f"its pictures have more than {MAX_PIXELS} pixels; shrink it first")
    found = json.loads(done.stdout or b"{}")
    if done.returncode or not found.get("streams"):
        raise ValueError(f"ffprobe cannot read it ({plain_words(done.stderr) or 'without a word'})")
    if found["format"].get("format_name", "").endswith(("image2", "_pipe")):
        raise ValueError(f"it is an image ({found['format']['format_name']}), not a video")
    return stream_of(found, limit)


# ------------------------------------------------------------------------------------------------------- decoding
def stored_size(stream: Stream, short_side: int) -> tuple[int, int]:
    """Height and width of stored frames: the shorter side at most `short_side` (0 = as it is), both even."""
    ratio = min(short_side / min(stream.height, stream.width), 1.0) if short_side else 1.0
    height, width = (max(2 * round(side * ratio / 2), 2) for side in (stream.height, stream.width))
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"a side of {max(height, width)} pixels, more than {MAX_SIDE}; use --short_side")
    return height, width


def _input(path: str, treatment: Treatment) -> list[str]:
    return [
        "ffmpeg",
        *LEVEL,
        "-nostats",
        "-nostdin",
        "-y",
        "-protocol_whitelist",
        "file,pipe",
        "-threads",
        "1",
        "-max_pixels",  # a stream may grow after its header
        str(MAX_PIXELS),
        *(("-reinit_filter", "0") if treatment.fit else ()),  # else every change begins the filters anew
        "-i",
        f"file:{path}",
        "-map",
        "0:V:0",
    ]


def frames(
    path: str,
    size: tuple[int, int],
    fps: Fraction,
    *,
    stride: int = 1,
    seconds: float = 0.0,
    timeout: float = 0.0,
    stream: Stream | None = None,
    treatment: Treatment = USUAL,
) -> Iterator[Array]:
    """The frames of a video, one after the other: uint8 RGB [h, w, 3], `size` being (h, w).

    **Args:** `fps`: constant rate that frames are repeated or left out for. `stride`: every how many-th of them.
    `seconds`: no more than the first so many; 0 = all. `timeout`: seconds that decoding may take; 0 = any. `stream`:
    what `probe` said of it.

    **Raises:** `ValueError` with ffmpeg's first words if it reports any damage, or takes too long; `Otherwise`, at the
    end, if the frames are not to be used and another treatment is needed.
    """
    filters = frame_filters(size, fps, treatment, stride=stride, seconds=seconds)
    command = [*_input(path, treatment), "-vf", filters, "-fps_mode", "passthrough"]
    count, late = size[0] * size[1] * 3, stream is not None and stream.timing.leading
    with _running([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"], timeout, late=late) as (output, reports):
        while len(data := output.read(count)) == count:
            yield np.frombuffer(data, np.uint8).reshape(*size, 3)
    if stream is None:
        return
    fit = stream.coded if reports[0].changes else None
    start = stream.start if reports[0].lost_beginning else 0.0
    needed = replace(treatment, fit=treatment.fit or fit, start=treatment.start or start)
    if needed != treatment:
        raise Otherwise(needed)


@contextmanager
def _running(command: Sequence[str], timeout: float, *, late: bool = False) -> Iterator[tuple[Any, list[Report]]]:
    """Standard output of `command`, which is killed if the block is left early or it takes too long, and a list that
    holds its report afterwards; `late`: see `read_report`."""
    reports: list[Report] = []
    with tempfile.TemporaryFile() as words:
        # In a group of its own: Ctrl-C is for us, and must not look like a damaged video.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, bufsize=1 << 20, process_group=0)
        killed = threading.Event()
        timer = threading.Timer(timeout, _stop, (process, killed))
        if timeout:
            timer.start()
        try:
            assert process.stdout is not None
            yield process.stdout, reports
            process.wait()
            words.seek(0)
            report = words.read(MOST_WORDS)
            if killed.is_set():
                raise ValueError(f"decoding took more than {timeout:g} s")
            if process.returncode in (-signal.SIGKILL, -signal.SIGTERM):  # says nothing about the video
                raise MemoryError("ffmpeg was killed")
            reports.append(read_report(report, late=late))
            if process.returncode or reports[0].damage:
                raise ValueError(f"ffmpeg: {reports[0].damage or 'without a word'}")
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def _stop(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    process.kill()


# ------------------------------------------------------------------------------------------------------- copying
def fits_nvdec(path: str, stream: Stream) -> bool:
    """Whether a GPU decodes this very file, frame by frame as `frames` gives them, and in their colours."""
    known = stream.codec in NVDEC_CODECS and stream.pixel_format in NVDEC_PIXELS
    colours = stream.matrix in DALI_MATRICES and not stream.full_range and not stream.hdr
    whole = stream.plain and stream.timing.exact and stream.timing.even(stream.fps)
    return known and colours and whole and Path(path).suffix.lower() in CONTAINERS


def encode_h264(
    path: str,
    target: Path,
    size: tuple[int, int],
    fps: Fraction,
    seconds: float,
    timeout: float,
    *,
    stream: Stream | None = None,
    treatment: Treatment = USUAL,
) -> None:
    """Write `path` as H.264 that a GPU decodes: frame k is that of `frames`, 4:2:0 in BT.601, a key frame every 16.

    **Raises:** `ValueError` with ffmpeg's words; `OSError` if it is the disk that does not take it.
    """
    filters = copy_filters(size, fps, treatment, seconds)
    command = [*_input(path, treatment), "-vf", filters, "-fps_mode", "passthrough"]
    coding = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20", "-g", str(GOP), "-threads", "1"]
    late = stream is not None and stream.timing.leading
    command += [*coding, "-movflags", "+faststart", "-f", "mp4", f"file:{target}"]
    try:
        with _running(command, timeout, late=late) as (output, _):
            output.read()
    except ValueError as error:
        _blame_the_disk(target.parent, str(error))
        raise


def _blame_the_disk(folder: Path, words: str) -> None:
    """**Raises:** `OSError` if ffmpeg's words are about a disk that takes no more, or `folder` does take no more."""
    for code in DISK_ERRORS:
        if os.strerror(code) in words:
            raise OSError(code, os.strerror(code), str(folder))
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(DISK_PROBE))
        probe.flush()
        os.fsync(probe.fileno())


def pick_frames(path: Path, numbers: Sequence[int], size: tuple[int, int]) -> tuple[list[Array], int]:
    """Some frames of a copy by number, as DALI shows them: uint8 RGB [h, w, 3] each; and how many there are.

    **Raises:** `ValueError` if it does not decode, or has fewer frames.
    """
    chosen = "+".join(f"eq(n\\,{number})" for number in numbers)
    filters = f"select={chosen},scale={size[1]}:{size[0]}:in_color_matrix=bt601:flags=bicubic+accurate_rnd"
    command = [*_input(str(path), USUAL), "-vf", filters, "-fps_mode", "passthrough", "-f", "rawvideo"]
    with _running([*command, "-pix_fmt", "rgb24", "pipe:1"], 0.0) as (output, reports):
        data = output.read()
    pictures = np.frombuffer(data, np.uint8).reshape(-1, *size, 3)
    if len(pictures) != len(numbers):
        raise ValueError(f"it has {reports[0].decoded} frames, expected more than {max(numbers)}")
    return list(pictures), reports[0].decoded
