"""A run without a training and a folder of images, made once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from fasthpm import recipes
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.patches import model_of


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with untrained weights of the debug recipe, and its teacher."""
    output = tmp_path_factory.mktemp("maps") / "run"
    recipe = dataclasses.replace(recipes.debug(), output_dir=str(output))
    aside = checkpoint_folder.begin(output, 0)
    weights = {name: value.contiguous() for name, value in model_of(recipe).named_parameters()}
    for name in ("student", "teacher"):
        save_file(weights, aside / f"{name}.safetensors")
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(0, {}, 1, 1))
    return output


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five grey images of different sizes: flat, half flat, and noise; and one file that is no image."""
    target = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    half = noise.copy()
    half[:20] = 90
    pictures = {
        "noise": noise,
        "flat": np.full((28, 28), 90, np.uint8),
        "half": half,
        "small": noise[:9, :9],
        "wide": noise[:14],
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(target / f"{name}.png")
    (target / "broken.png").write_bytes(b"no image")
    return target
