"""Which members of a tar shard are a sample."""

import io
import tarfile
from pathlib import Path

import pytest

from data_prep.sources import open_source
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import jpeg_bytes, picture

pytest.importorskip("webdataset", reason="webdataset is not installed")
JPEG = jpeg_bytes(picture(0))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("members", "labels", "words"),
    [
        ({"0.jpg": JPEG, "0.cls": b"2", "0.json": b"{}", "1.jfif": JPEG, "1.cls": b"0"}, {"0.jpg": 2, "1.jfif": 0}, ""),
        ({"0.jpg": JPEG, "0.cls": b"2", "1.jpg": JPEG, "2.jpg": JPEG, "2.cls": b"-1"}, [2, -1, -1], "2 of them unlab"),
        ({"s.01.jpg": JPEG, "s.02.jpg": JPEG, "s.3.JPG": JPEG}, [0, 0, 0], ""),
        ({"s.01.jpg": JPEG, "s.01.cls": b"3", "s.02.jpg": JPEG, "s.02.cls": b"1"}, [3, 1], ""),
        ({"v1.2.jpg": JPEG, "v1.cls": b"3", "w.jpg": JPEG, "w.cls": b"0"}, {"v1.2.jpg": 3, "w.jpg": 0}, ""),
        ({"0.jpg": JPEG, "0.seg.png": JPEG, "0.PNG": JPEG, "0.cls": b"1"}, {"0.jpg": 1}, "2 (0.PNG, 0.seg.png)"),
        ({"0.jpg": JPEG, "0.JPG": JPEG, "0.cls": b"1"}, {"0.jpg": 1}, "1 (0.JPG)"),
        ({"a/0": JPEG, "1.dat": JPEG, "LICENSE": b"free"}, {"a/0": 0, "1.dat": 0}, "1 (LICENSE)"),
        ({"0.jpg": JPEG, "__MACOSX/0.jpg": JPEG, "._0.jpg": b"x", "1.txt": b"lost"}, {"0.jpg": 0, "1": 0}, ""),
    ],
)
def test_images_are_counted_by_member(
    tmp_path: Path, members: dict[str, bytes], labels: dict[str, int] | list[int], words: str
) -> None:
    source = open_source(str(write_tar(tmp_path / "t.tar", members)), num_workers=1)
    if isinstance(labels, dict):
        assert source.names == [f"./{name}" for name in labels] or source.names == [f"t.tar/{name}" for name in labels]
        labels = list(labels.values())
    assert source.labels.tolist() == labels
    assert words in "; ".join(source.words)
    assert words or not source.words
    kept = [index for index in range(len(source)) if source.table[index, 1] >= 0]
    assert all(source.sample(index)[0] == JPEG for index in kept)
    assert len(kept) == len(source) - ("1.txt" in members)


def test_images_that_share_a_key_and_a_label_are_one_line(tmp_path: Path) -> None:
    members = {"s.01.jpg": JPEG, "s.02.jpg": JPEG, "s.cls": b"3"}
    words = r"t\.tar has 2 images of the key 's' \(s\.01\.jpg, s\.02\.jpg\) and one label .* first dot .*WebDataset"
    with pytest.raises(UserError, match=words):
        open_source(str(write_tar(tmp_path / "t.tar", members)), num_workers=1)


def test_one_odd_label_among_numbers_is_one_line(tmp_path: Path) -> None:
    members = {f"{k}.{kind}": JPEG if kind == "jpg" else b"%d" % k for k in range(4) for kind in ("jpg", "cls")}
    with pytest.raises(UserError, match=r"t\.tar: 2\.jpg has the label 'two', but 3 others have numbers such as 0"):
        open_source(str(write_tar(tmp_path / "t.tar", members | {"2.cls": b"two"})), num_workers=1)
