"""Maps of tiles are put together again where the tiles were cut, averaged where they overlap, in bounded memory."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasthpm.data.names import Place
from fasthpm.data.sampling import Array
from fasthpm.pictures import scenes
from fasthpm.pictures.scenes import Canvas, Scene


def test_a_canvas_is_the_mean_by_area() -> None:
    """Against every cell cut into small squares."""
    draw = np.random.default_rng(0)
    cell, size = (3.0, 4.0), (5, 4)
    canvas = Canvas(size, cell, 2)
    sums, counts = np.zeros((60, 64, 2)), np.zeros((60, 64))  # a quarter of a pixel
    for top, left, height, width, rows, columns in [(0, 0, 6, 8, 2, 2), (3, 4, 9, 9, 3, 3), (5, 7, 7, 8, 2, 4)]:
        values = draw.normal(size=(rows, columns, 2))
        canvas.add(Place("a", top, left, height, width), values)
        for y, x in itertools.product(range(60), range(64)):
            row = ((y + 0.5) / 4 - top) * rows / height
            column = ((x + 0.5) / 4 - left) * columns / width
            if 0 <= row < rows and 0 <= column < columns:
                sums[y, x] += values[int(row), int(column)]
                counts[y, x] += 1
    total = counts.reshape(5, 12, 4, 16).sum((1, 3))
    want = sums.reshape(5, 12, 4, 16, 2).sum((1, 3)) / np.where(total, total, np.nan)[..., None]
    got = canvas.mean()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got[~np.isnan(got)], want[~np.isnan(want)], atol=0.12)
    assert np.isnan(got).any()


def test_tiles_of_whole_cells_give_their_maps_back() -> None:
    """Overlap by half, exactly."""
    draw = np.random.default_rng(0)
    places = [Place("a", top, left, 16, 16) for top in (0, 8, 16) for left in (0, 8)]
    maps = [draw.normal(size=(4, 4)) for _ in places]
    scene = Scene(places, (4, 4), ["predicted"])
    sums, counts = np.zeros((8, 6)), np.zeros((8, 6))
    for place, values in zip(places, maps, strict=True):
        scene.add(place, {"predicted": values}, np.zeros((16, 16, 3), np.uint8))
        part = np.s_[place.top // 4 : place.top // 4 + 4, place.left // 4 : place.left // 4 + 4]
        sums[part] += values
        counts[part] += 1
    np.testing.assert_allclose(scene.maps.mean()[..., 0], sums / counts, atol=1e-12)


def test_patches_without_data_are_neither_mixed_nor_covered() -> None:
    places = [Place("a", 0, 0, 8, 8), Place("a", 0, 4, 8, 8)]
    left, right = np.array([[1.0, 2.0], [np.nan, 4.0]]), np.array([[np.nan, 6.0], [np.nan, 8.0]])
    scene = Scene(places, (2, 2), ["predicted"])
    for place, values in zip(places, (left, right), strict=True):
        scene.add(place, {"predicted": values}, np.full((8, 8, 3), 100, np.uint8))
    np.testing.assert_array_equal(scene.maps.mean()[..., 0], [[1, 2, 6], [np.nan, 4, 8]])
    picture = scene._drawn(scene.maps.mean())
    cell = scene.enlarged
    assert (picture[cell:, 3 * cell : 4 * cell] == 100).all()  # as it is, beside colours
    assert (picture[:cell, 3 * cell : 4 * cell] != 100).any()


def test_scenes_are_put_together_from_tiles_in_any_order(tmp_path: Path) -> None:
    places = [Place(f"x/{name}.tif", 0, 8 * k, 8, 8) for k in (0, 2) for name in "ba"]
    ids = np.array([3, 0, 1])  # one does not decode
    maps = {"predicted": np.tile(ids[:, None, None] * 1.0, (1, 2, 2)), "true_loss": np.tile(np.eye(2), (3, 1, 1))}
    asked: list[list[int]] = []

    def pictures_of(samples: Array) -> Array:
        asked.append(samples.tolist())
        return np.tile(np.array([200, 0, 0], np.uint8), (len(samples), 8, 8, 1))

    assert scenes.put_together(tmp_path / "scenes", places, ids, maps, pictures_of) == 2
    assert asked == [[3, 1], [0]]
    assert sorted(path.name for path in (tmp_path / "scenes").iterdir()) == [
        f"00000{number}-{name}.{kind}" for number, name in enumerate("ab") for kind in ("npz", "png")
    ]
    made = np.load(tmp_path / "scenes" / "000000-a.npz")
    gap = np.full((2, 2), np.nan)
    np.testing.assert_array_equal(made["predicted"], np.hstack([np.ones((2, 2)), gap, np.full((2, 2), 3.0)]))
    np.testing.assert_array_equal(made["cell"], [4, 4])
    with Image.open(tmp_path / "scenes" / "000000-a.png") as picture:
        pixels = np.asarray(picture)
    side = pixels.shape[0]
    assert pixels.shape == (side, 9 * side, 3)
    assert side >= scenes.SIDE // 3
    assert tuple(pixels[0, 0]) == (200, 0, 0)
    assert (pixels[:, side : 2 * side] == scenes.NO_TILE).all()
    assert (pixels[:, 4 * side : 5 * side] == scenes.NO_TILE).all()
    half = np.load(tmp_path / "scenes" / "000001-b.npz")["predicted"]
    assert np.isnan(half[:, 2:]).all()
    assert half.shape == (2, 6)


def test_a_scene_is_no_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "MOST_CELLS", 10)
    places = [Place("a", 16 * k, 0, 16, 16) for k in range(50)]
    scene = Scene(places, (4, 4), ["predicted"])
    for number, place in enumerate(places):
        scene.add(place, {"predicted": np.full((4, 4), float(number))}, np.zeros((16, 16, 3), np.uint8))
    assert scene.size == (10, 4)
    np.testing.assert_allclose(scene.maps.mean()[:, 0, 0], np.arange(50).reshape(10, 5).mean(1))
