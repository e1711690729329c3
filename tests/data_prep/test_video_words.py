"""ffmpeg's reports: damage is told from harmless remarks."""

import pytest

from data_prep.video_words import Report, read_report

OPEN = "[info] Input #0, mpegts, from 'file:a.ts':\n[info]   Stream #0:1[0x101]: Audio: aac (LC), 44100 Hz\n"
GRAPH = "[graph 0 input from stream 0:0 @ 0x55] [verbose] w:160 h:120 pixfmt:yuv420p tb:1/90000\n"
FIRST = "[Parsed_fps_1 @ 0x55] [verbose] Set first pts to 0\n"
END = "[verbose]   Input stream #0:0 (video): 30 packets read (5 bytes); 28 frames decoded; \n"


def reported(*, before: str = "", after: str = "", late: bool = False) -> Report:
    text = OPEN + before + ("\n" if before else "") + GRAPH + FIRST + after + ("\n" if after else "") + END
    return read_report(text.encode(), late=late)


@pytest.mark.parametrize(
    "words",
    [
        "[h264 @ 0x55e650c206c0] [error] mmco: unref short failure",
        "[h264 @ 0x55e650c206c0] [error] co located POCs unavailable",
        "[h264 @ 0x55e650c206c0] [error] number of reference frames (0+5) exceeds max (4; probably corrupt input), x",
        "[h264 @ 0x55e650c206c0] [error] SEI type 5 size 2208 truncated at 2192",
        "[mjpeg @ 0x55e650c206c0] [error] unable to decode APP fields: Invalid data found when processing input",
        "[rawvideo @ 0x5] [error] Application provided invalid, non monotonically increasing dts to muxer in stream 0",
        "[aac @ 0x55e650c206c0] [error] Input buffer exhausted before END element found",
        "[mpegts @ 0x55e650c206c0] [warning] Packet corrupt (stream = 0, dts = 309000).",
        "    Last message repeated 3 times",
    ],
)
def test_remarks_after_which_every_picture_is_there_are_harmless(words: str) -> None:
    for late in (False, True):
        assert reported(before=words, late=late).damage == reported(after=words, late=late).damage == ""


@pytest.mark.parametrize(
    "words",
    [
        "[h264 @ 0x55e650c206c0] [error] error while decoding MB 0 3, bytestream 1429",
        "[mpeg4 @ 0x55e650c206c0] [error] ac-tex damaged at 2 7",
        "[hevc @ 0x55e650c206c0] [error] Could not find ref with POC 60",
        "[error] Error while decoding stream #0:0: Invalid data found when processing input",
        "[warning] file:a.ts: corrupt decoded frame in stream 0",
        "[mpegts @ 0x55e650c206c0] [fatal] anything",
    ],
)
def test_anything_else_is_damage(words: str) -> None:
    for late in (False, True):
        damage = reported(after=words, late=late).damage
        assert damage
        assert words.endswith(damage)
        assert not damage.startswith("[")
    assert reported(before=words).damage


def test_what_comes_before_the_first_key_frame_may_be_complained_of() -> None:
    words = "[h264 @ 0x55e650c206c0] [error] non-existing PPS 0 referenced\n[error] Error while decoding stream #0:0: x"
    assert reported(before=words, late=True) == Report("", lost_beginning=True, changes=False, decoded=28)
    assert reported(before=words).damage == "non-existing PPS 0 referenced"
    nothing = read_report((OPEN + words).encode(), late=True)
    assert nothing.damage == "non-existing PPS 0 referenced"  # no picture at all
    assert reported(before="[mpegts @ 0x5] [error] file ended", late=True).damage == "file ended"  # not a decoder's


def test_a_change_on_the_way_is_noticed() -> None:
    assert not reported().changes
    assert reported(after=GRAPH).changes
