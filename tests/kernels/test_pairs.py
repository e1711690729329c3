"""The kernels of pairs of patches: in Triton's interpreter, and compiled for GPUs that are not here."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm import kernels, loss
from tests.helpers.launch import ROOT

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs the kernels on a GPU, and there is none")
FLOATS = {"predicted": "*fp32", "actual": "*fp32", "sums": "*fp64"}
BLOCKS, TOTALS = ("ROWS", "COLUMNS"), ("SUMMED",)
# What they are given, what is fixed when they are compiled, and the most registers: 5, 4 blocks of 128 threads at a
# time in the 65,536 of a GPU's multiprocessor.
KERNELS: dict[str, tuple[dict[str, str], tuple[str, ...], int]] = {
    "ranking_kernel": ({**FLOATS, "slope": "*fp32", "M": "i32"}, BLOCKS, 96),
    "health_kernel": ({**FLOATS, "seen": "*fp32", "M": "i32"}, BLOCKS, 128),
    "ranking_totals": ({"sums": "*fp64", "value": "*fp32", "factor": "*fp32", "programs": "i32"}, TOTALS, 128),
    "health_totals": ({"sums": "*fp64", "results": "*fp32", "programs": "i32", "largest": "fp32"}, TOTALS, 128),
}


def test_they_are_their_twins_in_the_interpreter() -> None:
    """No GPU: numpy computes what a GPU would."""
    command = [sys.executable, "-m", "tests.helpers.interpreted_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") == 4


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_they_compile_for_gpus_and_fit(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stack, nothing spilled, few registers: by what `cuobjdump` says of the machine code."""
    pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA, and this is none")
    from triton import compile as compile_kernel
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fasthpm.kernels import pairs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (given, fixed, registers) in KERNELS.items():
        source = ASTSource(
            getattr(pairs, name),
            given | dict.fromkeys(fixed, "constexpr"),
            {name: getattr(pairs, name) for name in fixed},
        )
        made = compile_kernel(source, GPUTarget("cuda", capability, 32), {"num_warps": pairs.WARPS})
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        )
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout + said.stderr)}
        assert usage.keys() == {"REG", "STACK", "LOCAL"}
        assert usage["STACK"] == usage["LOCAL"] == 0, (name, usage)
        assert usage["REG"] <= registers, (name, usage)


def pair_loss(predicted: torch.Tensor, actual: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.ranking_loss(predicted, actual), loss.health(predicted, actual, seen)


def both(predicted: torch.Tensor, actual: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loss, gradient and health."""
    predicted = predicted.clone().requires_grad_()
    value = loss.ranking_loss(predicted, actual)
    return value, torch.autograd.grad(value, predicted)[0], loss.health(predicted, actual, seen)


def put(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let `module` be the kernels; None: there are none."""
    monkeypatch.setattr(kernels, "_failed", False)
    monkeypatch.delattr(kernels, "pairs", raising=False)
    monkeypatch.setitem(sys.modules, "fasthpm.kernels.pairs", module)


def test_without_triton_the_twins_run_after_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CPU that calls itself none."""
    values = torch.randn(3, 2, 20)
    want = both(*values)
    monkeypatch.setattr(loss, "on_cpu", lambda values: False)
    put(monkeypatch, None)
    for _ in range(2):
        for got, expected in zip(both(*values), want, strict=True):
            assert torch.equal(got, expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Triton's kernels are not to be had (ModuleNotFoundError: ")


def test_memory_that_runs_out_is_not_tritons_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def ranking(self, *_: Any) -> None:
            raise torch.OutOfMemoryError("full")

    put(monkeypatch, Full())
    inputs = torch.zeros(1, 2), torch.zeros(1, 2)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            kernels.launched("ranking", *inputs)
    with kernels.off():
        assert kernels.launched("ranking", *inputs) is None
    assert not kernels._failed


def test_compilers_are_told_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that the operations give is what they were given."""
    monkeypatch.setattr(kernels, "_failed", True)
    monkeypatch.setattr(loss, "on_cpu", lambda values: False)
    values = torch.randn(3, 2, 20)
    predicted = values[0].clone().requires_grad_()
    run = torch.compile(pair_loss, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, expected in zip(run(predicted, *values[1:]), pair_loss(predicted, *values[1:]), strict=True):
        torch.testing.assert_close(got, expected)
        if got.requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(x.square(), predicted) for x in (got, expected)))
    torch.library.opcheck(loss._ranking, tuple(values[:2]))
    torch.library.opcheck(loss._ranking, (values[0].t().contiguous().t(), values[1]))
    torch.library.opcheck(loss._health, tuple(values))


@CUDA
@pytest.mark.parametrize("shape", [(256, 147), (32, 1411), (3, 50)])
@pytest.mark.parametrize("ties", [False, True])
def test_they_are_their_twins_on_a_gpu(shape: tuple[int, int], ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, actual, seen = torch.randn(3, *shape, generator=generator)
    actual, seen = ((actual * 3).round(), (seen * 3).round()) if ties else (actual, seen)
    plain = predicted.double().requires_grad_()
    want = loss.ranking_loss(plain, actual.double())
    (slope,) = torch.autograd.grad(want, plain)
    health = loss.health(
        *(x.float().argsort(dim=1, stable=True).argsort(dim=1).float() for x in (predicted, actual, seen))
    )
    value, gradient, found = (x.cpu() for x in both(predicted.cuda(), actual.cuda(), seen.cuda()))
    assert not kernels._failed
    torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=3e-6 * slope.abs().max().item())
    torch.testing.assert_close(found[::2], health[::2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], loss.pair_accuracy(predicted, actual), rtol=1e-6, atol=0)
