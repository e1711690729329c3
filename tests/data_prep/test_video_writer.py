"""What is said of a video: rejected, cut, tone mapped; and what is not its fault."""

import errno
import os
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep import video_writer, videos
from data_prep.video_facts import Stream
from data_prep.video_writer import VideoOptions
from fasthpm.data.video.prepared import open_videos
from fasthpm.errors import UserError
from tests.helpers.video_fixtures import ffmpeg, pattern, prepare_videos
from tests.helpers.video_sets import stored_frame


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(video_writer, "read_video", fail)
    monkeypatch.setattr(
        video_writer, "_source", SimpleNamespace(labels=[0], where=lambda index: "a.mp4"), raising=False
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EAGAIN, errno.ENOMEM])
def test_errors_of_the_machine_are_never_a_videos_rejection(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(OSError(number, os.strerror(number)), monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        video_writer._encode_video(np.array([0]))


def test_errors_of_the_file_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "denied"), ValueError("bad")):
        failing(error, monkeypatch)
        ((index, reason),) = video_writer._encode_video(np.array([0])).rejected
        assert index == 0
        assert str(error).split("] ")[-1] in reason
    failing(FileNotFoundError(errno.ENOENT, "No such file", "ffmpeg"), monkeypatch)  # not the video
    with pytest.raises(FileNotFoundError):
        video_writer._encode_video(np.array([0]))


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_fills_loses_no_video(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a copy is a file copied or encoded anew."""
    pattern(tmp_path / "in" / "0.mp4")
    shutil.copy(tmp_path / "in" / "0.mp4", tmp_path / "in" / "1.mp4")

    def full(*args: Any, **options: Any) -> None:
        (next(arg for arg in args[1:] if isinstance(arg, Path))).write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if kept:
            patch.setattr("shutil.copyfile", full)
        else:
            patch.setattr(video_writer, "fits_nvdec", lambda path, stream: False)
            patch.setattr(video_writer, "encode_h264", full)
        with pytest.raises(UserError, match=r"no space left in .*run the same command again"):
            prepare_videos(tmp_path / "in", tmp_path / "set", "--copy", "--max_rejected", "3")
        assert not list(tmp_path.rglob("videos/.*"))
    prepare_videos(tmp_path / "in", tmp_path / "set", "--copy", "--max_rejected", "3")
    assert len(open_videos(tmp_path / "set").videos) == 2
    assert not (tmp_path / "set" / "rejected.csv").exists()


def test_what_is_cut_off_and_tone_mapped_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern(tmp_path / "in" / "slow.mp4", rate="1/10", seconds=300)
    pattern(tmp_path / "in" / "short.mp4")
    tags = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    to_hdr = (
        "zscale=tin=bt709:pin=bt709:min=bt709:rin=limited:t=smpte2084:p=bt2020:m=bt2020nc:r=limited:npl=203,"
        "format=yuv420p10le"
    )
    coding = ("-vf", to_hdr, "-c:v", "libx265", "-x265-params", f"log-level=none:{tags}")
    for name, colour in (("white", "white"), ("grey", "0x808080")):
        ffmpeg("-f", "lavfi", "-i", f"color={colour}:s=64x48:r=10:d=1", *coding, tmp_path / "in" / f"{name}.mp4")
    out = prepare_videos(tmp_path / "in", tmp_path / "set")
    said = capsys.readouterr().out
    assert "1 video was longer than --max_seconds 120: 180 of 300 s were cut off" in said
    assert "2 videos were HDR, tone mapped to SDR" in said
    data = open_videos(out)
    assert [data.sidecar[name] for name in ("num_cut", "seconds_cut", "num_tone_mapped")] == [1, 180, 2]
    shown = {data.row(k)["path"]: stored_frame(data, int(row["first"])).mean() for k, row in enumerate(data.videos)}
    assert shown["white.mp4"] > 225
    assert shown["grey.mp4"] == pytest.approx(128, abs=4)


def test_nothing_is_said_where_nothing_is_lost() -> None:
    info = {"options": {"max_seconds": 120.0}, "num_samples": 1, "num_frames": 2, "frame_stride": 1, "classes": ["a"]}
    info |= {"channels": 3, "bytes": 9, "mean": [0.5], "std": [0.5], "max_height": 4, "max_width": 4}
    info |= {"fewest_frames": 2, "num_rejected": 0, "num_cut": 0, "seconds_cut": 0.0, "num_tone_mapped": 0}
    assert len(videos.summary(Path("x"), info, 1.0).splitlines()) == 2


def test_a_length_that_ends_within_a_picture_is_not_cut() -> None:
    for seconds, cut in ((119.0, 0), (120.01, 0), (130.0, 10)):
        stream = Stream("h264", "yuv420p", 48, 64, Fraction(30), seconds, True)
        assert video_writer._left_out(stream, VideoOptions()) == cut
