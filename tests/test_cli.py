"""How a rank leaves: with its status and its last words, whatever threads are still about."""

import subprocess
import sys

import pytest

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
