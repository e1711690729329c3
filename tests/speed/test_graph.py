"""Updates by graphs against updates as they are written, bit for bit.

There is no CUDA here: the recorder is a fake (`tests/helpers/recorder.py`), and so is the GPU's way to update, which the
engine gets on the CPU. The real recording is tested on the null GPU.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import pretrain, ranks, recipes
from fasthpm.checkpoint.folder import newest_valid, read_state
from fasthpm.checkpoint.shards import STATES, SavedState
from fasthpm.ranks import engine as engines
from fasthpm.ranks.zero import update_without_waits
from fasthpm.run.records import read_metrics
from fasthpm.speed import graph
from tests.helpers.recorder import FakeRecorder, without_numpy

TIMES = ("images_per_second", "data_wait_percent", "teacher_percent", "mfu_percent", "memory_gib", "time")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    """The fake, in a process that believes to have a GPU where it matters."""
    recorder, build = FakeRecorder(), ranks.build_engine

    def as_on_a_gpu(*arguments: Any, **options: Any) -> Any:
        built = build(*arguments, **options)
        assert update_without_waits(built)
        engines.keep_rates_on(built, built.device)
        return built

    monkeypatch.setattr(ranks, "build_engine", as_on_a_gpu)
    monkeypatch.setattr(graph, "refusal", lambda engine: "")
    monkeypatch.setattr(graph, "CudaRecorder", lambda: recorder)
    monkeypatch.setattr(pretrain, "measure_matmul_rate", lambda *_: 1.0)
    monkeypatch.setattr(pretrain, "finish", lambda run: None)
    without_numpy(monkeypatch)
    return recorder


def trained(folder: Path, way: str, launch: ranks.Launch, **changes: Any) -> Path:
    """8 updates of two micro-steps over two epochs; `way`: of `cuda_graph`."""
    fields = {
        "data_path": "synthetic:64",
        "batch_size": 8,
        "global_batch_size": 16,
        "epochs": 2,
        "warmup_epochs": 0.5,
        "ema_ramp_epochs": 1,
        "alpha_schedule": "step",
        "log_every": 1,
        "save_every": 1,
        "panel_every": 0,
        "difficulty_every": 0,
        "deepspeed_config": "zero1_bf16",
        "output_dir": str(folder),
        "cuda_graph": way,
    }
    pretrain.pretrain(dataclasses.replace(recipes.debug(), **{**fields, **changes}), launch)
    return folder


def state(run: Path) -> Iterator[tuple[str, Tensor]]:
    """All that a run has come to: masters, moments, EMA, counts."""
    checkpoint = newest_valid(run, pytest.fail)
    assert checkpoint is not None
    saved, kept = SavedState(checkpoint), read_state(checkpoint)
    yield "counts", torch.tensor([saved.optimizer_step, kept.step, kept.loader["epoch"], kept.loader["batch"]])
    for which in STATES:
        for name in saved.names:
            yield f"{which} {name}", saved.whole(which, name)


def assert_same(one: Path, other: Path) -> None:
    for (name, ours), (_, theirs) in zip(state(one), state(other), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(read_metrics(one), read_metrics(other), strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMES} == {k: v for k, v in theirs.items() if k not in TIMES}


def test_x(tmp_path: Path, recorder: FakeRecorder) -> None:
    with ranks.session() as launch:
        eager = trained(tmp_path / "eager", "off", launch)
        assert recorder.made == 0
        graphs = trained(tmp_path / "graph", "on", launch)
        print(recorder.made, recorder.runs)
        print(read_metrics(eager)[-1])
    assert_same(eager, graphs)
