"""Our pixels beside those of references."""

from pathlib import Path

from bench import pixels
from tests.helpers.data_fixtures import prepare


def test_our_pixels_are_those_of_the_references(photographs: Path, tmp_path: Path) -> None:
    raw = prepare(photographs, tmp_path / "raw.beton", "--max_resolution", "256", "--write_mode", "raw")
    found = pixels.compare_pixels(raw, 16)
    near = found["ours, area against OpenCV's INTER_AREA (FFCV)"]
    far = found["ours, area against PIL's bicubic (MAE)"]
    assert near["mean"] < 0.5  # crops that are placed or flipped otherwise would differ by tens
    assert near["mean"] < far["mean"]
    assert found["ours, bicubic against PIL's bicubic (MAE)"]["max"] <= 2
