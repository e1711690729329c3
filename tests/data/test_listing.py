"""What a folder holds, for images and videos alike."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from data_prep.sets import notes_path, rejected_path
from data_prep.sources import open_source
from data_prep.video_sources import open_videos
from fasthpm.data import read_info
from fasthpm.data.ffcv.beton import files_path, sidecar_path
from fasthpm.data.listing import files_below
from fasthpm.data.pixels import list_images
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, picture

FORMATS = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c": "JPEG", "d.jpe": "JPEG", "e.PNG": "PNG", "f": "PNG", "g": "GIF"}
FORMATS |= {"h": "TIFF", "i.dat": "WEBP", "j": "BMP", "k": "JPEG2000"} | (
    {"l": "AVIF"} if features.check("avif") else {}
)


def relative(found: Any, folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in found.paths]


def test_all_commands_see_the_same_images_by_name_or_content(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "k").mkdir(parents=True)
    for name, kind in FORMATS.items():
        picture(1).save(folder / "k" / name, kind)
    assert relative(list_images(folder), folder) == open_source(str(folder)).names == sorted(f"k/{n}" for n in FORMATS)
    (folder / "k" / "notes.txt").write_text("no image")
    os.mkfifo(folder / "k" / "pipe")
    found = list_images(folder)
    assert len(found.paths) == len(FORMATS)
    assert "left out, no images by name or content: 2 (k/notes.txt, k/pipe)" in found.words


def test_what_systems_leave_behind_is_no_sample(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 8)
    for name in (
        "__MACOSX/ant",
        ".Trashes",
        "$RECYCLE.BIN",
        "lost+found",
        "ant/@eaDir/000.png",
        "bee/.thumbs",
        "empty",
    ):
        (folder / name).mkdir(parents=True)
        if name != "empty":
            picture(1).save(folder / name / "x.png")
    for name in ("Thumbs.db", "ant/Thumbs.db", "bee/desktop.ini", "bee/._000.png"):
        picture(1).save(folder / name, "PNG")
    for source in (list_images(folder), open_source(str(folder))):
        assert source.classes == ("ant", "bee", "empty")
        assert np.bincount(source.labels).tolist() == [4, 4]
        words = "\n".join(source.words)
        assert "class folders without images: 1 (empty)" in words
        assert "left out, a system's own: 7 ($RECYCLE.BIN, __MACOSX, lost+found, …)" in words


def test_what_preparation_writes_is_no_sample(tmp_path: Path) -> None:
    image_folder(tmp_path, 2)
    flat, tree = tmp_path / "ant", tmp_path
    out = Path("set.beton")
    ours = [path.name for path in (out, sidecar_path(out), files_path(out), rejected_path(out), notes_path(out))]
    ours += ["b.rejected.csv", "b.notes.csv", "c.json", "c-00000-of-00002.beton"]
    for name in ours:
        (flat / name).write_bytes(jpeg_bytes(picture(1)))
        (tree / name).write_bytes(jpeg_bytes(picture(1)))
    (tree / ".set.partial").mkdir()
    marks = {"run": ("metrics.jsonl", "checkpoints"), "maps": ("maps.npz", "images.csv")}
    for name, files in (marks | {"videos": ("info.json", "frames.bin")}).items():
        (tree / name).mkdir()
        for file in (*files, "x.png"):
            (tree / name / file).touch()
    for folder in (flat, tree):
        assert len(list_images(folder).paths) == len(open_source(str(folder))) == {flat: 1, tree: 2}[folder]
    assert list_images(tree).classes == ("ant", "bee")
    (flat / "mine.json").write_text("{}")  # beside no set: a file as any other
    assert len(open_source(str(flat))) == 2


@pytest.mark.parametrize("listed", [list_images, open_videos, lambda path: open_source(str(path)), read_info])
@pytest.mark.parametrize("closed", ["", "bee", "ant/more"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: Callable[[Path], Any], closed: str, error: OSError
) -> None:
    folder, scandir = image_folder(tmp_path / "in", 4), os.scandir
    (folder / "ant" / "more").mkdir()

    def scan(path: Any) -> Any:
        if Path(path) == folder / closed:
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match="cannot be listed"):
        files_below(folder)  # as --masks does
    with pytest.raises(UserError, match=rf"folder {folder / closed} cannot be listed \({error.strerror}\)"):
        listed(folder)


def test_a_link_that_leads_up_is_not_followed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 4)
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "ant" / "again").symlink_to(folder / "ant")
    assert np.bincount(list_images(folder).labels).tolist() == [2, 2]


@pytest.mark.parametrize("ending", ["mts", "m2ts", "wmv", "vob", "ogv", "mp4", "f4v", "rm"])
def test_loose_videos_are_an_error_and_pictures_are_not(tmp_path: Path, ending: str) -> None:
    for name in ("a/x.mp4", "b/x.mp4", "b/cover.png", "cover.jpg", "about.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = open_videos(tmp_path)
    assert (found.names, found.classes) == (["a/x.mp4", "b/x.mp4"], ("a", "b"))
    assert "left out, no videos by name or content: 1 (b/cover.png)" in found.words
    assert "left out, beside the class folders: 2 (about.txt, cover.jpg)" in found.words
    (tmp_path / f"loose.{ending}").touch()
    with pytest.raises(UserError, match=rf"both folders and videos \(loose\.{ending}"):
        open_videos(tmp_path)


def test_images_of_unknown_names_lie_loose_too(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 2)
    Image.new("RGB", (9, 9)).save(folder / "loose", "JPEG")
    with pytest.raises(UserError, match=r"both folders and images \(loose, 1 in all\)"):
        list_images(folder)
