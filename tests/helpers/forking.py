"""A process that has the slow imports done and forks ranks from itself: a launch then costs no import of torch.

    python forking.py FD        # FD: a socket on which `launch.py` asks

One request is a JSON line {"target", "arguments", "ranks", "env"} with two files: one that takes the ranks' output and
one that takes the exit status. For each, a supervisor is forked that plays the launcher: it forks the ranks, passes
signals on to them, and ends them all when one fails.
"""

import array
import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = (
    "deepspeed",
    "deepspeed.runtime.zero.stage_1_and_2",
    "fasthpm.pretrain",
    "matplotlib.figure",
    "tensorboard",
    "torch.utils.tensorboard",
    "torch._inductor.compile_fx",
    "pytest",
    # What DeepSpeed's engine and the first picture import late.
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
)
GRACE = 10.0  # seconds that the other ranks have to end by themselves when one has failed
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def serve(requests: socket.socket) -> None:
    """Fork a supervisor for every request, until the other side is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave no zombies
    while True:
        line, files, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not line:
            return
        pid = os.fork()
        if pid == 0:
            requests.close()
            supervise(json.loads(line), *files)
        requests.send(array.array("i", [pid]).tobytes())
        for file in files:
            os.close(file)


def supervise(request: dict[str, Any], output: int, status: int) -> None:
    """Be the launcher of one request; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    ranks: dict[int, int] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.close(status)
            be_rank(request, rank)
        ranks[pid] = rank
    code = wait_for_all(ranks)
    os.write(status, array.array("i", [code]).tobytes())
    os._exit(0)


def wait_for_all(ranks: dict[int, int]) -> int:
    """Wait for the ranks; when one fails, or the tests are gone, end the others.

    **Returns:** the first status that is not 0, or 0.
    """
    code, deadline, server = 0, float("inf"), os.getppid()
    while ranks:
        pid, found = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.01)
            if time.monotonic() > deadline or os.getppid() != server:
                deadline = float("inf")
                _send(ranks, signal.SIGKILL)
            continue
        del ranks[pid]
        ended = os.waitstatus_to_exitcode(found)
        if ended and not code:
            code, deadline = ended, time.monotonic() + GRACE
            _send(ranks, signal.SIGTERM)
    return code


def _send(ranks: dict[int, int], number: int) -> None:
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def be_rank(request: dict[str, Any], rank: int) -> None:
    """Run the target as `python -m` or `python FILE` would; never returns."""
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["ranks"] > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    random.seed()
    code = _run(request["target"], request["arguments"])
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(target: str, arguments: list[str]) -> int:
    script = target.endswith(".py")
    sys.argv = [target, *arguments]
    sys.path[0] = str(Path(target).parent) if script else str(ROOT)
    try:
        if script:
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    asked = socket.socket(fileno=int(sys.argv[1]))
    sys.path.insert(0, str(ROOT))
    for name in PRELOAD:
        importlib.import_module(name)
    for name in ("fasthpm.pretrain", "fasthpm.__main__"):
        sys.modules.pop(name, None)  # to be run as __main__
    serve(asked)
