"""Peak memory of a video step on the CPU, with and without `activation_checkpointing`.

    python -m bench.video_memory [--recipe hpm_video_vit_base_k400_800e] [--batch_size 2] [-o memory.json]

One micro-step as training has it: teacher, mask, student, losses, backward. What is told is the highest resident memory
during it less the memory before, when weights, teacher and gradients are there already: activations, gradients of
activations and buffers, which grow with the batch. No optimizer, no DeepSpeed. One process each, so that none finds
memory that another left behind.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import json_file, machine, say, table, write_json
from bench.step import INFO
from fasthpm import recipes
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.step import Step

ALPHA = 0.25


def resident(name: str) -> float:
    """VmRSS (now) or VmHWM (the highest so far) of this process in GiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**20


def micro_step(step: Step, clips: torch.Tensor) -> None:
    """Forward and backward; gradients are added to those that are there."""
    ids = torch.arange(len(clips))
    output = step(clips, ids, torch.zeros((), dtype=torch.int64), torch.tensor(ALPHA, dtype=torch.float64))
    output.loss.backward()


def measure(recipe: Recipe) -> dict[str, float]:
    """{"seconds", "gib", "gib_before"} of one micro-step of this recipe's batch."""
    step = Step(model_of(recipe), recipe, INFO)
    if recipe.uses_teacher:
        step.attach_teacher(model_of(recipe).eval().requires_grad_(False))
    shape = (recipe.batch_size, recipe.num_frames, *recipe.image_size, recipe.channels)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    micro_step(step, clips[:1])  # makes the gradients
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    before, begin = resident("VmRSS"), time.perf_counter()
    micro_step(step, clips)
    seconds = time.perf_counter() - begin
    highest = max(resident("VmHWM"), before)  # the kernel counts pages in batches: a small step may seem to free some
    return {"seconds": seconds, "gib": highest - before, "gib_before": before}


def in_a_process(arguments: argparse.Namespace, again: bool) -> dict[str, float]:
    """`measure` in a process whose large blocks all go back to the system when they are freed."""
    command = [
        sys.executable,
        "-m",
        "bench.video_memory",
        "--recipe",
        arguments.recipe,
        "--batch_size",
        str(arguments.batch_size),
        "--threads",
        str(arguments.threads),
        "--only",
        str(int(again)),
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"bench.video_memory ended with status {done.returncode}; its message is above")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.video_memory`."""
    parser = Parser(prog="python -m bench.video_memory", description=__doc__)
    parser.add_argument("--recipe", default="hpm_video_vit_base_k400_800e")
    parser.add_argument("--batch_size", type=int, default=2, help="clips")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--only", type=int, choices=(0, 1), default=None, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    if min(arguments.batch_size, arguments.rounds, arguments.threads) < 1:
        raise UserError("batch_size, rounds and threads must be 1 or more")
    recipe = dataclasses.replace(recipes.from_name(arguments.recipe), batch_size=arguments.batch_size)
    if arguments.only is not None:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(dataclasses.replace(recipe, activation_checkpointing=bool(arguments.only)))))
        return
    raw: dict[str, list[dict[str, float]]] = {"kept": [], "checkpointed": []}
    for number in range(arguments.rounds):
        for name, again in (("kept", False), ("checkpointed", True)):
            say(f"round {number + 1}: {name}")
            raw[name].append(in_a_process(arguments, again))
    write_json(arguments.output, summary(arguments, raw))
    rows = [
        [name, *(" ".join(f"{one[key]:.2f}" for one in found) for key in ("gib", "seconds"))]
        for name, found in raw.items()
    ]
    print(table(("activations", "GiB above weights and gradients", "s"), rows))


def summary(arguments: argparse.Namespace, raw: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The figures and what they were taken on."""
    return {
        "bench": "video_memory",
        "recipe": arguments.recipe,
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
        "precision": "fp32",
        "raw": raw,
        "machine": machine(),
    }


if __name__ == "__main__":
    run_command(main)
