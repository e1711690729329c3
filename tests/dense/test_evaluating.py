"""A network that others fine-tuned, tested here from its file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fasthpm.dense import detection, segmentation
from tests.helpers import openmmlab
from tests.helpers.finetuning import read, refused, start
from tests.helpers.openmmlab import CLASSES, SIZES, upernet_state

SIDE, IMAGES = 16, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, and labels of 5 classes; value 0 is the first."""
    root, random = tmp_path_factory.mktemp("foreign"), np.random.default_rng(0)
    for kind, shape, high in (("images", (SIDE, SIDE, 3), 256), ("masks", (SIDE, SIDE), CLASSES)):
        (root / "val" / kind).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = random.integers(0, high, shape).astype(np.uint8)
            Image.fromarray(pixels).save(root / "val" / kind / f"{number}.png")
    (root / "classes.txt").write_text("".join(f"class{number}\n" for number in range(CLASSES)))
    return root


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmseg") / "iter_160000.pth"
    torch.save({"state_dict": upernet_state(), "meta": {}}, path)
    return path


def twins_miou(data: Path) -> float:
    """mmseg's computation of whole images, spelled out, and intersection over union by counting."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    predicted, truth = [], []
    for number in range(IMAGES):
        pixels = torch.from_numpy(np.array(Image.open(data / "val" / "images" / f"{number}.png")))
        images = (pixels.permute(2, 0, 1)[None] / 255 - mean) / std
        heads: Any = SIZES["num_heads"]
        logits, _ = openmmlab.upernet(upernet_state(), images, heads, (0, 1, 2, 3))
        enlarged = torch.nn.functional.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        predicted.append(enlarged.argmax(1)[0])
        truth.append(torch.from_numpy(np.array(Image.open(data / "val" / "masks" / f"{number}.png"))))
    found, wanted = torch.stack(predicted), torch.stack(truth)
    shares = [
        ((found == label) & (wanted == label)).sum() / ((found == label) | (wanted == label)).sum()
        for label in range(CLASSES)
    ]
    return float(100 * torch.stack(shares).mean())


def test_mmsegs_upernet_is_evaluated_from_its_file(data: Path, file: Path) -> None:
    start(segmentation, file, "--evaluate", "--data_path", data, "--background", "first", "--pictures", 2)
    found = read(file.parent / "iter_160000_segment" / "result.json")
    assert found["miou"] == pytest.approx(twins_miou(data), abs=0.05)
    assert found["checkpoint"] == str(file)
    assert len(found["classes"]) == CLASSES
    assert (file.parent / "iter_160000_segment" / "pictures.png").is_file()


def test_files_that_do_not_fit_are_refused(data: Path, file: Path, tmp_path: Path) -> None:
    flags = ("--evaluate", "--data_path", data, "--output_dir", tmp_path / "out")
    said = refused(segmentation, file, *flags)  # without --background first there is one more class
    assert f"tells {CLASSES} classes apart" in said
    assert "give a run, or --evaluate" in refused(segmentation, file, "--data_path", data)
    assert "is a network for fasthpm segment" in refused(detection, file, *flags)
    torch.save({"state_dict": {**upernet_state(), "decode_head.mystery": torch.zeros(1)}}, tmp_path / "odd.pth")
    assert "decode_head.mystery" in refused(segmentation, tmp_path / "odd.pth", *flags)
    for more, said in (
        (("--steps", 7), "--steps is 7, and the network in"),
        (("--input_size", 32), f"is tested as it was trained, with '{SIDE}'; leave it out"),
        (("--resume", file), "--evaluate tests the newest checkpoint"),
    ):
        assert said in refused(segmentation, file, *flags, *more)
    ours = tmp_path / "network.safetensors"
    for name, command in (("net.weight", "segment"), ("roi_heads.weight", "detect")):
        save_file({name: torch.zeros(1)}, ours, {"notes": json.dumps({"run": "runs/a"})})
        said = f"test it with fasthpm {command} runs/a --evaluate --output_dir {tmp_path}"
        assert said in refused(segmentation, ours, *flags)
    assert not (tmp_path / "out").exists()
