"""The data benches run for real, quickly, and their arithmetic is right. No figure is compared: machines are noisy."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import common, online_probe, photos, pixels, variants, waiting
from bench import prepare as bench_prepare
from bench.loader import measure, seeding_cost, summarise
from bench.variants import Spec, Taken
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import picture, prepare
from tests.helpers.launch import ROOT


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEG files of ImageNet's size in two classes."""
    folder = tmp_path_factory.mktemp("bench") / "photos"
    for index in range(48):
        file = folder / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(index, (375, 500)).save(file, quality=90)
    return folder


def run_bench(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{name}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


# ------------------------------------------------------------------------------------------------------ real runs
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


def test_checkpoint_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    done = run_bench("checkpoint", "--size", "nano", "--rounds", 1, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["bytes"] >= 16 * result["parameters"]
    assert 0 < result["asynchronous"]["blocked"]["low"] < result["asynchronous"]["complete"]["low"]
    assert result["synchronous"]["blocked"] == result["synchronous"]["complete"]
    assert "| asynchronous | " in done.stdout


def test_prepare_bench_runs(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepare.json"
    done = run_bench("prepare", photographs, "--quick", "--workers", 1, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(out.read_text())["sets"]["256"]
    assert set(row) == {"ours", "ffcv", "wall_ratio", "cpu_ratio"}
    ours, theirs = (row[writer]["bytes_per_image"]["median"] for writer in ("ours", "ffcv"))
    assert 1000 < ours < 256 * 192
    assert 1000 < theirs < 256 * 192
    assert "| 256, data_prep.images | " in done.stdout


def test_photographs_are_cut_from_large_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for index in range(2):
        large = Image.fromarray(np.roll(noise, index, 0)).resize((1600, 1200), Image.Resampling.BICUBIC)
        large.save(tmp_path / f"{index}.jpg", quality=95)
    files = sorted(tmp_path.glob("*.jpg"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert photos.write_photos(files, folder, 6, 0) == sum(f.stat().st_size for f in common.files_in(folder))
    first, second = ([file.read_bytes() for file in common.files_in(folder)] for folder in folders)
    assert first == second
    assert len(set(first)) == 6
    sizes = {_size(file) for file in common.files_in(folders[0])}
    assert sizes <= {(500, 375), (375, 500)}


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_too_few_sources_name_the_packages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install lomiri-wallpapers"):
        photos.sources([tmp_path])


# ------------------------------------------------------------------------------------------------------ arithmetic
def test_processor_time_counts_children_alive_and_ended() -> None:
    burn = "import time\nwhile time.process_time() < {}: pass\n{}"
    begin = common.cpu_seconds()
    subprocess.run([sys.executable, "-c", burn.format(0.3, "")], check=True)
    ended = common.cpu_seconds() - begin
    assert 0.3 <= ended < 1.5
    command = [sys.executable, "-c", burn.format(0.5, "print(flush=True)\ntime.sleep(100)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        alive = common.cpu_seconds() - begin - ended
        process.kill()
    assert 0.4 <= alive < 2


def test_ratios_are_taken_round_by_round() -> None:
    assert common.ratios([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert common.show({"median": 2.0, "low": 1.0, "high": 3.456}) == "2.00 (1.00 to 3.46)"


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


def test_a_variant_that_fails_says_why() -> None:
    with variants.started([Spec("broken", "ours", "/nowhere.beton", 1, 1)]) as (broken,):
        with pytest.raises(RuntimeError, match=r"broken: (?s:.*)nowhere\.beton does not exist"):
            broken.measure(0)


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


def test_our_pixels_are_those_of_the_references(photographs: Path, tmp_path: Path) -> None:
    raw = prepare(photographs, tmp_path / "raw.beton", "--max_resolution", "256", "--write_mode", "raw")
    found = pixels.compare_pixels(raw, 16)
    near = found["ours, area against OpenCV's INTER_AREA (FFCV)"]
    far = found["ours, area against PIL's bicubic (MAE)"]
    assert near["mean"] < 0.5  # crops that are placed or flipped otherwise would differ by tens
    assert near["mean"] < far["mean"]
    assert found["ours, bicubic against PIL's bicubic (MAE)"]["max"] <= 2


def test_chosen_photographs_are_spread_over_the_folder(photographs: Path, tmp_path: Path) -> None:
    folder = common.choose_photos(photographs, tmp_path, 6)
    assert len(common.files_in(folder)) == 6
    assert len(list(folder.iterdir())) == 2
    assert len(common.files_in(common.choose_photos(photographs, tmp_path, 0))) == 48
    with pytest.raises(UserError, match="expected 49 or more"):
        common.choose_photos(photographs, tmp_path, 49)


def test_the_online_probe_s_cost_is_per_update() -> None:
    found = online_probe.figures({"update": [2.0, 2.0, 4.0], "probe": [0.4, 0.8, 0.8]})
    assert found["ratio"] == pytest.approx(0.2)
    assert found["range"] == pytest.approx([0.2, 0.4])
    assert found["share"][50] == pytest.approx(0.004)
    assert found["least_every"] == 7  # 0.2 / 7 is the first under 3 %
