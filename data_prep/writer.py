"""`write_beton`: any indexable set of (image, label) into a prepared set, atomically.

Two parallel passes. The first decodes every sample, sorts out those that cannot be read, and measures the rest; the
second writes them with FFCV's `DatasetWriter`. `OUT.beton` appears last, by renaming a finished and fsynced file, after
its sidecar `OUT.json`; a run that is killed at any moment leaves at most a hidden temporary file, which the next run
removes.

FFCV's writer waits for ever when one of its processes dies, so `GuardedWriter` runs its processes itself and watches.
"""

import contextlib
import csv
import ctypes
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from fasthpm import __version__
from fasthpm.data.beton import ALLOCATION, DESCRIPTOR, FIELDS, HEADER, ROW, sidecar_path
from fasthpm.data.pixels import is_grey, to_rgb
from fasthpm.data.prefetch import count_workers
from fasthpm.data.sampling import Array, sample_order
from fasthpm.errors import UserError

WRITE_MODES = ("jpg", "raw", "proportion", "smart")
MAX_SIDE = 65535  # FFCV stores sides in 16 bits
SMALL_PAGE, PAGE, MAX_PAGE = 1 << 21, 1 << 23, 1 << 31
SMALL_IMAGE = 1 << 16  # bytes of pixels up to which the small page does
CHUNK = 32  # samples handed to a process at a time
HASH_BLOCK = 1 << 22
PR_SET_PDEATHSIG = 1
fork = multiprocessing.get_context("fork")


class Samples(Protocol):
    """An indexable set: `samples[i]` is (PIL image or uint8 array [h, w] or [h, w, 3], label), or raises."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class WriteOptions:
    """How pixels are stored."""

    max_resolution: int = 0  # longest side in pixels, larger images are shrunk to it; 0 = as they are
    jpeg_quality: int = 90
    write_mode: str = "jpg"
    compress_probability: float = 0.5  # proportion mode: share of JPEGs
    smart_threshold: int = 200_000  # smart mode: images with more bytes of pixels than this become JPEGs
    grey: bool = False
    seed: int = 0  # of the sample order and of proportion mode

    def __post_init__(self) -> None:
        self._check("max_resolution", 0 <= self.max_resolution <= MAX_SIDE, f"0 (off) to {MAX_SIDE}")
        self._check("jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100")
        self._check("write_mode", self.write_mode in WRITE_MODES, f"one of {', '.join(WRITE_MODES)}")
        self._check("compress_probability", 0 <= self.compress_probability <= 1, "0 to 1")
        self._check("smart_threshold", self.smart_threshold >= 0, "a number of bytes, 0 or more")
        self._check("seed", self.seed >= 0, "0 or more")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")


def write_beton(
    samples: Samples,
    out: Path,
    classes: Sequence[str],
    *,
    options: WriteOptions = WriteOptions(),
    name_of: Callable[[int], str] = str,
    max_rejected: float = 0.0,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `samples` to `out` and its sidecar; returns the sidecar's content.

    **Args:** `name_of(i)` names sample i in `OUT.rejected.csv`. `max_rejected`: how many samples may be unreadable, a
    share of them below 1, a number from 1 on. `num_workers`: processes, 0 = all cores.

    **Raises:** `UserError` if `out` exists, too many samples are unreadable, or the disk is full; then nothing is left
    under the final names but `OUT.rejected.csv`.
    """
    check_output(out, overwrite)
    remove_stale(out)
    workers = min(count_workers(num_workers), -(-len(samples) // CHUNK))  # no process without a chunk
    with _one_line_for_a_full_disk(out), temporary(out) as partial:
        scan = scan_samples(samples, options, workers)
        _settle_rejected(out, scan, name_of, max_rejected)
        accepted = scan.accepted[sample_order(options.seed, 0, len(scan.accepted))]
        _write_samples(_Prepared(samples, options), partial, accepted, scan, options, workers)
        sidecar = _describe(scan, classes, options, partial)
        _publish(partial, out, sidecar)
    return sidecar


# ------------------------------------------------------------------------------------------------------- files
def rejected_path(out: Path) -> Path:
    """`OUT.rejected.csv` of `OUT.beton`."""
    return out.with_suffix(".rejected.csv")


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    if out.suffix != ".beton":
        raise UserError(f"output {out} does not end in .beton; use e.g. {out.with_suffix('.beton')}")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} of output {out.name} does not exist; create it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"folder {out.parent} of output {out.name} is not writable")
    if out.exists() and not overwrite:
        raise UserError(f"output {out} exists; use --overwrite to replace it, or another name")


def remove_stale(out: Path) -> None:
    """Remove what killed runs left; a run that is alive holds a lock on its file."""
    for path in out.parent.glob(f".{glob.escape(out.stem)}.*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def temporary(out: Path) -> Iterator[Path]:
    """A locked, empty, hidden file beside `out`, removed at the end unless it has been renamed."""
    path = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all."""
    with temporary(path) as partial:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            os.fsync(file.fileno())
        partial.rename(path)


def _publish(partial: Path, out: Path, sidecar: dict[str, Any]) -> None:
    """Sidecar first, so that a `.beton` is never alone; the old `.beton` goes before, so that no pair mismatches."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    out.unlink(missing_ok=True)
    write_atomically(sidecar_path(out), json.dumps(sidecar, indent=2) + "\n")
    partial.rename(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _one_line_for_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left in {out.parent} while writing {out.name}; free some or write elsewhere"
        ) from error


# ------------------------------------------------------------------------------------------------------- first pass
class _Prepared:
    """Samples as they are stored: (uint8 RGB [h, w, 3], label), shrunk, grey if asked for."""

    def __init__(self, samples: Samples, options: WriteOptions) -> None:
        self.samples, self.options = samples, options

    def __getitem__(self, index: int) -> tuple[Array, int]:
        image, label = self.samples[index]
        pixels = _shrink(_rgb_pixels(image, self.options.grey), self.options.max_resolution)
        if max(pixels.shape) > MAX_SIDE:
            raise ValueError(f"a side of {max(pixels.shape)} pixels, more than {MAX_SIDE}; use --max_resolution")
        if pixels.nbytes > MAX_PAGE // 2:
            raise ValueError(f"{pixels.nbytes} bytes of pixels are more than a page holds; use --max_resolution")
        # FFCV draws from numpy's global generator whether a sample is compressed (proportion mode).
        np.random.seed((self.options.seed * 1_000_003 + index) % 2**32)  # noqa: NPY002
        return pixels, int(label)


def _rgb_pixels(image: Any, grey: bool) -> Array:
    """Any image as uint8 [h, w, 3]."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)  # the way through PIL costs ten times as much
    picture = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
    return np.asarray(picture.convert("L").convert("RGB") if grey else picture)


def _shrink(pixels: Array, max_resolution: int) -> Array:
    """FFCV's own downscaling, but never to a side of 0."""
    import cv2

    height, width = pixels.shape[:2]
    ratio = max_resolution / max(height, width)
    if not 0 < ratio < 1:
        return np.ascontiguousarray(pixels)
    size = (max(int(ratio * width), 1), max(int(ratio * height), 1))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class Scan:
    """What the first pass found. N samples looked at, A accepted."""

    accepted: Array  # int64 [A]
    labels: Array  # int64 [A]
    sizes: Array  # int64 [A, 2], stored height and width
    grey: bool
    mean: Array  # float64 [3], of pixels scaled to 0..1, before JPEG compression
    std: Array  # float64 [3]
    rejected: list[tuple[int, str]]


def scan_samples(samples: Samples, options: WriteOptions, workers: int) -> Scan:
    """Decode every sample once, in parallel, and measure the readable ones.

    **Raises:** `UserError` if a process dies, as it does when memory runs out.
    """
    chunks = [range(start, min(start + CHUNK, len(samples))) for start in range(0, len(samples), CHUNK)]
    prepared, tables, rejected = _Prepared(samples, options), [np.empty((0, 11))], []
    with ProcessPoolExecutor(workers, fork, initializer=_enter_worker, initargs=(prepared,)) as pool:
        with progress_bar(len(samples), "decode", "img") as bar:
            try:
                for chunk, (table, unreadable) in zip(chunks, pool.map(_measure_chunk, chunks), strict=True):
                    tables.append(table)
                    rejected += unreadable
                    bar.update(len(chunk))
            except BrokenProcessPool as error:
                raise UserError(
                    "a decoding process died, most likely for want of memory; use fewer --num_workers"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return _sum_up(np.concatenate(tables), rejected)


_worker_samples: Any = None


def _enter_worker(samples: Any) -> None:
    """Start of every process: die with the parent, leave Ctrl-C to it, one thread each."""
    import cv2

    global _worker_samples
    _worker_samples = samples
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files


def _measure_chunk(indices: range) -> tuple[Array, list[tuple[int, str]]]:
    """float64 [A, 11], a row per readable sample (see `_measure`), and (index, reason) of each unreadable one."""
    rows, rejected = [], []
    for index in indices:
        try:
            rows.append(_measure(index))
        except Exception as error:  # decoders raise nearly anything for damaged files
            rejected.append((index, _reason(error)))
    return np.array(rows, np.float64).reshape(-1, 11), rejected


def _measure(index: int) -> list[float]:
    """index, label, height, width, grey, mean [3], mean square [3]."""
    import cv2

    pixels, label = _worker_samples[index]
    mean, std = (values.ravel() / 255 for values in cv2.meanStdDev(pixels))
    return [index, label, *pixels.shape[:2], is_grey(pixels), *mean, *(mean**2 + std**2)]


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _sum_up(table: Array, rejected: list[tuple[int, str]]) -> Scan:
    sizes = table[:, 2:4].astype(np.int64)
    weights = sizes.prod(1)[:, None] / max(sizes.prod(1).sum(), 1)
    mean, square = (weights * table[:, 5:8]).sum(0), (weights * table[:, 8:11]).sum(0)
    return Scan(
        accepted=table[:, 0].astype(np.int64),
        labels=table[:, 1].astype(np.int64),
        sizes=sizes,
        grey=bool(table[:, 4].all()),
        mean=mean,
        std=np.sqrt(np.maximum(square - mean**2, 0)),
        rejected=rejected,
    )


def _settle_rejected(out: Path, scan: Scan, name_of: Callable[[int], str], max_rejected: float) -> None:
    """Write (or clear away) `OUT.rejected.csv`, and stop if too many samples are on it."""
    path, rejected = rejected_path(out), scan.rejected
    total = len(rejected) + len(scan.accepted)
    path.unlink(missing_ok=True)
    if rejected:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([("path", "reason"), *((name_of(index), why) for index, why in rejected)])
    allowed = int(max_rejected * total) if max_rejected < 1 else int(max_rejected)
    if len(rejected) > allowed:
        raise UserError(
            f"{len(rejected)} of {total} images cannot be read, --max_rejected {max_rejected:g} allows {allowed}; "
            f"{path} lists them with the reasons: repair or remove them, or raise --max_rejected"
        )
    if not len(scan.accepted):
        raise UserError("there is no readable image at all")


# ------------------------------------------------------------------------------------------------------- second pass
def _write_samples(
    prepared: _Prepared, partial: Path, indices: Array, scan: Scan, options: WriteOptions, workers: int
) -> None:
    """Write the accepted samples in the order of `indices` to the file `partial`, with FFCV."""
    from ffcv.fields import IntField, RGBImageField

    from data_prep.guarded import GuardedWriter

    field = RGBImageField(
        write_mode=options.write_mode,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
        smart_threshold=options.smart_threshold,
    )
    writer = GuardedWriter(
        str(partial), {"image": field, "label": IntField()}, page_size=_page_size(scan), num_workers=workers
    )
    with progress_bar(len(indices), "write", "img") as bar:
        writer.progress, writer.enter_worker = bar, _enter_worker
        writer.from_indexed_dataset(prepared, indices.tolist(), chunksize=CHUNK)
    _check_length(partial, len(indices), writer)


def _page_size(scan: Scan) -> int:
    """A power of two that holds the largest sample; a JPEG of noise may be a little larger than its pixels."""
    largest = int(scan.sizes.prod(1).max()) * 3
    page = SMALL_PAGE if largest <= SMALL_IMAGE else PAGE
    while page < largest * 1.5 + 65536:
        page *= 2
    return page


def _check_length(partial: Path, num_samples: int, writer: Any) -> None:
    """FFCV writes unbuffered and does not look at how much arrived: a full disk can cut a page short unseen."""
    head = HEADER.itemsize + len(FIELDS) * DESCRIPTOR.itemsize + num_samples * ROW.itemsize
    pages = writer.pages * writer.page_size
    expected = -(-head // writer.page_size) * writer.page_size + pages + num_samples * ALLOCATION.itemsize
    if partial.stat().st_size != expected:
        raise OSError(errno.ENOSPC, f"{partial.stat().st_size} of {expected} bytes arrived")


# ------------------------------------------------------------------------------------------------------- the sidecar
def _describe(scan: Scan, classes: Sequence[str], options: WriteOptions, partial: Path) -> dict[str, Any]:
    channels = 1 if options.grey or scan.grey else 3
    counts = np.bincount(scan.labels, minlength=len(classes)).tolist()
    return {
        "format": "ffcv",
        "num_samples": len(scan.accepted),
        "num_rejected": len(scan.rejected),
        "channels": channels,
        "mean": scan.mean[:channels].tolist(),
        "std": scan.std[:channels].tolist(),
        "classes": list(classes),
        "counts": counts,
        "max_height": int(scan.sizes[:, 0].max()),
        "max_width": int(scan.sizes[:, 1].max()),
        "bytes": partial.stat().st_size,
        "sha256": hash_file(partial),
        "options": asdict(options),
        "versions": {"fasthpm": __version__, "python": sys.version.split()[0]}
        | {name: importlib.metadata.version(name) for name in ("ffcv", "numpy", "pillow")},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def hash_file(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits; with a progress bar."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress_bar(path.stat().st_size, "hash", "B", unit_scale=True) as bar:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def progress_bar(total: int, what: str, unit: str, **options: Any) -> Any:
    """A bar on stderr with rate and time left."""
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5, dynamic_ncols=True, **options)
