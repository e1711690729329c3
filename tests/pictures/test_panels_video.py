"""Panels of clips: the right pixels in the right frame."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fasthpm.data import DatasetInfo
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.pictures import drawing, panels
from tests.helpers.videos import tiny


class Oracle(HPMViT):
    """A model whose reconstruction is the target itself."""

    def forward(self, images: Tensor, mask: Tensor, **options: Any) -> Any:
        output = super().forward(images, mask, **options)
        return output._replace(reconstruction=self.target(images[mask].reshape(output.reconstruction.shape)))


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_reconstruction_is_the_clip(norm_pix: bool) -> None:
    """Patches land where and when they belong, visible ones are pasted back, and normalised targets are undone."""
    recipe = tiny(norm_pix_loss=norm_pix, channels=1)
    model = model_of(recipe).eval()
    model.__class__ = Oracle
    info = DatasetInfo(2, 1, (0.4,), (0.2,), ())
    clips = torch.randint(0, 256, (2, 8, 16, 16, 1), dtype=torch.uint8)
    named = panels.pictures(model, recipe, info, clips, 0.5)
    assert tuple(named) == ("clip", "reconstruction", "true loss", "predicted loss", "mask")
    pictures = np.stack(list(named.values()), axis=1)
    assert pictures.shape == (2, 5, 8, 16, 16, 3)
    assert (pictures[:, 1] == pictures[:, 0]).all()
    assert (pictures[:, 0] == clips.numpy()).all()
    hidden = (pictures[:, 4] == 127).all(-1).reshape(2, 8, 2, 8, 2, 8).all((3, 5)).reshape(2, 4, 2, 4)
    assert (hidden[:, :, 0] == hidden[:, :, 1]).all()  # a slot's two frames are masked alike
    assert (hidden[:, :, 0].sum(-1) == recipe.num_masked // 4).all()
    sheet = drawing.sheet(named, 2)
    assert sheet.shape[1] == 4 * (4 + 64) + 4
    with Image.open(io.BytesIO(drawing.animation(named))) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (8, 0)  # type: ignore[attr-defined]
