"""A pretrained run, made once."""

from pathlib import Path

import pytest

from fasthpm import pretrain
from tests.helpers.finetuning import SHORT, start


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run of 4 updates."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    start(pretrain, *SHORT, "--output_dir", folder)
    return folder
