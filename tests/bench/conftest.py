"""Photographs, made once."""

from pathlib import Path

import pytest

from tests.helpers.data_fixtures import picture


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEG files of ImageNet's size in two classes."""
    folder = tmp_path_factory.mktemp("bench") / "photos"
    for index in range(48):
        file = folder / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(index, (375, 500)).save(file, quality=90)
    return folder
