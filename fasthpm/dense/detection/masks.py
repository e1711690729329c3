"""Masks of objects: COCO's polygons and run lengths as pixels and back, tight boxes, masks of detections.

Polygons are rasterised by faster_coco_eval's mask functions, which are pycocotools' to the pixel. H x W is the image.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

FEWEST = 6  # numbers of a polygon: three corners
FAR = 10  # a corner so many images away is a mistake, and would cost memory
THRESHOLD = 0.5  # of a detection's probability that a pixel is its object's


def coco_library(module: str) -> Any:
    """A module of faster_coco_eval. **Raises:** `UserError` that says how to install it."""
    try:
        return importlib.import_module(f"faster_coco_eval.core.{module}")
    except ImportError as error:
        raise UserError(
            f"detection needs faster-coco-eval, which does not import ({error}); install it: pip install "
            f"'fasthpm[dense]'"
        ) from error


# -------------------------------------------------------------------------------------------------- COCO's forms
def problem_of(segmentation: Any, height: int, width: int) -> str:
    """What is wrong with what a COCO file says of a mask, "" if nothing can be seen without decoding it."""
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if size != [height, width]:
            return f"a mask of {size} in an image of {[height, width]}"
        return "" if isinstance(segmentation.get("counts"), list | str) else "run lengths without counts"
    if not isinstance(segmentation, list) or not segmentation:
        return "no mask"
    reach = FAR * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < FEWEST or len(polygon) % 2:
            return "a polygon without three corners"
        try:
            if not (math.isfinite(sum(polygon)) and -reach <= min(polygon) and max(polygon) <= reach):
                return "a polygon far outside its image"
        except TypeError:
            return "a polygon of other things than numbers"
    return ""


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths, compressed or not, as one compressed run-length mask.

    **Raises:** `ValueError` for run lengths that do not fill the image.
    """
    api = coco_library("mask")
    if isinstance(segmentation, list):
        return api.merge(api.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return api.frPyObjects(segmentation, height, width)
    return segmentation


def decode(segmentations: Sequence[Any], height: int, width: int) -> Array:
    """Masks of objects as COCO says them: uint8 [N, H, W], 0 or 1.

    **Raises:** `ValueError` for run lengths that do not fill the image.
    """
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        try:
            mask[:] = coco_library("mask").decode(run_lengths(segmentation, height, width))
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"run lengths that cannot be read: {error}") from error
    return masks


def encode(masks: Array) -> list[dict[str, Any]]:
    """uint8 [N, H, W] -> N compressed run-length masks."""
    if not len(masks):
        return []
    return coco_library("mask").encode(np.asfortranarray(masks.transpose(1, 2, 0)))


# -------------------------------------------------------------------------------------------------- boxes
def tight_boxes(masks: Array) -> Array:
    """The box of each mask [N, H, W] as left, top, right, bottom: float32 [N, 4]; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for axis, (low, high) in ((1, (0, 2)), (2, (1, 3))):
        seen = np.asarray(masks.any(axis=axis))
        boxes[:, low] = seen.argmax(1)
        boxes[:, high] = seen.shape[1] - seen[:, ::-1].argmax(1)
    boxes[~masks.any(axis=(1, 2))] = 0
    return boxes


# -------------------------------------------------------------------------------------------------- detections
def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Array:
    """Masks of detections in their image: uint8 [N, H, W].

    A pixel's probability is read off at its centre, linearly between the mask's cells and zero outside the box, as
    detectron2 does (torchvision rounds the box to pixels first); at least `THRESHOLD` is the object.

    - `masks`: probabilities [N, 1, m, m] within the boxes; `boxes`: [N, 4], left, top, right, bottom, in pixels
    """
    found = np.zeros((len(masks), height, width), np.uint8)
    masks, boxes = masks.float().cpu(), boxes.float().cpu()
    for target, mask, box in zip(found, masks, boxes, strict=True):
        left, top = (max(math.floor(value) - 1, 0) for value in box[:2].tolist())
        right = min(math.ceil(float(box[2])) + 1, width)
        bottom = min(math.ceil(float(box[3])) + 1, height)
        if right <= left or bottom <= top:
            continue
        across, down = (
            (torch.arange(start, end) + 0.5 - low) / (high - low) * 2 - 1
            for start, end, low, high in ((left, right, box[0], box[2]), (top, bottom, box[1], box[3]))
        )
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
        values = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]
        target[top:bottom, left:right] = (values >= THRESHOLD).numpy()
    return found
