"""Copying prepared sets: what is taken along, checked, left out, and left behind."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import copy, verify
from data_prep.copy import copy_sets
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a single set a and a sharded set b."""
    folder = tmp_path_factory.mktemp("sets")
    source = image_folder(folder / "in", 6)
    (source / "ant" / "bad.png").write_bytes(b"x")
    (folder / "out").mkdir()
    prepare(source, folder / "out" / "a.beton", "--max_rejected", "1")
    prepare(source, folder / "out" / "b.beton", "--max_rejected", "1", "--shards", "2")
    return folder / "out"


@pytest.fixture
def original(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "original"))


def test_everything_is_copied_and_sound(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy.main([str(original / "a.beton"), str(original / "b.beton"), str(tmp_path / "new" / "copy")])
    target = tmp_path / "new" / "copy"
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in original.iterdir()}
    assert "3 data files copied and checked, 0 were there already" in capsys.readouterr().out
    for name in ("a.beton", "b.beton"):
        verify.main([str(target / name)])


def test_what_is_there_is_not_copied_again_unless_it_is_damaged(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    sets = [original / "a.beton", original / "b.beton"]
    assert copy_sets(sets, target) == (3, 0)
    before = (target / "a.beton").stat().st_ino
    (target / "b-00001-of-00002.beton").unlink()
    damaged = target / "b-00000-of-00002.beton"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (target / ".a.beton.copying").write_bytes(b"left by a kill")
    assert copy_sets(sets, target) == (2, 1)
    assert (target / "a.beton").stat().st_ino == before
    verify.main([str(target / "b.beton")])


def test_a_damaged_original_is_found_and_nothing_of_it_is_left(original: Path, tmp_path: Path) -> None:
    path = original / "b-00001-of-00002.beton"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="has sha256"):
        copy_sets([original / "b.beton"], tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["b-00000-of-00002.beton"]


def test_a_kill_leaves_no_whole_name(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            copy_sets([original / "a.beton"], tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: os.truncate(folder / "a.beton", 100), "has 100 bytes, its sidecar says"),
        (lambda folder: (folder / "a.beton").unlink(), "is not there"),
        (lambda folder: (folder / "a.json").unlink(), "cannot be read"),
    ],
)
def test_incomplete_sets_are_refused_before_anything_is_copied(
    original: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(original)
    with pytest.raises(UserError, match=words):
        copy_sets([original / "b.beton", original / "a.beton"], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_too_little_space_and_bad_targets_are_one_line(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"lies in .* itself"):
        copy_sets([original / "a.beton"], original)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"DEST_DIR is .*file, which is a file"):
        copy_sets([original / "a.beton"], tmp_path / "file")
    (tmp_path / "other").mkdir()
    shutil.copy(original / "a.beton", tmp_path / "other")
    shutil.copy(original / "a.json", tmp_path / "other")
    with pytest.raises(UserError, match="have the same name"):
        copy_sets([original / "a.beton", tmp_path / "other" / "a.beton"], tmp_path / "copy")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(UserError, match="has 0 MiB free, the copy needs"):
        copy_sets([original / "a.beton"], tmp_path / "copy")
