"""ViTDet's simple feature pyramid: all levels from the last map alone.

The map is enlarged by transposed convolutions and shrunk by max-pooling; a 1 x 1 and a 3 x 3 convolution follow on each
level, each with a norm over the channels (detectron2's "LN"), and max-pooling the coarsest gives one more.
"""

import itertools

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fasthpm.dense.detection.vitdet import ViTDet

LEVELS = ("0", "1", "2", "3")  # from the finest to the coarsest: torchvision's names; "pool" follows
FINEST = 3.5  # pixels: least stride of the finest level, ViTDet's for patches of 14


def finest_factor(patch_size: int) -> int:
    """By how much the finest level enlarges the map: 4 for patches of 14 and 16 pixels (ViTDet), 2 for 8, 1 for 4: no
    level is finer than the published ones'."""
    return next(factor for factor in (4, 2, 1) if patch_size / factor >= FINEST or factor == 1)


def strides(patch_size: int) -> list[float]:
    """Pixels between neighbours of the five levels: 4, 8, 16, 32, 64 for patches of 16."""
    finest = patch_size / finest_factor(patch_size)
    return [finest * 2**level for level in range(len(LEVELS) + 1)]


class Pyramid(nn.Module):
    """[B, D, H, W] -> a dict of five maps [B, channels, h, w].

    - `dim`: D; `patch_size`: decides the levels' factors, see `finest_factor`
    """

    def __init__(self, dim: int, patch_size: int, channels: int = 256) -> None:
        super().__init__()
        finest = finest_factor(patch_size)
        self.levels = nn.ModuleList(level(dim, finest / 2**k, channels) for k in range(len(LEVELS)))

    def forward(self, last: Tensor) -> dict[str, Tensor]:
        """The maps by name, the finest first."""
        maps = dict(zip(LEVELS, (each(last) for each in self.levels), strict=True))
        return maps | {"pool": F.max_pool2d(maps[LEVELS[-1]], 1, 2)}


def level(dim: int, factor: float, channels: int) -> nn.Sequential:
    """One level: resize by `factor`, then two convolutions with norms."""
    parts: list[nn.Module] = []
    if factor < 1:
        parts.append(nn.MaxPool2d(round(1 / factor)))
    widths = [dim, dim // 2, dim // 4][: {4: 3, 2: 2}.get(int(factor), 1)]
    for number, (inner, outer) in enumerate(itertools.pairwise(widths)):
        parts += [LayerNorm2d(inner), nn.GELU()] if number else []
        parts.append(nn.ConvTranspose2d(inner, outer, 2, 2))
    parts += [nn.Conv2d(widths[-1], channels, 1, bias=False), LayerNorm2d(channels)]
    parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*parts)


class Backbone(nn.Module):
    """Encoder and pyramid, as torchvision's detectors want it: images -> maps by name."""

    def __init__(self, body: ViTDet, channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.pyramid = Pyramid(body.embed_dim, body.patch_size, channels)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """float [B, C, S, S], normalised -> `Pyramid`'s maps."""
        return self.pyramid(self.body(images))
