"""Images and clips that need no files: labelled waves with a disc, drawn on demand, for tests and debugging."""

import functools

import numpy as np

from fasthpm.data.base import PrefetchLoader
from fasthpm.data.options import LoaderOptions
from fasthpm.data.pixels import render
from fasthpm.data.sampling import Array, uniforms
from fasthpm.data.types import DatasetInfo
from fasthpm.errors import UserError

NUM_CLASSES, MEASURED, MEASURED_SIDE = 10, 64, 32
PREFIX = "synthetic:"
MOST_CHANNELS = 3
DRIFT, STRIDE = 0.05, 0.03  # of the waves in periods and of the disc in image sides, per frame
CONTENT_KEY = np.array([0x5EED], np.uint64)


def draw(index: int, size: tuple[int, int], channels: int, frame: int = 0) -> Array:
    """Frame `frame` of sample `index`: uint8 [h, w, C]; an image is frame 0.

    The label, index % 10, sets the direction and the frequency of the waves, and the direction of the disc, which
    leaves at one side and comes back at the other.
    """
    label, u = index % NUM_CLASSES, uniforms(CONTENT_KEY, np.array([index]), 10)[0]
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float64)
    y, x = (y + 0.5) / size[0], (x + 0.5) / size[1]
    angle = np.pi * label / NUM_CLASSES
    waves = np.sin(2 * np.pi * ((2 + label % 3) * (x * np.cos(angle) + y * np.sin(angle)) + u[0] + DRIFT * frame))
    right, down = STRIDE * frame * np.cos(2 * angle), STRIDE * frame * np.sin(2 * angle)
    centre = (0.2 + 0.6 * u[1] + right) % 1, (0.2 + 0.6 * u[2] + down) % 1
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < (0.1 + 0.15 * u[3]) ** 2
    paint, back = u[4 : 4 + channels], u[7 : 7 + channels]
    values = np.where(disc[..., None], paint, 0.25 + 0.5 * back + 0.25 * waves[..., None])
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


@functools.cache
def synthetic_info(data_path: str, channels: int = 3) -> DatasetInfo:
    """The `DatasetInfo` of `synthetic:N`; mean and std are measured on the first images.

    **Raises:** `UserError` if N is not a whole number above 0, and for more channels than are drawn.
    """
    number = data_path.removeprefix(PREFIX)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data_path is {data_path!r}, expected synthetic:N with N images, e.g. synthetic:1024")
    if not 1 <= channels <= MOST_CHANNELS:
        raise UserError(f"channels is {channels}, and {data_path} is drawn in 1 to {MOST_CHANNELS}; use --channels 3")
    side = (MEASURED_SIDE, MEASURED_SIDE)
    values = np.stack([draw(index, side, channels) for index in range(min(int(number), MEASURED))]) / 255
    mean, std = values.mean((0, 1, 2)), values.std((0, 1, 2))
    classes = tuple(f"waves{label}" for label in range(NUM_CLASSES))
    return DatasetInfo(int(number), channels, tuple(mean.tolist()), tuple(std.tolist()), classes)


class SyntheticLoader(PrefetchLoader):
    """A `Loader` of drawn images, stored, so to say, at `image_size` with as many channels as asked for.

    With `num_frames` above 1, of clips; they begin with frame 0, and all frames of a clip have the same crop.
    """

    def __init__(self, data_path: str, options: LoaderOptions) -> None:
        super().__init__(synthetic_info(data_path, options.channels), options, data_path)

    def _sizes(self, ids: Array) -> Array:
        return np.tile(np.array(self.options.image_size, np.int64), (len(ids), 1))

    def _labels(self, ids: Array) -> Array:
        return np.asarray(ids) % NUM_CLASSES

    def _all_sized(self, size: tuple[int, int]) -> bool:
        return size == self.options.image_size

    def _fill(self, images: Array, ids: Array, crops: Array, factors: Array) -> Array:
        stored, channels, interpolation = self.options.image_size, self.options.channels, self.options.interpolation
        size = images.shape[-3:-1]  # local crops are smaller than what is stored
        clips = images.reshape(len(ids), self.options.num_frames, *size, channels)
        for clip, index, crop, change in zip(clips, ids, crops, factors, strict=True):
            for t, row in enumerate(clip):
                drawn = draw(int(index), stored, channels, t * self.options.sampling_rate)
                row[:] = render(drawn, crop, size, interpolation, change)
        return np.zeros(len(ids), np.bool_)
