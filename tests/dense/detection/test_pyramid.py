"""The simple feature pyramid: shapes and strides by patch size, ViTDet's layers."""

import pytest
import torch
from torch import nn

from fasthpm.dense.detection.pyramid import Pyramid, finest_factor, strides


@pytest.mark.parametrize(
    ("patch", "factor", "finest"), [(32, 4, 8), (16, 4, 4), (14, 4, 3.5), (8, 2, 4), (7, 2, 3.5), (4, 1, 4)]
)
def test_no_level_is_finer_than_the_published(patch: int, factor: int, finest: float) -> None:
    assert finest_factor(patch) == factor
    assert strides(patch) == [finest * 2**level for level in range(5)]


@pytest.mark.parametrize("patch", [16, 8, 4])
def test_maps_have_the_strides(patch: int) -> None:
    side = 128
    maps = Pyramid(16, patch, 8)(torch.randn(2, 16, side // patch, side // patch))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for each, step in zip(maps.values(), strides(patch), strict=True):
        assert each.shape == (2, 8, side / step, side / step)


def test_layers_are_vitdets() -> None:
    """×4: two transposed convolutions, norm and GELU between; ×½: pooling; 1 x 1 and 3 x 3 with norms, no biases."""
    pyramid = Pyramid(64, 16, 8)
    kinds = [[type(part).__name__ for part in level] for level in pyramid.levels]
    ending = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    up = "ConvTranspose2d"
    assert kinds == [[up, "LayerNorm2d", "GELU", up, *ending], [up, *ending], ending, ["MaxPool2d", *ending]]
    first, second = (part for part in pyramid.levels[0] if isinstance(part, nn.ConvTranspose2d))
    assert (first.out_channels, second.out_channels) == (32, 16)
    assert all(part.bias is None for level in pyramid.levels for part in level if type(part) is nn.Conv2d)
    assert pyramid.levels[0][1].eps == 1e-6


def test_the_coarsest_is_every_second_pixel() -> None:
    maps = Pyramid(16, 4, 8)(torch.randn(1, 16, 24, 24))
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])
