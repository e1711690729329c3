"""What every evaluation shares: sets of data that fit together, and results that say how they were made.

An evaluation leaves `result.json` (protocol, accuracy, versions, checkpoint, cost) and `result.md`, one row of a table.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fasthpm import checkpoint, files, ranks
from fasthpm.checkpoint.foreign import IMPORT_NOTE
from fasthpm.data import DatasetInfo, read_info
from fasthpm.errors import UserError, unlike
from fasthpm.recipe import Recipe, load_recipe
from fasthpm.run.records import METRICS_FILE, gpu_hours, read_records
from fasthpm.run.versions import versions

SHOWN = ("recipe", "protocol", "accuracy", "effective_epochs", "pretraining_gpu_hours", "gpu_hours", "checkpoint_hash")


# -------------------------------------------------------------------------------------------------- data
def check_sets(train: tuple[str, DatasetInfo], val: tuple[str, DatasetInfo]) -> None:
    """Refuse sets that no classifier can be trained and tested on; each is (path, what it holds).

    **Raises:** `UserError` for one class only (which is what a set without labels has), for unlabelled samples and for
    different classes.
    """
    for path, info in (train, val):
        if info.unlabelled:
            raise UserError(
                f"{info.unlabelled} of {info.num_samples} samples of {path} are unlabelled (label -1), and a probe "
                f"needs labels; prepare it without them, with --classes FILE"
            )
        if len(info.classes) < 2:
            name = f" ({info.classes[0]})" if info.classes else ""
            raise UserError(
                f"{path} has {len(info.classes)} class{name}, expected 2 or more; labels are missing: prepare it from "
                f"a folder per class or a list with labels"
            )
    if train[1].classes != val[1].classes:
        what = unlike(train[0], train[1].classes, val[0], val[1].classes)
        raise UserError(f"{what}; expected two splits of the same data set")


def check_labels(labels: Tensor, path: str, num_classes: int, *, several: bool = True) -> None:
    """Refuse labels, int64 [N], outside 0 .. num_classes - 1, and, with `several`, only one class among them.

    **Raises:** `UserError` naming the set.
    """
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        count = int((labels == wrong).sum())
        raise UserError(
            f"{path} has the label {wrong}, expected 0 to {num_classes - 1}; labels are missing or belong to other "
            f"classes ({count} of {len(labels)} samples): prepare it again"
        )
    if several and low == high:
        raise UserError(f"all {len(labels)} samples of {path} have the label {low}; a probe needs two classes or more")


# -------------------------------------------------------------------------------------------------- provenance
def provenance(run: Path, launch: ranks.Launch) -> dict[str, Any]:
    """Where an evaluated encoder comes from: recipe, checkpoint and its hash, what it cost, software.

    - `checkpoint_hash`: sha256 of the checkpoint's manifest, which holds the hashes of all its files
    - `effective_epochs`: see `effective_epochs`; `pretraining_gpu_hours`: devices times hours, of the run's own log

    **Raises:** `UserError` for a checkpoint that does not say its update; ask before the work.
    """
    folder = checkpoint.checkpoint_of(run)
    recipe = load_recipe(folder / checkpoint.RECIPE)
    manifest = folder / checkpoint.MANIFEST
    step = 0 if (folder / IMPORT_NOTE).is_file() else checkpoint.read_state(folder).step
    return {
        "run": str(run),
        "recipe": recipe.recipe,
        "checkpoint": str(folder),
        "checkpoint_hash": files.file_hash(manifest) if manifest.is_file() else "",
        "effective_epochs": round(effective_epochs(recipe, step), 3),
        "pretraining_gpu_hours": round(pretraining_gpu_hours(checkpoint.run_of(folder), recipe, step), 4),
        "versions": versions(launch.device, launch.world_size),
    }


def effective_epochs(recipe: Recipe, step: int) -> float:
    """Epochs over the data set times the views of an image per epoch, as iBOT counts (Zhou et al. 2022, appendix).

    Masked autoencoders train on one full-size crop, so that the factor is 1; the teacher's pass is over the same crop.
    Epochs of recipes with `steps_per_epoch` may be parts of a pass; the data set, if it is still there, tells.
    """
    try:
        samples = read_info(recipe.data_path).num_samples
    except UserError:
        return step / max(recipe.steps_per_epoch, 1)
    return step * recipe.global_batch_size / samples


def pretraining_gpu_hours(run: Path, recipe: Recipe, step: int) -> float:
    """Devices x hours of the updates up to `step`, from the throughput in metrics.jsonl; 0 if there is none."""
    records = [record for record in read_records(run / METRICS_FILE) if record["step"] <= step]
    world_size = files.read_json(run / "versions.json").get("world_size", 0)
    return gpu_hours(records, recipe.global_batch_size, world_size)[-1] if records else 0.0


# -------------------------------------------------------------------------------------------------- files
def write_text(path: Path, text: str) -> None:
    """Write `path` in one go: aside, then renamed.

    **Raises:** `UserError` if the disk does not take it.
    """
    with files.writing(path, "choose another output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)


def write_result(folder: Path, result: dict[str, Any], shown: Sequence[str] = SHOWN, more: str = "") -> str:
    """Write `folder`/result.json and result.md. **Returns:** the row of Markdown.

    - `shown`: its columns; `more`: what stands below it
    """
    write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    row = markdown_row(result, shown)
    head = f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n"
    write_text(folder / "result.md", f"{head}{row}\n" + (f"\n{more}" if more else ""))
    return row


def markdown_row(result: dict[str, Any], shown: Sequence[str] = SHOWN) -> str:
    """One row with the columns `shown`."""
    return f"| {' | '.join(_cell(result.get(name)) for name in shown)} |"


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # k-NN: an accuracy per k
        best = max(value, key=lambda k: value[k])
        return f"{value[best]:.2f} (k={best})"
    if isinstance(value, float):
        return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str("" if value is None else value)


# -------------------------------------------------------------------------------------------------- counting
def top_accuracy(hits: Tensor, total: Tensor) -> float:
    """Percent, of counts summed over ranks already."""
    return 100 * float(hits.double() / total.double().clamp_min(1))


def count_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of `labels` [B] are among the k largest of `logits` [B, K]: int64 0-dim."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(1).sum()
