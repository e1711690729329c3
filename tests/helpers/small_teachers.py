"""Small timm architectures, built like those of DINO and CLIP, for the code path of the full-size ones."""

from functools import partial
from typing import Any

from timm.layers.activations import QuickGELU
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

WIDTH, PROJECTED = 32, 24  # of the tokens; after CLIP's projection
SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


@register_model
def fasthpm_small_dino(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """DINO's: LayerNorm eps 1e-6, exact GELU."""
    return VisionTransformer(**SIZES, **_known(options))


@register_model
def fasthpm_small_clip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """OpenAI's CLIP's: norm before the blocks, no bias in the patch embedding, eps 1e-5, quick GELU."""
    return VisionTransformer(
        **SIZES, pre_norm=True, act_layer=QuickGELU, norm_layer=partial(nn.LayerNorm, eps=1e-5), **_known(options)
    )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """timm hands every builder its own keywords, too."""
    return {key: options[key] for key in ("img_size", "num_classes") if key in options}


TARGETS: dict[str, dict[str, Any]] = {  # as recipe fields
    "dino": {"target": "dino", "target_model": "fasthpm_small_dino", "target_dim": WIDTH},
    "clip": {"target": "clip", "target_model": "fasthpm_small_clip", "target_dim": PROJECTED},
}
