"""What runs and evaluations wrote, read for their reports: whole, or one line that names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasthpm.errors import UserError
from fasthpm.run.records import METRICS_FILE, read_metrics

Kinds = type | tuple[type, ...]
NUMBER = (int, float)
OF_VERSIONS = ("device", "torch", "deepspeed", "fasthpm", "commit")
VERSIONS: dict[str, Kinds] = {"world_size": int, **dict.fromkeys(OF_VERSIONS, str)}
KNN: dict[str, Kinds] = {"bank_size": int, "pool": str, "weights": str, "accuracy": dict}


def read_object(path: Path, needs: Mapping[str, Kinds]) -> dict[str, Any]:
    """A JSON object with at least these names, and such values.

    **Raises:** `UserError` for a file that cannot be read, or is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    except ValueError as error:
        raise UserError(_damaged(path, str(error))) from error
    if not isinstance(values, dict):
        raise UserError(_damaged(path, f"it holds a {type(values).__name__}, not named values"))
    for name, kinds in needs.items():
        if not isinstance(values.get(name), kinds):
            raise UserError(_damaged(path, f"{name} is {values[name]!r}" if name in values else f"it lacks {name}"))
    return values


def read_knn(path: Path) -> dict[str, Any]:
    """A result of `fasthpm knn`: `KNN`, its accuracy by k. **Raises:** as `read_object`."""
    found = read_object(path, KNN)
    accuracy = found["accuracy"]
    if not accuracy or not all(isinstance(value, NUMBER) for value in accuracy.values()):
        raise UserError(_damaged(path, f"accuracy is {accuracy!r}"))
    if not isinstance(epochs := found.get("effective_epochs", 0), NUMBER):
        raise UserError(_damaged(path, f"effective_epochs is {epochs!r}"))
    return found


def read_figures(run: Path) -> list[dict[str, Any]]:
    """The records of a run, at least one; each has its epoch, and all that they hold is numbers, or null for none.

    **Raises:** `UserError` as `run.records.read_metrics`, and for other records.
    """
    records = read_metrics(run)
    for record in records:
        other = next((name for name, value in record.items() if not isinstance(value, (*NUMBER, type(None)))), "")
        if other or not isinstance(record.get("epoch"), NUMBER):
            what = f"whose {other} is no number" if other else "without an epoch"
            raise UserError(
                f"{run / METRICS_FILE} has a record {what}, of update {record['step']}; remove that line, or copy the "
                f"file again from where it is whole"
            )
    return [{name: value for name, value in record.items() if value is not None} for record in records]


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged ({reason}); copy it again from where it is whole, or remove it and make it anew"
