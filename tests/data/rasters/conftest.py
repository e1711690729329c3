"""What a test opens is closed after it."""

from collections.abc import Iterator
from typing import Any

import pytest

from fasthpm.data.rasters.raster import Raster


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[Raster] = []
    begin = Raster.__init__

    def remember(self: Raster, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        made.append(self)

    monkeypatch.setattr(Raster, "__init__", remember)
    yield
    for raster in made:
        raster.close()
