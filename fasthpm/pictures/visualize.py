"""Pictures of what a model sees: image, reconstruction, true loss, predicted loss, mask; of videos, slot by slot.

fasthpm visualize RUN --data_path X.beton [--num_images 8] [-o panel.png]
fasthpm visualize RUN --images a.jpg b.png --columns image true_loss predicted_loss hardest reconstruction
fasthpm visualize RUN --data_path TILES.beton --show 3,2,1/8,4,3     # channels, or names of bands; a picture a group
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasthpm import checkpoint
from fasthpm.cli import Parser, without_effect
from fasthpm.data.names import stored_in
from fasthpm.data.pixels import luminance, render
from fasthpm.data.plain import read_pixels
from fasthpm.data.shown import Shown, shown_of
from fasthpm.data.statistics import measured
from fasthpm.data.values import Values, are_photographs
from fasthpm.errors import UserError
from fasthpm.files import check_place, writing
from fasthpm.frozen import build_frozen
from fasthpm.model import HPMViT
from fasthpm.patches import Statistics, statistics_for
from fasthpm.pictures import drawing, panels
from fasthpm.probes import answers
from fasthpm.probes.answers import Answers
from fasthpm.probes.clips import add_sampling_rate, at_rate
from fasthpm.recipe import Recipe


def chosen_images(model: HPMViT, recipe: Recipe, arguments: argparse.Namespace) -> tuple[Tensor, Statistics, Shown]:
    """What the command line asks for, by what it is normalised and how it is shown: files, or the first images of a
    data set.

    [N, (T,) H, W, C] as they are stored.
    """
    if not arguments.images:
        recipe = recipe if not arguments.data_path else recipe.with_data(arguments.data_path)
        images, info = panels.fixed_images(recipe, arguments.num_images)
        shown = shown_of(info.values, info.channels, arguments.show)
        return images, statistics_for(model, info, recipe.data_path), shown
    shown = shown_of(Values(), recipe.channels, arguments.show)
    pictures = []
    for name in arguments.images:
        pixels = read_pixels(name)
        pixels = pixels if recipe.channels == 3 else luminance(pixels)
        crop = np.array([0, 0, *pixels.shape[:2], 0])
        pictures.append(render(pixels, crop, recipe.image_size, recipe.interpolation, np.ones(3, np.float32)))
    images = torch.from_numpy(np.stack(pictures))
    return images, statistics_for(model, measured(images.numpy()), "these images"), shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. **Raises:** `UserError` for what does not go together."""
    parser = Parser(prog="fasthpm visualize", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--data_path", default="", help="prepared set or image folder (default: the run's own)")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="these image files, whole")
    parser.add_argument("--columns", nargs="+", choices=(*panels.COLUMNS, *panels.MORE_COLUMNS), default=[])
    parser.add_argument("--attention", action="store_true", help="a further column: where the cls token attends to")
    parser.add_argument("--show", default="", help="channels that are shown, from 1 on, or bands: 3,2,1 or 3,2,1/8,4,3")
    parser.add_argument("--num_images", type=int, default=8, help="rows of the picture")
    answers.add_flags(parser)
    add_sampling_rate(parser)
    parser.add_argument(
        "--alpha", type=float, help="share of the mask chosen by difficulty, 0 to 1 (default: the recipe's alpha_end)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="PNG, or GIF of a video model")
    arguments = parser.parse_args(argv)
    if arguments.num_images < 1:
        raise UserError(f"num_images is {arguments.num_images}, expected 1 or more")
    if arguments.images and arguments.data_path:
        raise UserError("--images and --data_path both say what to draw; leave one of them out")
    if arguments.alpha is not None and not 0 <= arguments.alpha <= 1:
        raise UserError(f"alpha is {arguments.alpha}, expected 0 to 1")
    if arguments.images:
        without_effect(["num_images"], "every file of --images is drawn")
    check_output(arguments, arguments.data_path)
    return arguments


def check_output(arguments: argparse.Namespace, data_path: str) -> None:
    """**Raises:** `UserError` for a picture that would overwrite what is read, or cannot be where it is to be."""
    out = arguments.output
    sources = [*map(Path, arguments.images), *stored_in(data_path, out), *checkpoint.saved_files(arguments.run)]
    check_place(out, "output", endings=(".png", ".gif"), sources=sources)


def check_effects(recipe: Recipe, columns: Sequence[str]) -> None:
    """**Raises:** `UserError` for a flag that none of these columns shows."""
    drawn, names = {*columns}, ", ".join(columns)
    masked = bool(drawn & {"mask", "reconstruction"})
    asks = bool(drawn & {"predicted_loss", "hardest"}) or (masked and recipe.masks_by_difficulty)
    if not (masked and recipe.masks_by_difficulty):
        policy = f"mask_policy {recipe.mask_policy} has no share of hard patches"
        without_effect(["alpha"], policy if masked else f"no column of {names} has a mask")
    if not asks:
        without_effect(["difficulty"], f"no column of {names} follows the difficulty")
    if not (asks or drawn & {"true_loss", "reconstruction", "attention"} or (masked and follows_anything(recipe))):
        without_effect(["weights"], f"no column of {names} follows the weights")
    if not drawn & {"image", "reconstruction", "mask", "hardest"}:
        without_effect(["show"], f"no column of {names} shows channels")


def follows_anything(recipe: Recipe) -> bool:
    """Whether the masks are not drawn at random alone."""
    return bool(recipe.mask_plan.record.follows)


def check_model(model: HPMViT, recipe: Recipe, arguments: argparse.Namespace, columns: Sequence[str]) -> None:
    """**Raises:** `UserError` for pictures that cannot be drawn of this model."""
    if not (arguments.images or arguments.data_path):
        check_output(arguments, recipe.data_path)
    if arguments.output.suffix.lower() == ".gif" and not model.video:
        raise UserError(f"output {arguments.output}: animations are of videos, and this model takes images; use a .png")
    if model.video and arguments.images:
        raise UserError("--images are pictures, and this model takes videos; give a prepared set with --data_path")
    dtype = model.pixels.values.dtype if model.pixels else "uint8"
    if arguments.images and not are_photographs(dtype, recipe.channels):
        raise UserError(
            f"--images are photographs, and this model takes {recipe.channels} channels of {dtype}; prepare yours with "
            f"python -m data_prep.images, and give --data_path"
        )
    if model.video and "attention" in columns:
        raise UserError("attention is that of the cls token, which video models do not have; leave out this column")
    if not panels.has_pictures(recipe) and "reconstruction" in columns:
        raise UserError(
            f"this run reconstructs {recipe.target} features, of which there is no picture; leave out the "
            f"column reconstruction"
        )


def columns_of(model: HPMViT, recipe: Recipe, arguments: argparse.Namespace, asked: Answers) -> list[str]:
    """What is drawn, each column once: as the command line asks, or all that is true of this model.

    **Raises:** `UserError` for columns asked for that a decoder of random weights would make up.
    """
    usual, untrue = list(panels.columns_of(recipe)), untrue_columns(arguments.run, recipe, asked)
    if untrue:
        usual = [name for name in (*usual, *([] if model.video else ["attention"])) if name not in untrue]
    columns = [*dict.fromkeys([*(arguments.columns or usual), *(["attention"] if arguments.attention else [])])]
    if wrong := [name for name in columns if name in untrue]:
        raise UserError(
            f"columns {', '.join(wrong)} need a decoder, and {arguments.run} was imported without its own; leave them "
            f"out, or import all of the checkpoint"
        )
    return columns


def untrue_columns(run: Path, recipe: Recipe, asked: Answers) -> set[str]:
    """The columns that an untrained decoder makes up; none of a model that has all its weights."""
    if not checkpoint.lacks_decoder(checkpoint.checkpoint_of(run)):
        return set()
    by_difficulty = {"predicted_loss", "hardest", *(["mask"] if follows_anything(recipe) else [])}
    return {"reconstruction", "true_loss"} | (set() if asked.way else by_difficulty)


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm visualize`."""
    arguments = parse_arguments(argv)
    model, recipe, asked_by = answers.load_asked(arguments.run, arguments.difficulty, arguments.weights)
    recipe = at_rate(recipe, arguments.sampling_rate)
    columns = columns_of(model, recipe, arguments, asked_by)
    check_effects(recipe, columns)
    check_model(model, recipe, arguments, columns)
    images, statistics, shown = chosen_images(model, recipe, arguments)
    alpha = recipe.alpha_end if arguments.alpha is None else arguments.alpha
    frozen = build_frozen(recipe, torch.device("cpu"), torch.float32)
    pictures = panels.pictures(model, recipe, statistics, images, alpha, frozen, columns, asked_by.spearman, shown)
    with writing(arguments.output, "make room, or choose another -o"):
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        if arguments.output.suffix.lower() == ".gif":
            drawing.save_gif(drawing.animation(pictures), arguments.output)
        else:
            drawing.save_png(drawing.sheet(pictures, model.tubelet_size if model.video else 0), arguments.output)
    kind = "clips" if model.video else "images"
    print(f"{len(images)} {kind} ({', '.join(columns)}) written to {arguments.output}\n{asked_by.line}")
