"""What is pasted on photographs: Fashion-MNIST's garments, or cliparts of Debian's package openclipart-png."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from data_prep.fashion_mnist import CLASSES as GARMENTS
from data_prep.fashion_mnist import read_split
from data_prep.pasting import DARKEST, SOFT_EDGE, cut_out, enlarge
from data_prep.sets import progress_bar
from fasthpm.data.quiet import quietly
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

LOOKS = 7  # numbers drawn for how a thing looks: which, how large, mirrored, grey, three colours
SMALLEST, LARGEST = 0.3, 0.6  # a thing's longer side, as a share of the image's
GREY, DIMMEST = 0.25, 0.3  # share of garments without a tint; least of the other two channels of a tint
OPENCLIPART = Path("/usr/share/openclipart/png")
CLIPARTS = ("recreation", "people", "transportation", "food", "animals", "plants", "buildings")  # its folders
VALIDATION = 4  # every how many-th clipart is val's
LARGEST_FILE = 4096  # pixels of a clipart's longer side; a few are huge, and take seconds to decode
KEPT = 256  # pixels of the longer side of a clipart in memory, at most
COVERED = (0.15, 0.97)  # shares of its box that a clipart covers: less are lines, more are rectangles
SMALL, ALIKE = 12, 3.0  # two files show the same if, at so many pixels a side, they differ by less on average


class Look(NamedTuple):
    """A thing, ready to be pasted."""

    colours: Array  # float32 [h, w] grey, or [h, w, 3], 0..255
    opacity: Array  # float32 [h, w] in 0..1
    tint: Array  # float [3] in 0..1, what the colours are multiplied by


class Things(Protocol):
    """What a split's scenes are made of, beside their grounds."""

    def look(self, label: int, size: int, draws: Array) -> Look:
        """A thing of class `label` for an image of side `size`, as `draws`, [LOOKS] in 0..1, say."""


def _longest(size: int, draw: float) -> int:
    return round(size * (SMALLEST + draw * (LARGEST - SMALLEST)))


# -------------------------------------------------------------------------------------------------- garments
@dataclass(frozen=True)
class Garments:
    """Grey garments, that get a tint."""

    images: Array  # uint8 [N, 28, 28]
    of_class: Sequence[Array]  # numbers of the garments of each class

    def look(self, label: int, size: int, draws: Array) -> Look:
        """See `Things`."""
        numbers = self.of_class[label]
        image = self.images[numbers[int(draws[0] * len(numbers))]]
        grey, opacity = enlarge(cut_out(image), _longest(size, draws[1]), draws[2] < 0.5)
        colours = DIMMEST + draws[4:7] * (1 - DIMMEST)
        return Look(grey, opacity, np.ones(3) if draws[3] < GREY else colours / colours.max())


def read_garments(split: str, source: Path) -> Garments:
    """The garments of a split. **Raises:** `UserError` if a class has none."""
    images, labels = read_split(split, source)
    seen = images.max((1, 2)) >= DARKEST
    of_class = [np.flatnonzero((labels == label) & seen) for label in range(len(GARMENTS))]
    missing = [name for name, numbers in zip(GARMENTS, of_class, strict=True) if not len(numbers)]
    if missing:
        raise UserError(f"{source} has no {missing[0]} in {split}; download it again")
    return Garments(images, of_class)


# -------------------------------------------------------------------------------------------------- cliparts
@dataclass(frozen=True)
class Cliparts:
    """Pictures with an alpha channel, in their own colours."""

    of_class: Sequence[Sequence[Array]]  # uint8 [h, w, 4] each, without an empty margin

    def look(self, label: int, size: int, draws: Array) -> Look:
        """See `Things`."""
        pictures = self.of_class[label]
        pixels = scaled(pictures[int(draws[0] * len(pictures))], _longest(size, draws[1]))
        pixels = pixels[:, :: -1 if draws[2] < 0.5 else 1].astype(np.float32)
        return Look(pixels[..., :3], pixels[..., 3] / 255, np.ones(3))


def scaled(picture: Array, longest: int) -> Array:
    """uint8 [h, w, 4] with its longer side `longest` pixels; what is transparent lends no colour."""
    scale = longest / max(picture.shape[:2])
    size = tuple(max(round(side * scale), 1) for side in picture.shape[1::-1])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def check_cliparts(folder: Path) -> None:
    """**Raises:** `UserError` if the folder is not there, or a class has no files."""
    missing = [name for name in CLIPARTS if next((folder / name).rglob("*.png"), None) is None]
    if missing:
        raise UserError(
            f"{folder} has no cliparts of {missing[0]}; apt-get install openclipart-png (131 MB), or name another "
            f"folder with --cliparts"
        )


def read_cliparts(folder: Path, size: int) -> dict[str, Cliparts]:
    """train's and val's cliparts for images of side `size`.

    Those without a useful alpha channel are left out. val has every `VALIDATION`-th; files of one name but for digits
    at its end are on one side, and of files that show the same only the first is taken.

    **Raises:** `UserError` if the folder is not there, or a class has too few on one side.
    """
    check_cliparts(folder)
    files = {name: sorted((folder / name).rglob("*.png")) for name in CLIPARTS}
    found: dict[str, list[list[Array]]] = {split: [[] for _ in CLIPARTS] for split in ("train", "val")}
    sides, known = sides_of(files), _Known(sum(map(len, files.values())))
    with progress_bar(len(known.small), "look", "clipart") as bar:
        for label, paths in enumerate(files.values()):
            for path in paths:
                picture = useful(path, size)
                if picture is not None and known.is_new(picture):
                    found[sides[group_of(path)]][label].append(picture)
                bar.update()
    for split, classes in found.items():
        for name, pictures in zip(CLIPARTS, classes, strict=True):
            if not pictures:
                raise UserError(
                    f"{folder} has no clipart of {name} for {split} with a useful alpha channel; expected "
                    f"{VALIDATION} or more of every class"
                )
    return {split: Cliparts(classes) for split, classes in found.items()}


def sides_of(files: dict[str, list[Path]]) -> dict[str, str]:
    """train or val, of every group of versions: of each class every `VALIDATION`-th is val's."""
    sides: dict[str, str] = {}
    for paths in files.values():
        groups = sorted({group_of(path) for path in paths} - sides.keys())
        sides |= {group: "train" if k % VALIDATION else "val" for k, group in enumerate(groups, 1)}
    return sides


def group_of(path: Path) -> str:
    """What names of versions of one picture have in common."""
    return re.sub(r"[\d_. -]+$", "", path.stem) or path.stem


class _Known:
    """Pictures that were seen, small: whether another one shows something new."""

    def __init__(self, most: int) -> None:
        self.small, self.count = np.zeros((most, SMALL * SMALL * 4), np.float32), 0

    def is_new(self, picture: Array) -> bool:
        """Whether none of those before shows the same; `picture` is one of them from now on."""
        small = in_small(picture)
        if (np.abs(self.small[: self.count] - small).mean(1) < ALIKE).any():
            return False
        self.small[self.count] = small
        self.count += 1
        return True


def in_small(picture: Array) -> Array:
    """uint8 [h, w, 4] as float32 [SMALL * SMALL * 4], colours times opacity."""
    small = Image.fromarray(picture).convert("RGBa").resize((SMALL, SMALL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def useful(path: Path, size: int) -> Array | None:
    """The picture of a file, uint8 [h, w, 4] without its empty margin, if it can be pasted on images of side `size`."""
    with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), quietly():
        with Image.open(path) as image:
            if max(image.size) > LARGEST_FILE:
                return None
            pixels = np.asarray(image.convert("RGBA"))
        opaque = pixels[..., 3] > 255 * SOFT_EDGE
        rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
        if not len(rows):
            return None
        picture = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        smallest, largest = (round(size * share) for share in (SMALLEST, LARGEST))
        covered = (scaled(picture, smallest)[..., 3] > 255 * SOFT_EDGE).mean()
        if COVERED[0] <= covered <= COVERED[1]:
            return scaled(picture, min(max(picture.shape[:2]), largest, KEPT))
    return None
