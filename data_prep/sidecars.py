"""The text files beside prepared sets: what they hold, their statistics, and how they were made."""

import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from data_prep.partial import PartFile, Totals
from data_prep.plan import Task, package_versions
from data_prep.sets import SHARDED
from fasthpm import __version__
from fasthpm.data.labels import count_unlabelled, counts_of
from fasthpm.data.sampling import Array


def statistics(totals: Totals, grey: bool) -> dict[str, Any]:
    """channels, mean and std, of pixels scaled to 0..1; exact until the last division."""
    channels = 1 if grey else 3
    n = totals.pixels
    variances = [(n * square - total**2) / (n * n) for total, square in zip(totals.sums, totals.squares, strict=True)]
    return {
        "channels": channels,
        "mean": [total / n / 255 for total in totals.sums[:channels]],
        "std": [variance**0.5 / 255 for variance in variances[:channels]],
        "pixels": n,
    }


def sidecar_of(task: Task, part: PartFile, records: Array, grey: bool) -> dict[str, Any]:
    """What `OUT.json` says of one file, but for its hash and what was left out."""
    image = records["image"]
    return {
        "format": "ffcv",
        "num_samples": len(records),
        "num_rejected": 0,
        **statistics(part.totals, grey),
        "classes": list(task.classes),
        "counts": counts_of(records["label"], len(task.classes)),
        "num_unlabelled": count_unlabelled(records["label"]),
        "max_height": int(image["height"].max()),
        "max_width": int(image["width"].max()),
        "kept_jpegs": part.totals.kept,
        "notes": part.totals.notes,
        "bytes": part.path.stat().st_size,
        "sha256": "",
        **_shared(task),
    }


def index_of(task: Task, shards: list[dict[str, Any]], totals: Totals, grey: bool) -> dict[str, Any]:
    """The index of a sharded set."""
    return {
        "format": SHARDED,
        "shards": [output.path.name for output in task.outputs if output.shard],
        **{name: sum(shard[name] for shard in shards) for name in ("num_samples", "num_rejected", "num_unlabelled")},
        **statistics(totals, grey),
        "classes": list(task.classes),
        "counts": np.sum([shard["counts"] for shard in shards], 0).tolist(),
        **{name: max(shard[name] for shard in shards) for name in ("max_height", "max_width")},
        **{name: sum(shard[name] for shard in shards) for name in ("kept_jpegs", "bytes")},
        "notes": totals.notes,
        **_shared(task),
    }


def _shared(task: Task) -> dict[str, Any]:
    return {
        "options": asdict(task.options),
        "versions": {"fasthpm": __version__, "python": sys.version.split()[0]}
        | package_versions("ffcv", "numpy", "pillow", "opencv-python"),
        "job": task.job_id,
        "contents": task.contents,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
