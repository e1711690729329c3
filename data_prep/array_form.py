"""Prepared sets of arrays: how samples become bytes, the unfinished file with them, what their sidecars say.

What `writer.py` is for photographs goes on here where it differs: values are changed (`changes.py`) and counted
(`tally.py`), and stored raw or compressed without loss. Counts are not in the journal of an unfinished job; going on,
they are taken from what is stored.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.changes import MAX_SIDE, ArrayOptions, changed
from data_prep.cuts import LittleContent
from data_prep.partial import Chunk, PartFile
from data_prep.pool import AHEAD, asked_to_stop, become_worker, fork, in_order, reason_of
from data_prep.sets import progress_bar
from data_prep.tally import Tally
from fasthpm.data.changing import only_finite
from fasthpm.data.ffcv.beton import ARRAY_FIELDS, ARRAY_ROW
from fasthpm.data.ffcv.codec import compress, decompress
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array
from fasthpm.files import read_json, write_json

MAX_BYTES = 1 << 30  # of one stored sample
CHUNK_BYTES = 32 << 20  # of the samples that a process makes at a time
RECORD = np.dtype(
    [("index", "<i8"), ("label", "<i8"), ("height", "<i8"), ("width", "<i8"), ("data_ptr", "<u8"), ("size", "<u8")]
)
LIMITS = "limits.json"


@dataclass(frozen=True)
class StoredArray:
    """A sample ready for the file."""

    blob: Any  # its bytes
    height: int
    width: int
    notes: tuple[str, ...] = ()


@dataclass
class ArrayTotals:
    """What the chunks of a file add up to."""

    tally: Tally
    samples: int = 0
    skipped: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    kept: int = 0  # of photographs
    coloured: int = 0


class ArrayPart(PartFile):
    """A `.beton` of arrays in the making."""

    fields, row, record = ARRAY_FIELDS, ARRAY_ROW, RECORD

    def __init__(self, path: Path, num_listed: int, options: ArrayOptions) -> None:
        self.options = options
        super().__init__(path, num_listed)

    def fresh(self) -> "ArrayPart":
        return ArrayPart(self.path, self.num_listed, self.options)

    def _no_totals(self) -> Any:
        return ArrayTotals(new_tally(self.options))

    def restore(self, entry: dict[str, Any]) -> None:
        self.offset, self.page = entry["offset"], entry["page"]
        self.totals.samples, self.totals.skipped = entry["totals"]["samples"], entry["totals"]["skipped"]

    def entry(self) -> dict[str, Any]:
        totals = {"samples": self.totals.samples, "skipped": self.totals.skipped}
        return {"offset": self.offset, "page": self.page, "totals": totals}

    def recount(self) -> None:
        """Count what is stored already."""
        self.totals.tally = new_tally(self.options)
        if not self.totals.samples:
            return
        with self.path.open("rb") as file:
            for row in self.records():
                file.seek(int(row["data_ptr"]))
                shape = (int(row["height"]), int(row["width"]), self.options.channels)
                data = file.read(int(row["size"]))
                one = new_tally(self.options)
                one.add(decompress(data, self.options.codec, shape, self.options.stored_dtype))
                self.totals.tally.merge(one)

    def _record(self, index: int, label: int, stored: Any, at: int) -> Array:
        return np.array((index, label, stored.height, stored.width, at, len(stored.blob)), RECORD)

    def _count(self, chunk: Chunk) -> None:
        self.totals.samples += len(chunk.samples)
        self.totals.skipped += chunk.skipped
        if chunk.tally is not None:
            self.totals.tally.merge(chunk.tally)

    def _pointers(self, records: Array) -> Array:
        return records["data_ptr"]

    def _rows(self, records: Array) -> Array:
        rows = np.zeros(len(records), ARRAY_ROW)
        rows["image"]["data_ptr"], rows["image"]["size"] = records["data_ptr"], records["size"]
        for name in ("label", "height", "width"):
            rows[name] = records[name]
        return rows


def new_tally(options: ArrayOptions) -> Tally:
    """For what is stored."""
    return Tally(options.stored_dtype, options.channels, options.stored_marker)


# ------------------------------------------------------------------------------------------------------- processes
def compile_ahead(options: ArrayOptions) -> None:
    """Compile the loops before processes are forked, so that not every one of them does."""
    for dtype in {options.dtype, options.stored_dtype}:
        Tally(dtype, options.channels, None).add(np.zeros((1, 1, options.channels), dtype))


_source: Any = None
_options: Any = None
_limits: Array | None = None


def enter_worker(source: Any, options: ArrayOptions, lock: int, limits: Array | None = None) -> None:
    """Start of every process."""
    global _source, _options, _limits
    become_worker(lock)
    _source, _options, _limits = source, options, limits


def encode_chunk(indices: Array) -> Chunk:
    """Samples of the source as they are stored, and what they add up to."""
    tally = new_tally(_options)
    accepted: list[tuple[int, int, StoredArray]] = []
    rejected, skipped = [], 0
    for index in indices.tolist():
        try:
            values, label = _source.sample(index)
            values = changed(values, _options, _limits)
            stored = encode(values, _options)
        except LittleContent:
            skipped += 1
        except MemoryError:
            raise
        except Exception as error:  # readers raise nearly anything for damaged files
            rejected.append((index, reason_of(error)))
        else:
            tally.add(values)
            accepted.append((index, label, stored))
    columns = np.array([row[:2] for row in accepted], np.int64).reshape(-1, 2)
    samples: list[Any] = [row[2] for row in accepted]
    return Chunk(columns[:, 0], columns[:, 1], samples, rejected, [], tally, skipped)


def encode(values: Array, options: ArrayOptions) -> StoredArray:
    """**Raises:** `ValueError` for an array that is too large."""
    if max(values.shape[:2]) > MAX_SIDE:
        raise ValueError(f"a side of {max(values.shape[:2])} pixels, more than {MAX_SIDE}; use --tile")
    if values.nbytes > MAX_BYTES:
        raise ValueError(f"{values.nbytes} bytes of pixels are more than {MAX_BYTES}; use --tile")
    if options.codec == "raw":  # as they lie, without a copy
        plain = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        return StoredArray(plain.reshape(-1).view(np.uint8).data, *values.shape[:2])
    return StoredArray(compress(values, options.codec), *values.shape[:2])


# ------------------------------------------------------------------------------------------------------- limits
def clip_limits(
    source: Any, options: ArrayOptions, folder: Path, chunks: Sequence[Any], lock: int, workers: int
) -> Any:
    """Between which values each channel is clipped, float64 [C, 2]: percentiles of all samples, in a pass of their own.

    They are kept in `folder`, so that a job that goes on needs no second pass. None if no clipping is asked for.
    """
    if options.clip_percentiles is None:
        return None
    known = read_json(folder / LIMITS).get("limits")
    if known is None:
        tally = Tally(options.dtype, options.channels, options.marker)
        compile_ahead(options)
        total = sum(len(indices) for _, indices in chunks)
        count = min(count_workers(workers), len(chunks))
        pool = ProcessPoolExecutor(count, fork, initializer=enter_worker, initargs=(source, options, lock))
        with pool, progress_bar(total, "percentiles", "img") as bar, asked_to_stop() as stopping:
            try:
                for one in in_order(pool, _measure_chunk, [indices for _, indices in chunks], count * AHEAD):
                    tally.merge(one[0])
                    bar.update(one[1])
                    if stopping():
                        raise KeyboardInterrupt
            finally:
                pool.shutdown(cancel_futures=True)
        shares = [Fraction(str(share)) / 100 for share in options.clip_percentiles]
        known = [tally.quantiles(channel, shares) for channel in range(options.channels)]
        write_json(folder / LIMITS, {"limits": known}, durable=True)
    return np.array(known, np.float64)


def _measure_chunk(indices: Array) -> tuple[Tally, int]:
    tally = Tally(_options.dtype, _options.channels, _options.marker)
    for index in indices.tolist():
        try:
            values = only_finite(_source.sample(index)[0], _options.marker)
        except MemoryError:
            raise
        except Exception:  # the pass that stores them says why
            continue
        tally.add(values)
    return tally, len(indices)


# ------------------------------------------------------------------------------------------------------- sidecars
def describe_values(options: ArrayOptions, tally: Tally, limits: Array | None) -> dict[str, Any]:
    """Entries of a sidecar about values."""
    preparation = dict(options.preparation)
    if limits is not None:
        preparation["limits"] = limits.tolist()
    return {
        "channels": options.channels,
        **tally.statistics(),
        "dtype": options.stored_dtype,
        "codec": options.codec,
        "nodata": options.stored_nodata,
        "bands": list(options.bands),
        "log": bool(options.log),
        "preparation": preparation,
    }


def words_about(sidecar: dict[str, Any]) -> list[str]:
    """What an owner should know of a set's values."""
    names = sidecar["bands"] or [f"channel {k + 1}" for k in range(sidecar["channels"])]
    said = []
    pixels = sidecar["pixels"]
    empty = [name for name, missing in zip(names, sidecar["missing"], strict=True) if missing == pixels]
    constant = [name for name, std in zip(names, sidecar["std"], strict=True) if std == 0 and name not in empty]
    if empty:
        said.append(f"nodata everywhere: {', '.join(empty)}; --bands leaves them out")
    if constant:
        said.append(f"one value everywhere (std 0): {', '.join(constant)}; --bands leaves them out")
    if any(sidecar["missing"]):
        share = sum(sidecar["missing"]) / (pixels * len(names))
        said.append(f"nodata {sidecar['nodata']}: {share:.2%} of values, left out of mean and std")
    return said


__all__ = ["CHUNK_BYTES", "ArrayPart", "clip_limits", "describe_values", "encode_chunk", "enter_worker", "words_about"]
