"""Colours and interpolation, against torchvision and PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from fasthpm.data import build_loader, synthetic
from fasthpm.data.pixels import jitter_colours
from fasthpm.data.sampling import colour_factors
from tests.helpers.loaders import SIZE


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factors", [(1, 1, 1), (0.6, 1, 1), (1, 1.4, 1), (1, 1, 0.3), (1.3, 0.7, 1.25), (2, 0, 0)])
def test_colours_change_as_in_torchvision(channels: int, factors: tuple[float, ...]) -> None:
    from torchvision.transforms import functional as F

    image = np.random.default_rng(0).integers(0, 256, (19, 23, channels), dtype=np.uint8)
    truth = torch.from_numpy(image).permute(2, 0, 1)
    truth = F.adjust_contrast(F.adjust_brightness(truth, factors[0]), factors[1])
    if channels == 3:
        truth = F.adjust_saturation(truth, factors[2])
    ours = jitter_colours(image, np.array(factors, np.float32))
    assert np.abs(ours.astype(int) - truth.permute(1, 2, 0).numpy()).max() <= 1
    assert (ours != truth.permute(1, 2, 0).numpy()).mean() < 0.01


@pytest.mark.parametrize("kind", ["ffcv", "plain", "synthetic"])
def test_colours_vary_and_crops_do_not(sources: dict[str, str], kind: str) -> None:
    options = {"batch_size": 23, "image_size": SIZE, "channels": 3, "seed": 4}
    (still,) = build_loader(sources[kind], **options)
    (vivid,) = build_loader(sources[kind], color_jitter=0.5, **options)
    assert torch.equal(still.crops, vivid.crops)
    assert not torch.equal(still.images, vivid.images)
    factors = colour_factors(4, 0, still.ids.numpy(), 0.5, 3)
    for before, after, change in zip(still.images.numpy(), vivid.images.numpy(), factors, strict=True):
        # The kernel rounds once at the end, the plain twin after each factor.
        difference = np.abs(after.astype(int) - jitter_colours(before, change))
        assert difference.max() <= (2 if kind == "ffcv" else 0)
    (plain,) = build_loader(sources[kind], color_jitter=0.5, train=False, **options)
    (same_plain,) = build_loader(sources[kind], train=False, **options)
    assert torch.equal(plain.images, same_plain.images)


@pytest.mark.parametrize(("kind", "channels"), [("plain", 3), ("synthetic", 3), ("synthetic", 1)])
def test_bicubic_is_pils_on_the_crop_alone(sources: dict[str, str], kind: str, channels: int) -> None:
    options = {"batch_size": 23, "image_size": SIZE, "channels": channels, "seed": 4}
    loader = build_loader(sources[kind], interpolation="bicubic", **options)
    (batch,) = loader
    (area,) = build_loader(sources[kind], interpolation="area", **options)
    assert torch.equal(batch.crops, area.crops)
    assert not torch.equal(batch.images, area.images)
    for row, index, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.tolist(), strict=True):
        if kind == "plain":
            whole = Image.open(loader._images.paths[index])
        else:
            whole = Image.fromarray(np.squeeze(synthetic.draw(index, SIZE, channels)))
        top, left, height, width, flipped = crop
        truth = whole.crop((left, top, left + width, top + height)).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        truth = truth.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else truth
        assert np.array_equal(np.squeeze(row), np.asarray(truth))
