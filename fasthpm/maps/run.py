"""Per-sample maps: attention or difficulty of every patch of the un-cropped image, kept in a file, cropped with it.

A run that uses maps (AMT; an amortised teacher) refreshes them every K epochs in a pass of its own over all samples:

    OUT/maps/KIND-00000040.maps     float16 [N, rows, columns], as they were made before the first update of epoch 40

One file per refresh, written aside by all ranks and renamed, so that a run resumed from any kept checkpoint finds the
maps that it had. Letters: N samples, B batch, R x C cells of a stored map, r x c patches of a training crop.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fasthpm import ranks
from fasthpm.data import Batch, DatasetInfo, Loader
from fasthpm.data.bad import BadSample
from fasthpm.files import ASIDE, aside_of
from fasthpm.maps.crop import crop_maps
from fasthpm.maps.store import MapHeader, MapStore, data_identity, naming_the_disk, open_file, reserve, write_rows
from fasthpm.recipe import Recipe


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
        """Continue in the middle of `epoch`, with the maps that it had. **Raises:** `UserError` without them."""
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
        launch: ranks.Launch,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute the maps of all samples again and use them from now on. Collective.

        - `loader`: this rank's share of the un-cropped samples (`build_loader(…, train=False, whole=True)`); closed
        - `compute`: uint8 images [B, H, W, C] on the device -> maps [B, L]
        - `alive`: called after every batch

        Samples that do not decode keep zeros. **Raises:** `UserError` on all ranks if the maps cannot be written; the
        maps before stay.
        """
        header = dataclasses.replace(self._header, epoch=epoch)
        aside = aside_of(self.path(epoch))
        with ranks.in_agreement(), naming_the_disk(aside):
            if launch.rank == 0:
                reserve(aside, header)
        problem: OSError | None = None
        try:
            problem = self._write(aside, header, loader, compute, launch, alive)
        finally:
            loader.close()
        with ranks.in_agreement(), naming_the_disk(aside):
            if problem:
                raise problem
        with ranks.in_agreement(), naming_the_disk(aside):
            if launch.rank == 0:
                aside.replace(self.path(epoch))
        with ranks.in_agreement():
            self.store = self._opened(epoch)

    def _write(
        self,
        aside: Path,
        header: MapHeader,
        loader: Loader,
        compute: Callable[[Tensor], Tensor],
        launch: ranks.Launch,
        alive: Callable[[], None],
    ) -> OSError | None:
        """This rank's rows. A disk's error is returned at the end: the forward passes may be collective (ZeRO 3)."""
        problem = None
        bar = tqdm(loader, desc=f"{header.kind} maps", unit="batch", disable=launch.rank != 0, leave=False)
        with open_file(aside) as file:
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
        for path in self.folder.glob(f"{ASIDE}*"):  # of a run that was killed
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f"{self._header.kind}-*.maps"):
            if needed is not None and path.name < self.path(needed).name:
                path.unlink(missing_ok=True)

    def scores(self, batch: Batch) -> Tensor | None:
        """The maps of a batch, cropped with its images: float32 [B, L] on its device; None before the first refresh.

        `batch` comes from `with_maps`.
        """
        if self.store is None:
            return None
        return crop_maps(batch.maps, batch.crops, batch.sizes, self.grid, crop=self.crop, patch_size=self.patch_size)


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
        self.info, self.source, self.batch_size = loader.info, loader.source, loader.batch_size
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
