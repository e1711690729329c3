"""Checkpoints: written aside, hashed, renamed; found, verified, resumed; exported to and imported from other code.

OUT/checkpoints/step-00001200/
    deepspeed/            sharded masters, optimizer moments and EMA, as DeepSpeed writes them
    student.safetensors   float32 weights of the whole student, on their own (teacher.safetensors likewise)
    recipe.json, state.json (position of the run), manifest.json (size and sha256 of every file; written last)
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasthpm.errors import UserError
from fasthpm.foreign import IMPORT_NOTE, about
from fasthpm.foreign import load_reference as load_reference
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe, load_recipe, save_recipe
from fasthpm.step import model_of

MANIFEST, STATE, RECIPE = "manifest.json", "state.json", "recipe.json"
HASH_CHUNK = 1 << 22
# float32 master, two moments, EMA, student and teacher files; bf16 weights; a little for names and hashes.
BYTES_PER_PARAMETER = 27


@dataclass(frozen=True)
class RunState:
    """Where a run stands between two updates; everything else follows from the recipe."""

    step: int  # updates done
    loader: dict[str, Any]  # the loader's state_dict
    world_size: int  # ranks that wrote the sharded part


# -------------------------------------------------------------------------------------------------- write
def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return output_dir / "checkpoints" / f"step-{step:08d}"


def begin(output_dir: Path, step: int) -> Path:
    """An empty folder beside the final one, to write a checkpoint into (one rank calls this)."""
    folder = checkpoint_path(output_dir, step)
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, recipe: Recipe, state: RunState, weights: dict[str, dict[str, Tensor]]) -> Path:
    """Complete what the ranks wrote into `aside`, hash it, and move it to its final name (one rank calls this).

    - `weights`: {"student": …, "teacher": …} full float32 state dicts

    **Returns:** the checkpoint's folder. A reader never sees it half-written.
    """
    for name, tensors in weights.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside / f"{name}.safetensors")
    save_recipe(recipe, aside / RECIPE)
    (aside / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(aside)): [path.stat().st_size, file_hash(path)] for path in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, aside / MANIFEST]:
        _fsync(path)
    final = aside.with_name(aside.name.removeprefix(".writing-"))
    if final.exists():  # only an invalid checkpoint of the same step can be here: resume would have started from it
        shutil.rmtree(final)
    aside.rename(final)
    _fsync(final.parent)
    return final


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


def rotate(output_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for folder in _checkpoints(output_dir)[keep:]:
        shutil.rmtree(folder)


def file_hash(path: Path) -> str:
    """sha256 of a file, in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------------------------- find and verify
def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    return sorted((output_dir / "checkpoints").glob("step-*"), reverse=True)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (size, digest) in manifest.items():
        path = folder / name
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


def read_state(folder: Path, world_size: int) -> RunState:
    """Position of a checkpoint, checked against this run's number of ranks."""
    state = RunState(**json.loads((folder / STATE).read_text()))
    if state.world_size != world_size:
        raise UserError(
            f"checkpoint {folder} was written by {state.world_size} ranks and this run has {world_size}; start it on "
            f"{state.world_size}"
        )
    return state


# -------------------------------------------------------------------------------------------------- weights in and out
def load_weights(source: Path, which: str = "student") -> tuple[HPMViT, Recipe]:
    """The float32 model of a run (its newest valid checkpoint) or of one checkpoint, in eval mode.

    - `which`: "student" or "teacher" (the EMA); "untrained" gives the run's weights before the first update

    **Raises:** `UserError` if there is no such checkpoint or it has no teacher.
    """
    run = (source / "checkpoints").is_dir()
    folder = newest_valid(source, lambda line: print(f"warning: {line}", file=sys.stderr)) if run else source
    if folder is None or not (folder / RECIPE).is_file():
        raise UserError(
            f"{source} holds no valid checkpoint; expected the output_dir of a run or one of its "
            f"checkpoints/step-… folders"
        )
    recipe = load_recipe(folder / RECIPE)
    model = (initial_model(recipe) if which == "untrained" else model_of(recipe)).eval()
    if which != "untrained":
        path = folder / f"{which}.safetensors"
        if not path.is_file():
            raise UserError(f"{folder} has no {which} weights; use --weights student")
        model.load_state_dict(load_file(path), strict=True)
    return model, recipe


POSITION_TOLERANCE = 1e-3  # half-precision files round the fixed table


def initial_model(recipe: Recipe) -> HPMViT:
    """The model that a run starts from: drawn from its seed, or with the student's weights of `recipe.init_from`.

    A loss predictor that the source lacks (MAE) keeps its fresh weights.

    **Raises:** `UserError` if the weights do not fit the recipe's model, or were trained with other positions.
    """
    model = model_of(recipe)
    if not recipe.init_from:
        return model
    donor, _ = load_weights(Path(recipe.init_from))
    given = donor.state_dict()
    tables = {name: table for name, table in model.named_buffers() if name in given}
    for name, table in tables.items():
        if given[name].shape == table.shape and (given[name] - table).abs().max() > POSITION_TOLERANCE:
            raise UserError(
                f"init_from {recipe.init_from} has a learned {name}, and pretraining keeps the fixed sine-cosine one; "
                f"use it for knn and export, or start from weights before fine-tuning"
            )
    predictor = any("losspred" in key for key in given)
    with about(Path(recipe.init_from)):
        load_reference(model, given, "hpm" if predictor else "mae")
    model.load_state_dict({**model.state_dict(), **tables})
    return model


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
