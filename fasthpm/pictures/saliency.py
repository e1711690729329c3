"""How well maps find the objects of images, whose masks are files named like the images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fasthpm.data.listing import files_below
from fasthpm.data.pixels import IMAGES
from fasthpm.data.plain import read_pixels
from fasthpm.data.rasters.files import stem_of
from fasthpm.data.sampling import Array, area_resize
from fasthpm.errors import UserError
from fasthpm.pictures import drawing

BETA_SQUARED, THRESHOLDS = 0.3, 256  # of the F-measure, as the saliency literature has them
Parts = tuple[str, ...]  # of a path, without the file's ending


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
    level = (drawing.from_0_to_1(values) * (THRESHOLDS - 1)).astype(int)
    hits, chosen = (np.bincount(level[side], minlength=THRESHOLDS)[::-1].cumsum() for side in (inside, slice(None)))
    return np.stack([hits / np.maximum(chosen, 1), hits / max(int(inside.sum()), 1)])


# ------------------------------------------------------------------------------------------------------ masks
def masks_of(folder: Path, names: Sequence[str], root: str = "") -> dict[str, Path]:
    """The mask of each image that has one, by the image's name: that of the same path in `folder`, endings aside.

    Masks in fewer folders than the images (1.png of x/a/1.jpg) are taken where no other image ends like them.

    - `names`: paths of images; `root`: the folder that they were listed in (else the one that holds them all)

    **Raises:** `UserError` for no folder, two masks of one name, a mask that fits several images, and if none fits any.
    """
    if not folder.is_dir():
        raise UserError(f"masks {folder} is no folder; give one whose files are named like the images")
    masks, base = _by_parts(folder), _root_of(names, root)
    fitting: dict[Parts, list[str]] = {}
    for name in dict.fromkeys(names):
        parts = Path(stem_of(name)).parts
        for ending in (parts[start:] for start in range(len(parts))):
            if ending in masks:
                fitting.setdefault(ending, []).append(name)
    if not fitting:
        some = f"{names[0]}, and masks like {next(iter(masks.values()))}" if masks else "images, and no masks"
        raise UserError(f"no file of --masks is named like an image: there are {some}; expected {folder}/NAME.png")
    found = {}
    for parts, images in sorted(fitting.items(), key=lambda pair: len(pair[0])):  # whole paths outdo their endings
        whole = [name for name in images if Path(stem_of(name)) == base.joinpath(*parts)]
        chosen = whole or images
        if len(chosen) > 1:
            raise UserError(
                f"mask {masks[parts]} fits {len(chosen)} images, such as {chosen[0]} and {chosen[1]}; keep the masks "
                f"in the same folders as the images, and one image of a name"
            )
        found[chosen[0]] = masks[parts]
    return found


def _root_of(names: Sequence[str], root: str) -> Path:
    if root and all(Path(name).is_relative_to(root) for name in names):
        return Path(root)
    try:
        return Path(os.path.commonpath([os.path.dirname(name) for name in names]))
    except ValueError:  # none, or some are absolute and some are not
        return Path()


def _by_parts(folder: Path) -> dict[Parts, Path]:
    found: dict[Parts, Path] = {}
    for path in files_below(folder):
        parts = Path(stem_of(str(path.relative_to(folder)))).parts
        if parts in found and IMAGES.holds(str(path)):
            raise UserError(f"masks {found[parts]} and {path} have one name but for the ending; remove one")
        if IMAGES.holds(str(path)):
            found[parts] = path
    return found


class Saliency:
    """Scores maps against object masks: files of `folder` named like the images (`masks_of`), brighter than half =
    object.

    - `size`: (H, W) of the model's images; `names`, `root`: of all images, as `masks_of` takes them

    **Raises:** `UserError` as `masks_of`, for a mask that cannot be read, and if none has an object and its background.
    """

    def __init__(self, folder: Path, size: tuple[int, int], names: Sequence[str], root: str = "") -> None:
        self._files, self._size = masks_of(folder, names, root), size
        self._areas: dict[str, list[float]] = {}
        self._curves: dict[str, list[Array]] = {}
        if not any(_splits(self._inside(path)) for path in self._files.values()):  # looks at one, if that is good
            raise UserError(
                f"all {len(self._files)} masks of {folder} are empty, or nothing but object; expected 255 where an "
                f"object is, and 0 elsewhere"
            )

    def _inside(self, path: Path) -> Array:
        return area_resize(read_pixels(str(path)), self._size)[:, :, 0].ravel() > 127

    def add(self, name: str, maps: dict[str, Array]) -> None:
        """Take in the maps [R, C] of one image, if it has a mask that is neither empty nor everything."""
        if name not in self._files:
            return
        inside = self._inside(self._files[name])
        for kind, values in maps.items():
            pixels = drawing.per_pixel(values, self._size).ravel()
            known = ~np.isnan(pixels)
            if not _splits(inside[known]):
                continue
            self._areas.setdefault(kind, []).append(auc(pixels[known], inside[known]))
            self._curves.setdefault(kind, []).append(precision_recall(pixels[known], inside[known]))

    def scores(self) -> dict[str, dict[str, float]]:
        """{kind: {"auc", "max_f", "images"}}. **Raises:** `UserError` if no image that was added could be scored."""
        if not self._areas:
            raise UserError("no image with a mask decodes and has both of an object and its background; check --masks")
        return {
            kind: {"auc": float(np.mean(areas)), "max_f": max_f(self._curves[kind]), "images": len(areas)}
            for kind, areas in self._areas.items()
        }


def _splits(inside: Array) -> bool:
    """Whether there are both: object and what is none."""
    return bool(inside.any() and not inside.all())


def max_f(curves: list[Array]) -> float:
    """The best F-measure over thresholds, of precision and recall averaged over images."""
    precision, recall = np.mean(curves, axis=0)
    return float(((1 + BETA_SQUARED) * precision * recall / np.maximum(BETA_SQUARED * precision + recall, 1e-12)).max())
