"""Clips of prepared videos: which frames and crops, and their JPEGs through libturbojpeg and the images' own kernel.

A clip is a set of independent JPEGs, so that any video can begin at any stored frame at no cost. On CPUs this is
several times as fast as decoding video (bench/LOG.md has the figures).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fasthpm.data.bad import BadSample
from fasthpm.data.base import BLOCK_BYTES, PrefetchLoader
from fasthpm.data.ffcv.beton import JPEG
from fasthpm.data.ffcv.images import load_kernel
from fasthpm.data.options import LoaderOptions
from fasthpm.data.sampling import INTERPOLATIONS, Array, centre_crops, random_crops
from fasthpm.data.video.prepared import VideoSet, open_videos
from fasthpm.data.video.sampling import (
    REPEATS,
    clip_frames,
    clip_starts,
    multi_scale_crops,
    segment_frames,
    view_crops,
    view_segments,
    view_starts,
)
from fasthpm.errors import UserError


class ClipLoader(PrefetchLoader):
    """A `Loader` of a prepared video set (see `build_loader`), decoded by libturbojpeg; with one frame, of images."""

    def __init__(self, path: Path, options: LoaderOptions) -> None:
        self.data: VideoSet = open_videos(path)
        self.crop_columns = 5 + options.num_frames  # and which frames of its video a clip takes
        self._step = _frame_step(self.data, options)
        self._announced_epoch, self._announces = 0, False
        self._decode = self._open_decoder(options)
        super().__init__(self.data.info, options, str(path))

    def _open_decoder(self, options: LoaderOptions) -> Callable[..., None] | None:
        """What `_fill` decodes with."""
        return load_kernel()

    @property
    def span(self) -> int:
        """Stored frames from a clip's first to its last, inclusive."""
        return (self.options.num_frames - 1) * self._step + 1

    # ---------------------------------------------------------------------------------------------- which frames
    def _crops(self, epoch: int, ids: Array, sizes: Array, rows: Array) -> Array:
        """int64 [b, 5 + T]: a crop, and which frames of the video."""
        views = rows % self.options.num_views
        if not self.options.train:
            return self._view_crops(ids, sizes, views)
        out = np.zeros((len(ids), self.crop_columns), np.int64)
        for view in np.unique(views):
            mine = views == view
            out[mine] = self._drawn_crops(epoch + (int(view) << REPEATS), ids[mine], sizes[mine])
        return out

    def _drawn_crops(self, epoch: int, ids: Array, sizes: Array) -> Array:
        options, frames = self.options, self.data.videos["frames"][ids].astype(np.int64)
        if options.crop == "random_resized":
            crops = random_crops(options.seed, epoch, ids, sizes, options.crop_min, options.flip)
        else:
            crops = multi_scale_crops(options.seed, epoch, ids, sizes, options.image_size, options.flip)
        if options.frame_sampling == "segments":
            chosen = segment_frames(options.seed, epoch, ids, frames, options.num_frames)
        else:
            chosen = self._from(clip_starts(options.seed, epoch, ids, frames, self.span), frames)
        return np.concatenate([crops, chosen], 1)

    def _view_crops(self, ids: Array, sizes: Array, views: Array) -> Array:
        options, frames = self.options, self.data.videos["frames"][ids].astype(np.int64)
        clips, crops = options.views
        if crops == 1:
            boxes = centre_crops(sizes, options.image_size, self._crop_pct)
        else:
            boxes = view_crops(sizes, options.image_size, views % crops, crops)
        if options.frame_sampling == "segments":
            chosen = view_segments(frames, options.num_frames, views // crops, clips)
        else:
            chosen = self._from(view_starts(frames, self.span, views // crops, clips), frames)
        return np.concatenate([boxes, chosen], 1)

    def _from(self, starts: Array, frames: Array) -> Array:
        return clip_frames(starts, frames, self.options.num_frames, self._step)

    def _frames(self, ids: Array, crops: Array) -> Array:
        """Numbers in the set of the frames of clips: int64 [b, T]; `crops`: as `_crops` gives them."""
        return np.asarray(self.data.videos["first"][ids])[:, None] + crops[:, 5:]

    def _choose_crop_pct(self) -> float:
        return self.options.crop_pct or 1.0  # VideoMAE's: the shorter side is shown whole

    # ---------------------------------------------------------------------------------------------- the storage
    def _sizes(self, ids: Array) -> Array:
        videos = self.data.videos[ids]
        return np.stack([videos["height"], videos["width"]], 1).astype(np.int64)

    def _labels(self, ids: Array) -> Array:
        return np.asarray(self.data.videos["label"][ids])

    def _all_sized(self, size: tuple[int, int]) -> bool:
        videos = self.data.videos
        return bool((videos["height"] == size[0]).all() and (videos["width"] == size[1]).all())

    def _describe(self, sample: int) -> BadSample:
        return BadSample(sample, self.data.name_of(sample), "has frames that do not decode")

    def _announce(self, epoch: int, batch: int) -> None:
        self._announced_epoch = epoch  # decides the clips, and with them what is read
        super()._announce(epoch, batch)

    def _read_ahead(self, ids: Array) -> None:
        if not self._announces:
            self.data.leave_neighbours()
            self._announces = True
        rows = np.arange(len(ids) * self.options.num_views)
        ids = np.repeat(ids, self.options.num_views)
        crops = self._crops(self._announced_epoch, ids, self._sizes(ids), rows)
        self.data.read_ahead(self._frames(ids, crops).ravel())

    def _samples_per_block(self) -> int:
        return max(BLOCK_BYTES * self.info.num_samples // len(self.data.frames), 1)

    # ---------------------------------------------------------------------------------------------- the pixels
    def _fill(self, images: Array, ids: Array, crops: Array, factors: Array) -> Array:
        frames = self._frames(ids, crops)
        clips, count = frames.shape
        flat, sides = frames.ravel(), np.repeat(self._sizes(ids).astype(np.uint16), count, 0)
        begin, end = self.data.positions[flat], self.data.positions[flat + 1]
        table = (
            begin + np.uint64(self.data.address),
            end - begin,
            np.full(len(flat), JPEG, np.uint8),
            np.ascontiguousarray(sides[:, 0]),
            np.ascontiguousarray(sides[:, 1]),
        )
        status = np.zeros(len(flat), np.int32)
        boxes, jitter = (np.repeat(values, count, 0) for values in (crops[:, :5], factors))
        pixels = images.reshape(len(flat), *images.shape[-3:])
        assert self._decode is not None
        self._decode(
            table, np.arange(len(flat)), boxes, jitter, pixels, status, INTERPOLATIONS.index(self.options.interpolation)
        )
        return (status.reshape(clips, count) != 0).any(1)


def _frame_step(data: VideoSet, options: LoaderOptions) -> int:
    """Stored frames from one frame of a clip to the next."""
    dense = options.num_frames > 1 and options.frame_sampling == "dense"
    if dense and options.sampling_rate % data.stride:
        raise UserError(
            f"sampling_rate is {options.sampling_rate}, but {data.path} holds every {data.stride}th frame; use a "
            f"multiple of {data.stride}, or prepare it again with --frame_stride {options.sampling_rate}"
        )
    return max(options.sampling_rate // data.stride, 1)
