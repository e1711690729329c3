"""The fast loader of prepared sets that are no photographs: any type of `values.DTYPES`, up to 64 channels.

Batches have the stored type until they are on the device. What happens to a crop happens in one compiled loop, as for
photographs (`images`), with the same order, crops and replacements of what does not decode.
"""

from collections.abc import Callable

import numpy as np

from fasthpm.data.ffcv.images import FfcvLoader
from fasthpm.data.ffcv.prepared import open_set
from fasthpm.data.options import LoaderOptions
from fasthpm.data.sampling import INTERPOLATIONS, Array, channel_gains
from fasthpm.errors import UserError


def prepared_loader(source: str, options: LoaderOptions) -> FfcvLoader:
    """The `Loader` of a `.beton`, of its shards or of a comma list: of photographs or of arrays, as they are."""
    data = open_set(source)
    return (ArrayLoader if data.holds_arrays else FfcvLoader)(source, options, data)


def load_array_kernel() -> Callable[..., None]:
    """`array_kernel.decode`. **Raises:** `UserError` if what it is compiled by is not installed."""
    try:
        from fasthpm.data.ffcv.array_kernel import decode
    except ImportError as error:
        raise UserError(
            f"reading .beton files needs numba ({error}); install it with pip install 'fasthpm[ffcv]'"
        ) from error
    return decode


class ArrayLoader(FfcvLoader):
    """A `Loader` of a `.beton` file of arrays, of its shards, or of a comma list of files; see `build_loader`."""

    turns = True

    def _load(self) -> Callable[..., None]:
        kernel = load_array_kernel()
        from fasthpm.data.ffcv.array_kernel import settings_of

        info = self.data.info
        self._means = np.array(info.mean, np.float32) * np.float32(info.values.unit)
        self._settings = [
            settings_of(info.values.dtype, info.values.nodata, code) for code in range(len(INTERPOLATIONS))
        ]
        return kernel

    def _check_augmentation(self) -> None:
        if self.options.image_views:
            raise UserError(
                f"several views of an image (global_crops, local_crops) are of photographs, which {self.source} does "
                f"not hold; use a recipe without them"
            )
        if self.options.color_jitter:
            raise UserError(
                f"color_jitter is {self.options.color_jitter:g}, and is of photographs, which {self.source} does not "
                f"hold; use --channel_jitter or --channel_dropout"
            )

    def decode(self, images: Array, ids: Array, crops: Array, factors: Array | None = None) -> Array:
        """Write crops of samples like `_fill`, but return each sample's status, 0 if it decoded: int32 [b]."""
        data, status = self.data, np.zeros(len(ids), np.int32)
        table = (data.addresses, data.lengths, data.modes, data.heights, data.widths)
        gains = self._no_factors(len(ids)) if factors is None else factors
        settings = self._settings[INTERPOLATIONS.index(self.options.interpolation)]
        self._kernel(table, ids, crops, gains, self._means, images, status, settings)
        return status

    def _no_factors(self, count: int) -> Array:
        return np.ones((count, self.data.info.channels), np.float32)

    def _factors(self, epoch: int, ids: Array) -> Array:
        """Gains of the channels, float32 [b, C]; see `channel_gains`."""
        options = self.options
        if not options.train or not (options.channel_dropout or options.channel_jitter):
            return self._no_factors(len(ids))
        dropout, jitter = options.channel_dropout, options.channel_jitter
        return channel_gains(options.seed, epoch, ids, self.data.info.channels, dropout, jitter)
