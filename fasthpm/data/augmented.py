"""Training images and clips for supervised fine-tuning: through timm's augmentations, in worker processes.

Order and augmentation are functions of (seed, epoch, sample id, repeat): the same for any number of ranks and workers,
and after resuming. Frames are decoded where they are augmented, on the CPU: PIL's work on them, not decoding, takes
most of the time, and each of torch's worker processes does both.
"""

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasthpm.data.bad import BadSample
from fasthpm.data.base import REPLACEMENTS, PrefetchLoader
from fasthpm.data.build import build_loader
from fasthpm.data.keys import Stream
from fasthpm.data.options import LoaderOptions, count_workers
from fasthpm.data.sampling import Array, key_of, mix, replacements
from fasthpm.data.statistics import PixelStatistics, statistics_of
from fasthpm.data.types import Batch
from fasthpm.data.values import are_photographs
from fasthpm.data.video.sampling import REPEATS
from fasthpm.errors import UserError, note_once


@dataclass(frozen=True)
class Augmentation:
    """MAE's fine-tuning transforms, under timm's names; "" or 0 turns one off."""

    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    crop_min: float = 0.08
    flip: bool = True
    color_jitter: float = 0.0  # only used without auto_augment


Key = tuple[int, int, int]  # epoch, sample id, and which draw of the sample in this epoch, from 0
Sample = tuple[Tensor, int, int, bool]  # pixels, label, id of what was read, whether it stands in for another


class AugmentedImages(Dataset[Sample]):
    """Key -> a sample whose pixels are float32 [C, H, W], normalised."""

    def __init__(self, base: PrefetchLoader, augmentation: Augmentation, pixels: PixelStatistics) -> None:
        self.base = base
        self.transform = create_transform(
            **_common(base, augmentation, pixels),
            scale=(augmentation.crop_min, 1.0),
            hflip=0.5 if augmentation.flip else 0.0,
            re_prob=augmentation.random_erasing,
            re_mode="pixel",
            re_count=1,
        )

    def __getitem__(self, key: Key) -> Sample:
        epoch, asked, repeat = key
        drawn = epoch + (repeat << REPEATS)  # draw 0 is that of an epoch without repeats
        pixels, sample = self._read(epoch, asked, drawn)
        seed = int(mix(key_of(self.base.options.seed, drawn, Stream.AUGMENT) ^ mix(np.array([asked], np.uint64)))[0])
        return self._augment(pixels, seed), int(self.base.labels_of(np.array([sample]))[0]), sample, sample != asked

    def _stored(self, drawn: int, sample: int) -> Array | None:
        """Pixels before any augmentation; None where they do not decode."""
        return self.base.stored(sample)

    def _augment(self, pixels: Array, seed: int) -> Tensor:
        _seed_all(seed)
        return cast(Tensor, self.transform(_picture(pixels)))[: pixels.shape[2]]

    def _read(self, epoch: int, asked: int, drawn: int) -> tuple[Array, int]:
        sample, options = asked, self.base.options
        for attempt in range(1, 2 + REPLACEMENTS):
            pixels = self._stored(drawn, sample)
            if pixels is not None:
                return pixels, sample
            spare = replacements(options.seed, epoch, np.array([asked]), attempt, self.base.info.num_samples)
            sample = int(spare[0])
        raise UserError(
            f"{self.base.source}: sample {asked} does not decode, nor do {REPLACEMENTS} in its place; "
            f"copy or prepare it again"
        )


class AugmentedClips(AugmentedImages):
    """Key -> a sample whose pixels are float32 [C, T, H, W], normalised.

    Every draw has a clip and a crop of its own (`PrefetchLoader.drawn`; in VideoMAE's code draws share the clip). Its
    frames go through timm's augmentation one by one, each from the same random state, so that all get the same
    operations; random erasing paints the same box into all of them, with fresh noise.
    """

    def __init__(self, base: PrefetchLoader, augmentation: Augmentation, pixels: PixelStatistics) -> None:
        self.base = base
        self.alike = create_transform(**_common(base, augmentation, pixels), hflip=0.0, separate=True)[1]
        self.erase = RandomErasing(augmentation.random_erasing, mode="pixel", max_count=1, device="cpu")
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))

    def _stored(self, drawn: int, sample: int) -> Array | None:
        return self.base.drawn(drawn, sample)

    def _augment(self, pixels: Array, seed: int) -> Tensor:
        frames = []
        for frame in pixels.reshape(-1, *pixels.shape[-3:]):
            _seed_all(seed)
            frames.append(np.asarray(self.alike(_picture(frame)))[..., : frame.shape[2]])
        clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        clip = (clip.float() / 255 - self.mean) / self.std  # videos have 8 bits
        # To timm one image with T*C channels: one box.
        return self.erase(clip.flatten(0, 1)).reshape(clip.shape).transpose(0, 1)


class AugmentedArrays(AugmentedImages):
    """Key -> a sample that is no photograph: float32 [C, H, W], normalised, nodata 0.

    Crops, flips and turns, gains of channels are the loader's own, another draw each time; then random erasing. What
    else timm does is of colours.
    """

    def __init__(self, base: PrefetchLoader, augmentation: Augmentation, pixels: PixelStatistics) -> None:
        self.base, self.pixels = base, pixels
        self.erase = RandomErasing(augmentation.random_erasing, mode="pixel", max_count=1, device="cpu")
        if augmentation.auto_augment or augmentation.color_jitter:
            note_once(f"{base.source} holds no photographs: samples are cropped, flipped and erased, colours stay")

    def _stored(self, drawn: int, sample: int) -> Array | None:
        return self.base.drawn(drawn, sample)

    def _augment(self, pixels: Array, seed: int) -> Tensor:
        _seed_all(seed)
        values, (mean, std) = self.pixels.values, (np.array(one, np.float32) for one in self._scale())
        scaled = (pixels.astype(np.float32) / np.float32(values.unit) - mean) / std
        if values.nodata is not None:
            scaled[(pixels == values.nodata) | (pixels != pixels)] = 0
        return cast(Tensor, self.erase(torch.from_numpy(scaled).permute(2, 0, 1).contiguous()))

    def _scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation, 1 of a channel that never changes."""
        return self.pixels.mean, tuple(std or 1.0 for std in self.pixels.std)


def _common(base: PrefetchLoader, augmentation: Augmentation, pixels: PixelStatistics) -> dict[str, Any]:
    """What timm's `create_transform` is told for images and for clips; it makes them RGB."""
    rgb = pixels.in_channels(3)
    return {
        "input_size": base.options.image_size,
        "is_training": True,
        "interpolation": "bicubic",
        "color_jitter": augmentation.color_jitter or None,
        "auto_augment": augmentation.auto_augment or None,
        "mean": rgb.mean,
        "std": rgb.std,
    }


def _picture(pixels: Array) -> Image.Image:
    """timm's augmentations know RGB; of a grey image all channels stay equal but for the noise of erased boxes."""
    return Image.fromarray(np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (timm draws from numpy's global generator)
    torch.manual_seed(seed % 2**63)


class AugmentedLoader:
    """A `Loader` whose batches hold float32 [B, C, H, W] or clips [B, C, T, H, W], augmented and normalised, by
    the set's own mean and std unless `normalize_by` says others.

    - `augmentation`: what happens to a sample; `options`: the rest, with or without `train`, which is on. `num_workers`
      processes, 0 = cores / ranks
    - `repeats`: draws of every sample per epoch, side by side in a batch of batch_size * repeats rows (repeated
      augmentation, Hoffer et al. 2020)
    """

    def __init__(self, data_path: str, augmentation: Augmentation, options: LoaderOptions, *, repeats: int = 1) -> None:
        own: dict[str, Any] = {
            "train": True,
            "crop": "random_resized",
            "crop_min": augmentation.crop_min,
            "flip": augmentation.flip,
        }
        self.base = cast(PrefetchLoader, build_loader(data_path, replace(options, num_workers=1, **own)))
        self.info, self.batch_size, self.repeats = self.base.info, self.base.batch_size, repeats
        self.source = data_path
        self.num_workers = count_workers(options.num_workers)
        self._augmentation = augmentation
        self.normalize_by(statistics_of(self.info))
        self._position = (0, 0)

    def normalize_by(self, pixels: PixelStatistics) -> PixelStatistics:
        """Normalise by `pixels`, which come back as they are used, from the next iteration on."""
        clips, values = self.base.options.num_frames > 1, self.info.values
        photographs = are_photographs(values.dtype, self.info.channels)
        kind = AugmentedClips if clips else AugmentedImages if photographs else AugmentedArrays
        pixels = pixels.in_channels(self.base.options.channels)
        self.images = kind(self.base, self._augmentation, pixels)
        return pixels

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, epoch after epoch, without end: the workers live as long."""
        workers = DataLoader(
            self.images,
            batch_sampler=self._keys(*self._position),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_collate,
        )
        for batch in workers:
            epoch, done = self._position
            self._position = (epoch, done + 1) if done + 1 < len(self) else (epoch + 1, 0)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; concerns iterations that begin later."""
        self._position = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "batch"} of the next batch."""
        return dict(zip(("epoch", "batch"), self._position, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` said; concerns iterations that begin later."""
        self.base.load_state_dict(state)
        self._position = (self.base.state_dict()["epoch"], self.base.state_dict()["batch"])

    def bad_samples(self) -> list[BadSample]:
        """Nothing: replaced samples are marked in their batches."""
        return []

    def close(self) -> None:
        """Stop threads; safe to call twice."""
        self.base.close()

    def _keys(self, epoch: int, batch: int) -> Iterator[list[Key]]:
        while True:
            for number in range(batch, len(self)):
                ids = self.base.ids_of(epoch, number).tolist()
                yield [(epoch, sample, repeat) for sample in ids for repeat in range(self.repeats)]
            epoch, batch = epoch + 1, 0


def leave_signals_to_the_parent(worker: int) -> None:
    """Terminals and SLURM signal whole groups of processes; a worker ends when the parent says so, or is gone."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(samples: list[Sample]) -> Batch:
    images, labels, ids, replaced = zip(*samples, strict=True)
    count, none = len(samples), torch.zeros(len(samples), 0, dtype=torch.int64)
    numbers = (torch.tensor(labels), torch.tensor(ids), none, none, torch.tensor(replaced))
    return Batch(torch.stack(images).reshape(count, *images[0].shape), *numbers)
