"""What a video stream is, from ffprobe's words and its packets' times: headers may lack facts, or state absurd ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from fasthpm.data.sampling import Array

MAX_FPS = 1000
RATE_TOLERANCE = 0.001  # of a header's two rates that say the same
NEAR = 0.02  # of a rate that a header states and one that is measured
STANDARD_NEAR = 0.005
WHOLE = (5, 6, 8, 10, 12, 15, 16, 18, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 240)
NTSC = (Fraction(1000 * rate, 1001) for rate in (24, 30, 60, 120))
STANDARD = tuple(sorted((*map(Fraction, WHOLE), *NTSC, Fraction(25, 2))))
MOST_REPEATS = 2  # stored pictures per picture of the file, at most, for the sake of its fastest stretches
COMPLETE = 0.9  # share of what a file promises, below which it counts as cut off
PROGRESSIVE = ("progressive", "unknown", "")
HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
MATROSKA = "matroska"
STATED = (MATROSKA, "flv", "asf")  # containers whose length is stated by a header; ffmpeg estimates that of others


@dataclass(frozen=True)
class Timing:
    """When the pictures of a stream are shown, in seconds of the file's clock, as far as its packets were read.

    Pictures before the first key frame don't count: nothing shows them as they were.
    """

    times: Array = field(default_factory=lambda: np.zeros(0), compare=False)  # float64 [N], rising; [0] = unknown
    interval: float = 0.0  # usual time between two; 0 = unknown
    late_key: bool = False  # packets before the first key frame's
    lost: float = 0.0  # seconds of them
    leading: bool = False  # pictures that need some before the first key frame
    exact: bool = False  # every packet holds a picture that is shown

    @property
    def span(self) -> float:
        """From the first picture to the last."""
        return float(self.times[-1] - self.times[0]) if len(self.times) else 0.0

    def even(self, fps: Fraction) -> bool:
        """Whether picture k is the one that is shown at k / fps, of all of them."""
        if len(self.times) < 2:
            return False
        ideal = self.times[0] + np.arange(len(self.times)) / float(fps)
        return bool((np.abs(self.times - ideal) < 0.45 / float(fps)).all())


@dataclass(frozen=True)
class Stream:
    """The first video stream of a file. Sides are those of the picture as it is shown: upright, square pixels."""

    codec: str
    pixel_format: str
    height: int
    width: int
    fps: Fraction  # constant rate at which it is stored
    seconds: float  # that the file promises, from the first picture on; 0 = unknown
    plain: bool  # constant rate, progressive, upright, square pixels: frame k of the file is frame k of the stream
    coded: tuple[int, int] = (0, 0)  # height and width of the first picture as it is coded, turned upright
    timing: Timing = Timing()
    start: float = 0.0  # seconds from the file's beginning to the first key frame, if packets come before it
    matrix: str = "unknown"  # of the colours
    full_range: bool = False
    primaries: str = "unknown"
    transfer: str = "unknown"

    @property
    def hdr(self) -> str:
        """PQ, HLG, or empty."""
        return HDR.get(self.transfer, "")


def stream_of(found: dict[str, Any], limit: float) -> Stream:
    """The first video of what ffprobe found: `streams`, `format` and `packets`.

    **Args:** `limit`: seconds of packets that were read; 0 = all.

    **Raises:** `ValueError` with the reason if it cannot be used.
    """
    streams, container = found["streams"], found["format"]
    videos = [stream for stream in streams if _is_video(stream)]
    if not videos:
        kinds = sorted({str(stream.get("codec_type", "unknown")) for stream in streams})
        raise ValueError(f"it has no video stream, only {', '.join(kinds)}")
    stream = videos[0]
    codec = stream.get("codec_name", "unknown")
    if codec in ("unknown", "none") or not stream.get("width"):
        raise ValueError(f"this ffmpeg cannot decode its codec ({stream.get('codec_tag_string', codec)})")
    _check_dolby(stream)
    packets = found.get("packets", [])
    own = [packet for packet in packets if packet.get("stream_index") == stream.get("index")]
    timing = timing_of(own)
    average, base = _fraction(stream.get("avg_frame_rate")), _fraction(stream.get("r_frame_rate"))
    fields = stream.get("field_order", "") not in PROGRESSIVE
    fps = choose_rate(average, base, timing, fields=fields)
    alone = len(videos) == len(streams)  # else the file's length may be the sound's
    seconds = _seconds(stream, container, average, alone)
    _check_pictures_end(min(seconds, limit or seconds), timing)
    _check_files_end(timing, packets, container, limit)
    if not seconds and (not limit or timing.span < limit - 1):
        seconds = timing.span + timing.interval
    square = _fraction(stream.get("sample_aspect_ratio", "1:1").replace(":", "/")) or Fraction(1)
    height, width = int(stream["height"]), max(round(int(stream["width"]) * square), 1)
    angle = next((int(data["rotation"]) for data in stream.get("side_data_list", ()) if "rotation" in data), 0)
    coded = int(stream["height"]), int(stream["width"])
    if angle % 180:
        height, width, coded = width, height, coded[::-1]
    steady = abs(float(fps - (base or fps))) <= RATE_TOLERANCE * float(fps)
    pixels = stream.get("pix_fmt", "unknown")
    return Stream(
        codec,
        pixels,
        height,
        width,
        fps,
        seconds,
        plain=steady and square == 1 and angle == 0 and not fields,
        coded=coded,
        timing=timing,
        start=max(float(timing.times[0]) - _number(container.get("start_time")), 0.0) if timing.late_key else 0.0,
        matrix=stream.get("color_space", "unknown"),
        full_range=stream.get("color_range") == "pc" or pixels.startswith("yuvj"),
        primaries=stream.get("color_primaries", "unknown"),
        transfer=stream.get("color_transfer", "unknown"),
    )


def _is_video(stream: dict[str, Any]) -> bool:
    return stream.get("codec_type") == "video" and not stream.get("disposition", {}).get("attached_pic")


def _check_dolby(stream: dict[str, Any]) -> None:
    """Dolby Vision without a layer that others can show has colours that only its own decoders know."""
    for data in stream.get("side_data_list", ()):
        if data.get("dv_profile") == 5 or (data.get("dv_profile") and data.get("dv_bl_signal_compatibility_id") == 0):
            raise ValueError(
                f"it is Dolby Vision of profile {data['dv_profile']}, whose colours ffmpeg does not know; convert it "
                f"to SDR or HDR10 first"
            )


# ------------------------------------------------------------------------------------------------------- times
def timing_of(packets: Sequence[dict[str, Any]]) -> Timing:
    """Of ffprobe's packets of one stream, in the file's order."""
    name = "pts_time" if all("pts_time" in packet for packet in packets) else "dts_time"
    known = [packet for packet in packets if name in packet]
    if not known:
        return Timing()
    every = np.array([float(packet[name]) for packet in known])
    shown = np.array(["D" not in packet.get("flags", "") for packet in known])  # others are cut off by an edit list
    keys = [number for number, packet in enumerate(known) if "K" in packet.get("flags", "")]
    first = keys[0] if keys else 0
    lost = float(every[first] - every[: first + 1].min())
    leading = first > 0 or bool((every[first:] < every[first]).any()) or not shown.all()
    times = np.sort(every[first:][shown[first:] & ((every[first:] >= every[first]) | (first == 0))])
    gaps = np.diff(times)
    hidden = np.r_[False, gaps <= 0.25 * np.median(gaps)] if len(gaps) else np.zeros(len(times), bool)  # VP8 has some
    exact = not (leading or hidden.any()) and len(known) == len(packets)
    return Timing(times[~hidden], _usual(np.diff(times[~hidden])), first > 0, lost, leading, exact)


def _usual(gaps: Array) -> float:
    """The usual one of some intervals: the mean of those near the median, without pauses of two or more. Clocks round
    them, and live recordings' are early and late."""
    gaps = gaps[gaps > 0]
    if not len(gaps):
        return 0.0
    middle = np.median(gaps)
    return float(gaps[(gaps > 0.25 * middle) & (gaps < 1.75 * middle)].mean())


def choose_rate(average: Fraction, base: Fraction, timing: Timing, *, fields: bool = False) -> Fraction:
    """The constant rate of a stream whose header states an `average` and a `base` rate; 0 = it does not.

    A header that its packets confirm is believed (`fields`: two of them may make a picture). Else the rate is that of
    the usual time between two pictures: of a variable rate, pictures are repeated where it is slower. Where most would
    be repetitions, the average rate is taken.

    **Raises:** `ValueError` for one that is not known or absurd.
    """
    declared = average or base
    if timing.interval:
        usual = 1 / timing.interval
        steady = not base or not average or abs(float(average - base)) <= RATE_TOLERANCE * float(average)
        halves = fields and _near(2 * declared, usual, NEAR)
        if not halves and not (steady and _near(declared, usual, NEAR)):
            declared = _measured(average, base, timing)
    if not 0 < declared <= MAX_FPS:
        raise ValueError(f"its frame rate is {float(declared):g}, expected up to {MAX_FPS}")
    return declared


def _measured(average: Fraction, base: Fraction, timing: Timing) -> Fraction:
    usual, mean = 1 / timing.interval, (len(timing.times) - 1) / timing.span
    standard = min(STANDARD, key=lambda rate: abs(float(rate) / usual - 1))
    if abs(mean / usual - 1) <= STANDARD_NEAR:  # even but for a clock's jitter
        choices = (standard, average) if _near(standard, usual, STANDARD_NEAR) else (average,)
        return next((rate for rate in choices if _near(rate, usual, NEAR)), _rounded(usual))
    if usual > MOST_REPEATS * mean:
        return _rounded(mean)
    return next((rate for rate in (base, standard) if _near(rate, usual, NEAR)), _rounded(usual))


def _near(rate: Fraction, measured: float, share: float) -> bool:
    return bool(rate) and abs(float(rate) / measured - 1) <= share


def _rounded(rate: float) -> Fraction:
    """In tenths of frames per second; slow ones in milliseconds per frame."""
    return Fraction(round(rate * 10), 10) if rate >= 5 else Fraction(1000, round(1000 / rate))


# ------------------------------------------------------------------------------------------------------- lengths
def _seconds(stream: dict[str, Any], container: dict[str, Any], average: Fraction, alone: bool) -> float:
    """The promised length, from the first picture on; Matroska states when the last one ends."""
    name, begin = container.get("format_name", ""), _number(stream.get("start_time"))
    tagged = next((text for tag, text in stream.get("tags", {}).items() if tag.upper().startswith("DURATION")), "")
    hours, minutes, seconds = ([float(part) for part in tagged.split(":")] + [0.0] * 3)[:3] if tagged else (0.0,) * 3
    end = 3600 * hours + 60 * minutes + seconds
    length = _number(stream.get("duration"))
    if not length and end:
        length = end - begin if end > begin else end
    elif not length and alone:
        whole = _number(container.get("duration"))
        length = whole - begin if name.startswith(MATROSKA) and whole > begin else whole
    if name == "avi" and average:  # without an index, ffmpeg guesses from what is there
        length = max(length, _number(stream.get("nb_frames")) / float(average))
    return length


def _check_pictures_end(promised: float, timing: Timing) -> None:
    """**Raises:** `ValueError` if a stream's packets end before the seconds that are promised of it."""
    if not len(timing.times):
        return
    promised -= timing.lost
    if timing.span + _held(timing) < COMPLETE * promised:
        raise ValueError(f"it ends early: its pictures end after {timing.span:.1f} s of {promised:.1f} s")


def _check_files_end(
    timing: Timing, packets: Sequence[dict[str, Any]], container: dict[str, Any], limit: float
) -> None:
    """The same for all streams together, against the length in the file's header, where it has one."""
    if container.get("format_name", "").startswith(STATED) and len(timing.times):
        whole = _number(container.get("duration"))
        promised = min(whole, _number(container.get("start_time")) + limit) if limit else whole
        ends = (_number(p["pts_time"]) + _number(p.get("duration_time")) for p in packets if "pts_time" in p)
        if (last := max(ends, default=0.0)) + _held(timing) < COMPLETE * promised:
            raise ValueError(f"it ends early: it has {last:.1f} s of the {whole:.1f} s that its header promises")


def _held(timing: Timing) -> float:
    """Seconds that the last picture may be shown: as long as any."""
    return float(np.diff(timing.times).max()) if len(timing.times) > 1 else float("inf")


def _number(text: Any) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _fraction(text: str | None) -> Fraction:
    """`30000/1001`; 0 for what is none."""
    above, _, below = (text or "0").partition("/")
    return Fraction(int(above), int(below or 1)) if int(below or 1) else Fraction(0)
