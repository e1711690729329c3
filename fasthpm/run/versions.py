"""What a result was made with: software, commit, machine."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fasthpm.machine import processor_name

PACKAGES = ("fasthpm", "torch", "deepspeed", "timm", "ffcv", "numba", "numpy")


def versions(device: torch.device, world_size: int) -> dict[str, Any]:
    """Package versions, git commit ("unknown" outside a checkout), Python, device name and number of ranks."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": device_name(device),
        "world_size": world_size,
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's model name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
