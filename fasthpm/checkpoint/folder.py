"""Checkpoints: written aside, hashed, renamed; found, verified, resumed; exported to and imported from other code.

OUT/checkpoints/step-00001200/
    shards/rank-00000.safetensors …   masters, optimizer moments and EMA as each rank holds them (see shards.py)
    recipe.json, state.json (position of the run), manifest.json (size and sha256 of every file; written last)
Instead of shards/ a folder may hold student.safetensors and teacher.safetensors: weights alone, nothing to resume.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthpm.checkpoint.foreign import IMPORT_NOTE
from fasthpm.errors import UserError
from fasthpm.files import file_hash, fsync
from fasthpm.recipe import Recipe, load_recipe, save_recipe

MANIFEST, STATE, RECIPE = "manifest.json", "state.json", "recipe.json"
CLASSIFIER = "finetune.json"  # in checkpoints of fine-tuning, which hold a classifier and no decoder
WRITING = ".writing-"
BYTES_PER_PARAMETER = 17  # float32 master, two moments and EMA; a little for names and hashes


@dataclass(frozen=True)
class RunState:
    """Where a run stands between two updates; everything else follows from the recipe."""

    step: int  # updates done
    loader: dict[str, Any]  # the loader's state_dict
    world_size: int  # ranks that wrote it
    accum_iter: int  # the loader's batches per update
    skipped: list[int] = field(default_factory=list)  # updates (from 0) that were left out: not finite


# -------------------------------------------------------------------------------------------------- write
def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return output_dir / "checkpoints" / f"step-{step:08d}"


def begin(output_dir: Path, step: int) -> Path:
    """An empty folder beside the final one, to write a checkpoint into (one rank calls this)."""
    folder = checkpoint_path(output_dir, step)
    aside = folder.with_name(f"{WRITING}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, recipe: Recipe, state: RunState, written: dict[str, Any] | None = None) -> Path:
    """Complete what the ranks wrote into `aside`, hash it, and move it to its final name (one rank calls this).

    - `written`: {file: [bytes, sha256]} of files that are hashed and synced already

    **Returns:** the checkpoint's folder. A reader never sees it half-written.
    """
    save_recipe(recipe, aside / RECIPE)
    (aside / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    manifest = dict(written or {})
    names = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
    rest = [name for name in names if name not in manifest]
    manifest |= {name: [(aside / name).stat().st_size, file_hash(aside / name)] for name in rest}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for name in [*rest, MANIFEST]:
        fsync(aside / name)
    final = aside.with_name(aside.name.removeprefix(WRITING))
    if final.exists():  # only an invalid checkpoint of the same step can be here: resume would have started from it
        shutil.rmtree(final)
    aside.rename(final)
    fsync(final.parent)
    return final


def clear_unfinished(output_dir: Path) -> None:
    """Delete what killed runs left half-written."""
    for folder in (output_dir / "checkpoints").glob(f"{WRITING}*"):
        shutil.rmtree(folder)


def require_space(output_dir: Path, parameters: int) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold; what is there stays untouched.

    - `parameters`: of the student

    **Raises:** `UserError` naming the space needed and the space there is.
    """
    needed, free = parameters * BYTES_PER_PARAMETER, shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"output_dir {output_dir} has {free / 2**30:.2f} GiB left and a checkpoint needs about "
            f"{needed / 2**30:.2f} GiB; free some space or use another --output_dir, then start again to resume"
        )


def rotate(output_dir: Path, keep: int, *, newest: Path | None = None, every: int = 0) -> None:
    """Delete all but the `keep` newest checkpoints.

    - `newest`: the one just written; any of a later update is damaged, or resume would have begun there, and must not
      take its place
    - `every`: updates between two that are kept for ever; 0 = none
    """
    folders = [folder for folder in _checkpoints(output_dir) if newest is None or step_of(folder) <= step_of(newest)]
    for folder in folders[keep:]:
        if not every or step_of(folder) % every or not step_of(folder):
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """Updates done at a checkpoint, by its name."""
    return int(folder.name.rpartition("-")[2])


def oldest_step(output_dir: Path) -> int:
    """Updates of the oldest checkpoint that is kept; 0 without any."""
    folders = _checkpoints(output_dir)
    return step_of(folders[-1]) if folders else 0


# -------------------------------------------------------------------------------------------------- find and verify
def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    folders = (output_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if f.name.removeprefix("step-").isdecimal()), key=step_of, reverse=True)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (size, digest) in manifest.items():
        path = folder / name
        if ".." in path.parts or not path.is_relative_to(folder):  # it may be someone else's
            return f"{MANIFEST} leads out of the checkpoint, to {name}"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or file_hash(path) != digest:
            return f"{name} does not match its hash"
    return ""


def newest_valid(output_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all match their hashes; those passed over are named through `warn`."""
    for folder in _checkpoints(output_dir):
        problem = damage(folder)
        if not problem:
            return folder
        warn(f"checkpoint {folder} is damaged ({problem}); trying the one before")
    return None


def find_resume(recipe: Recipe, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that `recipe.resume` means, or None to start afresh.

    **Raises:** `UserError` for a missing or damaged checkpoint that was named, and for checkpoints that would be mixed
    with those of a fresh run.
    """
    output_dir = Path(recipe.output_dir)
    if recipe.resume == "none":
        if _checkpoints(output_dir):
            raise UserError(
                f"output_dir {output_dir} already holds checkpoints and --resume is none; use another --output_dir, "
                f"or --resume auto to continue"
            )
        return None
    if recipe.resume == "auto":
        return with_training_state(newest_valid(output_dir, warn))
    folder = Path(recipe.resume)
    problem = damage(folder)
    if problem:
        raise UserError(f"--resume {folder}: {problem}; expected a folder like OUT/checkpoints/step-00001200")
    return with_training_state(folder)


def with_training_state(folder: Path | None) -> Path | None:
    """`folder`. **Raises:** `UserError` if it holds imported weights, which start a run and do not continue one."""
    if folder and (folder / IMPORT_NOTE).is_file():
        raise UserError(
            f"{folder} holds imported weights and no optimizer state to resume; start a run from them with --init_from "
            f"{folder.parent.parent} and another --output_dir"
        )
    return folder


def read_state(folder: Path) -> RunState:
    """Position of a checkpoint."""
    return RunState(**json.loads((folder / STATE).read_text()))


def continued(recipe: Recipe, world_size: int) -> Recipe:
    """`recipe` with the global batch of the run that output_dir holds, whatever the number of devices is now.

    Without a run there, or with another `global_batch_size` asked for, the recipe comes back as it is. The batch per
    device shrinks, if it must, to one that divides the global batch; accumulation follows.

    **Raises:** `UserError` if the devices do not divide the global batch.
    """
    path = Path(recipe.output_dir) / RECIPE
    if not path.is_file():
        return recipe
    total = load_recipe(path).global_batch_size
    if recipe.global_batch_size not in (0, total):
        return recipe
    if total % world_size:
        raise UserError(
            f"the run in {recipe.output_dir} has a global batch of {total}, which {world_size} devices do not divide; "
            f"use a number of devices that does, or another --output_dir"
        )
    share = total // world_size
    batch_size = max(size for size in range(1, min(recipe.batch_size, share) + 1) if share % size == 0)
    return dataclasses.replace(recipe, global_batch_size=total, batch_size=batch_size, accum_iter=share // batch_size)


def compare_recipes(recipe: Recipe, science: Callable[[Recipe], dict[str, Any]]) -> None:
    """Refuse an output folder that belongs to another recipe.

    **Raises:** `UserError` naming the first field that differs.
    """
    path = Path(recipe.output_dir) / RECIPE
    if not path.is_file():
        return
    theirs, ours = science(load_recipe(path)), science(recipe)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        name = different[0]
        raise UserError(
            f"output_dir {recipe.output_dir} belongs to a run with {name} {theirs[name]!r}, this one has "
            f"{ours[name]!r}; use another --output_dir, or --{name} {theirs[name]}"
        )


def cpu_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Float32 CPU copy of a state dict."""
    return {key: value.detach().float().cpu().clone() for key, value in model.state_dict().items()}
