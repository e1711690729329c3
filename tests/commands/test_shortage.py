"""Memory that runs out: what is said, and that nothing is lost. No GPU: torch's error is raised by a fake."""

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor

from fasthpm import pretrain, recipes
from fasthpm.cli import run_rank
from fasthpm.commands import plan, shortage
from fasthpm.errors import UserError
from fasthpm.ranks.launch import Launch
from fasthpm.run.records import read_metrics
from fasthpm.speed.gpus import GIB, GPU
from fasthpm.step import Step
from tests.helpers.launch import run_ranks

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 3 GiB.")
RUN = ("--recipe", "debug", "--data_path", "synthetic:64", "--epochs", "2", "--warmup_epochs", "0", "--log_every", "1")
GPU_LAUNCH = Launch(0, 0, 2, 2, torch.device("cpu"))
ASKED = dataclasses.replace(recipes.debug(), batch_size=64, global_batch_size=256)


def a_gpu(memory: float) -> Any:
    """A fake of `gpus.installed`."""
    return lambda device: (GPU("fake", memory, math.inf, math.inf, math.inf), False)


def fails_at(update: int) -> None:
    """Have a fake step run out of memory in that update."""
    real = Step.forward

    def forward(self: Step, images: Any, ids: Any, step: Any, *rest: Any) -> Any:
        if not isinstance(step, FakeTensor) and int(step) == update:  # the plan's own step has no values
            raise ERROR
        return real(self, images, ids, step, *rest)

    Step.forward = forward  # type: ignore[method-assign]


def main(argv: Any = None) -> None:
    """A rank whose memory runs out in its fourth update, two after a checkpoint."""
    fails_at(3)
    shortage.gpus.installed = a_gpu(3 * GIB)
    pretrain.main(sys.argv[1:])


def test_the_line_names_what_is_saved_and_the_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shortage.dry_run(ASKED.resolve(10**6, 2), shortage.gpus.GPUS["h100"])
    kept = plan.used(ASKED.resolve(10**6, 2), whole, 2) - whole.activations
    for share, batch in ((0.7, 32), (0.3, 16), (5.0, 32)):  # a model that finds room enough is not believed
        memory = (kept + share * whole.activations) / plan.USABLE
        monkeypatch.setattr(shortage.gpus, "installed", a_gpu(memory))
        line = shortage.describe(ASKED, GPU_LAUNCH, "after update 7", str(ERROR))
        assert line.startswith("rank 0: the memory of cpu ran out after update 7 (1.50 GiB more were asked for): ")
        assert f"--batch_size {batch} is predicted to fit" in line
        assert f"start the same command with --batch_size {batch} --global_batch_size 256 to go on" in line
        smaller = dataclasses.replace(ASKED, batch_size=batch)
        found = plan.plan(smaller, a_gpu(memory)(None)[0], 2, 10**6, per_machine=8, network=1e9)
        needs = float(re.search(r"fit \(([\d.]+) of", line)[1])  # type: ignore[index]
        assert needs * GIB == pytest.approx(found.memory, rel=0.03, abs=0.05 * GIB)
    first = whole.held[0]
    assert f"the largest of them {first.number} x {list(first.shape)} bfloat16 = " in line
    assert math.prod(first.shape) % 64 == 0
    assert sum(held.bytes for held in whole.held) == pytest.approx(whole.activations, rel=0.05)
    assert "\n" not in line


def test_where_nothing_fits_or_is_known_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage.gpus, "installed", a_gpu(1e6))
    line = shortage.describe(ASKED, GPU_LAUNCH, "before the first update", "")
    assert re.match(r"rank 0: the memory of cpu ran out before the first update: debug does not fit a fake of", line)
    assert "take a GPU with more memory" in line

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(shortage, "dry_run", broken)
    line = shortage.describe(ASKED, dataclasses.replace(GPU_LAUNCH, world_size=1), "after update 7", "")
    want = (
        "the memory of cpu ran out after update 7; take a smaller --batch_size than 64 (what would fit is not known: "
    )
    assert line == f"{want}ValueError('odd'))"


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^odd$"), shortage.explained(ASKED, GPU_LAUNCH, str):
        raise RuntimeError("odd")


def test_a_rank_of_several_says_it_itself_and_lingers_for_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shortage, "describe", lambda *_: "the line")
    for launch, said in (
        (GPU_LAUNCH, "fasthpm: error: the line\n"),
        (dataclasses.replace(GPU_LAUNCH, world_size=1), ""),
    ):
        with pytest.raises(UserError, match="the line") as raised, shortage.explained(ASKED, launch, str):
            raise ERROR
        assert raised.value.printed_elsewhere == bool(said)
        assert capsys.readouterr().err == said


def test_every_rank_says_it_and_the_run_goes_on_with_the_batch_that_is_named(tmp_path: Path) -> None:
    words = (*RUN, "--save_every", 1, "--output_dir", tmp_path)
    finished = run_ranks(Path(__file__), *words, "--batch_size", 16, ranks=2, launcher="forked")
    assert finished.status == 2, finished.output
    found = re.findall(r"fasthpm: error: (rank \d): the memory of cpu ran out after update 3 (.*)", finished.output)
    assert sorted(rank for rank, _ in found) == ["rank 0", "rank 1"]
    assert "Traceback" not in finished.output
    advised = re.search(r"--batch_size 8 --global_batch_size 32", found[0][1])
    assert advised, found
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]
    result = pretrain.main([str(word) for word in (*words, *advised[0].split())])
    assert result.updates == 4
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_rank_alone_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "forward", Step.forward)  # put back afterwards
    monkeypatch.setattr(shortage.gpus, "installed", a_gpu(3 * GIB))
    fails_at(0)
    with pytest.raises(UserError, match=r"^the memory of cpu ran out after update 0 \(1.50 GiB more") as raised:
        pretrain.main([*RUN, "--batch_size", "16", "--output_dir", str(tmp_path)])
    assert not raised.value.printed_elsewhere


if __name__ == "__main__":
    run_rank(main)
