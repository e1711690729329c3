"""Verifying prepared video sets."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep import verify, videos
from fasthpm.data.video.prepared import copied_file, open_videos
from fasthpm.errors import UserError
from tests.helpers.video_fixtures import ffmpeg, pattern
from tests.helpers.video_sets import damaged


def test_verify_finds_what_opening_does_not(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(prepared)])
    assert "is sound: 6 videos, 60 frames, 2 classes, 3 channels" in capsys.readouterr().out
    broken = damaged(prepared, tmp_path / "set", videos=(1,))
    with pytest.raises(UserError, match=r"frames\.bin has another sha256"):
        verify.main([str(broken)])
    info = json.loads((broken / "info.json").read_text())
    info["sha256"].pop("frames.bin")
    (broken / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"video 1\): frame 0 does not decode"):
        verify.main([str(broken)])
    (broken / "manifest.csv").write_text("path\n")
    info["sha256"].pop("manifest.csv")
    (broken / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"manifest\.csv has 1 lines, expected 7"):
        verify.main([str(broken)])


# ------------------------------------------------------------------------------------------------------- copies
@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos with copies, one of them in BT.709, every second frame stored."""
    root = tmp_path_factory.mktemp("copied")
    pattern(root / "in" / "a.mp4", size="96x80", seconds=2)
    tagged = ("-vf", "scale=out_color_matrix=bt709,format=yuv420p", "-colorspace", "bt709", "-c:v", "libx264")
    pattern(root / "in" / "b.mp4", *tagged, size="96x80", seconds=2)
    videos.main([str(root / "in"), str(root / "set"), "--copy", "--num_workers", "1"])
    return root / "set"


def test_copies_are_the_stored_frames(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify.main([str(copied)])
    assert "copies of 2 of 2 videos compared with their frames" in capsys.readouterr().out
    monkeypatch.setattr("shutil.which", lambda name: None)
    verify.main([str(copied)])
    assert "copies of 0 of 2 videos compared with their frames" in capsys.readouterr().out


def test_a_copy_of_other_frames_or_colours_is_found(copied: Path, tmp_path: Path) -> None:
    data = open_videos(copied)
    of = {data.row(video)["path"]: copied_file(data, video) for video in range(2)}
    source = copied.parent / "in"
    assert of["a.mp4"].read_bytes() == (source / "a.mp4").read_bytes()
    spoilt = {
        "shifted": ("-vf", "tpad=start=4:start_mode=clone,trim=end_frame=20", "has other frames"),
        "longer": ("-vf", "tpad=start=6:start_mode=clone", "has 26 frames, expected 19 to 20"),
        "cut": ("-frames:v", "12", r"does not decode \(it has 12 frames, expected more than 18\)"),
        "colours": ("-vf", "scale=out_color_matrix=bt709,format=yuv420p", "has other colours .* levels"),
    }
    for name, (*options, message) in spoilt.items():
        ffmpeg("-i", of["a.mp4"], *options, tmp_path / f"{name}.mp4")
        shutil.copytree(copied, tmp_path / name)
        shutil.copy(tmp_path / f"{name}.mp4", tmp_path / name / of["a.mp4"].relative_to(copied))
        with pytest.raises(UserError, match=rf"a\.mp4 .*: its copy {message}.*prepare it again"):
            verify.main([str(tmp_path / name)])
