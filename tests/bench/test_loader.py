"""The loader bench. No figure is compared: machines are noisy."""

import json
import os
from pathlib import Path

from bench import prepare as bench_prepare
from bench.loader import measure, seeding_cost, summarise
from bench.variants import Spec, Taken
from tests.helpers.benches import run_bench


def test_loader_bench_runs(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "loader.json"
    done = run_bench("loader", photographs, "--quick", "--workers", 1, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {"torchvision, MAE's transforms", "256, area", "256, FFCV's own loader"} <= set(result["rates"])
    for row in result["rates"].values():
        assert [one["images"] for one in row["rounds"]] == [48, 48]
        assert row["images_per_second_per_core"]["low"] > 0
        assert row["cpu_ms_per_image"]["low"] > 0
    assert result["rates"]["torchvision, MAE's transforms"]["cpu_ratio"]["median"] == 1
    assert (
        result["first_batch"]["256, ours"]["from_start"]["low"]
        > result["first_batch"]["256, ours"]["from_build"]["low"]
    )
    assert 0 <= result["data_wait"]["loaders"]["256, area"]["wait_percent"] <= 100
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert "| 256, area | " in done.stdout
    assert "data wait" in done.stdout


def test_faster_means_above_one() -> None:
    base, ours = "torchvision, MAE's transforms", "256, area"
    taken = {
        base: [Taken(100, 1.0, 2.0), Taken(100, 2.0, 2.0)],
        ours: [Taken(100, 0.25, 0.5), Taken(100, 1.0, 0.5)],
        "256, FFCV's own loader": [Taken(100, 1.0, 0.4), Taken(100, 1.0, 0.5)],
    }
    row = summarise(taken, 2)[ours]
    assert row["images_per_second_per_core"] == {"median": 125.0, "low": 50.0, "high": 200.0}
    assert row["cpu_ms_per_image"]["median"] == 5.0
    assert row["wall_ratio"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert row["cpu_ratio"]["median"] == 4.0
    assert seeding_cost(taken) == {"256": {"median": 1.125, "low": 1.0, "high": 1.25}}
    writers = {
        "ours": [{"images_per_second_per_core": 30.0, "cpu_ms_per_image": 2.0}],
        "ffcv": [{"images_per_second_per_core": 10.0, "cpu_ms_per_image": 3.0}],
    }
    summary = bench_prepare.summarise(writers)
    assert (summary["wall_ratio"]["median"], summary["cpu_ratio"]["median"]) == (3.0, 1.5)


def test_rounds_interleave_and_the_first_does_not_count() -> None:
    calls: list[tuple[str, int]] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.spec = Spec(name, "ours", "", 1, 1)

        def measure(self, number: int) -> Taken:
            calls.append((self.spec.name, number))
            return Taken(number, 1.0, 1.0)

    taken = measure([Fake("a"), Fake("b")], 2)  # type: ignore[list-item]
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [one.images for one in taken["a"]] == [1, 2]
