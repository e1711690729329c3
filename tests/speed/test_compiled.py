"""The compiled step against the eager one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fasthpm.__main__ import dispatch
from fasthpm.errors import UserError
from fasthpm.run.records import read_metrics
from fasthpm.speed.compiled import Compiled
from fasthpm.step import Step
from tests.helpers.launch import check_ranks
from tests.helpers.steps import ALPHA, batch, step_of

RUN = (
    *("--recipe", "debug", "--model", "hpm_vit_pico_patch4_28"),
    *("--data_path", "synthetic:64", "--warmup_epochs", "0", "--epochs", "1"),
    *("--stop_after", "3", "--log_every", "1", "--panel_every", "0", "--difficulty_every", "0"),
)


def test_the_compiled_step_is_the_eager_one_and_compiled_once() -> None:
    eager, compiled = step_of(), step_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_with(counter)
    images, ids = batch()
    counts = []
    for number in range(3):  # alpha, update and weights change
        arguments = (images, ids, torch.tensor(number), torch.tensor(0.2 * number, dtype=torch.float64))
        one, two = eager(*arguments), compiled(*arguments)
        torch.testing.assert_close(two.metrics, one.metrics, rtol=1e-5, atol=1e-6)
        assert torch.equal(one.mask, two.mask)
        for step, output in ((eager, one), (compiled, two)):
            step.zero_grad()
            output.loss.backward()
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
            with torch.no_grad():
                ours -= 0.01 * theirs.grad
                theirs -= 0.01 * theirs.grad
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    for part in (compiled.run_patches, compiled.run_teacher, compiled.run_student):
        assert isinstance(part, Compiled)
        assert not part.failure


def main(folder: Path) -> None:
    """Two runs of a few updates, eager and compiled: through DeepSpeed in bfloat16, with the watchdog on."""
    real = Step.compile_with
    Step.compile_with = lambda step, backend: real(step, "aot_eager")  # type: ignore[method-assign]  # not minutes of C++
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        dispatch(["pretrain", *RUN, "--output_dir", str(folder / name), *more])


def test_a_compiled_run_is_the_eager_one_and_is_not_taken_for_stuck(tmp_path: Path) -> None:
    """Compiling takes longer than an update may; and DeepSpeed casts buffers so that views of them don't compile."""
    limit = {"FASTHPM_TIMEOUT_MINUTES": "0.15"}
    output = check_ranks(Path(__file__), tmp_path, ranks=1, launcher="forked", env=limit)
    assert "torch.compile of" not in output
    eager, compiled = ([record["loss"] for record in read_metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert len(eager) == 3
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_the_first_maps_compile_nothing() -> None:
    step = step_of(teacher_maps=True)
    counter = CompileCounterWithBackend("aot_eager")
    step.compile_with(counter)
    images, ids = batch()
    assert not step.compiled
    step(images, ids, torch.tensor(0), ALPHA).loss.backward()
    assert step.compiled
    before = counter.frame_count
    step(images, ids, torch.tensor(1), ALPHA, torch.rand(len(ids), step.recipe.num_patches)).loss.backward()
    assert counter.frame_count == before > 0


def test_blocks_are_compiled_in_the_step_alone() -> None:
    """Once for each shape, and again in the backward pass if that is asked for; probes and maps have other batches."""
    step, eager = (step_of(activation_checkpointing=True) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    step.compile_with(counter)
    for each in (step, eager):
        each(*batch(), torch.tensor(0), ALPHA).loss.backward()
    for ours, theirs in zip(step.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert isinstance(step.run_student, Compiled)
    assert not step.run_student.failure
    before = counter.frame_count
    images, _ = batch(3)
    torch.testing.assert_close(step.difficulty(images), eager.difficulty(images))
    step.student.encode(step.normalized_patches(images))
    assert counter.frame_count == before == 6  # patches, blocks of teacher (2) and student (2), losses


def test_a_compiler_that_fails_is_named_once_and_the_step_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    step, eager = step_of(), step_of()
    step.compile_with(broken)
    for number in range(2):
        arguments = (*batch(), torch.tensor(number), ALPHA)
        torch.testing.assert_close(step(*arguments).metrics, eager(*arguments).metrics)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # the pixels, the teacher, the step
    assert all("warning: torch.compile of the" in line and "no compiler here" in line for line in lines)


def test_wrong_input_is_not_the_compilers_fault() -> None:
    def fails(value: Tensor) -> Tensor:
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        Compiled(fails, "it", "eager")(torch.ones(1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
