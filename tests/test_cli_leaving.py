"""Ctrl-C at any moment of a command's start is one line and 130; versions; numbers; advice that fits the command."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from fasthpm import __version__, entry, recipe
from fasthpm.__main__ import dispatch
from fasthpm.cli import Parser, fitting, run_command
from fasthpm.errors import UserError
from tests.helpers.launch import ROOT


def end_of(main: Any, argv: Sequence[str] | None = None) -> tuple[int, str]:
    """Status and last words of a command."""
    stream = io.StringIO()
    with redirect_stderr(stream), pytest.raises(SystemExit) as caught:
        run_command(main, argv)
    return caught.value.code, stream.getvalue()  # type: ignore[return-value]


def raising(error: BaseException) -> Any:
    def main(_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None

    return main


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        ImportError("numpy failed to import"),
        SystemError("error return"),
        UserError("no DeepSpeed"),
    ],
)
def test_an_interrupt_is_one_line_whatever_it_turns_into(error: BaseException) -> None:
    assert end_of(raising(error)) == (130, "fasthpm: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


INTERRUPTED = """
import os, signal, sys
sys.orig_argv[:] = ["python", "-m", "{module}"]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
import {module}
import fasthpm.model
"""
UNRAISABLE = """
import os, signal
from fasthpm.cli import run_command
class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def main(argv):
    thing = Thing()
    del thing
    raise SystemExit(7)
run_command(main)
"""


@pytest.mark.parametrize(
    "program", [INTERRUPTED.format(module="fasthpm.pretrain"), INTERRUPTED.format(module="data_prep"), UNRAISABLE]
)
def test_nothing_is_shown_of_what_was_interrupted(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "fasthpm: interrupted\n")


@pytest.mark.parametrize(
    ("line", "program", "ours"),
    [
        ("python -m fasthpm.pretrain --x", "-m", True),
        ("python -u -m fasthpm knn", "-m", True),
        ("python -m data_prep.images a b", "-m", True),
        ("python -m pytest fasthpm", "-m", False),
        ("python -m fasthpmlike", "-m", False),
        ("python /usr/bin/fasthpm knn", "/usr/bin/fasthpm", True),
        ("python my.py -m", "my.py", False),
        ("python", "", False),
    ],
)
def test_only_our_own_processes_are_ended(line: str, program: str, ours: bool) -> None:
    assert entry.is_command(line.split(), program) is ours


def test_importing_the_package_is_quick() -> None:
    """No torch before a command needs it: `--version` and `--help` answer at once."""
    program = "import sys, fasthpm.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch([flag])
    assert capsys.readouterr().out == f"fasthpm {__version__}\n"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "command",
    [
        "pretrain --recipe debug --lr={} --data_path x --output_dir x",
        "finetune x --train_path x --val_path x --blr={}",
        "linear x --train_path x --val_path x --lr={}",
        "linear x --train_path x --val_path x --crop_min={}",
    ],
)
def test_no_flag_takes_what_is_no_number(command: str, value: str) -> None:
    words = command.format(value).split()
    name = next(word for word in words if word.endswith(value)).partition("=")[0][2:]
    with pytest.raises(UserError, match=rf"^{name} is (nan|-?inf), expected a finite number"):
        dispatch(words)


@pytest.mark.parametrize(
    ("given", "message", "fitted"),
    [
        (
            ["--train_path", "x.beton"],
            "x.beton does not exist; give --data_path a .beton",
            "give --train_path a .beton",
        ),
        (["--train_path", "x"], "x has 3 channels; use --channels 3", "use fasthpm pretrain --channels 3"),
        (["--train_path", "x"], "use fasthpm pretrain --channels 3", "use fasthpm pretrain --channels 3"),
        (["--train_path", "x"], "use --weights student", "use --weights student"),
        (["--train_path", "x"], "prepare it again with --copy", "prepare it again with --copy"),
    ],
)
def test_advice_fits_the_command(given: list[str], message: str, fitted: str) -> None:
    assert recipe.OWNERS["--channels"] == "fasthpm pretrain"
    parser = Parser(prog="fasthpm probe")
    for flag in ("--train_path", "--val_path", "--weights"):
        parser.add_argument(flag, default="")

    def main(_: Any) -> None:
        parser.parse_args(given)
        raise UserError(message)

    status, said = end_of(main)
    assert status == 2
    assert said.endswith(f"{fitted}\n")


def test_advice_of_a_command_is_its_own(tmp_path: Path) -> None:
    """`fasthpm knn`, whose data are two other flags."""
    words = ["knn", str(tmp_path), "--train_path", str(tmp_path / "x.beton"), "--val_path", "synthetic:8"]
    parser = Parser(prog="fasthpm knn")
    parser.add_argument("run")
    parser.add_argument("--train_path")
    parser.add_argument("--val_path")
    parser.parse_args(words[1:])
    said = fitting(f"{tmp_path / 'x.beton'} does not exist; give --data_path a prepared .beton")
    assert said.endswith("give --train_path a prepared .beton")
