"""Compiling: kept where a folder can be written, done without one too, and told when it lasts."""

import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

from fasthpm import errors
from fasthpm.data import compiling
from fasthpm.data.compiling import compiled
from tests.helpers.launch import ROOT


def add(a: int, b: int) -> int:
    return a + b


@pytest.mark.parametrize("signature", [None, numba.int64(numba.int64, numba.int64)])
def test_a_loop_without_a_folder_to_keep_it_in_is_compiled_all_the_same(
    signature: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def njit(*given: object, **options: object) -> object:
        asked.extend([options] if options else [])  # numba calls it too
        if "cache" in options:
            raise RuntimeError("cannot cache function 'add': no locator available for file '<stdin>'")
        return real(*given, **options)

    real = numba.njit
    monkeypatch.setattr(numba, "njit", njit)
    assert compiled(add, signature)(2, 3) == 5
    assert asked == [{"nogil": True, "cache": True}, {"nogil": True}]


def test_other_errors_of_compiling_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(*_: object, **__: object) -> object:
        raise RuntimeError("no such processor")

    monkeypatch.setattr(numba, "njit", njit)
    with pytest.raises(RuntimeError, match="no such processor"):
        compiled(add)


@pytest.mark.parametrize(("rank", "lasts"), [("0", True), ("1", True), ("0", False)])
def test_who_waits_is_told_why(
    rank: str, lasts: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(errors, "_noted", set())
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(numba, "njit", lambda **_: lambda loop: [time.sleep(0.5 if lasts else 0), loop][1])
    assert compiled(add) is add
    time.sleep(0.1)
    assert capsys.readouterr().err.count("compiling the loader's loop") == (rank == "0" and lasts)


def test_a_loop_is_kept_for_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(
        "from fasthpm.data.compiling import compiled\n\n\n@compiled\ndef add(a, b):\n    return a + b\n\n\n"
        "add(1, 2)\nprint(sum(add.stats.cache_hits.values()), sum(add.stats.cache_misses.values()))\n"
    )
    for expected in ("0 1", "1 0"):
        command = [sys.executable, str(tmp_path / "loop.py")]
        done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr
