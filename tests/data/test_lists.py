"""Lists of files, of images and of videos alike."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.video_sources import open_videos
from fasthpm.data.pixels import list_images
from fasthpm.errors import UserError

NAMES = ("0.x", "a b.x", "a, b.x", "a;b.x", "#1.x", 'say "hi".x', "caf\udce9.x")
Listed = Callable[[Path], tuple[list[str], list[int], tuple[str, ...]]]


def of_images(path: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    found = list_images(path)
    return [Path(name).name for name in found.paths], list(found.labels), found.classes


def of_videos(path: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    found = open_videos(path)
    return list(found.names), found.labels.tolist(), tuple(found.classes)


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    for name in (*NAMES, *(f"{k}.x" for k in range(1, 12))):
        (tmp_path / name).touch()
    return [*NAMES, *(f"{k}.x" for k in range(1, 12))]


@pytest.mark.parametrize("listed", [of_images, of_videos])
@pytest.mark.parametrize("ending", [".txt", ".csv"])
@pytest.mark.parametrize("form", ["{}\t{}", "{},{}", "{};{}", "{} {}", '"{}",{}', '"{}" "{}"', '"{}"\t{}.0', "{} , {}"])
@pytest.mark.parametrize("around", [b"", b"\xef\xbb\xbf", b"# made by hand\r\n", b"\n\n"])
def test_names_and_numbers_of_any_form(
    names: list[str], tmp_path: Path, listed: Listed, ending: str, form: str, around: bytes
) -> None:
    lines = [form.format(name.replace('"', '""') if form[0] == '"' else name, k) for k, name in enumerate(names)]
    text = "\r\n".join(lines).encode("utf-8", "surrogateescape")
    (tmp_path / f"list{ending}").write_bytes(around + text)
    assert listed(tmp_path / f"list{ending}") == (names, list(range(len(names))), tuple(map(str, range(len(names)))))


def test_a_byte_order_mark_of_utf_16(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("0.x\t3\n1.x\t1\n", encoding="utf-16")
    assert of_images(tmp_path / "list.txt")[:2] == (["0.x", "1.x"], [3, 1])


@pytest.mark.parametrize("listed", [of_images, of_videos])
def test_unlabelled_lines_and_comments(names: list[str], tmp_path: Path, listed: Listed) -> None:
    lines = ["#1.x\t4", "# 2.x\t5", "#2.x\t5", "0.x\t", "3.x\t-1", "10.x\t10"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found, labels, classes = listed(tmp_path / "list.txt")
    assert (found, labels) == (["#1.x", "0.x", "3.x", "10.x"], [4, -1, -1, 10])
    assert len(classes) == 11


@pytest.mark.parametrize("listed", [of_images, of_videos])
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("path label\n0.x 0\n1.x 1", "line 1 is 'path label', a header and no file; remove that line"),
        ("Image_Path,class_id\n0.x,cat\n1.x,ant", "line 1 is 'Image_Path class_id', a header"),
        ("# mine\nwhat so\n0.x 3\n1.x 1\n2.x 2", "line 2 has the label 'so', perhaps a header"),
        ("0.x 0\n1.x 1\n\n2.x two\n3.x 3", "line 4 has the label 'two', but 3 others have numbers such as 0"),
        ("0.x\t0\n1.x", "line 2"),
    ],
)
def test_one_odd_line_is_one_line_of_error(
    names: list[str], tmp_path: Path, listed: Listed, lines: str, words: str
) -> None:
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=words) as error:
        listed(tmp_path / "list.txt")
    assert "\n" not in str(error.value)


def test_paths_alone_may_hold_any_mark(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\n".join(names).encode("utf-8", "surrogateescape"))
    assert of_images(tmp_path / "list.txt") == (names, [0] * len(names), ("list",))
