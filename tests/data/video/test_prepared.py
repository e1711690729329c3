"""Prepared video sets: copied files, and what is refused."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import ffmpeg as tools
from data_prep import verify
from fasthpm.data import read_info
from fasthpm.data.video.prepared import MANIFEST, copied_file, open_videos
from fasthpm.errors import UserError
from tests.helpers.video_sets import loader_of


def test_copies_are_originals_where_a_gpu_decodes_them(with_copies: tuple[Path, Path, Path]) -> None:
    kept, encoded, root = with_copies
    data = open_videos(kept)
    for video in range(2):
        assert copied_file(data, video).read_bytes() == (root / "vp9" / data.row(video)["path"]).read_bytes()
    data = open_videos(encoded)
    by_name = {data.row(video)["path"]: copied_file(data, video) for video in range(2)}
    assert by_name["0.mp4"].read_bytes() == (root / "mixed" / "0.mp4").read_bytes()
    upright = tools.probe(str(by_name["1.mp4"]))
    assert (upright.height, upright.width, upright.codec, upright.plain) == (64, 48, "h264", True)
    assert verify.main([str(kept)]) is None


def test_paths_that_leave_the_set_are_refused(with_copies: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(with_copies[0], tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("videos/00000000.webm", "../../etc/passwd"))
    with pytest.raises(UserError, match=r"names '\.\./\.\./etc/passwd', which lies outside the set"):
        list(loader_of(tmp_path / "set", decoder="dali_video", batch_size=2))
    manifest.write_text(manifest.read_text().replace("../../etc/passwd", "videos/gone.webm"))
    with pytest.raises(UserError, match=r"gone\.webm is not there, but .*manifest\.csv names it"):
        list(loader_of(tmp_path / "set", decoder="dali_video", batch_size=2))


def break_info(path: Path, **values: object) -> None:
    info = json.loads((path / "info.json").read_text())
    (path / "info.json").write_text(json.dumps(info | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "info.json").write_text("{"), "info.json cannot be read"),
        (lambda p: break_info(p, mean=None), "no list named 'mean'"),
        (lambda p: break_info(p, layout=99), "is of format fasthpm-videos, 99"),
        (lambda p: os.truncate(p / "frames.bin", 100), "frames.bin has 100 bytes, info.json says"),
        (lambda p: (p / "frames.bin").unlink(), "frames.bin is not there"),
        (lambda p: (p / "videos.npy").write_bytes(b"no table"), "videos.npy cannot be read"),
        (lambda p: np.save(p / "videos.npy", np.zeros(3)), "videos.npy holds float64"),
        (lambda p: break_info(p, num_samples=5), "do not fit info.json"),
    ],
)
def test_damaged_sets_are_refused(
    prepared: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(prepared, tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(UserError, match=message) as error:
        loader_of(tmp_path / "set")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        read_info(tmp_path / "set")


def test_a_row_of_the_manifest_is_found_without_reading_those_before_it(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / "set")
    names = ["plain", 'quo"ted', "two\nlines", "a, comma", "\udce9 of latin-1", ""]
    with (tmp_path / "set" / "manifest.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([MANIFEST, *([name, *"123456789"] for name in names)])
    data, parsed, reader = open_videos(tmp_path / "set"), [], csv.reader

    def counting(lines: Any, *args: Any) -> Any:
        return (parsed.append(row) or row for row in reader(lines, *args))

    monkeypatch.setattr(csv, "reader", counting)
    for video in reversed(range(6)):
        assert data.row(video) == dict(zip(MANIFEST, [names[video], *"123456789"], strict=True))
    assert len(parsed) == 6
    assert data.row(6) == {}
    (tmp_path / "set" / "manifest.csv").unlink()
    assert open_videos(tmp_path / "set").row(0) == {}
