"""Several views of one image, by every loader of images: against crops drawn and rendered one by one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.data import build_loader
from fasthpm.data.ffcv.beton import JPEG, open_beton
from fasthpm.data.options import LoaderOptions
from fasthpm.data.pixels import luminance, render
from fasthpm.data.sampling import random_crops
from fasthpm.data.video.sampling import REPEATS
from fasthpm.data.views import global_crops
from fasthpm.errors import UserError
from tests.helpers.loaders import SIZE, N, break_sample

IMAGES = ("ffcv", "shards", "plain", "synthetic")
FIELDS = ("images", "labels", "ids", "crops", "sizes", "replaced", "local")
VIEWS: dict[str, Any] = {
    "views": (2, 1),
    "local_crops": 3,
    "local_size": 8,
    "crop_min": 0.3,
    "local_crop_min": 0.05,
    "local_crop_max": 0.3,
}


@pytest.fixture
def build(sources: dict[str, str]) -> Iterator[Callable[..., Any]]:
    loaders = []

    def made(kind: str, **options: Any) -> Any:
        values = {"batch_size": 4, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2} | VIEWS
        loaders.append(build_loader(sources[kind], **values | options))
        return loaders[-1]

    yield made
    for loader in loaders:
        loader.close()


def alike(a: Any, b: Any) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def plainly(loader: Any, epoch: int, sample: int, view: int) -> np.ndarray:
    """One view of a sample: drawn, cut and resized by itself."""
    options, whole, small = loader.options, loader.stored(sample), view >= 2
    scale = (options.local_crop_min, options.local_crop_max) if small else (options.crop_min, options.crop_max)
    drawn = epoch + (view << REPEATS)
    sizes = np.array([whole.shape[:2]])
    crop = random_crops(options.seed, drawn, np.array([sample]), sizes, scale[0], True, scale[1])[0]
    size = (options.local_size,) * 2 if small else options.image_size
    return render(whole, crop, size, "bicubic", np.ones(3, np.float32))


@pytest.mark.parametrize(("kind", "small"), [*((kind, 3) for kind in IMAGES), ("ffcv", 6)])
def test_each_view_is_the_crop_that_its_key_draws(build: Callable[..., Any], kind: str, small: int) -> None:
    loader = build(kind, local_crops=small)
    batch = next(iter(loader))
    assert batch.images.shape == (8, *SIZE, 3)
    assert batch.local.shape == (4 * small, 8, 8, 3)
    assert batch.ids.tolist() == np.repeat(batch.ids[::2], 2).tolist()
    for place, sample in enumerate(batch.ids[::2].tolist()):
        rows = [*batch.images[2 * place : 2 * place + 2], *batch.local[small * place : small * place + small]]
        for view, row in enumerate(rows):
            difference = row.numpy().astype(int) - plainly(loader, 0, sample, view)
            assert abs(difference).max() <= 2, (sample, view)
    loader.close()


@pytest.mark.parametrize("kind", IMAGES)
def test_views_differ_and_the_first_is_the_only_crop_of_a_loader_with_one_view(
    build: Callable[..., Any], kind: str
) -> None:
    several, alone = next(iter(build(kind))), next(iter(build(kind, views=(1, 1), local_crops=0)))
    assert torch.equal(several.crops[::2], alone.crops)
    assert not torch.equal(several.crops[1::2], alone.crops)
    assert alone.local.numel() == 0
    assert (several.images[::2].int() - alone.images.int()).abs().max() <= 2


@pytest.mark.parametrize("kind", ["ffcv", "synthetic"])
def test_ranks_threads_and_resuming_change_nothing(build: Callable[..., Any], kind: str) -> None:
    whole = list(build(kind, batch_size=6))
    ranks = [list(build(kind, batch_size=3, rank=rank, world_size=2, num_workers=1)) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for field in ("images", "ids", "local"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(part, field) for part in parts]))
    later = build(kind, batch_size=6)
    later.load_state_dict({"epoch": 0, "batch": 2})
    assert alike(next(iter(later)), whole[2])


def test_grey_views_are_the_luminance_of_coloured_ones(build: Callable[..., Any]) -> None:
    coloured, grey = next(iter(build("ffcv", local_crops=6))), next(iter(build("ffcv", local_crops=6, channels=1)))
    assert grey.local.shape == (24, 8, 8, 1)
    wanted = torch.from_numpy(luminance(coloured.local.numpy()))
    assert (grey.local.int() - wanted.int()).abs().max() <= 2


@pytest.mark.parametrize("small", [3, 6])
def test_a_sample_that_does_not_decode_is_replaced_in_all_views(beton: Path, small: int) -> None:
    broken = int((open_beton(beton).modes == JPEG).nonzero()[0][0])
    break_sample(beton, broken, keep=40)
    several = VIEWS | {"local_crops": small}
    loader = build_loader(beton, batch_size=N, image_size=SIZE, channels=3, seed=1, num_workers=1, **several)
    batch = next(iter(loader))
    assert broken not in batch.ids.tolist()
    assert batch.replaced.sum() == 2
    place = int(batch.replaced[::2].nonzero())
    sample = int(batch.ids[2 * place])
    assert int(batch.ids[2 * place + 1]) == sample
    mine = slice(small * place, small * place + small)
    for view, row in enumerate([*batch.images[2 * place : 2 * place + 2], *batch.local[mine]]):
        assert abs(row.numpy().astype(int) - plainly(loader, 0, sample, view)).max() <= 2
    assert [bad.sample for bad in loader.bad_samples()] == [broken]
    loader.close()


def test_colours_of_every_view_are_drawn_by_themselves(build: Callable[..., Any]) -> None:
    plain, coloured = next(iter(build("ffcv"))), next(iter(build("ffcv", color_jitter=0.4)))
    assert torch.equal(plain.crops, coloured.crops)
    change = (coloured.images.float().mean((1, 2, 3)) / plain.images.float().mean((1, 2, 3))).reshape(-1, 2)
    assert (change[:, 0] - change[:, 1]).abs().max() > 0.02


def test_small_shares_that_are_enlarged_a_lot_are_told_once(
    build: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasthpm.errors._noted", set())
    list(build("synthetic", local_size=32))
    assert capsys.readouterr().err.count("are enlarged more than 2 times to 32 px") == 1
    list(build("synthetic", local_size=4))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_min": 0.5, "crop_max": 0.4}, "crop_max is 0.4, expected crop_min 0.5 or more"),
        ({"local_crop_min": 0.5, "local_crop_max": 0.4}, "local_crop_max is 0.4, expected local_crop_min 0.5"),
        ({"local_crops": 2, "train": False}, "local_crops is 2, expected 0 in evaluation"),
        ({"local_crops": 2, "num_frames": 4}, "local_crops is 2, expected 0 in evaluation, and of clips"),
    ],
)
def test_views_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoaderOptions(batch_size=2, image_size=(8, 8), channels=3, **options)


def test_global_crops_stay_within_their_shares() -> None:
    options = LoaderOptions(batch_size=2, image_size=(8, 8), channels=3, crop_min=0.2, crop_max=0.5, views=(2, 1))
    ids = np.arange(400)
    crops = global_crops(options, 3, ids, np.full((400, 2), 100))
    share = crops[..., 2] * crops[..., 3] / 100**2
    assert 0.18 < share.min() < 0.25
    assert 0.45 < share.max() < 0.52
    assert crops.shape == (400, 2, 5)
