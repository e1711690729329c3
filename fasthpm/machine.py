"""What this machine has: cores and a processor."""

import os
import platform
from pathlib import Path


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpuinfo() -> str:
    """What Linux tells of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def cpu_has_bf16() -> bool:
    """Whether the processor computes in bfloat16; without such instructions torch emulates them, and matmuls take many
    times as long as in float32."""
    return "bf16" in cpuinfo()


def processor_name() -> str:
    """The processor's model name."""
    lines = cpuinfo().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
