"""Kernels of our own for GPUs, each with a plain twin that every other device runs: `launched` is the way to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasthpm.errors import warn

_failed = False  # whether they are left alone from now on


@contextmanager
def off() -> Iterator[None]:
    """Let the twins compute for a while, to compare."""
    global _failed
    before, _failed = _failed, True
    try:
        yield
    finally:
        _failed = before


def launched(name: str, *tensors: Tensor) -> Any:
    """What the function `name` of `pairs` gives, or None where Triton is missing or fails, which is said once.

    Memory that runs out is no failure of Triton's and is raised.
    """
    global _failed
    if _failed:
        return None
    try:
        from fasthpm.kernels import pairs  # Triton is imported only where it runs

        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current GPU
            return getattr(pairs, name)(*tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed = True
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warn(f"Triton's kernels are not to be had ({reason}); pairs of patches are compared in plain torch")
        return None
