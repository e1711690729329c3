"""How commands and ranks leave: with their status and their last words, whatever threads are still about."""

import io
import subprocess
import sys
from contextlib import redirect_stderr
from typing import Any

import pytest

from fasthpm.__main__ import COMMANDS, dispatch
from fasthpm.cli import run_command
from tests.helpers.launch import ROOT

PROGRAM = """
import sys, threading, time
from fasthpm.cli import run_rank
from fasthpm.errors import UserError

def main(argv):
    threading.Thread(target=time.sleep, args=(100,)).start()
    sys.stdout.write("written")
    {end}

run_rank(main)
"""


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("pass", 0, ""),
        ("raise UserError('batch_size is 0')", 2, "fasthpm: error: batch_size is 0\n"),
        ("raise KeyboardInterrupt", 130, "fasthpm: interrupted\n"),
        ("raise RuntimeError('our own')", 1, "RuntimeError: our own\n"),
    ],
)
def test_a_rank_leaves_at_once(end: str, status: int, words: str) -> None:
    program = PROGRAM.format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (status, "written")
    assert done.stderr.endswith(words)
    assert ("Traceback" in done.stderr) == (status == 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch([command, "--help"])
    assert caught.value.code == 0
    assert f"fasthpm {command}" in capsys.readouterr().out


def test_a_user_error_is_one_line_and_status_2() -> None:
    stream = io.StringIO()
    with redirect_stderr(stream), pytest.raises(SystemExit) as caught:
        run_command(dispatch, ["pretran"])
    assert caught.value.code == 2
    assert stream.getvalue().count("\n") == 1
    assert "unknown command 'pretran'; did you mean 'pretrain'" in stream.getvalue()


def test_an_internal_error_keeps_its_traceback() -> None:
    def broken(_: Any) -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command(broken)
