"""Where photographs come from."""

from pathlib import Path

import pytest
from PIL import Image

from data_prep import photographs
from fasthpm.errors import UserError


def test_large_files_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "FEWEST_SOURCES", 2)
    for name, size in (("b/two.jpeg", (1200, 1000)), ("a/one.jpg", (1000, 1000)), ("small.jpg", (1200, 999))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "a" / "link.jpg").symlink_to("one.jpg")
    (tmp_path / "broken.jpg").write_text("not an image")
    assert photographs.sources([tmp_path]) == [tmp_path / "a" / "one.jpg", tmp_path / "b" / "two.jpeg"]


def test_too_few_sources_name_the_packages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install lomiri-wallpapers"):
        photographs.sources([tmp_path])


def test_a_photograph_in_several_sizes_counts_once_and_a_drawing_not() -> None:
    wallpapers = Path("/usr/share/wallpapers")
    one, other = wallpapers / "Kite/contents/images/2560x1600.jpg", wallpapers / "Path/contents/images/2560x1600.jpg"
    files = [
        Path("/a/Dune.jpg"),
        Path("/a/Dune_3840x2160.jpg"),
        Path("/b/string.jpg"),
        one,
        wallpapers / "Kite/contents/images_dark/5120x2880.jpg",
        wallpapers / "Flow/contents/images/5120x2880.jpg",
        other,
    ]
    assert photographs.photographs(files) == [files[0], one, other]


def test_a_source_is_rgb_and_not_larger_than_it_need_be(tmp_path: Path) -> None:
    Image.new("L", (3200, 2400), 7).save(tmp_path / "large.jpg")
    image = photographs.read_source(tmp_path / "large.jpg")
    assert (image.mode, image.size) == ("RGB", (1600, 1200))
