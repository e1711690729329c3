"""Per-sample maps: attention or difficulty of every patch of the un-cropped image, kept in a file, cropped with it.

A run that uses maps (AMT; an amortised teacher) refreshes them every K epochs in a pass of its own over all samples:

    OUT/maps/KIND-00000040.maps     float16 [N, rows, columns], as they were made before the first update of epoch 40

One file per refresh, written aside by all ranks and renamed, so that a run resumed from any kept checkpoint finds the
maps that it had. Letters: N samples, B batch, R x C cells of a stored map, r x c patches of a training crop.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fasthpm import engine
from fasthpm.data import Batch, DatasetInfo, Loader
from fasthpm.data.quarantine import BadSample
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe

KINDS = ("attention", "difficulty")
MAGIC = b"FHPMMAP1"
HEADER_BYTES = 4096  # the maps begin on a page of their own
REFERENCE_CELLS = (2, 3)  # rows or columns that the released code reads: crop inside the image, or up to its border


# ------------------------------------------------------------------------------------------------------ the file
@dataclass(frozen=True)
class MapHeader:
    """What a store's file holds."""

    kind: str  # one of KINDS
    num_samples: int  # N
    grid: tuple[int, int]  # (R, C)
    data: str  # `data_identity` of the set that the maps were made of
    epoch: int  # refreshed before the first update of this epoch

    @property
    def row_bytes(self) -> int:
        """Bytes of one map."""
        return 2 * self.grid[0] * self.grid[1]

    def to_bytes(self) -> bytes:
        """HEADER_BYTES bytes."""
        return (MAGIC + json.dumps(dataclasses.asdict(self)).encode()).ljust(HEADER_BYTES)


def data_identity(info: DatasetInfo) -> str:
    """Tells data sets apart by what their sidecars say, wherever they lie: 16 hexadecimal digits."""
    known = (info.num_samples, info.channels, list(info.mean), list(info.std), list(info.classes))
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


class MapStore:
    """A file of maps, read through memory mapping.

    **Raises:** `UserError` if it is missing, foreign or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)
        shape = (self.header.num_samples, *self.header.grid)
        self._maps: Array = np.memmap(path, np.dtype("<f2"), "r", HEADER_BYTES, shape)

    def check(self, wanted: MapHeader) -> None:
        """**Raises:** `UserError` if the file is of another data set, size, kind or epoch than `wanted`."""
        for name, meaning in (
            ("num_samples", "samples"),
            ("data", "data set"),
            ("grid", "grid of patches"),
            ("kind", "kind of map"),
            ("epoch", "epoch"),
        ):
            there, expected = getattr(self.header, name), getattr(wanted, name)
            if there != expected:
                raise UserError(
                    f"map store {self.path} is of another {meaning}: {there}, and this run has {expected}; give the "
                    f"data and the settings that it was made with, or use another --output_dir"
                )

    def read(self, ids: Tensor) -> Tensor:
        """The maps of samples `ids`, int64 [B] on the CPU: float16 [B, R, C]."""
        return torch.from_numpy(np.asarray(self._maps[ids.numpy()]))


def read_header(path: Path) -> MapHeader:
    """What a store says of itself. **Raises:** `UserError` as `MapStore`."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
        if not head.startswith(MAGIC):
            raise ValueError("it does not begin like one")
        values = json.loads(head[len(MAGIC) :])
        header = MapHeader(**{**values, "grid": (int(values["grid"][0]), int(values["grid"][1]))})
    except OSError as error:
        raise UserError(
            f"map store {path} cannot be read ({error.strerror}); put it back, or resume from a checkpoint of the "
            f"epoch of a refresh"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no map store ({error}); remove it") from error
    whole = HEADER_BYTES + header.num_samples * header.row_bytes
    if size != whole:
        raise UserError(f"map store {path} has {size} bytes, expected {whole}; it is truncated, remove it")
    return header


def write_rows(file: int, header: MapHeader, ids: Array, rows: Array) -> None:
    """Write maps [B, R, C] of the samples `ids` [B] into an open store, neighbours in one call.

    By `pwrite`, not through mapped memory: on network file systems ranks of other machines may share a page.
    """
    rows = np.ascontiguousarray(rows, np.dtype("<f2"))
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(ids) != 1) + 1):
        if len(part):
            _write_all(file, rows[part].tobytes(), HEADER_BYTES + int(ids[part[0]]) * header.row_bytes)


def _write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


# ------------------------------------------------------------------------------------------------------ crop
def crop_maps(
    maps: Tensor, crops: Tensor, sizes: Tensor, grid: tuple[int, int], *, crop: str = "image", patch_size: int = 16
) -> Tensor:
    """Cut, resize and flip maps as their images were: one value for every patch of the crop.

    - `maps`: [B, R, C], cell (i, j) standing for that part of the whole stored image
    - `crops`: int64 [B, 5]: top, left, height, width, flipped; `sizes`: int64 [B, 2]: height, width, as in `Batch`
    - `grid`: (r, c) patches of the crop
    - `crop`: "image": the map at every patch's centre, bilinear between the centres of cells, constant beyond the
      outermost; "reference": what AMT's released code reads whatever the crop is: the top left 2 x 2 cells (a third row
      or column where the crop ends at the image's border), enlarged to the training crop and averaged over each patch
      of `patch_size` pixels

    **Returns:** float32 [B, r*c]. No host synchronisation.
    """
    weights = _centres if crop == "image" else _released
    down = weights(crops[:, 0], crops[:, 2], sizes[:, 0], grid[0], maps.shape[1], patch_size)
    across = weights(crops[:, 1], crops[:, 3], sizes[:, 1], grid[1], maps.shape[2], patch_size)
    values = down @ maps.to(torch.float64) @ across.transpose(1, 2)
    flipped = crops[:, 4].bool()[:, None, None]
    return torch.where(flipped, values.flip(2), values).flatten(1).float()


def _centres(start: Tensor, length: Tensor, size: Tensor, patches: int, cells: int, patch_size: int) -> Tensor:
    """Bilinear weights along one axis: float64 [B, patches, cells]."""
    middle = (torch.arange(patches, dtype=torch.float64, device=start.device) + 0.5) / patches
    place = (start[:, None] + length[:, None] * middle) / size[:, None] * cells - 0.5
    index = torch.arange(cells, dtype=torch.float64, device=start.device)
    return (1 - (place.clamp(0, cells - 1)[:, :, None] - index).abs()).clamp_min(0)


def _released(start: Tensor, length: Tensor, size: Tensor, patches: int, cells: int, patch_size: int) -> Tensor:
    """What the released code's enlargement and sum per patch come to along one axis: float64 [B, patches, cells]."""
    ends = (start + length == size)[:, None, None]
    few, more = (_enlarged(count, patches, cells, patch_size).to(start.device) for count in REFERENCE_CELLS)
    return torch.where(ends, more, few)


def _enlarged(count: int, patches: int, cells: int, patch_size: int) -> Tensor:
    """Weights of the first `count` of `cells` cells, enlarged bilinearly to all pixels, averaged per patch."""
    count = min(count, cells)
    pixels = patches * patch_size
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * count / pixels - 0.5).clamp(0, count - 1)
    weights = (1 - (place[:, None] - torch.arange(cells, dtype=torch.float64)).abs()).clamp_min(0)
    return weights.reshape(patches, patch_size, cells).mean(dim=1)


# ------------------------------------------------------------------------------------------------------ attention
def cls_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of the cls token to the patches in the encoder's last block, all patches visible.

    - `model`: an `HPMViT`; `images`: as in its `encode`

    **Returns:** float32 [B, heads, L]; with the attention to itself each row would sum to 1.
    """
    attention: Any = model.blocks[-1].attn  # type: ignore[index, union-attr]
    seen: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        model.encode(images)  # type: ignore[operator]
    finally:
        hook.remove()
    batch, length, width = seen[0].shape
    qkv = seen[0].float().reshape(batch, length, 3, attention.num_heads, width // 3 // attention.num_heads)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    scores = torch.einsum("bhd,bnhd->bhn", query * query.shape[-1] ** -0.5, key)
    return scores.softmax(dim=-1)[:, :, 1:]


def attention_weights(attention: Tensor, *, per_head: bool = False) -> Tensor:
    """AMT's weights: attention [B, heads, L] averaged over heads and scaled to [0, 1] per image: [B, L].

    - `per_head`: scale each head first, and not the average, as the released code does

    A constant map gives zeros, which `attention_mask` takes for equal weights (the released code: NaN).
    """
    return _scaled(attention).mean(dim=1) if per_head else _scaled(attention.mean(dim=1))


def _scaled(values: Tensor) -> Tensor:
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)


# ------------------------------------------------------------------------------------------------------ a run's maps
class RunMaps:
    """The maps of a run: when they are refreshed, where they lie, and what a batch gets of them.

    - `folder`: OUT/maps; `kind`: one of KINDS; `info`: of the training set; `grid`: (R, C) of the stored maps
    - `every`: epochs between two refreshes; `first`: epoch of the first (0 = `every`)
    - `crop`, `patch_size`: as in `crop_maps`
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        info: DatasetInfo,
        grid: tuple[int, int],
        every: int,
        *,
        first: int = 0,
        crop: str = "image",
        patch_size: int = 16,
    ) -> None:
        self.folder, self.grid, self.every, self.first = folder, grid, every, first or every
        self.crop, self.patch_size = crop, patch_size
        self._header = MapHeader(kind, info.num_samples, grid, data_identity(info), 0)
        self.store: MapStore | None = None

    def path(self, epoch: int) -> Path:
        """The file of the refresh before `epoch`."""
        return self.folder / f"{self._header.kind}-{epoch:08d}.maps"

    def due(self, epoch: int) -> bool:
        """Whether maps are refreshed before the first update of `epoch`."""
        return epoch >= self.first and (epoch - self.first) % self.every == 0

    def due_at(self, update: int, epoch_length: int) -> bool:
        """Whether they are refreshed before this update."""
        return update % epoch_length == 0 and self.due(update // epoch_length)

    def refreshed_at(self, epoch: int) -> int | None:
        """The refresh whose maps `epoch` uses, None before the first."""
        return None if epoch < self.first else epoch - (epoch - self.first) % self.every

    def open(self, epoch: int) -> None:
        """Continue in the midst of `epoch`, with the maps that it had. **Raises:** `UserError` without them."""
        source = self.refreshed_at(epoch)
        self.store = None if source is None else self._opened(source)

    def _opened(self, epoch: int) -> MapStore:
        store = MapStore(self.path(epoch))
        store.check(dataclasses.replace(self._header, epoch=epoch))
        return store

    def refresh(
        self,
        epoch: int,
        loader: Loader,
        compute: Callable[[Tensor], Tensor],
        launch: engine.Launch,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the maps of all samples anew and use them from now on. Collective.

        - `loader`: this rank's share of the un-cropped samples (`build_loader(…, train=False, whole=True)`); closed
        - `compute`: uint8 images [B, H, W, C] on the device -> maps [B, L]
        - `alive`: called after every batch

        Samples that do not decode keep zeros. **Raises:** `UserError` on all ranks if the maps cannot be written; the
        maps before stay.
        """
        header = dataclasses.replace(self._header, epoch=epoch)
        aside = self.folder / f".writing-{self.path(epoch).name}"
        with engine.in_agreement(), _as_user_error(aside):
            if launch.rank == 0:
                _reserve(aside, header)
        problem: OSError | None = None
        try:
            problem = self._write(aside, header, loader, compute, launch, alive)
        finally:
            loader.close()
        with engine.in_agreement(), _as_user_error(aside):
            if problem:
                raise problem
        with engine.in_agreement(), _as_user_error(aside):
            if launch.rank == 0:
                aside.replace(self.path(epoch))
        with engine.in_agreement():
            self.store = self._opened(epoch)

    def _write(
        self,
        aside: Path,
        header: MapHeader,
        loader: Loader,
        compute: Callable[[Tensor], Tensor],
        launch: engine.Launch,
        alive: Callable[[], None],
    ) -> OSError | None:
        """This rank's rows. A disk's error is returned at the end: the forward passes may be collective (ZeRO 3)."""
        problem = None
        bar = tqdm(loader, desc=f"{header.kind} maps", unit="batch", disable=launch.rank != 0, leave=False)
        with _open_file(aside) as file:
            for batch in bar:
                with torch.no_grad():
                    maps = compute(batch.images.to(launch.device)).float().cpu().numpy()
                own = ~batch.replaced.numpy()  # what stands in for a bad sample has its own turn
                try:
                    write_rows(file, header, batch.ids.numpy()[own], maps[own])
                except OSError as error:
                    problem = problem or error
                alive()
            try:
                os.fsync(file)
            except OSError as error:
                problem = problem or error
        return problem

    def prune(self, oldest_epoch: int) -> None:
        """Delete stores that no checkpoint needs (one rank calls this).

        - `oldest_epoch`: of the oldest checkpoint that is kept
        """
        needed = self.refreshed_at(oldest_epoch)
        for path in self.folder.glob(".writing-*"):  # of a run that was killed
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f"{self._header.kind}-*.maps"):
            if needed is not None and path.name < self.path(needed).name:
                path.unlink(missing_ok=True)

    def weights(self, batch: Batch) -> Tensor | None:
        """The maps of a batch, cropped with its images: float32 [B, L] on its device; None before the first refresh.

        `batch` comes from `with_maps`.
        """
        if self.store is None:
            return None
        return crop_maps(batch.maps, batch.crops, batch.sizes, self.grid, crop=self.crop, patch_size=self.patch_size)


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise UserError(
            f"maps {path} cannot be written ({error.strerror}); make room in the output_dir and start again to resume"
        ) from error


@contextmanager
def _open_file(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR)
    try:
        yield file
    finally:
        os.close(file)


def _reserve(path: Path, header: MapHeader) -> None:
    """A file of zeros of the full size, the disk's space included where the system can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = HEADER_BYTES + header.num_samples * header.row_bytes
    with path.open("wb") as file:
        file.write(header.to_bytes())
        file.truncate(size)
        with suppress(AttributeError):
            os.posix_fallocate(file.fileno(), 0, size)


def for_recipe(recipe: Recipe, info: DatasetInfo) -> RunMaps | None:
    """The maps of a run, if its masks need any: attention, or from the second epoch on the teacher's difficulty."""
    if not recipe.uses_maps:
        return None
    return RunMaps(
        Path(recipe.output_dir) / "maps",
        "difficulty" if recipe.teacher_maps else "attention",
        info,
        recipe.grid_size,
        recipe.map_refresh_epochs,
        first=int(recipe.teacher_maps),
        crop=recipe.map_crop,
        patch_size=recipe.patch_size,
    )


class MapLoader:
    """A `Loader` whose batches carry the maps that a run has at the time; put it before `on_device`."""

    def __init__(self, loader: Loader, maps: RunMaps) -> None:
        self.info, self.batch_size = loader.info, loader.batch_size
        self._loader, self._maps = loader, maps

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._with_maps, self._loader)

    def _with_maps(self, batch: Batch) -> Batch:
        if self._maps.store is None:
            return batch
        maps = self._maps.store.read(batch.ids)
        return dataclasses.replace(batch, maps=maps.pin_memory() if torch.cuda.is_available() else maps)

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)

    def bad_samples(self) -> list[BadSample]:
        return self._loader.bad_samples()

    def close(self) -> None:
        self._loader.close()


def with_maps(loader: Loader, maps: RunMaps | None) -> Loader:
    """`loader`, its batches with the maps of `maps` if there are any."""
    return loader if maps is None else MapLoader(loader, maps)
