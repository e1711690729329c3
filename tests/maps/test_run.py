"""Maps of samples as one file, and the runs that write and read it again."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import recipes
from fasthpm.data import DatasetInfo, build_loader
from fasthpm.data.types import Batch
from fasthpm.errors import UserError
from fasthpm.maps import run as maps_run
from fasthpm.maps import store
from fasthpm.ranks.launch import Launch

LAUNCH = Launch(0, 0, 1, 1, torch.device("cpu"))
INFO = DatasetInfo(40, 1, (0.3,), (0.2,), ("a",))


def brightness(images: Tensor) -> Tensor:
    """A map that can be checked: mean of each 4-pixel patch."""
    return images.float().reshape(len(images), 7, 4, 7, 4, 1).mean((2, 4, 5)).flatten(1)


def whole_images(count: int = 40, batch_size: int = 7, rank: int = 0, world_size: int = 1) -> Any:
    return build_loader(
        f"synthetic:{count}",
        batch_size=batch_size,
        image_size=(28, 28),
        channels=1,
        train=False,
        whole=True,
        rank=rank,
        world_size=world_size,
        num_workers=1,
    )


def refreshed(folder: Path, epoch: int = 2, compute: Callable[[Tensor], Tensor] = brightness) -> maps_run.RunMaps:
    """Maps of 40 synthetic images, refreshed before `epoch`."""
    run = maps_run.RunMaps(folder, "attention", INFO, (7, 7), 2, patch_size=4)
    run.refresh(epoch, whole_images(), compute, LAUNCH)
    return run


def test_a_store_holds_every_samples_map(tmp_path: Path) -> None:
    run = refreshed(tmp_path)
    assert run.store is not None
    images = torch.cat([batch.images for batch in whole_images(batch_size=40)])
    want = brightness(images).half().reshape(40, 7, 7)
    ids = torch.tensor([39, 0, 17, 17])
    assert torch.equal(run.store.read(ids), want[ids])
    assert [path.name for path in tmp_path.iterdir()] == ["attention-00000002.maps"]
    size = (tmp_path / "attention-00000002.maps").stat().st_size
    assert size == 4096 + 40 * 49 * 2


def test_ranks_write_disjoint_rows_of_one_file(tmp_path: Path) -> None:
    header = store.MapHeader("attention", 40, (7, 7), "x", 0)
    store.reserve(tmp_path / "a", header)
    for rank in (1, 0):
        with store.open_file(tmp_path / "a") as file:
            for batch in whole_images(batch_size=8, rank=rank, world_size=2):
                store.write_rows(file, header, batch.ids.numpy(), brightness(batch.images).numpy())
    images = torch.cat([batch.images for batch in whole_images(batch_size=40)])
    got = store.MapStore(tmp_path / "a").read(torch.arange(40))
    assert torch.equal(got, brightness(images).half().reshape(40, 7, 7))


def test_batches_carry_the_maps_of_their_samples(tmp_path: Path) -> None:
    run = refreshed(tmp_path)
    loader = maps_run.with_maps(
        build_loader("synthetic:40", batch_size=8, image_size=(28, 28), channels=1, num_workers=1, crop_min=0.9), run
    )
    batch = next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batch": 1}
    assert run.store is not None
    assert torch.equal(batch.maps, run.store.read(batch.ids))
    weights = run.scores(batch)
    assert weights is not None
    assert weights.shape == (8, 49)
    seen = torch.corrcoef(torch.stack([weights.flatten(), brightness(batch.images).flatten()]))[0, 1]
    assert seen > 0.9  # the map of the crop, hardly another than the map made of it
    shuffled = dataclasses.replace(batch, maps=batch.maps.roll(1, 0))
    other = run.scores(shuffled)
    assert other is not None
    assert torch.corrcoef(torch.stack([other.flatten(), brightness(batch.images).flatten()]))[0, 1] < 0.8
    loader.close()


def test_a_failed_refresh_leaves_the_maps_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = refreshed(tmp_path)
    calls = []

    def full(file: int, data: bytes, offset: int) -> None:
        calls.append(offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_all", full)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\); make room"):
        run.refresh(4, whole_images(), brightness, LAUNCH)
    assert len(calls) == 6  # every batch went through the model, as ZeRO 3 needs it
    assert [path.name for path in tmp_path.iterdir()] == ["attention-00000002.maps"]
    assert run.store is not None
    assert run.store.header.epoch == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": dataclasses.replace(INFO, num_samples=41)}, "another samples: 40, and this run has 41"),
        ({"info": dataclasses.replace(INFO, mean=(0.31,))}, "of another data set"),
        ({"info": dataclasses.replace(INFO, classes=("b",))}, "of another data set"),
        ({"grid": (7, 8)}, "another grid of patches"),
    ],
)
def test_stores_of_other_data_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refreshed(tmp_path)
    arguments = {"kind": "attention", "info": INFO, "grid": (7, 7), "every": 2, **change}
    with pytest.raises(UserError, match=message):
        maps_run.RunMaps(tmp_path, **arguments).open(3)


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    run = refreshed(tmp_path)
    path = run.path(2)
    whole = path.read_bytes()
    for content, message in ((whole[:-2], "truncated"), (b"x" * 9000, "no map store"), (whole[:20], "no map store")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            run.open(3)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\); put it back"):
        run.open(3)
    run.open(1)  # before the first refresh there is nothing to read
    assert run.store is None


def test_stores_are_kept_as_long_as_a_checkpoint_needs_them(tmp_path: Path) -> None:
    run = maps_run.RunMaps(tmp_path, "difficulty", INFO, (7, 7), 3, first=1)
    assert [epoch for epoch in range(9) if run.due(epoch)] == [1, 4, 7]
    assert [run.refreshed_at(epoch) for epoch in range(6)] == [None, 1, 1, 1, 4, 4]
    for epoch in (1, 4, 7):
        run.path(epoch).touch()
    run.prune(0)
    assert len(list(tmp_path.iterdir())) == 3
    run.prune(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["difficulty-00000004.maps", "difficulty-00000007.maps"]


def test_a_bad_samples_stand_in_writes_nothing(tmp_path: Path) -> None:
    class Replaced:
        """Batches in which sample 3 stands in for sample 30, brighter than in its own turn."""

        info = INFO

        def __iter__(self) -> Any:
            for batch in whole_images():
                bad = batch.ids == 30
                images = torch.where(bad[:, None, None, None], 200, 100).expand_as(batch.images)
                yield Batch(images, batch.labels, torch.where(bad, 3, batch.ids), batch.crops, batch.sizes, bad)

        def close(self) -> None:
            pass

    run = maps_run.RunMaps(tmp_path, "attention", INFO, (7, 7), 2)
    run.refresh(2, Replaced(), brightness, LAUNCH)  # type: ignore[arg-type]
    assert run.store is not None
    rows = run.store.read(torch.arange(40)).flatten(1)
    assert rows[30].tolist() == [0.0] * 49
    assert (rows[torch.arange(40) != 30] == 100).all()


def test_a_store_under_another_name_is_refused(tmp_path: Path) -> None:
    """A copied file must not pass for maps of another kind, or of another epoch."""
    whole = refreshed(tmp_path).path(2).read_bytes()
    for kind, epoch, message in (
        ("difficulty", 2, "another kind of map: attention, and this run has difficulty"),
        ("attention", 4, "another epoch: 2, and this run has 4"),
    ):
        run = maps_run.RunMaps(tmp_path, kind, INFO, (7, 7), 2)
        run.path(epoch).write_bytes(whole)
        with pytest.raises(UserError, match=message):
            run.open(epoch)


def test_every_refresh_is_used_from_then_on(tmp_path: Path) -> None:
    run, ids = refreshed(tmp_path), torch.arange(40)
    assert run.store is not None
    before = run.store.read(ids)
    run.refresh(4, whole_images(), lambda images: brightness(images) / 2, LAUNCH)
    assert run.store.header.epoch == 4
    torch.testing.assert_close(run.store.read(ids), before / 2)


def test_maps_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, seen = tmp_path / "attention-00000002.maps", []
    monkeypatch.setattr(maps_run.os, "fsync", lambda file: seen.append(final.exists()))
    refreshed(tmp_path)
    assert final.exists()
    assert seen == [False]


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pwrite = refreshed(tmp_path / "a").path(2).read_bytes(), os.pwrite
    monkeypatch.setattr(store.os, "pwrite", lambda file, data, offset: pwrite(file, data[:37], offset))
    assert refreshed(tmp_path / "b").path(2).read_bytes() == whole


def test_what_a_killed_refresh_left_goes(tmp_path: Path) -> None:
    run = refreshed(tmp_path)
    (tmp_path / ".writing-attention-00000004.maps").touch()
    run.prune(2)
    assert [path.name for path in tmp_path.iterdir()] == ["attention-00000002.maps"]


def test_a_recipe_says_which_maps_when(tmp_path: Path) -> None:
    attention: dict[str, Any] = {"mask_policy": "attention", "mask_ratio": 0.45, "predict_loss": "none"}
    for changes, kind, epochs in (
        ({**attention, "map_refresh_epochs": 3}, "attention", [3, 6]),
        ({"teacher_maps": True, "map_refresh_epochs": 3}, "difficulty", [1, 4, 7]),
    ):
        recipe = dataclasses.replace(recipes.debug(), output_dir=str(tmp_path), **changes)
        run = maps_run.for_recipe(recipe, INFO)
        assert run is not None
        assert run.path(3) == tmp_path / "maps" / f"{kind}-00000003.maps"
        assert [epoch for epoch in range(9) if run.due(epoch)] == epochs
        assert [update for update in range(45) if run.due_at(update, 5)] == [5 * epoch for epoch in epochs]
    assert maps_run.for_recipe(recipes.debug(), INFO) is None


def test_maps_of_before_stay_until_the_new_ones_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was resumed at a refresh makes the same file again."""
    run = refreshed(tmp_path)
    whole = run.path(2).read_bytes()

    def failing(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(UserError, match="No space left on device"):
        run.refresh(2, whole_images(), lambda images: 0 * brightness(images), LAUNCH)
    assert [path.name for path in tmp_path.iterdir()] == ["attention-00000002.maps"]
    assert run.path(2).read_bytes() == whole
