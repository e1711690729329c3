"""Small video models and runs."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe


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
    recipe = tiny(**changes)
    model = model_of(recipe).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    aside = checkpoint_folder.begin(folder, 3)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, aside / "student.safetensors")
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(3, {}, 1, 1))
    return folder, model


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
