"""Crops of photographs with something to see in them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import grounds


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def test_the_ground_has_texture_where_there_is_any() -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((150, 300, 3), 120, np.uint8)
    pixels[:, 150:] = rng.integers(0, 256, (30, 30, 1), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    half = Image.fromarray(pixels)
    drawn = [grounds.draw_ground([half], rng.random((grounds.TRIES, grounds.BOX)), 32) for _ in range(30)]
    shares = [grounds.texture(ground) for ground in drawn]
    assert np.mean(np.array(shares) >= grounds.TEXTURED) > 0.8
    assert grounds.texture(np.full((32, 32, 3), 7, np.uint8)) == 0
    flat = grounds.draw_ground([Image.new("RGB", (200, 150), (1, 2, 3))], rng.random((grounds.TRIES, grounds.BOX)), 32)
    assert (flat == [1, 2, 3]).all()


@pytest.mark.parametrize("size", [32, 512, 640, 1024, 2048])
@pytest.mark.parametrize("sides", [(1600, 1000), (1000, 1600), (5000, 2800)])
def test_crops_of_any_size_lie_within(size: int, sides: tuple[int, int]) -> None:
    """A white photograph has no darker edge in any of them."""
    white = Image.new("RGB", sides, (255, 255, 255))
    for draws in np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.3, 0.9, 0.1]]):
        pixels = grounds.crop(white, size, draws)
        assert pixels.shape == (size, size, 3)
        assert (pixels == 255).all()


def test_photographs_for_large_scenes_are_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tenth of all sizes."""
    monkeypatch.setattr(grounds, "SHORTER_SIDE", 120)
    files = []
    for number in range(4):
        files.append(tmp_path / f"{number}.png")
        noise(260, 220, number).save(files[-1])
    for size, shorter in ((6, 120), (51, 120), (64, 120), (100, 200), (120, 220)):
        found = grounds.read_photographs(files, size)
        assert [len(found[split]) for split in ("train", "val")] == [3, 1]
        assert {min(photograph.size) for photograph in (*found["train"], *found["val"])} == {shorter}
