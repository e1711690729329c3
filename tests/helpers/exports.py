"""Runs to export, and what a user does with an exported file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import recipes
from fasthpm.__main__ import dispatch
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe
from tests.helpers.runs import run_of

OWN: dict[str, dict[str, Any]] = {  # the changes to a run that a form needs which does not take any
    "hf_videomae": {"model": "hpm_vit_nano_patch8_32_video", "num_frames": 4, "tubelet_size": 2},
    "hf_beit_mim": {
        "model": "beit_vit_nano_patch4_28",
        "target": "tokens",
        "target_dim": 9,
        "norm_pix_loss": False,
        "mask_policy": "random",
        "predict_loss": "none",
    },
}


def run_with(folder: Path, **changes: Any) -> tuple[Path, HPMViT]:
    """A run whose weights, biases and norms are all away from their initial values, and its model."""
    sizes = {"input_size": "12", "channels": 3, "decoder_depth": 2, "norm_pix_loss": True}
    return run_of(folder, Recipe(**{**vars(recipes.debug()), **sizes, **changes}))


def pictures(model: HPMViT, count: int = 2) -> Tensor:
    """Normal noise as a model takes it, float32 [count, C, (T,) H, W]."""
    frames = (model.num_frames,) if model.video else ()
    shape = (count, model.in_chans, *frames, *model.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def close(theirs: Tensor, ours: Tensor) -> None:
    """Equal as float32 computes."""
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def loaded(line: str) -> Any:
    """The `model` of a line of Python that stands alone."""
    namespace: dict[str, Any] = {}
    exec(line, namespace)
    return namespace["model"]


def export(run: Path, form: str, output: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Export by command, and load the file by the very line that was printed."""
    dispatch(["export", str(run), "--format", form, "-o", str(output)])
    printed = capsys.readouterr().out
    return loaded(next(line for line in printed.splitlines() if line.startswith("load it with: "))[14:])
