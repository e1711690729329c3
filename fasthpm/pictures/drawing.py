"""How pictures are painted: values as colours, sheets, animations, files.

Pictures are given by name, uint8 [N, T, H, W, 3] each; an image is a video of one frame.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fasthpm.data.sampling import Array
from fasthpm.files import LONGEST_NAME, replacing
from fasthpm.maps.attention import ROUNDING

Pictures = dict[str, Array]
IMAGE_SIDE, FRAME_SIDE = 112, 56  # smaller ones are enlarged to at least this many pixels
GAP, HEADER, LINE = 4, 18, 14
MILLISECONDS = 120  # that a frame of the animation is shown


# -------------------------------------------------------------------------------------------------- pixels
def per_pixel(values: Array, size: tuple[int, ...]) -> Array:
    """One value per patch [..., R, C] -> one per pixel [..., H, W]; `size`: of as many last dimensions as it has."""
    for axis, length in zip(range(-len(size), 0), size, strict=True):
        values = values.repeat(length // values.shape[axis], axis=axis)
    return values


def heat(values: Array) -> Array:
    """[N, ...] -> colours uint8 [N, ..., 3], scaled per image or clip from its lowest to its highest value.

    Where they differ by rounding alone, all are the lowest.
    """
    from matplotlib import colormaps

    inner = tuple(range(1, values.ndim))
    return (colormaps["inferno"](from_0_to_1(values, inner))[..., :3] * 255).astype(np.uint8)


def from_0_to_1(values: Array, axes: tuple[int, ...] | None = None) -> Array:
    """Values scaled to [0, 1] over `axes`, None = all of them; 0 where they differ by the rounding of float32 alone."""
    low, high = values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)
    rounding = ROUNDING * np.finfo(np.float32).eps * np.maximum(abs(low), abs(high))
    return np.where(high - low > rounding, (values - low) / np.maximum(high - low, 1e-12), 0.0)


def blended(picture: Array, values: Array) -> Array:
    """Values [R, C] as colours over a picture, uint8 [H, W, 3], which stays as it is where they are NaN."""
    known = ~np.isnan(values)
    if not known.any():
        return picture
    size = picture.shape[0], picture.shape[1]
    colours = heat(per_pixel(np.where(known, values, values[known].min()), size)[None])[0]
    blend = (picture * 0.4 + colours * 0.6).astype(np.uint8)
    return blend if known.all() else np.where(per_pixel(known, size)[..., None], blend, picture)


# -------------------------------------------------------------------------------------------------- sheets
def sheet(pictures: Pictures, tubelet_size: int = 0) -> Array:
    """Everything on one sheet: uint8 [height, width, 3].

    - `tubelet_size`: frames of a slot; 0 = these are images

    Images have a row each, and a column per name. Clips have a row per name each, and a column per slot, of which
    the first frame is shown.
    """
    return _contact_sheet(pictures, tubelet_size) if tubelet_size else _panel(pictures)


def _panel(pictures: Pictures) -> Array:
    cells = _enlarged(np.stack(list(pictures.values()), axis=1)[:, :, 0], IMAGE_SIDE)
    pitch = cells.shape[-2] + GAP
    names = [_in_width(name, pitch) for name in pictures]
    header = HEADER + LINE * max(name.count("\n") for name in names)
    return _labelled(_paper(cells, above_all=header), {(GAP + x * pitch, 3): name for x, name in enumerate(names)})


def _in_width(name: str, width: int) -> str:
    """A name in one line, or, if it is wider than `width` pixels, with what is in brackets in a line of its own."""
    return name if ImageDraw.Draw(Image.new("L", (1, 1))).textlength(name) < width else name.replace(" (", "\n(", 1)


def _contact_sheet(pictures: Pictures, tubelet_size: int) -> Array:
    cells = np.concatenate([clip[:, ::tubelet_size] for clip in np.stack(list(pictures.values()), axis=1)])
    cells = _enlarged(cells, FRAME_SIDE)
    pitch = HEADER + cells.shape[-3] + GAP
    names = [
        f"{name} {clip + 1}" if row == 0 else name
        for clip in range(len(cells) // len(pictures))
        for row, name in enumerate(pictures)
    ]
    labels = {(GAP, GAP + row * pitch + 2): name for row, name in enumerate(names)}
    return _labelled(_paper(cells, above_each=HEADER), labels)


def animation(pictures: Pictures) -> bytes:
    """The clips as an endless GIF: a row per clip, a column per name."""
    frames = _paper(_enlarged(np.stack(list(pictures.values()), axis=1), FRAME_SIDE))
    first, *rest = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    first.save(file, format="gif", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)
    return file.getvalue()


def _enlarged(pictures: Array, least: int) -> Array:
    """[..., H, W, 3], each pixel repeated until W is `least` or more."""
    scale = max(1, -(-least // pictures.shape[-2]))
    return pictures.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _paper(cells: Array, *, above_all: int = 0, above_each: int = 0) -> Array:
    """Cells [rows, columns, ..., H, W, 3] on white, with gaps: uint8 [..., height, width, 3].

    - `above_all`, `above_each`: pixels left free above the first row, or above every row
    """
    rows, columns, *frames, height, width, _ = cells.shape
    pitch = above_each + height + GAP
    size = (GAP + above_all + rows * pitch, GAP + columns * (width + GAP), 3)
    paper = np.full((*frames, *size), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = GAP + above_all + row * pitch + above_each, GAP + column * (width + GAP)
        paper[..., top : top + height, left : left + width, :] = cells[row, column]
    return paper


def _labelled(paper: Array, labels: dict[tuple[int, int], str]) -> Array:
    """The picture with texts at (x, y)."""
    image = Image.fromarray(paper)
    draw = ImageDraw.Draw(image)
    for place, text in labels.items():
        draw.text(place, text, fill="black")
    return np.asarray(image)


# -------------------------------------------------------------------------------------------------- files
def file_name(name: str, ending: str) -> str:
    """The stem of a sample's name as a file's, cut to what file systems take, at a whole character."""
    head, _, rest = name.partition("-")
    stem = f"{head}-{Path(rest).stem}"
    while len(os.fsencode(stem)) > LONGEST_NAME - len(ending):
        stem = stem[:-1]
    return stem + ending


def save_png(picture: Array, path: Path) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    with replacing(path) as aside:
        Image.fromarray(picture).save(aside, format="png")


def save_gif(content: bytes, path: Path) -> None:
    """Write what `animation` gives, atomically."""
    with replacing(path) as aside:
        aside.write_bytes(content)
