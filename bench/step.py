"""Whole training steps, interleaved: HPM and the project's own MAE, through the same DeepSpeed engine.

    python -m bench.step [--size base] [--batch_size 4] [--rounds 7] [-o bench/results/step.json]

A step is everything between two batches: normalisation, teacher, mask, student, backward, clipping, AdamW, EMA. The
variants take turns within a round, so drift and noise hit all alike; the ratio is the median of the rounds' ratios.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fasthpm import engine, flops, recipes
from fasthpm.cli import Parser, run_command
from fasthpm.data import DatasetInfo
from fasthpm.errors import UserError
from fasthpm.metrics import measure_matmul_rate, wait_for
from fasthpm.recipe import Recipe
from fasthpm.step import Step, model_of
from fasthpm.teacher import EMATeacher
from fasthpm.versions import versions

SIZES = {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224", "nano": "vit_nano_patch4_28"}
VARIANTS = ("mae", "hpm")
INFO = DatasetInfo(1, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("any",))


def recipe_of(variant: str, arguments: argparse.Namespace) -> Recipe:
    """The published 200-epoch recipe of a variant at the bench's size and batch."""
    base = recipes.from_name(f"{variant}_vit_base_in1k_200e")
    small: dict[str, Any] = {"input_size": "28", "patch_size": 4} if arguments.size == "nano" else {}
    return dataclasses.replace(
        base, model=f"{variant}_{SIZES[arguments.size]}", batch_size=arguments.batch_size, global_batch_size=0,
        clip_grad=5.0, deepspeed_config=arguments.deepspeed_config, **small,
    ).resolve(10**6, 1)  # fmt: skip


def build(recipe: Recipe, launch: engine.Launch) -> tuple[Callable[[int], None], Step]:
    """A function that runs one whole update on fixed random images, and its step module."""
    step = Step(model_of(recipe), recipe, INFO)
    config = engine.merge_config(recipe.deepspeed_config, recipe, 1)
    deepspeed_engine = engine.build_engine(step, recipe, config, launch)
    if recipe.uses_teacher:
        step.attach_teacher(EMATeacher(deepspeed_engine, step.student, "student.", model_of(recipe), 0.999).module)
    generator = torch.Generator().manual_seed(0)
    shape = (recipe.batch_size, *recipe.image_size, recipe.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(launch.device)
    ids = torch.arange(recipe.batch_size, device=launch.device)
    alpha = torch.full((), 0.25, dtype=torch.float64, device=launch.device)

    def update(number: int) -> None:
        output = deepspeed_engine(images, ids, torch.full((), number, device=launch.device), alpha)
        deepspeed_engine.backward(output.loss)
        deepspeed_engine.step()

    return update, step


def measure(updates: dict[str, Callable[[int], None]], rounds: int, repeats: int,
            device: torch.device) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per update of each variant in each round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    number = 0
    for round_number in range(rounds + 1):
        for name, update in updates.items():
            wait_for(device)
            begin = time.perf_counter()
            for _ in range(repeats):
                update(number)
                number += 1
            wait_for(device)
            if round_number:
                seconds[name].append((time.perf_counter() - begin) / repeats)
    return seconds


def summary(arguments: argparse.Namespace, launch: engine.Launch) -> dict[str, Any]:
    """Everything a reader needs to judge the ratio."""
    built = {variant: build(recipe_of(variant, arguments), launch) for variant in VARIANTS}
    repeats = arguments.repeats or (20 if launch.device.type == "cuda" else 1)
    seconds = measure({name: update for name, (update, _) in built.items()}, arguments.rounds, repeats, launch.device)
    work = {name: flops.step_flops(step.student, step.recipe) for name, (_, step) in built.items()}
    rate = measure_matmul_rate(launch.device, next(built["hpm"][1].parameters()).dtype)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [hpm / mae for hpm, mae in zip(seconds["hpm"], seconds["mae"], strict=True)]
    return {
        "bench": "step", "size": arguments.size, "batch_size": arguments.batch_size,
        "deepspeed_config": arguments.deepspeed_config, "threads": torch.get_num_threads(),
        "seconds": seconds, "median_seconds": median,
        "hpm_over_mae": statistics.median(ratios), "hpm_over_mae_range": [min(ratios), max(ratios)],
        "gflops_per_sample": {name: {k: v / 1e9 for k, v in parts.items()} for name, parts in work.items()},
        "hpm_over_mae_flops": work["hpm"]["total"] / work["mae"]["total"],
        "matmul_gflops_per_second": rate / 1e9,
        "mfu": {n: work[n]["total"] * arguments.batch_size / median[n] / rate for n in VARIANTS},
        "versions": versions(launch.device, launch.world_size),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.step`."""
    parser = Parser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    parser.add_argument("--batch_size", type=int, default=4, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--repeats", type=int, default=0, help="updates per round and variant (0: 1 on CPU, 20 on GPU)")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero1_bf16.json")
    parser.add_argument("-o", "--output", type=Path, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or arguments.rounds < 1:
        raise UserError("batch_size and rounds must be 1 or more")
    with engine.session() as launch:
        result = summary(arguments, launch)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name in VARIANTS:
        gflop, mfu = result["gflops_per_sample"][name]["total"], result["mfu"][name]
        print(f"{name}: {result['median_seconds'][name]:.3f} s per step, {gflop:.1f} GFLOP per image, MFU {mfu:.0%}")
    low, high = result["hpm_over_mae_range"]
    print(f"HPM / MAE: {result['hpm_over_mae']:.2f} (rounds {low:.2f} to {high:.2f}); by FLOPs "
          f"{result['hpm_over_mae_flops']:.2f}")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
