"""The demo set of moving garments."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import moving_fashion
from fasthpm.data.video.prepared import open_videos
from fasthpm.errors import UserError
from tests.helpers.video_sets import stored_frame


def test_moving_garments_show_their_class_by_motion_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train", "8", "--val", "4", "--size", "32", "--num_frames", "6", "--num_workers", "2", "--speeds", "2"]
    moving_fashion.main([str(tmp_path), *flags])
    data = open_videos(tmp_path / "train")
    assert (len(data.videos), data.info.channels, len(data.info.classes)) == (8, 1, 4)
    assert data.sidecar["counts"] == [2] * 4
    for video, row in enumerate(data.videos):
        frames = [stored_frame(data, int(row["first"]) + k)[..., 0].astype(float) for k in range(6)]
        motion = moving_fashion.velocity(data.info.classes[int(row["label"])])
        told = np.abs(np.roll(frames[0], [5 * step for step in motion], (0, 1)) - frames[5]).mean()
        others = [moving_fashion.velocity(name) for name in data.info.classes]
        found = min(others, key=lambda m: np.abs(np.roll(frames[0], (5 * m[0], 5 * m[1]), (0, 1)) - frames[5]).mean())
        assert found == motion
        assert told < 8, video
    moving_fashion.main([str(tmp_path), *flags])
    assert "nothing to do" in capsys.readouterr().out


def test_where_garments_begin_says_nothing_about_the_class() -> None:
    """So frames of all classes are alike: the sum over a batch of clips does not depend on the motion."""
    garment = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    for name in moving_fashion.class_names(8, [1, 3]):
        clip = moving_fashion.draw_clip(garment, (5, 7), moving_fashion.velocity(name), 4, 40)
        assert (clip.sum((1, 2)) == clip[0].sum()).all()
        assert np.array_equal(np.roll(clip[0], moving_fashion.velocity(name), (0, 1)), clip[1])


def test_an_output_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file, which is a file, and a folder is written; choose another"):
        moving_fashion.main([str(tmp_path / "file")])
