"""Loading images for training: this project's loaders, torchvision's with MAE's transforms, FFCV's own, interleaved.

    python -m bench.photos photos                                    # once: 2000 photographs of ImageNet's size
    python -m bench.loader photos [--rounds 5] [--images 2000] [-o bench/results/loader.json]

Random resized crops at 224, flipped, everything else as each loader does it. Every loader runs in its own process, with
as many threads or workers as there are cores; they take turns, an epoch at a time, and a ratio is the median of the
rounds' ratios. "CPU ms" is processor time per image, workers included: on a busy machine trust it more than images per
second. Files are in the page cache. The last tables say what that means for training: how soon a first batch comes, how
many cores one GPU needs, and how long it waits for data with them. That wait is emulated: the step only sleeps, for as
long as a GPU's would take times needed / present cores.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import (
    SETS,
    choose_photos,
    files_in,
    json_file,
    machine,
    parse_quickly,
    prepared,
    ratios,
    say,
    show,
    spread,
    table,
    work_folder,
    write_json,
)
from bench.pixels import compare_pixels
from bench.variants import Spec, Taken, Variant, started
from bench.waiting import RECIPE, data_waits, first_batches, seeding_microseconds
from fasthpm import recipes
from fasthpm.cli import Parser, run_command
from fasthpm.data.options import count_workers
from fasthpm.errors import UserError

BASELINE = "torchvision, MAE's transforms"
SLOW_SHARE = 8  # loaders that decode or draw in plain numpy get this part of the images
FFCV_TWINS = ("500-reencoded", "256")  # sets on which FFCV's own loader runs too
PIXEL_IMAGES = 64
QUICK_IMAGES, QUICK_ROUNDS = 48, 2
INTERPOLATIONS = ("area", "bicubic")


def specs(photos: Path, few: Path, sets: dict[str, str], arguments: argparse.Namespace) -> list[Spec]:
    """All that is compared, the baseline first."""

    def spec(name: str, kind: str, data: str | Path, **more: Any) -> Spec:
        return Spec(name, kind, str(data), arguments.workers, arguments.batch_size, **more)

    choices = [(name, path, how) for name, path in sets.items() for how in INTERPOLATIONS]
    mine = [spec(f"{name}, {how}", "ours", path, interpolation=how) for name, path, how in choices]
    quick = [
        spec(BASELINE, "torchvision_mae", photos),
        *mine,
        *(spec(f"{name}, FFCV's own loader", "ffcv_own", sets[name]) for name in FFCV_TWINS if name in sets),
    ]
    if arguments.quick:
        return [one for one in quick if one.interpolation == INTERPOLATIONS[0]]
    return [
        *quick,
        spec("torchvision, uint8, not normalised", "torchvision_uint8", photos),
        spec("plain (PIL, numpy)", "ours", few),
        spec("synthetic", "ours", f"synthetic:{len(files_in(few))}"),
    ]


def measure(variants: list[Variant], rounds: int) -> dict[str, list[Taken]]:
    """All variants in turn, `rounds` times, beginning with another one each time; a first round is not counted."""
    taken: dict[str, list[Taken]] = {variant.spec.name: [] for variant in variants}
    for number in range(rounds + 1):
        first = number % len(variants)
        for variant in variants[first:] + variants[:first]:
            one = variant.measure(number)
            if number:
                taken[variant.spec.name].append(one)
        say(f"round {number} of {rounds}{'' if number else ' (warm-up, not counted)'}")
    return taken


def summarise(
    taken: dict[str, list[Taken]], workers: int, baseline: str = BASELINE, sample: str = "image"
) -> dict[str, Any]:
    """Rates, processor time and ratios to the baseline of each variant; `sample`: what one is called."""
    rate = {name: [one.images / one.seconds / workers for one in ones] for name, ones in taken.items()}
    cpu = {name: [1e3 * one.cpu_seconds / one.images for one in ones] for name, ones in taken.items()}
    return {
        name: {
            f"{sample}s_per_second_per_core": spread(rate[name]),
            f"cpu_ms_per_{sample}": spread(cpu[name]),
            "wall_ratio": ratios(rate[name], rate[baseline]),
            "cpu_ratio": ratios(cpu[baseline], cpu[name]),
            "rounds": [vars(one) for one in taken[name]],
        }
        for name in taken
    }


def seeding_cost(taken: dict[str, list[Taken]]) -> dict[str, Any]:
    """Processor time of our loader (area) over FFCV's own, the same file and size, round by round."""

    def cpu(name: str) -> list[float]:
        return [one.cpu_seconds / one.images for one in taken[name]]

    pairs = {name: (f"{name}, area", f"{name}, FFCV's own loader") for name in FFCV_TWINS}
    return {name: ratios(cpu(a), cpu(b)) for name, (a, b) in pairs.items() if a in taken and b in taken}


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    photos = choose_photos(arguments.photos, work, arguments.images)
    total = len(files_in(photos))
    few = choose_photos(photos, work, max(total // SLOW_SHARE, 2 * arguments.batch_size))
    sets = {name: str(prepared(photos, work, name, arguments.workers)) for name in arguments.sets}
    raw = None if arguments.quick else prepared(few, work, "raw256", arguments.workers)
    compared = specs(photos, few, sets, arguments)
    with started(compared) as variants:
        taken = measure(variants, arguments.rounds)
    rates = summarise(taken, arguments.workers)
    per_core = {name: row["images_per_second_per_core"]["median"] for name, row in rates.items()}
    waited = [spec for spec in compared if spec.kind == "ours" and spec.data in sets.values()]
    say("first batches, waits, pixels")
    return {
        "bench": "loader",
        "machine": machine(),
        "images": total,
        "workers": arguments.workers,
        "batch_size": arguments.batch_size,
        "rates": rates,
        "ours_over_ffcv_cpu": seeding_cost(taken),
        "seeding_us_per_image": seeding_microseconds(arguments.batch_size),
        "first_batch": first_batches(waited[0], arguments.starts, theirs=not arguments.quick),
        "data_wait": data_waits(
            waited,
            per_core,
            arguments.gpu_tflops * 1e12 * arguments.mfu,
            arguments.wait_seconds,
            arguments.batch_size if arguments.quick else recipes.from_name(RECIPE).batch_size,
        ),
        "pixels": compare_pixels(raw, min(PIXEL_IMAGES, len(files_in(few)))) if raw else {},
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [
            name,
            show(row["images_per_second_per_core"], 0),
            show(row["wall_ratio"]),
            show(row["cpu_ms_per_image"]),
            show(row["cpu_ratio"]),
        ]
        for name, row in result["rates"].items()
    ]
    machine = result["machine"]
    parts = [
        f"{machine['device']}, {machine['cores']} cores, {result['workers']} workers, {result['images']} photographs, "
        f"batch {result['batch_size']}, median (lowest to highest round); commit {machine['commit'][:10]}",
        table(("loader", "images/s per core", "x baseline", "CPU ms per image", "x baseline, by CPU"), rows),
        "Our loader's processor time over FFCV's own (same file, area): "
        + (", ".join(f"{name}: {show(ratio)}" for name, ratio in result["ours_over_ffcv_cpu"].items()) or "not taken")
        + f". Order, crops and boxes alone: {result['seeding_us_per_image']:.1f} us per image.",
        table(
            ("first batch, warm caches", "seconds from the process's start", "from build_loader"),
            [[name, show(row["from_start"]), show(row["from_build"])] for name, row in result["first_batch"].items()],
        ),
        wait_report(result["data_wait"]),
        table(
            ("pixels of the same crops, 0..255", "mean absolute difference", "largest"),
            [[name, f"{row['mean']:.2f}", str(row["max"])] for name, row in result["pixels"].items()],
        ),
    ]
    return "\n\n".join(parts)


def wait_report(waits: dict[str, Any]) -> str:
    """What one GPU asks of the loader, and whether it gets it."""
    head = (
        f"A GPU that does {waits['flops_per_second'] / 1e12:.0f} TFLOP/s of useful work takes "
        f"{waits['images_per_second']:.0f} images/s in a ViT-B HPM step ({waits['gflops_per_image']:.1f} GFLOP/image):"
    )
    rows = [
        [name, str(row["cores"]), f"{row['load']:.0%}", f"{row['wait_percent']:.1f} %"]
        for name, row in waits["loaders"].items()
    ]
    return f"{head}\n\n" + table(("loader", "cores per GPU", "their load", "data wait with them, emulated"), rows)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m bench.loader", description=__doc__)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of class folders, e.g. from bench.photos")
    parser.add_argument("--images", type=int, default=0, help="photographs of an epoch; 0 = all (default)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--workers", type=int, default=0, help="threads or workers of each loader; 0 = all cores")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (default 64)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="prepared sets to measure")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes for the first batch (default 3)")
    parser.add_argument(
        "--gpu_tflops", type=float, default=790, help="the GPU's matmul rate (790: bf16, H200, measured)"
    )
    parser.add_argument("--mfu", type=float, default=0.5, help="share of it that a step reaches (default 0.5)")
    parser.add_argument("--wait_seconds", type=float, default=10, help="length of each data-wait measurement")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps the prepared sets; none = temporary")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs: its figures mean nothing")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.loader`."""
    few = {"images": QUICK_IMAGES, "rounds": QUICK_ROUNDS, "batch_size": 8}
    arguments = parse_quickly(build_parser(), argv, **few, sets=["256"], starts=1, wait_seconds=0.5)
    for name in ("rounds", "batch_size", "starts", "gpu_tflops", "mfu", "wait_seconds"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected more than 0")
    arguments.workers = count_workers(arguments.workers)
    with work_folder(arguments.work) as work:
        result = bench(arguments, work)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
