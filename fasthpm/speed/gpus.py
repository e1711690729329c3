"""GPUs that a run may be planned for: what their makers publish, and how much of it a step reaches."""

import itertools
import math
import re
from dataclasses import dataclass, replace

import torch

from fasthpm.speed.memory import CONTEXT

# Shares of the published figures: large bf16 products reach 0.8 of them on a Hopper, those of a step 0.8 of that;
# memory 0.9, kernels 0.85 of that. No kernel is shorter than LAUNCH.
REACHED_FLOPS, REACHED_BANDWIDTH = 0.64, 0.76
LAUNCH = 2.5e-6  # seconds
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A GPU, by its data sheet."""

    name: str
    memory: float  # bytes that its tools report
    bandwidth: float  # bytes per second
    bf16: float  # FLOP per second of dense products in bfloat16 with float32 sums
    link: float  # bytes per second and direction to the others of its machine

    def seconds(self, flop: float, moved: float) -> float:
        """How long a kernel takes: the longer of its products and its memory traffic."""
        return max(flop / (self.bf16 * REACHED_FLOPS), moved / (self.bandwidth * REACHED_BANDWIDTH), LAUNCH)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80 * GIB, 2.04e12, 312e12, 300e9),
        GPU("a100-40gb", 40 * GIB, 1.56e12, 312e12, 300e9),
        GPU("h100", 80 * GIB, 3.35e12, 989e12, 450e9),
        GPU("h200", 141e9, 4.8e12, 989e12, 450e9),
        GPU("b200", 180e9, 7.7e12, 2250e12, 900e9),
        GPU("l40s", 45 * GIB, 0.864e12, 362e12, 32e9),
        GPU("a6000", 48 * GIB, 0.768e12, 155e12, 32e9),
        GPU("rtx3090", 24 * GIB, 0.936e12, 71e12, 16e9),
        GPU("rtx4090", 24 * GIB, 1.008e12, 165e12, 32e9),
        GPU("rtx5090", 32 * GIB, 1.792e12, 210e12, 64e9),
    )
}

SLOWER = {"laptop", "max", "pcie", "nvl", "d", "mig"}  # words of names whose GPUs have other data sheets
SAME = 0.15  # by how much the memory that a driver reports may differ from the data sheet's


def known_as(name: str, memory: float) -> GPU | None:
    """The data sheet of the GPU that a driver calls `name` and says to have so many bytes; None if there is none."""
    words = re.findall(r"[a-z0-9.]+", name.lower())
    words += [first + second for first, second in itertools.pairwise(words)]  # "RTX 4090"
    if SLOWER.intersection(words):
        return None
    fitting = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in words]
    return next((gpu for gpu in fitting if abs(gpu.memory / memory - 1) < SAME), None)


def installed(device: torch.device) -> tuple[GPU, bool]:
    """The GPU `device` with the memory that this process can have of it, and whether its speed is known.

    One without a data sheet is called as its driver calls it, and is infinitely fast.
    """
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    found = known_as(name, total)
    ours = free + torch.cuda.memory_reserved(device) + CONTEXT  # which is in use already
    gpu = found or GPU(name, total, math.inf, math.inf, math.inf)
    return replace(gpu, memory=min(total, ours)), found is not None
