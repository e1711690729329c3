"""Filters of stored frames and of copies."""

from dataclasses import replace
from fractions import Fraction

import pytest

from data_prep import video_filters
from data_prep.video_facts import Stream
from data_prep.video_filters import Treatment, copy_filters, frame_filters, treatment_of

PLAIN = Stream("hevc", "yuv420p10le", 48, 64, Fraction(30), 1.0, True)


def test_hdr_is_tone_mapped_or_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert treatment_of(PLAIN) == treatment_of(replace(PLAIN, transfer="bt709")) == Treatment()
    for transfer, name in (("smpte2084", "PQ"), ("arib-std-b67", "HLG")):
        stream = replace(PLAIN, transfer=transfer)  # without primaries and matrix: those of all HDR
        monkeypatch.setattr(video_filters, "filters_of_ffmpeg", lambda: frozenset(["zscale", "tonemap"]))
        treatment = treatment_of(stream)
        assert treatment.hdr == (transfer, "bt2020", "bt2020nc")
        size = (48, 64)
        for filters in (frame_filters(size, PLAIN.fps, treatment), copy_filters(size, PLAIN.fps, treatment)):
            assert f"tin={transfer}" in filters
            assert "tonemap=" in filters
        monkeypatch.setattr(video_filters, "filters_of_ffmpeg", lambda: frozenset(["tonemap"]))
        with pytest.raises(ValueError, match=rf"HDR \({name}\), and this ffmpeg lacks .*\(zscale\); install"):
            treatment_of(stream)


def test_the_filters_of_ffmpeg_are_known_by_name() -> None:
    assert {"scale", "fps", "trim"} <= video_filters.filters_of_ffmpeg.__wrapped__()


def test_copies_begin_at_zero_in_the_matrix_that_dali_reads() -> None:
    filters = copy_filters((48, 64), Fraction(30000, 1001), Treatment())
    assert "out_color_matrix=bt601:out_range=tv" in filters
    assert filters.endswith("setpts=N/(30000/1001)/TB")
    assert "select=" not in filters  # every frame
