"""What masked patches are reconstructed as: their pixels, or features that a teacher gives of them.

A target is one record in `TARGETS`; the recipe, the model and the step read it. `fasthpm.frozen` builds the teachers
that do not learn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from fasthpm.loss import feature_loss

TEACHERS = ("", "ema", "frozen")


@dataclass(frozen=True)
class Family:
    """A published kind of ViT, as a frozen teacher."""

    weights: str  # the papers' teacher, ViT-B/16
    architecture: str  # in timm
    mean: tuple[float, float, float]  # of the pixels that it was trained on, 0..1
    std: tuple[float, float, float]
    projected: bool  # whether its features are those after the head: CLIP's projection


@dataclass(frozen=True)
class Target:
    """A reconstruction target, and all that the package must know of it. `register` makes it a --target.

    - `teacher`: who gives the features: "" nobody, they are pixels; "ema", the teacher of the run; "frozen", one that
      does not learn: a ViT of `family`, or whatever `build` makes
    - `width`: features per patch D', where the recipe's target_dim does not say; 0 = as wide as the encoder
    - `loss`: (prediction, features), [B, M, D'] each -> loss of every patch [B, M]; the gradient reaches the prediction
    - `build`: (recipe, device, dtype) -> a module: uint8 images [B, H, W, C] -> features of all patches [B, L, D']
    """

    name: str
    summary: str  # one line for the docs
    teacher: str = "frozen"
    width: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = feature_loss
    family: Family | None = None
    build: Callable[..., Any] | None = None


TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make `target` known under its name. **Raises:** `ValueError` for a record that cannot work."""
    if target.name in TARGETS:
        raise ValueError(f"there is a target {target.name} already; give the new one another name")
    if target.teacher not in TEACHERS:
        raise ValueError(f"target {target.name} has teacher {target.teacher!r}, expected one of {TEACHERS}")
    if target.teacher == "frozen" and not (target.family or target.build):
        raise ValueError(f"target {target.name} has a frozen teacher, but neither family nor build; give one of them")
    TARGETS[target.name] = target
    return target


register(Target("pixels", "the pixels of the patch (MAE, HPM)", teacher=""))
register(Target("ema", "features by the EMA teacher of the run (HPM's ablation)", teacher="ema"))
register(
    Target(
        "dino",
        "features of every patch by a frozen DINO (HPM's ablation)",
        width=768,
        family=Family(
            "timm:vit_base_patch16_224.dino", "vit_base_patch16_224", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, False
        ),
    )
)
register(
    Target(
        "clip",
        "features of every patch by a frozen CLIP, after its projection (HPM's ablation)",
        width=512,
        # OpenAI trained with the quick GELU; with the exact one the same weights give other features.
        family=Family(
            "timm:vit_base_patch16_clip_quickgelu_224.openai",
            "vit_base_patch16_clip_quickgelu_224",
            OPENAI_CLIP_MEAN,
            OPENAI_CLIP_STD,
            True,
        ),
    )
)
