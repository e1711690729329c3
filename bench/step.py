"""Whole training steps, interleaved: MAE, HPM, ways to ask what is hard, and MAE and HPM as published code is built.

    python -m bench.step [--size base] [--video] [--batch_size 8] [--precision fp32 bf16] [--rounds 5] [-o step.json]
        [--variants mae eager_mae measured_alone …]

A step is everything between two batches: normalisation, teacher, mask, student, backward, clipping, AdamW, EMA. Ours
go through the DeepSpeed engine and are those of `bench.methods`; `eager_mae` and `eager_hpm` are `bench.baselines`. The
variants take turns within a round, so drift and noise hit all alike, and a ratio is the median of the rounds' ratios.
Each keeps its weights, moments and average in memory (2 to 3 GiB at ViT-B): `--variants` takes fewer at a time.

Methods with kept maps read their difficulty from maps that are refreshed every K epochs, by a teacher's pass over all
images: a K-th of that pass' forward, timed in the same rounds, is added to their steps. With --video all are of clips
of 16 frames, MAE is VideoMAE, and the fast ones have their teacher in every step, because maps are of images.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import json_file, ratios, say, show, table, write_json
from bench.eager import eager_update
from bench.methods import METHODS
from bench.overhead import loop_share
from fasthpm import ranks, recipes, schedule
from fasthpm.cli import Parser, run_command
from fasthpm.commands import attention
from fasthpm.data import DatasetInfo
from fasthpm.difficulty import HEAD
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.run.metrics import measure_matmul_rate, memory_gib, wait_for
from fasthpm.run.versions import versions
from fasthpm.speed import flops, graph, traffic
from fasthpm.step import Step
from fasthpm.teacher import EMATeacher

SIZES = {
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
    "nano": "vit_nano_patch4_28",
}
CONFIGS = {"fp32": "zero0_fp32", "bf16": "zero1_bf16"}
EAGER = {"eager_mae": "mae", "eager_hpm": "hpm"}  # and the method that they are
VARIANTS = (*METHODS, *EAGER)
USUAL = (
    *("mae", "hpm", "hpm_masked_query", "hpm_fast", "in_place_alone", "measured_alone", "measured_maps"),
    *("measured_fast", "eager_mae", "eager_hpm"),
)
REFRESH = "_teacher_pass"  # timed beside a variant with kept maps: the forward that refreshes them
RATIOS = (  # name, of, over
    *((f"{one.title} / own MAE", name, "mae") for name, one in METHODS.items() if name != "mae"),
    *((f"{one.title} / eager MAE", name, "eager_mae") for name, one in METHODS.items() if name != "mae"),
    ("eager HPM / exact HPM", "eager_hpm", "hpm"),
    ("eager HPM / fast HPM", "eager_hpm", "hpm_fast"),
    ("eager HPM / eager MAE", "eager_hpm", "eager_mae"),
    ("eager MAE / own MAE", "eager_mae", "mae"),
)
INFO = DatasetInfo(1, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), ("any",))
ALPHA = 0.25
Update = Callable[[int], None]


class Built(NamedTuple):
    """A variant that is ready to be timed."""

    update: Update  # one whole update
    attention: dict[str, str]  # on a GPU: each shape's kernel
    gflops: dict[str, float]  # per sample, by the formula of what the method needs
    traffic_mb: dict[str, float]  # per sample, by the formula
    refresh: Update | None = None  # the pass that refreshes its maps
    loop: Callable[[int], dict[str, float]] | None = None  # so many updates in the training loop; see bench.overhead


def recipe_of(variant: str, arguments: argparse.Namespace, deepspeed_config: str = "") -> Recipe:
    """The published 200-epoch recipe of a variant at the bench's size and batch, with this JSON or the arguments'."""
    method = METHODS[EAGER.get(variant, variant)]
    kind = "hpm" if method.difficulty else "mae"
    video = {"mae": "videomae_vit_base_k400_800e", "hpm": "hpm_video_vit_base_k400_800e"}
    base = recipes.from_name(video[kind] if arguments.video else f"{kind}_vit_base_in1k_200e")
    changes = method.fields
    name = base.model.replace(SIZES["base"], SIZES[arguments.size])
    if arguments.video:
        changes = {field: value for field, value in changes.items() if field != "teacher_maps"}
        name = name.replace("patch4_28", "patch8_32")
        if arguments.size == "large":
            changes |= {"decoder_dim": 512, "decoder_depth": 12, "decoder_heads": 8}
    if arguments.size == "nano":
        changes |= {"input_size": "28", "patch_size": 4, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
        changes |= {"input_size": "32", "patch_size": 8, "num_frames": 4} if arguments.video else {}
    if arguments.size == "huge":
        changes |= {"patch_size": 14}
    return dataclasses.replace(
        base,
        model=name,
        batch_size=arguments.batch_size,
        global_batch_size=0,
        clip_grad=5.0,
        deepspeed_config=deepspeed_config or arguments.deepspeed_config,
        **changes,
    ).resolve(10**6, 1)


def pixels(recipe: Recipe, device: torch.device) -> Tensor:
    """Fixed random images, uint8 [B, H, W, C], or clips [B, T, H, W, C]."""
    shape = (recipe.batch_size, *recipe.sample_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)


def build(variant: str, recipe: Recipe, launch: ranks.Launch, precision: str) -> Built:
    """The variant, ready to be timed."""
    images = pixels(recipe, launch.device)
    if variant in EAGER:
        floats = images.movedim(-1, 1).float().div_(127.5).sub_(1).contiguous()
        student = model_of(recipe)
        update, _ = eager_update(student, recipe, floats, alpha=ALPHA, half=precision == "bf16")
        return Built(update, {}, *work_of(student, recipe))
    step = Step(model_of(recipe), recipe, INFO)
    config = ranks.merge_config(recipe.deepspeed_config, recipe, 1)
    deepspeed_engine = ranks.build_engine(step, recipe, config, launch)
    teacher, refresh = None, None
    maps = torch.rand(recipe.batch_size, recipe.num_patches).to(launch.device) if recipe.teacher_maps else None
    if recipe.uses_teacher:
        teacher = EMATeacher(deepspeed_engine, step.student, "student.", model_of(recipe), 0.999, HEAD)
        step.attach_teacher(teacher.module)
    if recipe.teacher_maps:
        refresh = functools.partial(teacher_pass, step, images)
    ids = torch.arange(recipe.batch_size, device=launch.device)
    micro_step = graph.micro_step(recipe.cuda_graph, deepspeed_engine, step.stopwatch)

    def update_ours(number: int) -> None:
        ranks.set_lr(deepspeed_engine, schedule.lr_at(recipe, number))
        alpha = torch.full((), ALPHA, dtype=torch.float64, device=launch.device)
        micro_step(images, ids, torch.full((), number, device=launch.device), alpha, maps)

    loop = functools.partial(loop_share, recipe, launch, deepspeed_engine, step, teacher, images)
    kernels = attention.settle(recipe, launch.device, next(step.student.parameters()).dtype)
    return Built(update_ours, kernels, *work_of(step.student, recipe), refresh, loop)


@torch.no_grad()
def teacher_pass(step: Step, images: Tensor, number: int) -> None:
    """The forward that makes one batch's maps."""
    step.difficulty(images)


def work_of(student: Any, recipe: Recipe) -> tuple[dict[str, float], dict[str, float]]:
    """GFLOP and MB of memory traffic per sample of a step; of a teacher whose maps are kept, its share."""
    counted = (flops.step_flops(student, recipe), 1e9), (traffic.step_bytes(student, recipe), 1e6)
    gflops, megabytes = ({name: value / unit for name, value in found.items()} for found, unit in counted)
    return gflops, megabytes


def measure(
    updates: dict[str, Update], rounds: int, repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and seconds of processor time, per update of each variant in each round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in updates}
    number = 0
    for round_number in range(rounds + 1):
        for name, update in updates.items():
            wait_for(device)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                update(number)
                number += 1
            wait_for(device)
            if round_number:
                seconds[name].append((time.perf_counter() - begin) / repeats)
                cpu_seconds[name].append((time.process_time() - begin_cpu) / repeats)
    return seconds, cpu_seconds


def ratios_of(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Spreads of all `RATIOS` whose steps were timed."""
    return {name: ratios(seconds[a], seconds[b]) for name, a, b in RATIOS if a in seconds and b in seconds}


def one_precision(precision: str, arguments: argparse.Namespace, launch: ranks.Launch) -> dict[str, Any]:
    """All variants at one precision."""
    built: dict[str, Built] = {}
    for variant in arguments.variants:
        say(f"{precision}: building {variant}")
        changes = {"compile": arguments.compile, **arguments.fields}
        recipe = dataclasses.replace(recipe_of(variant, arguments, CONFIGS[precision]), **changes)
        built[variant] = build(variant, recipe, launch, precision)
    repeats = arguments.repeats or (10 if launch.device.type == "cuda" else 1)
    updates = {name: one.update for name, one in built.items()}
    updates |= {f"{name}{REFRESH}": one.refresh for name, one in built.items() if one.refresh}
    seconds, cpu_seconds = measure(updates, arguments.rounds, repeats, launch.device)
    result: dict[str, Any] = {"raw_seconds": {name: list(values) for name, values in seconds.items()}}
    result["raw_cpu_seconds"] = {name: list(values) for name, values in cpu_seconds.items()}
    for times in (seconds, cpu_seconds):
        for name in [name for name in built if f"{name}{REFRESH}" in times]:
            share = [value / recipes.FAST_REFRESH_EPOCHS for value in times.pop(f"{name}{REFRESH}")]
            times[name] = [step + part for step, part in zip(times[name], share, strict=True)]
    exact = built.get("hpm")
    loop = exact.loop(2 * repeats) if exact and exact.loop and arguments.loop else None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = measure_matmul_rate(launch.device, dtype)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    work = {name: built[name].gflops for name in seconds}
    return result | {
        "seconds": seconds,
        "median_seconds": median,
        "images_per_second": {name: arguments.batch_size / value for name, value in median.items()},
        "cpu_seconds": cpu_seconds,
        "cpu_ratios": ratios_of(cpu_seconds),
        "ratios": ratios_of(seconds),
        "gflops_per_sample": work,
        "traffic_mb_per_sample": {name: built[name].traffic_mb for name in seconds},
        "flop_ratios": {
            name: work[a]["total"] / work[b]["total"]
            for name, a, b in RATIOS
            if a in seconds and b in seconds and not a.startswith("eager")
        },
        "matmul_gflops_per_second": rate / 1e9,
        "mfu": {name: work[name]["total"] * 1e9 * arguments.batch_size / median[name] / rate for name in seconds},
        "loop": loop,
        "memory_gib": memory_gib(launch.device),
        "attention": {name: one.attention for name, one in built.items() if one.attention},
    }


def summary(arguments: argparse.Namespace, launch: ranks.Launch) -> dict[str, Any]:
    """Everything a reader needs to judge the ratios."""
    (precision,) = arguments.precision
    found = {precision: one_precision(precision, arguments, launch)}
    return {
        "bench": "step",
        "size": arguments.size,
        "frames": recipe_of("mae", arguments, CONFIGS[precision]).num_frames,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "compile": arguments.compile,
        "refresh_epochs": recipes.FAST_REFRESH_EPOCHS,
        "precisions": found,
        "versions": versions(launch.device, launch.world_size),
    }


def each_by_itself(argv: Sequence[str], precisions: Sequence[str]) -> dict[str, Any]:
    """One process per precision: DeepSpeed's engines do not give their memory back."""
    results = []
    with tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as folder:
        for precision in precisions:
            path = Path(folder) / f"{precision}.json"
            own = [*argv, "--precision", precision, "-o", str(path)]
            done = subprocess.run([sys.executable, "-m", "bench.step", *own], stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                raise UserError(f"{precision}: bench.step ended with status {done.returncode}; its message is above")
            results.append(json.loads(path.read_text()))
    return {**results[0], "precisions": {key: value for one in results for key, value in one["precisions"].items()}}


def report(result: dict[str, Any]) -> str:
    """Markdown: times, then ratios beside the arithmetic."""
    lines = []
    for precision, found in result["precisions"].items():
        rows = [
            [
                name,
                f"{value:.3f}",
                f"{found['images_per_second'][name]:.2f}",
                f"{found['gflops_per_sample'][name]['total']:.1f}",
                f"{found['traffic_mb_per_sample'][name]['total']:.0f}" if "traffic_mb_per_sample" in found else "",
                f"{found['mfu'][name]:.0%}",
            ]
            for name, value in found["median_seconds"].items()
        ]
        lines += [f"{precision}:", "", table(("step", "s", "images/s", "GFLOP per image", "MB", "MFU"), rows), ""]
        work = found["flop_ratios"]
        rows = [
            [name, show(value), show(found["cpu_ratios"][name]), f"{work[name]:.2f}" if name in work else ""]
            for name, value in found["ratios"].items()
        ]
        header = ("ratio", "of time, median (range)", "of processor time", "of FLOPs")
        lines += [table(header, rows), ""]
        if found.get("loop"):
            lines += [
                f"Outside the engine's calls: {found['loop']['outside_share']:.2%} of the training loop's time, "
                "metrics read in every update.",
                "",
            ]
    return "\n".join(lines)


def chosen(variants: Sequence[str] | None, video: bool) -> list[str]:
    """The variants to time, each once. **Raises:** `UserError` for clips with kept maps alone."""
    wrong = {name for name, one in METHODS.items() if one.maps and not one.cross} if video else set()
    if asked := wrong.intersection(variants or ()):
        raise UserError(
            f"variants {' '.join(sorted(asked))} keep maps, which are of images; leave them out, or leave out --video"
        )
    return [name for name in dict.fromkeys(variants or USUAL) if name not in wrong]


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.step`."""
    parser = Parser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    parser.add_argument("--video", action="store_true", help="clips of 16 frames, against VideoMAE; not --size huge")
    parser.add_argument("--batch_size", type=int, default=8, help="images or clips per step")
    parser.add_argument("--precision", nargs="+", choices=tuple(CONFIGS), default=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=None, help=f"default: {' '.join(USUAL)}")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--repeats", type=int, default=0, help="updates per round and variant (0: 1 on CPU, 10 on GPU)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on the CPU (0: all cores)")
    parser.add_argument("--compile", action="store_true", help="compile our steps with torch.compile")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    parser.set_defaults(loop=True, fields={})  # bench.gpu has others
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or arguments.rounds < 1:
        raise UserError("batch_size and rounds must be 1 or more")
    if arguments.video and arguments.size == "huge":
        raise UserError("size is huge, but there is no recipe of clips with it; use --size base or large")
    arguments.variants = chosen(arguments.variants, arguments.video)
    if len(arguments.precision) > 1:
        result = each_by_itself(sys.argv[1:] if argv is None else argv, arguments.precision)
    else:
        with ranks.session() as launch:
            if arguments.threads:
                torch.set_num_threads(arguments.threads)
            result = summary(arguments, launch)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
