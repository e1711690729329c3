"""`prepare`: a source of images into prepared sets, in one pass, resumable, in bounded memory.

Processes read, check and encode chunks of samples; this one appends what comes back, in order, to unfinished files
beside the output (`partial.py`). The bytes of the result depend on the source and the options alone, not on the number
of processes or on kills. Sets appear under their names when all is complete, sidecar last.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.encode import Stored, WriteOptions, check_opencv, encode
from data_prep.partial import Chunk, Job, PartFile, Totals, locked, sync_path
from data_prep.pool import AHEAD, asked_to_stop, become_worker, fork, in_order, reason_of
from data_prep.sets import (
    SHARDED,
    byte_bar,
    files_path,
    hash_file,
    progress_bar,
    read_index,
    read_json,
    rejected_path,
    shard_path,
    validation_path,
    write_csv,
)
from data_prep.sources import Samples
from fasthpm import __version__
from fasthpm.data.ffcv.beton import sidecar_path
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array, key_of, sample_order, uniforms
from fasthpm.errors import UserError

CHUNK, SMALL_CHUNK, LARGE_SIDE = 32, 4, 1024  # samples handed to a process at a time; fewer where they may be large
LAYOUT = 1  # raised when the same options give other bytes
GROUPS, DRAWS = 1 << 32, (1 << 32) + 1  # "epochs" of the hash that no training epoch uses
LONGEST_NAME = 255


@dataclass(frozen=True)
class Output:
    """A `.beton` to write, and which samples of the source go into it, in stored order."""

    path: Path
    indices: Array  # int64 [N]
    shard: bool = False


# ------------------------------------------------------------------------------------------------------- the order
def stored_order(source: Samples, seed: int) -> Array:
    """A seeded permutation: int64 [N]. Samples that must be read together stay together, shuffled among themselves."""
    order = sample_order(seed, 0, len(source))
    groups = getattr(source, "groups", None)
    if groups is None:
        return order
    rank = np.argsort(sample_order(seed, GROUPS, int(groups.max()) + 1))
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


# ------------------------------------------------------------------------------------------------------- all of it
def write_beton(
    samples: Any,
    out: Path,
    classes: Sequence[str],
    *,
    options: WriteOptions | None = None,
    max_rejected: float = 0.0,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an indexable set, `samples[i]` being (uint8 array or PIL image, label), to `out`; returns the sidecar.

    See `prepare`. Such a set has no fingerprint, so that a killed run starts over.
    """
    source, options = _Indexed(samples), options or WriteOptions()
    outputs = [Output(out, stored_order(source, options.seed))]
    flags: dict[str, Any] = {"max_rejected": max_rejected, "num_workers": num_workers, "overwrite": overwrite}
    sidecar = prepare(source, out, classes, outputs, options=options, **flags)
    assert sidecar is not None  # without a fingerprint nothing is known to be there already
    return sidecar


class _Indexed:
    """An indexable set as `Samples`, named by number."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> tuple[Any, int]:
        return self.samples[index]

    def name(self, index: int) -> str:
        return str(index)

    where = name

    def fingerprint(self) -> None:
        return None


def prepare(
    source: Samples,
    out: Path,
    classes: Sequence[str],
    outputs: Sequence[Output],
    *,
    options: WriteOptions,
    max_rejected: float = 0.0,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Write `outputs`, of which `out` is the first or names the index of the shards.

    Returns the content of `OUT.json`, or None if all is there already, from the same files with the same options.

    **Args:** `max_rejected`: how many samples may be unreadable, a share of them below 1, a number from 1 on.
    `num_workers`: processes, 0 = all cores.

    **Raises:** `UserError` if `out` exists, is being written, too many samples are unreadable, a process dies or the
    disk is full. Nothing new is then under the final names but `OUT.rejected.csv`; where going on makes sense, the
    message says so. `KeyboardInterrupt` after SIGINT or SIGTERM.
    """
    check_opencv()
    check_output(out, [output.path for output in outputs])
    if not sum(len(output.indices) for output in outputs):
        raise UserError("there is no image to prepare")
    description = _describe_job(source, classes, outputs, options)
    task = _Task(source, out, classes, outputs, options, description)
    with readable_write_errors(out), locked(_partial_folder(out)) as lock:
        job = _new_job(task)
        try:
            return _prepare(task, job, lock, max_rejected, num_workers, overwrite)
        finally:
            if not job.has_progress() or source.fingerprint() is None:
                job.discard()
            job.close()


@dataclass(frozen=True)
class _Task:
    """What `prepare` was asked for."""

    source: Samples
    out: Path
    classes: Sequence[str]
    outputs: Sequence[Output]
    options: WriteOptions
    description: dict[str, Any]

    @property
    def total(self) -> int:
        return sum(len(output.indices) for output in self.outputs)

    @property
    def job_id(self) -> str:
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


def _new_job(task: _Task) -> Job:
    folder = _partial_folder(task.out)
    return Job(folder, [PartFile(folder / output.path.name, len(output.indices)) for output in task.outputs])


def _prepare(
    task: _Task, job: Job, lock: int, max_rejected: float, num_workers: int, overwrite: bool
) -> dict[str, Any] | None:
    if not job.is_complete(task.description):
        if _is_there(task) and not overwrite:
            return None
        _refuse_existing(task, overwrite)
        chunks = _plan_chunks(task.outputs, task.options)
        _resume(task, job, len(chunks), count_allowed(max_rejected, task.total))
        _encode_all(task, job, chunks, num_workers, lock)
        _settle_rejected(task, job, max_rejected)
        _finish(task, job, num_workers)
    job.publish()
    return read_json(sidecar_path(task.out))


def _resume(task: _Task, job: Job, chunks: int, allowed: int) -> None:
    """Find out what is done already, and say so where it does not help."""
    changed = job.resume(task.description)
    if changed:
        print(f"the unfinished preparation in {job.folder} differs in {', '.join(changed)}; starting over", flush=True)
    elif job.chunks == chunks and len(job.rejected) > allowed:
        print(f"all images were read before, {len(job.rejected)} of them unreadable; starting over", flush=True)
        job.start_over(task.description)


def _describe_job(
    source: Samples, classes: Sequence[str], outputs: Sequence[Output], options: WriteOptions
) -> dict[str, Any]:
    """What decides the bytes of the result, as JSON; its entries' names are for people."""
    fingerprint = source.fingerprint() or f"unknown-{time.time_ns()}-{os.getpid()}"
    values = {
        "files": fingerprint,
        "classes": list(classes),
        "outputs": [[output.path.name, len(output.indices), int(output.indices[:1].sum())] for output in outputs],
        "versions": {"layout": LAYOUT} | package_versions("numpy", "pillow", "opencv-python"),
    }
    return json.loads(json.dumps(values | {f"--{name}": value for name, value in asdict(options).items()}))


def package_versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ------------------------------------------------------------------------------------------------------- outputs
def _partial_folder(out: Path) -> Path:
    return out.with_name(f".{out.stem}.partial")


def check_output(out: Path, paths: Iterable[Path]) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    if out.suffix != ".beton":
        raise UserError(f"output {out} does not end in .beton; use e.g. {out.with_suffix('.beton')}")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} of output {out.name} does not exist; create it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"folder {out.parent} of output {out.name} is not writable")
    names = [rejected_path(out).name, _partial_folder(out).name, *(files_path(path).name for path in paths)]
    longest = max(len(os.fsencode(name)) for name in names)
    if longest > LONGEST_NAME:
        raise UserError(
            f"output name {out.name[:40]}… is {longest - LONGEST_NAME} bytes too long for the files that go with it; "
            f"shorten it"
        )


def _old_files(task: _Task) -> list[Path]:
    """Files of earlier sets of these names, single or sharded."""
    heads = {task.out, *(output.path for output in task.outputs)}
    with contextlib.suppress(UserError):
        heads |= {task.out.with_name(name) for name in (read_index(task.out) or {}).get("shards", [])}
    candidates = {path for head in heads for path in (head, sidecar_path(head), files_path(head))}
    return sorted(path for path in candidates if path.exists())


def _is_there(task: _Task) -> bool:
    """Whether all outputs exist and are what this job would write."""
    heads = {task.out, *(output.path for output in task.outputs)}
    if not all(read_json(sidecar_path(head)).get("job") == task.job_id for head in heads):
        return False
    sizes = [(output.path, read_json(sidecar_path(output.path)).get("bytes")) for output in task.outputs]
    return all(path.exists() and path.stat().st_size == size for path, size in sizes)


def _refuse_existing(task: _Task, overwrite: bool) -> None:
    old = _old_files(task)
    if old and not overwrite:
        raise UserError(f"output {old[0]} exists; use --overwrite to replace it, or another name")


@contextlib.contextmanager
def readable_write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left in {out.parent} while writing {out.name}; free some, then run the same command again "
                f"to continue ({_partial_folder(out)} holds what is done; delete it to give up)"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"folder {out.parent} of output {out.name} is not writable ({error.strerror})") from error
        raise


# ------------------------------------------------------------------------------------------------------- encoding
def _plan_chunks(outputs: Sequence[Output], options: WriteOptions) -> list[tuple[int, Array]]:
    """(output, source indices) of each chunk; no chunk spans outputs."""
    size = CHUNK if 0 < options.max_resolution <= LARGE_SIDE or options.write_mode == "jpg" else SMALL_CHUNK
    return [
        (k, output.indices[start : start + size])
        for k, output in enumerate(outputs)
        for start in range(0, len(output.indices), size)
    ]


def _encode_all(task: _Task, job: Job, chunks: list[tuple[int, Array]], num_workers: int, lock: int) -> None:
    """Encode what is not done yet and append it in order.

    **Raises:** `UserError` if a process dies, as it does when memory runs out; `KeyboardInterrupt` if told to stop.
    """
    todo, done = chunks[job.chunks :], sum(len(indices) for _, indices in chunks[: job.chunks])
    if done:
        print(f"going on after {done} of {task.total} images", flush=True)
    if not todo:
        return
    workers = min(count_workers(num_workers), len(todo))
    pool = ProcessPoolExecutor(workers, fork, initializer=_enter_worker, initargs=(task.source, task.options, lock))
    with pool, progress_bar(task.total, "prepare", "img", initial=done) as bar, asked_to_stop() as stopping:
        try:
            results = in_order(pool, _encode_chunk, [indices for _, indices in todo], workers * AHEAD)
            for (part, indices), chunk in zip(todo, results, strict=True):
                job.append(part, chunk)
                bar.update(len(indices))
                if job.rejected:
                    bar.set_postfix_str(f"{len(job.rejected)} unreadable", refresh=False)
                if stopping():
                    raise KeyboardInterrupt
            job.commit()
        except BaseException as error:
            with contextlib.suppress(OSError):
                job.commit()
            _explain(error, sum(len(indices) for _, indices in chunks[: job.chunks]), task.total)
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # and waits: nobody may hold the lock afterwards


def _explain(error: BaseException, done: int, total: int) -> None:
    if isinstance(error, KeyboardInterrupt):
        print(f"\nstopped after {done} of {total} images; run the same command again to continue", file=sys.stderr)
    if isinstance(error, (BrokenProcessPool, MemoryError)):
        raise UserError(
            f"a process that reads images died after {done} of {total}, most likely for want of memory; run the same "
            f"command again with fewer --num_workers (or a lower --max_pixels) to continue"
        ) from error


_source: Any = None
_options = WriteOptions()


def _enter_worker(source: Samples, options: WriteOptions, lock: int) -> None:
    """Start of every process: one thread each."""
    global _source, _options
    become_worker(lock)
    import cv2

    _source, _options = source, options
    cv2.setNumThreads(0)
    Image.MAX_IMAGE_PIXELS = None  # ours takes its place: PIL only warns until twice the limit
    warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files


def _encode_chunk(indices: Array) -> Chunk:
    import cv2

    draws = uniforms(key_of(_options.seed, DRAWS, 0), indices, 1)[:, 0]
    accepted: list[tuple[int, int, Stored]] = []
    rejected = []
    for index, draw in zip(indices.tolist(), draws.tolist(), strict=True):
        try:
            image, label = _source.sample(index)
            accepted.append((index, label, encode(image, _options, draw)))
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # decoders raise nearly anything for damaged files
            if getattr(error, "code", None) == cv2.Error.StsNoMem:
                raise MemoryError(str(error)) from error
            rejected.append((index, reason_of(error)))
    columns = np.array([row[:2] for row in accepted], np.int64).reshape(-1, 2)
    return Chunk(columns[:, 0], columns[:, 1], [row[2] for row in accepted], rejected)


# ------------------------------------------------------------------------------------------------------- the end
def count_allowed(max_rejected: float, total: int) -> int:
    return int(max_rejected * total) if max_rejected < 1 else int(max_rejected)


def _settle_rejected(task: _Task, job: Job, max_rejected: float) -> None:
    """Write (or clear away) `OUT.rejected.csv`, and stop if too many samples are on it, or all."""
    path, total, allowed = rejected_path(task.out), task.total, count_allowed(max_rejected, task.total)
    path.unlink(missing_ok=True)
    if job.rejected:
        write_csv(path, ("path", "reason"), ((task.source.where(i), why) for i, why in sorted(job.rejected)))
    if len(job.rejected) == total:
        job.discard()
        raise UserError(f"there is no readable image at all{f'; {path} says why' if job.rejected else ''}")
    if len(job.rejected) > allowed:
        raise UserError(
            f"{len(job.rejected)} of {total} images cannot be read, --max_rejected {max_rejected:g} allows {allowed}; "
            f"{path} lists them with reasons: repair or remove them, or raise --max_rejected (nothing is read twice)"
        )


def _finish(task: _Task, job: Job, num_workers: int) -> None:
    """Complete every file and its sidecars in the partial folder, and write down what is to be moved."""
    for part, output in zip(job.parts, task.outputs, strict=True):
        if not part.totals.samples:
            raise UserError(f"{output.path.name} would hold no readable image; use fewer --shards or a larger split")
    records = [part.finish() for part in job.parts]
    digests = _hash_all([part.path for part in job.parts], num_workers)
    names, sidecars, merged, shards = [], [], Totals(), []
    grey = task.options.grey or not any(part.totals.coloured for part in job.parts)  # one answer for all files
    for part, output, rows, digest in zip(job.parts, task.outputs, records, digests, strict=True):
        sidecar = _sidecar(task, part, rows, grey) | {"sha256": digest, "num_rejected": _count_rejected(job, output)}
        write_csv(files_path(part.path), ("path",), ((task.source.name(i),) for i in rows["index"].tolist()))
        write_json(sidecar_path(part.path), sidecar)
        names += [part.path.name, files_path(part.path).name]
        sidecars.append(sidecar_path(part.path).name)
        if output.shard:
            merged.merge(part.totals)
            shards.append(sidecar)
    if shards:
        index = sidecar_path(job.folder / task.out.name)
        write_json(index, _index(task, shards, merged, grey))
        sidecars.append(index.name)
    sync_path(job.folder)
    job.plan_publishing(names + sidecars, [path.name for path in _old_files(task)])


def _count_rejected(job: Job, output: Output) -> int:
    return int(np.isin([index for index, _ in job.rejected], output.indices).sum())


def _hash_all(paths: Sequence[Path], num_workers: int) -> list[str]:
    with byte_bar(sum(path.stat().st_size for path in paths), "hash") as bar:
        with ThreadPoolExecutor(min(count_workers(num_workers), len(paths))) as pool:
            return list(pool.map(lambda path: hash_file(path, bar.update), paths))


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sync_path(path)


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


def _sidecar(task: _Task, part: PartFile, records: Array, grey: bool) -> dict[str, Any]:
    image = records["image"]
    return {
        "format": "ffcv",
        "num_samples": len(records),
        "num_rejected": 0,
        **statistics(part.totals, grey),
        "classes": list(task.classes),
        "counts": np.bincount(records["label"], minlength=len(task.classes)).tolist(),
        "max_height": int(image["height"].max()),
        "max_width": int(image["width"].max()),
        "kept_jpegs": part.totals.kept,
        "bytes": part.path.stat().st_size,
        "sha256": "",
        **_common(task),
    }


def _index(task: _Task, shards: list[dict[str, Any]], totals: Totals, grey: bool) -> dict[str, Any]:
    """The index of a sharded set."""
    return {
        "format": SHARDED,
        "shards": [output.path.name for output in task.outputs if output.shard],
        **{name: sum(shard[name] for shard in shards) for name in ("num_samples", "num_rejected")},
        **statistics(totals, grey),
        "classes": list(task.classes),
        "counts": np.sum([shard["counts"] for shard in shards], 0).tolist(),
        **{name: max(shard[name] for shard in shards) for name in ("max_height", "max_width")},
        **{name: sum(shard[name] for shard in shards) for name in ("kept_jpegs", "bytes")},
        **_common(task),
    }


def _common(task: _Task) -> dict[str, Any]:
    return {
        "options": asdict(task.options),
        "versions": {"fasthpm": __version__, "python": sys.version.split()[0]}
        | package_versions("ffcv", "numpy", "pillow", "opencv-python"),
        "job": task.job_id,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
