"""A folder for images, and prepared videos, made once."""

from pathlib import Path

import pytest

from tests.helpers.video_sets import prepared, source

__all__ = ["prepared", "source"]  # fixtures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"
