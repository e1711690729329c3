"""What a training run would wait for: the first batch after its start, and batches at a GPU's pace."""

import math
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.common import spread
from bench.variants import Spec, our_loader
from fasthpm import recipes
from fasthpm.data import Loader, read_info
from fasthpm.data.base import AHEAD
from fasthpm.data.sampling import random_crops, sample_order

RECIPE = "hpm_vit_base_in1k_200e"
FILLED = AHEAD + 1  # batches of an epoch that are not counted: the look-ahead fills while they are taken
LONG_EPOCH = 24  # batches, at least, of an epoch at a GPU's pace
EPOCH_SAMPLES = 1_281_167  # ImageNet's, for the cost of an epoch's order

FIRST_BATCH = """
import sys, time
from bench.variants import Spec, {loader}
begin = time.time()
batch = next(iter({loader}(Spec({spec}))))
print("first", begin, time.time())
"""


# -------------------------------------------------------------------------------------------------- at the start
def first_batches(spec: Spec, starts: int, *, theirs: bool = True) -> dict[str, Any]:
    """Seconds to the first batch in fresh processes; FFCV's and ours have compiled on this machine before.

    Of our loader and, with `theirs`, of FFCV's, which compiles anew in each process.
    """
    found = {}
    for name, loader in (("ours", "our_loader"), ("FFCV's own loader", "ffcv_loader"))[: 2 if theirs else 1]:
        code = FIRST_BATCH.format(loader=loader, spec=", ".join(map(repr, vars(spec).values())))
        taken = [_time_start(code) for _ in range(starts)]
        found[f"{spec.name.partition(',')[0]}, {name}"] = {
            "from_start": spread([start for start, _ in taken]),
            "from_build": spread([build for _, build in taken]),
        }
    return found


def _time_start(code: str) -> tuple[float, float]:
    """(seconds from the interpreter's start, from the loader's making) to the first batch."""
    begin = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    if done.returncode or words[:1] != ["first"]:
        raise RuntimeError(f"a fresh process failed with status {done.returncode}:\n{done.stderr}")
    build, end = float(words[1]), float(words[2])
    return end - begin, end - build


def seeding_microseconds(batch_size: int) -> float:
    """Order, crops and boxes of one image, without any pixel: microseconds."""
    sizes = np.tile(np.array([375, 500]), (batch_size, 1))
    begin = time.thread_time()
    order = sample_order(0, 0, EPOCH_SAMPLES)
    per_epoch = (time.thread_time() - begin) / EPOCH_SAMPLES
    batches = 200
    begin = time.thread_time()
    for batch in range(batches):
        random_crops(0, 0, order[batch * batch_size : (batch + 1) * batch_size], sizes, 0.2, True)
    return 1e6 * (per_epoch + (time.thread_time() - begin) / batches / batch_size)


# -------------------------------------------------------------------------------------------------- at a GPU's pace
def gflops_per_image() -> float:
    """Of a whole step of `RECIPE`."""
    from fasthpm.patches import model_of
    from fasthpm.speed.flops import step_flops

    recipe = recipes.from_name(RECIPE)
    with torch.device("meta"):
        return step_flops(model_of(recipe), recipe)["total"] / 1e9


def data_waits(
    specs: Iterable[Spec], per_core: dict[str, float], flops_per_second: float, seconds: float, batch_size: int
) -> dict[str, Any]:
    """How many cores each loader needs for a GPU of `flops_per_second`, and the share of time waited with so many.

    With C cores needed and c here, a step lasts C / c times the GPU's: the same load on
    each core. The GPU's host would also spend most of a core on launching kernels; that core is not counted.
    """
    gflops = gflops_per_image()
    wanted = flops_per_second / (gflops * 1e9)
    loaders = {}
    for spec in specs:
        cores = math.ceil(wanted / per_core[spec.name])
        step = batch_size / wanted * cores / spec.workers
        loader = our_loader(_long(spec, batch_size))
        loaders[spec.name] = {
            "cores": cores,
            "load": wanted / (cores * per_core[spec.name]),
            "step_seconds": step,
            "wait_percent": 100 * wait_share(loader, step, seconds),
        }
        loader.close()
    return {
        "recipe": RECIPE,
        "batch_size": batch_size,
        "gflops_per_image": gflops,
        "flops_per_second": flops_per_second,
        "images_per_second": wanted,
        "loaders": loaders,
    }


def _long(spec: Spec, batch_size: int) -> Spec:
    """The same set as often as makes an epoch long, in batches of `batch_size`."""
    repeats = math.ceil(LONG_EPOCH * batch_size / read_info(spec.data).num_samples)
    return replace(spec, data=",".join([spec.data] * repeats), batch_size=batch_size)


def wait_share(loader: Loader, step_seconds: float, seconds: float) -> float:
    """Share of the time that a consumer waits which sleeps `step_seconds` per batch, for about `seconds`.

    Whole epochs; the first batches of each, while the look-ahead fills, are not counted.
    """
    waited = total = 0.0
    while total < seconds:
        for number, wait in enumerate(_waits(loader, step_seconds)):
            if number >= min(FILLED, len(loader) - 1):
                waited, total = waited + wait, total + wait + step_seconds
    return waited / total


def _waits(loader: Loader, step_seconds: float) -> Iterable[float]:
    """Seconds waited for each batch of an epoch, sleeping in between."""
    batches = iter(loader)
    for _ in range(len(loader)):
        begin = time.perf_counter()
        next(batches)
        yield time.perf_counter() - begin
        time.sleep(step_seconds)
