"""The text files beside prepared sets: what they hold, their statistics, and how they were made."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from data_prep.array_form import describe_values, new_tally
from data_prep.changes import ArrayOptions
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


PixelFacts = Callable[[Sequence[PartFile]], dict[str, Any]]


def pixel_facts(task: Task, parts: Sequence[PartFile], limits: Array | None = None) -> PixelFacts:
    """What says of the pixels of some of a job's files what a sidecar says. `parts`: all of its files."""
    options = task.options
    if isinstance(options, ArrayOptions):

        def values(some: Sequence[PartFile]) -> dict[str, Any]:
            tally = new_tally(options)
            for part in some:
                tally.combine(part.totals.tally)
            return describe_values(options, tally, limits)

        return values
    grey = options.grey or not (options.colour or any(part.totals.coloured for part in parts))  # one for all files

    def photographs(some: Sequence[PartFile]) -> dict[str, Any]:
        totals = Totals()
        for part in some:
            totals.merge(part.totals)
        return statistics(totals, grey)

    return photographs


def sidecar_of(task: Task, part: PartFile, records: Array, facts: PixelFacts) -> dict[str, Any]:
    """What `OUT.json` says of one file, but for its hash and what was left out."""
    sizes = records["image"] if "image" in (records.dtype.names or ()) else records
    return {
        "format": "ffcv",
        "num_samples": len(records),
        "num_rejected": 0,
        **facts([part]),
        "classes": list(task.classes),
        "counts": counts_of(records["label"], len(task.classes)),
        "num_unlabelled": count_unlabelled(records["label"]),
        "max_height": int(sizes["height"].max()),
        "max_width": int(sizes["width"].max()),
        "kept_jpegs": part.totals.kept,
        "notes": part.totals.notes,
        "bytes": part.path.stat().st_size,
        "sha256": "",
        **_cut(task, part.totals.skipped),
        **_shared(task),
    }


def index_of(task: Task, members: list[tuple[PartFile, dict[str, Any]]], facts: PixelFacts) -> dict[str, Any]:
    """The index of a sharded set. `members`: its files and their sidecars."""
    shards, parts = [sidecar for _, sidecar in members], [part for part, _ in members]
    notes = {note for shard in shards for note in shard["notes"]}
    return {
        "format": SHARDED,
        "shards": [output.path.name for output in task.outputs if output.shard],
        **{name: sum(shard[name] for shard in shards) for name in ("num_samples", "num_rejected", "num_unlabelled")},
        **facts(parts),
        "classes": list(task.classes),
        "counts": np.sum([shard["counts"] for shard in shards], 0).tolist(),
        **{name: max(shard[name] for shard in shards) for name in ("max_height", "max_width")},
        **{name: sum(shard[name] for shard in shards) for name in ("kept_jpegs", "bytes")},
        "notes": {note: sum(shard["notes"].get(note, 0) for shard in shards) for note in sorted(notes)},
        **_cut(task, sum(part.totals.skipped for part in parts)),
        **_shared(task),
    }


def _cut(task: Task, skipped: int) -> dict[str, Any]:
    """How samples were cut out of files, where they were."""
    cutting = getattr(task.source, "cutting", None)
    record = cutting.record() if cutting else {}
    return {"cutting": record, "num_skipped": skipped} if record else {}


def _shared(task: Task) -> dict[str, Any]:
    return {
        "options": asdict(task.options),
        "versions": {"fasthpm": __version__, "python": sys.version.split()[0]}
        | package_versions("ffcv", "numpy", "pillow", "opencv-python"),
        "job": task.job_id,
        "contents": task.contents,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
