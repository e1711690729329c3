"""Pure functions of the update number: learning rate, weight decay, share of hard patches, the teacher's momentum and
temperature."""

import math

from fasthpm.recipe import Recipe


def epoch_at(recipe: Recipe, step: int) -> int:
    """Epoch (from 0) that update `step` (from 0) belongs to."""
    return step // recipe.steps_per_epoch


def lr_at(recipe: Recipe, step: int) -> float:
    """Learning rate of update `step`: linear warm-up, then half a cosine, per iteration (MAE's recipe).

    The first update of a warm-up has lr 0, as in MAE.
    """
    epoch = step / recipe.steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    progress = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1e-12)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def alpha_at(recipe: Recipe, step: int) -> float:
    """Share of the mask that the teacher chooses (Eq. 8).

    t/T is (epoch + 1)/epochs as the released code has it, epoch/epochs as the paper, or the share of all updates that
    are done, per the recipe's `alpha_schedule`.
    """
    done = {
        "released": (epoch_at(recipe, step) + 1) / recipe.epochs,
        "paper": epoch_at(recipe, step) / recipe.epochs,
        "step": step / recipe.total_steps,
    }
    share = min(done[recipe.alpha_schedule], 1.0)
    return recipe.alpha_start + share * (recipe.alpha_end - recipe.alpha_start)


def ema_momentum_at(recipe: Recipe, step: int) -> float:
    """Teacher momentum m of Eq. 1 after update `step`, per the recipe's `ema_schedule`: linear, by epochs over
    `ema_ramp_epochs`, then constant; or half a cosine over all updates (DINO, iBOT)."""
    if recipe.ema_schedule == "cosine":
        return _cosine(recipe.ema_momentum, recipe.ema_momentum_end, step / recipe.total_steps)
    ramp = min(epoch_at(recipe, step) / recipe.ema_ramp_epochs, 1.0) if recipe.ema_ramp_epochs else 1.0
    return recipe.ema_momentum + ramp * (recipe.ema_momentum_end - recipe.ema_momentum)


def weight_decay_at(recipe: Recipe, step: int) -> float:
    """Weight decay of update `step`: half a cosine over all updates to `weight_decay_end`, or constant."""
    if recipe.weight_decay_end < 0:
        return recipe.weight_decay
    return _cosine(recipe.weight_decay, recipe.weight_decay_end, step / recipe.total_steps)


def temperature_at(recipe: Recipe, step: int) -> float:
    """The teacher's temperature in update `step`: linear over `temperature_epochs`, then constant."""
    warmup = recipe.temperature_epochs * recipe.steps_per_epoch
    share = min(step / warmup, 1.0) if warmup else 1.0
    return recipe.temperature_start + share * (recipe.temperature - recipe.temperature_start)


def last_layer_is_frozen(recipe: Recipe, step: int) -> bool:
    """Whether the projection head's last layer stays as it is in update `step`."""
    return epoch_at(recipe, step) < recipe.freeze_last_layer_epochs


def more_rates(recipe: Recipe, step: int) -> dict[str, float]:
    """What else changes from update to update in some recipes: for the metrics."""
    rates = {"weight_decay": weight_decay_at(recipe, step)} if recipe.weight_decay_end >= 0 else {}
    return rates | ({"teacher_temperature": temperature_at(recipe, step)} if recipe.uses_views else {})


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
