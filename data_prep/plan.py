"""What a preparation of images is to write: which files, in what order, and what decides their bytes."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.changes import ArrayOptions
from data_prep.encode import WriteOptions
from data_prep.samples import Samples, have_changed
from data_prep.sets import shard_path, validation_path
from fasthpm.data.keys import Stream
from fasthpm.data.sampling import Array, sample_order
from fasthpm.errors import UserError

PACKAGES = ("numpy", "pillow", "opencv-python")
READERS = ("tifffile", "imagecodecs", "pydicom", "nibabel", "h5py", "zarr", "lz4")  # of arrays
LAYOUT = 2  # raised when the same options give other bytes


@dataclass(frozen=True)
class Output:
    """A `.beton` to write, and which samples of the source go into it, in stored order."""

    path: Path
    indices: Array  # int64 [N]
    shard: bool = False


@dataclass(frozen=True)
class Task:
    """What `prepare` was asked for."""

    source: Samples
    out: Path
    classes: Sequence[str]
    outputs: Sequence[Output]
    options: WriteOptions | ArrayOptions
    description: dict[str, Any]
    contents: dict[str, str] = field(default_factory=dict)  # of the source's files, see `Source.contents`

    @property
    def total(self) -> int:
        """Samples of all outputs."""
        return sum(len(output.indices) for output in self.outputs)

    @property
    def job_id(self) -> str:
        """What the finished files carry to be known by."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


def stored_order(source: Samples, seed: int) -> Array:
    """A seeded permutation: int64 [N]. Samples that must be read together stay together, shuffled among themselves."""
    order = sample_order(seed, 0, len(source))
    groups = getattr(source, "groups", None)
    if groups is None:
        return order
    rank = np.argsort(sample_order(seed, Stream.GROUPS, int(groups.max()) + 1))
    return order[np.argsort(rank[groups[order]], kind="stable")]


def plan_outputs(out: Path, order: Array, shards: int, validation: Array) -> list[Output]:
    """The files to write. `validation`: bool [N] by source index, samples that go into `OUT_val.beton`."""
    train = order[~validation[order]]
    if shards > max(len(train), 1):
        raise UserError(f"--shards {shards} is more than the {len(train)} images; use fewer")
    if shards:
        pieces = np.array_split(train, shards)
        outputs = [Output(shard_path(out, k, shards), piece, True) for k, piece in enumerate(pieces)]
    else:
        outputs = [Output(out, train)]
    if validation.any():
        outputs.append(Output(validation_path(out), order[validation[order]]))
    return outputs


def count_allowed(max_rejected: float, total: int) -> int:
    """How many samples may be left out; `max_rejected`: a share below 1, a number from 1 on."""
    return int(max_rejected * total) if max_rejected < 1 else int(max_rejected)


def describe_job(
    source: Samples, classes: Sequence[str], outputs: Sequence[Output], options: WriteOptions | ArrayOptions
) -> dict[str, Any]:
    """What decides the bytes of the result, as JSON; its entries' names are for people."""
    arrays = isinstance(options, ArrayOptions)
    fingerprint = source.fingerprint() or f"unknown-{time.time_ns()}-{os.getpid()}"
    values = {
        "files": fingerprint,
        "classes": list(classes),
        "outputs": [[output.path.name, len(output.indices), int(output.indices[:1].sum())] for output in outputs],
        "versions": {"layout": LAYOUT} | package_versions(*PACKAGES, *(READERS if arrays else ())),
    }
    flags = {f"--{name}": value for name, value in asdict(options).items()}
    if flags.pop("--colour", False):  # sets that were made before there was this one have no word of it
        flags["--channels"] = 3
    return json.loads(json.dumps(values | flags))


def contents_of(source: Samples) -> dict[str, str]:
    """What tells the files of a source from others of the same names; empty where that is not known."""
    asked = getattr(source, "contents", None)
    return asked() if asked else {}


def refuse_changed(out: Path, sidecar: dict[str, Any], contents: dict[str, str]) -> None:
    """Compare the files of a source with those of the same names that the set at `out` was made of.

    **Raises:** `UserError` if some have changed.
    """
    then = sidecar.get("contents") or {}
    if contents and not then:
        print(
            f"{out} was prepared before sizes and times of files were noted, so they are not compared; --overwrite "
            f"prepares it anew",
            flush=True,
        )
    elif contents and have_changed(then, contents):
        raise UserError(
            f"{out} was prepared from files of these names, and some have changed since (the newest is "
            f"{contents['newest']}); use --overwrite to prepare it anew, or another name"
        )


def partial_folder(out: Path) -> Path:
    """Where the set `out` stands until it is complete."""
    return out.with_name(f".{out.stem}.partial")


def package_versions(*names: str) -> dict[str, str]:
    """{name: version} of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
