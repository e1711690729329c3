"""Prepared videos and a pretrained run, made once."""

from pathlib import Path

import pytest

from fasthpm import pretrain
from tests.helpers.finetuning import SHORT, start
from tests.helpers.video_fixtures import prepare_videos, video_folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prepared videos of two classes and two shapes."""
    folder = tmp_path_factory.mktemp("videos")
    return prepare_videos(video_folder(folder / "files", 10), folder / "set")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run of 4 updates."""
    folder = tmp_path_factory.mktemp("probes") / "run"
    start(pretrain, *SHORT, "--output_dir", folder)
    return folder
