"""Launch environments, and the error of one rank that ends all with one line.

Ranks run this file too (`main`), started by the launchers that users have.
"""

import dataclasses
import json
import os
import sys
from argparse import ArgumentParser
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm.cli import run_rank
from fasthpm.errors import UserError
from fasthpm.ranks import agreement
from fasthpm.ranks import launch as ranks_launch
from tests.helpers.launch import run_ranks


def main(argv: Any = None) -> None:
    parser = ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wrong_rank", type=int)
    arguments = parser.parse_args(argv)
    with ranks_launch.session() as launch:
        if arguments.out:
            (arguments.out / f"rank{launch.rank}").write_text(json.dumps(described(launch)))
        with agreement.in_agreement():
            if launch.rank == arguments.wrong_rank:
                raise UserError("the input is 3, expected 4; write 4")
        print("all went on")


def described(launch: ranks_launch.Launch) -> tuple[object, ...]:
    from deepspeed.utils import groups

    timeout = groups._WORLD_GROUP._get_backend(launch.device).options._timeout
    return (*dataclasses.astuple(launch)[:4], launch.device.type, torch.get_num_threads(), timeout.total_seconds())


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_know_their_place_and_one_rank_s_error_ends_all_with_one_line(tmp_path: Path, launcher: str) -> None:
    options = {"launcher": launcher, "env": {ranks_launch.TIMEOUT: "0.5"}}
    finished = run_ranks(Path(__file__), f"--out={tmp_path}", "--wrong_rank=1", **options)
    assert finished.status != 0
    lines = [line for line in finished.output.splitlines() if "expected 4" in line]
    assert lines == ["fasthpm: error: rank 1: the input is 3, expected 4; write 4"]
    assert f'File "{__file__}"' not in finished.output  # a traceback; torchrun prints one of its own
    assert "all went on" not in finished.output
    kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    for rank in range(2):
        *place, device, threads, timeout = json.loads((tmp_path / f"rank{rank}").read_text())
        assert (*place, device, timeout) == (rank, rank, 2, 2, kind, 30.0)
        assert kind == "cuda" or threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_without_deepspeed_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'fasthpm\[train\]'$"):
        ranks_launch.start()


@pytest.mark.parametrize(
    "error", [OSError("libcuda.so\nnot found"), RuntimeError("CUDA_HOME does not exist"), SystemError()]
)
def test_a_broken_deepspeed_is_one_line_too(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "deepspeed":
                raise error

    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"DeepSpeed, which does not import \(.+\); .*pip install 'fasthpm\[train\]'$"):
        ranks_launch.start()


def test_one_process_needs_no_launcher() -> None:
    finished = run_ranks(Path(__file__), "--wrong_rank=0", launcher="python")
    assert finished.status == 2
    assert finished.output.splitlines() == ["fasthpm: error: the input is 3, expected 4; write 4"]


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 0, 1, 1)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "MASTER_ADDR": "h"}, (5, 1, 8, 4)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 1, 2, 2)),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NUM_TASKS": "4",
                "MASTER_ADDR": "h",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            (3, 1, 4, 2),
        ),
        # A batch script itself is no rank of its allocation.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (1, 1, 2, 2),
        ),
    ],
)
def test_launchers_are_understood(env: dict[str, str], place: tuple[int, ...]) -> None:
    assert ranks_launch._place(env) == place
    assert tuple(int(env[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")) == place
    assert {"MASTER_ADDR", "MASTER_PORT"} <= env.keys()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_impossible_places_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranks_launch._place(env)


def test_ranks_share_the_cores_and_a_process_alone_obeys_the_user() -> None:
    assert ranks_launch.threads(1, 8, {}) == 8
    assert ranks_launch.threads(2, 8, {"OMP_NUM_THREADS": "1"}) == 4  # torchrun's word, not the user's
    assert ranks_launch.threads(4, 2, {}) == 1
    assert ranks_launch.threads(1, 8, {"OMP_NUM_THREADS": "3"}) == 3
    assert ranks_launch.threads(1, 8, {"OMP_NUM_THREADS": "4,2"}) == 8


def test_timeout_is_minutes() -> None:
    assert ranks_launch.timeout({}) == timedelta(minutes=ranks_launch.DEFAULT_TIMEOUT_MINUTES)
    assert ranks_launch.timeout({ranks_launch.TIMEOUT: "0.5"}) == timedelta(seconds=30)
    for wrong in ("", "-1", "0", "nan", "inf", "five"):
        with pytest.raises(UserError, match=ranks_launch.TIMEOUT):
            ranks_launch.timeout({ranks_launch.TIMEOUT: wrong})


if __name__ == "__main__":
    run_rank(lambda _: main(sys.argv[1:]))


@pytest.mark.parametrize(
    ("visible", "devices", "local_rank", "expected"),
    [
        (1, "3", 3, 0),  # each task sees its own GPU alone
        (1, "GPU-12ab", 2, 0),
        (4, "0,1,2,3", 3, 3),
        (4, None, 2, 2),
        (1, None, 1, None),  # one GPU for all ranks
        (2, "0,1", 2, None),
    ],
)
def test_a_rank_s_gpu(
    visible: int, devices: str | None, local_rank: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    if expected is None:
        with pytest.raises(UserError, match=f"local rank {local_rank} has no GPU, {visible} are visible here"):
            ranks_launch._device("cuda", local_rank, 4)
    else:
        assert ranks_launch._device("cuda", local_rank, 4) == torch.device("cuda", expected)
        assert chosen == [expected]
