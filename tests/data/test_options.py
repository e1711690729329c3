"""What each command asks its loader for, written out; and its share of the cores."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm import pretrain, ranks, recipes
from fasthpm.commands import throughput
from fasthpm.data import DatasetInfo, LoaderOptions
from fasthpm.data.options import count_workers
from fasthpm.patches import model_of
from fasthpm.pictures import map_images, panels
from fasthpm.probes import knn, linear, online
from fasthpm.probes.finetune import building
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.run import refresh

LAUNCH = ranks.Launch(1, 1, 4, 4, torch.device("cpu"))
RECIPE = dataclasses.replace(
    recipes.debug(),
    data_path="synthetic:100",
    batch_size=8,
    num_workers=3,
    seed=5,
    crop_min=0.4,
    flip=False,
    interpolation="area",
    color_jitter=0.25,
    sample_order="blocks",
    max_bad_samples=0.5,
    video_decoder="dali",
)
SIZES: dict[str, Any] = {"image_size": RECIPE.image_size, "channels": RECIPE.channels}
DRAWN: dict[str, Any] = {
    "seed": 5,
    "crop_min": 0.4,
    "flip": False,
    "interpolation": "area",
    "color_jitter": 0.25,
    "sample_order": "blocks",
    "max_bad_samples": 0.5,
    "decoder": "dali",
}
RANK: dict[str, Any] = {"rank": 1, "world_size": 4}
ARGUMENTS = argparse.Namespace(batch_size=6, num_workers=2, data_path="synthetic:9")


class Asked(Exception):
    """Stops a command where it asks for its loader."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoaderOptions]:
    """What `module.build_loader` is asked for by a call."""

    def ask(module: Any, call: Callable[..., Any], *arguments: Any) -> LoaderOptions:
        def stop(_path: str, options: LoaderOptions) -> None:
            raise Asked(options)

        monkeypatch.setattr(module, "build_loader", stop)
        with pytest.raises(Asked) as caught:
            call(*arguments)
        options = caught.value.args[0]
        assert isinstance(options, LoaderOptions)
        return options

    return ask


def test_training_asks_for_all_that_the_recipe_says() -> None:
    assert RECIPE.loader_options() == LoaderOptions(batch_size=8, num_workers=3, **SIZES, **DRAWN)
    clips = dataclasses.replace(recipes.from_name("hpm_video_demo"), sampling_rate=3)
    options = clips.loader_options(train=False)
    assert (options.num_frames, options.sampling_rate) == (clips.num_frames, 3)


def test_pretraining(asked: Callable[..., LoaderOptions], tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, output_dir=str(tmp_path), accum_iter=2)
    alone = dataclasses.replace(LAUNCH, rank=0, world_size=1)
    want = LoaderOptions(batch_size=8, num_workers=3, accum_iter=2, **SIZES, **DRAWN)
    assert asked(pretrain, pretrain.build, recipe, alone) == want


def test_maps_of_a_run(asked: Callable[..., LoaderOptions]) -> None:
    recipe = dataclasses.replace(RECIPE, steps_per_epoch=3)
    run = argparse.Namespace(recipe=recipe, step=None, done=3, maps=object())
    run.launch = dataclasses.replace(LAUNCH, rank=0, world_size=1)
    more: dict[str, Any] = {"train": False, "whole": True, "interpolation": "area", "max_bad_samples": 1.0}
    assert asked(refresh, refresh.refresh_maps, run, None) == LoaderOptions(8, num_workers=3, **SIZES, **more)


def test_probes(asked: Callable[..., LoaderOptions]) -> None:
    arguments = argparse.Namespace(batch_size=6, num_workers=2, pool="mean")
    side = asked(knn, knn._side, arguments, "synthetic:9", None, RECIPE, LAUNCH)
    assert side == LoaderOptions(6, num_workers=2, train=False, **SIZES, **RANK)
    probe = argparse.Namespace(recipe=RECIPE, launch=LAUNCH)
    few = asked(online, online.OnlineProbe._knn_rows, probe)
    assert few == LoaderOptions(online.KNN_BATCH, num_workers=3, train=False, max_bad_samples=1.0, **SIZES)


@pytest.mark.parametrize("cached", [True, False])
def test_linear_probe(
    cached: bool, asked: Callable[..., LoaderOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = linear.parse_arguments(
        [str(tmp_path), "--train_path", "synthetic:100", "--val_path", "synthetic:9", "--batch_size", "6"]
        + ["--global_batch_size", "12", "--num_workers", "2", "--seed", "7"]
        + (["--cache_features"] if cached else ["--crop_min", "0.3"])
    )
    model = model_of(recipes.debug())
    monkeypatch.setattr(linear, "load_weights", lambda *_: (model, RECIPE))
    alone = dataclasses.replace(LAUNCH, rank=0, world_size=1)
    drawn: dict[str, Any] = {"seed": 7, "crop_min": 0.3, "accum_iter": 2, "crop": "random_resized"}
    want = LoaderOptions(6, num_workers=2, **SIZES, **({"train": False} if cached else drawn))
    assert asked(linear, linear.build, arguments, alone) == want


def test_finetuning(asked: Callable[..., LoaderOptions]) -> None:
    settings = FineTune(batch_size=6, num_workers=2, sampling_rate=3, frame_sampling="segments", test_views="2x1")
    options = building.loader_options(settings, RECIPE, (64, 48), LAUNCH)
    more: dict[str, Any] = {"sampling_rate": 3, "frame_sampling": "segments", "train": False}
    size: dict[str, Any] = {"image_size": (64, 48), "channels": RECIPE.channels}
    assert options == LoaderOptions(6, num_workers=2, **size, **RANK, **more)
    thorough = asked(building, building.thorough_loader, settings, options)
    assert thorough == LoaderOptions(3, num_workers=2, views=(2, 1), **size, **RANK, **more)


def test_pictures(asked: Callable[..., LoaderOptions]) -> None:
    few = asked(panels, panels.fixed_images, RECIPE, 4)
    assert few == LoaderOptions(4, num_workers=1, train=False, max_bad_samples=1.0, **SIZES)
    whole = asked(map_images, map_images.whole_images, RECIPE, ARGUMENTS)
    assert whole == LoaderOptions(6, num_workers=2, train=False, whole=True, max_bad_samples=1.0, **SIZES)


def test_throughput(asked: Callable[..., LoaderOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    info = DatasetInfo(7, 1, (0.5,), (0.5,), ())
    monkeypatch.setattr(throughput, "read_info", lambda _: info)
    want = LoaderOptions(7, num_workers=3, **SIZES, **DRAWN)
    assert asked(throughput, throughput.measure_decode, RECIPE, 1.0) == want


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [count_workers(asked) for asked in (0, 3, 99)] == [2, 3, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert count_workers(0) == 1
