"""What all tunings share between two updates."""

import pytest

from fasthpm.tuning.run import fitting_batch


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "world_size", "expected"),
    [
        (8, 8, 1, 8),
        (8, 8, 2, 4),
        (16, 24, 2, 12),
        (5, 24, 2, 4),
        (128, 128, 8, 16),
        (8, 8, 16, 8),
        (8, 9, 2, 8),
        (8, 0, 2, 8),
    ],
)
def test_a_presets_batch_is_shared_by_the_devices(
    batch_size: int, global_batch_size: int, world_size: int, expected: int
) -> None:
    assert fitting_batch(batch_size, global_batch_size, world_size) == expected
