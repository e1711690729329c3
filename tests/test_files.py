"""Files are written as a whole or not at all, and every file of the package by `fasthpm.files`."""

import ast
import contextlib
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fasthpm import files
from fasthpm.errors import UserError, warn
from tests.helpers.launch import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_replaced_changes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    (tmp_path / ".writing-a.txt").write_text("of a process that was killed")
    with files.replacing(path, durable=True) as aside:
        assert not aside.exists()
        assert aside.parent == path.parent
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_after_an_error_there_is_what_was_there(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def failing(aside: Path) -> None:
        if folder:
            (aside / "in").mkdir(parents=True)
        else:
            aside.write_text("new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), files.replacing(path) as aside:
        failing(aside)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "out") as aside:
        aside.mkdir()
        files.write_json(aside / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "out" / "a.json") == {"a": 1}
    assert names(tmp_path) == ["out"]


def test_durable_files_reach_the_disk_before_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, bool]] = []
    monkeypatch.setattr(files, "fsync", lambda path: seen.append((path, (tmp_path / "a").exists())))
    files.write_text(tmp_path / "a", "x", durable=True)
    files.write_text(tmp_path / "b", "x")
    assert seen == [(tmp_path / ".writing-a", False)]


@pytest.mark.parametrize("name", ["n" * 250 + ".png", "é" * 127, os.fsdecode(b"\xe9" * 255)])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    files.write_text(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(UserError) as found, files.writing(path, "choose another --output"):
        files.write_json(path, {})
    assert str(found.value) == f"{path} cannot be written (No such file or directory); choose another --output"
    with pytest.raises(UserError, match="3 requested and 2 written"), files.writing(path, ""):
        raise OSError("3 requested and 2 written")  # numpy's has no number


def test_tensors_are_saved_or_the_error_is_the_systems(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    files.save_tensors(tensors, tmp_path / "a.safetensors", {"what": "numbers"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensors["a"])
    assert files.read_file(tmp_path / "a.safetensors")[1] == {"what": "numbers"}
    with pytest.raises(OSError, match=r"^\[Errno \d+\]") as found:
        files.save_tensors(tensors, tmp_path / "missing" / "a.safetensors")
    assert found.value.errno == errno.ENOENT
    assert found.value.strerror == os.strerror(errno.ENOENT)


def test_an_error_that_is_no_disks_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise SafetensorError("the header is too large")

    monkeypatch.setattr(files, "save_file", failing)
    with pytest.raises(SafetensorError, match="too large"):
        files.save_tensors({}, tmp_path / "a")


def test_hashes_are_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HASH_CHUNK", 2)
    (tmp_path / "a").write_bytes(b"abcde")
    read: list[int] = []
    expected = "36bbe50ed96841d10443bcb670d6554f0a34b761be67ec9c4a8ad2c0c44ca42c"
    assert files.file_hash(tmp_path / "a", read.append) == files.file_hash(tmp_path / "a") == expected
    assert read == [2, 2, 1]


@pytest.mark.parametrize("text", [None, "", '{"a": 1', "[1]", "1"])
def test_json_that_is_no_object_reads_as_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "a").write_text(text)
    assert files.read_json(tmp_path / "a") == {}
    files.write_json(tmp_path / "a", {"a": 1})
    assert (tmp_path / "a").read_text() == json.dumps({"a": 1}, indent=2) + "\n"


def test_a_warning_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    warn("something")
    assert capsys.readouterr() == ("", "warning: something\n")


# -------------------------------------------------------------------------------------------------- one place
ONE_PLACE = {
    "replace": ("os", "files.py"),
    "save_file": ("safetensors.torch", "files.py"),
    "cpu_count": ("os", "machine.py"),
    "sched_getaffinity": ("os", "machine.py"),
}


def uses(path: Path) -> set[str]:
    """The names in `ONE_PLACE` that a file takes from their modules."""
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ONE_PLACE]
    found = {node.attr for node in attributes if ast.unparse(node.value) == ONE_PLACE[node.attr][0]}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named = {(node.module, alias.name) for node in imports for alias in node.names}
    return found | {name for name, (module, _) in ONE_PLACE.items() if (module, name) in named}


def test_files_are_written_and_cores_counted_in_one_place() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} uses {name}"
        for package in ("fasthpm", "data_prep", "bench")
        for path in (ROOT / package).rglob("*.py")
        for name in uses(path)
        if path != ROOT / "fasthpm" / ONE_PLACE[name][1]
    ]
    assert wrong == []
    assert uses(ROOT / "fasthpm" / "files.py") == {"replace", "save_file"}
    assert uses(ROOT / "fasthpm" / "machine.py") == {"cpu_count", "sched_getaffinity"}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (9.9e6, "9.44 MiB"),
        (1023 * 1024, "0.999 MiB"),
        (5 * 2**30, "5 GiB"),
        (3e14, "273 TiB"),
    ],
)
def test_sizes_have_the_unit_that_fits(count: float, text: str) -> None:
    assert files.size_text(count) == text


# ------------------------------------------------------------------------------------------------- before the work
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("free.png", ""),
        ("new/deep/free.PNG", ""),
        ("there.png", ""),
        ("free.jpg", r"expected a name that ends in \.png or \.gif"),
        ("free", r"expected a name that ends in \.png or \.gif"),
        ("folder.png", "which is a folder; name a file"),
        ("there.png/a/b.png", "would lie in .*there.png, and that is a file; choose another"),
        ("read.png", "would overwrite what is read or was saved; choose another name"),
        ("link.png", "would overwrite what is read or was saved"),
        ("folder.png/../read.png", "would overwrite what is read or was saved"),
        ("saved/a.png", "would overwrite what is read or was saved"),
        ("saved/new.png", ""),
    ],
)
def test_a_place_to_write_is_looked_at_before_the_work(tmp_path: Path, name: str, words: str) -> None:
    for folder in ("folder.png", "saved"):
        (tmp_path / folder).mkdir()
    for file in ("there.png", "read.png", "saved/a.png"):
        (tmp_path / file).write_text("kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "read.png")
    sources = (tmp_path / "read.png", None, tmp_path / "saved", tmp_path / "missing")
    with pytest.raises(UserError, match=f"^output is .*{words}") if words else contextlib.nullcontext():
        files.check_place(tmp_path / name, "output", endings=(".png", ".gif"), sources=sources)
    assert not (tmp_path / "new").exists()
