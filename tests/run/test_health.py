"""What a loss looks like that is not finite, or jumps."""

import math

import pytest
import torch

from fasthpm.run.health import SPIKE_LEAST, SpikeDetector, first_not_finite


def test_the_first_update_that_is_not_finite() -> None:
    fine = {0: 1.0, 1: 0.0}
    assert first_not_finite([0, 0, 1], [1.0, 2.0, 3.0], fine) is None
    assert first_not_finite([0, 1, 1], [1.0, math.nan, 3.0], fine) == 1
    assert first_not_finite([0, 1], [1.0, 3.0], {0: 1.0, 1: -1.0}) == 1  # DeepSpeed's sign for infinite
    assert first_not_finite([0, 1], [1.0, math.inf], {0: math.inf, 1: 1.0}) == 0


def test_a_loss_that_jumps_is_reported() -> None:
    detector, noise = SpikeDetector(), torch.Generator().manual_seed(0)
    calm = (1 + 0.01 * torch.randn(300, generator=noise)).tolist()
    assert not detector.spikes([1.0, 9.0, *calm[: SPIKE_LEAST - 3]])  # too early to tell
    assert not detector.spikes(calm)
    assert detector.spikes([1.0, 1.5, 1.0]) == {1: pytest.approx(1, abs=0.01)}
    flat = SpikeDetector()
    assert flat.spikes([1.0] * 100 + [1.05, 1.2]) == {101: 1.0}  # no noise to compare with: a tenth more counts
