"""`Cuts`: the samples that are cut out of the files of a source: bands put together, pages, tiles of big pictures."""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_prep.changes import content_of, eight_bits
from data_prep.samples import LOOKERS, Files, Source
from data_prep.sets import progress_bar
from fasthpm.data.listing import tell
from fasthpm.data.rasters.channels import bands_of, channels_of, laid_over, numbers_of
from fasthpm.data.rasters.containers import blob_of, container_of, open_raster
from fasthpm.data.rasters.pictures import is_transparent, open_photograph, with_alpha
from fasthpm.data.rasters.raster import Blob, Box, Raster, Reading, check_size
from fasthpm.data.rasters.tiffs import is_photograph
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

BOX_COLUMNS = ("top", "left", "height", "width")


@dataclass(frozen=True)
class Cutting:
    """What a sample is. Its fields are part of what a set was made of."""

    reading: Reading = field(default_factory=Reading)
    kept: bool = False  # whether values are kept; else pixels become photographs
    band_files: tuple[str, ...] = ()  # endings of the files of a sample
    bands: tuple[str, ...] = ()  # channels to take, by number from 1 or by name
    alpha: str = "white"
    rgba: bool = False  # photographs whose opacity is kept
    window: tuple[float, float] | None = None  # of values that are not kept: what becomes black and white
    tile: int = 0
    stride: int = 0
    min_content: float = 0.0  # tiles with less are left out
    nodata: float | str | None = None  # what is no content
    expected: tuple[str, int, str] | None = None  # of kept values: type and channels of the files, and one of them

    @property
    def enumerates(self) -> bool:
        """Whether files have to be opened to know how many samples there are."""
        return bool(self.tile) or self.reading.pages == "samples"

    def record(self) -> dict[str, Any]:
        """For a sidecar: what is not as usual."""
        reading = {name: value for name, value in asdict(self.reading).items() if name != "max_pixels" and value}
        named = {"band_files": list(self.band_files), "bands": list(self.bands), "tile": self.tile}
        named |= {"stride": self.stride, "alpha": self.alpha if self.alpha != "white" else ""}
        named |= {"window": self.window, "min_content": self.min_content}
        return reading | {name: value for name, value in named.items() if value}


class LittleContent(Exception):
    """A tile that is not to be stored."""


class Cuts(Source):
    """Samples of another source's files."""

    def __init__(self, inner: Source, cutting: Cutting) -> None:
        """List the samples. **Raises:** `UserError` if there is none, or bands make no samples."""
        self.inner, self.cutting = inner, cutting
        self.units, words = _units(inner, cutting.band_files)
        self.table, self.sliced = _table(self, cutting)  # int64 [N, 6]: unit, slice, box; a height of 0 is all
        first = np.array([next(k for k in unit if k >= 0) for unit in self.units], np.int64)
        self.scenes = self.table[:, 0]  # which samples are of one file
        labels = inner.labels[first[self.scenes]]
        super().__init__(inner.root, range(len(self.table)), labels, inner.classes, [*inner._words, *words])  # type: ignore[arg-type]
        self.chosen = inner.chosen[first[self.scenes]]
        self.groups = self._groups(first)
        self._held: tuple[int, list[Raster]] = (-1, [])
        self._pixels: tuple[tuple[int, int], Any] = ((-1, -1), None)

    def _groups(self, first: Array) -> Array | None:
        """Samples of a file that can only be read as a whole are made one after the other."""
        groups = getattr(self.inner, "groups", None)
        if groups is not None:
            return np.unique(groups[first[self.table[:, 0]]], return_inverse=True)[1].astype(np.int64)
        return self.table[:, 0].copy() if self.cutting.enumerates and len(self.units) < len(self.table) else None

    # ---- names
    def _file(self, unit: int, band: int = 0) -> str:
        """The name of a file of a sample; where it is missing, the name that it should have."""
        found = self.units[unit][band]
        if found >= 0:
            return self.inner.name(found)
        other = next(k for k, file in enumerate(self.units[unit]) if file >= 0)
        endings = self.cutting.band_files
        return self.inner.name(self.units[unit][other]).removesuffix(endings[other]) + endings[band]

    def name(self, index: int) -> str:
        unit, number = self.table[index, :2].tolist()
        return self._file(unit) + (f"#{number}" if self.sliced else "")

    def where(self, index: int) -> str:
        box = self.table[index, 2:].tolist()
        place = f" [{box[0]}, {box[1]}]" if box[2] else ""
        return os.path.join(self.root, self.name(index)) + place

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the list of samples, beside their paths."""
        return BOX_COLUMNS if self.cutting.tile else ()

    def place(self, index: int) -> tuple[str, ...]:
        """The columns of a sample."""
        return tuple(map(str, self.table[index, 2:].tolist())) if self.cutting.tile else ()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.labels.tobytes() + np.packbits(self.chosen).tobytes() + self.table.tobytes())
        for name in (*self.classes, repr(self.cutting), *(self.inner.name(k) for unit in self.units for k in unit)):
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()

    def _on_disk(self) -> Sequence[str]:
        return self.inner._on_disk()

    # ---- pixels
    def sample(self, index: int) -> tuple[Any, int]:
        unit, number, *box = (int(value) for value in self.table[index])
        if self._is_encoded(unit):
            return encoded(self._bytes(index), self.cutting), int(self.labels[index])
        rasters = self._open(unit)
        whole = rasters[0].whole()
        values = self._read(unit, number, rasters, whole if not box[2] else (box[0], box[1], box[2], box[3]))
        if self.cutting.min_content:
            self._check_content(values)
        if not self.cutting.kept:
            values = eight_bits(values, self.cutting.window)
        return values, int(self.labels[index])

    def _bytes(self, index: int) -> bytes:
        """The file that a sample is cut from, the first one if there are several."""
        return self._blob(self.units[int(self.table[index, 0])][0]).all()

    def _check_content(self, values: Array) -> None:
        nodata = self.cutting.nodata
        if content_of(values, None if nodata is None else float(nodata)) < self.cutting.min_content:
            raise LittleContent("a tile with little in it")

    def _is_encoded(self, unit: int) -> bool:
        """Whether a sample is a photograph's file as it is, which `encode` decodes."""
        cutting = self.cutting
        if cutting.kept or cutting.tile or cutting.window or cutting.band_files or cutting.bands:
            return False
        return not own_reader(self._blob(self.units[unit][0]), cutting)

    def _open(self, unit: int) -> list[Raster]:
        if self._held[0] != unit:
            held, self._held = self._held[1], (-1, [])
            self._pixels = ((-1, -1), None)
            for raster in held:
                raster.close()
            self._held = unit, self.open_unit(unit)
        return self._held[1]

    def open_unit(self, unit: int) -> list[Raster]:
        """The files of a sample, opened. **Raises:** `ValueError` for a missing one, and as `open_raster`."""
        for band, file in enumerate(self.units[unit]):
            if file < 0:
                raise ValueError(f"there is no file {self._file(unit, band)}, which it needs as well")
        return [self._raster(self._blob(file)) for file in self.units[unit]]

    def _blob(self, file: int) -> Blob:
        path = self.inner.where(file)
        return blob_of(path, None if isinstance(self.inner, Files) else self.inner.sample(file)[0])

    def _raster(self, blob: Blob) -> Raster:
        cutting = self.cutting
        if cutting.rgba and not own_reader(blob, cutting):
            return open_photograph(blob, cutting.reading, "keep")
        if cutting.kept or cutting.window or cutting.band_files or own_reader(blob, cutting):
            return open_raster(blob, cutting.reading)
        return open_photograph(blob, cutting.reading, cutting.alpha)

    def _read(self, unit: int, number: int, rasters: list[Raster], box: Box) -> Array:
        for raster in rasters:
            if (raster.height, raster.width) != (rasters[0].height, rasters[0].width):
                raise ValueError(
                    f"{raster.height} x {raster.width} pixels in one of its files and {rasters[0].height} x "
                    f"{rasters[0].width} in the first; resample them to one size"
                )
            check_size(raster, self.cutting.reading, box)
        self._check_kind(rasters)
        parts = [self._part(unit, number, k, raster, box) for k, raster in enumerate(rasters)]
        values = np.concatenate(parts, 2) if len(parts) > 1 else parts[0]
        bands = bands_of(rasters, self.cutting.band_files)
        chosen = numbers_of(self.cutting.bands, values.shape[2], bands)
        return np.ascontiguousarray(values if chosen is None else values[..., chosen])

    def _part(self, unit: int, number: int, k: int, raster: Raster, box: Box) -> Array:
        if not raster.windowed and box != raster.whole():
            if self._pixels[0] != (unit, number):
                self._pixels = ((-1, -1), None)
                self._pixels = ((unit, number), [raster.read(number, raster.whole()) for raster in self._held[1]])
            top, left, height, width = box
            values = self._pixels[1][k][top : top + height, left : left + width]
        else:
            values = raster.read(number, box)
        return laid_over(values, raster, self.cutting.alpha)

    def _check_kind(self, rasters: list[Raster]) -> None:
        if self.cutting.expected is None:
            return
        dtype, channels, first = self.cutting.expected
        for raster in rasters:
            if (raster.dtype, channels_of(raster, self.cutting.alpha)) != (dtype, channels):
                raise ValueError(
                    f"{channels_of(raster, self.cutting.alpha)} channels of {raster.dtype}, where the set has "
                    f"{channels} of {dtype}, such as {first}"
                )


def encoded(data: bytes, cutting: Cutting) -> Any:
    """A photograph's file, or its pixels if it is transparent and not to be laid over white."""
    if cutting.alpha == "white" or not data or not is_transparent(data):
        return data
    return with_alpha(data, cutting.reading, cutting.alpha)


def own_reader(blob: Blob, cutting: Cutting) -> bool:
    """Whether pixels of a photograph are read by `open_raster`: those that Pillow doesn't know, and parts of a TIFF."""
    container = container_of(blob).name
    if container == "TIFF":
        return bool(cutting.reading.pages or cutting.tile) and _has_tifffile() and is_photograph(blob) and _plain(blob)
    return container != "picture"


def _plain(blob: Blob) -> bool:
    """Whether a TIFF's own numbers are grey or colours."""
    with contextlib.suppress(Exception):
        raster = open_raster(blob, Reading(pages="first"))
        raster.close()
        return raster.dtype == "uint8" and raster.channels in (1, 3) and not raster.notes
    return False


def _has_tifffile() -> bool:
    return importlib.util.find_spec("tifffile") is not None


# ------------------------------------------------------------------------------------------------------- listing
def _units(inner: Source, endings: tuple[str, ...]) -> tuple[list[tuple[int, ...]], list[str]]:
    """The files of each sample, -1 for one that is missing, and words about those left out."""
    if not endings:
        return [(k,) for k in range(len(inner))], []
    found: dict[str, list[int]] = {}
    others = []
    longest_first = sorted(range(len(endings)), key=lambda k: -len(endings[k]))
    for index in range(len(inner)):
        name = inner.name(index)
        band = next((k for k in longest_first if name.endswith(endings[k])), None)
        if band is None:
            others.append(name)
        else:
            found.setdefault(name.removesuffix(endings[band]), [-1] * len(endings))[band] = index
    if not found:
        raise UserError(f"{inner.root} holds no file that ends in {endings[0]}; name the endings with --band_files")
    words = [f"left out, not of --band_files: {tell(others)}"] if others else []
    return [tuple(files) for files in found.values()], words


def _table(cuts: Cuts, cutting: Cutting) -> tuple[Array, bool]:
    """int64 [N, 6]: unit, slice and box of every sample, and whether files are taken apart into slices."""
    if not cutting.enumerates:
        units = np.arange(len(cuts.units))
        return np.stack([units, *[np.zeros_like(units)] * 5], 1), False

    def look(unit: int) -> tuple[int, int, int]:
        rasters: list[Raster] = []
        try:
            rasters = cuts.open_unit(unit)
            return rasters[0].height, rasters[0].width, rasters[0].slices
        except UserError:
            raise
        except Exception:  # reading it will say why
            return 0, 0, 1
        finally:
            for raster in rasters:
                raster.close()

    count = len(cuts.units)
    with ThreadPoolExecutor(LOOKERS) as pool, progress_bar(count, "look", "file", disable=count < 100) as bar:
        sizes = []
        for size in pool.map(look, range(count)):
            sizes.append(size)
            bar.update()
    rows = [
        np.concatenate([np.tile([unit, number], (len(boxes), 1)), boxes], 1)
        for unit, (height, width, slices) in enumerate(sizes)
        for boxes in [boxes_of(height, width, cutting.tile, cutting.stride)]
        for number in range(slices)
    ]
    table = np.concatenate(rows).astype(np.int64)
    return table, cutting.reading.pages == "samples" and len(table) > 0


def boxes_of(height: int, width: int, tile: int, stride: int) -> Array:
    """Tiles of a picture, int64 [n, 4] of (top, left, height, width), from the upper left, row after row.

    Where they do not come out even, the last ones end at the edge; of a smaller picture there is one, of all of it.
    """
    if not tile or not height:
        return np.zeros((1, 4), np.int64)
    tops, lefts = (_starts(side, tile, stride) for side in (height, width))
    return np.array([(t, x, min(tile, height), min(tile, width)) for t in tops for x in lefts], np.int64)


def _starts(side: int, tile: int, stride: int) -> list[int]:
    starts = list(range(0, max(side - tile, 0) + 1, stride))
    return starts if starts[-1] + tile >= side else [*starts, side - tile]
