"""The system's ffmpeg: what a video file holds, its frames at a constant rate, and a copy that GPUs decode.

Files are named to ffmpeg as `file:…` and it may open no other protocol: a playlist that is called .mp4 reaches nothing.
"""

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

TOOLS = ("ffmpeg", "ffprobe")
OLDEST = (5, 1)  # the first with -fps_mode
PROBE_SECONDS = 60.0
PROGRESSIVE = ("progressive", "unknown", "")
NVDEC_CODECS = ("av1", "h264", "hevc", "mpeg4", "vp8", "vp9")
NVDEC_PIXELS = ("yuv420p", "yuvj420p")
CONTAINERS = (".mkv", ".mov", ".mp4", ".webm")
GOP = 16  # frames between key frames of what we encode for NVDEC: a short way to any frame
MAX_SIDE = 65535
MAX_PIXELS = 100_000_000  # of a picture, as for images: refused by the header, before memory is taken for it
TOO_LARGE = b"exceeds specified max pixel count"  # what ffmpeg says then
MAX_FPS = 1000
RATE_TOLERANCE = 0.001


@dataclass(frozen=True)
class Stream:
    """The first video stream of a file. Sides are those of the picture as it is shown: upright, square pixels."""

    codec: str
    pixel_format: str
    height: int
    width: int
    fps: Fraction  # the average
    seconds: float  # 0 = unknown
    plain: bool  # constant rate, progressive, upright, square pixels: frame k of the file is frame k of the stream


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
def probe(path: str) -> Stream:
    """What `path` holds.

    **Raises:** `ValueError` with the reason for whatever is no video of a known codec.
    """
    if not Path(path).is_file():
        raise ValueError("the file is not there")
    if not Path(path).stat().st_size:
        raise ValueError("the file is empty")
    command = ["ffprobe", "-v", "error", "-protocol_whitelist", "file", "-max_pixels", str(MAX_PIXELS)]
    command += ["-of", "json", "-show_streams", "-show_format"]
    done = subprocess.run([*command, f"file:{path}"], capture_output=True, timeout=PROBE_SECONDS, process_group=0)
    if TOO_LARGE in done.stderr:
        raise ValueError(f"its pictures have more than {MAX_PIXELS} pixels; shrink it first")
    found = json.loads(done.stdout or b"{}")
    if done.returncode or not found.get("streams"):
        raise ValueError(f"ffprobe cannot read it ({_plain_words(done.stderr)})")
    if found["format"].get("format_name", "").endswith(("image2", "_pipe")):
        raise ValueError(f"it is an image ({found['format']['format_name']}), not a video")
    streams = [stream for stream in found["streams"] if _is_video(stream)]
    if not streams:
        kinds = sorted({str(stream.get("codec_type", "unknown")) for stream in found["streams"]})
        raise ValueError(f"it has no video stream, only {', '.join(kinds)}")
    alone = len(streams) == len(found["streams"])  # else the file's length may be the sound's
    return _stream(streams[0], found["format"] if alone else {})


def _is_video(stream: dict[str, Any]) -> bool:
    return stream.get("codec_type") == "video" and not stream.get("disposition", {}).get("attached_pic")


def _stream(stream: dict[str, Any], container: dict[str, Any]) -> Stream:
    codec = stream.get("codec_name", "unknown")
    if codec in ("unknown", "none") or not stream.get("width"):
        raise ValueError(f"this ffmpeg cannot decode its codec ({stream.get('codec_tag_string', codec)})")
    average, base = _fraction(stream.get("avg_frame_rate")), _fraction(stream.get("r_frame_rate"))
    fps = average or base
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"its frame rate is {float(fps):g}, expected up to {MAX_FPS}")
    square = _fraction(stream.get("sample_aspect_ratio", "1:1").replace(":", "/")) or Fraction(1)
    height, width = int(stream["height"]), max(round(int(stream["width"]) * square), 1)
    angle = next((int(data["rotation"]) for data in stream.get("side_data_list", ()) if "rotation" in data), 0)
    if angle % 180:
        height, width = width, height
    steady = abs(float(fps - (base or fps))) <= RATE_TOLERANCE * float(fps)
    plain = steady and square == 1 and angle == 0 and stream.get("field_order", "") in PROGRESSIVE
    seconds = _seconds(stream, container)
    return Stream(codec, stream.get("pix_fmt", "unknown"), height, width, fps, seconds, plain)


def _seconds(stream: dict[str, Any], container: dict[str, Any]) -> float:
    tagged = next((text for name, text in stream.get("tags", {}).items() if name.upper().startswith("DURATION")), "")
    hours, minutes, seconds = ([float(part) for part in tagged.split(":")] + [0.0] * 3)[:3] if tagged else (0.0,) * 3
    return float(stream.get("duration") or 3600 * hours + 60 * minutes + seconds or container.get("duration") or 0)


def _fraction(text: str | None) -> Fraction:
    """`30000/1001`; 0 for what is none."""
    above, _, below = (text or "0").partition("/")
    return Fraction(int(above), int(below or 1)) if int(below or 1) else Fraction(0)


def _first_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[0][:200] if lines else "without a word"


# ------------------------------------------------------------------------------------------------------- decoding
def stored_size(stream: Stream, short_side: int) -> tuple[int, int]:
    """Height and width of stored frames: the shorter side at most `short_side` (0 = as it is), both even."""
    ratio = min(short_side / min(stream.height, stream.width), 1.0) if short_side else 1.0
    height, width = (max(2 * round(side * ratio / 2), 2) for side in (stream.height, stream.width))
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"a side of {max(height, width)} pixels, more than {MAX_SIDE}; use --short_side")
    return height, width


def _input(path: str) -> list[str]:
    return [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-y",
        "-protocol_whitelist",
        "file,pipe",
        "-threads",
        "1",
        "-max_pixels",  # a stream may grow after its header
        str(MAX_PIXELS),
        "-i",
        f"file:{path}",
    ]


def _filters(size: tuple[int, int], fps: Fraction, stride: int) -> str:
    """Deinterlaced where a frame says that it is interlaced, at a constant rate, every `stride`-th frame, resized.

    ffmpeg turns rotated videos upright before these.
    """
    steps = ["bwdif=mode=send_frame:deint=interlaced", f"fps={fps}"]
    if stride > 1:
        steps.append(f"select=not(mod(n\\,{stride}))")
    return ",".join([*steps, f"scale={size[1]}:{size[0]}:flags=bicubic+accurate_rnd+full_chroma_inp"])


def frames(
    path: str, size: tuple[int, int], fps: Fraction, *, stride: int = 1, seconds: float = 0.0, timeout: float = 0.0
) -> Iterator[Array]:
    """The frames of a video, one after the other: uint8 RGB [h, w, 3], `size` being (h, w).

    **Args:** `fps`: constant rate that frames are repeated or left out for. `stride`: every how many-th of them.
    `seconds`: no more than the first so many; 0 = all. `timeout`: seconds that decoding may take; 0 = any.

    **Raises:** `ValueError` with ffmpeg's first words if it reports any damage, or takes too long.
    """
    limit = ["-t", f"{seconds:g}"] if seconds else []
    command = [*_input(path), "-map", "0:V:0", *limit, "-vf", _filters(size, fps, stride), "-fps_mode", "passthrough"]
    count = size[0] * size[1] * 3
    with _running([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"], timeout) as output:
        while len(data := output.read(count)) == count:
            yield np.frombuffer(data, np.uint8).reshape(*size, 3)


@contextmanager
def _running(command: Sequence[str], timeout: float) -> Iterator[Any]:
    """Standard output of `command`, which is killed if the block is left early or it takes too long."""
    with tempfile.TemporaryFile() as words:
        # In a group of its own: Ctrl-C is for us, and must not look like a damaged video.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, bufsize=1 << 20, process_group=0)
        late = threading.Event()
        timer = threading.Timer(timeout, _stop, (process, late))
        if timeout:
            timer.start()
        try:
            assert process.stdout is not None
            yield process.stdout
            process.wait()
            words.seek(0)
            report = words.read(1 << 16)
            if late.is_set():
                raise ValueError(f"decoding took more than {timeout:g} s")
            if process.returncode or report.strip():
                raise ValueError(f"ffmpeg: {_plain_words(report)}")
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def _stop(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    process.kill()


def _plain_words(report: bytes) -> str:
    """ffmpeg's first line without its own memory addresses, which differ from run to run."""
    line = _first_line(report)
    return line.partition("] ")[2] if line.startswith("[") else line


# ------------------------------------------------------------------------------------------------------- copying
def fits_nvdec(path: str, stream: Stream) -> bool:
    """Whether a GPU decodes this very file, frame by frame as `frames` gives them."""
    known = stream.codec in NVDEC_CODECS and stream.pixel_format in NVDEC_PIXELS
    if not known or not stream.plain or Path(path).suffix.lower() not in CONTAINERS:
        return False
    return abs(_count_packets(path) - stream.seconds * float(stream.fps)) <= 1.5  # Matroska's rates are only nominal


def _count_packets(path: str) -> int:
    command = ["ffprobe", "-v", "error", "-protocol_whitelist", "file", "-select_streams", "V:0", "-count_packets"]
    command += ["-show_entries", "stream=nb_read_packets", "-of", "csv=p=0", f"file:{path}"]
    done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, process_group=0)
    number = done.stdout.decode("ascii", "replace").strip().strip(",")
    return int(number) if number.isdecimal() else 0


def encode_h264(path: str, target: Path, size: tuple[int, int], fps: Fraction, seconds: float, timeout: float) -> None:
    """Write `path` as H.264 that a GPU decodes: 4:2:0, constant rate, a key frame every 16.

    **Raises:** `ValueError` with ffmpeg's words.
    """
    limit = ["-t", f"{seconds:g}"] if seconds else []
    command = [*_input(path), "-map", "0:V:0", *limit, "-vf", _filters(size, fps, 1)]
    coding = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20", "-g", str(GOP), "-threads", "1"]
    with _running([*command, *coding, "-movflags", "+faststart", "-f", "mp4", f"file:{target}"], timeout) as output:
        output.read()
