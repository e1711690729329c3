"""How fast this machine decodes, copies to the device, and trains: each alone, for a few seconds.

`fasthpm doctor` runs it in a process of its own, so that a crash or a lack of memory is a finding like any other:

    python -m fasthpm.commands.throughput '{"recipe": {...}, "seconds": 10, "parts": ["decode", "copy", "step"]}'

One JSON line per part, as soon as it is known: {"part", "images_per_second", …} or {"part", "error"}.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fasthpm import ranks
from fasthpm.commands import attention
from fasthpm.data import DatasetInfo, Loader, build_loader, read_info
from fasthpm.data.base import AHEAD
from fasthpm.data.options import count_workers
from fasthpm.frozen import build_frozen
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.run.metrics import wait_for
from fasthpm.run.state import endless
from fasthpm.speed import graph
from fasthpm.teacher import EMATeacher
from fasthpm.views import inputs_of, step_of

DECODE_BATCH = 64  # images; a larger batch decodes no faster, but the last one could take long
CPU_BATCH = 4  # images of a step on a CPU, where a full batch would take minutes
FILLED = AHEAD + 1  # batches that may be decoded before anybody asks


# ------------------------------------------------------------------------------------------------------ decode
def measure_decode(recipe: Recipe, seconds: float) -> dict[str, float]:
    """The recipe's crops from its data set, with all its threads: {"images_per_second", "workers"}."""
    samples = read_info(recipe.data_path).num_samples
    options = recipe.loader_options(batch_size=min(recipe.batch_size, samples, DECODE_BATCH))
    loader = build_loader(recipe.data_path, options)
    try:
        rate = decode_rate(loader, seconds)
    finally:
        loader.close()
    return {"images_per_second": rate, "workers": count_workers(recipe.num_workers)}


def decode_rate(loader: Loader, seconds: float) -> float:
    """Images per second that come out, from the moment when the look-ahead has been used up."""
    end = time.perf_counter() + seconds
    batches, taken, begin = endless(loader), 0, 0.0
    for number, _ in enumerate(batches):
        now = time.perf_counter()
        if number == FILLED:
            begin = now
        elif number > FILLED:
            taken += loader.batch_size
        if number > FILLED and now > end:
            return taken / (now - begin)
    raise AssertionError("an endless loader ended")


# ------------------------------------------------------------------------------------------------------ copy
def measure_copy(recipe: Recipe, seconds: float) -> dict[str, float]:
    """Batches of uint8 from pinned memory to the GPU: {"images_per_second"}; nothing to copy on a CPU: {}."""
    if not torch.cuda.is_available():
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    images, _, local = inputs_of(recipe, lambda shape: torch.empty(shape, dtype=torch.uint8, pin_memory=True))
    crops = (images, *local)
    rate = repeat(lambda: [part.to(device, non_blocking=True) for part in crops], min(seconds, 2.0), device)
    return {"images_per_second": rate * recipe.batch_size}


# ------------------------------------------------------------------------------------------------------ step
def measure_step(recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Whole updates on random images: {"images_per_second", "batch_size"; on a GPU "memory_gib" and "attention"}.

    Where the recipe's batch does not fit into the GPU's memory, half of it is tried, and so on.
    """
    with ranks.session() as launch:
        if launch.device.type == "cpu":
            recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, CPU_BATCH))
        while True:
            try:
                return step_rate(recipe, launch, seconds)
            except torch.cuda.OutOfMemoryError:
                if recipe.batch_size == 1:
                    raise
            torch.cuda.empty_cache()
            recipe = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2)


def step_rate(recipe: Recipe, launch: ranks.Launch, seconds: float) -> dict[str, Any]:
    """The same at a batch size that is taken to fit."""
    recipe = dataclasses.replace(recipe, global_batch_size=0, accum_iter=1, steps_per_epoch=0)
    recipe = recipe.resolve(10**6, 1)
    update, kernels = build_update(recipe, launch)
    for _ in range(graph.WARM_UP if launch.device.type == "cuda" else 0):
        update()
    rate = repeat(update, seconds, launch.device)
    result: dict[str, Any] = {"images_per_second": rate * recipe.batch_size, "batch_size": recipe.batch_size}
    if launch.device.type == "cuda":
        result["attention"] = ", ".join(sorted(set(kernels.values())))
        result["memory_gib"] = torch.cuda.max_memory_allocated(launch.device) / 2**30
    return result


def build_update(recipe: Recipe, launch: ranks.Launch) -> tuple[Callable[[], object], dict[str, str]]:
    """A function that makes one update of a resolved recipe on fixed random images, and its kernels of attention."""
    info = DatasetInfo(1, recipe.channels, (0.5,) * recipe.channels, (0.25,) * recipe.channels, ("any",))
    step = step_of(model_of(recipe), recipe, info)
    config = ranks.merge_config(recipe.deepspeed_config, recipe, 1)
    with graph.recordable(launch.device):
        built = ranks.build_engine(step, recipe, config, launch)
    if frozen := build_frozen(recipe, launch.device):
        step.attach_frozen(frozen)
    if recipe.uses_teacher:
        step.attach_teacher(EMATeacher(built, step.student, "student.", model_of(recipe), 0.999).module)
    images, ids, local = inputs_of(
        recipe, lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8, device=launch.device)
    )
    ids = ids.to(launch.device)
    update = torch.zeros((), dtype=torch.int64, device=launch.device)
    alpha = torch.full((), 0.25, dtype=torch.float64, device=launch.device)

    micro_step = graph.micro_step(recipe.cuda_graph, built, step.stopwatch)
    kernels = attention.settle(recipe, launch.device, next(step.student.parameters()).dtype)
    return lambda: micro_step(images, ids, update, alpha, None, *local), kernels


def repeat(action: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Runs of `action` per second, over about `seconds`, after one that is not counted."""
    action()
    wait_for(device)
    begin, done = time.perf_counter(), 0
    while True:
        action()
        done += 1
        wait_for(device)
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return done / elapsed


# ------------------------------------------------------------------------------------------------------ process
PARTS: dict[str, Callable[[Recipe, float], dict[str, Any]]] = {
    "decode": measure_decode,
    "copy": measure_copy,
    "step": measure_step,
}


def main() -> None:
    """Measure what the argument asks for, one line each."""
    asked = json.loads(sys.argv[1])
    recipe = Recipe(**asked["recipe"])
    for part in asked["parts"]:
        try:
            with ranks.hush():
                result: dict[str, Any] = PARTS[part](recipe, asked["seconds"])
        except Exception as error:  # whatever it is, the other parts are still worth knowing
            lines = str(error).strip().splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {lines[0]}"}
        print(json.dumps({"part": part, **result}), flush=True)


if __name__ == "__main__":
    main()
