"""The fields of a recipe that learns from several views of each image (iBOT): crops, masks, head, teacher."""

from dataclasses import dataclass
from typing import Any

from fasthpm.colours import VIEW_AUGMENTS
from fasthpm.options import RELEASED, option

MOST_VIEWS = 64  # of an image: its views are numbered in the keys of what is drawn for them
# How only the pretraining of a run's encoder is optimised, and its tuning is not.
PRETRAINING_ALONE: dict[str, Any] = {"clip_per_tensor": False, "weight_decay_end": -1.0, "freeze_last_layer_epochs": 0}


@dataclass(frozen=True)
class ViewFields:
    """Part of `Recipe`; all but the first concern recipes whose `target` is distributions."""

    global_crops: int = option(1, "views of each image in its full size; iBOT: 2", above=0, origin=f"{RELEASED}, iBOT")
    crop_max: float = option(1.0, "the largest share of the area that a random crop covers", above=0, high=1)
    local_crops: int = option(0, "small crops of each image beside them, for the cls loss; iBOT: 0 or 10", low=0)
    local_size: int = option(96, "side of the small crops, a multiple of patch_size", above=0)
    local_crop_min: float = option(0.05, "smallest share of the area that a small crop covers", above=0, high=1)
    local_crop_max: float = option(0.25, "the largest", above=0, high=1)
    view_augment: str = option(
        "none", "colours of views: dino: jitter, grey, blur and solarisation, on the device", choices=VIEW_AUGMENTS
    )
    mask_ratio_spread: float = option(
        0.0, "views: each image's mask_ratio is drawn from this much below it to as much above", low=0, high=1
    )
    unmasked_share: float = option(0.0, "views: share of the images of which nothing is masked", low=0, below=1)
    prototypes: int = option(8192, "outputs of the projection head", above=1)
    head_hidden: int = option(2048, "width of its layers", above=0)
    head_free_norm: bool = option(False, "each prototype's length is learnt, too (iBOT: of small models)")
    temperature_start: float = option(0.04, "the teacher's softmax temperature, at the start", above=0, high=1)
    temperature: float = option(0.07, "the same after temperature_epochs", above=0, high=1)
    temperature_epochs: float = option(30.0, "epochs of its linear way there", low=0)
    centre_momentum: float = option(0.9, "of the teacher's centres, which move once per update", low=0, below=1)
