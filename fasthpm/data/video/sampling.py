"""Which frames, which crops of a video: pure functions of (seed, epoch, sample id), as `sampling` has them for images.

B samples; frames are counted as they are stored.
"""

import numpy as np

from fasthpm.data.keys import Stream
from fasthpm.data.sampling import Array, key_of, uniforms

CROPS = ("auto", "multi_scale", "random_resized")  # auto: random_resized for images, multi_scale for videos
DECODERS = ("auto", "turbojpeg", "dali", "dali_gpu", "dali_video")  # of videos; see build_loader
FRAME_SAMPLINGS = ("dense", "segments")
SCALES = (1, 0.875, 0.75, 0.66)  # of VideoMAE's multi-scale crop; sides are at most one step apart
PAIRS = np.array([(i, j) for i in range(len(SCALES)) for j in range(len(SCALES)) if abs(i - j) <= 1])
SNAP = 3  # pixels: a side that differs by less from the output's is set to it
# Where crops begin, in quarters of the room: corners, middles of the sides, centre, and halfway to the corners.
POSITIONS = np.array([(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(1, 1), (1, 3), (3, 1), (3, 3)])
REPEATS = 40  # views of training take their draws from epochs 1 << REPEATS apart, which no training reaches


def clip_starts(seed: int, epoch: int, ids: Array, frames: Array, span: int) -> Array:
    """First stored frame of each clip: int64 [B], uniform over what fits.

    **Args:** `frames`: int64 [B], of the videos; `span`: frames from a clip's first to its last, inclusive. Videos
    shorter than that are looped, beginning anywhere.
    """
    draws = uniforms(key_of(seed, epoch, Stream.CLIP), ids, 1)[:, 0]
    room = np.where(frames >= span, frames - span + 1, frames)
    return np.minimum((draws * room).astype(np.int64), room - 1)


def view_starts(frames: Array, span: int, clip: Array, clips: int) -> Array:
    """First frame of clip number `clip` [B] of `clips` evenly spaced ones from end to end; of one, the middle: [B]."""
    room = np.maximum(frames - span, 0)
    return room // 2 if clips == 1 else (room * clip / (clips - 1)).astype(np.int64)


def clip_frames(starts: Array, frames: Array, count: int, step: int) -> Array:
    """Frame numbers of clips within their videos: int64 [B, count], every `step`-th, looped past the end."""
    return (starts[:, None] + step * np.arange(count)) % frames[:, None]


def segment_frames(seed: int, epoch: int, ids: Array, frames: Array, count: int) -> Array:
    """Frame numbers within the videos, one drawn from each of `count` equal stretches of the whole: int64 [B, count].

    VideoMAE's fine-tuning on Something-Something v2 (released code). Shorter videos repeat frames.
    """
    return _of_stretches(uniforms(key_of(seed, epoch, Stream.SEGMENTS), ids, count), frames)


def view_segments(frames: Array, count: int, clip: Array, clips: int) -> Array:
    """The same for tests, [B, count]: clip number `clip` [B] of `clips` takes each stretch at clip / clips of its
    length (of two: starts and middles, as the released code does); of one, the middle."""
    place = clip / clips if clips > 1 else np.full(len(frames), 0.5)
    return _of_stretches(np.repeat(place[:, None], count, 1), frames)


def _of_stretches(places: Array, frames: Array) -> Array:
    """Frames at `places` [B, count], shares of their stretches' lengths."""
    count = places.shape[1]
    chosen = ((np.arange(count) + places) * frames[:, None] / count).astype(np.int64)
    return np.minimum(chosen, frames[:, None] - 1)


def multi_scale_crops(
    seed: int, epoch: int, ids: Array, sizes: Array, image_size: tuple[int, int], flip: bool
) -> Array:
    """VideoMAE's pretraining crop (GroupMultiScaleCrop): int64 [B, 5] of top, left, height, width, flipped.

    Height and width each are the shorter side times one of `SCALES`, at one of 13 fixed `POSITIONS`. `sizes`: int64
    [B, 2] of the stored frames. For outputs that are not square, "the shorter side" is the largest box of their ratio.
    """
    draws = uniforms(key_of(seed, epoch, Stream.CLIP), ids, 4)[:, 1:]  # draw 0 is the clip's start
    base = _largest_box(sizes, image_size)
    pair = PAIRS[(draws[:, 0] * len(PAIRS)).astype(np.int64)]
    box = (base * np.array(SCALES)[pair]).astype(np.int64)
    near = np.abs(box - image_size) < SNAP
    box = np.clip(np.where(near, image_size, box), 1, sizes)
    position = POSITIONS[(draws[:, 1] * len(POSITIONS)).astype(np.int64)]
    corner = (sizes - box) // 4 * position
    flipped = (draws[:, 2:] < 0.5) & flip
    return np.concatenate([corner, box, flipped], 1).astype(np.int64)


def view_crops(sizes: Array, image_size: tuple[int, int], crop: Array, crops: int) -> Array:
    """Crop number `crop` [B] of `crops` evenly spaced, largest ones along the longer side: int64 [B, 5]."""
    box = np.maximum(np.rint(_largest_box(sizes, image_size)), 1).astype(np.int64)
    room = sizes - box
    corner = room // 2 if crops == 1 else (room * crop[:, None] / (crops - 1)).astype(np.int64)
    return np.concatenate([corner, box, np.zeros((len(sizes), 1), np.int64)], 1)


def _largest_box(sizes: Array, image_size: tuple[int, int]) -> Array:
    """float64 [B, 2]: the largest box with the output's ratio of sides."""
    scale = np.min(sizes / np.array(image_size), axis=1, keepdims=True)
    return np.minimum(scale * np.array(image_size), sizes)
