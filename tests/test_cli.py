"""How commands and ranks leave: with their status and their last words, whatever threads are still about."""

import contextlib
import io
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from fasthpm.__main__ import COMMANDS, dispatch
from fasthpm.cli import Parser, Patient, run_command, without_effect
from fasthpm.errors import UserError
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


# -------------------------------------------------------------------------------------------------- whoever listens
LISTENED = """
import sys
from fasthpm.cli import run_command, run_rank

def main(argv):
    for k in range(9):
        print("line", k, flush=True)
        print("bar", k, file=sys.stderr)
        sys.stdin.readline()
    open(argv[0], "w").close()

{how}(lambda argv: main([{path!r}]))
"""


@pytest.mark.parametrize(("how", "joined"), [("run_command", False), ("run_rank", True)])
def test_work_goes_on_when_the_reader_leaves(tmp_path: Path, how: str, joined: bool) -> None:
    done = tmp_path / "done"
    stderr = subprocess.STDOUT if joined else subprocess.PIPE
    words = [sys.executable, "-c", LISTENED.format(how=how, path=str(done))]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() in (b"line 0\n", b"bar 0\n")
        process.stdout.close()  # as head -1 does
        process.stdin.write(b"\n" * 9)
        process.stdin.close()
        errors = process.stderr.read() if process.stderr else b""
        assert process.wait(60) == 0
    assert done.exists()
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_any_name_can_be_printed() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    Patient(stream).write("caf\udce9 \u00e9\n")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\udce9 \\xe9\n"


def test_names_of_no_use_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def closed(_: Any) -> None:
        raise PermissionError(13, "Permission denied", "closed/x.beton")

    with pytest.raises(SystemExit):
        run_command(lambda _: (tmp_path / ("x" * 300)).is_dir())
    assert "x cannot be used (File name too long); choose another\n" in capsys.readouterr().err

    with pytest.raises(SystemExit) as caught:
        run_command(closed)
    assert caught.value.code == 2
    words = "fasthpm: error: closed/x.beton cannot be used (Permission denied); give yourself the rights, or choose"
    assert capsys.readouterr().err.startswith(words)


@pytest.mark.parametrize("error", [PermissionError("ours"), FileNotFoundError(2, "ours", "our.file")])
def test_errors_of_our_own_keep_their_traceback(error: OSError) -> None:
    def broken(_: Any) -> None:
        raise error

    with pytest.raises(type(error), match="ours"):
        run_command(broken)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "Infinity", "1e999"])
def test_no_flag_takes_nan_or_inf(value: str) -> None:
    parser = Parser(prog="x")
    parser.add_argument("--a", type=float)
    parser.add_mutually_exclusive_group().add_argument("--b", type=float, nargs="+")
    for words in ([f"--a={value}"], [f"--b={value}"], {"a": float(value)}):
        with pytest.raises(UserError, match=r"[ab] is -?(nan|inf), expected a finite number"):
            parser.parse_args(words)
    assert parser.parse_args(["--a", "1e3", "--b", ".5", "-2"]).b == [0.5, -2]
    with pytest.raises(UserError, match="invalid float value: 'x'"):
        parser.parse_args(["--a", "x"])


# ------------------------------------------------------------------------------------------------- flags without effect
@pytest.mark.parametrize(
    ("line", "idle"),
    [
        ([], False),
        (["--masks", "x"], False),
        (["--show", "1"], True),
        (["--show=1"], True),
        ({"show": 1}, True),
        ({"show": None}, False),
    ],
)
def test_a_flag_that_would_be_passed_over_is_refused(line: Any, idle: bool) -> None:
    """Whether it was given counts, not its value."""
    parser = Parser(prog="fasthpm x")
    parser.add_argument("--show", type=int, default=1)
    parser.add_argument("--masks")
    parser.parse_args(line)
    words = "--show has no effect here: there are no pictures; leave it out"
    with pytest.raises(UserError, match=words) if idle else contextlib.nullcontext():
        without_effect(["overlays", "show"], "there are no pictures")


def test_the_line_of_another_command_is_forgotten() -> None:
    for line in (["--show", "1"], []):
        parser = Parser(prog="fasthpm x")
        parser.add_argument("--show", type=int)
        parser.parse_args(line)
    without_effect(["show"], "there are no pictures")


def test_who_is_called_without_a_command_line_says_what_was_given() -> None:
    parser = Parser(prog="fasthpm x")
    parser.add_argument("--show", type=int)
    parser.parse_args(["--show", "1"])
    without_effect(["show"], "there are no pictures", given={"masks": 1})
    with pytest.raises(UserError, match="--masks has no effect here"):
        without_effect(["show", "masks"], "there are no pictures", given={"masks": 1})
