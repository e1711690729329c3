"""One update as published code does it, for any of the eager models."""

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bench.baselines import EagerHPM, EagerMAE
from bench.baselines_video import EagerVideoHPM, EagerVideoMAE
from fasthpm.recipe import Recipe


def masks_one_by_one(difficulty: Tensor, mask_ratio: float, share: float) -> Tensor:
    """bool [B, L]: the hardest and a random rest, image by image through the host."""
    length = difficulty.shape[1]
    masked = length - int(length * (1 - mask_ratio))
    hard, rows, chance = int(masked * share), [], np.random.default_rng()
    for values in difficulty:
        order = np.argsort(values.cpu().numpy())
        rest = order[: length - hard].copy()
        chance.shuffle(rest)
        row = np.zeros(length, bool)
        row[order[length - hard :]] = True
        row[rest[: masked - hard]] = True
        rows.append(torch.from_numpy(row).to(difficulty.device))
    return torch.stack(rows)


def average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Eq. 1, tensor by tensor, tables of positions too."""
    new = student.state_dict()
    with torch.no_grad():
        for name, value in teacher.state_dict().items():
            value.copy_(value * momentum + (1 - momentum) * new[name])


def eager_update(
    student: nn.Module, recipe: Recipe, images: Tensor, *, alpha: float, half: bool
) -> tuple[Callable[[int], None], nn.Module]:
    """A function that runs one whole update of MAE, or of HPM if the recipe has a teacher, and the model.

    - `student`: an `HPMViT` whose sizes are taken; `images`: float [B, C, H, W], or clips [B, C, T, H, W]; `half`:
      autocast to 16 bits
    """
    device = images.device
    hpm = recipe.uses_teacher
    kinds: Any = ((EagerMAE, EagerHPM), (EagerVideoMAE, EagerVideoHPM))[recipe.num_frames > 1]
    model = kinds[hpm](student, predicts=hpm).to(device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if hpm else None
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(recipe.beta1, recipe.beta2), weight_decay=0.05)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half and dtype == torch.float16)

    def losses() -> list[Tensor]:
        with torch.autocast(device.type, dtype, enabled=half):
            if teacher is None:
                return [model(images, recipe.mask_ratio)]
            with torch.no_grad():
                everything = torch.zeros(len(images), recipe.num_patches, dtype=torch.bool, device=device)
                difficulty = cast(EagerHPM, teacher).decode(images, everything)[1].float()
            slots = difficulty.unflatten(1, (recipe.slots, -1)).flatten(0, 1)  # each is masked on its own
            mask = masks_one_by_one(slots, recipe.mask_ratio, alpha)
            return list(model(images, mask.reshape(difficulty.shape)))

    def update(number: int) -> None:
        parts = losses()
        for part in parts:
            part.item()
        scaler.scale(torch.stack(parts).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, 5.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if teacher is not None:
            average(teacher, model, 0.999)

    return update, model
