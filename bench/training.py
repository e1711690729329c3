"""What `bench.end_to_end` and `bench.scaling` share: a short run through the public command, and its own metrics."""

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import run

READ = ("images_per_second", "data_wait_percent", "teacher_percent", "mfu_percent", "memory_gib")
LOG_EVERY = 5


def train(work: Path, flags: Sequence[object], *, ranks: int, updates: int) -> dict[str, float]:
    """Train for some updates and read what the run measured itself, the median of all readings but the first.

    **Raises:** `UserError` if the run fails.
    """
    shutil.rmtree(work, ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "fasthpm.pretrain", *map(str, flags)]
    every = min(LOG_EVERY, max(1, updates // 2))
    run(
        [
            *command,
            "--steps_per_epoch",
            "0",
            "--output_dir",
            str(work),
            "--stop_after",
            str(updates),
            "--log_every",
            str(every),
            "--panel_every",
            "0",
            "--save_every",
            "1000000",
        ]
    )
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(work, ignore_errors=True)
    return median_of(lines)


def median_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians of the readings after the first, which holds the start."""
    later = lines[1:] or lines
    return {name: statistics.median(float(line[name]) for line in later) for name in READ}
