"""What a stream is, measured from its packets where its header says nothing, or nonsense."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from data_prep.video_facts import stream_of, timing_of


def packets(times: Iterable[float], *, key: int = 0, name: str = "pts_time", discard: int = 0) -> list[dict[str, Any]]:
    """Packets of stream 0; number `key` is the first key frame, the first `discard` are cut off by an edit list."""
    flags = [("K" if number == key else "_") + ("D" if number < discard else "_") for number, _ in enumerate(times)]
    return [{"stream_index": 0, name: f"{time:.6f}", "flags": flag} for time, flag in zip(times, flags, strict=True)]


def found(seen: list[dict[str, Any]], container: dict[str, Any] | None = None, **stream: Any) -> dict[str, Any]:
    known = {"index": 0, "codec_type": "video", "codec_name": "vp8", "width": 64, "height": 48, "pix_fmt": "yuv420p"}
    return {"streams": [known | stream], "format": container or {}, "packets": seen}


def regular(count: int, rate: float, begin: float = 0.0) -> list[float]:
    return [begin + number / rate for number in range(count)]


STEADY = {"avg_frame_rate": "30/1", "r_frame_rate": "30/1"}
PAUSES = [time for number, time in enumerate(regular(120, 30)) if number % 17 != 3]
BURSTS = [second + number / 60 for second in range(0, 60, 5) for number in range(6)]
LATE_CLOCK = [number * 0.033 + ((number * 7919) % 17 - 8) / 1000 + 0.008 for number in range(90)]


@pytest.mark.parametrize(
    ("times", "average", "base", "fps"),
    [
        (regular(90, 30), "30/1", "30/1", 30),
        (regular(90, 30), "0/0", "1000/1", 30),
        (regular(90, 30), "1000/1", "1000/1", 30),
        (regular(90, 30), "1/1", "1/1", 30),
        (regular(90, 30000 / 1001), "0/0", "0/0", Fraction(30000, 1001)),
        (np.round(regular(90, 60), 3).tolist(), "60/1", "60/1", 60),
        (np.round(regular(90, 24000 / 1001), 3).tolist(), "0/0", "1000/1", Fraction(24000, 1001)),
        (LATE_CLOCK, "0/0", "1000/1", Fraction(303, 10)),
        (PAUSES, "11300/401", "30/1", 30),
        (PAUSES, "11300/401", "90000/1", 30),
        (BURSTS, "72/60", "60/1", Fraction(1000, 776)),  # else most pictures would be repetitions
        (regular(60, 0.1), "1/10", "1/10", Fraction(1, 10)),
        (regular(90, 29.93), "2993/100", "90000/1", Fraction(30000, 1001)),
        (regular(90, 27.37), "2737/100", "90000/1", Fraction(2737, 100)),  # even: no picture twice, and none lost
        ([], "25/1", "25/1", 25),
    ],
)
def test_a_rate_is_that_of_the_pictures(times: list[float], average: str, base: str, fps: Any) -> None:
    stream = stream_of(found(packets(times), avg_frame_rate=average, r_frame_rate=base), 0)
    assert stream.fps == pytest.approx(Fraction(fps), rel=0.01) if times is BURSTS else stream.fps == fps


def test_an_unknown_or_absurd_rate_that_no_packet_corrects_is_refused() -> None:
    for rate in ("0/0", "1000000/1"):
        with pytest.raises(ValueError, match=r"its frame rate is \d"):
            stream_of(found([], avg_frame_rate=rate, r_frame_rate=rate), 0)


def test_two_fields_in_two_packets_are_one_picture() -> None:
    header = {"avg_frame_rate": "25/1", "r_frame_rate": "25/1", "field_order": "tt"}
    assert stream_of(found(packets(regular(100, 50)), **header), 0).fps == 25


MATROSKA = {"format_name": "matroska,webm", "start_time": "0.0"}


@pytest.mark.parametrize(
    ("times", "container", "stream", "seconds"),
    [
        (regular(42, 30, 0.6), MATROSKA, {"start_time": "0.6", "tags": {"DURATION": "00:00:02.000"}}, 1.4),
        (regular(42, 30, 0.6), MATROSKA | {"duration": "2.0"}, {"start_time": "0.6"}, 1.4),
        (regular(60, 30), {"format_name": "mov,mp4", "duration": "9"}, {"duration": "2.0"}, 2),
        (regular(60, 30), MATROSKA, {}, 2),  # measured: nothing says it
        (regular(113, 30)[::2], {"format_name": "mov"}, {"duration": "3.8"}, 3.8),
    ],
)
def test_a_length_is_counted_from_the_first_picture(
    times: list[float], container: dict[str, Any], stream: dict[str, Any], seconds: float
) -> None:
    assert stream_of(found(packets(times), container, **STEADY | stream), 0).seconds == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize(
    ("times", "container", "stream"),
    [
        (regular(72, 30), {"format_name": "avi"}, {"duration": "2.4", "nb_frames": "121"}),
        (regular(72, 30), {"format_name": "mov"}, {"duration": "4"}),
        (regular(72, 30, 1), MATROSKA, {"start_time": "1", "tags": {"DURATION-eng": "00:00:05.0"}}),
        (regular(72, 30), {"format_name": "flv", "duration": "4"}, {"start_time": "0", "disposition": {}}),
    ],
)
def test_packets_that_end_before_the_header_says_are_a_cut_file(
    times: list[float], container: dict[str, Any], stream: dict[str, Any]
) -> None:
    cut = found(packets(times), container, **STEADY | stream)
    sound = {"index": 1, "codec_type": "audio"}
    cut["streams"].append(sound)
    with pytest.raises(ValueError, match="it ends early: "):
        stream_of(cut, 0)
    stream_of(found(packets(regular(120, 30, times[0])), container, **STEADY | stream), 0)
    stream_of(cut, 2)  # no more than 2 s were to be read


def test_a_last_picture_may_be_shown_as_long_as_any_other() -> None:
    times = [*regular(10, 10), 1.0, 1.5]
    assert stream_of(found(packets(times), duration="2.0", avg_frame_rate="6/1", r_frame_rate="10/1"), 0).fps == 10


def test_pictures_before_the_first_key_frame_do_not_count() -> None:
    container = {"format_name": "mpegts", "start_time": "1.5"}
    for name in ("pts_time", "dts_time"):
        seen = packets(regular(90, 30, 1.5), key=30, name=name)
        stream = stream_of(found(seen, container, duration="3.0", **STEADY), 0)
        assert len(stream.timing.times) == 60
        assert (stream.start, stream.timing.leading, stream.timing.exact) == (pytest.approx(1.0), True, False)


def test_an_edit_list_hides_pictures_but_not_their_key_frame() -> None:
    timing = timing_of(packets(regular(90, 30), discard=12))
    assert (len(timing.times), timing.late_key, timing.exact) == (78, False, False)
    assert timing.times[0] == pytest.approx(0.4)


def test_hidden_pictures_are_no_pictures() -> None:
    times = sorted(regular(90, 30) + [number / 30 - 0.001 for number in (20, 40, 60)])
    timing = timing_of(packets(times))
    assert (len(timing.times), timing.exact, timing.even(Fraction(30))) == (90, False, True)
    assert timing_of(packets(regular(90, 30))).exact
    assert not timing_of(packets(PAUSES)).even(Fraction(30))


def test_dolby_vision_that_nothing_else_can_show_is_refused() -> None:
    for profile, layer, refused in ((5, 0, True), (8, 1, False)):
        data = {"dv_profile": profile, "dv_bl_signal_compatibility_id": layer}
        seen = found(packets(regular(30, 30)), **STEADY, side_data_list=[data])
        if refused:
            with pytest.raises(ValueError, match="Dolby Vision of profile 5"):
                stream_of(seen, 0)
        else:
            assert stream_of(seen, 0).fps == 30
