"""Two nodes on one machine, each started by a launcher of its own; then one is lost.

Nodes are network namespaces joined by a cable, which needs root and `ip` (Debian's iproute2); their cable can be cut.
Where that is not allowed they are two loopback addresses, and one is killed; `FASTHPM_NODES=loopback` chooses that.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from fasthpm.checkpoint.folder import newest_valid
from fasthpm.run.records import read_metrics
from tests.helpers.launch import ROOT, check_ranks, free_port, kill_tree

MODULE = "fasthpm.pretrain"
LIMIT = {"FASTHPM_TIMEOUT_MINUTES": "0.25"}


def ip(*arguments: str) -> None:
    """`ip …`. **Raises:** `CalledProcessError` with its message."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Nodes:
    """Two nodes, and the launchers that run on them."""

    addresses: tuple[str, str]
    interfaces: tuple[str, str]
    prefixes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # how a command is run on each
    launchers: list["subprocess.Popen[str]"] = field(default_factory=list)
    stopped: list[psutil.Process] = field(default_factory=list)

    @property
    def joined(self) -> bool:
        """Whether there is a cable to cut."""
        return bool(self.prefixes[0])

    @property
    def culprit(self) -> str:
        """Whom the first node blames when it hears nothing of the second: each still writes its notes, or does not."""
        return "all ranks wait for each other" if self.joined else r"rank 1 \(update \d+\) gave no sign of life"

    @property
    def second(self) -> str:
        """The second node's address as gloo, which binds to an interface, names it."""
        return self.addresses[1] if self.joined else "127.0.0.1"

    def start(self, node: int, command: list[str]) -> None:
        """Run a launcher as `node`."""
        environment = {
            **os.environ,
            **LIMIT,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": self.interfaces[node],
        }
        self.launchers.append(
            subprocess.Popen(
                [*self.prefixes[node], sys.executable, "-m", *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def cut(self) -> None:
        """Pull the cable; without one, stop the second node's processes, which then answer nothing."""
        if self.joined:
            ip("-n", self.prefixes[1][-1], "link", "set", self.interfaces[1], "down")
            return
        launcher = psutil.Process(self.launchers[1].pid)
        self.stopped = [launcher, *launcher.children(recursive=True)]
        for process in self.stopped:
            process.suspend()

    def let_go(self) -> None:
        """The second node's processes may run again, and find that they are alone."""
        for process in self.stopped:
            process.resume()

    def crash(self) -> None:
        """The second node's processes are gone."""
        kill_tree(self.launchers[1].pid)

    def end(self) -> None:
        """Kill what still runs."""
        for launcher in self.launchers:
            if launcher.poll() is None:
                kill_tree(launcher.pid)
            launcher.communicate()


def loopback() -> Nodes:
    """Nodes that need no rights: Linux answers at all of 127.0.0.0/8."""
    return Nodes(("127.0.0.2", "127.0.0.3"), ("lo", "lo"))


def joined_namespaces(names: tuple[str, str]) -> Nodes:
    """Nodes in namespaces of these names. **Raises:** `CalledProcessError` where they are not allowed."""
    cables = (f"fh{os.getpid()}a", f"fh{os.getpid()}b")
    made = Nodes(
        ("10.213.77.1", "10.213.77.2"), cables, (("ip", "netns", "exec", names[0]), ("ip", "netns", "exec", names[1]))
    )
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
    for name, cable, address in zip(names, cables, made.addresses, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
        ip("-n", name, "link", "set", cable, "up")
        ip("-n", name, "link", "set", "lo", "up")
    return made


def delete(names: tuple[str, str]) -> None:
    """Remove the namespaces that are there."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    names = (f"fasthpm-{os.getpid()}-0", f"fasthpm-{os.getpid()}-1")
    made, why = loopback(), "FASTHPM_NODES says so"
    if os.environ.get("FASTHPM_NODES") != "loopback":
        try:
            made, why = joined_namespaces(names), ""
        except FileNotFoundError:
            why = "ip is missing: apt-get install iproute2"
        except subprocess.CalledProcessError as error:
            delete(names)
            why = f"network namespaces are not allowed here: {error.stderr.strip()}"
    if why:
        print(f"nodes are loopback addresses: {why}")
    try:
        yield made
    finally:
        made.end()
        if made.joined:
            delete(names)


def launcher_of(kind: str, node: int, folder: Path, port: int, addresses: tuple[str, str]) -> list[str]:
    """The command that each node's user types, up to the module's name."""
    if kind == "torchrun":
        return [
            "torch.distributed.run",
            "--nnodes=2",
            f"--node-rank={node}",
            "--nproc-per-node=1",
            f"--master-addr={addresses[0]}",
            f"--master-port={port}",
            "-m",
        ]
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in addresses))
    return [
        "deepspeed.launcher.runner",
        f"--hostfile={hosts}",
        "--no_ssh",
        f"--node_rank={node}",
        f"--master_addr={addresses[0]}",
        f"--master_port={port}",
        "--module",
    ]


@pytest.mark.parametrize(
    ("kind", "accident", "message"),
    [
        ("deepspeed", Nodes.cut, r"fasthpm: error: no update for 12 s after update \d+: {culprit}"),
        ("torchrun", Nodes.crash, r"fasthpm: error: rank 0 lost another rank after update \d+ \(.*{second}"),
    ],
)
def test_two_nodes_lose_each_other_and_one_goes_on(
    kind: str, accident: object, message: str, nodes: Nodes, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    arguments = [
        "--recipe",
        "debug",
        "--model",
        "hpm_vit_pico_patch4_28",
        "--data_path",
        "synthetic:64",
        "--epochs",
        "5000",
        "--warmup_epochs",
        "0",
        "--batch_size",
        "8",
        "--log_every",
        "4",
        "--save_every",
        "2",
        "--panel_every",
        "0",
        "--output_dir",
        str(run),
    ]
    for node in (0, 1):
        nodes.start(node, [*launcher_of(kind, node, tmp_path, port, nodes.addresses), MODULE, *arguments])
    wait_for_checkpoint(run, nodes)
    accident(nodes)  # type: ignore[operator]
    begin = time.monotonic()
    output, _ = nodes.launchers[0].communicate(timeout=120)
    assert nodes.launchers[0].returncode != 0, output
    assert time.monotonic() - begin < 60
    assert re.search(message.format(culprit=nodes.culprit, second=re.escape(nodes.second)), output), output
    nodes.let_go()
    nodes.launchers[1].communicate(timeout=60)
    assert nodes.launchers[1].returncode != 0
    newest = newest_valid(run, pytest.fail)
    assert newest is not None
    left = int(newest.name[5:])
    output = check_ranks(MODULE, *arguments, "--stop_after", left + 8, launcher="forked", ranks=1)
    assert f"resuming from {newest} at update {left} of 20000, written by 2 ranks" in output
    assert "global batch 16 = 8 x 1 x 2" in output
    assert read_metrics(run)[-1]["step"] == left + 8


def wait_for_checkpoint(run: Path, nodes: Nodes) -> None:
    deadline = time.monotonic() + 240
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        for launcher in nodes.launchers:
            assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.1)
    while not all((run / ".heartbeats" / f"rank-{rank:05d}.json").is_file() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
