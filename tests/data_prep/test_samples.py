"""Files of the same names that are others."""

import json
import os
from pathlib import Path

import pytest

from data_prep import writer
from data_prep.plan import describe_job
from data_prep.samples import have_changed
from data_prep.sources import open_source
from data_prep.video_sources import open_videos
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, picture, prepare
from tests.helpers.video_fixtures import prepare_videos


def touch(path: Path, seconds: int = 100) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + seconds * 10**9))


@pytest.mark.parametrize("opened", [lambda path: open_source(str(path)), open_videos])
def test_sizes_and_times_or_all_bytes_tell_files_apart(tmp_path: Path, opened) -> None:
    folder = image_folder(tmp_path / "in", 4)
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".mp4"))
    paths, source = sorted(folder.rglob("*.mp4")), opened(folder)
    for by_hash in (False, True):
        source.by_hash = by_hash
        before = source.contents()
        assert not have_changed(before, source.contents())
        touch(paths[1])
        assert have_changed(before, source.contents()) != by_hash
        assert source.contents()["newest"] == "ant/002.mp4"
        content = paths[2].read_bytes()
        paths[2].write_bytes(content[:-1] + b"x")
        assert have_changed(before, source.contents())
        paths[2].write_bytes(content)
    paths[0].unlink()
    assert have_changed(before, source.contents())


def test_a_set_of_files_that_have_changed_is_not_taken_for_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = image_folder(tmp_path / "in", 4), tmp_path / "a.beton"
    (folder / "ant" / "bad.png").touch()
    prepare(folder, out, "--max_rejected", "1", "--check_content")
    touch(folder / "ant" / "000.png")
    prepare(folder, out, "--check_content")  # the same bytes
    assert "nothing to do" in capsys.readouterr().out
    words = r"a\.beton was prepared .* some have changed since \(the newest is ant/bad\.png\); use --overwrite"
    picture(9).save(folder / "ant" / "bad.png")
    touch(folder / "ant" / "bad.png", 200)
    for flags in ([], ["--check_content"]):
        with pytest.raises(UserError, match=words):
            prepare(folder, out, *flags)
    prepare(folder, out, "--overwrite")
    assert open_beton(out).info.num_samples == 5
    sidecar = json.loads(out.with_suffix(".json").read_text())
    del sidecar["contents"]  # an older version's
    out.with_suffix(".json").write_text(json.dumps(sidecar))
    capsys.readouterr()
    prepare(folder, out)
    shown = capsys.readouterr().out
    assert "before sizes and times of files were noted" in shown
    assert "nothing to do" in shown


@pytest.mark.parametrize("older", [False, True])
def test_an_unfinished_preparation_notices_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], older: bool
) -> None:
    folder, out = image_folder(tmp_path / "in", 6), tmp_path / "a.beton"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, out)
    picture(9).save(folder / "ant" / "000.png")
    touch(folder / "ant" / "000.png")
    if older:  # one that noted nothing can go on as it always could, and says so
        (tmp_path / ".a.partial" / "contents.json").unlink()
    prepare(folder, out)
    shown = capsys.readouterr().out
    assert ("going on after 6 of 6" in shown) == older
    assert ("before sizes and times of files were noted" in shown) == older
    assert ("files have changed since" in shown and "ant/000.png); starting over" in shown) != older


def test_what_was_prepared_before_sizes_were_noted_has_the_same_job(tmp_path: Path) -> None:
    source = open_source(str(image_folder(tmp_path / "in", 4)))
    before = describe_job(source, source.classes, [], writer.WriteOptions())
    touch(tmp_path / "in" / "ant" / "000.png")
    assert describe_job(source, source.classes, [], writer.WriteOptions()) == before


def test_videos_that_have_changed_are_news(source: Path, tmp_path: Path) -> None:
    one = tmp_path / "in" / "a.mp4"
    one.parent.mkdir()
    one.write_bytes((source / "ant" / "000.mp4").read_bytes())
    prepare_videos(one.parent, tmp_path / "set")
    touch(one)
    with pytest.raises(UserError, match=r"some have changed since \(the newest is a\.mp4\); use --overwrite"):
        prepare_videos(one.parent, tmp_path / "set")
