"""Images, their masks and what the network says, side by side with a legend of the classes."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fasthpm import files
from fasthpm.data.sampling import Array
from fasthpm.dense.pairs import BACKGROUND, IGNORED

PANELS = ("image", "mask", "prediction")
SIDE, LARGEST = 192, 384  # pixels of a panel's longer side, at least and at most
GAP, LINE, SWATCH = 6, 16, 12
COLUMN = 150  # pixels that a class has in the legend
PAPER, INK, GREY = (255, 255, 255), (30, 30, 30), (110, 110, 110)
NOTHING = (0, 0, 0)  # pixels that are ignored
GOLDEN = 0.618034


class Example(NamedTuple):
    """An image uint8 [H, W, C], its labels and the predicted ones, uint8 [H, W]."""

    image: Array
    truth: Array
    predicted: Array


def draw(examples: Sequence[Example], classes: Sequence[str]) -> Image.Image:
    """A row per example; below them the classes that occur anywhere, each with its colour."""
    colours = palette(classes)
    rows = [[enlarged(part) for part in painted(example, colours)] for example in examples]
    occurring = sorted({int(label) for one in examples for part in one[1:] for label in np.unique(part)} - {IGNORED})
    panel = max(row[0].width for row in rows) + GAP
    width = max(GAP + panel * len(PANELS), GAP + COLUMN * 2)
    columns = (width - GAP) // COLUMN
    legend = LINE * -(-(len(occurring) + 1) // columns) + GAP
    heights = [row[0].height + GAP for row in rows]
    sheet = Image.new("RGB", (width, LINE + sum(heights) + legend), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(PANELS):
        pen.text((GAP + number * panel, 2), name, fill=INK)
    for row, top in zip(rows, np.cumsum([LINE, *heights]).tolist(), strict=False):
        for number, part in enumerate(row):
            sheet.paste(part, (GAP + number * panel, top))
    entries = [("ignored", NOTHING), *((classes[label], tuple(colours[label].tolist())) for label in occurring)]
    for number, (name, colour) in enumerate(entries):
        x, y = GAP + number % columns * COLUMN, LINE + sum(heights) + number // columns * LINE
        pen.rectangle((x, y, x + SWATCH, y + SWATCH), fill=colour)
        pen.text((x + SWATCH + GAP, y), shortened(name, pen), fill=INK)
    return sheet


def save(examples: Sequence[Example], classes: Sequence[str], path: Path) -> None:
    """`draw`, as PNG. **Raises:** `UserError` if the disk does not take it."""
    with files.writing(path, "choose another --output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as aside:
            draw(examples, classes).save(aside, format="PNG")


def palette(classes: Sequence[str]) -> Array:
    """Colours that neighbours in the list do not share, grey for the background: uint8 [256, 3], the last one of what
    is ignored."""
    table = np.zeros((IGNORED + 1, 3), np.uint8)
    for label, name in enumerate(classes):
        value = (0.95, 0.7)[label // 8 % 2]
        colour = [round(255 * part) for part in colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.75, value)]
        table[label] = GREY if name.lower() == BACKGROUND else colour
    table[IGNORED] = NOTHING
    return table


def painted(example: Example, colours: Array) -> list[Image.Image]:
    """The three panels."""
    image = example.image if example.image.shape[2] == 3 else example.image.repeat(3, axis=2)
    return [Image.fromarray(np.ascontiguousarray(part)) for part in (image, *(colours[one] for one in example[1:]))]


def enlarged(panel: Image.Image) -> Image.Image:
    """Small panels larger by a whole factor, large ones smaller; labels are not mixed."""
    longest = max(panel.size)
    factor = -(-SIDE // longest) if longest < SIDE else min(1.0, LARGEST / longest)
    width, height = (max(round(side * factor), 1) for side in panel.size)
    return panel.resize((width, height), Image.Resampling.NEAREST)


def shortened(name: str, pen: ImageDraw.ImageDraw) -> str:
    """A class's name as far as there is room, in letters that Pillow's own font has."""
    name = name.encode("latin-1", "replace").decode("latin-1")
    room = COLUMN - SWATCH - 2 * GAP
    if pen.textlength(name) <= room:
        return name
    while name and pen.textlength(name + "...") > room:
        name = name[:-1]
    return name + "..."
