"""Sources of every kind, made once, and the loaders of them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm.data import build_loader
from fasthpm.data.device import DeviceLoader
from tests.helpers.array_sets import arrays_of, write_arrays
from tests.helpers.data_fixtures import image_folder, prepare, prepare_shards
from tests.helpers.loaders import KINDS, OF_KIND, SIZE, N
from tests.helpers.video_fixtures import prepare_videos, video_folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The kinds of source, N samples each; the file sets have two image sizes."""
    root = tmp_path_factory.mktemp("sources")
    folder = image_folder(root / "folder", N, sizes=((40, 48), (33, 20)))
    beton = prepare(folder, root / "set.beton", "--write_mode", "proportion", "--jpeg_quality", "100")
    shards = prepare_shards(folder, root / "many.beton", 3, "--write_mode", "proportion", "--jpeg_quality", "100")
    videos = prepare_videos(video_folder(root / "videos", N), root / "clips")
    return {
        "ffcv": str(beton),
        "ahead": str(beton),
        "clips": str(videos),
        "dali": str(videos),
        "shards": str(shards),
        "arrays": str(write_arrays(root / "arrays.beton", arrays_of(N), codec="lz4")),
        "plain": str(folder),
        "synthetic": f"synthetic:{N}",
    }


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, sources: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Builds loaders of one kind and closes them afterwards."""
    loaders = []

    def build(**options: Any) -> Any:
        values = {"batch_size": 4, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2}
        loader = build_loader(sources[request.param], **values | OF_KIND.get(request.param, {}) | options)
        loaders.append(DeviceLoader(loader, torch.device("cpu")) if request.param == "ahead" else loader)
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


@pytest.fixture
def beton(sources: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the prepared set, to be damaged."""
    for suffix in (".beton", ".json"):
        shutil.copy(Path(sources["ffcv"]).with_suffix(suffix), tmp_path / f"set{suffix}")
    return tmp_path / "set.beton"
