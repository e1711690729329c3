"""metrics.jsonl: what a training has measured, a line of JSON per reading."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fasthpm.errors import UserError
from fasthpm.files import write_text

METRICS_FILE = "metrics.jsonl"


def append_line(path: Path, line: str) -> None:
    """Add a line to a file; what a killed process left unfinished at its end stays a line of its own.

    **Raises:** `OSError` if the disk does not take all of it; then the file is as before.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        unfinished = file.read(1) not in (b"", b"\n")
        rest = f"{chr(10) * unfinished}{line}\n".encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order, the last of each update number: a resumed run repeats some.

    Lines that a killed run left unfinished are passed over, and damaged ones; without a file there are no records.
    """
    records = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int | float):
                records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def cut_records(path: Path, step: int) -> None:
    """Leave in a metrics.jsonl the records up to update `step`, each once: what a run goes on from there repeats.

    **Raises:** `OSError` if the disk does not take it; then the file is as before.
    """
    if not path.is_file():
        return
    kept = {record["step"]: json.dumps(record) for record in read_records(path) if record["step"] <= step}
    text = "".join(f"{line}\n" for line in kept.values())
    if text != path.read_text(errors="replace"):
        write_text(path, text)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, at least one. **Raises:** `UserError` if there are none."""
    path = run / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the output_dir of a run that has logged something")
    records = read_records(path)
    if not records:
        raise UserError(f"{path} is empty; expected at least one record")
    return records


def latest(records: Sequence[dict[str, Any]], name: str, step: float = float("inf")) -> dict[str, Any]:
    """The last record at or before update `step` that has the figure `name`, which not every record does; {} if none
    has."""
    return next((record for record in reversed(records) if record["step"] <= step and name in record), {})


def gpu_hours(records: Sequence[dict[str, Any]], global_batch_size: int, world_size: int) -> list[float]:
    """GPU-hours (devices x hours) of the updates up to each record, from the rates that were logged."""
    seconds, step, out = 0.0, 0.0, []
    for record in records:
        rate = record.get("images_per_second", 0.0)
        seconds += (record["step"] - step) * global_batch_size / rate if rate > 0 else 0.0
        step = record["step"]
        out.append(seconds * world_size / 3600)
    return out
