"""What a dense task leaves: result.json, result.md with a row per class, and what the command gives back."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm.dense import tuning
from fasthpm.dense.task import Task
from fasthpm.entry import Result
from fasthpm.probes import result

NETWORK_FILE = "network.safetensors"


@dataclass(frozen=True, repr=False)
class DenseResult(Result):
    """What the training of a dense task, or a test of one, has come to."""

    output_dir: Path
    finished: bool  # False: stopped before its last update; the same call continues
    figures: dict[str, float]  # in percent, and more; {} unless it is finished
    classes: list[dict[str, Any]]  # a row per class
    network: Path | None
    picture: Path | None


def report(task: Task, settings: Any, origin: dict[str, Any], folder: Path, figures: dict[str, Any]) -> DenseResult:
    """Write result.json and result.md, say the figures and where they are."""
    table = tuning.table_of(folder)
    network, picture = folder / NETWORK_FILE, folder / tuning.PICTURE_FILE
    drawn = settings.pictures and picture.is_file()  # else it is of an earlier test
    from_scratch = ", from scratch" if settings.from_scratch else ""
    made = {
        "protocol": f"{task.name}, {settings.steps} updates of {settings.global_batch_size}{from_scratch}",
        **figures,
        **origin,
        "settings": dataclasses.asdict(settings),
        "classes": table,
    }
    shown = ("recipe", "protocol", *task.shown, "effective_epochs", "pretraining_gpu_hours", "gpu_hours")
    row = result.write_result(folder, made, shown, per_class(table))
    said = ", ".join(f"{name} {figures[name]:.2f} %" for name in task.shown if name in figures)
    print(f"{made['protocol']}: {said}\n{row}")
    print(f"written to {folder / 'result.json'}", file=sys.stderr)
    if drawn:
        print(f"images, truth and prediction: {picture}", file=sys.stderr)
    written = network.is_file() and not settings.evaluate
    return DenseResult(folder, True, figures, table, network if written else None, picture if drawn else None)


def per_class(table: list[dict[str, Any]]) -> str:
    """The rows of classes as Markdown; empty without any."""
    if not table:
        return ""
    names = list(table[0])
    rows = [f"| {' | '.join('' if row[n] is None else _cell(row[n]) for n in names)} |" for row in table]
    return "\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows]) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
