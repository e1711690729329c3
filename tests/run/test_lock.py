"""One run per folder: refused while another lives, wherever; let in at once when it is dead."""

import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fasthpm.errors import UserError
from fasthpm.run import lock
from fasthpm.run.lock import FILE, FolderLock


@contextmanager
def elsewhere(act: Callable[[], object]) -> Iterator[int]:
    """A process that has done `act` and then waits; its number."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            lock._held.clear()
            act()
            os.write(writing, b"1")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"1"
    os.close(reading)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def refused(folder: Path, **options: float) -> str:
    with FolderLock(0, **options) as ours, pytest.raises(UserError) as caught:
        ours.take(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def taken(folder: Path, **options: float) -> None:
    with FolderLock(0, **options) as ours:
        ours.take(folder)
        assert json.loads((folder / FILE).read_text())["pid"] == os.getpid()


def note(folder: Path, **changes: object) -> None:
    (folder / FILE).write_text(json.dumps({**lock._note(), **changes}))


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with elsewhere(lambda: FolderLock(0).take(folder)) as pid:
        said = refused(folder)
        assert f"output_dir {folder} is in use by another run (process {pid} on {socket.gethostname()}, since " in said
        assert "another --output_dir" in said
        assert refused(folder) == said  # who was refused has ended nothing
    assert (folder / FILE).is_file()  # killed: its note is there still, and counts for nothing
    taken(folder)
    assert list(folder.iterdir()) == []


def test_one_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with FolderLock(0) as first:
        first.take(tmp_path)
        assert "is in use by another run (this process" in refused(tmp_path / ".." / tmp_path.name)
        FolderLock(1).take(tmp_path)  # another rank of the same run
    taken(tmp_path)


def test_a_folder_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    taken(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with FolderLock(0) as ours:
        ours.take(tmp_path / "used")
        (tmp_path / "used" / "recipe.json").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["recipe.json"]


def test_where_the_system_has_no_locks_the_note_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with elsewhere(lambda: FolderLock(0).take(tmp_path)) as pid:
        assert f"process {pid} on" in refused(tmp_path)
        note(tmp_path, pid=pid, began=1.0)  # another process has its number now
        taken(tmp_path)
    note(tmp_path, pid=pid)
    taken(tmp_path)
    (tmp_path / FILE).write_text('{"host": ')
    taken(tmp_path)


@pytest.mark.parametrize("alive", [True, False])
def test_another_machines_signs_of_life_decide(tmp_path: Path, alive: bool, capsys: pytest.CaptureFixture[str]) -> None:
    note(tmp_path, host="node17", pid=7)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            if alive:
                os.utime(tmp_path / FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        if alive:
            assert "process 7 on node17" in refused(tmp_path, silence=5.0)
        else:
            taken(tmp_path, silence=0.3)
    finally:
        end.set()
        thread.join()
    assert "left locked by process 7 on node17" in capsys.readouterr().err


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with FolderLock(0, beat=0.02) as ours:
        ours.take(tmp_path)
        os.utime(tmp_path / FILE, (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / FILE).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / FILE).stat().st_mtime > 2


def test_a_run_that_was_taken_for_dead_writes_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            lock._held.clear()
            with FolderLock(0, beat=0.02) as ours:
                ours.take(tmp_path)
                note(tmp_path, host="node17", pid=7)
                time.sleep(30)
        finally:
            os._exit(9)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "is in use by another run (process 7 on node17" in line
    assert "ends here" in line
    assert json.loads((tmp_path / FILE).read_text())["pid"] == 7


def test_a_folder_that_another_run_has_taken_stays_its_own(tmp_path: Path) -> None:
    with FolderLock(0) as ours:
        ours.take(tmp_path)
        note(tmp_path, host="node17", pid=7)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == 7


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written (Not a directory); choose another --output_dir" in refused(tmp_path / "file" / "run")
