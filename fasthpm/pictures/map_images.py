"""Difficulty maps of any images: how hard each patch is to reconstruct, which images are hardest, which hold nothing.

fasthpm maps RUN --data_path FOLDER_OR_BETON -o OUT [--true_loss 10] [--masks DIR]

OUT/maps.npz        names [N], predicted and true_loss float32 [N, rows, columns] (whole images, squeezed to input_size)
OUT/images.csv      the images, hardest first: mean difficulty, its spread, true loss, how empty, near_constant
OUT/overlays/…png   image, predicted difficulty over it, true loss over it
OUT/saliency.json   with --masks: how well the maps find the masked objects (AUC; max-F with beta^2 = 0.3)

The predicted difficulty ranks the patches of one image (Eq. 5); images are ranked by their true loss where --true_loss
gives it. OUT appears whole or not at all.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasthpm import files
from fasthpm.checkpoint.weights import load_weights
from fasthpm.cli import Arguments, Parser
from fasthpm.data import DatasetInfo, build_loader, read_info
from fasthpm.data.names import sample_names
from fasthpm.data.plain import read_pixels
from fasthpm.data.sampling import Array, area_resize
from fasthpm.entry import Result
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.patches import NormalizedPatches
from fasthpm.pictures import drawing, panels
from fasthpm.recipe import Recipe

EMPTY_PATCH, CONSTANT_IMAGE = 4.0, 8.0  # standard deviation of grey levels, 0..255, below which there is nothing to see
BETA_SQUARED, THRESHOLDS = 0.3, 256  # of the F-measure, as the saliency literature has them


@dataclass(frozen=True, repr=False)
class MapsResult(Result):
    """What was written."""

    output: Path
    images: int
    maps: Path
    ranking: Path
    overlays: Path
    saliency: dict[str, dict[str, float]]  # of each kind of map, with masks


class ImageMaps(NamedTuple):
    """What one batch of images gives."""

    ids: Array  # int64 [B]
    images: Array  # uint8 [B, H, W, C]
    predicted: Array  # float32 [B, R, C], zeros without a loss predictor
    true_loss: Array  # float32 [B, R, C], zeros if not asked for
    empty: Array  # float64 [B], share of patches with nothing in them
    deviation: Array  # float64 [B], of the grey levels


@torch.no_grad()
def difficulty(model: HPMViT, recipe: Recipe, info: DatasetInfo, images: Tensor, masks: int) -> tuple[Tensor, Tensor]:
    """Predicted difficulty, and the true loss averaged over `masks` random masks (0: zeros): float32 [B, L] each.

    - `images`: uint8 [B, H, W, C] on the model's device
    """
    patches = NormalizedPatches(recipe, info)(images)
    zeros = torch.zeros_like(patches[:, :, 0])
    predicted = model.predict_loss(patches) if recipe.predict_loss != "none" else zeros
    true = panels.average_loss(model, patches, panels.random_masks(recipe, len(patches), masks)) if masks else zeros
    return predicted, true


def map_batches(model: HPMViT, recipe: Recipe, arguments: argparse.Namespace) -> Iterator[ImageMaps]:
    """The maps of every image of `arguments.data_path`, batch by batch, with a progress bar."""
    options = recipe.loader_options(
        batch_size=arguments.batch_size,
        num_frames=1,
        sampling_rate=1,
        train=False,
        whole=True,
        num_workers=arguments.num_workers,
        max_bad_samples=1.0,
    )
    loader = build_loader(arguments.data_path, options)
    info, grid, device = training_info(recipe, loader.info), recipe.grid_size, model.cls_token.device
    try:
        for batch in tqdm(loader, desc="maps", unit="batch"):
            keep = ~batch.replaced  # others stand in for what does not decode
            images = batch.images[keep]
            values = difficulty(model, recipe, info, images.to(device), arguments.true_loss)
            predicted, true = (x.float().cpu().numpy().reshape(-1, *grid) for x in values)
            pixels = images.numpy()
            yield ImageMaps(batch.ids[keep].numpy(), pixels, predicted, true, *emptiness(pixels, recipe.patch_size))
    finally:
        loader.close()


def training_info(recipe: Recipe, other: DatasetInfo) -> DatasetInfo:
    """Mean and standard deviation that the model was trained with, or, if its data is gone, those of `other`."""
    with suppress(UserError):
        return read_info(recipe.data_path)
    return other


def emptiness(images: Array, patch_size: int) -> tuple[Array, Array]:
    """Share of the patches with hardly any contrast, and the deviation of the grey levels: float64 [B] each.

    - `images`: uint8 [B, H, W, C]
    """
    grey = images.mean(axis=3)
    batch, height, width = grey.shape
    patches = grey.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size)
    return (patches.std(axis=(2, 4)) < EMPTY_PATCH).mean(axis=(1, 2)), grey.std(axis=(1, 2))


# ------------------------------------------------------------------------------------------------------ saliency
def auc(values: Array, inside: Array) -> float:
    """Chance that a random pixel inside has a higher value than one outside (ties count half); NaN if one is missing.

    - `values`: [K]; `inside`: bool [K]
    """
    distinct, place = np.unique(values, return_inverse=True)
    counts = [np.bincount(place[side], minlength=len(distinct)).astype(float) for side in (inside, ~inside)]
    pairs = counts[0].sum() * counts[1].sum()
    below = np.cumsum(counts[1]) - counts[1]
    return float((counts[0] * (below + counts[1] / 2)).sum() / pairs) if pairs else float("nan")


def precision_recall(values: Array, inside: Array) -> Array:
    """Precision and recall at `THRESHOLDS` levels of the values scaled to [0, 1]: float64 [2, THRESHOLDS]."""
    low, high = values.min(), values.max()
    level = ((values - low) / max(high - low, 1e-12) * (THRESHOLDS - 1)).astype(int)
    hits, chosen = (np.bincount(level[side], minlength=THRESHOLDS)[::-1].cumsum() for side in (inside, slice(None)))
    return np.stack([hits / np.maximum(chosen, 1), hits / max(int(inside.sum()), 1)])


class Saliency:
    """Scores maps against object masks: files of `folder` named like the images, brighter than half = object."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        if not folder.is_dir():
            raise UserError(f"masks {folder} is no folder; give one whose files are named like the images")
        self._files = {path.stem: path for path in sorted(folder.rglob("*")) if path.is_file()}
        self._size = size
        self._areas: dict[str, list[float]] = {}
        self._curves: dict[str, list[Array]] = {}

    def add(self, name: str, maps: dict[str, Array]) -> None:
        """Take in the maps [R, C] of one image, if it has a mask that is neither empty nor everything."""
        path = self._files.get(Path(name).stem)
        if path is None:
            return
        inside = area_resize(read_pixels(str(path)), self._size)[:, :, 0].ravel() > 127
        if inside.all() or not inside.any():
            return
        for kind, values in maps.items():
            pixels = drawing.per_pixel(values, self._size).ravel()
            self._areas.setdefault(kind, []).append(auc(pixels, inside))
            self._curves.setdefault(kind, []).append(precision_recall(pixels, inside))

    def scores(self) -> dict[str, dict[str, float]]:
        """{kind: {"auc", "max_f", "images"}}. **Raises:** `UserError` if no image had a mask."""
        if not self._areas:
            raise UserError("no file of --masks is named like an image (or all are empty); expected masks/NAME.png")
        return {
            kind: {"auc": float(np.mean(areas)), "max_f": max_f(self._curves[kind]), "images": len(areas)}
            for kind, areas in self._areas.items()
        }


def max_f(curves: list[Array]) -> float:
    """The best F-measure over thresholds, of precision and recall averaged over images."""
    precision, recall = np.mean(curves, axis=0)
    return float(((1 + BETA_SQUARED) * precision * recall / np.maximum(BETA_SQUARED * precision + recall, 1e-12)).max())


# ------------------------------------------------------------------------------------------------------ output
def overlay(image: Array, maps: Sequence[Array]) -> Array:
    """The image, and each map [R, C] as colours over it, side by side: uint8 [H, W * (1 + maps), 3]."""
    base = drawing.as_rgb(image)
    heats = [drawing.heat(drawing.per_pixel(values, image.shape[:2])[None])[0] for values in maps]
    blends = [(base * 0.4 + heat * 0.6).astype(np.uint8) for heat in heats]
    return np.concatenate([base, *blends], axis=1)


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
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *ranked, "near_constant", *columns])
        for row in np.argsort(hardest):
            figures = [f"{values[row]:.6g}" for values in columns.values()]
            writer.writerow([names[row], *(ranks[row] for ranks in ranked.values()), int(constant[row]), *figures])


def write_maps(model: HPMViT, recipe: Recipe, arguments: argparse.Namespace, out: Path) -> int:
    """Everything that belongs into the folder `out`. **Returns:** the number of images."""
    predicts, wants_true = recipe.predict_loss != "none", arguments.true_loss > 0
    saliency = Saliency(arguments.masks, recipe.image_size) if arguments.masks else None
    with _output(arguments):
        (out / "overlays").mkdir(parents=True)
    parts: list[ImageMaps] = []
    names: list[str] = []
    for part in map_batches(model, recipe, arguments):
        if not names:
            names = sample_names(arguments.data_path, read_info(arguments.data_path).num_samples)
        for row, sample in enumerate(part.ids.tolist()):
            kinds = {"predicted": part.predicted[row]} if predicts else {}
            kinds |= {"true_loss": part.true_loss[row]} if wants_true else {}
            if saliency:
                saliency.add(names[sample], kinds)
            if arguments.overlays < 0 or sample < arguments.overlays:
                picture = overlay(part.images[row], list(kinds.values()))
                with _output(arguments):
                    drawing.save_png(picture, out / "overlays" / f"{sample:08d}-{Path(names[sample]).stem}.png")
        parts.append(part._replace(images=part.images[:0]))
    whole = ImageMaps(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not len(whole.ids):
        raise UserError(f"{arguments.data_path} has no image that decodes")
    kept = [names[sample] for sample in whole.ids.tolist()]
    kinds = {"predicted": whole.predicted} if predicts else {}
    kinds |= {"true_loss": whole.true_loss} if wants_true else {}
    columns = {
        "difficulty": whole.predicted.mean((1, 2)),
        "difficulty_spread": whole.predicted.std((1, 2)),
        "true_loss": whole.true_loss.mean((1, 2)),
        "empty_patches": whole.empty,
        "deviation": whole.deviation,
    }
    scores = saliency.scores() if saliency else None
    with _output(arguments):
        np.savez_compressed(out / "maps.npz", names=np.array(kept), ids=whole.ids, **kinds)
        write_ranking(out / "images.csv", kept, columns, wants_true)
        if scores:
            files.write_json(out / "saliency.json", scores)
    return len(kept)


def _output(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    return files.writing(arguments.output, "make room, or choose another -o")


def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """The command line. **Raises:** `UserError` for values out of range."""
    parser = Parser(prog="fasthpm maps", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--data_path", required=True, help="image folder, .txt list or prepared set")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder for the maps")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument("--true_loss", type=int, default=0, metavar="N", help="measure the loss too, over N masks")
    parser.add_argument("--masks", type=Path, default=None, help="folder of object masks, named like the images")
    parser.add_argument("--overlays", type=int, default=-1, metavar="N", help="draw the first N images (default: all)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward")
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads; 0 = all cores")
    arguments = parser.parse_args(argv)
    if arguments.true_loss < 0 or arguments.batch_size < 1:
        raise UserError(
            f"true_loss is {arguments.true_loss}, expected 0 or more; batch_size is {arguments.batch_size}, expected "
            f"1 or more"
        )
    if arguments.output.exists():
        raise UserError(f"output {arguments.output} is there already; choose another -o, or remove it")
    return arguments


def main(argv: Arguments = None) -> MapsResult:
    """`fasthpm maps` and `fasthpm.maps`."""
    arguments = parse_arguments(argv)
    model, recipe = load_weights(arguments.run, arguments.weights)
    if recipe.predict_loss == "none" and not arguments.true_loss:
        raise UserError(f"{arguments.run} has no loss predictor ({recipe.model}); add --true_loss 10")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with files.replacing(arguments.output) as aside:
        count = write_maps(model, recipe, arguments, aside)
    out = arguments.output
    print(f"maps of {count} images written to {out}: maps.npz, images.csv, overlays/")
    saliency = (out / "saliency.json").read_text() if arguments.masks else "{}"
    if arguments.masks:
        print(saliency)
    return MapsResult(out, count, out / "maps.npz", out / "images.csv", out / "overlays", json.loads(saliency))
