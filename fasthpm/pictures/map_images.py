"""Difficulty maps of any images: how hard each patch is to reconstruct, which images are hardest, which hold nothing.

fasthpm maps RUN --data_path FOLDER_OR_BETON -o OUT [--true_loss 10] [--masks DIR]
fasthpm maps RUN --data_path FOLDER_OR_BETON --fit_head 1000 [-o OUT]

OUT/maps.npz        names [N], predicted and true_loss float32 [N, rows, columns], NaN where a patch has nodata
                    (of whole images, squeezed to input_size)
OUT/images.csv      the images, hardest first: mean difficulty, its spread, true loss, how empty, near_constant
OUT/overlays/…png   image, predicted difficulty over it, true loss over it
OUT/scenes/…        of a set of tiles: their maps put together, a .npz and a .png a scene (`pictures/scenes.py`)
OUT/difficulty.json how the run was asked what is hard, and how well that agrees with the true loss
OUT/saliency.json   with --masks: how well the maps find the masked objects (AUC; max-F with beta^2 = 0.3)

The predicted difficulty ranks the patches of one image (Eq. 5); images are ranked by their true loss where --true_loss
gives it. OUT appears whole or not at all.

--fit_head N first trains a small head on the run's frozen encoder, for N updates on the images of --data_path, and
keeps it beside the run: RUN/difficulty_head.safetensors. From then on maps and visualize ask it, if the run's own way
is paper or none, and it agrees better than what they would ask without it.
"""

import argparse
import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasthpm import files
from fasthpm.checkpoint import NO_DECODER, RECIPE, checkpoint_of, lacks_decoder
from fasthpm.cli import Arguments, Parser, without_effect
from fasthpm.data import Loader, build_loader
from fasthpm.data.names import known_places, sample_names
from fasthpm.data.sampling import Array
from fasthpm.data.shown import Shown, shown_of
from fasthpm.difficulty import averaged, refusal
from fasthpm.entry import Result
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.model_names import is_video
from fasthpm.patches import NormalizedPatches, Statistics, statistics_for
from fasthpm.pictures import drawing, panels, scenes
from fasthpm.pictures.saliency import Saliency
from fasthpm.probes import answers
from fasthpm.probes.answers import Answers
from fasthpm.probes.difficulty_head import HeadResult, agreement, fit_beside, target_features
from fasthpm.recipe import Recipe, load_recipe

EMPTY_PATCH, CONSTANT_IMAGE = 4.0, 8.0  # standard deviation of grey levels, 0..255, below which there is nothing to see
LOOKS = 4  # sets of looks at an image that `measured` difficulties are averaged over


@dataclass(frozen=True, repr=False)
class MapsResult(Result):
    """What was written."""

    output: Path
    images: int
    maps: Path
    ranking: Path
    overlays: Path
    scenes: Path | None  # of a set of tiles
    saliency: dict[str, dict[str, float]]  # of each kind of map, with masks
    difficulty: str  # how the run was asked; empty: only the true loss was measured
    difficulty_spearman: float | None  # on these images with true_loss, else as it was measured before; None: never
    difficulty_auc: float | None
    head: HeadResult | None  # with fit_head


class ImageMaps(NamedTuple):
    """What one batch of images gives."""

    ids: Array  # int64 [B]
    pictures: Array  # uint8 [B, H, W, 3]
    predicted: Array  # float32 [B, R, C], zeros of a run that can't be asked; NaN where a patch has nodata
    true_loss: Array  # float32 [B, R, C], zeros if not asked for; the same
    empty: Array  # float64 [B], share of patches with nothing in them
    deviation: Array  # float64 [B], of the grey levels


Features = Callable[[Tensor, Tensor], Tensor | None]  # see `difficulty_head.target_features`


@torch.no_grad()
def difficulty(
    model: HPMViT, recipe: Recipe, statistics: Statistics, images: Tensor, masks: int, features: Features
) -> tuple[Tensor, Tensor]:
    """Predicted difficulty, and the true loss averaged over `masks` random masks (0: zeros): float32 [B, L] each.

    Of a patch that has any nodata both are NaN: what the model makes of it means nothing.

    - `statistics`: by which pixels are normalised; `images`: [B, H, W, C] as stored, on the model's device
    """
    cut = NormalizedPatches(recipe, statistics)
    patches, valid = cut(images), cut.valid(images)
    true = torch.zeros_like(patches[:, :, 0])
    predicted = true if refusal(model, model.difficulty) else averaged(model, patches, LOOKS)
    if masks:
        hiding = panels.random_masks(recipe, len(patches), masks)
        true = panels.average_loss(model, patches, hiding, features(images, patches))
    if valid is not None:
        predicted, true = (values.masked_fill(~valid, torch.nan) for values in (predicted, true))
    return predicted, true


def whole_images(recipe: Recipe, arguments: argparse.Namespace) -> Any:
    """A loader of `arguments.data_path`, of whole images."""
    options = recipe.loader_options(
        batch_size=arguments.batch_size,
        num_frames=1,
        sampling_rate=1,
        train=False,
        whole=True,
        num_workers=arguments.num_workers,
        max_bad_samples=1.0,
    )
    return build_loader(arguments.data_path, options)


def map_batches(
    model: HPMViT, recipe: Recipe, arguments: argparse.Namespace, loader: Loader, shown: Shown
) -> Iterator[ImageMaps]:
    """The maps of every image of `loader`, batch by batch, with a progress bar."""
    pixels_by = statistics_for(model, loader.info, loader.source)
    grid, device = recipe.grid_size, model.mask_token.device
    features: Features = (
        target_features(model, recipe, checkpoint_of(arguments.run))
        if arguments.true_loss
        else lambda images, patches: None
    )
    for batch in tqdm(loader, desc="maps", unit="batch"):
        keep = ~batch.replaced  # others stand in for what does not decode
        images = batch.images[keep]
        values = difficulty(model, recipe, pixels_by, images.to(device), arguments.true_loss, features)
        predicted, true = (x.float().cpu().numpy().reshape(-1, *grid) for x in values)
        pixels = images.numpy()
        empty = emptiness(shown.levels(pixels), recipe.patch_size)
        yield ImageMaps(batch.ids[keep].numpy(), side_by_side(shown, pixels), predicted, true, *empty)


def side_by_side(shown: Shown, images: Array) -> Array:
    """The pictures of all groups of channels in a row: [B, H, W, C] -> uint8 [B, H, W * groups, 3]."""
    return np.concatenate(shown(images), axis=2)


def emptiness(images: Array, patch_size: int) -> tuple[Array, Array]:
    """Share of the patches with hardly any contrast, and the deviation of the grey levels: float64 [B] each.

    - `images`: uint8 [B, H, W, C], from black to white
    """
    grey = images.mean(axis=3)
    batch, height, width = grey.shape
    patches = grey.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size)
    return (patches.std(axis=(2, 4)) < EMPTY_PATCH).mean(axis=(1, 2)), grey.std(axis=(1, 2))


# ------------------------------------------------------------------------------------------------------ output
def overlay(picture: Array, size: tuple[int, int], maps: Sequence[Array]) -> Array:
    """The picture, and each map [R, C] as colours over it, side by side: uint8 [H, W * (groups + maps), 3].

    - `picture`: uint8 [H, W * groups, 3]; `size`: (H, W), of the first group, over which the maps are
    """
    return np.concatenate([picture, *(drawing.blended(picture[:, : size[1]], values) for values in maps)], axis=1)


def rank_of(values: Array) -> Array:
    """1 for the highest value, and so on: int64 [N]."""
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def write_ranking(path: Path, names: Sequence[str], columns: dict[str, Array], true_loss: bool) -> None:
    """images.csv, hardest first: by true loss if it was measured, else by predicted difficulty."""
    hardest = rank_of(columns["true_loss" if true_loss else "difficulty"])
    ranked = {"hardest": hardest, "emptiest": rank_of(columns["empty_patches"])}
    constant = columns["deviation"] < CONSTANT_IMAGE
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *ranked, "near_constant", *columns])
        for row in np.argsort(hardest):
            figures = [f"{values[row]:.6g}" for values in columns.values()]
            writer.writerow([names[row], *(ranks[row] for ranks in ranked.values()), int(constant[row]), *figures])


def write_maps(
    model: HPMViT, recipe: Recipe, arguments: argparse.Namespace, out: Path, asked: Answers
) -> tuple[int, Answers]:
    """Everything that belongs into the folder `out`.

    **Returns:** the number of images, and `asked` with what was measured here.
    """
    loader = whole_images(recipe, arguments)
    try:
        count = loader.info.num_samples
        places = known_places(arguments.data_path, count)
        if places and arguments.masks:
            raise UserError(f"--masks are of whole images, and {arguments.data_path} holds tiles; leave out --masks")
        names = sample_names(arguments.data_path, count)
        saliency = Saliency(arguments.masks, recipe.image_size, names, arguments.data_path) if arguments.masks else None
        shown = shown_of(loader.info.values, loader.info.channels, arguments.show)
        with _output(arguments):
            (out / "overlays").mkdir(parents=True)
        parts: list[ImageMaps] = []
        for part in map_batches(model, recipe, arguments, loader, shown):
            take_in(part, names, saliency, asked, arguments, out, recipe.image_size)
            parts.append(part._replace(pictures=part.pictures[:0]))
        whole = ImageMaps(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if not len(whole.ids):
            raise UserError(f"{arguments.data_path} has no image that decodes")
        kinds = kinds_of(whole, asked, arguments)
        if places:
            with _output(arguments):
                scenes.put_together(
                    out / "scenes",
                    places,
                    whole.ids,
                    kinds,
                    lambda ids: shown.first(loader.take(0, ids).images.numpy()),
                )
    finally:
        loader.close()
    asked = measured_here(parts, asked, arguments)
    scores = saliency.scores() if saliency else None
    with _output(arguments):
        write_arrays(out, whole, kinds, [names[sample] for sample in whole.ids.tolist()], arguments)
        files.write_json(out / "difficulty.json", asked.figures)
        if scores:
            files.write_json(out / "saliency.json", scores)
    return len(whole.ids), asked


def take_in(
    part: ImageMaps,
    names: Sequence[str],
    saliency: Saliency | None,
    asked: Answers,
    arguments: argparse.Namespace,
    out: Path,
    size: tuple[int, int],
) -> None:
    """Score and draw the maps of a batch."""
    for row, sample in enumerate(part.ids.tolist()):
        kinds = {kind: values[row] for kind, values in kinds_of(part, asked, arguments).items()}
        if saliency:
            saliency.add(names[sample], kinds)
        if arguments.overlays < 0 or sample < arguments.overlays:
            picture = overlay(part.pictures[row], size, list(kinds.values()))
            with _output(arguments):
                name = drawing.file_name(f"{sample:08d}-{names[sample]}", ".png")
                drawing.save_png(picture, out / "overlays" / name)


def kinds_of(maps: ImageMaps, asked: Answers, arguments: argparse.Namespace) -> dict[str, Array]:
    """The maps that there are: float32 [B, R, C] each."""
    kinds = {"predicted": maps.predicted} if asked.way else {}
    return kinds | ({"true_loss": maps.true_loss} if arguments.true_loss else {})


def write_arrays(
    out: Path, whole: ImageMaps, kinds: dict[str, Array], names: Sequence[str], arguments: argparse.Namespace
) -> None:
    """maps.npz and images.csv, of all images."""
    columns = {
        "difficulty": of_known(np.nanmean, whole.predicted),
        "difficulty_spread": of_known(np.nanstd, whole.predicted),
        "true_loss": of_known(np.nanmean, whole.true_loss),
        "empty_patches": whole.empty,
        "deviation": whole.deviation,
    }
    np.savez_compressed(out / "maps.npz", names=np.array(names), ids=whole.ids, **kinds)  # type: ignore[arg-type]
    write_ranking(out / "images.csv", names, columns, arguments.true_loss > 0)


def of_known(figure: Callable[..., Any], maps: Array) -> Array:
    """A figure of each map [N, R, C] over the patches that have data: [N], NaN of one that has none."""
    known = ~np.isnan(maps).all((1, 2))
    found = np.full(len(maps), np.nan)
    found[known] = figure(maps[known], axis=(1, 2))
    return found


def measured_here(parts: Sequence[ImageMaps], asked: Answers, arguments: argparse.Namespace) -> Answers:
    """`asked` with its agreement with the true loss of these images, if that was measured."""
    if not (asked.way and arguments.true_loss):
        return asked
    found, count = np.zeros(2), 0
    for part in parts:
        if len(part.ids):
            predicted, true = (torch.from_numpy(x).flatten(1) for x in (part.predicted, part.true_loss))
            valid = ~predicted.isnan() if predicted.isnan().any() else None
            found, count = found + len(part.ids) * np.array(agreement(predicted, true, valid)), count + len(part.ids)
    spearman, auc = (found / count).tolist()
    where = f"on these {count} images, over {arguments.true_loss} masks"
    return dataclasses.replace(asked, spearman=spearman, auc=auc, source=where)


def _output(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    return files.writing(arguments.output, "make room, or choose another -o")


def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """The command line. **Raises:** `UserError` for values out of range."""
    parser = Parser(prog="fasthpm maps", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--data_path", required=True, help="image folder, .txt list or prepared set")
    parser.add_argument("-o", "--output", type=Path, default=None, help="new folder for the maps")
    answers.add_flags(parser)
    parser.add_argument("--true_loss", type=int, default=0, metavar="N", help="measure the loss too, over N masks")
    parser.add_argument(
        "--fit_head",
        type=int,
        default=0,
        metavar="N",
        help="first train a difficulty head on the run's encoder (the teacher's, if there is one) for N updates, and "
        "keep it beside the run; without -o nothing else",
    )
    parser.add_argument("--masks", type=Path, default=None, help="folder of object masks, named like the images")
    parser.add_argument("--show", default="", help="channels that are shown, from 1 on, or bands: 3,2,1 or 3,2,1/8,4,3")
    parser.add_argument("--overlays", type=int, default=-1, metavar="N", help="draw the first N images (default: all)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward, and per update of fit_head")
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads; 0 = all cores")
    arguments = parser.parse_args(argv)
    for name, least in (("true_loss", 0), ("fit_head", 0), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected {least} or more")
    if arguments.output is None and not arguments.fit_head:
        raise UserError("-o is missing; say where the maps go, or use --fit_head N to train a head only")
    if arguments.output is not None and arguments.output.exists():
        raise UserError(f"output {arguments.output} is there already; choose another -o, or remove it")
    if arguments.output is not None:
        files.check_above(arguments.output, "output")
    else:
        idle = ["true_loss", "masks", "show", "overlays", "difficulty"]
        without_effect(idle, "no maps are made without -o, and --fit_head alone trains a head")
    return arguments


def fit_head(arguments: argparse.Namespace) -> HeadResult:
    """Fit a head beside the run, and tell how well it agrees."""
    head = fit_beside(
        arguments.run,
        arguments.data_path,
        arguments.fit_head,
        weights="" if arguments.weights == answers.AUTO else arguments.weights,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    others = "".join(f", {name} {spearman:.3f}" for name, spearman in head.others.items())
    print(
        f"difficulty_spearman on samples held out of {arguments.data_path}: the head {head.difficulty_spearman:.3f} "
        f"({head.before:.3f} before){others}; difficulty_auc {head.difficulty_auc:.3f}\nwritten to {head.path}"
    )
    return head


def main(argv: Arguments = None) -> MapsResult | HeadResult:
    """`fasthpm maps` and `fasthpm.maps`; with `fit_head` and without `output` the result is the head's."""
    arguments = parse_arguments(argv)
    source = checkpoint_of(arguments.run)
    trained = load_recipe(source / RECIPE)
    if is_video(trained.model) and arguments.output is not None:
        raise UserError(f"maps are of images, and {arguments.run} was trained on videos; use fasthpm visualize")
    if arguments.true_loss and lacks_decoder(source):
        raise UserError(f"{arguments.run} {NO_DECODER}")
    head = fit_head(arguments) if arguments.fit_head else None
    if head and arguments.output is None:
        print(f"from now on: {answers.load_asked(arguments.run)[2].line}")
        return head
    model, recipe, asked = answers.load_asked(arguments.run, arguments.difficulty, arguments.weights)
    if asked.problem and not arguments.true_loss:
        instead = "" if lacks_decoder(source) else ", or add --true_loss 10 for the loss alone"
        raise UserError(f"{arguments.run} {asked.problem}{instead}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with files.replacing(arguments.output) as aside:
        count, asked = write_maps(model, recipe, arguments, aside, asked)
    out = arguments.output
    folders = "overlays/, scenes/" if (out / "scenes").is_dir() else "overlays/"
    print(f"maps of {count} images written to {out}: maps.npz, images.csv, {folders}\n{asked.line}")
    if asked.way and asked.spearman is None:
        print("--true_loss 10 measures it on these images")
    saliency = (out / "saliency.json").read_text() if arguments.masks else "{}"
    if arguments.masks:
        print(saliency)
    return MapsResult(
        out,
        count,
        out / "maps.npz",
        out / "images.csv",
        out / "overlays",
        out / "scenes" if (out / "scenes").is_dir() else None,
        json.loads(saliency),
        asked.way,
        asked.spearman,
        asked.auc,
        head,
    )
