"""Checkpoints: written aside, hashed, renamed; found, verified, resumed; exported to and imported from other code.

OUT/checkpoints/step-00001200/
    shards/rank-00000.safetensors …   masters, optimizer moments and EMA as each rank holds them (see shards.py)
    recipe.json, state.json (position of the run), manifest.json (size and sha256 of every file; written last)
Instead of shards/ a folder may hold student.safetensors and teacher.safetensors: weights alone, nothing to resume.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthpm.checkpoint import shards
from fasthpm.checkpoint.foreign import IMPORT_NOTE
from fasthpm.data.identity import identity_of
from fasthpm.errors import UserError
from fasthpm.files import ASIDE, LISTED, aside_of, file_hash, fsync, read_json, remove, size_text, write_json
from fasthpm.recipe import Recipe, load_recipe, save_recipe

MANIFEST, STATE, RECIPE = "manifest.json", "state.json", "recipe.json"
BUFFERS = "buffers.safetensors"  # where training changes any: iBOT's centres, statistics of a network's batches
FINETUNE_NOTES = "finetune.json"  # in checkpoints of fine-tuning, which hold a classifier and no decoder
TUNED = {FINETUNE_NOTES: "a fine-tuned classifier", "segment.json": "a segmenter", "detect.json": "a detector"}
COUNTED = ("global_batch_size", "steps_per_epoch")  # what an update is, and where in the schedule
OF_THE_MODEL = ("model", "input_size", "patch_size", "channels", "num_frames", "tubelet_size", "target", "predictor")
BYTES_PER_PARAMETER = 17  # float32 master, two moments and EMA; a little for names and hashes


@dataclass(frozen=True)
class RunState:
    """Where a run stands between two updates; everything else follows from the recipe."""

    step: int  # updates done
    loader: dict[str, Any]  # the loader's state_dict
    world_size: int  # ranks that wrote it
    accum_iter: int  # the loader's batches per update
    skipped: list[int] = field(default_factory=list)  # updates (from 0) that were left out: not finite
    data: str = ""  # what the data is (`data.identity`), wherever it lies; "" in checkpoints from before it was kept


# -------------------------------------------------------------------------------------------------- write
def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return output_dir / "checkpoints" / f"step-{step:08d}"


def begin(output_dir: Path, step: int, notes: Mapping[str, str] | None = None) -> Path:
    """A folder beside the final one, to write a checkpoint into (one rank calls this).

    - `notes`: what it holds already, name and text; without them all there is no folder
    """
    folder = checkpoint_path(output_dir, step)
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    try:
        for name, text in (notes or {}).items():
            (aside / name).write_text(text)
    except OSError:
        remove(aside)
        raise
    return aside


def commit(aside: Path, recipe: Recipe, state: RunState, written: dict[str, Any] | None = None) -> Path:
    """Complete what the ranks wrote into `aside`, hash it, and move it to its final name (one rank calls this).

    - `written`: {file: [bytes, sha256]} of files that are hashed and synced already

    **Returns:** the checkpoint's folder. A reader never sees it half-written.
    """
    save_recipe(recipe, aside / RECIPE)
    write_json(aside / STATE, dataclasses.asdict(state))
    manifest = dict(written or {})
    names = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
    rest = [name for name in names if name not in manifest]
    manifest |= {name: [(aside / name).stat().st_size, file_hash(aside / name)] for name in rest}
    write_json(aside / MANIFEST, manifest)
    for name in [*rest, MANIFEST]:
        fsync(aside / name)
    final = aside.with_name(aside.name.removeprefix(ASIDE))
    if final.exists():  # only an invalid checkpoint of the same step can be here: resume would have started from it
        shutil.rmtree(final)
    aside.rename(final)
    fsync(final.parent)
    return final


def clear_unfinished(output_dir: Path) -> None:
    """Delete what killed runs left half-written."""
    for folder in (output_dir / "checkpoints").glob(f"{ASIDE}*"):
        shutil.rmtree(folder)


def require_space(output_dir: Path, parameters: int) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold; what is there stays untouched.

    - `parameters`: of the student

    **Raises:** `UserError` naming the space needed and the space there is.
    """
    needed, free = parameters * BYTES_PER_PARAMETER, shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"output_dir {output_dir} has {size_text(free)} left and a checkpoint needs about {size_text(needed)}; "
            f"free some space or use another --output_dir, then start again to resume"
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


def has_checkpoints(output_dir: Path) -> bool:
    """Whether a folder has any, verified or not: without one it has no past."""
    return bool(_checkpoints(output_dir))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (size, digest) in manifest.items():
        path = folder / name
        if ".." in Path(name).parts or not path.is_relative_to(folder):  # it may be someone else's
            return f"{MANIFEST} leads out of the checkpoint, to {name}"
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.stat().st_size != size or file_hash(path) != digest:
                return f"{name} does not match its hash"
        except OSError as error:
            return f"{name} cannot be read, {error.strerror or error}"
    return shards.weights_not_finite(folder)


def newest_valid(output_dir: Path, warn: Callable[[str], None], look: Callable[[Path], str] = damage) -> Path | None:
    """The newest checkpoint whose files all match their hashes; those passed over are named through `warn`."""
    for folder in _checkpoints(output_dir):
        problem = look(folder)
        if not problem:
            return folder
        warn(f"checkpoint {folder} is damaged ({problem}); trying the one before")
    return None


def find_resume(recipe: Recipe, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that `recipe.resume` means, or None to start afresh.

    One of another folder is where a run branches off; once its own folder has checkpoints, it goes on from those.

    **Raises:** `UserError` for a missing or damaged checkpoint that was named, for a folder whose checkpoints are all
    damaged, and for checkpoints that would be mixed with those of a fresh run.
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
        return with_training_state(newest_or_none(output_dir, warn))
    folder = Path(recipe.resume)
    problem = damage(folder)
    if problem:
        raise UserError(f"--resume {folder}: {problem}; expected a folder like OUT/checkpoints/step-00001200")
    elsewhere = folder.resolve().parent != (output_dir / "checkpoints").resolve()
    if elsewhere and _checkpoints(output_dir):
        return with_training_state(newest_or_none(output_dir, warn))
    return with_training_state(folder)


def newest_or_none(output_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint of a folder; None if it has none at all.

    **Raises:** `UserError` naming them if all are damaged: starting afresh would push out what may be saved of them.
    """
    found = newest_valid(output_dir, warn)
    damaged = damages(output_dir) if found is None else ""
    if damaged:
        raise UserError(f"{damaged}; copy one of them again from where it is whole, or use another --output_dir")
    return found


def damages(output_dir: Path) -> str:
    """What is wrong with the checkpoints of a folder that has no valid one; empty if there are none at all."""
    folders = _checkpoints(output_dir)
    named = "; ".join(f"{folder.name}: {damage(folder)}" for folder in folders[:LISTED])
    more = f"; and {len(folders) - LISTED} more" if len(folders) > LISTED else ""
    where = output_dir / "checkpoints"
    return f"all {len(folders)} checkpoints in {where} are damaged ({named}{more})" if folders else ""


def with_training_state(folder: Path | None) -> Path | None:
    """`folder`. **Raises:** `UserError` if it holds imported weights, which start a run and do not continue one."""
    if folder and (folder / IMPORT_NOTE).is_file():
        raise UserError(
            f"{folder} holds imported weights and no optimizer state to resume; start a run from them with --init_from "
            f"{folder.parent.parent} and another --output_dir"
        )
    return folder


def read_state(folder: Path) -> RunState:
    """Position of a checkpoint. **Raises:** `UserError` for a file that is missing or damaged."""
    try:
        return RunState(**json.loads((folder / STATE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(
            f"{folder / STATE} cannot be read ({reason}); copy the checkpoint again from where it is whole, or take "
            f"another"
        ) from error


def continued(recipe: Recipe, world_size: int) -> Recipe:
    """`recipe` with the global batch of the run that output_dir holds, whatever the number of devices is now.

    Without a run there, or with another `global_batch_size` asked for, the recipe comes back as it is. The batch per
    device shrinks, if it must, to one that divides the global batch; accumulation follows.

    **Raises:** `UserError` if the devices do not divide the global batch.
    """
    past = past_of(recipe)
    if past is None:
        return recipe
    total = past.global_batch_size
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


def compare_recipes(recipe: Recipe, science: Callable[[Recipe], dict[str, Any]], data: str = "") -> None:
    """Refuse an output folder that belongs to another recipe, to other data, or to what is no pretraining.

    - `data`: what the recipe's data is (`data.identity`): the same under another path is no other data

    **Raises:** `UserError` naming the first field that differs, and the ways on.
    """
    refuse_tuned(recipe)
    past, output_dir = past_of(recipe), Path(recipe.output_dir)
    if past is None or branches_off(recipe):
        return
    known = data_of(output_dir, past.data_path, recipe.data_path)
    theirs, ours = science(past), science(recipe)
    if data and known:
        ours["data_path"] = theirs["data_path"] if data == known else ours["data_path"]
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        name = different[0]
        raise UserError(
            f"output_dir {recipe.output_dir} belongs to a run with {name} {theirs[name]!r}, this one has "
            f"{ours[name]!r}; use another --output_dir, or --{name} {theirs[name]}{ways_on(output_dir, name)}"
        )
    if data and known and data != known:
        raise UserError(
            f"data_path {recipe.data_path} is not what the run in {output_dir} was trained on: other data lies there "
            f"now (it was {known[:40]}, it is {data[:40]}); put that back, give it with --data_path, or start a run on "
            f"this data from those weights: --init_from {output_dir} and another --output_dir"
        )


def tuned(folder: Path) -> str:
    """What a checkpoint of a tuning holds, in words; empty for any other."""
    return next((what for notes, what in TUNED.items() if (folder / notes).is_file()), "")


def refuse_tuned(recipe: Recipe) -> None:
    """**Raises:** `UserError` if a pretraining would go on from a classifier, a segmenter or a detector."""
    output_dir = Path(recipe.output_dir)
    folders = [Path(recipe.resume)] if branches_off(recipe) else _checkpoints(output_dir)[:1]
    for folder in folders:
        if what := tuned(folder):
            ours = not branches_off(recipe)
            where, remedy = (f"output_dir {output_dir}", "--output_dir") if ours else (f"--resume {folder}", "--resume")
            raise UserError(f"{where} holds {what}; choose another {remedy}")


def ways_on(output_dir: Path, name: str) -> str:
    """How a pretraining goes on all the same with another value of the field `name`, to be added to a refusal."""
    if not _checkpoints(output_dir) or name in OF_THE_MODEL:
        return ""
    anew = f"start anew from its weights: --init_from {output_dir}"
    if name in COUNTED or name == "data_path":
        return f" (or {anew} and another --output_dir)"
    return f"{way_on(output_dir).removesuffix(')')}; or {anew})"


def way_on(output_dir: Path) -> str:
    """The same of any training: its checkpoint, in a folder that is not bound by what was."""
    newest = next(iter(_checkpoints(output_dir)), None)
    return f" (to go on with it: in another --output_dir, from --resume {newest})" if newest else ""


def past_of(recipe: Recipe) -> Recipe | None:
    """The recipe that `recipe` goes on from: of the run in its output_dir, or of the checkpoint that it resumes.

    None if it begins something: a folder without a checkpoint has no past, whatever a killed run left in it.

    **Raises:** `UserError` if there are checkpoints and no recipe can be read.
    """
    output_dir, folders = Path(recipe.output_dir), _checkpoints(Path(recipe.output_dir))
    if branches_off(recipe):
        places = [Path(recipe.resume)]
    else:
        places = [output_dir, *folders] if folders else []
    failure = None
    for place in places:
        if (place / RECIPE).is_file():
            try:
                return load_recipe(place / RECIPE)
            except UserError as error:
                failure = failure or error
    if failure:
        raise failure
    return None


def branches_off(recipe: Recipe) -> bool:
    """Whether a run begins at a checkpoint of another folder, which it leaves as it is."""
    return recipe.resume not in ("auto", "none") and not _checkpoints(Path(recipe.output_dir))


def data_of(output_dir: Path, their_path: str, our_path: str) -> str:
    """What the data of the run in `output_dir` was (`data.identity`), "" where nobody knows.

    Checkpoints from before it was kept have a path only; if that is another one now, the data that lies there tells.
    """
    for folder in _checkpoints(output_dir):
        if known := read_json(folder / STATE).get("data"):
            return str(known)
    if their_path == our_path:
        return ""
    try:
        return identity_of(their_path)
    except UserError:
        return ""


def check_counts(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on from a checkpoint whose updates count otherwise: schedule and position would be wrong.

    **Raises:** `UserError` naming the field.
    """
    past = load_recipe(folder / RECIPE)
    for name in COUNTED:
        theirs, ours = getattr(past, name), getattr(recipe, name)
        if theirs != ours:
            raise UserError(
                f"{folder} was written with {name} {theirs}, here it is {ours}, and its updates would count otherwise; "
                f"use --{name} {theirs}, or start anew from its weights"
            )


def cpu_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Float32 CPU copy of a state dict."""
    return {key: value.detach().float().cpu().clone() for key, value in model.state_dict().items()}
