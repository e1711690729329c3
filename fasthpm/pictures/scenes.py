"""Maps of tiles put together again: one map and one picture of every big image that a set's tiles were cut from.

Where a tile lies in its scene is in the set's `.files.csv` (path, top, left, height, width, in pixels). Where tiles
overlap, values are averaged. One scene is in memory at a time, by at most `MOST_CELLS` cells a side, however large it
is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fasthpm.data.names import Place
from fasthpm.data.sampling import Array
from fasthpm.pictures import drawing

MOST_CELLS = 2048  # of a scene's map, a side; of larger ones several cells become one
CHUNK = 64  # tiles that are read at a time
SIDE = 1024  # pixels that a scene's picture has at least on its longer side
NO_TILE = 255  # white


class Canvas:
    """The mean of what is laid on it, cell by cell.

    - `size`: (rows, columns); `cell`: pixels that a cell is high and wide; `channels`: values per cell
    """

    def __init__(self, size: tuple[int, int], cell: tuple[float, float], channels: int) -> None:
        self.cell = cell
        self._sums = np.zeros((*size, channels))
        self._areas = np.zeros(size)

    def add(self, place: Place, values: Array) -> None:
        """Lay values [r, c, channels], which fill `place`, on it: each counts by the area that it covers of a cell.

        Where any of the channels is NaN there is nothing.
        """
        known = np.where(np.isnan(values).any(2), 0.0, 1.0)
        (top, down), (left, across) = (
            _shares(start, length, parts, cell, cells)
            for start, length, parts, cell, cells in zip(
                (place.top, place.left),
                (place.height, place.width),
                values.shape[:2],
                self.cell,
                self._areas.shape,
                strict=True,
            )
        )
        part = (slice(top, top + len(down)), slice(left, left + len(across)))
        filled = np.where(known[..., None] > 0, values, 0).astype(np.float64)
        self._sums[part] += np.einsum("ai,ijk,bj->abk", down, filled, across, optimize=True)
        self._areas[part] += down @ known @ across.T

    def mean(self) -> Array:
        """float64 [rows, columns, channels], NaN where nothing lies."""
        known = self._areas[..., None] > 0
        return np.where(known, self._sums / np.where(known, self._areas[..., None], 1), np.nan)


def _shares(start: int, length: int, parts: int, cell: float, cells: int) -> tuple[int, Array]:
    """How much of each cell along an axis each part of a tile covers: the first cell, float64 [cells', parts]."""
    first, last = int(start // cell), min(int(np.ceil((start + length) / cell)), cells)
    begin = np.arange(first, last)[:, None] * cell
    edges = start + length / parts * np.arange(parts + 1)
    overlap = np.minimum(begin + cell, edges[1:]) - np.maximum(begin, edges[:-1])
    return first, overlap.clip(0) / cell


class Scene:
    """A scene while its tiles come in.

    - `places`: of its tiles; `grid`: rows and columns of a tile's map; `kinds`: names of the maps
    """

    def __init__(self, places: Sequence[Place], grid: tuple[int, int], kinds: Sequence[str]) -> None:
        bottom, right = max(p.top + p.height for p in places), max(p.left + p.width for p in places)
        largest = max(p.height for p in places), max(p.width for p in places)
        cell = tuple(
            max(tile / parts, side / MOST_CELLS)
            for tile, parts, side in zip(largest, grid, (bottom, right), strict=True)
        )
        size = int(np.ceil(round(bottom / cell[0], 6))), int(np.ceil(round(right / cell[1], 6)))
        self.kinds, self.size, self.enlarged = tuple(kinds), size, max(1, -(-SIDE // max(size)))
        self.maps = Canvas(size, (cell[0], cell[1]), len(kinds))
        fine = (size[0] * self.enlarged, size[1] * self.enlarged)
        self.picture = Canvas(fine, (cell[0] / self.enlarged, cell[1] / self.enlarged), 3)

    def add(self, place: Place, maps: dict[str, Array], picture: Array) -> None:
        """A tile: its maps [R, C], and how it looks, uint8 [H, W, 3]."""
        self.maps.add(place, np.stack([maps[kind] for kind in self.kinds], axis=2))
        self.picture.add(place, picture)

    def write(self, stem: Path) -> None:
        """STEM.npz: every map float32 [rows, columns], NaN where no tile or no data was; `cell`, the pixels of a cell.
        STEM.png: the scene, and each map over it.
        """
        means = self.maps.mean()
        maps = {kind: means[..., number].astype(np.float32) for number, kind in enumerate(self.kinds)}
        np.savez_compressed(stem.with_name(f"{stem.name}.npz"), cell=np.array(self.maps.cell), **maps)  # type: ignore[arg-type]
        drawing.save_png(self._drawn(means), stem.with_name(f"{stem.name}.png"))

    def _drawn(self, means: Array) -> Array:
        picture = self.picture.mean()
        picture = np.where(np.isnan(picture), NO_TILE, picture).round().astype(np.uint8)
        return np.concatenate([picture, *(drawing.blended(picture, one) for one in np.moveaxis(means, 2, 0))], axis=1)


def put_together(
    folder: Path, places: Sequence[Place], ids: Array, maps: dict[str, Array], pictures_of: Callable[[Array], Array]
) -> int:
    """Write FOLDER/NUMBER-NAME.npz and .png of every scene; one scene is in memory at a time.

    - `places`: of all samples; `ids`: int64 [N], the samples that have maps; `maps`: by kind, [N, R, C]
    - `pictures_of`: ids [n] -> how these samples look, uint8 [n, H, W, 3]

    **Returns:** the number of scenes.
    """
    members: dict[str, list[int]] = {}
    for row, sample in enumerate(ids.tolist()):
        members.setdefault(places[sample].scene, []).append(row)
    sizes: dict[str, list[Place]] = {scene: [] for scene in members}
    for place in places:
        if place.scene in sizes:
            sizes[place.scene].append(place)
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(sorted(members)):
        rows = np.array(members[name])
        scene = Scene(sizes[name], next(iter(maps.values())).shape[1:], list(maps))
        for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK)):
            for row, picture in zip(chunk.tolist(), pictures_of(ids[chunk]), strict=True):
                scene.add(places[ids[row]], {kind: values[row] for kind, values in maps.items()}, picture)
        scene.write(folder / drawing.file_name(f"{number:06d}-{name}", ""))
    return len(members)
