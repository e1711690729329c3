"""The part that every loader shares: order, ranks, position, decoding threads and a bounded look-ahead.

A loader decodes with `num_workers` threads of its own (they live until `close`), fed by one thread per running
iteration, which ends with that iteration: at its end, on `break`, on an exception, on Ctrl-C and on `close`.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm.data import views
from fasthpm.data.background import Background
from fasthpm.data.bad import BadSample, Quarantine
from fasthpm.data.memory import Recycled
from fasthpm.data.options import OF_CHANNELS, LoaderOptions, count_workers
from fasthpm.data.sampling import (
    Array,
    block_order,
    centre_crops,
    colour_factors,
    random_crops,
    replacements,
    sample_order,
    turn_crops,
    turned,
    whole_crops,
)
from fasthpm.data.statistics import as_read
from fasthpm.data.types import Batch, DatasetInfo
from fasthpm.errors import UserError

AHEAD = 3  # batches that are decoded, or being decoded, before the consumer asks for them
DEFAULT_CROP_PCT = 0.875
REPLACEMENTS = 20  # tried in turn where replacements do not decode either
BLOCK_BYTES, WINDOW_BLOCKS = 4 * 2**20, 256  # of sample_order "blocks": what is read together, and shuffled together
BLOCK_SAMPLES = 64  # the same where nothing is stored side by side


class PrefetchLoader(ABC):
    """A `Loader` (see there) whose subclass knows the sizes of stored images and how to fill rows with pixels."""

    crop_columns = 5  # of what `_crops` gives; a batch has the first five
    turns = False  # whether `_fill` turns crops by itself, and not only mirrors them

    def __init__(self, info: DatasetInfo, options: LoaderOptions, source: str) -> None:
        self.info, self.options, self.source = as_read(info, options.channels, source), options, source
        self.batch_size, self.dtype = options.batch_size, np.dtype(info.values.dtype)
        self.num_workers = count_workers(options.num_workers)
        self._epoch = self._batch = 0
        self._order: tuple[int, Array] = (-1, np.empty(0, np.int64))
        self._announced = (0, 0)  # the first epoch and batch of which the storage has not heard
        self._memory = Recycled(AHEAD + 2)  # those ahead, the one in the making, and the consumer's
        self._pool: ThreadPoolExecutor | None = None
        self._current: weakref.ref[Prefetcher] | None = None
        self._closed = False
        self._quarantine = Quarantine(source, info.num_samples, options.bad_share, self._describe)
        self._check_info()
        self._crop_pct = 1.0 if options.train else self._choose_crop_pct()

    # ---------------------------------------------------------------------------------------------- for subclasses
    @abstractmethod
    def _sizes(self, ids: Array) -> Array:
        """Height and width of the stored images `ids` [B]: int64 [B, 2]; 0 where an image cannot be read."""

    @abstractmethod
    def _labels(self, ids: Array) -> Array:
        """Labels of the samples `ids` [B]: int64 [B]."""

    @abstractmethod
    def _fill(self, images: Array, ids: Array, crops: Array, factors: Array) -> Array:
        """Write crops [b, 5] of the samples `ids` [b] into `images`, [b, H, W, C] or of clips [b, T, H, W, C].

        Called from many threads. `factors`: as `_factors` gives them. Returns which samples do not decode: bool [b].
        """

    def _describe(self, sample: int) -> BadSample:
        """What to say of a sample that does not decode."""
        return BadSample(sample, f"{self.source}: sample {sample}", "does not decode")

    def _read_ahead(self, ids: Array) -> None:  # noqa: B027
        """Have the storage begin to read the samples `ids`, without waiting for it; nothing where it cannot."""

    def _samples_per_block(self) -> int:
        """How many samples `sample_order` "blocks" keeps together."""
        return BLOCK_SAMPLES

    @abstractmethod
    def _all_sized(self, size: tuple[int, int]) -> bool:
        """Whether every stored image has this height and width."""

    # ---------------------------------------------------------------------------------------------- the protocol
    def __len__(self) -> int:
        samples, batch, accum_iter = self.info.num_samples, self.options.global_batch, self.options.accum_iter
        return samples // (batch * accum_iter) * accum_iter if self.options.train else -(-samples // batch)

    def __iter__(self) -> Iterator[Batch]:
        if self._closed:
            raise RuntimeError(f"the loader of {self.source} is closed")
        self._stop_current()
        current = Prefetcher(self, self._epoch, self._batch)
        self._current = weakref.ref(current)  # weak: a loop that breaks drops its iterator, and with it the thread
        return current

    def set_epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_to(int(state["epoch"]), int(state["batch"]))

    def bad_samples(self) -> list[BadSample]:
        return self._quarantine.met()

    def close(self) -> None:
        self._closed = True
        self._stop_current()
        self._memory.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    # ---------------------------------------------------------------------------------------------- single samples
    def stored(self, sample: int) -> Array | None:
        """The stored image, uncropped: [h, w, C]; None where it does not decode."""
        ids = np.array([sample])
        size = self._sizes(ids)
        if not size.all():
            return None
        image = np.empty((1, *size[0], self.options.channels), self.dtype)
        crop = np.concatenate([np.zeros((1, 2)), size, np.zeros((1, 1))], 1).astype(np.int64)
        bad = self._fill(image, ids, crop, self._no_factors(1))
        return None if bad[0] else image[0]

    def drawn(self, epoch: int, sample: int) -> Array | None:
        """The sample as `epoch` crops it: [(T,) H, W, C]; None where it does not decode."""
        ids = np.array([sample])
        sizes = self._sizes(ids)
        if not sizes.all():
            return None
        image = np.empty((1, *self.options.sample_shape), self.dtype)
        crops, factors = self._crops(epoch, ids, sizes, np.zeros(1, np.int64)), self._factors(epoch, ids)
        bad = self._fill_turned(image, ids, crops, factors)
        return None if bad[0] else image[0]

    def labels_of(self, samples: Array) -> Array:
        """Labels of `samples` [B]: int64 [B]."""
        return np.ascontiguousarray(self._labels(samples), np.int64)

    # ---------------------------------------------------------------------------------------------- position
    def _go_to(self, epoch: int, batch: int) -> None:
        if epoch < 0 or not 0 <= batch <= len(self):
            raise UserError(
                f"position epoch {epoch}, batch {batch} is outside {self.source}, which has {len(self)} "
                f"batches per epoch; the checkpoint is of another data set or batch size"
            )
        self._stop_current()
        self._epoch, self._batch = (epoch + 1, 0) if batch == len(self) else (epoch, batch)

    def _given(self, epoch: int, batch: int) -> None:
        """The consumer now has `batch` of `epoch`."""
        self._epoch, self._batch = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)

    def _stop_current(self) -> None:
        current = self._current() if self._current else None
        if current is not None:
            current.close()
        self._current = None

    # ---------------------------------------------------------------------------------------------- batches
    def _check_info(self) -> None:
        options, info = self.options, self.info
        if options.train and info.num_samples < options.global_batch:
            raise UserError(
                f"{self.source} has {info.num_samples} samples, fewer than one global batch of "
                f"{options.global_batch}; use a smaller --batch_size"
            )
        self._check_augmentation()

    def _check_augmentation(self) -> None:
        """**Raises:** `UserError` for what does not suit the samples: photographs, unless a subclass has others."""
        for name in (name for name in OF_CHANNELS if getattr(self.options, name)):
            raise UserError(
                f"{name} is {getattr(self.options, name):g}, and {self.source} holds photographs; use --color_jitter"
            )

    def _choose_crop_pct(self) -> float:
        if self.options.crop_pct is not None:
            return self.options.crop_pct
        if self.options.whole:
            return 1.0
        return 1.0 if self._all_sized(self.options.image_size) else DEFAULT_CROP_PCT

    def ids_of(self, epoch: int, batch: int) -> Array:
        """This rank's rows of global batch `batch`: int64, `batch_size` of them or, in a ragged last one, fewer."""
        start = batch * self.options.global_batch + self.options.rank * self.batch_size
        return self._epoch_order(epoch)[start : start + self.batch_size].astype(np.int64)

    def _epoch_order(self, epoch: int) -> Array:
        """The samples of all ranks in the order of `epoch`: int64 [N]."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return self._order[1]

    def _draw_order(self, epoch: int) -> Array:
        seed, samples = self.options.seed, self.info.num_samples
        if not self.options.train:
            return np.arange(samples)
        if self.options.sample_order == "blocks":
            return block_order(seed, epoch, samples, self._samples_per_block(), WINDOW_BLOCKS)
        return sample_order(seed, epoch, samples)

    def _crops(self, epoch: int, ids: Array, sizes: Array, rows: Array) -> Array:
        """Crops of the samples `ids` [b], which are the rows `rows` [b] of a batch: int64 [b, 5 or more]."""
        options = self.options
        if options.train:
            crops = random_crops(options.seed, epoch, ids, sizes, options.crop_min, options.flip, options.crop_max)
            if not options.turns:
                return crops
            return turn_crops(options.seed, epoch, ids, crops, options.flip_vertical, options.rotate90)
        if options.whole:
            return whole_crops(sizes)
        return centre_crops(sizes, options.image_size, self._crop_pct)

    def _no_factors(self, count: int) -> Array:
        """`_factors` that change nothing, of `count` samples."""
        return np.ones((count, 3), np.float32)

    def _factors(self, epoch: int, ids: Array) -> Array:
        """How the colours of samples change: factors of brightness, contrast and saturation, float32 [b, 3]."""
        options = self.options
        if not options.train or options.color_jitter == 0:
            return self._no_factors(len(ids))
        return colour_factors(options.seed, epoch, ids, options.color_jitter, options.channels)

    def _announce(self, epoch: int, batch: int) -> None:
        """Tell the storage of this batch and the next, and, of blocks, piece by piece of the next pool."""
        first = self._announced[1] if self._announced[0] == epoch else 0
        for coming in range(max(first, batch), min(batch + 2, len(self))):
            self._read_ahead(self.ids_of(epoch, coming))
        self._announced = (epoch, batch + 2)
        if self.options.train and self.options.sample_order == "blocks":
            self._read_ahead(self._next_pool(epoch, batch))

    def _next_pool(self, epoch: int, batch: int) -> Array:
        """This rank's samples of the pool after the batch's own, in storage order: as large a part as the batch is."""
        pool, global_batch = WINDOW_BLOCKS * self._samples_per_block(), self.options.global_batch
        begin = batch * global_batch % pool
        places = np.arange(pool) + batch * global_batch - begin + pool
        mine = places[places % global_batch // self.batch_size == self.options.rank]
        ids = np.sort(self._epoch_order(epoch)[mine[mine < self.info.num_samples]])
        end = min(begin + global_batch, pool)
        return ids[len(ids) * begin // pool : len(ids) * end // pool]

    def _make(self, epoch: int, batch: int) -> Batch:
        """Decode one batch of `epoch`."""
        self._announce(epoch, batch)
        return self.take(epoch, np.repeat(self.ids_of(epoch, batch), self.options.num_views))

    def take(self, epoch: int, asked: Array) -> Batch:
        """Decode the samples `asked` [B] as `epoch` crops them, into memory of its own (pinned if there is CUDA).

        Of images in several views each sample stands in `asked` once per view, one after the other.
        """
        pin = torch.cuda.is_available()
        images, local = self._empty(len(asked), pin), None
        if self.options.image_views:
            local = self._empty_local(len(asked) // self.options.num_views, pin)
            ids, crops, sizes = self._read_views(images, local, epoch, asked)
        else:
            ids, crops, sizes = self._read(images, epoch, asked)
        columns = self._labels(ids), ids, crops[:, :5], sizes
        rest = [torch.from_numpy(np.ascontiguousarray(column, np.int64)) for column in columns]
        rest.append(torch.from_numpy(ids != asked))
        batch = Batch(images, *(tensor.pin_memory() if pin else tensor for tensor in rest))
        return batch if local is None else replace(batch, local=local)

    def _empty_local(self, samples: int, pin: bool = False) -> Tensor:
        """Memory for the local crops of `samples` samples."""
        side, count = self.options.local_size, samples * self.options.local_crops
        return torch.empty((count, side, side, self.options.channels), dtype=torch.uint8, pin_memory=pin)

    def _empty(self, count: int, pin: bool = False) -> Tensor:
        """Memory for the pixels of `count` samples, where they are decoded to."""
        dtype = getattr(torch, self.dtype.name)
        shape = (count, *self.options.sample_shape)
        return torch.empty(shape, dtype=dtype, pin_memory=True) if pin else self._memory.empty(shape, dtype)

    def _read(self, images: Tensor, epoch: int, asked: Array) -> tuple[Array, Array, Array]:
        """Fill `images` [B, H, W, C] with `asked` [B] or what replaces them; which samples, crops and sizes these are.

        A replacement is a function of (seed, epoch, sample id) and of which samples are bad, nothing else.
        """
        crops, sizes = np.zeros((len(asked), self.crop_columns), np.int64), np.zeros((len(asked), 2), np.int64)

        def fill(rows: Array, ids: Array, again: bool) -> Array:
            pixels = self._empty(len(rows)) if again else images
            sizes[rows] = self._sizes(ids)
            crops[rows] = self._crops(epoch, ids, np.maximum(sizes[rows], 1), rows)
            bad = self._fill_in_parallel(pixels, ids, crops[rows], self._factors(epoch, ids))
            for row, image in zip(rows.tolist(), pixels, strict=True) if again else ():
                images[row] = image  # torch cannot index all dtypes by a list
            return bad | (sizes[rows] == 0).any(1)

        return self._with_replacements(epoch, asked, fill), crops, sizes

    def _read_views(self, images: Tensor, local: Tensor, epoch: int, asked: Array) -> tuple[Array, Array, Array]:
        """`_read` of images in several views, and of their local crops [S * n, h, w, C]."""
        options, samples = self.options, asked[:: self.options.num_views]
        count = len(samples)
        targets = [part.numpy().reshape(count, -1, *part.shape[1:]) for part in (images, local)]
        boxes = [np.zeros((*target.shape[:2], 5), np.int64) for target in targets]
        sizes = np.zeros((count, 2), np.int64)

        def fill(rows: Array, ids: Array, again: bool) -> Array:
            pixels = [np.empty_like(target[rows]) for target in targets] if again else targets
            sizes[rows] = self._sizes(ids)
            for box, draw in zip(boxes, (views.global_crops, views.local_crops), strict=True):
                box[rows] = draw(options, epoch, ids, np.maximum(sizes[rows], 1))
            factors = np.split(views.factors_of(options, epoch, ids), [options.num_views], axis=1)
            parts = list(zip(pixels, [box[rows] for box in boxes], factors, strict=True))
            bad = self._in_parallel(
                len(rows), lambda part: self._fill_views(ids[part], [(a[part], b[part], c[part]) for a, b, c in parts])
            )
            for target, drawn in zip(targets, pixels, strict=True) if again else ():
                target[rows] = drawn
            return bad | (sizes[rows] == 0).any(1)

        ids = self._with_replacements(epoch, samples, fill)
        views.remark_enlarged(self.source, boxes[1], options.local_size)
        repeats = options.num_views
        return np.repeat(ids, repeats), boxes[0].reshape(-1, 5), np.repeat(sizes, repeats, 0)

    def _fill_views(self, ids: Array, parts: views.Parts) -> Array:
        """Write all views of the samples `ids` [S]; which samples do not decode: bool [S]. From many threads."""
        return views.fill_one_by_one(self._fill, ids, parts)

    def _with_replacements(self, epoch: int, asked: Array, fill: Callable[[Array, Array, bool], Array]) -> Array:
        """Have `fill` read the samples `asked` [S], and others in the place of those that do not decode: their ids.

        - `fill`: (rows that are read, ids of their samples, whether it is not for the first time) -> bad ones
        """
        ids, rows = asked.copy(), np.arange(len(asked))
        for attempt in range(1 + REPLACEMENTS):
            if attempt:
                ids[rows] = replacements(self.options.seed, epoch, asked[rows], attempt, self.info.num_samples)
            rows = rows[fill(rows, ids[rows], attempt > 0)]
            if not len(rows):
                return ids
            self._quarantine.add(ids[rows])
        raise UserError(
            f"{self._describe(int(asked[rows[0]])).name} does not decode, nor do {REPLACEMENTS} samples drawn in its "
            f"place; {self.source} is damaged: copy or prepare it again"
        )

    def _fill_in_parallel(self, images: Tensor, ids: Array, crops: Array, factors: Array) -> Array:
        arrays = (images.numpy(), ids, crops, factors)
        fill = self._fill_turned if self.options.turns else self._fill
        return self._in_parallel(len(ids), lambda part: fill(*(array[part] for array in arrays)))

    def _in_parallel(self, count: int, work: Callable[[slice], Array]) -> Array:
        """`work` on all parts of `count` rows, by the decoding threads: its results side by side, bool [count]."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="fasthpm-decode")
        share = max(-(-count // (2 * self.num_workers)), 1)  # two shares per thread even out large images
        parts = [slice(start, start + share) for start in range(0, count, share)]
        return np.concatenate([np.zeros(0, np.bool_), *self._pool.map(work, parts)])

    def _fill_turned(self, images: Array, ids: Array, crops: Array, factors: Array) -> Array:
        """`_fill`, of crops that are turned too."""
        if self.turns or not self.options.turns:
            return self._fill(images, ids, crops, factors)
        upright = crops.copy()
        upright[:, 4] = 0
        bad = self._fill(images, ids, upright, factors)
        for image, code in zip(images, crops[:, 4].tolist(), strict=True):
            image[:] = turned(image, code).copy()
        return bad


class Prefetcher:
    """The iterator of one epoch. Dropping it, or `close`, ends its thread."""

    def __init__(self, loader: PrefetchLoader, epoch: int, start: int) -> None:
        self._loader, self._epoch, self._next = loader, epoch, start
        batches = (loader._make(epoch, batch) for batch in range(start, len(loader)))
        self._ahead = Background(batches, AHEAD, "fasthpm-prefetch")
        self.close = self._ahead.close

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self._loader._given(self._epoch, self._next)
        self._next += 1
        return batch
