"""The share of the time that a step waits for data."""

from collections.abc import Iterator

import pytest

from bench import waiting
from bench.variants import Spec


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Paced:
    """A loader whose first batch of an epoch takes long and the others `seconds` each."""

    def __init__(self, clock: Clock, seconds: float, batches: int) -> None:
        self.clock, self.seconds, self.batches = clock, seconds, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[None]:
        for number in range(self.batches):
            self.clock.sleep(self.seconds if number else 100.0)
            yield

    def close(self) -> None:
        pass


def test_the_wait_is_the_share_of_the_time_spent_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    assert waiting.wait_share(Paced(clock, 0.25, 8), 0.75, 20.0) == 0.25  # type: ignore[arg-type]
    assert waiting.wait_share(Paced(clock, 0.25, 2), 0.75, 2.0) == 0.25  # type: ignore[arg-type]
    assert waiting.wait_share(Paced(clock, 0.0, 8), 0.75, 20.0) == 0  # type: ignore[arg-type]


def test_cores_follow_from_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(waiting, "our_loader", lambda spec: Paced(clock, 0.005, 4))
    monkeypatch.setattr(waiting, "gflops_per_image", lambda: 100.0)
    found = waiting.data_waits([Spec("x", "ours", "synthetic:10", 2, 10)], {"x": 300.0}, 1e14, 0.01, 256)
    assert found["images_per_second"] == 1000
    row = found["loaders"]["x"]
    assert row["cores"] == 4
    assert row["load"] == pytest.approx(1000 / 1200)
    assert row["step_seconds"] == pytest.approx(256 / 1000 * 4 / 2)
    assert row["wait_percent"] == pytest.approx(100 * 5 / (5 + 512))
