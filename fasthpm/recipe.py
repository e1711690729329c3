"""`Recipe`: every number of a run in one frozen, flat dataclass, and the command line generated from it.

The fields stand in `recipe_fields` and `view_fields`; there is no second configuration language. What must hold between
them stands in `rules`. The recipe owns *what* is trained (batch, accumulation, learning rate, clipping,
epochs …); the DeepSpeed JSON owns *how* (ZeRO stage, dtype, buckets). `recipes` holds a short function for each
published run.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm import rules
from fasthpm.cli import OWNERS
from fasthpm.data.options import LoaderOptions
from fasthpm.difficulty import DIFFICULTIES, Difficulty, question_of
from fasthpm.errors import UserError, about, nearest, note_once
from fasthpm.files import write_text
from fasthpm.mask import POLICIES, MaskPlan
from fasthpm.options import validate
from fasthpm.recipe_fields import RecipeFields
from fasthpm.sizes import Sizes
from fasthpm.targets import TARGETS
from fasthpm.view_fields import ViewFields

GONE = {"teacher_precision": "model"}  # fields of older recipe files, and the value that is what all runs do now


@dataclass(frozen=True)
class Recipe(Sizes, ViewFields, RecipeFields):
    """One pretraining run. Lengths are in epochs of the data set; sizes in pixels; rates per MAE's conventions."""

    def __post_init__(self) -> None:
        validate(self)
        rules.check(self)

    # ---------------------------------------------------------------------------------------------- derived
    @property
    def num_masked(self) -> int:
        """M; see `MaskPlan.num_masked`."""
        return self.mask_plan.num_masked

    @property
    def mask_plan(self) -> MaskPlan:
        """How the masks are drawn."""
        unit = (self.mask_unit or self.patch_size) // self.patch_size
        return MaskPlan(
            self.mask_policy, self.mask_ratio, self.grid_size, self.slots, unit=unit, throw_ratio=self.throw_ratio
        )

    @property
    def warmup_plan(self) -> MaskPlan:
        """How they are drawn as long as there are no maps, if the policy needs them; else `mask_plan`."""
        if POLICIES[self.mask_policy].follows != "attention":
            return self.mask_plan
        return dataclasses.replace(self.mask_plan, policy="random", mask_ratio=self.warmup_mask_ratio, throw_ratio=0.0)

    @property
    def uses_maps(self) -> bool:
        """Whether a run keeps maps of its samples, of attention or of the teacher's difficulty."""
        return POLICIES[self.mask_policy].follows == "attention" or self.teacher_maps

    @property
    def uses_teacher(self) -> bool:
        """Whether a step needs the EMA teacher: for its difficulty, or for its features."""
        return self.masks_by_difficulty or self.target_teacher == "ema"

    @property
    def uses_views(self) -> bool:
        """Whether it learns from several views of each image (iBOT)."""
        return TARGETS[self.target].objective == "distributions"

    @property
    def question(self) -> Difficulty:
        """How the teacher is asked what is hard."""
        return DIFFICULTIES[question_of(self.difficulty, self.decoder_attention)]

    @property
    def answers_difficulty(self) -> bool:
        """Whether the recipe's model can say what is hard."""
        return self.predict_loss != "none" or not self.question.predictor

    @property
    def masks_by_difficulty(self) -> bool:
        """Whether the mask policy follows the teacher's difficulty."""
        return POLICIES[self.mask_policy].follows == "difficulty"

    @property
    def target_teacher(self) -> str:
        """Who gives the features that are reconstructed: "ema", "frozen", or "" where they are pixels."""
        return TARGETS[self.target].teacher

    @property
    def frozen_dim(self) -> int:
        """Width of the frozen teacher's features (`target` dino or clip), or number of tokens; 0 without one."""
        return self.target_dim or TARGETS[self.target].width

    @property
    def asks_all_targets(self) -> bool:
        """Whether a step needs the targets of all patches, not of the masked ones alone: the teacher's losses of all
        are measured."""
        return self.masks_by_difficulty and not self.teacher_maps and self.question.look is not None

    @property
    def approximates_teacher(self) -> bool:
        """Whether the masks follow a map that is not the exact teacher's of this crop and update."""
        return self.teacher_maps or self.teacher_scale > 1

    @property
    def fast_modes(self) -> list[str]:
        """The fast modes that are on, each as `field value`."""
        names = ("teacher_maps", "predictor", "predictor_depth", "predictor_dim", "decoder_attention", "teacher_scale")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        return [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) != usual[name]]

    @property
    def total_steps(self) -> int:
        """Updates of the whole schedule; known once the recipe is resolved."""
        return self.epochs * self.steps_per_epoch

    def with_data(self, data_path: str) -> "Recipe":
        """The same recipe on other data."""
        return dataclasses.replace(self, data_path=data_path)

    def accumulation(self, world_size: int) -> int:
        """Micro-steps per update on `world_size` devices.

        **Raises:** `UserError` if they do not fit together with global_batch_size or accum_iter."""
        per_micro_step = self.batch_size * world_size
        asked = self.global_batch_size or per_micro_step * max(self.accum_iter, 1)
        rules.devices_share_batch(asked, self.batch_size, world_size)
        rules.accumulation_fits(self.accum_iter, asked, self.batch_size, world_size)
        return asked // per_micro_step

    def resolve(self, num_samples: int, world_size: int) -> "Recipe":
        """Fill what depends on data and machines: accum_iter, global_batch_size, lr, steps_per_epoch.
        **Raises:** `UserError` where they contradict each other."""
        accum_iter = self.accumulation(world_size)
        asked = accum_iter * self.batch_size * world_size
        available = num_samples // asked
        rules.data_fill_epoch(num_samples, asked, self.steps_per_epoch)
        return dataclasses.replace(
            self,
            accum_iter=accum_iter,
            global_batch_size=asked,
            lr=self.lr or self.blr * asked / 256,
            steps_per_epoch=self.steps_per_epoch or available,
        )

    def loader_options(self, **changes: Any) -> LoaderOptions:
        """What a loader for this model is asked for, but for `changes`; with `train=False` only sizes and frames."""
        names = ["batch_size", "image_size", "channels", "num_workers", "num_frames", "sampling_rate"]
        asked: dict[str, Any] = {}
        if changes.get("train", True):
            names += ["seed", "crop_min", "crop_max", "interpolation", "color_jitter", "sample_order"]
            names += ["max_bad_samples", "flip", "flip_vertical", "rotate90", "channel_dropout", "channel_jitter"]
            asked["decoder"] = self.video_decoder
            if self.uses_views:
                names += ["local_crops", "local_size", "local_crop_min", "local_crop_max"]
                asked["views"] = (self.global_crops, 1)
        return LoaderOptions(**{name: getattr(self, name) for name in names} | asked | changes)


OWNERS.update({f"--{field.name}": "fasthpm pretrain" for field in dataclasses.fields(Recipe)})


# -------------------------------------------------------------------------------------------------- to and from text
def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as JSON that `--recipe PATH` replays."""
    write_text(path, recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """`recipe` as JSON."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def load_recipe(path: Path) -> Recipe:
    """Read what `save_recipe` wrote. **Raises:** `UserError` for a file that is missing, unreadable or no recipe."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"recipe file {path} cannot be read ({error}); expected the recipe.json of a run") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe file {path} holds a {type(values).__name__}; expected the recipe.json of a run")
    with about(path):
        return build_recipe(values, source=str(path))


def build_recipe(values: dict[str, Any], *, source: str) -> Recipe:
    """A `Recipe` from named values; unknown names are an error that names the nearest field."""
    for name in GONE.keys() & values.keys():
        if values[name] != GONE[name]:
            note_once(f"{source}: {name} {values[name]} is no longer offered; {GONE[name]} takes its place")
    values = {name: value for name, value in values.items() if name not in GONE}
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in values:
        if name not in known:
            raise UserError(f"{source}: unknown recipe field {name!r}{nearest(name, known)}")
    return Recipe(**values)


def science_of(recipe: Recipe) -> dict[str, Any]:
    """The fields that decide what is learnt: two runs that agree on them are the same run."""
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if not f.metadata["run_only"]}
    return fields | {"difficulty": recipe.question.name}
