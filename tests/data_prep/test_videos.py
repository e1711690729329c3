"""Video files into prepared sets."""

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import ffmpeg as tools
from data_prep import verify, videos
from fasthpm.data import read_info
from fasthpm.data.video.prepared import open_videos
from fasthpm.errors import UserError
from tests.helpers.video_fixtures import FRAMES, ffmpeg, pattern, prepare_videos
from tests.helpers.video_sets import stored_frame


def rejected(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------------- preparation
def decoded(path: Path, height: int, width: int) -> np.ndarray:
    """All frames of a video as ffmpeg shows them: uint8 [FRAMES, h, w, 3]."""
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(FRAMES, height, width, 3)


def luma(pixels: np.ndarray) -> np.ndarray:
    """As JPEG stores it, without the chroma that it halves."""
    return np.asarray(Image.fromarray(pixels).convert("L")).astype(int)


def test_frames_are_those_that_ffmpeg_decodes(source: Path, prepared: Path) -> None:
    data = open_videos(prepared)
    assert len(data.videos) == 6
    for video, row in enumerate(data.videos):
        told = data.row(video)
        assert int(row["frames"]) == FRAMES == int(told["frames"])
        path, (height, width) = source / told["path"], (int(row["height"]), int(row["width"]))
        truth = decoded(path, height, width)
        for frame in range(FRAMES):
            shown = luma(stored_frame(data, int(row["first"]) + frame))
            differences = [np.abs(shown - luma(picture)).mean() for picture in truth]
            assert differences[frame] == min(differences) < 4
        assert told["fps"] == str(FRAMES)
        assert data.info.classes[int(row["label"])] == path.parent.name


def test_statistics_and_counts_are_of_all_pixels(source: Path, prepared: Path) -> None:
    data = open_videos(prepared)
    told = [(source / data.row(k)["path"], int(v["height"]), int(v["width"])) for k, v in enumerate(data.videos)]
    pixels = np.concatenate([decoded(*video).reshape(-1, 3) for video in told])
    assert np.abs(pixels.mean(0) / 255 - data.info.mean).max() < 0.005
    assert np.abs(pixels.std(0) / 255 - data.info.std).max() < 0.015  # other roundings of chroma
    assert data.sidecar["counts"] == [3, 3]
    assert read_info(prepared) == data.info


def test_the_same_bytes_for_any_number_of_processes_and_after_an_interruption(
    source: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = prepare_videos(source, tmp_path / "one", "--num_workers", "1")
    stopping = iter([False, False, True])

    @contextlib.contextmanager
    def stops():
        yield lambda: next(stopping, True)

    monkeypatch.setattr("data_prep.pool.asked_to_stop", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare_videos(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    resumed = prepare_videos(source, tmp_path / "set")
    for name in ("frames.bin", "frames.npy", "videos.npy", "manifest.csv"):
        assert len({(path / name).read_bytes() for path in (prepared, again, resumed)}) == 1
    assert sorted(os.listdir(tmp_path)) == ["one", "set"]


def test_a_second_run_does_nothing_and_other_options_need_overwrite(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare_videos(source, tmp_path / "set")
    written = (out / "info.json").stat().st_mtime_ns
    prepare_videos(source, out)
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "info.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"output .*set exists, a prepared set; use --overwrite"):
        prepare_videos(source, out, "--jpeg_quality", "50")
    prepare_videos(source, out, "--jpeg_quality", "50", "--overwrite")
    assert json.loads((out / "info.json").read_text())["options"]["jpeg_quality"] == 50
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="a folder with other things"):
        prepare_videos(source, tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind that a collection may have."""
    folder = tmp_path_factory.mktemp("odd") / "all"
    whole = pattern(folder / "whole.mp4", "-c:v", "libx264", "-movflags", "+faststart", seconds=2)
    (folder / "truncated.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    (folder / "zero.mp4").touch()
    (folder / "text.avi").write_text("no video at all")
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{whole}\n#EXT-X-ENDLIST\n")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", folder / "sound.mp4")
    pattern(folder / "single.mp4", "-frames:v", "1", "-c:v", "libx264")
    Image.new("RGB", (64, 48)).save(folder / "picture.mp4", "JPEG")
    pattern(folder / "webm_called.avi", "-c:v", "libvpx", "-f", "webm")
    ffmpeg("-i", whole, "-c", "copy", "-metadata:s:v", "rotate=90", folder / "rotated.mp4")
    pattern(folder / "ten_bit.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p10le")
    pattern(folder / "interlaced.mp4", "-vf", "interlace", "-c:v", "libx264", "-flags", "+ilme+ildct", rate=20)
    pattern(folder / "odd.mp4", "-vf", "format=yuv444p,crop=51:37", "-c:v", "libx264")
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=64x48:r=10:d=2",
        "-vf",
        "select='lt(n,10)+not(mod(n,5))'",
        "-fps_mode",
        "vfr",
        "-c:v",
        "libx264",
        folder / "variable.mkv",
    )
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=64x48:r=10:d=1",
        "-f",
        "lavfi",
        "-i",
        "sine=d=3",
        "-c:v",
        "libx264",
        "-c:a",
        "aac",
        folder / "with_sound.mp4",
    )
    unknown = bytearray(pattern(folder / "unknown.avi", "-c:v", "mjpeg").read_bytes())
    (folder / "unknown.avi").write_bytes(bytes(unknown).replace(b"MJPG", b"QQQQ"))
    return folder


def test_odd_files_are_prepared_or_listed_with_the_reason(odd_files: Path, tmp_path: Path) -> None:
    out = prepare_videos(odd_files, tmp_path / "set", "--max_rejected", "20")
    reasons = rejected(out / "rejected.csv")
    assert set(reasons) == {
        "truncated.mp4",
        "zero.mp4",
        "text.avi",
        "playlist.mp4",
        "sound.mp4",
        "single.mp4",
        "picture.mp4",
        "unknown.avi",
    }
    assert "the file is empty" in reasons["zero.mp4"]
    assert "no video stream, only audio" in reasons["sound.mp4"]
    assert "1 frame to store" in reasons["single.mp4"]
    assert "it is an image" in reasons["picture.mp4"]
    assert "cannot decode its codec" in reasons["unknown.avi"]
    assert "ffprobe cannot read it" in reasons["text.avi"]
    data = open_videos(out)
    rows = {data.row(video)["path"]: data.videos[video] for video in range(len(data.videos))}
    assert {name: (int(row["height"]), int(row["width"])) for name, row in rows.items()} == {
        "whole.mp4": (48, 64),
        "rotated.mp4": (64, 48),
        "ten_bit.mp4": (48, 64),
        "interlaced.mp4": (48, 64),
        "odd.mp4": (36, 52),
        "variable.mkv": (48, 64),
        "with_sound.mp4": (48, 64),
        "webm_called.avi": (48, 64),
    }
    assert rows["whole.mp4"]["frames"] == 20
    assert rows["with_sound.mp4"]["frames"] == 10
    turned = np.rot90(stored_frame(data, int(rows["whole.mp4"]["first"])), axes=(1, 0)).astype(int)
    shown = stored_frame(data, int(rows["rotated.mp4"]["first"])).astype(int)
    assert min(np.abs(shown - turned).mean(), np.abs(shown - turned[::-1, ::-1]).mean()) < 8
    assert verify.main([str(out)]) is None


def test_a_variable_rate_becomes_constant(odd_files: Path) -> None:
    """The later frames, shown for half a second each, are repeated; so time runs evenly over frame numbers."""
    for name, fits in (("variable.mkv", False), ("whole.mp4", True)):
        path = str(odd_files / name)
        assert tools.fits_nvdec(path, tools.probe(path)) == fits
    shown = list(tools.frames(str(odd_files / "variable.mkv"), (48, 64), Fraction(10)))
    truth = list(tools.frames(str(odd_files / "whole.mp4"), (48, 64), Fraction(10)))
    assert abs(len(shown) - 16) <= 1
    late = [np.abs(frame.astype(int) - truth[15]).mean() for frame in shown]
    assert late.index(min(late)) == 15
    assert np.abs(shown[12].astype(int) - shown[11]).mean() < 1


def test_too_many_unusable_files_are_an_error_and_nothing_is_read_twice(
    odd_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for name in ("whole.mp4", "zero.mp4", "text.avi"):
        shutil.copy(odd_files / name, some)
    with pytest.raises(
        UserError, match=r"2 of 3 videos cannot be used, --max_rejected 0\.01 allows 0; .*rejected\.csv"
    ):
        prepare_videos(some, tmp_path / "set")
    assert len(rejected(tmp_path / "set.rejected.csv")) == 2
    assert not (tmp_path / "set").exists()
    prepare_videos(some, tmp_path / "set", "--max_rejected", "2")
    assert "going on after 3 of 3" in capsys.readouterr().out
    assert len(rejected(tmp_path / "set" / "rejected.csv")) == 2
    assert not (tmp_path / "set.rejected.csv").exists()


def test_short_side_stride_rate_and_limits(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    pattern(folder / "a.mp4", size="96x64", seconds=2, rate=20)
    pattern(folder / "b.mp4", size="96x64", seconds=0.5, rate=20)
    out = tmp_path / "set"
    flags = ["--short_side", "32", "--frame_stride", "4", "--fps", "10", "--max_seconds", "1.5"]
    videos.main([str(folder), str(out), *flags, "--min_frames", "10", "--max_rejected", "1"])
    data = open_videos(out)
    assert [int(data.videos[name][0]) for name in ("frames", "height", "width")] == [4, 32, 48]
    assert "fewer than --min_frames 10" in rejected(out / "rejected.csv")["b.mp4"]
    assert data.row(0)["fps"] == "10"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frame_stride", "0"], "frame_stride is 0, expected 1"),
        (["--short_side", "4"], "short_side is 4"),
        (["--jpeg_quality", "101"], "jpeg_quality is 101"),
        (["--max_rejected", "-1"], "max_rejected -1 is negative"),
        (["--short_sid", "64"], "did you mean '--short_side'"),
    ],
)
def test_wrong_flags_are_one_line(source: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        videos.main([str(source), str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_old_ffmpeg_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="ffmpeg is not on PATH; install it"):
        prepare_videos(source, tmp_path / "set")
    for tool in ("ffmpeg", "ffprobe"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'ffmpeg version 4.4.2-0ubuntu0 Copyright'\n")
        (tmp_path / tool).chmod(0o755)
    with pytest.raises(UserError, match=r"ffmpeg is version 4\.4\.2-0ubuntu0, expected 5\.1"):
        prepare_videos(source, tmp_path / "set")


# ------------------------------------------------------------------------------------------------------- sources
def test_files_that_a_list_names_and_that_are_missing_are_counted_and_listed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("ant/000.mp4 0\nbee/nothing.mp4 1\n")
    out = prepare_videos(tmp_path / "train.csv", tmp_path / "set", "--video_root", str(source), "--max_rejected", "1")
    assert "the file is not there" in rejected(out / "rejected.csv")["nothing.mp4"]
    assert json.loads((out / "info.json").read_text())["num_rejected"] == 1


def test_unlabelled_videos_are_kept_and_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_text("ant/000.mp4 -1\nbee/001.mp4 1\n")
    out = prepare_videos(tmp_path / "train.csv", tmp_path / "set", "--video_root", str(source))
    assert "2 videos, 1 unlabelled" in capsys.readouterr().out
    data = open_videos(out)
    assert (data.info.unlabelled, data.sidecar["counts"]) == (1, [0, 1])
    assert sorted(data.videos["label"].tolist()) == [-1, 1]
    assert verify.main([str(out)]) is None


@pytest.mark.parametrize("name", ["set.rejected.csv", ".set.partial"])
def test_what_stands_in_the_way_is_found_before_any_work(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("csv") else (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{re.escape(name)} stands where preparation has to write"):
        prepare_videos(source, tmp_path / "set", "--overwrite")
    with pytest.raises(UserError, match="max_seconds is nan, expected a finite number"):
        prepare_videos(source, tmp_path / "set", "--max_seconds", "nan")
