"""Grounds of drawn scenes: random crops of real photographs, with something to see in them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.photographs import DECODED, read_source
from data_prep.sets import progress_bar
from fasthpm.data.keys import Stream
from fasthpm.data.sampling import Array, key_of, uniforms
from fasthpm.errors import UserError

VALIDATION = 4  # every how many-th photograph is val's
SHORTER_SIDE = 1200  # pixels that photographs are shrunk to
CLOSEST = 1.5  # a crop is shrunk at least so much, because single pixels of photographs are soft
BLOCKS, CONTRAST, TEXTURED = 8, 6.0, 0.7  # a crop's blocks a side; deviation of grey in one; share that must have it
TRIES = 12  # crops per image, of which the first textured one, or else the most textured one, is taken
BOX = 4  # numbers drawn per crop
PROBES, PROBE_SIDE, FEWEST_TEXTURED = 24, 64, 4  # a photograph is used if so many crops of this side are textured


def texture(pixels: Array) -> float:
    """Share of the blocks of uint8 [S, S, 3] in which there is something to see."""
    grey = pixels.mean(2)
    side = len(grey) // BLOCKS
    blocks = grey[: side * BLOCKS, : side * BLOCKS].reshape(BLOCKS, side, BLOCKS, side)
    return float((blocks.std((1, 3)) >= CONTRAST).mean())


def crop(photograph: Image.Image, size: int, draws: Array) -> Array:
    """A square of `photograph` at a place and a scale that `draws`, [3] in 0..1, say: uint8 [size, size, 3]."""
    shorter = min(photograph.size)
    closest = size * CLOSEST
    side = min(closest * (shorter / closest) ** draws[0], shorter)
    left, top = (draws[1:] * (np.array(photograph.size) - side)).tolist()
    box = (left, top, min(left + side, photograph.width), min(top + side, photograph.height))
    return np.asarray(photograph.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def draw_ground(photographs: Sequence[Image.Image], draws: Array, size: int) -> Array:
    """The first crop with texture, or the one with most: uint8 [size, size, 3], writable.

    - `draws`: [TRIES, BOX] in 0..1
    """
    best, most = np.zeros(0), -1.0
    for draw in draws:
        pixels = crop(photographs[int(draw[0] * len(photographs))], size, draw[1:])
        share = texture(pixels)
        if share > most:
            best, most = pixels, share
        if share >= TEXTURED:
            break
    return best.copy()


def read_photograph(file: Path, shorter: int) -> Image.Image:
    """A photograph whose shorter side has `shorter` pixels, or fewer. **Raises:** `UserError` if it is damaged."""
    try:
        image = read_source(file, (max(DECODED[0], shorter), max(DECODED[1], shorter)))
    except OSError as error:
        raise UserError(f"photograph {file} cannot be read ({error}); install its package again") from error
    ratio = min(shorter / min(image.size), 1.0)
    return image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)


def read_photographs(files: Sequence[Path], size: int = 0) -> dict[str, list[Image.Image]]:
    """Those with texture, every `VALIDATION`-th for val. Who is on which side depends on the files alone.

    - `size`: of the scenes; photographs for large ones are larger than `SHORTER_SIDE`, so that scales still differ

    **Raises:** `UserError` if one side would have none.
    """
    found, shorter = [], 2 * size if size * CLOSEST * 1.25 > SHORTER_SIDE else SHORTER_SIDE
    with progress_bar(len(files), "look", "photograph") as bar:
        for number, file in enumerate(files):
            photograph = read_photograph(file, SHORTER_SIDE)
            draws = uniforms(key_of(0, 0, Stream.PREPARATION), np.array([number]), PROBES * BOX).reshape(PROBES, BOX)
            shares = [texture(crop(photograph, PROBE_SIDE, draw[1:])) for draw in draws]
            if sum(share >= TEXTURED for share in shares) >= FEWEST_TEXTURED:
                found.append(photograph if shorter == SHORTER_SIDE else read_photograph(file, shorter))
            bar.update()
    if len(found) < VALIDATION:
        raise UserError(
            f"{len(found)} of {len(files)} photographs have texture, expected {VALIDATION} or more; install more"
        )
    return {
        "train": [photograph for number, photograph in enumerate(found, 1) if number % VALIDATION],
        "val": found[VALIDATION - 1 :: VALIDATION],
    }
