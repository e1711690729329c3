"""Weights of a run, by name: its checkpoints, imported ones, and what a run starts from."""

import functools
import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fasthpm.checkpoint import shards
from fasthpm.checkpoint.channels import in_channels
from fasthpm.checkpoint.folder import RECIPE, STATE, TUNED, damage, damages, newest_valid, tuned
from fasthpm.checkpoint.foreign import IMPORT_NOTE, load_reference, unusable
from fasthpm.checkpoint.pixels import pixels_of
from fasthpm.errors import UserError, about, warn
from fasthpm.files import read_json
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe, load_recipe

NO_DECODER = "was imported without its decoder, so it has no losses to predict or measure; import all of the checkpoint"
OF_A_RUN = ("checkpoints", RECIPE, "deepspeed.json", "versions.json", "metrics.jsonl", "log.txt")


# -------------------------------------------------------------------------------------------------- weights in and out
def checkpoint_of(source: Path) -> Path:
    """The checkpoint that `source` means: the newest valid one of a run, or itself.

    **Raises:** `UserError` if there is none, the run has saved none yet, or it is that of a tuning.
    """
    run = (source / "checkpoints").is_dir()
    folder = newest_valid(source, warn, _damage) if run else source
    if run and folder is None and (damaged := damages(source)):
        raise UserError(f"{source} holds no valid checkpoint: {damaged}; copy one of them again from where it is whole")
    if (source / RECIPE).is_file() and (folder is None or not holds_weights(folder)):
        raise UserError(_nothing_saved(source))
    if folder is None or not (folder / RECIPE).is_file():
        raise UserError(
            f"{source} holds no valid checkpoint; expected the output_dir of a run or one of its "
            f"checkpoints/step-… folders"
        )
    if not run and (problem := _damage(folder)):
        raise UserError(
            f"checkpoint {source} is damaged ({problem}); copy it again from where it is whole, or take another"
        )
    if what := tuned(folder):
        raise UserError(f"{source} holds {what}; {_how_it_is_tested(source, folder)}")
    return folder


def _damage(folder: Path) -> str:
    """`damage`, looked for once as long as the files stay as they are: a command asks for its run's weights often."""
    try:
        looks = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
    except OSError:  # its run has just deleted it
        return damage(folder)
    return _damage_of(folder, tuple((name, look.st_size, look.st_mtime_ns) for name, look in looks))


@functools.lru_cache(maxsize=16)
def _damage_of(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    return damage(folder)


def run_of(source: Path) -> Path:
    """The output_dir of a checkpoint, also where its name is given from within; of a run itself.

    A checkpoint that was copied out of its run has only its own folder: what lies above may be another run's.
    """
    if (source / "checkpoints").is_dir():
        return source
    places = (Path(os.path.abspath(source)).parent, source.resolve().parent)  # the second: behind a link
    return next((above.parent for above in places if above.name == "checkpoints"), source)


def saved_files(source: Path) -> tuple[Path, ...]:
    """What no output may overwrite, of a run or one of its checkpoints: the checkpoints, and what the run wrote."""
    kept = [run_of(source) / name for name in OF_A_RUN]
    return tuple(kept if (source / "checkpoints").is_dir() else [source, *kept])


def lacks_decoder(folder: Path) -> bool:
    """Whether a checkpoint is an import of an encoder alone, whose decoder is untrained."""
    return bool(read_json(folder / IMPORT_NOTE).get("encoder_only"))


def holds_weights(folder: Path) -> bool:
    """Whether there is anything of a model in a checkpoint; the folder of a run has a recipe and no weights."""
    return any((folder / name).exists() for name in (shards.FOLDER, "student.safetensors", "teacher.safetensors"))


def _how_it_is_tested(source: Path, folder: Path) -> str:
    """What to give instead of a tuning and its checkpoint `folder`, whose notes may tell the run that it came from."""
    notes = next(folder / name for name in TUNED if (folder / name).is_file())
    run = str(read_json(notes).get("run", ""))
    output_dir = run_of(source)
    return (
        f"give the pretraining run that it came from{f', {run}' if run else ''}, or test it with "
        f"fasthpm {notes.stem} {run or 'RUN'} --evaluate --output_dir {output_dir}"
    )


def _nothing_saved(source: Path) -> str:
    if (source / STATE).is_file():
        return f"{source} has lost its weights; copy the checkpoint again from where it is whole, or take another"
    every = load_recipe(source / RECIPE).save_every
    return (
        f"{source} has saved no checkpoint yet; wait for the first (save_every is {every} epochs), or stop the run "
        f"with SIGTERM, which saves, and start it again later"
    )


def load_weights(source: str | Path, which: str = "student") -> tuple[HPMViT, Recipe]:
    """The float32 model of a run (its newest valid checkpoint) or of one checkpoint, in eval mode.

    It knows by what its pixels are normalised (`patches.statistics_for`).

    - `which`: "student" or "teacher" (the EMA); "untrained" gives the run's weights before the first update

    **Raises:** `UserError` if there is no such checkpoint or it has no teacher.
    """
    folder = checkpoint_of(Path(source))
    recipe = load_recipe(folder / RECIPE)
    model = (initial_model(recipe) if which == "untrained" else model_of(recipe)).eval()
    model.pixels = pixels_of(folder, recipe)
    if which != "untrained":
        state = _read_weights(folder, which)
        problems = {what: keys for what, keys in unusable(state).items() if keys}
        if problems:
            what, keys = next(iter(problems.items()))
            raise UserError(f"{folder}: weights {keys[:3]} are {what}; take an earlier checkpoint")
        model.load_state_dict({**dict(model.named_buffers()), **state}, strict=True)
    return model, recipe


def has_teacher(folder: Path) -> bool:
    """Whether a checkpoint has the weights of a teacher."""
    if (folder / shards.FOLDER).is_dir():
        return shards.SavedState(folder).has("ema")
    return (folder / "teacher.safetensors").is_file()


def _read_weights(folder: Path, which: str) -> dict[str, Tensor]:
    path = folder / f"{which}.safetensors"
    if path.is_file():
        return load_file(path)
    kinds: dict[str, zero.State] = {"student": "master", "teacher": "ema"}
    saved = shards.SavedState(folder) if (folder / shards.FOLDER).is_dir() else None
    if saved is None or not saved.has(kinds[which]):
        other = "student" if which == "teacher" else "teacher"
        raise UserError(f"{folder} has no {which} weights; use --weights {other}")
    return {name.removeprefix("student."): saved.whole(kinds[which], name) for name in saved.names}


POSITION_TOLERANCE = 1e-3  # half-precision files round the fixed table


def initial_model(recipe: Recipe) -> HPMViT:
    """The model that a run starts from: drawn from its seed, or with the student's weights of `recipe.init_from`.

    A loss predictor that the source lacks (MAE) keeps its fresh weights, and so does a difficulty head. Weights of
    other channels become those of the recipe's as `init_channels` says.

    **Raises:** `UserError` if the weights do not fit the recipe's model, are not finite, or were trained with other
    positions.
    """
    model = model_of(recipe)
    if not recipe.init_from:
        return model
    donor, _ = load_weights(Path(recipe.init_from))
    given = donor.state_dict()
    if donor.in_chans != recipe.channels or recipe.init_channels:
        given = in_channels(given, donor, recipe)
    tables = {name: table.clone() for name, table in model.named_buffers() if name in given}
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
