"""The filters that make stored frames of a video's pictures, and files for GPUs' decoders of the same frames."""

import functools
import subprocess
from dataclasses import dataclass
from fractions import Fraction

from data_prep.video_facts import Stream

NEEDED_FOR_HDR = ("zscale", "tonemap")
WHITE = 203  # nits of HDR's plain white (ITU-R BT.2408), which becomes SDR's
PEAK = 1000  # nits that are still told apart
KNEE = 0.7  # of SDR's range: below it nothing is changed
KNOWN_MATRICES = ("bt709", "smpte170m", "bt470bg", "bt2020nc", "bt2020c")


@dataclass(frozen=True)
class Treatment:
    """What a video needs beyond the usual."""

    start: float = 0.0  # seconds from the file's beginning, before which pictures are left out
    fit: tuple[int, int] | None = None  # height and width that all pictures are fitted into, with black borders
    hdr: tuple[str, str, str] | None = None  # transfer, primaries and matrix, to be made SDR


def treatment_of(stream: Stream) -> Treatment:
    """What is known from the start.

    **Raises:** `ValueError` for HDR if this ffmpeg has no filters to make it SDR.
    """
    if not stream.hdr:
        return Treatment()
    missing = [name for name in NEEDED_FOR_HDR if name not in filters_of_ffmpeg()]
    if missing:
        raise ValueError(
            f"it is HDR ({stream.hdr}), and this ffmpeg lacks the filters that make it SDR ({', '.join(missing)}); "
            f"install one with libzimg, or convert it first"
        )
    primaries = stream.primaries if stream.primaries in ("bt709", "bt2020", "smpte432") else "bt2020"
    matrix = stream.matrix if stream.matrix in KNOWN_MATRICES else "bt2020nc"
    return Treatment(hdr=(stream.transfer, primaries, matrix))


@functools.cache
def filters_of_ffmpeg() -> frozenset[str]:
    """The names of all filters that the system's ffmpeg has."""
    listed = subprocess.run(["ffmpeg", "-v", "error", "-filters"], capture_output=True, text=True).stdout
    return frozenset(words[1] for line in listed.splitlines() if len(words := line.split()) > 2)


def frame_filters(
    size: tuple[int, int], fps: Fraction, treatment: Treatment, *, stride: int = 1, seconds: float = 0.0
) -> str:
    """Deinterlaced where a frame says that it is interlaced, at a constant rate, every `stride`-th frame, resized.

    Of `seconds` from the first picture on; 0 = all. ffmpeg turns rotated videos upright before these.
    """
    steps = []
    if treatment.start:
        steps.append(f"trim=start={max(treatment.start - 0.25 / float(fps), 0):.6f}")  # rounded to the file's clock
    if treatment.fit:
        height, width = treatment.fit
        steps.append(f"scale={width}:{height}:force_original_aspect_ratio=decrease:eval=frame")
        steps.append(f"pad={width}:{height}:(ow-iw)/2:(oh-ih)/2:eval=frame")
    steps += ["bwdif=mode=send_frame:deint=interlaced", f"fps={fps}"]
    if seconds:  # ffmpeg's own -t counts from the beginning of the file
        steps.append(f"trim=duration={max(seconds, 1 / float(fps)):.6f}")
    if stride > 1:
        steps.append(f"select=not(mod(n\\,{stride}))")
    steps.append(f"scale={size[1]}:{size[0]}:flags=bicubic+accurate_rnd+full_chroma_inp")
    if treatment.hdr:
        steps += _tone_mapping(*treatment.hdr)
    return ",".join(steps)


def _tone_mapping(transfer: str, primaries: str, matrix: str) -> list[str]:
    """Plain white becomes white, what is darker keeps its brightness, lights above it are squeezed into the rest."""
    return [
        f"zscale=tin={transfer}:pin={primaries}:min={matrix}:t=linear:p=bt709:m=gbr:npl={WHITE}",
        "format=gbrpf32le",
        f"tonemap=mobius:param={KNEE}:desat=0:peak={PEAK / WHITE:.4f}",
        "zscale=tin=linear:pin=bt709:min=gbr:t=bt709:p=bt709:m=gbr:r=pc",
        "format=gbrp",
    ]


def copy_filters(size: tuple[int, int], fps: Fraction, treatment: Treatment, seconds: float = 0.0) -> str:
    """The same frames, each of them, from time 0 on, in the colours that DALI expects of any video: BT.601's."""
    colours = "scale=out_color_matrix=bt601:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp"
    tags = "setparams=colorspace=smpte170m:range=tv"
    return f"{frame_filters(size, fps, treatment, seconds=seconds)},{colours},format=yuv420p,{tags},setpts=N/({fps})/TB"
