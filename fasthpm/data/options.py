"""What a loader is asked for."""

import os
from dataclasses import dataclass

from fasthpm.data.sampling import INTERPOLATIONS, SAMPLE_ORDERS
from fasthpm.data.values import MAX_CHANNELS
from fasthpm.data.video.sampling import CROPS, DECODERS, FRAME_SAMPLINGS
from fasthpm.errors import UserError
from fasthpm.machine import count_cores
from fasthpm.options import REQUIRED, option, validate

MAX_BAD_SAMPLES = 0.001  # in training, unless asked otherwise
OF_CHANNELS = ("channel_dropout", "channel_jitter")  # that photographs do without
OF_IMAGES = ("flip_vertical", "rotate90", *OF_CHANNELS)  # that clips do without


@dataclass(frozen=True)
class LoaderOptions:
    """What `build_loader` is asked for, beside the path.

    **Raises:** `UserError` for values out of range.
    """

    batch_size: int = option(REQUIRED, "samples per rank and batch", low=1)
    image_size: tuple[int, int] = option(REQUIRED, "(height, width) of what comes out, in pixels")
    channels: int = option(
        REQUIRED,
        "of the images; a grey set read in 3 has its value in all three, a coloured one its luminance in 1. All other "
        "sets are read in those that they have",
    )
    seed: int = option(0, "of the order of the samples and of all that is drawn for them")
    rank: int = option(0, "which share of the samples this process loads", low=0)
    world_size: int = option(1, "how many processes share them", low=1)
    num_workers: int = option(
        0, "decoding threads of this rank, at most the cores there are; 0 = cores / LOCAL_WORLD_SIZE", low=0
    )
    train: bool = option(
        True,
        "shuffled by (seed, epoch), random crops and flips, only full global batches. Otherwise in order, the centre, "
        "each sample once over all ranks, in batches of which the last may be smaller, on some ranks empty",
    )
    crop_min: float = option(
        0.2, "in training, a random resized crop covers this to crop_max of the area", above=0, high=1
    )
    crop_max: float = option(1.0, "the largest share of the area that it covers", above=0, high=1)
    flip: bool = option(True, "in training, mirror at random")
    flip_vertical: bool = option(False, "in training, put upside down at random: for what has no up, such as tiles")
    rotate90: bool = option(False, "in training, turn by a random multiple of 90 degrees; of square crops")
    channel_dropout: float = option(
        0.0,
        "in training, chance of each channel to become its mean, never all; of sets that are no photographs",
        low=0,
        below=1,
    )
    channel_jitter: float = option(
        0.0,
        "in training, each channel's distance from its mean is multiplied by 1 ± up to this; of sets that are no "
        "photographs",
        low=0,
        high=1,
    )
    crop_pct: float | None = option(
        None,
        "without train, share of the largest centred box that is cut out; None = 0.875, or 1 when all stored images "
        "have image_size already",
        above=0,
        high=1,
    )
    accum_iter: int = option(
        1,
        "batches per update: a training epoch holds whole updates only, so that it has the same samples however an "
        "update is cut into batches",
        low=1,
    )
    interpolation: str = option(
        "bicubic",
        "how crops are resized: bicubic (PIL's, antialiased) or area (pixel areas averaged)",
        choices=INTERPOLATIONS,
    )
    color_jitter: float = option(
        0.0, "in training, brightness, contrast and saturation are multiplied by 1 ± up to this; 0 = not", low=0, high=1
    )
    sample_order: str = option(
        "random",
        "blocks, for sets larger than memory: neighbours in storage are read together, and shuffled within a pool of "
        "about 1 GiB (`sampling.block_order`)",
        choices=SAMPLE_ORDERS,
    )
    max_bad_samples: float | None = option(
        None,
        "a sample that does not decode is replaced by another, which (seed, epoch, sample id) decide; once more "
        "distinct ones than this share of the set are met (10 are always accepted; 0 = none), loading fails. None = "
        "0.001 in training; without train the first one is an error, and none is replaced",
        low=0,
        high=1,
    )
    num_frames: int = option(
        1,
        "frames of a clip, 1 = images. In training a clip begins anywhere, drawn from (seed, epoch, sample id), else "
        "in the middle; short videos are looped",
        low=1,
    )
    sampling_rate: int = option(1, "a clip takes every how many-th frame of its video", low=1)
    crop: str = option(
        "auto",
        "of training: random_resized, or multi_scale as VideoMAE pretrains; auto = that for videos",
        choices=CROPS,
    )
    views: tuple[int, int] = option(
        (1, 1),
        "of videos, (clips, crops): every sample gives clips * crops rows one after the other, with the same id. In "
        "evaluation evenly spaced clips of the video times crops along its longer side, to average predictions over "
        "(VideoMAE: 5, 3 for Kinetics, 2, 3 for SSv2); in training (r, 1), r draws (repeated augmentation). Of images "
        "in training (r, 1): r random crops of each",
    )
    local_crops: int = option(0, "of images in training: small random crops of each sample, beside its views", low=0)
    local_size: int = option(96, "side of the local crops in pixels", low=1)
    local_crop_min: float = option(0.05, "a local crop covers this to local_crop_max of the area", above=0, high=1)
    local_crop_max: float = option(0.25, "the largest share of the area that it covers", above=0, high=1)
    decoder: str = option(
        "auto",
        "of videos: turbojpeg (libturbojpeg and our kernel) is auto; dali, DALI on the CPU; dali_gpu, DALI and nvJPEG: "
        "batches are on the GPU; dali_video, DALI on the video files of a set prepared with --copy, by NVDEC where "
        "there is a GPU",
        choices=DECODERS,
    )
    whole: bool = option(False, "without train, the whole image instead of its centre, squeezed into image_size")
    frame_sampling: str = option(
        "dense",
        "of prepared videos: dense, frames sampling_rate apart; segments, one frame of each of num_frames equal "
        "stretches of the whole video, drawn in training, otherwise their middles (VideoMAE's fine-tuning on SSv2)",
        choices=FRAME_SAMPLINGS,
    )

    def __post_init__(self) -> None:
        validate(self, show=str)
        self._check("image_size", min(self.image_size) >= 1, "a height and a width of 1 or more")
        self._check("channels", 1 <= self.channels <= MAX_CHANNELS, f"1 (grey), 3 (RGB), or up to {MAX_CHANNELS}")
        square = self.image_size[0] == self.image_size[1] or not self.rotate90
        self._check("image_size", square, "a square with rotate90, which turns crops by 90 degrees")
        for name in (name for name in OF_IMAGES if self.num_frames > 1 and getattr(self, name)):
            raise UserError(
                f"{name} is {getattr(self, name)}, and is of images; leave it out with {self.num_frames} frames"
            )
        self._check("rank", self.rank < self.world_size, f"0 to {self.world_size - 1}")
        good = len(self.views) == 2 and min(self.views) >= 1 and not (self.train and self.views[1] > 1)
        self._check("views", good, "clips and crops, 1 or more each (in training 1 crop)")
        self._check("crop_max", self.crop_max >= self.crop_min, f"crop_min {self.crop_min} or more")
        ordered = self.local_crop_max >= self.local_crop_min
        self._check("local_crop_max", ordered, f"local_crop_min {self.local_crop_min} or more")
        drawn = self.train and self.num_frames == 1
        self._check("local_crops", drawn or not self.local_crops, "0 in evaluation, and of clips")
        for name in ("flip_vertical", "rotate90"):
            self._check(name, not (getattr(self, name) and self.image_views), "False with several views of an image")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def turns(self) -> bool:
        """Whether crops are drawn another way up than mirrored."""
        return self.train and (self.flip_vertical or self.rotate90)

    @property
    def global_batch(self) -> int:
        """G: samples of a batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def num_views(self) -> int:
        """Rows of a batch per video."""
        return self.views[0] * self.views[1]

    @property
    def image_views(self) -> bool:
        """Whether samples are images in several views, one after the other, with local crops beside them or not."""
        return self.num_frames == 1 and self.train and (self.num_views > 1 or self.local_crops > 0)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample's pixels: (H, W, C), or (T, H, W, C) for clips."""
        frames = (self.num_frames,) if self.num_frames > 1 else ()
        return (*frames, *self.image_size, self.channels)

    @property
    def bad_share(self) -> float | None:
        """What `max_bad_samples` means here; None: no bad sample is accepted, nor replaced."""
        return MAX_BAD_SAMPLES if self.max_bad_samples is None and self.train else self.max_bad_samples


def count_workers(asked: int) -> int:
    """Decoding threads: `asked`, at most the cores this process may use; 0 shares them among the local ranks."""
    cores = count_cores()
    local_ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return max(min(asked or cores // local_ranks, cores), 1)
