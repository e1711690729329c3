"""Augmented images and clips do not depend on ranks or workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_transform
from torch import Tensor

from fasthpm.data import LoaderOptions
from fasthpm.data.augmented import Augmentation, AugmentedLoader, _picture, _seed_all
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, prepare


def test_augmented_images_do_not_depend_on_ranks_or_workers(tmp_path: Path) -> None:
    """One process against two ranks with a worker each; from a folder and from the set prepared of it, grey too."""
    folder = image_folder(tmp_path / "set", 12, grey=True)
    path = str(prepare(folder, tmp_path / "set.beton"))
    shared: dict[str, Any] = {"image_size": (16, 16), "channels": 1, "seed": 3}

    def first(batch_size: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        asked = LoaderOptions(batch_size=batch_size, **shared, **options)
        loader = AugmentedLoader(path, Augmentation(), asked)
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        return batch.images, batch.labels, batch.ids

    whole = first(8, num_workers=1)
    parts = [first(4, rank=rank, world_size=2, num_workers=1) for rank in (0, 1)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(pieces))
    assert whole[0].shape == (8, 1, 16, 16)
    loader = AugmentedLoader(path, Augmentation("", 0, flip=False, crop_min=1.0), LoaderOptions(8, **shared))
    plain = [loader.images[(epoch, 5, 0)][0] for epoch in (0, 1, 0)]
    assert torch.equal(plain[0], plain[2])
    assert loader.base.stored(5).shape == (40, 48, 1)  # type: ignore[union-attr]
    loader.close()


# -------------------------------------------------------------------------------------------------- clips
def clips_of(augmentation: Augmentation, repeats: int = 1, **options: Any) -> AugmentedLoader:
    shared: dict[str, Any] = {"image_size": (16, 16), "channels": 3, "seed": 3, "num_frames": 4, "batch_size": 4}
    return AugmentedLoader("synthetic:12", augmentation, LoaderOptions(**shared | options), repeats=repeats)


def test_the_frames_of_a_clip_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of one picture: every frame is what timm makes of that picture, and boxes are erased from all of them."""
    loader = clips_of(Augmentation("rand-m7-n4-mstd0.5-inc1", 0.0), repeats=2)
    pixels = loader.base.drawn(0, 1)
    assert pixels is not None
    assert pixels.shape == (4, 16, 16, 3)
    monkeypatch.setattr(loader.base, "drawn", lambda drawn, sample: np.repeat(pixels[:1], 4, 0))
    info = loader.info
    alike = create_transform(
        (16, 16),
        is_training=True,
        hflip=0.0,
        color_jitter=None,
        mean=info.mean,
        std=info.std,
        interpolation="bicubic",
        auto_augment="rand-m7-n4-mstd0.5-inc1",
        separate=True,
    )
    draws = [loader.images[(0, 1, 0)][0], loader.images[(0, 1, 1)][0], loader.images[(1, 1, 0)][0]]
    for clip in draws:
        assert clip.shape == (3, 4, 16, 16)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    clip = loader.images._augment(np.repeat(pixels[:1], 4, 0), 77)  # type: ignore[union-attr]
    _seed_all(77)
    one = torch.from_numpy(np.array(alike[1](_picture(pixels[0])))).permute(2, 0, 1) / 255
    want = (one - torch.tensor(info.mean)[:, None, None]) / torch.tensor(info.std)[:, None, None]
    torch.testing.assert_close(clip[:, 2], want)
    loader.close()

    erasing = clips_of(Augmentation("", 0.999, crop_min=1.0, flip=False))
    monkeypatch.setattr(erasing.base, "drawn", lambda drawn, sample: np.repeat(pixels[:1], 4, 0))
    plain = clips_of(Augmentation("", 0.0, crop_min=1.0, flip=False))
    monkeypatch.setattr(plain.base, "drawn", lambda drawn, sample: np.repeat(pixels[:1], 4, 0))
    boxes = erasing.images[(0, 5, 0)][0] != plain.images[(0, 5, 0)][0]
    assert 0 < int(boxes.sum()) < boxes.numel() / 2
    assert torch.equal(boxes, boxes[:1, :1].expand_as(boxes))
    noise = erasing.images[(0, 5, 0)][0][:, :, boxes[0, 0]]
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_repeated_clips_do_not_depend_on_ranks_or_workers() -> None:
    def first(batch_size: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loader = clips_of(Augmentation("rand-m7-n4-mstd0.5-inc1"), batch_size=batch_size, repeats=2, **options)
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        return batch.images, batch.labels, batch.ids

    whole = first(4, num_workers=2)
    parts = [first(2, rank=rank, world_size=2, num_workers=1) for rank in (0, 1)]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(pieces))
    assert whole[0].shape == (8, 3, 4, 16, 16)
    assert torch.equal(whole[2][::2], whole[2][1::2])
    assert not torch.equal(whole[0][::2], whole[0][1::2])


def test_a_clip_that_does_not_decode_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = clips_of(Augmentation("", 0.0))
    read = loader.base.drawn
    monkeypatch.setattr(loader.base, "drawn", lambda drawn, sample: None if sample == 5 else read(drawn, sample))
    (clip, label, sample, replaced), kept = loader.images[(0, 5, 1)], loader.images[(0, 4, 1)]
    assert (replaced, kept[2:]) == (True, (4, False))
    assert (sample != 5, label) == (True, sample % 10)
    assert clip.shape == kept[0].shape
    monkeypatch.setattr(loader.base, "drawn", lambda drawn, sample: None)
    with pytest.raises(UserError, match="sample 5 does not decode, nor do 20 in its place"):
        loader.images[(0, 5, 0)]
    loader.close()
