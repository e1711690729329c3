"""What the online probe adds to the step: one probing update beside one exact HPM update, in turns, one process.

    python -m bench.online_probe [--size base --batch_size 16 --rounds 5] [-o bench/results/online_probe.json]

The probe works in one of --online_probe_every updates, on up to 64 images of the batch; the cost per update is its time
over that number. The least number that keeps it under 3 % of the step is printed. k-NN tests are not measured: they
cost one encoding of 2,560 images per --online_knn_every epochs.
"""

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.common import json_file, machine, table, write_json
from fasthpm import pretrain, ranks, recipes
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe
from fasthpm.run.metrics import wait_for
from fasthpm.run.versions import versions

RECIPES = {"nano": "hpm_demo", "base": "hpm_vit_base_in1k_200e", "large": "hpm_vit_large_in1k_200e"}
EVERY = (10, 20, 50, 100)
BOUND = 0.03  # of the step


def measure(recipe: Recipe, launch: ranks.Launch, rounds: int) -> dict[str, Any]:
    """Seconds of every round's update and probing step, and what follows from their medians."""
    run = pretrain.build(recipe, launch)
    (online,) = run.observers
    batch = next(run.batches)
    alpha = torch.full((), 0.25, dtype=torch.float64, device=launch.device)
    number = torch.full((), 0, device=launch.device)

    def update() -> None:
        output = run.engine(batch.images, batch.ids, number, alpha, None)
        run.engine.backward(output.loss)
        run.engine.step()

    parts: dict[str, Callable[[], None]] = {"update": update, "probe": lambda: online.after_update(1, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            begin = time.perf_counter()
            part()
            wait_for(launch.device)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    run.loader.close()
    return {"seconds": seconds} | figures(seconds)


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The probing step over the update, its share at `EVERY`, and the least number for `BOUND`."""
    ratios = [probe / update for probe, update in zip(seconds["probe"], seconds["update"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "ratio": ratio,
        "range": [min(ratios), max(ratios)],
        "share": {every: ratio / every for every in EVERY},
        "least_every": math.ceil(ratio / BOUND),
    }


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    low, high = result["range"]
    rows = [[str(every), f"{share:.1%}"] for every, share in result["share"].items()]
    return "\n".join(
        [
            f"{result['size']}, batch {result['batch_size']}: one probing step costs {result['ratio']:.2f} "
            f"({low:.2f} to {high:.2f}) of an update.",
            "",
            table(("online_probe_every", "of the step"), rows),
            "",
            f"Under {BOUND:.0%} from --online_probe_every {result['least_every']} on.",
        ]
    )


def recipe_of(arguments: argparse.Namespace, folder: str) -> Recipe:
    """The published recipe with a probe after every update, on synthetic images."""
    recipe = recipes.from_name(RECIPES[arguments.size])
    return dataclasses.replace(
        recipe,
        data_path=f"synthetic:{4 * arguments.batch_size}",
        output_dir=folder,
        batch_size=arguments.batch_size,
        global_batch_size=arguments.batch_size,
        online_probe_every=1,
        num_workers=1,
        steps_per_epoch=0,
        deepspeed_config=arguments.deepspeed_config,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.online_probe`."""
    parser = Parser(prog="python -m bench.online_probe", description=__doc__)
    parser.add_argument("--size", choices=tuple(RECIPES), default="base")
    parser.add_argument("--batch_size", type=int, default=16, help="images per update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deepspeed_config", default="zero1_bf16")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or arguments.rounds < 1:
        raise UserError("batch_size and rounds must be 1 or more")
    with ranks.session() as launch, tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as folder:
        found = measure(recipe_of(arguments, folder), launch, arguments.rounds)
        result = {
            "bench": "online_probe",
            "size": arguments.size,
            "batch_size": arguments.batch_size,
            "rounds": arguments.rounds,
            "machine": machine(),
            "versions": versions(launch.device, 1),
            **found,
        }
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
