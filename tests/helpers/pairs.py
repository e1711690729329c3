"""Folders of images and masks in the layouts that `fasthpm.dense.pairs` reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

GARMENTS = ("shirt", "trousers", "bag", "boot")


def write(path: Path, pixels: np.ndarray) -> None:
    """An array as an image file, of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def colour(shape: Sequence[int], seed: int) -> np.ndarray:
    """Random colours, uint8 [*shape, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def scenes_folder(root: Path, masks: Sequence[np.ndarray], classes: Sequence[str] = GARMENTS) -> Path:
    """{train,val}/{images,masks}/ and classes.txt, the same masks in both."""
    for split in ("train", "val"):
        for number, mask in enumerate(masks):
            write(root / split / "images" / f"{number}.png", colour(mask.shape, number))
            write(root / split / "masks" / f"{number}.png", mask)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


def ade(root: Path, masks: Sequence[np.ndarray]) -> Path:
    """ADE20K's folders, with its table of classes."""
    for split in ("training", "validation"):
        for number, mask in enumerate(masks):
            write(root / "images" / split / f"ADE_{number}.jpg", colour(mask.shape, number))
            write(root / "annotations" / split / f"ADE_{number}.png", mask)
    names = [f"class {k}{', other name ' if k == 2 else ''}" for k in range(1, 151)]
    rows = [f"{k}\t0.1\t10\t1\t{name}\n" for k, name in enumerate(names, 1)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    return root


def own(root: Path, masks: Sequence[np.ndarray], classes: Sequence[str] = GARMENTS) -> dict[str, str]:
    """images/, masks/ and a file of classes, and the options that name them, to train."""
    for number, mask in enumerate(masks):
        write(root / "images" / f"{number}.png", colour(mask.shape, number))
        write(root / "masks" / f"{number}.png", mask)
    (root / "names").write_text("".join(f"{name}\n" for name in classes))
    return {"train_images": str(root / "images"), "train_masks": str(root / "masks"), "classes": str(root / "names")}
