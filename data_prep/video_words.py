"""What ffmpeg's report on a decoding says: damage, a harmless remark, or that it has to be done otherwise.

ffmpeg speaks of errors where a picture is lost, but also where a bit of bookkeeping is odd and every picture is there.
"""

import re
from dataclasses import dataclass

LEVEL = ("-loglevel", "level+verbose")  # what the reports here are written at
# Remarks of decoders after which every picture is there; those that lose some say so in other words, too.
HARMLESS = re.compile(
    rb"mmco: unref short failure|co located POCs unavailable|number of reference frames .* exceeds max"
    rb"|illegal short term buffer state|non monotonically increasing dts|Non-monotonous DTS|Non-monotonic DTS"
    rb"|unable to decode APP fields|SEI type \d+ size \d+ truncated|Overread VUI|Last message repeated"
)
FLAGGED = re.compile(rb"corrupt decoded frame")  # a warning only
BAD = re.compile(rb"\[(?:error|fatal|panic)\] ")
CONTEXT = re.compile(rb"^\[([^\]]+?) @ 0x[0-9a-f]+\]")
FIRST_FRAME = re.compile(rb"Set first pts to")  # the fps filter's, of the first picture that reaches it
GRAPH = re.compile(rb"\[graph -?\d+ input from stream [^\]]*\] \[verbose\] w:")
OTHER_STREAM = re.compile(rb"Stream #0:\d+.*: (?:Audio|Subtitle|Data): (\w+)")
DECODED = re.compile(rb"(\d+) frames decoded")


@dataclass(frozen=True)
class Report:
    """What a report says."""

    damage: str = ""  # in one line; empty = none
    lost_beginning: bool = False  # pictures before the first key frame were complained about, and may be spoilt
    changes: bool = False  # the pictures' size or format changes on the way
    decoded: int = 0  # pictures


def read_report(text: bytes, *, late: bool = False) -> Report:
    """What ffmpeg said at `LEVEL`.

    **Args:** `late`: whether the file begins with pictures that need earlier ones. Decoders complain of these until the
    first that they can show; they may.
    """
    lines = text.splitlines()
    others = {found[1] for line in lines if (found := OTHER_STREAM.search(line))}
    demuxer = next((found[1] for line in lines if (found := re.search(rb"Input #0, (\S+), from", line))), b"")
    begin = next((number for number, line in enumerate(lines) if FIRST_FRAME.search(line)), -1)
    errors: list[bytes] = []
    flags: list[bytes] = []
    complained = False
    for number, line in enumerate(lines):
        bad, flagged = BAD.search(line), FLAGGED.search(line)
        context = found[1] if (found := CONTEXT.match(line)) else b""
        if not (bad or flagged) or HARMLESS.search(line) or context.startswith(tuple(others)):
            continue
        if late and number < begin and context != demuxer:
            complained = True
        else:
            (errors if bad else flags).append(line)
    changes = sum(1 for line in lines if GRAPH.search(line)) > 1
    count = next((int(found[1]) for line in lines if (found := DECODED.search(line))), 0)
    return Report(plain_words((errors or flags or [b""])[0]), complained, changes, count)


def plain_words(report: bytes) -> str:
    """The first line without ffmpeg's own memory addresses, which differ from run to run."""
    lines = report.decode("utf-8", "replace").strip().splitlines()
    if not lines:
        return ""
    return re.sub(r"^(\[[^\]]*\] )+(file:.*: (?=corrupt ))?", "", lines[0])[:200]
