"""The fast loader: prepared `.beton` sets, decoded by libturbojpeg and resized by our own kernel in one compiled loop.

Of FFCV only the file format is used: its `Loader` cannot seed its crops, reuses the memory of its batches, compiles in
every process and ignores decoding errors. The loop is plain nogil code called from Python threads: no numba threading
layer takes part, hence no clash with forks or with other users of OpenMP or TBB.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from fasthpm.data import views
from fasthpm.data.bad import BadSample
from fasthpm.data.base import BLOCK_BYTES, PrefetchLoader
from fasthpm.data.ffcv.beton import RAW, Beton, open_beton
from fasthpm.data.ffcv.prepared import PreparedSet, open_set
from fasthpm.data.options import LoaderOptions
from fasthpm.data.pixels import luminance
from fasthpm.data.sampling import INTERPOLATIONS, Array, whole_crops
from fasthpm.errors import UserError

# Views of a sample, from which on one whole decoding costs less than one of each crop's part: 4.4 instead of 5.8 ms for
# 2 and 10 views of 500 x 375 pixels, 3.7 instead of 2.4 ms for 2 alone (bench/LOG.md).
ONCE_FROM = 8


def load_kernel() -> Callable[..., None]:
    """`kernel.decode`. **Raises:** `UserError` if what it is compiled from is not installed."""
    try:
        from fasthpm.data.ffcv.kernel import decode
    except (ImportError, OSError) as error:
        raise UserError(
            f"reading .beton files needs numba and libturbojpeg ({error}); install them with pip install "
            f"'fasthpm[ffcv]' and your system's packages (fasthpm doctor names them), or train on an image folder"
        ) from error
    return decode


class FfcvLoader(PrefetchLoader):
    """A `Loader` of a `.beton` file, of its shards, or of a comma list of files; see `build_loader`."""

    def __init__(self, source: str | Path, options: LoaderOptions, data: PreparedSet | None = None) -> None:
        self.data = open_set(source) if data is None else data
        self._kernel, self._announces = self._load(), False
        super().__init__(self.data.info, options, str(source))

    def _load(self) -> Callable[..., None]:
        return load_kernel()

    @cached_property
    def beton(self) -> Beton:
        """The table of the (first) file."""
        return open_beton(self.data.files[0])

    def decode(self, images: Array, ids: Array, crops: Array, factors: Array | None = None) -> Array:
        """Write crops of samples like `_fill`, but return each sample's status, 0 if it decoded: int32 [b]."""
        stored = self.data.info.channels
        if images.shape[3] == stored:
            return self._decode(images, ids, crops, factors)
        own = np.zeros((*images.shape[:3], stored), np.uint8)
        status = self._decode(own, ids, crops, factors)
        images[:] = own if stored == 1 else luminance(own)
        return status

    def _decode(self, images: Array, ids: Array, crops: Array, factors: Array | None) -> Array:
        data, status = self.data, np.zeros(len(ids), np.int32)
        table = (data.addresses, data.lengths, data.modes, data.heights, data.widths)
        jitter = np.ones((len(ids), 3), np.float32) if factors is None else factors.astype(np.float32)
        interpolation = INTERPOLATIONS.index(self.options.interpolation)
        self._kernel(table, ids, crops, jitter, images, status, interpolation)
        return status

    def _fill(self, images: Array, ids: Array, crops: Array, factors: Array) -> Array:
        return self.decode(images, ids, crops, factors) != 0

    def _fill_views(self, ids: Array, parts: views.Parts) -> Array:
        """Where there are many views each sample is decoded once, whole, and they are cut out of the pixels."""
        if self.options.num_views + self.options.local_crops < ONCE_FROM:
            return super()._fill_views(ids, parts)
        bad, stored = np.zeros(len(ids), np.bool_), self.data.info.channels
        for place, rows in views.samples_of(parts):
            sample = ids[place : place + 1]
            sizes = self._sizes(sample)
            whole = np.empty((1, *sizes[0], stored), np.uint8)
            bad[place] = self._decode(whole, sample, whole_crops(sizes), None)[0] != 0
            for pixels, crops, factors in rows if not bad[place] else ():
                self._cut(whole, pixels, crops, factors)
        return bad

    def _cut(self, whole: Array, pixels: Array, crops: Array, factors: Array) -> None:
        """Views [k, H, W, C] of decoded pixels [1, h, w, C'], resized as the kernel does it with a raw sample."""
        stored, count = whole.shape[3], len(pixels)
        raw = np.repeat(whole, 3, 3) if stored == 1 else whole
        own = pixels if pixels.shape[3] == stored else np.empty((*pixels.shape[:3], stored), np.uint8)
        table = (
            np.array([raw.ctypes.data], np.uint64),
            np.array([raw.nbytes], np.uint64),
            np.array([RAW], np.uint8),
            *(np.array([side], np.uint16) for side in whole.shape[1:3]),
        )
        interpolation = INTERPOLATIONS.index(self.options.interpolation)
        arrays = (np.ascontiguousarray(crops), np.ascontiguousarray(factors), own, np.zeros(count, np.int32))
        self._kernel(table, np.zeros(count, np.int64), *arrays, interpolation)
        if own is not pixels:
            pixels[:] = own if stored == 1 else luminance(own)

    def _describe(self, sample: int) -> BadSample:
        return BadSample(sample, self.data.name_of(sample), "does not decode")

    def _read_ahead(self, ids: Array) -> None:
        if not self._announces:  # only then, for page by page it would be slow
            self.data.leave_neighbours()
            self._announces = True
        self.data.read_ahead(ids)

    def _samples_per_block(self) -> int:
        return max(int(BLOCK_BYTES // self.data.lengths.mean()), 1)

    def _sizes(self, ids: Array) -> Array:
        return np.stack([self.data.heights[ids], self.data.widths[ids]], 1).astype(np.int64)

    def _labels(self, ids: Array) -> Array:
        return self.data.labels[ids]

    def _all_sized(self, size: tuple[int, int]) -> bool:
        return bool((self.data.heights == size[0]).all() and (self.data.widths == size[1]).all())
