"""Readings of a training."""

from bench.training import READ, median_of


def test_readings_leave_the_start_out() -> None:
    lines = [dict.fromkeys(READ, float(value)) for value in (100, 2, 4, 3)]
    assert median_of(lines)["images_per_second"] == 3
    assert median_of(lines[:1])["images_per_second"] == 100
