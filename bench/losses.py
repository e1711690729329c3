"""The ranking loss, forward and backward: in blocks, as written, and on a GPU in one kernel; time, peak memory, values
and gradients.

    python -m bench.losses [--device cuda] [--threads 1] [--rounds 5] [-o bench/results/losses.json]

The forms take turns within a round; times are of the process' CPU on a CPU and of the clock on a GPU, and a ratio is
the median of the rounds' ratios. Peak memory is what one call adds: on a CPU the growth of a fresh process' resident
memory, which includes everything that torch allocates inside its kernels, on a GPU what torch's allocator reports.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import add_device_arguments, table, use_device, write_json
from fasthpm import kernels, loss
from fasthpm.cli import Parser, run_command
from fasthpm.run.metrics import wait_for
from fasthpm.run.versions import versions


def in_blocks(predicted: Tensor, actual: Tensor) -> Tensor:
    """The loss in torch's own operations, on a GPU too."""
    with kernels.off():
        return loss.ranking_loss(predicted, actual)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"plain": loss.ranking_loss_plain, "blocks": in_blocks}
if torch.cuda.is_available():
    FORMS["kernel"] = loss.ranking_loss
CASES = ((256, 147), (32, 1411))  # images and clips: batch, masked patches
ACCURACY_BATCH = 4  # samples that are compared with float64


def inputs(batch: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Predicted and actual losses [B, M]."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(batch, count, generator=generator).to(device).requires_grad_()
    return predicted, torch.rand(batch, count, generator=generator).to(device)


def run_once(form: str, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    value = FORMS[form](predicted, actual)
    return value.detach(), torch.autograd.grad(value, predicted)[0]


def measure(batch: int, count: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each form in each round, after one round of warm-up."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    predicted, actual = inputs(batch, count, device)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for round_number in range(rounds + 1):
        for form in FORMS:
            wait_for(device)
            begin = clock()
            run_once(form, predicted, actual)
            wait_for(device)
            if round_number:
                seconds[form].append(clock() - begin)
    return seconds


def resident(field: str) -> int:
    """Bytes of this process' memory: "VmRSS" (now) or "VmHWM" (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_here(form: str, batch: int, count: int, device: torch.device) -> int:
    """Bytes that one call adds to this process' peak (or to the allocator's, on a GPU)."""
    run_once(form, *inputs(2, 5, device))  # threads, autograd's engine, kernels
    predicted, actual = inputs(batch, count, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(form, predicted, actual)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run_once(form, predicted, actual)
    return resident("VmHWM") - before


def peak(form: str, batch: int, count: int, device: torch.device) -> int:
    """`peak_here` in a process of its own."""
    command = [sys.executable, "-m", "bench.losses", "--device", device.type, "--peak_of", form, str(batch), str(count)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def accuracy(count: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Errors of value and gradient against the plain form in float64, relative to value and largest gradient."""
    predicted, actual = inputs(ACCURACY_BATCH, count, device)
    value, gradient = run_once("plain", predicted.detach().double().requires_grad_(), actual.double())
    errors = {}
    for form in FORMS:
        own = run_once(form, predicted, actual)
        errors[form] = {
            "value": float((own[0] - value).abs() / value),
            "gradient": float((own[1] - gradient).abs().max() / gradient.abs().max()),
        }
    return errors


def case(batch: int, count: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """All figures of one size."""
    seconds = measure(batch, count, rounds, device)
    ratios = {form: [a / b for a, b in zip(seconds["plain"], values, strict=True)] for form, values in seconds.items()}
    bytes_of_pairs = batch * count * count * 2
    peaks = {form: peak(form, batch, count, device) for form in FORMS}
    return {
        "batch": batch,
        "masked": count,
        "times_faster": {form: statistics.median(values) for form, values in ratios.items()},
        "times_faster_range": {form: [min(values), max(values)] for form, values in ratios.items()},
        "median_milliseconds": {form: statistics.median(values) * 1e3 for form, values in seconds.items()},
        "peak_bytes": peaks,
        "peak_in_copies_of_bf16_pairs": {form: value / bytes_of_pairs for form, value in peaks.items()},
        "error_against_float64": accuracy(count, device),
        "seconds": seconds,
    }


def report(result: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = []
    for found in result["cases"]:
        for form in FORMS:
            errors, copies = found["error_against_float64"][form], found["peak_in_copies_of_bf16_pairs"][form]
            rows.append(
                [
                    f"{found['batch']} x {found['masked']}",
                    form,
                    f"{found['median_milliseconds'][form]:.1f}",
                    f"{found['times_faster'][form]:.1f}",
                    f"{copies:.2f}",
                    f"{errors['value']:.0e}",
                    f"{errors['gradient']:.0e}",
                ]
            )
    columns = (
        "B x M",
        "form",
        "ms",
        "times faster",
        "peak, copies of [B, M, M] in bf16",
        "error of the value",
        "of the gradient",
    )
    return table(columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.losses`."""
    parser = Parser(prog="python -m bench.losses", description=__doc__)
    add_device_arguments(parser, rounds=5)
    parser.add_argument("--peak_of", nargs=3, metavar=("FORM", "BATCH", "MASKED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = use_device(arguments)
    if arguments.peak_of:
        form, batch, count = arguments.peak_of
        print(peak_here(form, int(batch), int(count), device))
        return
    cases = [case(*size, arguments.rounds, device) for size in CASES]
    result = {"bench": "losses", "threads": torch.get_num_threads(), "cases": cases, "versions": versions(device, 1)}
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
