"""What a step costs with each way to ask what is hard, of a recipe and in the forms that make it cheaper."""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

from fasthpm import recipes
from fasthpm.difficulty import DIFFICULTIES, question_of
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed.flops import mae_of, step_flops
from fasthpm.speed.traffic import step_bytes

FORMS = ("in every step", "cross decoders", "kept maps", "both")  # how often a teacher is asked, and what it has
PAGE = {  # of docs/recipes.md
    "ViT-B": "hpm_vit_base_in1k_200e",
    "ViT-L": "hpm_vit_large_in1k_200e",
    "ViT-B, clips": "hpm_video_vit_base_k400_800e",
    "ViT-L, clips": "hpm_video_vit_large_k400_800e",
}
ALONE: dict[str, Any] = {  # no loss predictor
    "predict_loss": "none",
    "predictor": "separate",
    "predictor_dim": 0,
    "predictor_depth": 0,
    "absolute_standardize": True,
}


class Work(NamedTuple):
    """Of a step, per sample."""

    flops: float
    traffic: float  # bytes

    def over(self, other: "Work") -> str:
        """FLOPs over the other's, and MB in brackets."""
        return f"{self.flops / other.flops:.2f} ({_digits(self.traffic / 1e6)})"


def work_of(recipe: Recipe) -> Work:
    """By the formulas of `speed`; a frozen teacher of features is not in it."""
    model = _model(dataclasses.replace(recipe, teacher_maps=False, map_refresh_epochs=1))  # which are none of a model's
    return Work(step_flops(model, recipe)["total"], step_bytes(model, recipe)["total"])


@functools.cache
def _model(recipe: Recipe) -> HPMViT:
    with torch.device("meta"):
        return model_of(recipe)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def sentence(recipe: Recipe) -> str:
    """What a step of a recipe costs; "MAE's" is that without teacher and loss predictor, of SimMIM too."""
    own, mae = work_of(recipe), work_of(mae_of(recipe))
    return (
        f"A step: {_digits(own.flops / 1e9)} GFLOP and {_digits(own.traffic / 1e6)} MB of memory traffic per sample, "
        f"{own.flops / mae.flops:.2f} x MAE's FLOPs."
    )


def ways(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every difficulty, with the recipe's loss predictor and, where it needs none, without, as changes to a recipe."""
    found: dict[str, dict[str, Any]] = {}
    predicts = {} if recipe.predict_loss != "none" else {"predict_loss": "relative"}
    for name, way in DIFFICULTIES.items():
        if question_of(name, recipe.decoder_attention) == name:  # else it is another one here
            found[name] = {"difficulty": name, **predicts}
            if not way.predictor:
                found[f"{name}, no loss predictor"] = {"difficulty": name, **ALONE}
    return found


def forms(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """`FORMS` as changes to a recipe; maps are renewed as often as the fast recipes do, or the recipe does."""
    epochs = recipe.map_refresh_epochs if recipe.teacher_maps else recipes.FAST_REFRESH_EPOCHS
    each = {"teacher_maps": False}
    kept = {"teacher_maps": True, "map_refresh_epochs": epochs}
    cross = {"decoder_attention": "cross"}
    return dict(zip(FORMS, (each, {**each, **cross}, kept, {**kept, **cross}), strict=True))


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The recipe with `changes`; None if it cannot have them."""
    try:
        return dataclasses.replace(recipe, **changes)
    except UserError:
        return None


def table(recipe: Recipe) -> list[tuple[str, ...]]:
    """A head and a row for every difficulty: FLOPs over MAE's (MB of memory traffic per sample) in each of `FORMS`; "-"
    for what the recipe cannot have."""
    mae = work_of(mae_of(recipe))
    rows: list[tuple[str, ...]] = [("difficulty", *FORMS)]
    for way, fields in ways(recipe).items():
        made = [changed(recipe, {**fields, **form}) for form in forms(recipe).values()]
        if any(made):
            rows.append((way, *(work_of(one).over(mae) if one else "-" for one in made)))
    return rows


def page() -> list[str]:
    """The tables of some recipes as one in Markdown."""
    lines = [f"| model | difficulty | {' | '.join(FORMS)} |", "|---" * (2 + len(FORMS)) + "|"]
    for model, name in PAGE.items():
        lines += [f"| {model} | {' | '.join(row)} |" for row in table(recipes.from_name(name))[1:]]
    return lines
