"""Prepared videos, made once for a folder's tests whose conftest names them, and loaders of them."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasthpm.data import build_loader
from fasthpm.data.video.prepared import open_videos
from tests.helpers.video_fixtures import prepare_videos, video_folder

SIZE = (24, 24)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of FRAMES frames in two sizes."""
    return video_folder(tmp_path_factory.mktemp("source") / "videos", 6)


@pytest.fixture(scope="session")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_videos(source, tmp_path_factory.mktemp("prepared") / "set")


def loader_of(path: Path, **options: Any) -> Any:
    values = {"batch_size": 6, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2, "num_frames": 3}
    return build_loader(path, **values | options)


def stored_frame(data: Any, frame: int) -> np.ndarray:
    """A stored frame through PIL: the slow truth."""
    return np.asarray(Image.open(io.BytesIO(data.jpeg(frame).tobytes())).convert("RGB"))


def damaged(prepared: Path, target: Path, videos: tuple[int, ...]) -> Path:
    """A copy of the set in which these videos' frames are zeros."""
    shutil.copytree(prepared, target)
    data = open_videos(target)
    with (target / "frames.bin").open("r+b") as file:
        for video in videos:
            first, count = int(data.videos[video]["first"]), int(data.videos[video]["frames"])
            start, end = int(data.positions[first]), int(data.positions[first + count])
            file.seek(start)
            file.write(bytes(end - start))
    return target
