"""The online probe's cost."""

import pytest

from bench import online_probe


def test_the_online_probe_s_cost_is_per_update() -> None:
    found = online_probe.figures({"update": [2.0, 2.0, 4.0], "probe": [0.4, 0.8, 0.8]})
    assert found["ratio"] == pytest.approx(0.2)
    assert found["range"] == pytest.approx([0.2, 0.4])
    assert found["share"][50] == pytest.approx(0.004)
    assert found["least_every"] == 7  # 0.2 / 7 is the first under 3 %
