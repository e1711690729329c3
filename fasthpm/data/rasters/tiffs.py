"""TIFF, GeoTIFF, OME-TIFF, pyramids of slides, through tifffile; a box is read from the tiles or strips it touches."""

import logging
import math
import re
from typing import Any

import numpy as np
from PIL import TiffImagePlugin

from fasthpm.data import jpegs
from fasthpm.data.decoding import FIRST, LARGEST
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters.raster import CHANNEL, MAX_BYTES, Blob, Raster, Reading, library, raster_of
from fasthpm.data.sampling import Array

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES, EXTRA, FORMAT = 256, 257, 258, 262, 277, 338, 339  # tags
GDAL_METADATA, GDAL_NODATA = 42112, 42113
ALPHAS, ASSOCIATED = (1, 2), 1  # values of EXTRA
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # channels of a photograph, by PHOTOMETRIC
WHITE_IS_ZERO, PALETTE, YCBCR, LAB = 0, 3, 6, (8, 9, 10)
JPEGS = (6, 7, 34892, 33007)  # compressions that give RGB of YCbCr
WHOLE_BYTES = 1 << 28  # a picture in strips is read whole up to here
GDAL_BAND = re.compile(r'<Item name="DESCRIPTION" sample="(\d+)"[^>]*>([^<]{1,64})</Item>')
OME_CHANNEL = re.compile(r'<Channel\b[^>]*?\bName="([^"]{1,64})"')
INVERTED = "white is 0 in the file; turned, so that white is high"


def is_tiff(name: str, start: bytes) -> bool:
    """By its first bytes."""
    return start[:4] in MAGICS


def is_photograph(blob: Blob) -> bool:
    """Whether its first picture has 8 bits or fewer and is grey, colour, a palette or CMYK, opacity aside."""
    with blob.open() as file:
        start = file.read(16)
        big = 43 in (start[2], start[3])
        order = "little" if start[:2] == b"II" else "big"
        try:
            table = TiffImagePlugin.ImageFileDirectory_v2(start if big else start[:8])
            file.seek(int.from_bytes(start[8:16] if big else start[4:8], order))  # type: ignore[arg-type]
            with quietly():
                table.load(file)
            if not {WIDTH, HEIGHT} <= set(table):
                return False
            bits, samples = np.atleast_1d(table.get(BITS, 1)), int(table.get(SAMPLES, 1))
            extra, kind = np.atleast_1d(table.get(EXTRA, ())), np.atleast_1d(table.get(FORMAT, 1))
            known = COLOURS.get(int(table.get(PHOTOMETRIC, 1)), 0)
        except Exception:  # what cannot be read is the reader's to say
            return False
    rest = samples - known
    return bool(bits.max() <= 8 and (kind == 1).all() and (not rest or (rest == 1 and extra[:1].tolist()[0] in ALPHAS)))


def open_tiff(blob: Blob, reading: Reading) -> Raster:
    """The largest picture or stack of a file, at a level of its pyramid.

    **Raises:** `ValueError`, or what tifffile raises, for one that is damaged or whose numbers are no values.
    """
    tifffile = library("tifffile", "tiff", "TIFF files whose values are kept (--values 8bit is without)")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters raises
    file = tifffile.TiffFile(blob.path if blob.data is None else blob.open())
    try:
        raster = _open(file, reading)
    except BaseException:
        file.close()
        raise
    raster.close = file.close
    return raster


def _open(file: Any, reading: Reading) -> Raster:
    if not file.series:
        raise ValueError("TIFF without a picture")
    sizes = [math.prod(series.shape) for series in file.series]
    series = file.series[sizes.index(max(sizes))]
    if reading.level >= len(series.levels):
        raise ValueError(f"--level {reading.level} of a file with {len(series.levels)} levels, which count from 0")
    level = series.levels[reading.level]
    first = level.keyframe
    _check_numbers(first)
    values = _Level(level)
    inverted = first.photometric == WHITE_IS_ZERO and np.dtype(level.dtype).kind == "u"
    notes = ((FIRST if len({*sizes}) == 1 else LARGEST),) if len(sizes) > 1 else ()
    axes = _axes(level)
    raster = raster_of(_Inverted(values) if inverted else values, axes, reading)
    raster.notes += (*notes, *((INVERTED,) if inverted else ()))
    raster.windowed = bool(first.is_tiled) or (values.whole is None and values.nbytes > WHOLE_BYTES)
    if first.extrasamples and CHANNEL in axes and first.samplesperpixel == raster.channels:
        extra = [int(kind) for kind in first.extrasamples]
        found = next((k for k, kind in enumerate(extra) if kind in ALPHAS), None)
        if found is not None:
            raster.alpha = first.samplesperpixel - len(extra) + found
            raster.premultiplied = extra[found] == ASSOCIATED
    raster.bands, raster.nodata = _bands(file, first, raster.channels), _nodata(first)
    return raster


def _check_numbers(page: Any) -> None:
    if page.dtype is None:
        raise ValueError(f"TIFF of {page.bitspersample} bits in a format that is unknown")
    high, wide = _piece_size(page)
    size = high * wide * page.samplesperpixel * np.dtype(page.dtype).itemsize
    if size > MAX_BYTES:  # that much is allocated before a byte is unpacked
        raise ValueError(f"TIFF with a tile or strip of {size} bytes, more than {MAX_BYTES}")
    if page.photometric == PALETTE:
        raise ValueError("TIFF with a palette: its numbers are no values; convert it, or use --values 8bit")
    if page.photometric in LAB or (page.photometric == YCBCR and int(page.compression) not in JPEGS):
        raise ValueError("TIFF of YCbCr or Lab colours, whose values cannot be kept; use --values 8bit")


def _piece_size(page: Any) -> tuple[int, int]:
    """Height and width of a tile or strip."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def _check_jpeg(data: bytes, most: tuple[int, int]) -> None:
    """**Raises:** `ValueError` for a JPEG that declares more than the tile or strip that it fills."""
    frame = next((at for marker, at, _ in jpegs.segments(data) if marker in jpegs.FRAMES), None)
    if frame is None:
        return
    high, wide = (int.from_bytes(data[frame + k : frame + k + 2], "big") for k in (5, 7))
    if high > most[0] or wide > most[1]:
        raise ValueError(f"TIFF: a JPEG of {high} x {wide} pixels in a tile or strip of {most[0]} x {most[1]}")


def _axes(level: Any) -> str:
    """Letters of `raster_of`: samples of a pixel are channels."""
    axes = str(level.axes)
    if "S" in axes and CHANNEL in axes:
        return axes.replace("S", "s")  # pages of several channels each
    return axes.replace("S", CHANNEL)


def _nodata(page: Any) -> float | None:
    tag = page.tags.get(GDAL_NODATA)
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:
        return None


def _bands(file: Any, page: Any, channels: int) -> tuple[str, ...]:
    """Names of all channels, or none."""
    tag = page.tags.get(GDAL_METADATA)
    found = {int(number): name for number, name in GDAL_BAND.findall(str(tag.value))} if tag is not None else {}
    if not found and file.is_ome:
        found = dict(enumerate(OME_CHANNEL.findall(file.ome_metadata or "")))
    names = tuple(found.get(k, "") for k in range(channels))
    return names if all(names) and len({*names}) == channels == len(found) else ()


class _Inverted:
    """Unsigned values whose white is 0."""

    def __init__(self, values: Any) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, index: Any) -> Array:
        part = np.asarray(self.values[index])
        return np.iinfo(part.dtype).max - part


class _Level:
    """A series of pages that is cut like an array."""

    def __init__(self, level: Any) -> None:
        self.level, self.first = level, level.keyframe
        self.shape, self.dtype = tuple(level.shape), np.dtype(level.dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.pages = list(level.pages)
        self.own = len(self.first.axes)  # axes of a page
        lead = self.shape[: len(self.shape) - self.own]
        paged = math.prod(lead) == len(self.pages) and None not in self.pages and self.first.imagedepth == 1
        self.whole: Any = None if paged and self.shape[len(lead) :] == tuple(self.first.shape) else level
        self.lead = lead

    def __getitem__(self, index: tuple[Any, ...]) -> Array:
        if self.whole is not None:
            return self.whole.asarray()[index]
        numbers = np.arange(len(self.pages)).reshape(self.lead)[index[: len(self.lead)]]
        inside = dict(zip(self.first.axes, index[len(self.lead) :], strict=True))
        if numbers.size == 1:
            page = self._page(int(numbers.ravel()[0]), inside["Y"], inside["X"])
            return page.reshape(*numbers.shape, *page.shape)
        parts = [self._page(int(number), inside["Y"], inside["X"]) for number in np.ravel(numbers)]
        return np.stack(parts).reshape(*numbers.shape, *parts[0].shape)

    def _page(self, number: int, rows: slice, columns: slice) -> Array:
        """A box of one page, its axes in their order."""
        page, first = self.pages[number], self.first
        top, bottom, _ = rows.indices(first.imagelength)
        left, right, _ = columns.indices(first.imagewidth)
        separate = first.samplesperpixel if int(first.planarconfig) == 2 else 1
        out = np.zeros((separate, bottom - top, right - left, first.samplesperpixel // separate), self.dtype)
        high, wide = _piece_size(first)
        if (
            separate == 1
            and (high, wide) == (bottom, right) == (first.imagelength, first.imagewidth)
            and not top + left
        ):
            piece = self._piece(page, 0)
            if piece is not None and piece.shape == out.shape[1:]:
                return piece if self.own == 3 else piece[..., 0]
        down, across = -(-first.imagelength // high), -(-first.imagewidth // wide)
        for plane in range(separate):
            for row in range(top // high, -(-bottom // high)):
                for column in range(left // wide, -(-right // wide)):
                    piece = self._piece(page, (plane * down + row) * across + column)
                    if piece is not None:
                        _paste(out[plane], piece, row * high - top, column * wide - left)
        if self.own == 2:
            return out[0, ..., 0]
        return out[0] if separate == 1 else out[..., 0]

    def _piece(self, page: Any, index: int) -> Array | None:
        """A decoded tile or strip [h, w, C]; None where the file has none, which means zeros."""
        if index >= len(page.dataoffsets):
            raise ValueError(f"TIFF with {len(page.dataoffsets)} strips or tiles, of which number {index} is missing")
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None
        handle = page.parent.filehandle
        with handle.lock:
            handle.seek(offset)
            data = handle.read(count)
        if len(data) < count:
            raise ValueError(f"TIFF: a strip or tile at byte {offset} has {len(data)} bytes of {count}")
        if int(page.keyframe.compression) in JPEGS:
            _check_jpeg(data, _piece_size(page.keyframe))
        tables = {"jpegtables": page.jpegtables, "jpegheader": getattr(page, "jpegheader", None)}
        segment, _, shape = page.keyframe.decode(data, index, **tables)
        return None if segment is None else segment[0, : shape[1], : shape[2]]


def _paste(out: Array, piece: Array, top: int, left: int) -> None:
    """Lay `piece` into `out` at a place that may lie partly outside."""
    height, width = out.shape[:2]
    y0, x0 = max(-top, 0), max(-left, 0)
    y1, x1 = min(piece.shape[0], height - top), min(piece.shape[1], width - left)
    if y1 > y0 and x1 > x0:
        out[top + y0 : top + y1, left + x0 : left + x1] = piece[y0:y1, x0:x1]
