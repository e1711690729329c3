"""Synthetic samples."""

from typing import Any

import torch

from fasthpm.data import build_loader


def test_synthetic_clips_move_and_begin_as_the_images() -> None:
    options: dict[str, Any] = {"batch_size": 4, "image_size": (16, 20), "channels": 3}
    (clips,) = build_loader("synthetic:4", num_frames=3, sampling_rate=2, **options)
    (images,) = build_loader("synthetic:4", **options)
    assert clips.images.shape == (4, 3, 16, 20, 3)
    assert torch.equal(clips.images[:, 0], images.images)
    assert torch.equal(clips.crops, images.crops)
    (closer,) = build_loader("synthetic:4", num_frames=5, **options)
    assert torch.equal(closer.images[:, ::2], clips.images)
    assert not torch.equal(clips.images[:, 0], clips.images[:, 1])
