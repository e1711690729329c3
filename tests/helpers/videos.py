"""Small video models and runs."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe
from tests.helpers.runs import run_of


def small(**options: Any) -> HPMViT:
    """A model of 2 slots of 2 frames, 2 x 3 patches each, with all parameters moved off their initial values."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": (4, 6), "patch_size": 2, "num_frames": 4, "tubelet_size": 2, "in_chans": 2}
    heads: dict[str, Any] = {"num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
    model = HPMViT(**{**sizes, "embed_dim": 16, "depth": 2, **heads, "video": True, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def video_run(folder: Path, **changes: Any) -> tuple[Path, HPMViT]:
    """A run folder whose weights, biases and norms are all away from their initial values, and its model."""
    return run_of(folder, tiny(**changes))


def tiny(**changes: Any) -> Recipe:
    """A video recipe of 4 slots of 2 x 2 patches."""
    base = Recipe(
        model="hpm_vit_nano_patch8_32_video",
        input_size="16",
        patch_size=8,
        num_frames=8,
        tubelet_size=2,
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=2,
        mask_ratio=0.5,
        norm_pix_loss=True,
        batch_size=2,
        data_path="synthetic:32",
    )
    return dataclasses.replace(base, **changes)
