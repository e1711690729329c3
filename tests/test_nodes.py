"""Two nodes on one machine: network namespaces joined by a cable, each started by a launcher of its own.

Needs root and `ip` (Debian's iproute2). A CI that allows no network namespaces skips these tests and says so.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launch import ROOT, check_ranks, free_port, kill_tree

from fasthpm.checkpoint import newest_valid
from fasthpm.report import read_metrics

MODULE = "fasthpm.pretrain"
LIMIT = {"FASTHPM_TIMEOUT_MINUTES": "0.25"}
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    """`ip …`. **Raises:** `CalledProcessError` with its message."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Nodes:
    """Two namespaces, and the launchers that run in them."""

    names: tuple[str, str]
    cables: tuple[str, str]
    launchers: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, node: int, command: list[str]) -> None:
        """Run a launcher as `node`."""
        environment = {**os.environ, **LIMIT, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu",
                       "GLOO_SOCKET_IFNAME": self.cables[node]}  # fmt: skip
        self.launchers.append(
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], sys.executable, "-m", *command], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def crash(self) -> None:
        """The second node's processes are gone."""
        kill_tree(self.launchers[1].pid)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("ip is missing: apt-get install iproute2")
    names = (f"fasthpm-{os.getpid()}-0", f"fasthpm-{os.getpid()}-1")
    made = Nodes(names, (f"fh{os.getpid()}a", f"fh{os.getpid()}b"))
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", made.cables[0], "netns", names[0], "type", "veth", "peer", "name", made.cables[1],
               "netns", names[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        for name, cable, address in zip(names, made.cables, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for launcher in made.launchers:
            if launcher.poll() is None:
                kill_tree(launcher.pid)
            launcher.communicate()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def launcher_of(kind: str, node: int, folder: Path, port: int) -> list[str]:
    """The command that each node's user types, up to the module's name."""
    if kind == "torchrun":
        return ["torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
                f"--master-addr={ADDRESSES[0]}", f"--master-port={port}", "-m"]  # fmt: skip
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return ["deepspeed.launcher.runner", f"--hostfile={hosts}", "--no_ssh", f"--node_rank={node}",
            f"--master_addr={ADDRESSES[0]}", f"--master_port={port}", "--module"]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "accident", "message"),
    [
        ("deepspeed", Nodes.cut, r"fasthpm: error: no update for 12 s after update \d+: all ranks wait for each other"),
        ("torchrun", Nodes.crash, r"fasthpm: error: rank 0 lost another rank after update \d+ \(.*10\.213\.77\.2"),
    ],
)
def test_two_nodes_lose_each_other_and_one_goes_on(
    kind: str, accident: object, message: str, nodes: Nodes, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    arguments = ["--recipe", "debug", "--data_path", "synthetic:64", "--epochs", "5000", "--warmup_epochs", "0",
                 "--batch_size", "8", "--log_every", "4", "--save_every", "2", "--panel_every", "0",
                 "--output_dir", str(run)]  # fmt: skip
    for node in (0, 1):
        nodes.start(node, [*launcher_of(kind, node, tmp_path, port), MODULE, *arguments])
    wait_for_checkpoint(run, nodes)
    accident(nodes)  # type: ignore[operator]
    begin = time.monotonic()
    output, _ = nodes.launchers[0].communicate(timeout=120)
    assert nodes.launchers[0].returncode != 0, output
    assert time.monotonic() - begin < 60
    assert re.search(message, output), output
    nodes.launchers[1].communicate(timeout=60)
    assert nodes.launchers[1].returncode != 0
    newest = newest_valid(run, pytest.fail)
    assert newest is not None
    left = int(newest.name[5:])
    output = check_ranks(MODULE, *arguments, "--stop_after", left + 8, launcher="python")
    assert f"resuming from {newest} at update {left} of 20000, written by 2 ranks" in output
    assert "global batch 16 = 8 x 1 x 2" in output
    assert read_metrics(run)[-1]["step"] == left + 8


def wait_for_checkpoint(run: Path, nodes: Nodes) -> None:
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        for launcher in nodes.launchers:
            assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.1)
    time.sleep(4)  # notes of both ranks
