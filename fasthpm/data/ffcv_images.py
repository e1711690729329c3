"""The fast loader: prepared `.beton` sets, decoded and resized by FFCV's C library inside one compiled loop.

FFCV's own `Loader` is not used: its crops cannot be seeded, its batches share memory that is overwritten later, it
compiles in every process and ignores decoding errors. Only its file format and its C library are. The loop is plain
nogil code called from Python threads: no numba threading layer takes part, hence no clash with forks or with other
users of OpenMP or TBB.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fasthpm.data.beton import open_beton
from fasthpm.data.prefetch import LoaderOptions, PrefetchLoader
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError


def _kernel() -> Callable[..., None]:
    try:
        from fasthpm.data.ffcv_kernel import decode
    except (ImportError, OSError) as error:
        raise UserError(
            f"reading .beton files needs FFCV ({error}); install it with pip install 'fasthpm[ffcv]' (README lists the "
            f"system libraries it needs), or train on an image folder"
        ) from error
    return decode


class FfcvLoader(PrefetchLoader):
    """A `Loader` of a `.beton` file; see `build_loader`."""

    def __init__(self, path: Path, options: LoaderOptions) -> None:
        self.beton = open_beton(path)
        self._kernel = _kernel()
        self._file = np.memmap(path, np.uint8, "r")
        super().__init__(self.beton.info, options, str(path))

    def decode(self, images: Array, ids: Array, crops: Array) -> Array:
        """Write crops of samples like `_fill`, but return each sample's status, 0 if it decoded: int32 [b]."""
        beton, status = self.beton, np.zeros(len(ids), np.int32)
        addresses = beton.positions + np.uint64(self._file.ctypes.data)
        table = (addresses, beton.lengths, beton.modes, beton.heights, beton.widths)
        jitter = np.ones((len(ids), 3), np.float32)
        self._kernel(table, ids, crops, jitter, images, status, 0)
        return status

    def _fill(self, images: Array, ids: Array, crops: Array) -> None:
        bad = ids[self.decode(images, ids, crops) != 0]
        if len(bad):
            raise UserError(
                f"{self.source}: sample {int(bad[0])} does not decode; check the file with python -m "
                f"data_prep.verify {self.source} and prepare it again"
            )

    def _sizes(self, ids: Array) -> Array:
        return np.stack([self.beton.heights[ids], self.beton.widths[ids]], 1).astype(np.int64)

    def _labels(self, ids: Array) -> Array:
        return self.beton.labels[ids]

    def _all_sized(self, size: tuple[int, int]) -> bool:
        return bool((self.beton.heights == size[0]).all() and (self.beton.widths == size[1]).all())
