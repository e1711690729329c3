"""`prepare`: a source of images into prepared sets, in one pass, resumable, in bounded memory.

Processes read, check and encode chunks of samples; this one appends what comes back, in order, to unfinished files
beside the output (`partial.py`). The bytes of the result depend on the source and the options alone, not on the number
of processes or on kills. Sets appear under their names when all is complete, sidecar last.
"""

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.array_form import CHUNK_BYTES, ArrayPart, clip_limits, compile_ahead, encode_chunk, enter_worker
from data_prep.changes import ArrayOptions
from data_prep.cuts import LittleContent
from data_prep.encode import Stored, WriteOptions, check_opencv, encode
from data_prep.partial import Chunk, Job, PartFile, locked, readable_write_errors
from data_prep.plan import (
    Output,
    Task,
    contents_of,
    count_allowed,
    describe_job,
    partial_folder,
    refuse_changed,
    stored_order,
)
from data_prep.pool import Work, append_all, become_worker, reason_of
from data_prep.samples import Samples
from data_prep.sets import byte_bar, notes_path, read_index, rejected_path, write_csv
from data_prep.sidecars import index_of, pixel_facts, sidecar_of
from fasthpm.data.ffcv.beton import files_path, sidecar_path
from fasthpm.data.keys import Stream
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array, key_of, uniforms
from fasthpm.errors import UserError
from fasthpm.files import LONGEST_NAME, check_above, file_hash, fsync, read_json, write_json

CHUNK, SMALL_CHUNK, LARGE_SIDE = 32, 4, 1024  # samples handed to a process at a time; fewer where they may be large


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
    options: WriteOptions | ArrayOptions,
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
    description = describe_job(source, classes, outputs, options)
    task = Task(source, out, classes, outputs, options, description, contents_of(source))
    folder = partial_folder(out)
    with readable_write_errors(out, folder), locked(folder) as lock:
        job = _new_job(task)
        try:
            return _prepare(task, job, lock, max_rejected, num_workers, overwrite)
        finally:
            if not job.has_progress() or source.fingerprint() is None:
                job.discard()
            job.close()


def _new_job(task: Task) -> Job:
    folder = partial_folder(task.out)
    return Job(
        folder, [_new_part(task, folder / out.path.name, len(out.indices)) for out in task.outputs], task.contents
    )


def _new_part(task: Task, path: Path, num_listed: int) -> PartFile:
    if isinstance(task.options, ArrayOptions):
        return ArrayPart(path, num_listed, task.options)
    return PartFile(path, num_listed)


def _prepare(
    task: Task, job: Job, lock: int, max_rejected: float, num_workers: int, overwrite: bool
) -> dict[str, Any] | None:
    if not job.is_complete(task.description):
        if _is_there(task) and not overwrite:
            refuse_changed(task.out, read_json(sidecar_path(task.out)), task.contents)
            return None
        _refuse_existing(task, overwrite)
        chunks = _plan_chunks(task.outputs, task.options)
        _resume(task, job, len(chunks), count_allowed(max_rejected, task.total))
        limits = None
        if isinstance(task.options, ArrayOptions):
            limits = clip_limits(task.source, task.options, job.folder, chunks, lock, num_workers)
        append_all(job, _work(task, lock, limits), chunks[job.chunks :], task.total, num_workers)
        _settle_rejected(task, job, max_rejected)
        _finish(task, job, num_workers, limits)
    job.publish()
    return read_json(sidecar_path(task.out))


def _work(task: Task, lock: int, limits: Array | None) -> Work:
    words = ("images", "img", "unreadable", "--max_pixels")
    if isinstance(task.options, ArrayOptions):
        compile_ahead(task.options)
        return Work(encode_chunk, enter_worker, (task.source, task.options, lock, limits), *words, CHUNK_BYTES)
    return Work(_encode_chunk, _enter_worker, (task.source, task.options, lock), *words)


def _resume(task: Task, job: Job, chunks: int, allowed: int) -> None:
    """Find out what is done already, and say so where it does not help."""

    def useless() -> str:
        if job.chunks == chunks and len(job.rejected) > allowed:
            return f"all images were read before, {len(job.rejected)} of them unreadable"
        return ""

    job.resume_same(task.description, useless)


# ------------------------------------------------------------------------------------------------------- outputs
def check_output(out: Path, paths: Sequence[Path]) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    if out.suffix != ".beton":
        raise UserError(f"output {out} does not end in .beton; use e.g. {out.with_suffix('.beton')}")
    check_above(out, "output")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} of output {out.name} does not exist; create it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"folder {out.parent} of output {out.name} is not writable")
    names = [
        rejected_path(out).name,
        notes_path(out).name,
        partial_folder(out).name,
        *(files_path(path).name for path in paths),
    ]
    longest = max(len(os.fsencode(name)) for name in names)
    if longest > LONGEST_NAME:
        raise UserError(
            f"output name {out.name[:40]}… is {longest - LONGEST_NAME} bytes too long for the files that go with it; "
            f"shorten it"
        )
    written = (*paths, *(aside(path) for path in paths for aside in (sidecar_path, files_path)), rejected_path(out))
    folder = next((path for path in (out, *written) if path.is_dir()), None)
    if folder is not None:
        raise UserError(f"output {folder} is a folder, expected a file to write; remove it, or choose another name")
    if partial_folder(out).exists() and not partial_folder(out).is_dir():
        raise UserError(f"{partial_folder(out)} is a file where unfinished work goes; remove it")


def _old_files(task: Task) -> list[Path]:
    """Files of earlier sets of these names, single or sharded."""
    heads = {task.out, *(output.path for output in task.outputs)}
    with contextlib.suppress(UserError):
        heads |= {task.out.with_name(name) for name in (read_index(task.out) or {}).get("shards", [])}
    candidates = {path for head in heads for path in (head, sidecar_path(head), files_path(head))} | {
        notes_path(task.out)
    }
    return sorted(path for path in candidates if path.exists())


def _is_there(task: Task) -> bool:
    """Whether all outputs exist and are what this job would write."""
    heads = {task.out, *(output.path for output in task.outputs)}
    if not all(read_json(sidecar_path(head)).get("job") == task.job_id for head in heads):
        return False
    sizes = [(output.path, read_json(sidecar_path(output.path)).get("bytes")) for output in task.outputs]
    return all(path.exists() and path.stat().st_size == size for path, size in sizes)


def _refuse_existing(task: Task, overwrite: bool) -> None:
    old = _old_files(task)
    if old and not overwrite:
        raise UserError(f"output {old[0]} exists; use --overwrite to replace it, or another name")


# ------------------------------------------------------------------------------------------------------- encoding
def _plan_chunks(outputs: Sequence[Output], options: WriteOptions | ArrayOptions) -> list[tuple[int, Array]]:
    """(output, source indices) of each chunk; no chunk spans outputs."""
    if isinstance(options, ArrayOptions):
        size = options.chunk
    else:
        size = CHUNK if 0 < options.max_resolution <= LARGE_SIDE or options.write_mode == "jpg" else SMALL_CHUNK
    return [
        (k, output.indices[start : start + size])
        for k, output in enumerate(outputs)
        for start in range(0, len(output.indices), size)
    ]


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


def _encode_chunk(indices: Array) -> Chunk:
    import cv2

    draws = uniforms(key_of(_options.seed, Stream.PROPORTION, Stream.PREPARATION), indices, 1)[:, 0]
    accepted: list[tuple[int, int, Stored]] = []
    rejected, skipped = [], 0
    for index, draw in zip(indices.tolist(), draws.tolist(), strict=True):
        try:
            image, label = _source.sample(index)
            accepted.append((index, label, encode(image, _options, draw)))
        except LittleContent:
            skipped += 1
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # decoders raise nearly anything for damaged files
            if getattr(error, "code", None) == cv2.Error.StsNoMem:
                raise MemoryError(str(error)) from error
            rejected.append((index, reason_of(error)))
    columns = np.array([row[:2] for row in accepted], np.int64).reshape(-1, 2)
    notes = [(index, note) for index, _, stored in accepted for note in stored.notes]
    return Chunk(columns[:, 0], columns[:, 1], [row[2] for row in accepted], rejected, notes, skipped=skipped)


# ------------------------------------------------------------------------------------------------------- the end
def _settle_rejected(task: Task, job: Job, max_rejected: float) -> None:
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


def _finish(task: Task, job: Job, num_workers: int, limits: Array | None = None) -> None:
    """Complete every file and its sidecars in the partial folder, and write down what is to be moved."""
    for part, output in zip(job.parts, task.outputs, strict=True):
        if not part.totals.samples and part.totals.skipped:
            raise UserError(f"{output.path.name} would hold no tile: all have too little content; lower --min_content")
        if not part.totals.samples:
            raise UserError(f"{output.path.name} would hold no readable image; use fewer --shards or a larger split")
    records = [part.finish() for part in job.parts]
    digests = _hash_all([part.path for part in job.parts], num_workers)
    names, sidecars, shards = [], [], []
    facts = pixel_facts(task, job.parts, limits)
    columns, places = getattr(task.source, "columns", ()), getattr(task.source, "place", lambda index: ())
    for part, output, rows, digest in zip(job.parts, task.outputs, records, digests, strict=True):
        left_out = {"sha256": digest, "num_rejected": _count_rejected(job, output)}
        sidecar = sidecar_of(task, part, rows, facts) | left_out
        listed = ((task.source.name(i), *places(i)) for i in rows["index"].tolist())
        write_csv(files_path(part.path), ("path", *columns), listed)
        write_json(sidecar_path(part.path), sidecar, durable=True)
        names += [part.path.name, files_path(part.path).name]
        sidecars.append(sidecar_path(part.path).name)
        if output.shard:
            shards.append((part, sidecar))
    if shards:
        index = sidecar_path(job.folder / task.out.name)
        write_json(index, index_of(task, shards, facts), durable=True)
        sidecars.append(index.name)
    if job.facts:
        path = notes_path(job.folder / task.out.name)
        write_csv(path, ("path", "note"), ((task.source.where(i), note) for i, note in sorted(map(tuple, job.facts))))
        names.append(path.name)
    fsync(job.folder)
    job.plan_publishing(names + sidecars, [path.name for path in _old_files(task)])


def _count_rejected(job: Job, output: Output) -> int:
    return int(np.isin([index for index, _ in job.rejected], output.indices).sum())


def _hash_all(paths: Sequence[Path], num_workers: int) -> list[str]:
    with byte_bar(sum(path.stat().st_size for path in paths), "hash") as bar:
        with ThreadPoolExecutor(min(count_workers(num_workers), len(paths))) as pool:
            return list(pool.map(lambda path: file_hash(path, bar.update), paths))
