"""The fast modes, and models that have them."""

import dataclasses
from typing import Any

import torch

from fasthpm import recipes
from fasthpm.model import HPMViT
from fasthpm.patches import model_of

MODES: dict[str, dict[str, Any]] = {
    "shared": {"predictor": "shared"},
    "cross": {"decoder_attention": "cross"},
    "both": {"predictor": "shared", "decoder_attention": "cross"},
    "shallow": {"decoder_depth": 2, "predictor_depth": 1},
    "scale": {"input_size": "32", "teacher_scale": 2},
}


def doubled(**changes: Any) -> HPMViT:
    """The debug recipe's model in float64, with biases and norms that matter."""
    model = model_of(dataclasses.replace(recipes.debug(), **changes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model
