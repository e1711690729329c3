"""Updates by graphs against updates as they are written, bit for bit.

There is no CUDA here: the recorder is a fake (`tests/helpers/recorder.py`), and a CPU updates as GPUs do. pytest starts
this very file as the program of two ranks (`main`), too. The real recording is tested on the null GPU.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import pretrain, ranks, recipes
from fasthpm.checkpoint.folder import newest_valid, read_state
from fasthpm.checkpoint.shards import STATES, SavedState
from fasthpm.cli import run_rank
from fasthpm.ranks import engine as engines
from fasthpm.ranks.zero import add_gradients_at_once, update_without_waits
from fasthpm.run.records import read_metrics
from fasthpm.speed import graph
from fasthpm.speed.clock import Stopwatch
from fasthpm.step import Step, StepOutput
from tests.helpers.launch import check_ranks
from tests.helpers.null_gpu import run_on_null_gpu
from tests.helpers.recorder import FakeRecorder, without_numpy

COUNTERS = ("micro_steps", "global_steps", "global_samples", "_step_applied")  # of DeepSpeed's engine
TIMES = ("images_per_second", "data_wait_percent", "teacher_percent", "mfu_percent", "memory_gib", "time")


@dataclasses.dataclass
class NoGraphs:
    """A recorder that fails, at once or when all is recorded, and has changed none of `tensors`."""

    at_once: bool
    tensors: list[Tensor]
    engines: list[Any] = dataclasses.field(default_factory=list)

    @torch.no_grad()
    def __call__(self, function: Any) -> Any:
        kept = [tensor.clone() for tensor in self.tensors]
        if not self.at_once:
            with torch.enable_grad():
                function()
        for tensor, old in zip(self.tensors, kept, strict=True):
            tensor.copy_(old)
        raise RuntimeError("no graphs here\nand more")


def as_on_a_gpu(patch: pytest.MonkeyPatch, record: Any) -> None:
    """Have this process update as GPUs do, and record with a fake."""
    build = ranks.build_engine

    def built(*arguments: Any, **options: Any) -> Any:
        engine = build(*arguments, **options)
        assert update_without_waits(engine)
        engines.keep_rates_on(engine, engine.device)
        add_gradients_at_once(engine)
        record.engines.append(engine)
        return engine

    patch.setattr(ranks, "build_engine", built)
    patch.setattr(graph, "refusal", lambda engine: "")
    patch.setattr(graph, "CudaRecorder", lambda: record)
    patch.setattr(pretrain, "measure_matmul_rate", lambda *_: 1.0)
    patch.setattr(pretrain, "finish", lambda run: None)
    patch.setattr("deepspeed.runtime.bf16_optimizer.see_memory_usage", lambda *_, **__: None)  # seconds of garbage
    without_numpy(patch)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    recorder = FakeRecorder()
    as_on_a_gpu(monkeypatch, recorder)
    return recorder


def trained(folder: Path, way: str, launch: ranks.Launch, **changes: Any) -> Path:
    """8 updates of two micro-steps over two epochs, in which everything changes that can; `way`: `cuda_graph`."""
    fields = {
        "model": "hpm_vit_pico_patch4_28",
        "data_path": "synthetic:64",
        "batch_size": 8 // launch.world_size,
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
    yield "skipped", torch.tensor(kept.skipped)
    for which in filter(saved.has, STATES):
        for name in saved.names:
            yield f"{which} {name}", saved.whole(which, name)


def assert_same(one: Path, other: Path) -> None:
    """The same bits in their checkpoints, and the same figures but for times."""
    for (name, ours), (_, theirs) in zip(state(one), state(other), strict=True):
        assert torch.equal(ours, theirs), name
    for mine, yours in zip(read_metrics(one), read_metrics(other), strict=True):
        assert {k: v for k, v in mine.items() if k not in TIMES} == {k: v for k, v in yours.items() if k not in TIMES}


CASES: dict[str, dict[str, Any]] = {
    "hpm": {},
    "maps": {"mask_policy": "attention", "map_refresh_epochs": 1, "online_probe_every": 1},  # from the second epoch on
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_by_graphs_is_the_run(case: str, tmp_path: Path, recorder: FakeRecorder) -> None:
    """With maps, there are other graphs for other masks."""
    with ranks.session() as launch:
        eager = trained(tmp_path / "eager", "off", launch, **CASES[case])
        assert recorder.made == 0
        graphs = trained(tmp_path / "graphs", "on", launch, **CASES[case])
    assert (recorder.made, recorder.runs) == {"hpm": (2, 12), "maps": (4, 8)}[case]
    assert_same(graphs, eager)
    one, other = ([vars(engine)[name] for name in COUNTERS] for engine in recorder.engines)
    assert one == other
    first, *_, last = read_metrics(eager)
    assert all(first[name] != last[name] for name in ("lr", "alpha", "ema_momentum", "loss"))  # none stands still


def test_a_run_goes_on_by_graphs(tmp_path: Path, recorder: FakeRecorder) -> None:
    with ranks.session() as launch:
        eager = trained(tmp_path / "eager", "off", launch)
        trained(tmp_path / "parts", "off", launch, stop_after=4)
        parts = trained(tmp_path / "parts", "on", launch)
    assert (recorder.made, recorder.runs) == (2, 4)
    assert_same(parts, eager)


def test_a_run_that_goes_back_reads_what_it_has_loaded(
    tmp_path: Path, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of before are used after it."""
    learn = Step.learn

    def spoiled(self: Step, plan: Any, images: Tensor, ids: Tensor, step: Tensor, *rest: Any) -> StepOutput:
        output = learn(self, plan, images, ids, step, *rest)
        factor = torch.where(step == 5, math.nan, 1.0)
        return StepOutput(output.loss * factor, output.metrics * factor, output.mask)

    monkeypatch.setattr(Step, "learn", spoiled)
    changes = {"on_nonfinite": "rollback", "log_every": 2}
    with ranks.session() as launch:
        eager = trained(tmp_path / "eager", "off", launch, **changes)
        graphs = trained(tmp_path / "graph", "on", launch, **changes)
    assert recorder.made == 2
    assert dict(state(graphs))["skipped"].tolist() == [5]
    assert_same(graphs, eager)


def test_where_recording_fails_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says why, and nothing is counted twice: whether it fails at once, or when all is recorded."""
    said, tensors = list[str](), list[Tensor]()
    broken = NoGraphs(at_once=True, tensors=tensors)
    as_on_a_gpu(monkeypatch, broken)
    build = ranks.build_engine

    def built(*arguments: Any, **options: Any) -> Any:
        engine = build(*arguments, **options)
        tensors[:] = [*engine.optimizer.fp32_groups_gradients_flat, *engine.optimizer.bf16_groups_flat]
        for master, state in engine.basic_optimizer.state.items():
            tensors.extend([master, *state.values()])
        return engine

    monkeypatch.setattr(ranks, "build_engine", built)
    monkeypatch.setattr(graph, "note_once", said.append)
    with ranks.session() as launch:
        eager = trained(tmp_path / "eager", "off", launch, mask_policy="random")
        at_once = trained(tmp_path / "at_once", "on", launch, mask_policy="random")
        broken.at_once = False
        at_end = trained(tmp_path / "at_end", "on", launch, mask_policy="random")
    assert said == ["no CUDA graph (RuntimeError: no graphs here): updates run eagerly"] * 2
    assert_same(at_once, eager)
    assert_same(at_end, eager)


def test_what_cannot_be_a_graph_says_so_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(graph, "note_once", said.append)
    rates = {True: torch.zeros(()), False: 0.0}

    def engine(device: str = "cuda", stage: int = 1, rates_there: bool = True) -> Any:
        optimizer = SimpleNamespace(param_groups=[{"lr": rates[rates_there]}])
        return SimpleNamespace(
            device=torch.device(device), zero_optimization_stage=lambda: stage, basic_optimizer=optimizer
        )

    for asked, given in (("auto", engine("cpu")), ("off", engine("cpu")), ("off", engine())):
        assert isinstance(graph.micro_step(asked, given, Stopwatch()), graph.Eager)
    assert said == []
    for asked, given, wanted in (
        ("on", engine("cpu"), "there is no GPU"),
        ("auto", engine(stage=2), "ZeRO stage 2 is not recorded"),
        ("auto", engine(rates_there=False), "ask the host"),
    ):
        assert isinstance(graph.micro_step(asked, given, Stopwatch()), graph.Eager)
        assert wanted in said.pop()
        assert said == []
    assert graph.refusal(engine()) == ""


NULL_CASES: list[dict[str, Any]] = [
    {"recipe": "hpm_vit_base_in1k_200e", "model": "hpm_vit_small_patch16_224", "decoder_dim": 192, "decoder_depth": 2},
    {"recipe": "debug", "mask_policy": "attention", "accum_iter": 2},
    {"recipe": "debug", "mask_policy": "blockwise", "activation_checkpointing": True, "older_torch": True},
]


def test_updates_are_graphs_on_a_gpu() -> None:
    """On the null GPU, where recording is real: all in the graph, nobody waits beside it, little more memory."""
    NULL_CASES[0]["batch_size"] = 64
    found = run_on_null_gpu("tests.nullgpu.graph", json.dumps(NULL_CASES))["cases"]
    assert [len(plans) for plans in found] == [1, 2, 1]
    for plans, case in zip(found, NULL_CASES, strict=True):
        for plan in plans:
            eager, graphs = plan["eager"], plan["graph"]
            assert plan["problem"] == ""
            assert set(graphs["waits"].values()) == {0}, graphs["who"]
            assert sum(graphs["graphs"].values()) == case.get("accum_iter", 1)
            kernels = sum(int(name.split()[-1]) * number for name, number in graphs["graphs"].items())
            assert kernels > 0.98 * eager["launches"]
            assert graphs["launches"] <= 10
    ((small,), *_) = found
    assert small["teacher_seconds"] == pytest.approx(1e-4)  # the null GPU's time between any two events
    assert small["graph"]["peak"] < 1.06 * small["eager"]["peak"]  # room for products of matrices


def test_rates_on_the_device_are_those_of_the_host() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr_scale": 0.5}]
    engine: Any = SimpleNamespace(basic_optimizer=torch.optim.AdamW(groups, lr=0.1))  # type: ignore[arg-type]
    assert not ranks.updates_on_device(engine)
    engines.keep_rates_on(engine, torch.device("cpu"))
    assert ranks.updates_on_device(engine)
    kept = [group["lr"] for group in engine.basic_optimizer.param_groups]
    ranks.set_lr(engine, 0.25)
    assert [float(rate) for rate in kept] == [0.25, 0.125]
    assert all(group["lr"] is rate for group, rate in zip(engine.basic_optimizer.param_groups, kept, strict=True))


# ------------------------------------------------------------------------------------------------------ several ranks
def test_several_ranks_meet_beside_the_graph(tmp_path: Path) -> None:
    check_ranks(Path(__file__), tmp_path, launcher="forked", timeout=300)
    assert (tmp_path / "made").read_text() == "2 12"
    assert_same(tmp_path / "graph", tmp_path / "eager")


def main() -> None:
    folder, recorder = Path(sys.argv[1]), FakeRecorder()
    as_on_a_gpu(pytest.MonkeyPatch(), recorder)
    with ranks.session() as launch:
        trained(folder / "eager", "off", launch)
        trained(folder / "graph", "on", launch)
        if launch.rank == 0:
            (folder / "made").write_text(f"{recorder.made} {recorder.runs}")


if __name__ == "__main__":
    run_rank(lambda _: main())
