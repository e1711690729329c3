"""Preparations that are stopped, killed, crowded out or starved: what is left, and how the next one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep import images, partial, verify, writer
from data_prep.partial import PartFile
from data_prep.samples import Files
from data_prep.sets import read_csv
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, picture, prepare
from tests.helpers.launch import ROOT
from tests.helpers.misbehaving import Numbers, run

CHUNK = 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK", CHUNK)
    monkeypatch.setattr(partial, "COMMIT_SECONDS", 0.0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def undated(content: dict[str, bytes]) -> dict[str, object]:
    """Files' contents without the time of day."""
    return {
        name: json.loads(data) | {"written": ""} if name.endswith(".json") else data for name, data in content.items()
    }


# ------------------------------------------------------------------------------------------------------- same bytes
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    made = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        run(Numbers(tmp_path), tmp_path / str(workers) / "a.beton", workers)
        made.append(undated(files(tmp_path / str(workers))))
    assert made[0] == made[1]
    assert set(made[0]) == {"a.beton", "a.json", "a.files.csv"}


@pytest.mark.parametrize("what", ["die", "starve"])
def test_a_process_that_dies_ends_the_run_and_the_next_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "a.beton"
    with pytest.raises(UserError, match=r"died after .* because memory ran out; run the same command again") as error:
        run(Numbers(tmp_path, what), out)
    assert "\n" not in str(error.value)
    assert files(tmp_path / "out") == {}
    capsys.readouterr()
    run(Numbers(tmp_path), out)
    assert "going on after" in capsys.readouterr().out
    assert not (tmp_path / "out" / ".a.partial").exists()
    (tmp_path / "again").mkdir()
    run(Numbers(tmp_path), tmp_path / "again" / "a.beton")
    assert undated(files(tmp_path / "out")) == undated(files(tmp_path / "again"))


@pytest.mark.parametrize("torn", [b"", b'{"chunk": 3, "pa', b"\0\0\0\n"])
def test_a_torn_end_of_the_journal_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: bytes) -> None:
    out = tmp_path / "a.beton"
    with pytest.raises(UserError):
        run(Numbers(tmp_path, "die"), out)
    folder = tmp_path / ".a.partial"
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(torn)
    with (folder / "a.beton").open("ab") as file:
        file.write(b"not in the journal" * 200_000)  # longer than what will overwrite it
    with (folder / "a.rows").open("ab") as file:
        file.write(b"neither")
    with pytest.raises(UserError):
        run(Numbers(tmp_path, "die", at=32), out)
    capsys.readouterr()
    run(Numbers(tmp_path), out)
    (words,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("going on after")]
    assert int(words.split()[3]) > 20  # so what was appended after the torn end was found again
    (tmp_path / "again").mkdir()
    run(Numbers(tmp_path), tmp_path / "again" / "a.beton")
    assert out.read_bytes() == (tmp_path / "again" / "a.beton").read_bytes()
    verify.main([str(out)])


def test_other_arguments_or_files_start_over_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.beton"
    for source, flags, words in [
        (Numbers(tmp_path), {"jpeg_quality": 50}, "differs in --jpeg_quality; starting over"),
        (Numbers(tmp_path, count=39), {}, "differs in files, outputs; starting over"),
    ]:
        with pytest.raises(UserError, match="died after"):
            run(Numbers(tmp_path, "die"), out, overwrite=True)
        run(source, out, overwrite=True, **flags)
        assert words in capsys.readouterr().out
        assert open_beton(out).info.num_samples == len(source)


def test_a_set_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "a.beton"
    assert run(Numbers(tmp_path), out) is not None
    assert run(Numbers(tmp_path), out) is None
    assert run(Numbers(tmp_path), out, overwrite=True) is not None
    with pytest.raises(UserError, match="use --overwrite"):
        run(Numbers(tmp_path), out, jpeg_quality=80)
    os.truncate(out, 100)
    with pytest.raises(UserError, match="use --overwrite"):
        run(Numbers(tmp_path), out)


@pytest.mark.parametrize("sharded", [False, True])
def test_moving_the_files_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    """Killed between any two steps of the end, the next run completes it: also over an older set."""
    folder = image_folder(tmp_path / "in", 6)
    out = tmp_path / "out" / "a.beton"
    out.parent.mkdir()
    prepare(folder, out)  # the older set, not sharded
    steps, rename, unlink = [0], Path.rename, Path.unlink

    def counted(method):
        def call(self: Path, *args: object, **kwargs: object) -> object:
            if self.parent.name == ".a.partial" or self.parent == out.parent:
                steps[0] -= 1
                if steps[0] == 0:
                    raise KeyboardInterrupt
            return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", counted(rename))
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    interrupted = 0
    for step in range(1, 30):
        steps[0] = step
        try:
            prepare(folder, out, *("--shards", "2") * sharded, "--overwrite", "--preset", "256")
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 3
    stems = ["a-00000-of-00002", "a-00001-of-00002"] if sharded else ["a"]
    names = {f"{stem}.{kind}" for stem in stems for kind in ("beton", "json", "files.csv")}
    assert set(files(out.parent)) == names | {"a.json"}
    verify.main([str(out)])


# ------------------------------------------------------------------------------------------------------- signals
STOPPED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from data_prep import partial, writer
from fasthpm.cli import run_command
from tests.helpers.misbehaving import Numbers, run
writer.CHUNK, partial.COMMIT_SECONDS = 4, 0.0
folder = Path(sys.argv[1])
run_command(lambda argv: run(Numbers(folder, sys.argv[2]), folder / "out" / "a.beton"))
"""


def start(folder: Path, what: str) -> subprocess.Popen:
    """A preparation in another process, once sample 20 hangs and all before it are in the journal."""
    (folder / "out").mkdir(exist_ok=True)
    code = STOPPED.format(root=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), what], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    journal = folder / "out" / ".a.partial" / "journal.jsonl"
    while not (list(folder.glob("hanging-*")) and journal.exists() and len(journal.read_bytes().splitlines()) >= 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


def finish_and_compare(folder: Path) -> None:
    """The same preparation again gives what an undisturbed one does."""
    run(Numbers(folder), folder / "out" / "a.beton")
    (folder / "again").mkdir()
    run(Numbers(folder), folder / "again" / "a.beton")
    assert undated(files(folder / "out")) == undated(files(folder / "again"))


def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(tmp_path, "hang")
    workers = psutil.Process(process.pid).children(recursive=True)
    with pytest.raises(UserError, match="another preparation is writing"):
        run(Numbers(tmp_path), tmp_path / "out" / "a.beton")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files(tmp_path / "out") == {}
    finish_and_compare(tmp_path)  # at once, though the processes of the killed one may not be gone yet
    assert "going on after 20 of 40 images" in capsys.readouterr().out
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []  # they die with their parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_chunk_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "hang")
    process.send_signal(number)
    time.sleep(0.2)
    for worker in psutil.Process(process.pid).children(recursive=True):
        assert worker.is_running()  # a signal to the parent is not theirs
    (hanging,) = tmp_path.glob("hanging-*")
    assert process.poll() is None  # it waits for the chunk
    os.kill(int(hanging.name.removeprefix("hanging-")), signal.SIGKILL)  # that never comes
    _, words = process.communicate(timeout=60)
    assert "\nTraceback" not in words
    assert "run the same command again" in words
    assert files(tmp_path / "out") == {}
    finish_and_compare(tmp_path)


class Signals(Numbers):
    """Sends its parent a signal when sample 20 is read."""

    def interrupt(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)


def test_ctrl_c_is_an_interruption_and_keeps_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, handler = tmp_path / "a.beton", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Signals(tmp_path, "interrupt"), out)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "run the same command again to continue" in capsys.readouterr().err
    assert (tmp_path / ".a.partial" / "journal.jsonl").exists()
    run(Numbers(tmp_path), out)
    assert "going on after" in capsys.readouterr().out
    verify.main([str(out)])


# ------------------------------------------------------------------------------------------------------- the disk
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(5 << 20 | 900 << 10))
    out = small_disk / "a.beton"
    with pytest.raises(UserError, match=r"no space left .* run the same command again to continue") as error:
        run(Numbers(tmp_path, count=200), out)
    assert "\n" not in str(error.value)
    assert set(files(small_disk)) == {"ballast"}
    ballast.unlink()
    run(Numbers(tmp_path, count=200), out)
    assert "going on after" in capsys.readouterr().out
    run(Numbers(tmp_path, count=200), tmp_path / "b.beton")
    assert out.read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_a_read_only_disk_is_one_line(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="is not writable"):
        run(Numbers(tmp_path), small_disk / "a.beton")


# ------------------------------------------------------------------------------------------------------- rejects
def test_raising_max_rejected_reads_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "in", 12)
    (folder / "ant" / "bad.png").write_bytes(b"x")
    out = tmp_path / "a.beton"
    with pytest.raises(UserError, match="1 of 13 images cannot be read"):
        prepare(folder, out, "--max_rejected", "0")
    monkeypatch.setattr(Files, "_bytes", lambda self, index: b"")
    prepare(folder, out, "--max_rejected", "1")
    assert open_beton(out).info.num_samples == 12
    assert "going on after 13 of 13" in capsys.readouterr().out


def test_repaired_files_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "in", 12)
    (folder / "ant" / "bad.png").write_bytes(b"x")
    out = tmp_path / "a.beton"
    with pytest.raises(UserError, match="1 of 13 images cannot be read"):
        prepare(folder, out, "--max_rejected", "0")
    picture(99).save(folder / "ant" / "bad.png")
    prepare(folder, out, "--max_rejected", "0")
    assert "all images were read before, 1 of them unreadable; starting over" in capsys.readouterr().out
    assert open_beton(out).info.num_samples == 13
    assert not (tmp_path / "a.rejected.csv").exists()


def test_files_that_change_while_they_are_prepared_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(tmp_path / "in", 12)
    listed = images.open_source

    def list_and_spoil(*args: object, **kwargs: object) -> object:
        source = listed(*args, **kwargs)
        (folder / "ant" / "000.png").unlink()
        os.truncate(folder / "ant" / "002.png", 200)
        os.truncate(folder / "bee" / "001.png", 0)
        return source

    monkeypatch.setattr(images, "open_source", list_and_spoil)
    out = prepare(folder, tmp_path / "a.beton", "--max_rejected", "3")
    rows = {Path(path).name: why for path, why in read_csv(tmp_path / "a.rejected.csv")}
    assert set(rows) == {"path", "000.png", "002.png", "001.png"}
    assert "No such file" in rows["000.png"]
    assert "empty" in rows["001.png"]
    assert open_beton(out).info.num_samples == 9


# ------------------------------------------------------------------------------------------------------- pages
def test_no_sample_straddles_a_page_and_pages_grow(tmp_path: Path) -> None:
    rng, part = np.random.default_rng(0), PartFile(tmp_path / "a.beton", 1000)
    spans = []
    for _ in range(3000):
        size = int(rng.integers(1, 150_000)) if rng.random() < 0.99 else int(rng.integers(1, 20 << 20))
        at = part._place(size)
        assert not spans or at >= spans[-1][1]
        spans.append((at, at + size))
    assert part.page == 1 << 25
    for start, end in spans:
        assert start // part.page == (end - 1) // part.page
    assert sum(end - start for start, end in spans) / part.offset > 0.8
