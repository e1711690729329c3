"""The fast loader: prepared `.beton` sets, decoded by libturbojpeg and resized by our own kernel in one compiled loop.

Of FFCV only the file format is used: its `Loader` cannot seed its crops, reuses the memory of its batches, compiles in
every process and ignores decoding errors. The loop is plain nogil code called from Python threads: no numba threading
layer takes part, hence no clash with forks or with other users of OpenMP or TBB.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from fasthpm.data.bad import BadSample
from fasthpm.data.base import BLOCK_BYTES, PrefetchLoader
from fasthpm.data.ffcv.beton import Beton, open_beton
from fasthpm.data.ffcv.prepared import PreparedSet, open_set
from fasthpm.data.options import LoaderOptions
from fasthpm.data.pixels import luminance
from fasthpm.data.sampling import INTERPOLATIONS, Array
from fasthpm.errors import UserError


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
