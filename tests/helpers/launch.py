"""Starting real ranks in tests, with a timeout: by `deepspeed` or torchrun or alone, as users do, or forked.

Forked ranks (`forking.py`) come from a process that has imported torch and DeepSpeed already, which takes most of the
time of a short run. They are for tests of what ranks do; those of how ranks are started take a launcher.
"""

import atexit
import functools
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    """A launch that ended by itself."""

    status: int
    output: str  # stdout and stderr of the launcher and of all ranks, as they came


def run_ranks(
    target: str | Path,
    *arguments: object,
    ranks: int = 2,
    launcher: str = "deepspeed",
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run a script (a path) or a module (a dotted name) on `ranks` ranks of this machine, from the repository's root.

    - `launcher`: "deepspeed", "torchrun", "python" (one process, `ranks` is ignored), or "forked"
    - `timeout`: seconds, after which every process is killed and the test fails with the output so far
    - `env`: added to the environment; ranks without a GPU each run on the CPU
    """
    process = _start(target, *arguments, ranks=ranks, launcher=launcher, env=env)
    command = list(map(str, process.args))  # type: ignore[arg-type]
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)} still ran after {timeout:g} s:\n{output}") from None
    except BaseException:
        kill_tree(process.pid)
        raise
    return Finished(process.returncode, output)


@contextmanager
def running_ranks(
    target: str | Path,
    *arguments: object,
    ranks: int = 2,
    launcher: str = "torchrun",
    env: Mapping[str, str] | None = None,
) -> Iterator["subprocess.Popen[str]"]:
    """The launcher's process, started like `run_ranks` does it; whatever still runs at the end is killed."""
    process = _start(target, *arguments, ranks=ranks, launcher=launcher, env=env)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.communicate()


def ranks_of(launcher: int, word: str) -> list[psutil.Process]:
    """The processes that a launcher has started and whose command line holds `word`, by rank."""
    if launcher in Forked.supervisors:  # they have its command line and environment
        return sorted(psutil.Process(launcher).children(), key=lambda process: process.pid)
    found = [child for child in psutil.Process(launcher).children(recursive=True) if word in child.cmdline()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def _start(
    target: str | Path, *arguments: object, ranks: int, launcher: str, env: Mapping[str, str] | None
) -> "subprocess.Popen[str]":
    if launcher == "forked" and not torch.cuda.is_available():  # CUDA does not survive a fork
        return Forked(str(target), list(map(str, arguments)), ranks, env or {})  # type: ignore[return-value]
    launcher = "torchrun" if launcher == "forked" else launcher
    command = [sys.executable, *_launcher(launcher, ranks), *_target(launcher, target), *map(str, arguments)]
    environment = {**_environment(), **(env or {})}
    if torch.cuda.device_count() < ranks:
        environment["DS_ACCELERATOR"] = "cpu"
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class Forked:
    """What tests use of `subprocess.Popen`, for ranks that the forking process starts; signals go to all ranks."""

    supervisors: ClassVar[set[int]] = set()

    def __init__(self, target: str, arguments: list[str], ranks: int, env: Mapping[str, str]) -> None:
        self.args = [target, *arguments]
        self.returncode: int | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (until `communicate`)
        self._status, writing = os.pipe()
        place = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        environment = {**_environment(), "DS_ACCELERATOR": "cpu", **(place if ranks > 1 else {}), **env}
        request = {"target": target, "arguments": arguments, "ranks": ranks, "env": environment}
        server = forking_process()
        socket.send_fds(server, [json.dumps(request).encode()], [self._output.fileno(), writing])
        os.close(writing)
        self.pid = struct.unpack("i", server.recv(4))[0]
        self.supervisors.add(self.pid)
        os.set_blocking(self._status, False)

    def poll(self) -> int | None:
        """The first status of a rank that is not 0, or 0, once all have ended; None before."""
        if self.returncode is None:
            try:
                found = os.read(self._status, 4)
            except BlockingIOError:
                return None
            self.returncode = struct.unpack("i", found)[0] if found else -9
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float = float("inf")) -> tuple[str, None]:
        """All that the ranks have printed, when they have ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        if not self._output.closed:
            with self._output:
                self._output.seek(0)
                self._said = self._output.read().decode()
        return self._said, None

    def send_signal(self, number: int) -> None:
        """To all ranks, as Ctrl-C in a terminal."""
        os.kill(self.pid, number)


@functools.cache
def forking_process() -> socket.socket:
    """Where to ask for forked ranks; the process behind it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = Path(__file__).with_name("forking.py")
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(program), str(theirs.fileno())],
            cwd=ROOT,
            env={**_environment(), "DS_ACCELERATOR": "cpu"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def check_ranks(target: str | Path, *arguments: object, **options: object) -> str:
    """`run_ranks`, which must succeed; its output."""
    finished = run_ranks(target, *arguments, **options)  # type: ignore[arg-type]
    assert finished.status == 0, finished.output
    return finished.output


def _environment() -> dict[str, str]:
    """Ours, without a place among ranks."""
    ours = {name: value for name, value in os.environ.items() if name not in PLACE}
    return {**ours, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


def _launcher(name: str, ranks: int) -> Sequence[str]:
    if name == "python":
        return []
    if name == "torchrun":
        return ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={free_port()}"]


def _target(launcher: str, target: str | Path) -> Sequence[str]:
    if isinstance(target, Path):
        return [str(target)]
    return ["--module" if launcher == "deepspeed" else "-m", target]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_tree(pid: int) -> None:
    """The launcher's ranks too: they may be in sessions of their own."""
    launcher = psutil.Process(pid)
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
