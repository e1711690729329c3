"""The published protocols of linear probes: their numbers, and how they are fitted to a set of images.

MAE's with LARS (Kaiming He et al. 2022, appendix A.1), MoCo v3's with SGD (Xinlei Chen et al. 2021), as HPM's paper
takes it.
"""

import argparse
from typing import Any

from fasthpm.errors import UserError

PROTOCOLS: dict[str, dict[str, Any]] = {
    "mae": {"epochs": 90, "warmup_epochs": 10.0, "blr": 0.1, "global_batch_size": 16384},
    "moco": {"epochs": 100, "warmup_epochs": 0.0, "blr": 0.1, "global_batch_size": 1024},
}


def fit_batch(arguments: argparse.Namespace, num_samples: int, world_size: int) -> None:
    """Fill in `global_batch_size`, `batch_size` and `lr`: the protocol's batch, for small sets at most a 16th of them.

    The learning rate follows the batch.
    """
    if not arguments.global_batch_size:
        wanted = PROTOCOLS[arguments.protocol]["global_batch_size"]
        while wanted > 64 and wanted * 16 > num_samples:
            wanted //= 2
        arguments.global_batch_size = wanted
        arguments.batch_size = max(min(arguments.batch_size, wanted // world_size), 1)
    arguments.lr = arguments.lr or arguments.blr * arguments.global_batch_size / 256


def updates_of(arguments: argparse.Namespace, num_samples: int) -> int:
    """Updates of one epoch. **Raises:** `UserError` if the samples do not fill one."""
    if num_samples < arguments.global_batch_size:
        raise UserError(
            f"{arguments.train_path} has {num_samples} samples, fewer than one global batch of "
            f"{arguments.global_batch_size}; use a smaller --global_batch_size"
        )
    return num_samples // arguments.global_batch_size


def accumulation(arguments: argparse.Namespace, world_size: int) -> int:
    """Micro-steps per update.

    **Raises:** `UserError` if batch_size x devices does not divide global_batch_size.
    """
    per_step = arguments.batch_size * world_size
    if arguments.global_batch_size % per_step:
        raise UserError(
            f"global_batch_size {arguments.global_batch_size} is not a multiple of batch_size {arguments.batch_size} x "
            f"{world_size} devices; choose numbers that are"
        )
    return arguments.global_batch_size // per_step
