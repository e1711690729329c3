"""Masks of a batch: the batched strategies and a loop over images, interleaved in one process.

    python -m bench.masking [--device cuda] [--threads 1] [--rounds 11] [-o bench/results/masking.json]

The baseline, `loop`, is built as the released code builds its masks: two sorts of the batch and, between them, one
image after the other: its hard patches and all patch numbers are copied to the host, the rest shuffled by numpy and
copied back. Times are of the whole process' CPU on a CPU and of the clock on a GPU; a ratio is the median of the
rounds' ratios to `loop`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import add_device_arguments, table, use_device, write_json
from fasthpm import mask as masks
from fasthpm.cli import Parser, run_command
from fasthpm.run.metrics import wait_for
from fasthpm.run.versions import versions

REPEATS = 5  # calls in a row per round and variant
ALPHA = 0.25  # halfway through a run
CASES = {  # name: batch, plan of HPM's masks
    "images 256 x 196": (256, masks.MaskPlan("hpm", 0.75, (14, 14))),
    "clips 32 x 1568": (32, masks.MaskPlan("hpm", 0.9, (56, 28))),
}


def loop_mask(difficulty: Tensor, mask_ratio: float, alpha: float) -> Tensor:
    """Easy-to-hard masks, image by image on the host; bool [B, L]."""
    batch, length = difficulty.shape
    masked = masks.num_masked(length, mask_ratio)
    hard, device = int(masked * alpha), difficulty.device
    hardest_last = difficulty.argsort(dim=1)
    order = torch.zeros_like(hardest_last)
    for image in range(batch):
        chosen = hardest_last[image, length - hard :]
        order[image, length - hard :] = chosen
        everything = torch.arange(length, device=device).cpu().numpy()
        rest = np.delete(everything, chosen.cpu().numpy())
        np.random.shuffle(rest)  # noqa: NPY002 (as released)
        order[image, : length - hard] = torch.from_numpy(rest).to(device)
    places = order.argsort(dim=1)
    late = torch.ones(batch, length, dtype=torch.bool, device=device)
    late[:, : length - masked] = False
    return late.gather(1, places)


def variants(batch: int, plan: masks.MaskPlan, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Functions that each make the masks of one batch."""
    length, ratio = plan.num_patches, plan.mask_ratio
    difficulty = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)).to(device)
    noise = torch.rand(2, batch, length, device=device)
    on_device = torch.full((), ALPHA, dtype=torch.float64, device=device)
    step, ids = torch.zeros((), dtype=torch.int64, device=device), torch.arange(batch, device=device)

    def whole() -> Tensor:
        return masks.draw_mask(plan, masks.sample_noise(0, step, ids, plan.noise_size), difficulty, on_device)

    functions = {
        "loop": lambda: loop_mask(difficulty, ratio, ALPHA),
        "hpm": lambda: masks.easy_to_hard_mask(
            difficulty, ratio, ALPHA, noise=torch.rand(2, batch, length, device=device)
        ),
        "hpm, as in a step (noise by sample id)": whole,
        "random": lambda: masks.random_mask(noise[0], ratio),
    }
    for policy in ("block", "blockwise", "uniform"):
        other = masks.MaskPlan(policy, 0.75, plan.grid_size)
        numbers = torch.rand(1, batch, other.noise_size, device=device)
        functions[policy] = lambda other=other, numbers=numbers: masks.draw_mask(other, numbers)  # type: ignore[misc]
    functions["attention, thrown 40 %"] = lambda: masks.attention_mask(difficulty, 0.45, 0.4, noise[0])[0]
    return functions


def measure(functions: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each function in each round, after one round of warm-up."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            wait_for(device)
            begin = clock()
            for _ in range(REPEATS):
                function()
            wait_for(device)
            if round_number:
                seconds[name].append((clock() - begin) / REPEATS)
    return seconds


def summary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything a reader needs to judge the ratios."""
    device = torch.device(arguments.device)
    cases = {}
    for name, (batch, plan) in CASES.items():
        seconds = measure(variants(batch, plan, device), arguments.rounds, device)
        ratios = {
            key: [loop / own for loop, own in zip(seconds["loop"], values, strict=True)]
            for key, values in seconds.items()
        }
        cases[name] = {
            "median_milliseconds": {key: statistics.median(values) * 1e3 for key, values in seconds.items()},
            "times_faster_than_loop": {key: statistics.median(values) for key, values in ratios.items()},
            "times_faster_range": {key: [min(values), max(values)] for key, values in ratios.items()},
            "seconds": seconds,
        }
    return {
        "bench": "masking",
        "threads": torch.get_num_threads(),
        "alpha": ALPHA,
        "cases": cases,
        "versions": versions(device, 1),
    }


def report(result: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = []
    for name, case in result["cases"].items():
        for variant, milliseconds in case["median_milliseconds"].items():
            low, high = case["times_faster_range"][variant]
            faster = f"{case['times_faster_than_loop'][variant]:.1f} ({low:.1f} to {high:.1f})"
            rows.append([name, variant, f"{milliseconds:.2f}", faster])
    return table(("masks", "how", "ms", "times faster than the loop"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.masking`."""
    parser = Parser(prog="python -m bench.masking", description=__doc__)
    add_device_arguments(parser, rounds=11)
    arguments = parser.parse_args(argv)
    use_device(arguments)
    result = summary(arguments)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
