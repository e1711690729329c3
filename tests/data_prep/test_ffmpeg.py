"""What ffmpeg is asked to do with other people's files."""

from fractions import Fraction
from pathlib import Path

import pytest

from data_prep import ffmpeg as tools
from tests.helpers.video_fixtures import FRAMES


def test_bombs_are_refused_before_they_are_decoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, size = str(source / "ant" / "000.mp4"), (48, 40)
    assert len(list(tools.frames(path, size, Fraction(10)))) == FRAMES
    monkeypatch.setattr(tools, "MAX_PIXELS", 40 * 48 - 1)
    with pytest.raises(ValueError, match="its pictures have more than 1919 pixels"):
        tools.probe(path)
    with pytest.raises(ValueError, match="exceeds specified max pixel count 1919"):  # after a harmless header
        list(tools.frames(path, size, Fraction(10)))
