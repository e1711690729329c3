"""Starting real ranks in tests: `deepspeed`, torchrun or one process, with a timeout, as users start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]


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

    - `launcher`: "deepspeed", "torchrun", or "python" (one process, `ranks` is ignored)
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
    found = [child for child in psutil.Process(launcher).children(recursive=True) if word in child.cmdline()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def _start(
    target: str | Path, *arguments: object, ranks: int, launcher: str, env: Mapping[str, str] | None
) -> "subprocess.Popen[str]":
    command = [sys.executable, *_launcher(launcher, ranks), *_target(launcher, target), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if torch.cuda.device_count() < ranks:
        environment["DS_ACCELERATOR"] = "cpu"
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_ranks(target: str | Path, *arguments: object, **options: object) -> str:
    """`run_ranks`, which must succeed; its output."""
    finished = run_ranks(target, *arguments, **options)  # type: ignore[arg-type]
    assert finished.status == 0, finished.output
    return finished.output


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
