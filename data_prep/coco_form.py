"""COCO's form of what is in images: boxes, areas, run-length masks, categories."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasthpm.data.sampling import Array


def file_name(number: int) -> str:
    """Of an image, in its split's folder of images."""
    return f"{number:08d}.png"


def run_lengths(mask: Array) -> list[int]:
    """Lengths of the runs of False and True of bool [H, W] in turn, column by column, the first of False (maybe 0)."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [~mask.ravel(order="F")[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(ends, prepend=0).tolist()


def annotation(label: int, mask: Array) -> dict[str, Any]:
    """What COCO says of an object, without its numbers. The box is left, top, width, height."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "category_id": label + 1,
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
        "iscrowd": 0,
    }


def coco(size: int, objects: Sequence[Sequence[dict[str, Any]]], classes: Sequence[str], kind: str) -> dict[str, Any]:
    """A whole file of COCO's: images by number, the objects of each, categories from 1; `kind`: "garment"."""
    every = [(number, thing) for number, things in enumerate(objects) for thing in things]
    return {
        "info": {"description": f"{kind}s on photographs, made by data_prep.scenes"},
        "images": [
            {"id": number, "file_name": file_name(number), "width": size, "height": size}
            for number in range(len(objects))
        ],
        "annotations": [{"id": k, "image_id": number, **thing} for k, (number, thing) in enumerate(every, 1)],
        "categories": [{"id": k, "name": name, "supercategory": kind} for k, name in enumerate(classes, 1)],
    }
