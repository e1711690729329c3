"""Training images for supervised fine-tuning: a set's stored images through timm's augmentations, in worker processes.

Order and augmentation are functions of (seed, epoch, sample id): the same for any number of ranks and workers, and
after resuming.
"""

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasthpm.data.loader import Batch, build_loader
from fasthpm.data.prefetch import REPLACEMENTS, PrefetchLoader, count_workers
from fasthpm.data.quarantine import BadSample
from fasthpm.data.sampling import key_of, mix, replacements
from fasthpm.errors import UserError

AUGMENT = 6  # purpose of a key, beside those of `sampling`


@dataclass(frozen=True)
class Augmentation:
    """MAE's fine-tuning transforms, under timm's names; "" or 0 turns one off."""

    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    crop_min: float = 0.08
    flip: bool = True
    color_jitter: float = 0.0  # only used without auto_augment


class AugmentedImages(Dataset[tuple[Tensor, int, int, bool]]):
    """(epoch, sample id) -> float32 [C, H, W], label, id of what was read, and whether it stands in for another."""

    def __init__(self, base: PrefetchLoader, augmentation: Augmentation) -> None:
        from timm.data import create_transform

        self.base, info = base, base.info
        grey = base.options.channels == 1
        self.transform = create_transform(
            base.options.image_size, is_training=True, scale=(augmentation.crop_min, 1.0),
            hflip=0.5 if augmentation.flip else 0.0, color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment or None, interpolation="bicubic",
            re_prob=augmentation.random_erasing, re_mode="pixel", re_count=1,
            mean=tuple(info.mean) * (3 if grey else 1), std=tuple(info.std) * (3 if grey else 1),
        )  # fmt: skip

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, bool]:
        epoch, asked = key
        pixels, sample = self._read(epoch, asked)
        seed = int(mix(key_of(self.base.options.seed, epoch, AUGMENT) ^ mix(np.array([asked], np.uint64)))[0])
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (timm draws from numpy's global generator)
        torch.manual_seed(seed % 2**63)
        # timm's augmentations know RGB; of a grey image all channels stay equal but for the noise of erased boxes.
        picture = Image.fromarray(np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels)
        image = cast(Tensor, self.transform(picture))[: pixels.shape[2]]
        return image, int(self.base.labels_of(np.array([sample]))[0]), sample, sample != asked

    def _read(self, epoch: int, asked: int) -> tuple[Any, int]:
        sample, options = asked, self.base.options
        for attempt in range(1, 2 + REPLACEMENTS):
            pixels = self.base.stored(sample)
            if pixels is not None:
                return pixels, sample
            spare = replacements(options.seed, epoch, np.array([asked]), attempt, self.base.info.num_samples)
            sample = int(spare[0])
        raise UserError(f"{self.base.source}: sample {asked} does not decode, nor do {REPLACEMENTS} in its place; "
                        f"copy or prepare it again")  # fmt: skip


class AugmentedLoader:
    """A `Loader` whose batches hold float32 [B, C, H, W], augmented and normalised over the data set.

    - `options`: of `build_loader`; `augmentation`: what happens to an image. `num_workers` processes, 0 = cores / ranks
    """

    def __init__(self, data_path: str, augmentation: Augmentation, **options: Any) -> None:
        self.base = cast(PrefetchLoader, build_loader(data_path, train=True, **{**options, "num_workers": 1}))
        self.info, self.batch_size = self.base.info, self.base.batch_size
        self.num_workers = count_workers(options.get("num_workers", 0))
        self.images = AugmentedImages(self.base, augmentation)
        self._position = (0, 0)

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, epoch after epoch, without end: the workers live as long."""
        workers = DataLoader(
            self.images, batch_sampler=self._keys(*self._position), num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_the_parent, pin_memory=torch.cuda.is_available(), collate_fn=_collate,
        )  # fmt: skip
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

    def _keys(self, epoch: int, batch: int) -> Iterator[list[tuple[int, int]]]:
        while True:
            for number in range(batch, len(self)):
                yield [(epoch, int(sample)) for sample in self.base._ids(epoch, number)]
            epoch, batch = epoch + 1, 0


def _leave_signals_to_the_parent(worker: int) -> None:
    """Terminals and SLURM signal whole groups of processes; a worker ends when the parent says so, or is gone."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(samples: list[tuple[Tensor, int, int, bool]]) -> Batch:
    images, labels, ids, replaced = zip(*samples, strict=True)
    count, none = len(samples), torch.zeros(len(samples), 0, dtype=torch.int64)
    numbers = (torch.tensor(labels), torch.tensor(ids), none, none, torch.tensor(replaced))
    return Batch(torch.stack(images).reshape(count, *images[0].shape), *numbers)
