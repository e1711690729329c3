"""How much the interpolations differ: the same crops of the same stored pixels, resized by each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.variants import SIDE, Spec, our_loader
from fasthpm.data import Batch
from fasthpm.data.ffcv.beton import RAW, open_beton
from fasthpm.data.sampling import Array

Resize = Callable[[Array], Array]  # uint8 [h, w, 3] -> uint8 [SIDE, SIDE, 3]


def opencv_area(crop: Array) -> Array:
    """What FFCV's decoder calls: OpenCV's INTER_AREA (linear where it enlarges)."""
    import cv2

    return cv2.resize(np.ascontiguousarray(crop), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def pil_bicubic(crop: Array) -> Array:
    """What torchvision does to a PIL image."""
    return np.asarray(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def references(path: Path, batch: Batch, resize: Resize) -> Array:
    """The crops of `batch` from a set of raw pixels, resized by `resize` and flipped: uint8 [B, SIDE, SIDE, 3]."""
    beton = open_beton(path)
    if not (beton.modes == RAW).all():
        raise ValueError(f"{path} holds compressed images")
    file = np.memmap(path, np.uint8, "r")
    out = []
    for index, (top, left, height, width, flipped) in zip(batch.ids.tolist(), batch.crops.tolist(), strict=True):
        start, shape = int(beton.positions[index]), (int(beton.heights[index]), int(beton.widths[index]), 3)
        pixels = file[start : start + int(np.prod(shape))].reshape(shape)
        resized = resize(pixels[top : top + height, left : left + width])
        out.append(resized[:, ::-1] if flipped else resized)
    return np.stack(out)


def compare_pixels(path: Path, images: int) -> dict[str, Any]:
    """Differences between our interpolations and the references on the first batch of a raw set."""
    batches = {}
    for how in ("area", "bicubic"):
        loader = our_loader(Spec(how, "ours", str(path), 1, images, how))
        batches[how] = next(iter(loader))
        loader.close()
    ours = {f"ours, {how}": batch.images.numpy() for how, batch in batches.items()}
    theirs = {"OpenCV's INTER_AREA (FFCV)": opencv_area, "PIL's bicubic (MAE)": pil_bicubic}
    all_pixels = ours | {name: references(path, batches["area"], resize) for name, resize in theirs.items()}
    names = list(all_pixels)
    return {
        f"{a} against {b}": difference(all_pixels[a], all_pixels[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def difference(a: Array, b: Array) -> dict[str, float]:
    """Mean and largest absolute difference."""
    apart = np.abs(a.astype(np.int16) - b)
    return {"mean": float(apart.mean()), "max": int(apart.max())}
