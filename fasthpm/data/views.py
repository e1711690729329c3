"""Several views of one image: V random crops of the training size, and n small ones.

Every view is drawn like an image of an epoch of its own, so it is a function of (seed, epoch, sample id, view). A
sample whose bytes fail in any view is replaced in all of them: rows of one sample never show two.

Letters: S samples, V views (global crops), n local crops.
"""

from collections.abc import Callable, Iterator

import numpy as np

from fasthpm.data.options import LoaderOptions
from fasthpm.data.sampling import Array, colour_factors, random_crops
from fasthpm.data.video.sampling import REPEATS
from fasthpm.errors import note_once

ENLARGED = 2.0  # times: a local crop that is enlarged more shows a blur
MANY = 0.1  # share of a batch's local crops, of which this is said


def view_epoch(epoch: int, view: int) -> int:
    """The epoch that stands for `view` of `epoch` in keys; view 0 is an image without views."""
    return epoch + (view << REPEATS)


def global_crops(options: LoaderOptions, epoch: int, ids: Array, sizes: Array) -> Array:
    """Random resized crops of every view: int64 [S, V, 5]; `ids`: [S], `sizes`: int64 [S, 2]."""
    scale = (options.crop_min, options.crop_max)
    return _drawn(options, epoch, ids, sizes, range(options.num_views), scale)


def local_crops(options: LoaderOptions, epoch: int, ids: Array, sizes: Array) -> Array:
    """The same of the small ones: int64 [S, n, 5]."""
    views = range(options.num_views, options.num_views + options.local_crops)
    return _drawn(options, epoch, ids, sizes, views, (options.local_crop_min, options.local_crop_max))


def _drawn(
    options: LoaderOptions, epoch: int, ids: Array, sizes: Array, views: range, scale: tuple[float, float]
) -> Array:
    drawn = [
        random_crops(options.seed, view_epoch(epoch, view), ids, sizes, scale[0], options.flip, scale[1])
        for view in views
    ]
    return np.stack(drawn, 1) if drawn else np.zeros((len(ids), 0, 5), np.int64)


def factors_of(options: LoaderOptions, epoch: int, ids: Array) -> Array:
    """Colour factors of every view, the local crops after the global ones: float32 [S, V + n, 3]."""
    count = options.num_views + options.local_crops
    if not options.color_jitter:
        return np.ones((len(ids), count, 3), np.float32)
    drawn = [
        colour_factors(options.seed, view_epoch(epoch, view), ids, options.color_jitter, options.channels)
        for view in range(count)
    ]
    return np.stack(drawn, 1)


def remark_enlarged(source: str, crops: Array, size: int) -> None:
    """Say once that many local crops are enlarged a lot; `crops`: int64 [S, n, 5] of a batch."""
    blurred = (crops[..., 2:4].min(-1) * ENLARGED < size).mean() if crops.size else 0.0
    if blurred > MANY:
        note_once(
            f"{source}: many local crops are enlarged more than {ENLARGED:g} times to {size} px, and show little but "
            f"a blur; use a smaller --local_size, or a larger --local_crop_min"
        )


Parts = list[tuple[Array, Array, Array]]  # pixels uint8 [S, k, h, w, C], crops [S, k, 5], colour factors [S, k, 3]


def samples_of(parts: Parts) -> Iterator[tuple[int, list[tuple[Array, Array, Array]]]]:
    """Sample by sample: its place, and its rows of every part."""
    for place in range(len(parts[0][0])):
        yield place, [(pixels[place], crops[place], factors[place]) for pixels, crops, factors in parts]


def fill_one_by_one(fill: Callable[[Array, Array, Array, Array], Array], ids: Array, parts: Parts) -> Array:
    """Fill all views by a loader's `fill`, each decoded by itself; which samples fail in any: bool [S]."""
    bad = np.zeros(len(ids), np.bool_)
    for pixels, crops, factors in parts:
        count = pixels.shape[1]
        if count:
            rows = [values.reshape(-1, *values.shape[2:]) for values in (pixels, crops, factors)]
            bad |= fill(rows[0], np.repeat(ids, count), rows[1], rows[2]).reshape(-1, count).any(1)
    return bad
