"""Pictures of segmentations: what stands where, and in which colour."""

from pathlib import Path

import numpy as np
from PIL import Image

from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.segmentation.pictures import GAP, LINE, Example, draw, palette, save

CLASSES = ("background", "a very long name of a class that has no room", "бег", "cat")


def example(height: int, width: int, channels: int = 3) -> Example:
    image = np.full((height, width, channels), 77, np.uint8)
    truth = np.zeros((height, width), np.uint8)
    truth[0] = IGNORED
    truth[-1] = 3
    return Example(image, truth, np.full((height, width), 2, np.uint8))


def test_panels_stand_side_by_side_in_the_colours_of_their_classes() -> None:
    sheet = np.array(draw([example(48, 64), example(96, 96)], CLASSES))
    colours = palette(CLASSES)
    pitch = 192 + GAP  # panels of 64 x 48 pixels are enlarged three times, those of 96 x 96 twice
    image, truth, guess = (sheet[LINE : LINE + 144, GAP + k * pitch : GAP + k * pitch + 192] for k in range(3))
    assert (image == 77).all()
    assert (truth[:3] == 0).all()
    assert (truth[3:-3] == colours[0]).all()
    assert (truth[-3:] == colours[3]).all()
    assert (guess == colours[2]).all()
    second = sheet[LINE + 144 + GAP :][:192, GAP : GAP + 192]
    assert (second == 77).all()
    shown = {tuple(colour) for colour in sheet[LINE + 144 + 192 + 2 * GAP :].reshape(-1, 3)}
    assert {tuple(colours[label]) for label in (0, 2, 3)} <= shown
    assert tuple(colours[1]) not in shown  # it does not occur


def test_colours_differ() -> None:
    colours = palette([str(label) for label in range(150)])[:150].astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(2) + 1000 * np.eye(150, dtype=int)
    assert apart[:16, :16].min() > 60
    assert apart.min() > 0
    assert palette(CLASSES)[0].tolist() == [110, 110, 110]


def test_large_and_grey_images_are_written(tmp_path: Path) -> None:
    save([example(500, 1000, 1)], CLASSES, tmp_path / "new" / "p.png")
    with Image.open(tmp_path / "new" / "p.png") as sheet:
        assert sheet.width == 3 * (384 + GAP) + GAP
