"""What happens with several views, in plain loops: the slow twins of `colours`, `mask_counts`, `projection` and
`views`."""

import colorsys
import math
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
LUMA = (0.2989, 0.587, 0.114)


# ------------------------------------------------------------------------------------------------------- colours
def change_colours(image: Array, numbers: list[float], blurred: float, solarised: float) -> Array:
    """One crop [H, W, C] of uint8, pixel by pixel: float64 in 0..255."""
    values = image.astype(np.float64) / 255
    if numbers[0] < 0.8:
        values = jittered(values, numbers[1:5])
    if values.shape[2] == 3 and numbers[5] < 0.2:
        values = np.repeat(grey(values), 3, 2)
    if numbers[6] < blurred:
        values = blur(values, 0.1 + numbers[7] * 1.9)
    if numbers[8] < solarised:
        values = np.where(values >= 128 / 255, 1 - values, values)
    return values * 255


def jittered(values: Array, numbers: list[float]) -> Array:
    brightness, contrast, saturation = (1 + s * (2 * n - 1) for s, n in zip((0.4, 0.4, 0.2), numbers[:3], strict=True))
    values = np.clip(values * brightness, 0, 1)
    values = np.clip(contrast * values + (1 - contrast) * grey(values).mean(), 0, 1)
    if values.shape[2] == 1:
        return values
    values = np.clip(saturation * values + (1 - saturation) * grey(values), 0, 1)
    turned = np.empty_like(values)
    for y, x in np.ndindex(values.shape[:2]):
        hue, strength, value = colorsys.rgb_to_hsv(*values[y, x])
        turned[y, x] = colorsys.hsv_to_rgb((hue + 0.1 * (2 * numbers[3] - 1)) % 1, strength, value)
    return turned


def grey(values: Array) -> Array:
    return values if values.shape[2] == 1 else (values @ np.array(LUMA))[..., None]


def blur(values: Array, sigma: float) -> Array:
    """A 2-D kernel of 13 x 13 taps, all at once."""
    place = np.arange(-6, 7)
    taps = np.exp(-(place**2) / (2 * sigma**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    height, width = values.shape[:2]
    out = np.zeros_like(values)
    for y, x in np.ndindex(height, width):
        for (dy, dx), weight in np.ndenumerate(kernel):
            out[y, x] += weight * values[min(max(y + dy - 6, 0), height - 1), min(max(x + dx - 6, 0), width - 1)]
    return out


# --------------------------------------------------------------------------------------------------------- masks
def count(ratio: float, spread: float, unmasked_share: float, patches: int, numbers: list[float]) -> int:
    """How many patches of an image are masked."""
    if numbers[0] < unmasked_share:
        return 0
    return math.floor(patches * (ratio - spread + 2 * spread * numbers[1]) + 1e-9)


def hard_and_random(scores: list[float], noise: list[float], masked: int, alpha: float) -> set[int]:
    """The floor(masked * alpha) hardest, and of the others those with the highest noise."""
    hardest = sorted(range(len(scores)), key=lambda i: -scores[i])[: math.floor(masked * alpha)]
    others = sorted(set(range(len(scores))) - set(hardest), key=lambda i: -noise[i])
    return {*hardest, *others[: masked - len(hardest)]}


# -------------------------------------------------------------------------------------------------------- losses
def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.exp() / logits.exp().sum()


def cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Of one token, at the student's temperature."""
    return -sum(p * torch.log(q) for p, q in zip(probabilities, softmax(logits / 0.1), strict=True))


def cls_loss(students: torch.Tensor, teachers: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """iBOT's loss of the cls token: over every image, every global view q of the teacher and every other view v.

    - `students`: [S, V + n, K], the global views first; `teachers`: [S, V, K]
    """
    found = []
    for image in range(len(students)):
        for q in range(teachers.shape[1]):
            wanted = softmax((teachers[image, q] - centre) / temperature)
            for v in range(students.shape[1]):
                if v != q:
                    found.append(cross_entropy(students[image, v], wanted))
    return torch.stack(found).mean()


def patch_loss(
    students: torch.Tensor, teachers: torch.Tensor, centre: torch.Tensor, temperature: float, mask: torch.Tensor
) -> torch.Tensor:
    """iBOT's loss of the patches: the mean over an image's masked ones, and over all images, 0 for those without any.

    - `students`, `teachers`: [B, L, K]; `mask`: bool [B, L]
    """
    total = students.new_zeros(())
    for image in range(len(students)):
        masked = mask[image].nonzero()[:, 0].tolist()
        for patch in masked:
            wanted = softmax((teachers[image, patch] - centre) / temperature)
            total = total + cross_entropy(students[image, patch], wanted) / len(masked)
    return total / len(students)
