"""What masked patches are reconstructed as: their pixels, or what a teacher or a tokenizer gives of them.

A target is one record in `TARGETS`; the recipe, the model and the step read it. `fasthpm.frozen` builds the teachers
that do not learn, `fasthpm.tokenizers` the tokenizers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from fasthpm.objectives import OBJECTIVES, Objective, PatchLoss
from fasthpm.projection import cross_entropy

TEACHERS = ("", "ema", "frozen")
TOKENIZERS = ("kmeans", "dvae", "vqkd")  # how the target_weights of tokens begin; `tokenizers` makes them
TOKENS = 8192  # of the published tokenizers, DALL-E's and BEiT v2's


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
    - `objective`: a name in `objectives.OBJECTIVES`: what of the patches it is that the teacher gives
    - `loss`: (prediction, targets of the masked patches) -> loss of every patch [B, M], whose gradient reaches the
      prediction; None = the objective's
    - `build`: (recipe, device, dtype) -> a module: uint8 images [B, H, W, C] -> features of all patches [B, L, D'], or
      ids, int64 [B, L]
    - `tokenizers`: kinds of tokenizers of which target_weights names one, as KIND:FILE
    """

    name: str
    summary: str  # one line for the docs
    teacher: str = "frozen"
    width: int = 0
    objective: str = "features"
    loss: PatchLoss | None = None
    family: Family | None = None
    build: Callable[..., Any] | None = None
    tokenizers: tuple[str, ...] = ()

    def of_width(self, width: int) -> Objective:
        """What a model of `width` features or classes per patch learns of this target."""
        return OBJECTIVES[self.objective if self.teacher else "pixels"].as_wide_as(width, self.loss)


TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make `target` known under its name. **Raises:** `ValueError` for a record that cannot work."""
    if target.name in TARGETS:
        raise ValueError(f"there is a target {target.name} already; give the new one another name")
    if target.teacher not in TEACHERS:
        raise ValueError(f"target {target.name} has teacher {target.teacher!r}, expected one of {TEACHERS}")
    if target.objective not in OBJECTIVES:
        raise ValueError(f"target {target.name} has objective {target.objective!r}, expected one of {(*OBJECTIVES,)}")
    if target.teacher == "frozen" and not (target.family or target.build or target.tokenizers):
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
register(
    Target(
        "tokens", "ids of every patch by a tokenizer (BEiT)", width=TOKENS, objective="tokens", tokenizers=TOKENIZERS
    )
)
register(
    Target(
        "distributions",
        "how the EMA teacher of the run spreads patch and image over prototypes, by several views (iBOT)",
        teacher="ema",
        objective="distributions",
        loss=cross_entropy,
    )
)
