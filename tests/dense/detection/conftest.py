"""Small sets in COCO's form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIZES = ((40, 60), (50, 30), (32, 32))  # height, width


def square(left: float, top: float, right: float, bottom: float) -> list[float]:
    """A rectangle as COCO's polygon."""
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(number: int, image: int, category: int, box: tuple[float, float, float, float]) -> dict[str, Any]:
    """An object that fills its box: left, top, width, height."""
    left, top, width, height = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [square(left, top, left + width, top + height)],
    }


def annotations() -> dict[str, Any]:
    """Three images of two classes, the last without an object."""
    return {
        "images": [{"id": 10 + k, "file_name": f"{k}.png", "height": h, "width": w} for k, (h, w) in enumerate(SIZES)],
        "annotations": [
            annotation(1, 10, 7, (5, 6, 20, 10)),
            annotation(2, 10, 3, (30, 10, 25, 25)),
            annotation(3, 11, 3, (2, 2, 10, 30)),
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


@pytest.fixture
def content() -> dict[str, Any]:
    return annotations()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a set's file and images; returns the file. `images`: False leaves them out."""

    def written(content: Any, name: str = "train", images: bool = True) -> Path:
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True, exist_ok=True)
        if images:
            generator = np.random.default_rng(0)
            for number, (height, width) in enumerate(SIZES):
                pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
        path = tmp_path / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written
