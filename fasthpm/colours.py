"""Colours of views, changed on the device: jitter, grey, blur and solarisation, as DINO and iBOT have them.

Batched, without a generator: `numbers` are uniform in [0, 1) and a function of (seed, update, sample, view). Ours: the
four parts of the jitter come in one order (torchvision draws it), and the blur is a Gaussian of 13 taps.

Letters: R crops of H x W pixels, C channels (3, or 1, which knows neither saturation, hue nor grey).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 9  # per crop: whether jittered, four factors, whether grey, whether blurred, by how much, whether solarised
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTERED, GREY = 0.8, 0.2  # how often
SIGMA = (0.1, 2.0)  # of the blur in pixels
RADIUS = 6
LUMA = (0.2989, 0.587, 0.114)
VIEW_AUGMENTS = ("none", "dino")
BLURRED = (1.0, 0.1, 0.5)  # how often: the first global view, the others, local crops
SOLARISED = (0.0, 0.2, 0.0)


def chances(views: int, samples: int, table: tuple[float, float, float], device: torch.device) -> Tensor:
    """How often each row is changed, float32 [samples * views], rows of a sample side by side; `table`: (first view,
    others, local crops), with 0 views for local crops."""
    if not views:
        return torch.full((samples,), table[2], device=device)
    first = torch.arange(samples * views, device=device) % views == 0
    return torch.where(first, table[0], table[1])


def change_colours(images: Tensor, numbers: Tensor, blurred: Tensor, solarised: Tensor) -> Tensor:
    """Crops with other colours.

    - `images`: uint8 [R, H, W, C]; `numbers`: [R, NUMBERS]
    - `blurred`, `solarised`: how often each crop is, [R]

    **Returns:** float32 [R, H, W, C] in 0..255.
    """
    values = images.float() / 255
    draw = [number[:, None, None, None] for number in numbers.unbind(1)]
    values = torch.where(draw[0] < JITTERED, jittered(values, draw[1:5]), values)
    if values.shape[3] == 3:
        values = torch.where(draw[5] < GREY, luma(values), values)
    sigma = SIGMA[0] + numbers[:, 7] * (SIGMA[1] - SIGMA[0])
    values = torch.where(draw[6] < blurred[:, None, None, None], blur(values, sigma), values)
    turned = (draw[8] < solarised[:, None, None, None]) & (values >= 128 / 255)
    return torch.where(turned, 1 - values, values) * 255


def jittered(values: Tensor, numbers: list[Tensor]) -> Tensor:
    """Brightness, contrast, saturation and hue changed, in this order, by torchvision's formulas."""
    strengths = (BRIGHTNESS, CONTRAST, SATURATION)
    brightness, contrast, saturation = (1 + s * (2 * n - 1) for s, n in zip(strengths, numbers[:3], strict=True))
    values = (values * brightness).clamp(0, 1)
    mean = luma(values).mean(dim=(1, 2, 3), keepdim=True)
    values = (contrast * values + (1 - contrast) * mean).clamp(0, 1)
    if values.shape[3] == 1:
        return values
    values = (saturation * values + (1 - saturation) * luma(values)).clamp(0, 1)
    return turn_hue(values, HUE * (2 * numbers[3] - 1))


def luma(values: Tensor) -> Tensor:
    """[R, H, W, C] -> [R, H, W, 1]."""
    if values.shape[3] == 1:
        return values
    red, green, blue = values.split(1, dim=3)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def turn_hue(values: Tensor, share: Tensor) -> Tensor:
    """RGB with the hue turned by `share` [R, 1, 1, 1] of the circle; value and saturation stay (HSV)."""
    red, green, blue = values.split(1, dim=3)
    high, low = values.amax(3, keepdim=True), values.amin(3, keepdim=True)
    span = high - low
    safe = torch.where(span == 0, 1.0, span)
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = 6 * ((hue / 6 + share) % 1)
    return torch.cat([high - span * _dent((place + hue) % 6) for place in (5, 3, 1)], dim=3)


def _dent(angle: Tensor) -> Tensor:
    """How much of the span a channel lacks at an angle of 0..6."""
    return torch.minimum(angle, 4 - angle).clamp(0, 1)


def blur(values: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of `sigma` [R] pixels, cut off at RADIUS, in both directions; borders are continued."""
    place = torch.arange(-RADIUS, RADIUS + 1, device=values.device)
    weights = torch.exp(-(place**2) / (2 * sigma[:, None] ** 2))
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    channels_first = values.permute(0, 3, 1, 2)
    padded = F.pad(channels_first, (0, 0, RADIUS, RADIUS), mode="replicate")
    height, width = values.shape[1:3]
    down = sum(weights[:, k] * padded[:, :, k : k + height] for k in range(2 * RADIUS + 1))
    assert isinstance(down, Tensor)
    padded = F.pad(down, (RADIUS, RADIUS, 0, 0), mode="replicate")
    across = sum(weights[:, k] * padded[..., k : k + width] for k in range(2 * RADIUS + 1))
    assert isinstance(across, Tensor)
    return across.permute(0, 2, 3, 1)
