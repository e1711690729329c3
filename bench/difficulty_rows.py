"""Sets, lengths and rows of `bench.evidence_difficulty`, each row a few fields of a recipe."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Set:
    """A data set and how its runs are made."""

    recipe: str
    fields: dict[str, Any]
    paths: tuple[str, str]  # train and val, below --data
    plain: str  # the model without a loss predictor
    masks: bool = False  # whether train/ and val/ have object masks (objects/)
    maps: bool = True  # whether a teacher's maps can be kept
    slots: bool = False  # whether HPM masks slot by slot, where `mask_policy random` does not


SETS = {
    "fashion": Set("hpm_demo", {}, ("train.beton", "val.beton"), "mae_vit_nano_patch4_28"),
    "scenes": Set(
        "hpm_demo",
        {"input_size": 64, "patch_size": 8, "channels": 3},
        ("train_set.beton", "val_set.beton"),
        "mae_vit_nano_patch4_28",
        masks=True,
    ),
    "video": Set(
        "hpm_video_demo",
        # the demo's 0.999 averages over more than a short run: the map would be an earlier student's
        {"video_decoder": "turbojpeg", "ema_momentum_end": 0.99},
        ("train", "val"),
        "videomae_vit_nano_patch8_32",
        maps=False,
        slots=True,
    ),
}
LENGTHS = {  # epochs, updates per epoch, batch size
    "short": (20, 32, 32),
    "long": (20, 160, 64),
}
PAPER: dict[str, Any] = {"difficulty": "paper", "predict_loss": "relative"}  # where a row does not say otherwise
RANDOM: dict[str, Any] = {"mask_policy": "random", "difficulty": "paper"}
ALONE: dict[str, Any] = {"predict_loss": "none"}  # no loss predictor
PLAIN: dict[str, Any] = {**RANDOM, **ALONE}
CROSS: dict[str, Any] = {"decoder_attention": "cross"}
KEPT: dict[str, Any] = {"teacher_maps": True, "map_refresh_epochs": 10}
HARD: dict[str, Any] = {"alpha_start": 1.0, "alpha_end": 1.0}
CHANCE: dict[str, Any] = {"alpha_start": 0.0, "alpha_end": 0.0}  # the teacher is asked, and nobody follows it


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    title: str
    fields: dict[str, Any]
    control: str = ""  # the row with random masks that it is compared with
    kept: bool = False  # follows kept maps where the set has them


CONTROLS = {
    "mae": Method("MAE, random masks", PLAIN),
    "mae_same_cost": Method("MAE, given the compute of `measured`", PLAIN, "mae"),
    "random": Method("random masks, with loss predictor", RANDOM),
    "random_fast": Method("random masks, predictor shared, cross decoder", {**RANDOM, **CROSS, "predictor": "shared"}),
    "mae_cross": Method("MAE with a cross decoder", {**PLAIN, **CROSS}, "mae"),
}
SLOTS = {  # the same with as many masked patches in every slot of a clip
    f"{name}_slots": Method(
        f"{CONTROLS[name].title}, slot by slot",
        {**CONTROLS[name].fields, "mask_policy": "hpm", "difficulty": "measured", **CHANCE},
        name,
    )
    for name in ("mae", "random", "random_fast", "mae_cross")
}
HARDEST = {
    "paper": Method("paper: the predictor on visible tokens", {"difficulty": "paper"}, "random"),
    "masked_query": Method("masked_query: the predictor on mask tokens", {"difficulty": "masked_query"}, "random"),
    "in_place": Method("in_place: a head, and the predictor", {"difficulty": "in_place"}, "random"),
    "in_place_alone": Method("in_place: a head, no predictor", {"difficulty": "in_place", **ALONE}, "mae"),
    "measured": Method("measured: two looks, no predictor", {"difficulty": "measured", **ALONE}, "mae"),
    "fast": Method(
        "fast: masked_query, kept maps, shared, cross", {**CROSS, "predictor": "shared"}, "random_fast", kept=True
    ),
    "fast_measured": Method(
        "measured, kept maps, cross", {"difficulty": "measured", **ALONE, **CROSS}, "mae_cross", kept=True
    ),
}
METHODS = {
    **CONTROLS,
    **SLOTS,
    **HARDEST,
    **{
        f"{name}_quarter": dataclasses.replace(
            m, title=f"{m.title}, α 0 → 0.25", fields={**m.fields, "alpha_end": 0.25}
        )
        for name, m in HARDEST.items()
    },
    **{
        f"{name}_hardest": dataclasses.replace(m, title=f"{m.title}, α 1 → 1", fields={**m.fields, **HARD})
        for name, m in HARDEST.items()
    },
}
