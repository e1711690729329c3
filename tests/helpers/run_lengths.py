"""COCO's run-length masks."""

from typing import Any

import numpy as np


def decoded(segmentation: dict[str, Any]) -> np.ndarray:
    """COCO's run lengths by the plain loop: bool [H, W]."""
    flat: list[bool] = []
    for number, length in enumerate(segmentation["counts"]):
        flat += [number % 2 == 1] * length
    return np.array(flat).reshape(segmentation["size"][::-1]).T
