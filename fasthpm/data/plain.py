"""The plain loader: image files through PIL and numpy. Slow, simple, the truth that the fast one is tested against."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fasthpm.data import views
from fasthpm.data.bad import BadSample
from fasthpm.data.base import PrefetchLoader
from fasthpm.data.decoding import Decoded, read, size_of
from fasthpm.data.labels import count_unlabelled
from fasthpm.data.options import LoaderOptions
from fasthpm.data.pixels import ImageList, is_grey, list_images, luminance, render
from fasthpm.data.sampling import Array
from fasthpm.data.types import DatasetInfo
from fasthpm.errors import UserError, warn

PROBES = 256  # images that a folder's channels, mean and std are measured on, evenly spaced
_told: set[str] = set()  # notes that have been passed on; all of them are not known until everything is read


def read_pixels(path: str) -> Array:
    """A file as uint8 RGB [h, w, 3]; see `decoding`.

    **Raises:** `UserError` naming the file where it cannot be read.
    """
    return _decode(path).pixels


def _decode(path: str) -> Decoded:
    try:
        return read(Path(path).read_bytes())
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything for damaged files
        raise UserError(f"{path} cannot be read as an image ({error}); repair or remove it") from error


def measure_folder(images: ImageList) -> DatasetInfo:
    """Channels (1 if all are grey), mean and std of a list of files, from at most `PROBES` of them.

    Files that cannot be read are left out. **Raises:** `UserError` if there is no other.
    """
    count = len(images.paths)
    chosen = np.unique(np.linspace(0, count - 1, min(PROBES, count)).astype(int))
    grey, pixels, total, squares = True, 0, np.zeros(3), np.zeros(3)
    for values in _readable([images.paths[index] for index in chosen]):
        grey = grey and is_grey(values)
        flat = values.reshape(-1, 3) / 255
        pixels, total, squares = pixels + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    channels = 1 if grey else 3
    means, stds = (tuple(values[:channels].tolist()) for values in (mean, std))
    return DatasetInfo(count, channels, means, stds, images.classes, count_unlabelled(np.array(images.labels)))


def _readable(paths: list[str]) -> Iterator[Array]:
    error, found = None, False
    for path in paths:
        try:
            decoded = _decode(path)
            found = True
            for note in [note for note in decoded.notes if note not in _told]:
                _told.add(note)
                warn(f"{path}: {note}; there may be more such files")
            yield decoded.pixels
        except UserError as unreadable:
            error = error or unreadable
    if error and not found:
        raise error


@functools.cache
def _tell(line: str) -> None:
    """Warn once: a run opens its data several times."""
    warn(line)


class PlainLoader(PrefetchLoader):
    """A `Loader` of image files; see `build_loader`."""

    def __init__(self, path: Path, options: LoaderOptions) -> None:
        self._images = list_images(path)
        if options.rank == 0:
            for line in self._images.words:
                _tell(f"{path}: {line}")
        self._known_sizes = np.zeros((len(self._images.paths), 2), np.int64)  # 0 = not looked at yet
        super().__init__(measure_folder(self._images), options, str(path))

    def _sizes(self, ids: Array) -> Array:
        for index in ids[self._known_sizes[ids, 0] == 0]:
            with contextlib.suppress(UserError):  # stays 0
                self._known_sizes[index] = self._size(int(index))
        return self._known_sizes[ids]

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width of the upright image, from the file's header."""
        path = self._images.paths[index]
        try:
            return size_of(path)
        except Exception as error:
            raise UserError(f"{path} cannot be read as an image ({error}); repair or remove it") from error

    def _describe(self, sample: int) -> BadSample:
        path = self._images.paths[sample]
        try:
            read_pixels(path)
        except UserError as error:
            return BadSample(sample, path, f"cannot be read as an image ({error.__cause__})")
        return BadSample(sample, path, "has another size than its header says, or changed while it was read")

    def _labels(self, ids: Array) -> Array:
        return np.array([self._images.labels[index] for index in ids], np.int64)

    def _all_sized(self, size: tuple[int, int]) -> bool:
        return all(self._size(index) == size for index in range(len(self._images.paths)))  # stops at the first other

    def _fill(self, images: Array, ids: Array, crops: Array, factors: Array) -> Array:
        bad = np.zeros(len(ids), np.bool_)
        for k, (index, crop, change) in enumerate(zip(ids, crops, factors, strict=True)):
            pixels = self._read_whole(int(index))
            bad[k] = pixels is None
            if pixels is not None:
                images[k] = render(pixels, crop, images.shape[1:3], self.options.interpolation, change)
        return bad

    def _fill_views(self, ids: Array, parts: views.Parts) -> Array:
        bad = np.zeros(len(ids), np.bool_)
        for place, rows in views.samples_of(parts):
            pixels = self._read_whole(int(ids[place]))
            bad[place] = pixels is None
            if pixels is None:
                continue
            for images, crops, factors in rows:
                for k, (crop, change) in enumerate(zip(crops, factors, strict=True)):
                    images[k] = render(pixels, crop, images.shape[1:3], self.options.interpolation, change)
        return bad

    def _read_whole(self, index: int) -> Array | None:
        """The pixels of a file, in as many channels as asked for; None where they are not what crops were drawn for."""
        try:
            pixels = read_pixels(self._images.paths[index])
        except UserError:
            return None
        pixels = pixels if self.options.channels == 3 else luminance(pixels)
        return pixels if pixels.shape[:2] == tuple(self._known_sizes[index]) else None
