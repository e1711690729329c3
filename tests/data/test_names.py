"""The names of samples, and the places of tiles."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data_prep.fashion_mnist import Arrays
from data_prep.writer import write_beton
from fasthpm.data.ffcv.beton import files_path
from fasthpm.data.names import Place, known_names, known_places, sample_names, stored_in


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """A set of three samples whose list of files says that they are tiles of two scenes."""
    path = tmp_path / "tiles.beton"
    write_beton(Arrays(np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.int64)), path, ("a",), num_workers=1)
    write(
        path, [["path", "top", "left", "height", "width"], *[[f"s/{k // 2}.tif", 0, 64 * k, 64, 32] for k in range(3)]]
    )
    return path


def write(path: Path, rows: list[list[object]]) -> None:
    with files_path(path).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_tiles_have_places_and_names_with_them(tiles: Path) -> None:
    assert known_places(str(tiles), 3) == [Place(f"s/{k // 2}.tif", 0, 64 * k, 64, 32) for k in range(3)]
    assert known_names(str(tiles), 3) == ["s/0.tif#0,0", "s/0.tif#0,64", "s/1.tif#0,128"]


@pytest.mark.parametrize(
    "rows",
    [
        [["path"], ["a"], ["b"], ["c"]],
        [["path", "top", "left", "height", "width"], *[["a", 0, "x", 1, 1]] * 3],
        [["path", "top", "left", "height", "width"], ["a", 0, 0, 1, 1], ["b"], ["c", 0, 0, 1, 1]],
    ],
)
def test_other_lists_are_no_tiles(tiles: Path, rows: list[list[object]]) -> None:
    write(tiles, rows)
    assert known_places(str(tiles), 3) == []
    assert known_names(str(tiles), 3) == [str(row[0]) for row in rows[1:]]


def test_nothing_is_known_of_drawn_images(tmp_path: Path) -> None:
    assert known_places("synthetic:4", 4) == known_names("synthetic:4", 4) == []
    assert sample_names("synthetic:2", 2) == ["sample-00000000", "sample-00000001"]


def test_what_a_data_set_keeps_where(tiles: Path, tmp_path: Path) -> None:
    """Of prepared sets all that lies beside them, shards too; of lists their images; folders whole."""
    other = tmp_path / "other.beton"
    other.with_suffix(".json").write_text('{"shards": ["other-0.beton"]}')
    (tmp_path / "images").mkdir()
    (tmp_path / "list.txt").write_text("images/a.png\t0\n")
    (tmp_path / "images" / "a.png").touch()

    def names(source: str, output: str = "x.png") -> set[str]:
        return {path.name for path in stored_in(source, Path(output))}

    beside = {"tiles.beton", "tiles.json", "tiles.files.csv"}
    assert names(str(tiles)) == beside
    shard = {"other-0.beton", "other-0.json", "other-0.files.csv", "other.beton", "other.json", "other.files.csv"}
    assert names(f"{tiles},{other}") == beside | shard
    assert names(str(tmp_path / "list.txt")) == {"list.txt", "a.png"}
    assert names(str(tmp_path / "images")) == names(str(tmp_path / "images"), "x.npz") == {"images"}
    assert names(str(tmp_path / "images"), "x.json") == names("synthetic:9") == names("") == set()
