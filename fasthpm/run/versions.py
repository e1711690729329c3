"""What a result was made with: software, commit, machine."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fasthpm.machine import processor_name

VERSIONS = "versions.json"  # of a run
PACKAGES = ("fasthpm", "torch", "deepspeed", "timm", "ffcv", "numba", "numpy")


def versions(device: torch.device, world_size: int) -> dict[str, Any]:
    """Package versions, git commit ("unknown" where nothing tracks the package), Python, device and number of ranks."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit_of(Path(__file__)),
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


def commit_of(file: Path) -> str:
    """The commit of the checkout that tracks a file, not of one that its environment merely lies in; or "unknown"."""
    if not _git(file, "ls-files", file.name):
        return "unknown"
    return _git(file, "rev-parse", "HEAD") or "unknown"


def _git(file: Path, *words: str) -> str:
    """What git prints in the file's folder; nothing if it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
