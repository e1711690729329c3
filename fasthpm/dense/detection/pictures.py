"""Images with their true objects and with what was detected, side by side: boxes, masks, names and scores."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fasthpm import files
from fasthpm.data.sampling import Array

PANELS = ("truth", "prediction")
SIDE, LARGEST = 256, 512  # pixels of a panel's longer side, at least and at most
GAP, LINE = 6, 14
OPACITY = 0.45  # of masks
SURE, MOST = 0.3, 20  # detections that are drawn: from this score on, at most so many
HALF = 0.5  # of the best score, from which on they are drawn where none is sure
PAPER, INK, CROWD = (255, 255, 255), (30, 30, 30), (128, 128, 128)
GOLDEN = 0.618034


class Shown(NamedTuple):
    """An object as it is drawn."""

    label: int  # from 1; 0: a crowd
    score: float | None
    box: tuple[float, float, float, float]  # left, top, right, bottom
    mask: Array  # uint8 [H, W]


class Example(NamedTuple):
    """An image uint8 [H, W, 3], its objects, and what was detected."""

    image: Array
    truth: list[Shown]
    found: list[Shown]


def draw(examples: Sequence[Example], classes: Sequence[str]) -> Image.Image:
    """A row per example."""
    rows = [[panel(one.image, part, classes) for part in (one.truth, best(one.found))] for one in examples]
    width = max(row[0].width for row in rows) + GAP
    sheet = Image.new("RGB", (GAP + width * len(PANELS), LINE + GAP + sum(r[0].height + GAP for r in rows)), PAPER)
    pen, top = ImageDraw.Draw(sheet), LINE
    for number, name in enumerate(PANELS):
        pen.text((GAP + number * width, 1), name, fill=INK)
    for row in rows:
        for number, part in enumerate(row):
            sheet.paste(part, (GAP + number * width, top))
        top += row[0].height + GAP
    return sheet


def save(examples: Sequence[Example], classes: Sequence[str], path: Path) -> None:
    """`draw`, as PNG. **Raises:** `UserError` if the disk does not take it."""
    with files.writing(path, "choose another --output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as aside:
            draw(examples, classes).save(aside, format="PNG")


def best(found: Sequence[Shown]) -> list[Shown]:
    """The detections that are drawn, the worst first, so that the best lie on top: the sure ones, or where there is
    none those that come near the best."""
    ordered = sorted(found, key=lambda one: one.score or 0)
    most = (ordered[-1].score or 0) if ordered else 0
    limit = SURE if most >= SURE else HALF * most
    return [one for one in ordered if (one.score or 0) >= limit][-MOST:]


def panel(image: Array, objects: Sequence[Shown], classes: Sequence[str]) -> Image.Image:
    """One image with objects on it, enlarged or shrunk."""
    height, width = image.shape[:2]
    scale = max(SIDE / max(height, width), 1.0) if max(height, width) <= LARGEST else LARGEST / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    pixels = image.astype(np.float32)
    for one in objects:
        inside = one.mask.astype(bool)
        pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(colour(one.label), np.float32)
    sheet = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(sheet)
    for one in objects:
        left, top, right, bottom = (value * scale for value in one.box)
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour(one.label))
        write(pen, (left, top), said(one, classes), one.label, size)
    return sheet


def write(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, label: int, size: tuple[int, int]) -> None:
    """A name above a box's corner, inside the panel."""
    left, top, right, bottom = pen.textbbox((0, 0), text)
    wide, tall = right - left + 2, bottom - top + 2
    x, y = min(max(corner[0], 0), max(size[0] - wide, 0)), max(corner[1] - tall, 0)
    pen.rectangle((x, y, x + wide, y + tall), fill=colour(label))
    pen.text((x + 1 - left, y + 1 - top), text, fill=PAPER)


def said(one: Shown, classes: Sequence[str]) -> str:
    """Name and score."""
    name = classes[one.label - 1] if one.label else "crowd"
    return name if one.score is None else f"{name} {one.score:.2f}"


def colour(label: int) -> tuple[int, int, int]:
    """That of a class; neighbours in the list differ."""
    if not label:
        return CROWD
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.85, (0.85, 0.6)[label // 8 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)
