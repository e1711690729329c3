"""What a loader is asked for."""

import os
from dataclasses import dataclass

from fasthpm.data.sampling import INTERPOLATIONS, SAMPLE_ORDERS
from fasthpm.data.video.sampling import CROPS, DECODERS, FRAME_SAMPLINGS
from fasthpm.errors import UserError

MAX_BAD_SAMPLES = 0.001  # in training, unless asked otherwise


@dataclass(frozen=True)
class LoaderOptions:
    """What `build_loader` was asked for; see there."""

    batch_size: int
    image_size: tuple[int, int]
    channels: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    train: bool = True
    crop_min: float = 0.2
    flip: bool = True
    crop_pct: float | None = None
    accum_iter: int = 1
    interpolation: str = "bicubic"
    color_jitter: float = 0.0
    sample_order: str = "random"
    max_bad_samples: float | None = None
    num_frames: int = 1
    sampling_rate: int = 1
    crop: str = "auto"
    views: tuple[int, int] = (1, 1)
    decoder: str = "auto"
    whole: bool = False
    frame_sampling: str = "dense"

    def __post_init__(self) -> None:
        self._check("batch_size", self.batch_size >= 1, "1 or more")
        self._check("image_size", min(self.image_size) >= 1, "a height and a width of 1 or more")
        self._check("channels", self.channels in (1, 3), "1 (grey) or 3 (RGB)")
        self._check("num_frames", self.num_frames >= 1, "1 (images) or more")
        self._check("sampling_rate", self.sampling_rate >= 1, "1 (every frame) or more")
        self._check("accum_iter", self.accum_iter >= 1, "1 or more")
        self._check("num_workers", self.num_workers >= 0, "0 (share the cores) or more")
        self._check("rank", 0 <= self.rank < self.world_size, f"0 to {self.world_size - 1}")
        self._check("crop_min", 0 < self.crop_min <= 1, "more than 0, at most 1")
        self._check("crop_pct", self.crop_pct is None or 0 < self.crop_pct <= 1, "more than 0, at most 1")
        self._check("interpolation", self.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}")
        self._check("color_jitter", 0 <= self.color_jitter <= 1, "0 (off) to 1")
        self._check("sample_order", self.sample_order in SAMPLE_ORDERS, f"one of {', '.join(SAMPLE_ORDERS)}")
        self._check("crop", self.crop in CROPS, f"one of {', '.join(CROPS)}")
        self._check("decoder", self.decoder in DECODERS, f"one of {', '.join(DECODERS)}")
        sampling = self.frame_sampling
        self._check("frame_sampling", sampling in FRAME_SAMPLINGS, f"one of {', '.join(FRAME_SAMPLINGS)}")
        good = len(self.views) == 2 and min(self.views) >= 1 and not (self.train and self.views[1] > 1)
        self._check("views", good, "clips and crops, 1 or more each (in training 1 crop)")
        share = self.max_bad_samples
        self._check("max_bad_samples", share is None or 0 <= share <= 1, "a share, 0 to 1")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def global_batch(self) -> int:
        """G: samples of a batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def num_views(self) -> int:
        """Rows of a batch per video."""
        return self.views[0] * self.views[1]

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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return max(min(asked or cores // local_ranks, cores), 1)
