"""Updates that are not finite: seen by all ranks, left out the same way by two different means, or the run's end.

pytest starts this very file as the ranks' program (`main`): one launch spoils chosen updates under several ZeRO stages
and writes what became of them as JSON, and the tests below judge it.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import pretrain, recipes
from fasthpm.checkpoint.folder import newest_valid, read_state
from fasthpm.checkpoint.shards import STATES, SavedState
from fasthpm.cli import run_rank
from fasthpm.errors import UserError
from fasthpm.ranks import launch as ranks_launch
from fasthpm.recipe import Recipe
from fasthpm.run.health import first_not_finite
from fasthpm.run.records import read_metrics
from fasthpm.step import Step, StepOutput
from tests.helpers.launch import ROOT, check_ranks

BAD_LOSS, BAD_GRADIENT = 2, 5  # updates, from 0; the first is spoiled on rank 1 alone, the second on rank 0
STAGES = ("zero1_bf16", "zero2_bf16", "zero3_bf16")  # ZeRO 3 last: it patches torch for good


class InfiniteGradient(torch.autograd.Function):
    """The value itself, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


SPOIL = [True]


def spoiled(forward: Any) -> Any:
    """`Step.forward` that goes wrong at two updates."""

    def run(self: Step, images: Tensor, ids: Tensor, step: Tensor, *rest: Any) -> StepOutput:
        output: StepOutput = forward(self, images, ids, step, *rest)
        place = int(step), int(torch.distributed.get_rank())
        if SPOIL[0] and place == (BAD_LOSS, 1):
            return StepOutput(output.loss * math.nan, output.metrics * math.nan, output.mask)
        if SPOIL[0] and place == (BAD_GRADIENT, 0):
            return StepOutput(InfiniteGradient.apply(output.loss), output.metrics, output.mask)
        return output

    return run


def small(folder: Path, stage: str, **changes: Any) -> Recipe:
    """8 updates of two micro-steps, a checkpoint after the first 4."""
    fields = {
        "model": "hpm_vit_pico_patch4_28",
        "data_path": "synthetic:64",
        "batch_size": 4,
        "global_batch_size": 16,
        "epochs": 2,
        "warmup_epochs": 0.0,
        "log_every": 3,
        "save_every": 1,
        "panel_every": 0,
        "difficulty_every": 0,
        "output_dir": str(folder),
        "deepspeed_config": str(ROOT / "ds_configs" / f"{stage}.json"),
    }
    return dataclasses.replace(recipes.debug(), **{**fields, **changes})


def attempt(recipe: Recipe, launch: ranks_launch.Launch) -> str:
    """Run it; the error it ended with."""
    try:
        pretrain.pretrain(recipe, launch)
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    Step.forward = spoiled(Step.forward)  # type: ignore[method-assign]
    pretrain.measure_matmul_rate = lambda *_: 1.0
    pretrain.finish = lambda run: None
    with ranks_launch.session() as launch:
        # Not finite in the loss, then in the gradient; after each the user allows one more to be left out.
        found["halt"] = attempt(small(folder / "halt", "zero2_bf16"), launch)
        found["cap"] = attempt(small(folder / "cap", "zero1_bf16", on_nonfinite="skip", max_nonfinite=1), launch)
        rollback = {"on_nonfinite": "rollback"}
        found["stopped"] = attempt(small(folder / "resumed", "zero1_bf16", stop_after=5, **rollback), launch)
        found["then"] = attempt(small(folder / "resumed", "zero1_bf16", **rollback), launch)
        for stage in STAGES:
            for policy in ("skip", "rollback"):
                found[f"{policy} {stage}"] = attempt(
                    small(folder / f"{policy}-{stage}", stage, on_nonfinite=policy), launch
                )
        if launch.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, done once."""
    folder = tmp_path_factory.mktemp("nonfinite")
    output = check_ranks(Path(__file__), folder, launcher="forked", timeout=300)
    (folder / "output").write_text(output)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, str]:
    """The error that each run ended with, or ""."""
    errors: dict[str, str] = json.loads((folder / "found.json").read_text())
    return errors


def state(run: Path) -> Iterator[tuple[str, Tensor]]:
    """Masters, moments and EMA of the newest checkpoint."""
    checkpoint = newest_valid(run, pytest.fail)
    assert checkpoint is not None
    saved = SavedState(checkpoint)
    yield "optimizer_step", torch.tensor(saved.optimizer_step)
    for which in STATES:
        for name in saved.names:
            yield f"{which} {name}", saved.whole(which, name)


def skipped(run: Path) -> list[int]:
    checkpoint = newest_valid(run, pytest.fail)
    assert checkpoint is not None
    return read_state(checkpoint).skipped


@pytest.mark.parametrize("stage", STAGES)
def test_skip_and_rollback_leave_the_same_updates_out(stage: str, folder: Path, found: dict[str, str]) -> None:
    """DeepSpeed refuses the step; or the step is undone by a checkpoint and its samples are passed over."""
    runs = [folder / f"{policy}-{stage}" for policy in ("skip", "rollback")]
    assert (found[f"skip {stage}"], found[f"rollback {stage}"]) == ("", "")
    for run in runs:
        assert skipped(run) == [BAD_LOSS, BAD_GRADIENT]
        assert read_metrics(run)[-1]["skipped_updates"] == 2
        assert all(math.isfinite(value) for record in read_metrics(run) for value in record.values())
    for (name, one), (_, other) in zip(*map(state, runs), strict=True):
        assert torch.equal(one, other), name
        assert one.isfinite().all(), name
    assert dict(state(runs[0]))["optimizer_step"] == 6


def test_what_is_left_out_belongs_to_the_state(folder: Path, found: dict[str, str]) -> None:
    """A run that rolled back, stopped and was resumed ends like one that was never stopped."""
    assert (found["stopped"], found["then"]) == ("", "")
    assert skipped(folder / "resumed") == [BAD_LOSS, BAD_GRADIENT]
    pairs = zip(state(folder / "resumed"), state(folder / "rollback-zero1_bf16"), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)


def test_halt_is_the_default_and_keeps_what_there_is_to_know(folder: Path, found: dict[str, str]) -> None:
    assert "the loss is not finite by update 3, first at 3; its sample ids, masks and norms are in" in found["halt"]
    assert "--on_nonfinite skip or rollback" in found["halt"]
    for rank in (0, 1):
        kept = torch.load(folder / "halt" / "nonfinite" / "update-00000003" / f"rank{rank}.pt")
        assert [entry["step"] for entry in kept["micro_steps"]] == [BAD_LOSS] * 2
        assert all(len(entry["ids"]) == 4 for entry in kept["micro_steps"])
        assert all(bool(entry["metrics"].isfinite().all()) == (rank == 0) for entry in kept["micro_steps"])
        norms = kept["grad_norms"]
        assert first_not_finite([], [], norms) == BAD_LOSS
    assert newest_valid(folder / "halt", pytest.fail) is None


def test_too_many_end_the_run(folder: Path, found: dict[str, str]) -> None:
    assert "2 updates were not finite, more than max_nonfinite 1" in found["cap"]
    assert (folder / "cap" / "nonfinite" / "update-00000006" / "rank1.pt").is_file()
    checkpoint = newest_valid(folder / "cap", pytest.fail)
    assert checkpoint is not None
    assert (checkpoint.name, read_state(checkpoint).skipped) == ("step-00000004", [BAD_LOSS])


if __name__ == "__main__":
    run_rank(lambda _: main())
