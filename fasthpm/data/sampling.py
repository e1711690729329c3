"""Which samples, which crops: pure functions of (seed, epoch, sample id), the same for any number of ranks or threads.

B samples, N samples of the set. Everything is integer hashing (splitmix64) and a little float64 arithmetic in numpy,
vectorised over samples; no generator object carries state, so any batch of any epoch can be computed on its own.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasthpm.data.keys import Stream

Array = NDArray[Any]

GOLDEN = 0x9E3779B97F4A7C15
TRIES = 10  # as torchvision's RandomResizedCrop
RATIO = (3 / 4, 4 / 3)
INTERPOLATIONS = ("area", "bicubic")  # their positions are the kernel's codes
SAMPLE_ORDERS = ("random", "blocks")
HORIZONTAL, VERTICAL, TRANSPOSED = 1, 2, 4  # bits of a crop's last column: first transposed, then mirrored
QUARTERS = np.array([0, VERTICAL | TRANSPOSED, HORIZONTAL | VERTICAL, HORIZONTAL | TRANSPOSED])  # turns to the left


def mix(values: Array) -> Array:
    """splitmix64 of every element: uint64 -> uint64, a bijection. Steele et al. 2014."""
    x = np.asarray(values, np.uint64) + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(seed: int, epoch: int, stream: Stream) -> Array:
    """A uint64 [1] that stands for (seed, epoch, stream); an array, because numpy warns when scalars wrap around."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        key = mix(key ^ np.array([part % 2**64], np.uint64))
    return key


def sample_order(seed: int, epoch: int, num_samples: int) -> Array:
    """The order of an epoch: int64 [N], a permutation. Distinct hashes, so the sort has no ties to break."""
    ids = np.arange(num_samples, dtype=np.uint64)
    return np.argsort(mix(key_of(seed, epoch, Stream.ORDER) ^ mix(ids)))


def block_order(seed: int, epoch: int, num_samples: int, block: int, window: int) -> Array:
    """A quasi-random order of an epoch for sets larger than memory: int64 [N], a permutation.

    The set is cut into blocks of `block` samples that are stored side by side. The blocks are shuffled, every `window`
    of them in turn make a pool, and the samples of a pool are shuffled. So only one pool is in use at a time, and a
    sample is at most a pool's length away from its block's place; a set of one pool is shuffled freely.
    """
    ids = np.arange(num_samples)
    blocks = np.arange(-(-num_samples // block), dtype=np.uint64)
    place = np.empty(len(blocks), np.int64)
    place[np.argsort(mix(key_of(seed, epoch, Stream.BLOCKS) ^ mix(blocks)))] = np.arange(len(blocks))
    return np.lexsort(
        (mix(key_of(seed, epoch, Stream.ORDER) ^ mix(ids.astype(np.uint64))), place[ids // block] // window)
    )


def replacements(seed: int, epoch: int, ids: Array, attempt: int, num_samples: int) -> Array:
    """Which samples stand in for `ids` [B] that do not decode, attempt by attempt: int64 [B]."""
    state = mix(key_of(seed, epoch, Stream.SPARE) ^ mix(np.asarray(ids).astype(np.uint64)))
    step = np.array([attempt], np.uint64) * np.uint64(GOLDEN)
    return (mix(state + step) % np.uint64(num_samples)).astype(np.int64)


def colour_factors(seed: int, epoch: int, ids: Array, strength: float, channels: int) -> Array:
    """Factors of brightness, contrast and saturation: float32 [B, 3], uniform in [1 - strength, 1 + strength].

    From a key of their own: crops are the same with and without them. Grey images keep their (lack of) saturation.
    """
    factors = 1 + strength * (2 * uniforms(key_of(seed, epoch, Stream.COLOUR), ids, 3) - 1)
    if channels == 1:
        factors[:, 2] = 1
    return factors.astype(np.float32)


def uniforms(key: Array, ids: Array, count: int) -> Array:
    """float64 [B, count] in [0, 1): draw j of each sample."""
    state = mix(key ^ mix(np.asarray(ids).astype(np.uint64)))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (mix(state[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def torch_seed(*parts: int) -> int:
    """One seed of several numbers, for torch and numpy (32 bits)."""
    value = 0
    for part in parts:
        value = (value * 0x9E3779B1 + part + 0x7F4A7C15) % 2**64
        value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) % 2**64
    return (value ^ (value >> 32)) % 2**32


def random_crops(
    seed: int, epoch: int, ids: Array, sizes: Array, crop_min: float, flip: bool, crop_max: float = 1.0
) -> Array:
    """Random resized crops: int64 [B, 5] of top, left, height, width, and HORIZONTAL where mirrored.

    `sizes` is int64 [B, 2], height and width of the stored images. Area uniform in [crop_min, crop_max] of the image,
    aspect ratio log-uniform in [3/4, 4/3], ten tries, then the largest centred box within those ratios.
    """
    draws = uniforms(key_of(seed, epoch, Stream.CROP), ids, 2 * TRIES + 3)
    height, width = sizes[:, 0].astype(np.float64)[:, None], sizes[:, 1].astype(np.float64)[:, None]
    area = height * width * (crop_min + draws[:, :TRIES] * (crop_max - crop_min))
    low, high = np.log(RATIO)
    aspect = np.exp(low + draws[:, TRIES : 2 * TRIES] * (high - low))
    tall, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (tall > 0) & (wide > 0) & (tall <= height) & (wide <= width)
    rows, first = np.arange(len(draws)), fits.argmax(1)
    box = np.where(fits.any(1)[:, None], np.stack([tall[rows, first], wide[rows, first]], 1), _widest(sizes))
    room = sizes - box + 1
    corner = np.where(fits.any(1)[:, None], np.floor(draws[:, -3:-1] * room), (sizes - box) // 2)
    flipped = (draws[:, -1:] < 0.5) & flip
    return np.concatenate([corner, box, flipped], 1).astype(np.int64)


def turn_crops(seed: int, epoch: int, ids: Array, crops: Array, vertical: bool, rotate90: bool) -> Array:
    """`crops` [B, 5] that are also upside down at random (`vertical`), or turned by a multiple of 90 degrees.

    From a key of its own: boxes and mirroring are the same with and without.
    """
    draws = uniforms(key_of(seed, epoch, Stream.TURN), ids, 2)
    code = crops[:, 4] ^ np.where((draws[:, 0] < 0.5) & vertical, VERTICAL, 0)
    if rotate90:
        code = code ^ QUARTERS[np.floor(draws[:, 1] * 4).astype(np.int64)]
    return np.concatenate([crops[:, :4], code[:, None], crops[:, 5:]], 1)


def turned(image: Array, code: int) -> Array:
    """A crop [..., H, W, C] the way up that `code` says: HORIZONTAL, VERTICAL, TRANSPOSED."""
    image = image.swapaxes(-3, -2) if code & TRANSPOSED else image
    image = image[..., ::-1, :] if code & HORIZONTAL else image
    return image[..., ::-1, :, :] if code & VERTICAL else image


def channel_gains(seed: int, epoch: int, ids: Array, channels: int, dropout: float, jitter: float) -> Array:
    """What each channel's distance from its mean is multiplied with: float32 [B, C].

    Uniform in [1 - jitter, 1 + jitter]; 0 with the chance `dropout`, but never of all channels: then the one that was
    the nearest to stay does.
    """
    draws = uniforms(key_of(seed, epoch, Stream.CHANNELS), ids, 2 * channels)
    gains = 1 + jitter * (2 * draws[:, channels:] - 1)
    dropped = draws[:, :channels] < dropout
    rows = np.flatnonzero(dropped.all(1))
    dropped[rows, draws[rows, :channels].argmax(1)] = False
    return np.where(dropped, 0, gains).astype(np.float32)


def _widest(sizes: Array) -> Array:
    """float64 [B, 2]: height and width of the largest box whose width / height lies within RATIO, at least 1 x 1."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    box = np.stack([np.minimum(height, np.rint(width / RATIO[0])), np.minimum(width, np.rint(height * RATIO[1]))], 1)
    return np.maximum(box, 1)


def centre_crops(sizes: Array, image_size: tuple[int, int], crop_pct: float) -> Array:
    """The evaluation crop: int64 [B, 5] like `random_crops`, never flipped.

    The largest centred box with the aspect ratio of `image_size`, its sides times `crop_pct`: the same pixels as
    resizing the image to image_size / crop_pct and cutting out the centre.
    """
    out_height, out_width = image_size
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    tall = np.minimum(height, width * out_height / out_width) * crop_pct
    box = np.stack([tall, tall * out_width / out_height], 1)
    box = np.clip(np.rint(box), 1, sizes)
    return np.concatenate([(sizes - box) // 2, box, np.zeros((len(sizes), 1))], 1).astype(np.int64)


def whole_crops(sizes: Array) -> Array:
    """The whole image: int64 [B, 5] like `random_crops`, never flipped."""
    return np.concatenate([np.zeros_like(sizes), sizes, np.zeros((len(sizes), 1))], 1).astype(np.int64)


def _average_rows(image: Array, target: int) -> Array:
    """Resize axis 0 of [h, w, C] to `target` rows, each the mean of the stretch that it covers: float64."""
    source = len(image)
    total = np.zeros((source + 1, *image.shape[1:]))
    np.cumsum(image, axis=0, out=total[1:])
    edges = np.arange(target + 1) * (source / target)
    whole = np.minimum(edges.astype(np.int64), source - 1)
    part = (edges - whole)[:, None, None]
    return np.diff(total[whole] + part * image[whole], axis=0) * (target / source)


def area_resize(image: Array, size: tuple[int, int]) -> Array:
    """Resize uint8 [h, w, C] to `size` by exact pixel-area averaging: uint8 [H, W, C].

    What OpenCV calls INTER_AREA, which FFCV's own loader uses. The two agree to one grey level where both sides shrink
    or both grow; where one shrinks and the other grows OpenCV takes two taps, and single pixels differ by more.
    """
    if image.shape[:2] == size:
        return image.copy()
    rows = _average_rows(image, size[0])
    grid = _average_rows(rows.transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    return np.clip(np.rint(grid), 0, 255).astype(np.uint8)


def crop_resize(image: Array, crop: Array, size: tuple[int, int]) -> Array:
    """Apply one row of a crop table to uint8 [h, w, C]: cut, `area_resize`, flip."""
    top, left, height, width, flipped = (int(value) for value in crop)
    out = area_resize(image[top : top + height, left : left + width], size)
    return out[:, ::-1] if flipped else out
