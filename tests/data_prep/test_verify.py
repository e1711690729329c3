"""Verifying prepared sets: a flipped byte, an image that does not decode, an index or a list that does not fit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import copy, verify
from data_prep.sets import read_index
from fasthpm.data.ffcv.beton import files_path, open_beton
from fasthpm.errors import UserError
from fasthpm.files import file_hash
from tests.helpers.data_fixtures import image_folder, prepare


def test_verify_accepts_a_sound_set_and_catches_one_flipped_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(image_folder(tmp_path / "in", 6), tmp_path / "set.beton", "--write_mode", "proportion")
    verify.main([str(out)])
    assert "is sound: 6 images" in capsys.readouterr().out
    position = int(open_beton(out).positions[3]) + 10
    with out.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match="has sha256"):
        verify.main([str(out)])


def test_verify_decodes_every_image(tmp_path: Path) -> None:
    out = prepare(image_folder(tmp_path / "in", 6), tmp_path / "set.beton")
    beton, data = open_beton(out), bytearray(out.read_bytes())
    for index in (2, 4):
        start, length = int(beton.positions[index]), int(beton.lengths[index])
        data[start : start + length] = bytes(length)
    out.write_bytes(data)
    sidecar = beton.sidecar | {"sha256": file_hash(out)}
    out.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=r"2 of 6 images do not decode, the first is sample 2 \((ant|bee)/00\d.png\)"):
        verify.main([str(out)])
    out.with_suffix(".json").write_text(json.dumps(sidecar | {"counts": [4, 2]}))
    with pytest.raises(UserError, match="samples per class"):
        verify.main([str(out)])


def test_command_lines_end_with_status_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep.verify", str(tmp_path / "no.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("fasthpm: error: ")
    assert done.stderr.count("\n") == 1


def test_verify_finds_an_index_that_does_not_fit(tmp_path: Path) -> None:
    many = prepare(image_folder(tmp_path / "in", 8), tmp_path / "a.beton", "--shards", "2")
    index = read_index(many)
    for name, wrong in [("counts", [5, 3]), ("mean", [0.1, 0.1, 0.1]), ("classes", ["a", "b"]), ("num_samples", 9)]:
        many.with_suffix(".json").write_text(json.dumps(index | {name: wrong}))
        with pytest.raises(UserError, match=name):
            verify.main([str(many)])
    many.with_suffix(".json").write_text(json.dumps(index | {"shards": ["../a.beton"]}))
    with pytest.raises(UserError, match="names the shard"):
        verify.main([str(many)])


def test_verify_checks_the_list_of_files(tmp_path: Path) -> None:
    out = prepare(image_folder(tmp_path / "in", 4), tmp_path / "a.beton")
    lines = files_path(out).read_text().splitlines(keepends=True)
    for wrong, words in [
        (lines[:-1], "lists 3 files"),
        (lines[1:], "line 1"),
        ([*lines[:2], "a,b\n", *lines[3:]], "line 3"),
    ]:
        files_path(out).write_text("".join(wrong))
        with pytest.raises(UserError, match=words):
            verify.main([str(out)])
    files_path(out).unlink()  # older sets have none
    verify.main([str(out)])


@pytest.mark.parametrize("command", [lambda path: verify.main([path]), lambda path: copy.main([path, f"{path}-copy"])])
def test_what_is_no_prepared_set_is_called_what_it_is(tmp_path: Path, command: Callable[[str], None]) -> None:
    """By verify and copy alike, which have no --data_path to advise."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    image_folder(tmp_path / "images", 2)
    kinds = {"run": "is the folder of a run, expected a prepared set", "images": "is a folder, expected a prepared set"}
    for name, message in {**kinds, "nothing": "is not there; expected a prepared set"}.items():
        with pytest.raises(UserError, match=message) as caught:
            command(str(tmp_path / name))
        assert "--data_path" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]
