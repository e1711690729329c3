"""A rank that dies without a word is named by a small process beside it, which outlives it.

Where NCCL gives up, or any native code, the process aborts in C++; where the system lacks memory, it is killed: no
exception reaches Python then, and of eight ranks nobody knows which was the first. The watchdog of each starts

    python -I -S witness.py RANK PID NOTE        # NOTE: the watchdog's file of this rank

and holds the other end of its standard input. A rank that ends by itself, well or not, says so there.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GOODBYE = b"."
ENDED = ".ended"  # beside the notes: a rank has ended with an error of its own, and launchers kill the others then
LOOK = 1.0  # seconds between two looks at the rank, in case a child of it holds the other end open
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # by which a launcher or a user ends it
HINTS = {
    signal.SIGABRT: "native code gave up, NCCL for example, and what it says stands above",
    signal.SIGKILL: "the system took it, as it does where memory is short, or somebody else did",
}


def start(rank: int, note: Path) -> "subprocess.Popen[bytes]":
    """The witness of this process."""
    command = [sys.executable, "-I", "-S", __file__, str(rank), str(os.getpid()), str(note)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def dismiss(witness: "subprocess.Popen[bytes]") -> None:
    """This rank ends by itself, and says why."""
    with suppress(OSError):
        witness.communicate(GOODBYE, timeout=5)


def watch(rank: int, pid: int, note: Path, pipe: int = 0) -> str:
    """What to say of the process `pid`, once it has ended; empty if it has said something itself, or was killed after
    another rank had.

    - `pipe`: the end that it holds the other one of
    """
    begin = time.time()
    while True:
        if select.select([pipe], [], [], LOOK)[0]:
            if os.read(pipe, 1):
                return ""
            break
        if _status(pid)[0] in ("Z", ""):
            break
    others = any(path.stat().st_mtime >= begin for path in note.parent.glob(f"*{ENDED}"))
    number = _cause(pid)
    if number == 0 or number in ASKED or (number == signal.SIGKILL and others):
        return ""
    how = f"died of {signal.Signals(number).name}" if number else "died"
    last = {}
    with suppress(OSError, ValueError):
        last = json.loads(note.read_text())
    seen = f"its last note is of update {last['update']}, {last['phase']}" if last else "it had noted nothing yet"
    hint = HINTS.get(signal.Signals(number), "native code crashed") if number else "see what its machine says"
    return (
        f"fasthpm: error: rank {rank} (process {pid} on {socket.gethostname()}) {how} without a word ({seen}): {hint}; "
        f"start the same command to resume from the last checkpoint\n"
    )


def _cause(pid: int) -> int | None:
    """The signal that ended it, 0 for none (a status of its own); None if that can't be seen any more."""
    for _ in range(50):  # what it held is closed some moments before it has ended
        state, status = _status(pid)
        if state == "Z":
            return status & 0x7F
        if not state:
            break
        time.sleep(0.02)
    return None


def _status(pid: int) -> tuple[str, int]:
    """State ("Z": ended, not yet waited for; "" if it is gone) and wait status of a process, as Linux tells them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[-1])


if __name__ == "__main__":
    os.write(2, watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])).encode())
