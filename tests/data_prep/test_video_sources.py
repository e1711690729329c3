"""Lists of videos."""

import json
import re
from pathlib import Path

import pytest

from data_prep import videos
from data_prep.video_sources import open_videos as list_videos
from fasthpm.errors import UserError


def test_lists_and_json_name_videos_and_labels(source: Path, tmp_path: Path) -> None:
    listed = tmp_path / "train.csv"
    listed.write_text("ant/000.mp4 3\nbee/001.mp4 0\n\nmissing file.mp4 1\n")
    files = list_videos(listed, source)
    assert (files.labels.tolist(), files.classes) == ([3, 0, 1], ("0", "1", "2", "3"))
    assert files.where(2) == str(source / "missing file.mp4")
    listed.write_text("ant/000.mp4,walk\nbee/001.mp4,run\n")
    files = list_videos(listed)
    assert (files.labels.tolist(), files.classes) == ([1, 0], ("run", "walk"))
    listed.write_text("only_a_path\n")
    with pytest.raises(UserError, match="line 1 is 'only_a_path', expected a path and a label"):
        list_videos(listed)
    entries = [{"id": "78", "template": "Holding [something]"}, {"id": "9", "template": "Dropping [something]"}]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    files = list_videos(tmp_path / "train.json")
    assert files.classes == ("Dropping something", "Holding something")
    (tmp_path / "labels.json").write_text(json.dumps({"Holding something": "0", "Dropping something": "1", "X": "2"}))
    files = list_videos(tmp_path / "train.json")
    assert (files.labels.tolist(), files.names) == ([0, 1], ["78.webm", "9.webm"])
    assert files.classes == ("Holding something", "Dropping something", "X")
    (tmp_path / "train.json").write_text(json.dumps([{"id": "78"}, {"id": "9", "template": "X"}]))
    files = list_videos(tmp_path / "train.json")  # the test split has no templates
    assert (files.labels.tolist(), files.words) == ([-1, 2], ["1 of them unlabelled (label -1)"])
    with pytest.raises(UserError, match=r"nowhere does not exist; expected a folder"):
        list_videos(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret.mp4", "ant/../../secret.mp4", "{root}/../secret.mp4", "/etc/passwd"])
def test_lists_cannot_leave_their_root(source: Path, tmp_path: Path, name: str) -> None:
    listed, name = tmp_path / "train.csv", name.format(root=source)
    listed.write_text(f"ant/000.mp4 0\n{name} 1\n")
    with pytest.raises(UserError, match=rf"train\.csv names '{re.escape(name)}', which lies outside .*--video_root"):
        list_videos(listed, source)
    listed.write_text(f"{source}/ant/000.mp4 0\nbee/../ant/001.mp4 0\n")
    assert len(list_videos(listed, source)) == 2
    (tmp_path / "train.json").write_text(json.dumps([{"id": "../9", "template": "Dropping [something]"}]))
    with pytest.raises(UserError, match=r"names '\.\./9\.webm', which lies outside"):
        list_videos(tmp_path / "train.json", source)


def test_a_root_for_the_names_of_a_folder_is_refused(tmp_path: Path) -> None:
    """Its names begin in itself; a list's and a JSON's begin at --video_root."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"--video_root has no effect here: .*folder is a folder"):
        videos.main([str(tmp_path / "folder"), str(tmp_path / "out"), "--video_root", str(tmp_path)])
