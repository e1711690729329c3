"""Batches of images with masks or boxes: order, worker processes, position, and samples that cannot be read.

What a sample is, and what happens to it, is a `DenseSet`'s and a `Transform`'s affair; here is what all loaders have in
common. Order and random numbers are functions of (seed, epoch, sample id), the same for any number of ranks and workers
and after resuming. Samples go through torch's worker processes, because the time goes into decoding and resizing whole
pictures in Python libraries; FFCV's files hold no boxes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasthpm.data.augmented import leave_signals_to_the_parent
from fasthpm.data.bad import BadSample, Quarantine
from fasthpm.data.base import REPLACEMENTS
from fasthpm.data.keys import Stream
from fasthpm.data.options import MAX_BAD_SAMPLES, count_workers
from fasthpm.data.sampling import Array, key_of, mix, replacements, sample_order, uniforms
from fasthpm.data.types import DatasetInfo
from fasthpm.errors import UserError

Transform = Callable[[Any, np.random.Generator], Any]  # what `DenseSet.read` gave, and random numbers -> a sample
Collate = Callable[[list[Any]], tuple[Any, Any]]  # samples -> images and targets of a batch
Key = tuple[int, int]  # epoch, sample id
AHEAD = 2  # batches that every worker has ready


class Unreadable(Exception):
    """A sample that cannot be used: the rest of a sentence that begins with its name."""


class DenseSet(Protocol):
    """Images and the truth about them, numbered from 0."""

    source: str  # its path, for messages
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many samples there are."""

    def name(self, sample: int) -> str:
        """The file of a sample, for messages and lists."""

    def read(self, sample: int) -> Any:
        """The decoded image [H, W, C], of photographs uint8, and its truth. **Raises:** `Unreadable`."""

    def repeats(self) -> Array | None:
        """How often every sample comes in an epoch, float [N] of 1 or more; None: once."""


@dataclass(frozen=True)
class DenseBatch:
    """One rank's share of a micro-batch."""

    images: Any  # what `Collate` made, as stored: [B, C, H, W], or a list of [C, H, W]
    targets: Any  # masks [B, H, W], or a list of dicts of tensors
    ids: Tensor  # int64 [B], number of each sample in its set
    replaced: Tensor  # bool [B]: the sample whose turn it was cannot be read, this is another one

    def to(self, device: torch.device) -> "DenseBatch":
        """The same batch on `device`; asynchronous where the source is pinned."""
        return DenseBatch(*(_moved(getattr(self, field.name), device) for field in dataclasses.fields(self)))

    def pin_memory(self) -> "DenseBatch":
        """The same batch in page-locked memory; torch's loader calls it."""
        return DenseBatch(*(_pinned(getattr(self, field.name)) for field in dataclasses.fields(self)))


def _moved(value: Any, device: torch.device) -> Any:
    return _each(value, lambda tensor: tensor.to(device, non_blocking=True))


def _pinned(value: Any) -> Any:
    return _each(value, Tensor.pin_memory)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed, however deep in lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(one, change) for name, one in value.items()}
    return [_each(one, change) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class DenseOptions:
    """What a loader of a dense set is asked for.

    - `batch_size`: samples per rank and batch; `accum_iter`: batches per update, of which an epoch holds whole ones
    - `train`: shuffled by (seed, epoch), bad samples replaced; otherwise in order, each sample once over all ranks, the
      last batches smaller or empty, and a bad sample is an error
    - `num_workers`: processes of this rank; 0 = cores / ranks
    - `max_bad_samples`: share of the set that may be unreadable (`LoaderOptions` says more)
    """

    batch_size: int
    train: bool
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accum_iter: int = 1
    num_workers: int = 0
    max_bad_samples: float = MAX_BAD_SAMPLES


class DenseLoader:
    """A `fasthpm.data.types.Loader` whose batches are `DenseBatch`es of a `DenseSet`.

    In training it is endless, and `state_dict` tells the place of the next batch; `waited` sums the seconds that the
    consumer stood waiting for batches.
    """

    def __init__(self, data: DenseSet, transform: Transform, collate: Collate, options: DenseOptions) -> None:
        self.data, self.options, self.source = data, options, data.source
        self.batch_size, self.num_workers = options.batch_size, count_workers(options.num_workers)
        self.info = DatasetInfo(len(data), 0, (), (), data.classes)  # by what pixels are normalised, the encoder says
        self.waited = 0.0
        self._samples = _Samples(data, transform, options)
        self._collate = collate
        self._position = (0, 0)
        self._order: tuple[int, Array] = (-1, np.empty(0, np.int64))
        share = options.max_bad_samples if options.train else None
        self._quarantine = Quarantine(data.source, len(data), share, self._describe)
        if options.train and not len(self):
            group = options.batch_size * options.world_size * options.accum_iter
            raise UserError(
                f"{data.source} has {len(data)} samples for training, fewer than the {group} of an update; lower "
                f"--batch_size or --global_batch_size"
            )

    def __len__(self) -> int:
        """Batches of an epoch; where samples are repeated, of a round of as many samples as there are."""
        options = self.options
        group = options.batch_size * options.world_size
        if not options.train:
            return -(-len(self.data) // group)
        return len(self.data) // (group * options.accum_iter) * options.accum_iter

    def __iter__(self) -> Iterator[DenseBatch]:
        """Batches from the current position on; in training without end, otherwise to the end of the set."""
        workers = DataLoader(
            self._samples,
            batch_sampler=self._keys(*self._position) if self.options.train else self._all(),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=AHEAD,
            collate_fn=self._batch,
        )
        batches = iter(workers)
        try:
            while (found := self._waited_for(batches)) is not None:
                batch, bad = found
                self._note(bad)
                if isinstance(batch, UserError):
                    raise batch
                epoch, done = self._position
                if self.options.train:
                    self._position = (epoch, done + 1) if done + 1 < len(self) else (epoch + 1, 0)
                yield batch
        finally:
            del batches  # the workers end with it, and a traceback would keep it

    def _waited_for(self, batches: Iterator[Any]) -> Any:
        begin = time.perf_counter()
        found = next(batches, None)
        self.waited += time.perf_counter() - begin
        return found

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; concerns iterations that begin later."""
        self._position = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "batch"} of the next batch."""
        return dict(zip(("epoch", "batch"), self._position, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` said; concerns iterations that begin later."""
        self._position = (int(state["epoch"]), int(state["batch"]))

    def bad_samples(self) -> list[BadSample]:
        """The samples that this rank met so far and that cannot be read, each once."""
        return self._quarantine.met()

    def close(self) -> None:
        """Nothing is held: the workers end with their iteration."""

    # ------------------------------------------------------------------------------------------ which samples
    def _keys(self, epoch: int, batch: int) -> Iterator[list[Key]]:
        options = self.options
        while True:
            for number in range(batch, len(self)):
                begin = (number * options.world_size + options.rank) * options.batch_size
                yield [(epoch, int(one)) for one in self.order(epoch)[begin : begin + options.batch_size]]
            epoch, batch = epoch + 1, 0

    def _all(self) -> Iterator[list[Key]]:
        options = self.options
        for number in range(len(self)):
            begin = (number * options.world_size + options.rank) * options.batch_size
            yield [(0, sample) for sample in range(begin, min(begin + options.batch_size, len(self.data)))]

    def order(self, epoch: int) -> Array:
        """The samples of an epoch: int64, a permutation, or where samples are repeated a shuffled list with repeats.

        A sample that is to come 1.3 times comes once, and a second time in three of ten epochs (as LVIS's repeat-factor
        sampling has it, Gupta et al. 2019).
        """
        if self._order[0] != epoch:
            self._order = epoch, self._draw_order(epoch)
        return self._order[1]

    def _draw_order(self, epoch: int) -> Array:
        seed, count, often = self.options.seed, len(self.data), self.data.repeats()
        if often is None:
            return sample_order(seed, epoch, count)
        chance = uniforms(key_of(seed, epoch, Stream.REPEAT), np.arange(count), 1)[:, 0]
        whole = np.floor(often)
        ids = np.repeat(np.arange(count), (whole + (chance < often - whole)).astype(np.int64))
        return ids[sample_order(seed, epoch, len(ids))]

    # ------------------------------------------------------------------------------------------ samples
    def _batch(self, read: list["_Read"]) -> tuple[DenseBatch | UserError, dict[int, str]]:
        whys = {sample: why for one in read for sample, why in one.bad.items()}
        for one in read:
            if isinstance(one.sample, UserError):  # torch would wrap one that is raised in a worker into a traceback
                return one.sample, {}
        images, targets = self._collate([one.sample for one in read])
        ids, turns = (
            torch.tensor([getattr(one, name) for one in read], dtype=torch.int64) for name in ("got", "asked")
        )
        return DenseBatch(images, targets, ids, ids != turns), whys

    def _note(self, bad: dict[int, str]) -> None:
        self._why = bad
        self._quarantine.add(np.array(sorted(bad), np.int64))

    def _describe(self, sample: int) -> BadSample:
        return BadSample(sample, self.data.name(sample), self._why[sample])


@dataclass(frozen=True)
class _Read:
    sample: Any  # what the transform made of it, or the error that ends the run
    asked: int  # the sample whose turn it was
    got: int
    bad: dict[int, str]  # why others cannot be read, by their numbers


class _Samples(Dataset[_Read]):
    """Key -> what was read for it."""

    def __init__(self, data: DenseSet, transform: Transform, options: DenseOptions) -> None:
        self.data, self.transform, self.options = data, transform, options

    def __getitem__(self, key: Key) -> _Read:
        epoch, asked = key
        sample, bad, seed = asked, dict[int, str](), self.options.seed
        for attempt in range(1, 2 + REPLACEMENTS):
            try:
                found = self.data.read(sample)
            except Unreadable as why:
                bad[sample] = str(why)
            else:
                return _Read(self.transform(found, random_numbers(seed, epoch, asked)), asked, sample, bad)
            if not self.options.train:
                return _Read(UserError(f"{self.data.name(asked)} {bad[asked]}; repair or remove it"), asked, asked, {})
            sample = int(replacements(seed, epoch, np.array([asked]), attempt, len(self.data))[0])
        text = (
            f"{self.data.name(asked)} {bad[asked]}, and {REPLACEMENTS} samples tried in its place cannot be used either"
        )
        return _Read(UserError(f"{text}; see to {self.data.source}"), asked, asked, {})


def random_numbers(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """What an augmentation draws from: a function of (seed, epoch, sample) alone."""
    key = mix(key_of(seed, epoch, Stream.AUGMENT) ^ mix(np.array([sample], np.uint64)))
    return np.random.default_rng(int(key[0]))
