"""Prepared videos, made once."""

from pathlib import Path

import pytest

from tests.helpers.video_fixtures import ffmpeg, pattern, prepare_videos
from tests.helpers.video_sets import prepared, source

__all__ = ["prepared", "source"]  # fixtures


@pytest.fixture(scope="session")
def with_copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A set with --copy: VP9, which DALI decodes on a CPU too, kept; and one that is rotated, hence encoded anew."""
    root = tmp_path_factory.mktemp("copies")
    for number in range(2):
        pattern(root / "vp9" / f"{number}.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
    kept = prepare_videos(root / "vp9", root / "kept", "--copy")
    whole = pattern(root / "mixed" / "0.mp4")
    ffmpeg("-i", whole, "-c", "copy", "-metadata:s:v", "rotate=90", root / "mixed" / "1.mp4")
    return kept, prepare_videos(root / "mixed", root / "encoded", "--copy"), root
