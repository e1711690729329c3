"""Updates of fine-tuning."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from fasthpm.probes.finetune import training


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_the_frames_of_a_clip_are_mixed_alike(cutmix: float) -> None:
    clips, labels = torch.randn(4, 3, 5, 8, 8), torch.tensor([0, 1, 2, 0])
    mix = Mixup(0.8 * (not cutmix), cutmix, label_smoothing=0.1, num_classes=3)
    np.random.seed(5)  # noqa: NPY002
    got, targets = training.mixed(mix, clips.clone(), labels)
    assert not torch.equal(got, clips)
    for t in range(5):
        np.random.seed(5)  # noqa: NPY002
        frames, same = mix(clips[:, :, t].clone(), labels)
        assert torch.equal(got[:, :, t], frames)
        assert torch.equal(targets, same)
