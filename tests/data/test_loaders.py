"""The contract of every loader (see `fasthpm.data.Loader`), and what is particular to each."""

import gc
import io
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fasthpm.data import Batch, base, build_loader, read_info, synthetic
from fasthpm.data import bad as quarantine
from fasthpm.data.device import DeviceLoader, on_device
from fasthpm.data.ffcv import images as ffcv_images
from fasthpm.data.ffcv.beton import ALLOCATION, JPEG, open_beton
from fasthpm.data.ffcv.prepared import merged_ranges, open_set
from fasthpm.data.options import count_workers
from fasthpm.data.pixels import jitter_colours, render
from fasthpm.data.sampling import (
    area_resize,
    block_order,
    centre_crops,
    colour_factors,
    mix,
    random_crops,
    replacements,
    sample_order,
)
from fasthpm.data.sources import split_sources
from fasthpm.data.video import clips
from fasthpm.data.video.prepared import open_videos
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, list_sources, picture, prepare, prepare_shards
from tests.helpers.video_fixtures import prepare_videos, video_folder

N, SIZE = 23, (16, 24)
# ahead: ffcv with the look-ahead that GPUs get; clips and dali: a video set through libturbojpeg and through DALI
KINDS = ("ffcv", "shards", "plain", "synthetic", "ahead", "clips", "dali")
OF_KIND = {"clips": {"num_frames": 3, "sampling_rate": 2}}
OF_KIND["dali"] = OF_KIND["clips"] | {"decoder": "dali"}
FIELDS = ("images", "labels", "ids", "crops", "sizes", "replaced")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The kinds of source, N samples each; the file sets have two image sizes."""
    root = tmp_path_factory.mktemp("sources")
    folder = image_folder(root / "folder", N, sizes=((40, 48), (33, 20)))
    beton = prepare(folder, root / "set.beton", "--write_mode", "proportion", "--jpeg_quality", "100")
    shards = prepare_shards(folder, root / "many.beton", 3, "--write_mode", "proportion", "--jpeg_quality", "100")
    videos = prepare_videos(video_folder(root / "videos", N), root / "clips")
    return {
        "ffcv": str(beton),
        "ahead": str(beton),
        "clips": str(videos),
        "dali": str(videos),
        "shards": str(shards),
        "plain": str(folder),
        "synthetic": f"synthetic:{N}",
    }


@pytest.fixture(params=KINDS)
def make(request, sources):
    """Builds loaders of one kind and closes them afterwards."""
    loaders = []

    def build(**options):
        values = {"batch_size": 4, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2}
        loader = build_loader(sources[request.param], **values | OF_KIND.get(request.param, {}) | options)
        loaders.append(DeviceLoader(loader, torch.device("cpu")) if request.param == "ahead" else loader)
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def innermost(loader):
    return getattr(loader, "_loader", loader)


def frames(loader) -> tuple[int, ...]:
    """What the shape of a batch has between B and the image's."""
    return innermost(loader).options.sample_shape[:-3]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS))


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fasthpm")]


# ------------------------------------------------------------------------------------------------------- contract
def test_batches_have_the_promised_form(make):
    loader = make()
    batches = list(loader)
    assert len(batches) == len(loader) == N // 4
    assert loader.info.num_samples == N
    assert loader.batch_size == 4
    for batch in batches:
        assert batch.images.shape == (4, *frames(loader), *SIZE, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.crops.shape == (4, 5)
        assert batch.sizes.shape == (4, 2)
        assert batch.labels.shape == batch.ids.shape == (4,)
        assert all(getattr(batch, field).dtype == torch.int64 for field in FIELDS[1:-1])
        assert batch.replaced.dtype == torch.bool
        assert not batch.replaced.any()
        top, left, height, width, flipped = batch.crops.T
        assert min(top.min(), left.min()) >= 0
        assert min(height.min(), width.min()) > 0
        assert (top + height <= batch.sizes[:, 0]).all()
        assert (left + width <= batch.sizes[:, 1]).all()
        assert set(flipped.tolist()) <= {0, 1}


def test_every_batch_is_memory_of_its_own(make):
    loader = make()
    batches = list(loader)
    assert len({batch.images.untyped_storage().data_ptr() for batch in batches}) == len(batches)
    kept = [batch.images.clone() for batch in batches]
    list(loader)
    assert all(torch.equal(a, b.images) for a, b in zip(kept, batches, strict=True))


def test_an_epoch_gives_no_sample_twice_and_epochs_differ(make):
    loader = make()
    first, second = joined(list(loader)), joined(list(loader))
    for epoch in (first, second):
        assert len(set(epoch.ids.tolist())) == 4 * (N // 4)
    assert first.ids.tolist() != second.ids.tolist()
    assert first.crops.tolist() != second.crops.tolist()


def test_seed_and_epoch_decide_everything_for_any_number_of_threads(make):
    reference = list(make())
    assert all(same(a, b) for a, b in zip(reference, make(num_workers=1), strict=True))
    assert not all(same(a, b) for a, b in zip(reference, make(seed=6), strict=True))
    again = make()
    list(again)
    again.set_epoch(0)
    assert all(same(a, b) for a, b in zip(reference, again, strict=True))


@pytest.mark.parametrize("given", range(6))
def test_resume_continues_at_the_batch_that_was_not_given(make, given):
    whole = make()
    reference = [*whole, *whole]
    first = make()
    iterator = iter(first)
    for _ in range(given):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    assert state == ({"epoch": 0, "batch": given} if given < len(whole) else {"epoch": 1, "batch": 0})
    second = make()
    second.load_state_dict(state)
    rest = [*second, *second][: 2 * len(whole) - given]
    assert all(same(a, b) for a, b in zip(reference[given:], rest, strict=given > 0))


def test_a_loop_that_breaks_goes_on_where_it_was(make):
    reference = list(make())
    loader = make()
    for batch in loader:
        assert same(batch, reference[0])
        break
    assert same(next(iter(loader)), reference[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_global_batches(make, world_size):
    whole = list(make(batch_size=6))
    ranks = [list(make(batch_size=6 // world_size, rank=r, world_size=world_size)) for r in range(world_size)]
    for reference, *parts in zip(whole, *ranks, strict=True):
        assert same(reference, joined(parts))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_each_sample_once_in_order(make, world_size):
    ranks = [list(make(train=False, batch_size=5, rank=r, world_size=world_size)) for r in range(world_size)]
    lengths = {len(batches) for batches in ranks}
    assert lengths == {-(-N // (5 * world_size))}
    everything = joined([batch for step in zip(*ranks, strict=True) for batch in step])
    assert everything.ids.tolist() == list(range(N))
    assert not everything.crops[:, 4].any()
    if world_size == 3:
        assert [len(batches[-1].ids) for batches in ranks] == [5, 3, 0]
        assert ranks[2][-1].images.shape[0] == 0
        assert ranks[2][-1].images.shape[-3:] == (*SIZE, 3)
        assert ranks[2][-1].replaced.dtype == torch.bool


def test_labels_belong_to_their_images(make, sources):
    loader = make(train=False)
    found = joined(list(loader))
    assert len(loader.info.classes) > found.labels.max()
    if innermost(loader).source == sources["ffcv"]:
        assert np.array_equal(found.labels, open_beton(Path(sources["ffcv"])).labels)
    elif innermost(loader).source == sources["shards"]:
        shards = [open_beton(path).labels for path in sorted(Path(sources["shards"]).parent.glob("many-*.beton"))]
        assert np.array_equal(found.labels, np.concatenate(shards))
    elif innermost(loader).source == sources["clips"]:
        assert np.array_equal(found.labels, open_videos(Path(sources["clips"])).videos["label"])
    elif innermost(loader).source == sources["plain"]:
        assert found.labels.tolist() == sorted(index % 2 for index in range(N))
    else:
        assert found.labels.tolist() == [index % 10 for index in range(N)]


def test_no_thread_outlives_its_loader(make):
    before = our_threads()
    loader = make()
    for _ in loader:
        break
    assert not {"fasthpm-prefetch", "fasthpm-device"} & set(our_threads())
    iterator = iter(loader)
    next(iterator)
    loader.close()
    loader.close()
    assert our_threads() == before
    with pytest.raises(RuntimeError, match="ended"):
        next(iterator)
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)


def test_an_exception_in_the_loop_stops_the_thread(make):
    loader = make()

    def fails():
        for _ in loader:
            raise KeyError("of the consumer")

    with pytest.raises(KeyError):
        fails()
    loader.close()
    assert not our_threads()


def test_twenty_epochs_take_no_more_memory_than_a_few(make):
    """A batch has 0.5 MB, so keeping one in four would show. DALI's own pools grow for some ten epochs, then stay."""
    process, sizes = psutil.Process(), []
    children = process.children()
    loader = make(image_size=(200, 200))
    for epoch in range(33):
        for batch in loader:
            assert batch.images.shape[-3:-1] == (200, 200)
        if epoch in (12, 32):
            gc.collect()
            sizes.append(process.memory_info().rss)
    loader.close()
    assert sizes[1] - sizes[0] < 12e6
    assert not our_threads()
    assert process.children() == children


def test_moving_the_loader_ends_the_running_iteration(make):
    loader = make()
    iterator = iter(loader)
    next(iterator)
    loader.set_epoch(3)
    with pytest.raises(RuntimeError, match="ended"):
        next(iterator)
    assert loader.state_dict() == {"epoch": 3, "batch": 0}


def test_an_error_in_the_thread_reaches_the_consumer_once(make, monkeypatch):
    loader = make()
    monkeypatch.setattr(innermost(loader), "_sizes", lambda ids: (_ for _ in ()).throw(ValueError("broken disk")))
    iterator = iter(loader)
    with pytest.raises(ValueError, match="broken disk"):
        next(iterator)
    with pytest.raises(RuntimeError, match="ended"):
        next(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels is 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 24}, f"{N} samples, fewer than one global batch of 24"),
        ({"crop_min": 0.0}, "crop_min is 0.0"),
        ({"crop_pct": 1.5}, "crop_pct is 1.5"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"image_size": (0, 8)}, "image_size is"),
        ({"interpolation": "nearest"}, "interpolation is nearest, expected one of area, bicubic"),
        ({"color_jitter": 1.5}, "color_jitter is 1.5"),
        ({"sample_order": "sorted"}, "sample_order is sorted, expected one of random, blocks"),
        ({"max_bad_samples": -0.1}, "max_bad_samples is -0.1"),
    ],
)
def test_wrong_options_are_one_line(make, options, message):
    with pytest.raises(UserError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_positions_outside_the_set_are_refused(make):
    loader = make()
    with pytest.raises(UserError, match="batch 6 is outside"):
        loader.load_state_dict({"epoch": 0, "batch": 6})


# ------------------------------------------------------------------------------------------------------- pixels
@pytest.mark.parametrize("interpolation", ["area", "bicubic"])
def test_ffcv_pixels_agree_with_the_plain_truth(interpolation, tmp_path):
    """Raw sets, same boxes: one grey level at most, but for a few values where PIL rounds or clips between passes."""
    folder = image_folder(tmp_path / "folder", 12, sizes=((40, 48), (61, 37), (24, 24)))
    loader = build_loader(
        prepare(folder, tmp_path / "set.beton", "--write_mode", "raw"),
        batch_size=12,
        image_size=(24, 24),
        channels=3,
        num_workers=2,
        interpolation=interpolation,
    )
    stored = build_loader(folder, batch_size=1, image_size=(8, 8), channels=3, train=False)
    originals = {np.asarray(Image.open(path)).tobytes(): path for path in map(Path, stored._images.paths)}
    decoded = raw_images(Path(loader.source))
    assert {image.tobytes() for image in decoded} == set(originals)
    for epoch in range(6):
        loader.set_epoch(epoch)
        (batch,) = loader
        for row, index, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.numpy(), strict=True):
            truth = render(decoded[index], crop, (24, 24), interpolation, np.ones(3))
            difference = np.abs(row.astype(int) - truth)
            allowed = 0 if interpolation == "area" else 0.01
            assert (difference > 1).mean() <= allowed
            assert difference.max() <= (1 if interpolation == "area" else 12)
    loader.close()
    stored.close()


def raw_images(path: Path) -> list[np.ndarray]:
    """The stored pixels of a raw set, read through FFCV's own reader."""
    from ffcv.reader import Reader

    reader, data = Reader(str(path)), path.read_bytes()
    images = []
    for row in reader.metadata["f0"]:
        shape = (int(row["height"]), int(row["width"]), 3)
        start = int(row["data_ptr"])
        images.append(np.frombuffer(data, np.uint8, int(np.prod(shape)), start).reshape(shape))
    return images


def test_jpeg_pixels_agree_with_pil(tmp_path):
    folder = image_folder(tmp_path / "folder", 6)
    out = prepare(folder, tmp_path / "set.beton", "--write_mode", "jpg", "--jpeg_quality", "90")
    beton, data = open_beton(out), out.read_bytes()
    loader = build_loader(out, batch_size=6, image_size=(40, 48), channels=3, train=False)
    (batch,) = loader
    loader.close()
    for index in range(6):
        start, length = int(beton.positions[index]), int(beton.lengths[index])
        (tmp_path / "x.jpg").write_bytes(data[start : start + length])
        truth = np.asarray(Image.open(tmp_path / "x.jpg")).astype(int)
        # FFCV decodes with turbojpeg's fast DCT: 1.03 levels on average at quality 90 (1.6 at 95, 2.7 at 100).
        difference = np.abs(batch.images[index].numpy() - truth)
        assert difference.mean() < 1.25
        assert difference.max() <= 8


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_grey_sets_come_out_with_one_channel(tmp_path, kind):
    folder = image_folder(tmp_path / "folder", 4, grey=True)
    source = prepare(folder, tmp_path / "set.beton", "--write_mode", "raw") if kind == "ffcv" else folder
    info = read_info(source)
    assert info.channels == len(info.mean) == len(info.std) == 1
    loader = build_loader(source, batch_size=4, image_size=(40, 48), channels=1, train=False)
    (batch,) = loader
    loader.close()
    truth = sorted(np.asarray(picture(index, grey=True)).tobytes() for index in range(4))
    assert batch.images.shape == (4, 40, 48, 1)
    assert sorted(image.numpy().tobytes() for image in batch.images) == truth
    with pytest.raises(UserError, match="use --channels 1"):
        build_loader(source, batch_size=2, image_size=(8, 8), channels=3)


def test_evaluation_crop_is_whole_for_images_of_the_right_size(tmp_path):
    folder = image_folder(tmp_path / "folder", 3)
    for source in (str(folder), "synthetic:3", str(prepare(folder, tmp_path / "set.beton"))):
        options = {"batch_size": 3, "channels": 3, "train": False}
        loader = build_loader(source, image_size=(40, 48), **options)
        (batch,) = loader
        assert batch.crops.tolist() == [[0, 0, 40, 48, 0]] * 3
        loader.close()
        if not source.startswith("synthetic"):
            loader = build_loader(source, image_size=(16, 16), **options)
            (batch,) = loader
            assert batch.crops.tolist() == [[2, 6, 35, 35, 0]] * 3  # 0.875 of the largest square
            loader.close()


def test_plain_loader_sees_rotated_images_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(io.BytesIO(jpeg_bytes(picture(0))))
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(picture(0), exif=exif))
    loader = build_loader(tmp_path, batch_size=1, image_size=(48, 40), channels=3, train=False)
    (batch,) = loader
    loader.close()
    assert batch.sizes.tolist() == [[48, 40]]
    assert np.array_equal(batch.images[0], np.asarray(upright.transpose(Image.Transpose.ROTATE_270)))


# ------------------------------------------------------------------------------------------------------- one ahead
def test_the_next_batch_is_asked_for_while_the_consumer_works(sources):
    """Exactly one: the second batch is under way when the first is given, the third is not."""
    inner = build_loader(sources["ffcv"], batch_size=4, image_size=SIZE, channels=3)
    asked = [threading.Event() for _ in range(len(inner))]
    given = type(inner)._given

    def note(epoch, batch):
        given(inner, epoch, batch)
        asked[batch].set()

    inner._given = note
    loader = DeviceLoader(inner, torch.device("cpu"))
    iterator = iter(loader)
    next(iterator)
    assert asked[1].wait(10)
    assert not asked[2].wait(0.2)
    assert inner.state_dict() == {"epoch": 0, "batch": 2}
    assert loader.state_dict() == {"epoch": 0, "batch": 1}
    next(iterator)
    assert asked[2].wait(10)
    again = next(iter(loader))  # the third, though it was asked for before
    loader.close()
    assert same(again, list(build_loader(sources["ffcv"], batch_size=4, image_size=SIZE, channels=3))[2])


def test_an_error_ahead_comes_after_the_batch_before_it(sources, monkeypatch):
    inner = build_loader(sources["ffcv"], batch_size=4, image_size=SIZE, channels=3)
    make = inner._make
    monkeypatch.setattr(inner, "_make", lambda e, b: make(e, b) if b < 2 else (_ for _ in ()).throw(OSError("disk")))
    loader = DeviceLoader(inner, torch.device("cpu"))
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.state_dict() == {"epoch": 0, "batch": 2}
    with pytest.raises(OSError, match="disk"):
        next(iterator)
    loader.close()


def test_on_a_cpu_the_loader_is_left_as_it_is(make):
    loader = make()
    assert on_device(loader, torch.device("cpu")) is loader


# ------------------------------------------------------------------------------------------------------- many files
def test_shards_are_one_set_and_equal_to_their_union(sources):
    options = {"batch_size": 5, "image_size": SIZE, "channels": 3, "seed": 3}
    files = sorted(Path(sources["shards"]).parent.glob("many-*.beton"))
    assert len(files) == 3
    evaluated = joined(list(build_loader(sources["shards"], train=False, **options)))
    single = [joined(list(build_loader(file, train=False, **options))) for file in files]
    assert torch.equal(evaluated.images, torch.cat([batch.images for batch in single]))
    assert torch.equal(evaluated.labels, torch.cat([batch.labels for batch in single]))
    union = build_loader(",".join(map(str, files)), **options)
    assert all(same(a, b) for a, b in zip(build_loader(sources["shards"], **options), union, strict=True))


def test_mean_and_std_of_a_union_weigh_pixels(tmp_path):
    infos = {}
    for name, count, first in (("a", 4, 0), ("b", 2, 4), ("all", 6, 0)):
        folder = tmp_path / name
        for index in range(first, first + count):
            target = folder / ("ant", "bee")[index % 2]
            target.mkdir(parents=True, exist_ok=True)
            picture(index, (40, 48) if index < 4 else (20, 24)).save(target / f"{index}.png")
        infos[name] = read_info(prepare(folder, tmp_path / f"{name}.beton", "--write_mode", "raw"))
        pixels = {"a": 4 * 40 * 48, "b": 2 * 20 * 24, "all": 1}[name]
        sidecar = tmp_path / f"{name}.json"
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"pixels": pixels}))
    union = f"{tmp_path}/a.beton,{tmp_path}/b.beton"
    merged = read_info(union)
    assert merged.num_samples == 6
    assert merged.classes == ("ant", "bee")
    assert np.allclose(merged.mean, infos["all"].mean, atol=1e-6)
    assert np.allclose(merged.std, infos["all"].std, atol=1e-6)
    sidecar = tmp_path / "a.json"
    values = json.loads(sidecar.read_text())
    del values["pixels"]
    sidecar.write_text(json.dumps(values))
    by_samples = (4 * np.array(infos["a"].mean) + 2 * np.array(infos["b"].mean)) / 6
    assert np.allclose(read_info(union).mean, by_samples)
    assert not np.allclose(by_samples, merged.mean, atol=1e-4)


def test_bad_shards_and_unions_are_refused(tmp_path):
    out = prepare_shards(image_folder(tmp_path / "folder", 12), tmp_path / "set.beton", 2)
    first, second = sorted(tmp_path.glob("set-*.beton"))
    index, whole = out.with_suffix(".json"), second.read_bytes()
    good = json.loads(index.read_text())
    second.write_bytes(whole[:-1])
    refused(out, r"set-00001-of-00002\.beton has .* truncated")
    second.unlink()
    refused(out, r"set-00001-of-00002\.beton does not exist, but .*set\.json lists it")
    second.write_bytes(whole)
    for change, message in (
        ({"num_samples": 13}, "hold 12 samples, .*set.json says 13"),
        ({"classes": ["ant"]}, r"1 classes, .*set-00000-of-00002\.beton has 2"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "1 channels, .*has 3"),
        ({"shards": []}, "lists no shards"),
        ({"shards": [7]}, "lists no shards"),
        ({"shards": ["../set-00000-of-00002.beton"]}, r"lists '\.\./set-0.*', expected names of files beside it"),
        ({"shards": ["/etc/passwd"]}, "lists '/etc/passwd', expected names of files beside it"),
        ({"shards": None}, "no list named 'shards'"),
        ({"format": "something"}, r"set\.beton does not exist"),
    ):
        index.write_text(json.dumps(good | change))
        refused(out, message)
    index.write_text(json.dumps(good))
    grey = prepare(image_folder(tmp_path / "grey", 4, grey=True), tmp_path / "grey.beton")
    refused(f"{out},{grey}", r"set\.beton has 3 channels, .*grey\.beton has 1")
    refused(f"{out},", "joins '', which is no .beton")
    refused(f"{out},{tmp_path / 'folder'}", "only prepared sets can be joined")
    refused(f"{first},{tmp_path / 'no.beton'}", r"no\.beton does not exist")


def test_samples_are_named_by_the_file_they_were_made_of(tmp_path):
    out = prepare_shards(image_folder(tmp_path / "folder", 8), tmp_path / "set.beton", 2)
    second = tmp_path / "set-00001-of-00002.beton"
    list_sources(second, ["a.png", "with, comma\nand line.png", "b.png", "caf\udce9.png"])
    (tmp_path / "set-00000-of-00002.files.csv").unlink()  # as older sets, and those of others
    names = [open_set(out).name_of(sample) for sample in range(8)]
    assert names[3] == f"{tmp_path / 'set-00000-of-00002.beton'}: sample 3"
    assert names[4] == f"a.png ({second}, sample 0)"
    assert names[5].startswith("with, comma and line.png (")
    assert names[7].startswith("caf\\udce9.png (")


def test_ranges_to_read_are_merged_where_they_nearly_touch():
    begin, end = np.array([900, 0, 10**6, 10**6 + 5]), np.array([1000, 100, 10**6 + 9, 10**6 + 6])
    assert merged_ranges(begin, end) == [(0, 1000), (10**6, 10**6 + 9)]
    assert merged_ranges(begin[:0], end[:0]) == []


# ------------------------------------------------------------------------------------------------------- colours
def test_colour_factors_are_uniform_and_have_a_key_of_their_own():
    ids = np.arange(20000)
    factors = colour_factors(0, 0, ids, 0.4, 3)
    assert factors.dtype == np.float32
    assert 0.6 <= factors.min() < 0.601
    assert 1.399 < factors.max() <= 1.4
    assert np.abs(np.quantile(factors, [0.25, 0.5, 0.75], axis=0).T - [0.8, 1.0, 1.2]).max() < 0.01
    sizes = np.tile(np.array([[300, 400]]), (len(ids), 1))
    drawn = np.column_stack([factors, random_crops(0, 0, ids, sizes, 0.2, True)])
    assert np.abs(np.corrcoef(drawn.T)[:3, 3:]).max() < 0.03
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.03
    assert (colour_factors(0, 0, ids, 0.4, 1)[:, 2] == 1).all()
    assert not np.array_equal(factors, colour_factors(0, 1, ids, 0.4, 3))
    assert np.array_equal(factors[7:9], colour_factors(0, 0, ids[7:9], 0.4, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factors", [(1, 1, 1), (0.6, 1, 1), (1, 1.4, 1), (1, 1, 0.3), (1.3, 0.7, 1.25), (2, 0, 0)])
def test_colours_change_as_in_torchvision(channels, factors):
    from torchvision.transforms import functional as F

    image = np.random.default_rng(0).integers(0, 256, (19, 23, channels), dtype=np.uint8)
    truth = torch.from_numpy(image).permute(2, 0, 1)
    truth = F.adjust_contrast(F.adjust_brightness(truth, factors[0]), factors[1])
    if channels == 3:
        truth = F.adjust_saturation(truth, factors[2])
    ours = jitter_colours(image, np.array(factors, np.float32))
    assert np.abs(ours.astype(int) - truth.permute(1, 2, 0).numpy()).max() <= 1
    assert (ours != truth.permute(1, 2, 0).numpy()).mean() < 0.01


@pytest.mark.parametrize("kind", ["ffcv", "plain", "synthetic"])
def test_colours_vary_and_crops_do_not(sources, kind):
    options = {"batch_size": 23, "image_size": SIZE, "channels": 3, "seed": 4}
    (still,) = build_loader(sources[kind], **options)
    (vivid,) = build_loader(sources[kind], color_jitter=0.5, **options)
    assert torch.equal(still.crops, vivid.crops)
    assert not torch.equal(still.images, vivid.images)
    factors = colour_factors(4, 0, still.ids.numpy(), 0.5, 3)
    for before, after, change in zip(still.images.numpy(), vivid.images.numpy(), factors, strict=True):
        # The kernel rounds once at the end, the plain twin after each factor.
        difference = np.abs(after.astype(int) - jitter_colours(before, change))
        assert difference.max() <= (2 if kind == "ffcv" else 0)
    (plain,) = build_loader(sources[kind], color_jitter=0.5, train=False, **options)
    (same_plain,) = build_loader(sources[kind], train=False, **options)
    assert torch.equal(plain.images, same_plain.images)


@pytest.mark.parametrize(("kind", "channels"), [("plain", 3), ("synthetic", 3), ("synthetic", 1)])
def test_bicubic_is_pils_on_the_crop_alone(sources, kind, channels):
    options = {"batch_size": 23, "image_size": SIZE, "channels": channels, "seed": 4}
    loader = build_loader(sources[kind], interpolation="bicubic", **options)
    (batch,) = loader
    (area,) = build_loader(sources[kind], interpolation="area", **options)
    assert torch.equal(batch.crops, area.crops)
    assert not torch.equal(batch.images, area.images)
    for row, index, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.tolist(), strict=True):
        if kind == "plain":
            whole = Image.open(loader._images.paths[index])
        else:
            whole = Image.fromarray(np.squeeze(synthetic.draw(index, SIZE, channels)))
        top, left, height, width, flipped = crop
        truth = whole.crop((left, top, left + width, top + height)).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        truth = truth.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else truth
        assert np.array_equal(np.squeeze(row), np.asarray(truth))


# ------------------------------------------------------------------------------------------------------- block order
@pytest.mark.parametrize(("samples", "block", "window"), [(1000, 7, 5), (1000, 1, 10), (23, 64, 256), (1, 1, 1)])
def test_block_order_is_a_permutation_of_pools_of_blocks(samples, block, window):
    """Against its definition: every pool is a set of whole blocks."""
    order = block_order(3, 1, samples, block, window)
    assert sorted(order.tolist()) == list(range(samples))
    start, seen = 0, set()
    while start < samples:
        blocks = set()
        pool = []
        while start < samples and (len(blocks) < window or order[start] // block in blocks):
            blocks.add(int(order[start]) // block)
            pool.append(int(order[start]))
            start += 1
        whole = [index for name in blocks for index in range(name * block, min((name + 1) * block, samples))]
        assert sorted(pool) == sorted(whole)
        assert not blocks & seen
        seen |= blocks
    assert order.tolist() != block_order(3, 2, samples, block, window).tolist() or samples == 1
    assert order.tolist() == block_order(3, 1, samples, block, window).tolist()


def test_block_order_mixes_well_within_its_bounds():
    samples, block, window = 100_000, 50, 100
    order = block_order(0, 0, samples, block, window)
    pools = order.reshape(-1, block * window)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001  # a random order has 2 / samples, blocks read through 0.98
    neighbours = (np.diff(order // block) == 0).mean()
    assert abs(neighbours - 1 / window) < 0.003  # as likely of the same block as any two of a pool
    batches = pools[:, :250] // block
    assert min(len(set(batch.tolist())) for batch in batches) > 80  # of 91 +- 4 blocks that 250 of a pool come from
    next_epoch = block_order(0, 1, samples, block, window).reshape(pools.shape)
    shared = np.intersect1d(pools[0], next_epoch[0]).size / pools[0].size
    assert shared < 0.2  # pools are new every epoch: 0.05 expected
    middle = pools.mean(1) / samples
    assert np.abs(middle - 0.5).max() < 0.15  # each pool comes from all over the set


def keep_videos_together(make, monkeypatch, count):
    """Let blocks of videos hold `count` of them."""
    loader = innermost(make())
    if isinstance(loader, clips.ClipLoader):
        monkeypatch.setattr(clips, "BLOCK_BYTES", -(-count * len(loader.data.frames) // N))


def test_blocks_are_cut_by_global_batch_and_resume(make, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_SAMPLES", 3)
    monkeypatch.setattr(base, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(ffcv_images, "BLOCK_BYTES", 3 * 4000)
    keep_videos_together(make, monkeypatch, 3)
    options = {"sample_order": "blocks", "batch_size": 6}
    loader = make(**options)
    whole = list(loader)
    block = innermost(loader)._samples_per_block()
    assert 2 <= block <= 5
    order = block_order(5, 0, N, block, 2)
    assert joined(whole).ids.tolist() == order[:18].tolist()
    assert not np.array_equal(order, sample_order(5, 0, N))
    for world_size in (2, 3):
        ranks = [
            list(make(**options | {"batch_size": 6 // world_size}, rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        for reference, *parts in zip(whole, *ranks, strict=True):
            assert same(reference, joined(parts))
    resumed = make(**options)
    resumed.load_state_dict({"epoch": 0, "batch": 2})
    assert same(next(iter(resumed)), whole[2])
    evaluated = make(**options | {"train": False})
    assert joined(list(evaluated)).ids.tolist() == list(range(N))


@pytest.mark.parametrize("order", ["random", "blocks"])
@pytest.mark.parametrize("rank", [0, 1])
def test_storage_hears_of_samples_before_they_are_read(make, monkeypatch, order, rank):
    """Of all the samples of its rank and no others; of blocks the whole next pool, in storage order, bit by bit."""
    monkeypatch.setattr(base, "BLOCK_SAMPLES", 2)
    monkeypatch.setattr(base, "WINDOW_BLOCKS", 3)
    monkeypatch.setattr(ffcv_images, "BLOCK_BYTES", 2 * 4000)
    keep_videos_together(make, monkeypatch, 2)
    loader = make(sample_order=order, batch_size=1, rank=rank, world_size=2)
    inner, heard = innermost(loader), set()
    sizes = inner._sizes
    monkeypatch.setattr(inner, "_read_ahead", lambda ids: heard.update(ids.tolist()))
    monkeypatch.setattr(inner, "_sizes", lambda ids: sizes(ids) if heard.issuperset(ids.tolist()) else None)
    assert len(list(loader)) == N // 2
    mine = inner._epoch_order(0)[rank::2]
    assert heard <= set(mine.tolist())
    if order == "blocks":
        pool = 3 * inner._samples_per_block()
        told = np.concatenate([inner._next_pool(0, batch) for batch in range(-(-pool // 2))])
        places = np.arange(pool, min(2 * pool, N))
        assert told.tolist() == sorted(inner._epoch_order(0)[places[places % 2 == rank]].tolist())


# ------------------------------------------------------------------------------------------------------- sampling
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=8),
    st.floats(0.01, 1.0),
    st.integers(0, 2**40),
    st.integers(0, 1000),
)
def test_crops_lie_inside_and_depend_on_nothing_else(sizes, crop_min, seed, epoch):
    sizes, ids = np.array(sizes, np.int64), np.arange(len(sizes)) * 7919
    crops = random_crops(seed, epoch, ids, sizes, crop_min, True)
    top, left, height, width, _ = crops.T
    assert crops[:, :2].min() >= 0
    assert crops[:, 2:4].min() >= 1
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    alone = np.concatenate(
        [random_crops(seed, epoch, ids[k:][:1], sizes[k:][:1], crop_min, True) for k in range(len(ids))]
    )
    assert np.array_equal(crops, alone)
    assert np.array_equal(crops[:, :4], random_crops(seed, epoch, ids, sizes, crop_min, False)[:, :4])
    centre = centre_crops(sizes, (32, 48), crop_min)
    assert centre[:, :2].min() >= 0
    assert centre[:, 2:4].min() >= 1
    assert (centre[:, :2] + centre[:, 2:4] <= sizes).all()


def test_crops_are_distributed_as_random_resized_crop():
    ids = np.arange(20000)
    sizes = np.tile(np.array([[300, 400]]), (len(ids), 1))
    crops = random_crops(0, 0, ids, sizes, 0.2, True)
    area, aspect = crops[:, 2] * crops[:, 3] / 120000, np.log(crops[:, 3] / crops[:, 2])
    assert 0.19 < area.min() < 0.21
    assert 0.98 < area.max() <= 1
    levels = np.linspace(0.05, 0.95, 19)
    for ours, theirs in zip((area, aspect), drawn_one_by_one(4000), strict=True):
        assert np.abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() < 0.03
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.01
    assert abs(crops[:, 4].mean() - 0.5) < 0.015
    room = sizes - crops[:, 2:4]
    place = (crops[:, :2] + 0.5) / (room + 1)
    assert np.abs(place.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(np.column_stack([place, area, crops[:, 4]]).T) - np.eye(4)).max() < 0.03


def drawn_one_by_one(count: int) -> tuple[list[float], list[float]]:
    """Areas and log aspect ratios of random resized crops of 300 x 400 images, by the textbook's loop."""
    rng, areas, aspects = np.random.default_rng(0), [], []
    while len(areas) < count:
        area, aspect = 120000 * rng.uniform(0.2, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if height <= 300 and width <= 400:
            areas.append(height * width / 120000)
            aspects.append(np.log(width / height))
    return areas, aspects


def test_extreme_shapes_fall_back_to_the_centre():
    crops = random_crops(0, 0, np.arange(2), np.array([[1000, 10], [10, 1000]]), 0.9, False)
    assert crops.tolist() == [[493, 0, 13, 10, 0], [0, 493, 10, 13, 0]]


def test_orders_are_permutations_and_fixed_for_ever():
    for epoch in range(3):
        assert sorted(sample_order(1, epoch, 1000)) == list(range(1000))
    # Recorded: a change here would silently change the order of every run that is resumed.
    assert sample_order(0, 0, 10).tolist() == RECORDED_ORDER
    assert random_crops(0, 0, np.arange(2), np.array([[300, 400], [28, 28]]), 0.2, True).tolist() == RECORDED_CROPS

    assert block_order(0, 0, 10, 2, 2).tolist() == RECORDED_BLOCKS
    assert replacements(0, 0, np.arange(3), 1, 100).tolist() == RECORDED_REPLACEMENTS
    assert np.allclose(colour_factors(0, 0, np.arange(1), 0.4, 3), RECORDED_FACTORS)


RECORDED_BLOCKS = [2, 5, 3, 4, 7, 6, 8, 9, 0, 1]
RECORDED_REPLACEMENTS = [82, 94, 80]
RECORDED_FACTORS = [[1.357134, 0.87918, 1.294481]]
RECORDED_ORDER = [2, 0, 5, 7, 3, 6, 4, 1, 8, 9]
RECORDED_CROPS = [[26, 62, 217, 166, 0], [3, 0, 23, 28, 0]]


def test_mix_is_splitmix64():
    def plain(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    values = [0, 1, 2**63, 2**64 - 1, 12345678901234567]
    assert mix(np.array(values, np.uint64)).tolist() == [plain(value) for value in values]
    assert plain(0) == 0xE220A8397B1DCDAF  # the published generator's first output for seed 0


def test_area_resize_is_the_mean_of_what_a_pixel_covers():
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    means = image.reshape(4, 3, 5, 2, 3).mean((1, 3))
    assert np.abs(area_resize(image, (4, 5)) - means).max() <= 0.5 + 1e-9
    assert np.array_equal(area_resize(image, (24, 30)), image.repeat(2, 0).repeat(3, 1))
    assert np.array_equal(area_resize(image, (12, 10)), image)
    ramp = np.arange(3, dtype=np.uint8)[:, None, None] * 100
    assert area_resize(ramp, (2, 1)).ravel().tolist() == [33, 167]


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [count_workers(asked) for asked in (0, 3, 99)] == [2, 3, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert count_workers(0) == 1


# ------------------------------------------------------------------------------------------------------- bad files
@pytest.fixture
def beton(sources, tmp_path):
    """A copy of the prepared set, to be damaged."""
    for suffix in (".beton", ".json"):
        shutil.copy(Path(sources["ffcv"]).with_suffix(suffix), tmp_path / f"set{suffix}")
    return tmp_path / "set.beton"


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def refused(path: Path, message: str) -> None:
    for build in (read_info, lambda p: build_loader(p, batch_size=2, image_size=(8, 8), channels=3)):
        with pytest.raises(UserError, match=message) as error:
            build(path)
        assert "\n" not in str(error.value)


def test_missing_sources_are_named(tmp_path):
    refused(tmp_path / "no.beton", "no.beton does not exist")
    refused(tmp_path / "nothing", "nothing is not there")
    refused(tmp_path, "holds no image files")
    refused("", "data_path is empty")
    refused("synthetic:many", "expected synthetic:N")
    (tmp_path / "a.bin").write_bytes(b"x")
    refused(tmp_path / "a.bin", "no .beton")


def test_truncated_and_foreign_files_are_refused(beton):
    whole = beton.read_bytes()
    beton.write_bytes(whole[:-100])
    refused(beton, "truncated")
    beton.write_bytes(whole[: len(whole) // 2])
    refused(beton, "truncated")
    beton.write_bytes(bytes(len(whole)))
    refused(beton, "not an FFCV file")
    beton.write_bytes(whole)
    overwrite(beton, 16, bytes(8))
    refused(beton, "incomplete")
    beton.write_bytes(whole)
    overwrite(beton, len(whole) - 8, (2**40).to_bytes(8, "little"))
    refused(beton, "damaged: 1 of 23")


def test_table_entries_of_impossible_length_are_refused(beton):
    """Of a JPEG, whose length nothing else tells; 2**64 - 1 makes its end wrap around to inside the file."""
    whole = beton.read_bytes()
    sample = int((open_beton(beton).modes == JPEG).argmax())
    table_at = len(whole) - N * ALLOCATION.itemsize
    entry = np.frombuffer(whole, ALLOCATION, N, table_at)["sample_id"].tolist().index(sample)
    for length in (2**64 - 1, 0):
        beton.write_bytes(whole)
        overwrite(beton, table_at + entry * ALLOCATION.itemsize + 16, length.to_bytes(8, "little"))
        refused(beton, f"damaged: 1 of 23 samples, the first of them {sample}")


def test_bad_sidecars_are_refused(beton):
    sidecar = beton.with_suffix(".json")
    good = json.loads(sidecar.read_text())
    for change, message in (
        ({"num_samples": 7}, "holds 23 samples"),
        ({"bytes": 7}, "sidecar says 7"),
        ({"mean": [0.5]}, "contradicts itself"),
        ({"classes": None}, "no list named 'classes'"),
    ):
        sidecar.write_text(json.dumps(good | change))
        refused(beton, message)
    sidecar.write_text("[]")
    refused(beton, "not the sidecar")
    sidecar.write_text("{")
    refused(beton, "cannot be read")
    sidecar.unlink()
    refused(beton, "set.json cannot be read")


# ------------------------------------------------------------------------------------------------------- bad samples
def break_sample(beton: Path, sample: int, *, keep: int = 0) -> None:
    """Overwrite a stored image with zeros, from its byte `keep` on."""
    table = open_beton(beton)
    overwrite(beton, int(table.positions[sample]) + keep, bytes(int(table.lengths[sample]) - keep))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Sources of which some samples do not decode, and which these are."""
    root = tmp_path_factory.mktemp("broken")
    folder = image_folder(root / "folder", N)
    beton = prepare(folder, root / "set.beton")
    bad = (2, 7, 8, 20)
    list_sources(beton, [f"n{sample}.png" for sample in range(N)])
    for sample in bad:
        break_sample(beton, sample)
    paths = sorted((folder / "ant").iterdir()) + sorted((folder / "bee").iterdir())
    for sample, content in zip(bad, (b"", b"no image", paths[0].read_bytes()[:100], bytes(500)), strict=True):
        paths[sample].write_bytes(content)
    return {"ffcv": str(beton), "plain": str(folder), "names": {"ffcv": "n{}.png", "plain": paths}, "bad": bad}


def load_broken(broken, kind, **options):
    values = {"batch_size": 6, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2} | options
    return build_loader(broken[kind], **values)


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_bad_samples_are_replaced_by_rule(broken, kind, capfd):
    """Against the rule stated one sample at a time; the replacements look as they do in their own place."""
    loader, bad = load_broken(broken, kind), broken["bad"]
    replaced = 0
    for epoch in range(3):
        found = joined(list(loader))
        asked = sample_order(5, epoch, N)[: len(found.ids)].tolist()
        expected = []
        for sample in asked:
            attempts = (int(replacements(5, epoch, np.array([sample]), k, N)[0]) for k in range(1, 21))
            expected.append(next(k for k in attempts if k not in bad) if sample in bad else sample)
        assert found.ids.tolist() == expected
        assert found.replaced.tolist() == [sample in bad for sample in asked]
        ids, sizes = found.ids.numpy(), found.sizes.numpy()
        assert np.array_equal(found.crops, random_crops(5, epoch, ids, sizes, 0.2, True))
        assert (sizes == (40, 48)).all()
        places = {sample: row for row, sample in enumerate(ids.tolist()) if not found.replaced[row]}
        for row in found.replaced.nonzero().flatten().tolist():
            twin = places.get(int(ids[row]))
            if twin is not None:
                assert torch.equal(found.images[row], found.images[twin])
                assert found.labels[row] == found.labels[twin]
                replaced += 1
    assert replaced > 3
    names = broken["names"][kind]
    texts = [names.format(k) if kind == "ffcv" else str(names[k]) for k in bad]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == len(bad)
    assert all(sum(text in line for line in warnings) == 1 for text in texts)
    assert sorted(entry.sample for entry in loader.bad_samples()) == list(bad)
    loader.close()


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_ranks_threads_and_resumed_runs_agree_on_replacements(broken, kind):
    whole = list(load_broken(broken, kind, num_workers=1))
    assert sum(int(batch.replaced.sum()) for batch in whole) >= 2
    for world_size in (2, 3):
        options = {"batch_size": 6 // world_size, "world_size": world_size}
        ranks = [list(load_broken(broken, kind, rank=r, **options)) for r in range(world_size)]
        for reference, *parts in zip(whole, *ranks, strict=True):
            assert same(reference, joined(parts))
    for start in range(1, len(whole)):
        resumed = load_broken(broken, kind)
        resumed.load_state_dict({"epoch": 0, "batch": start})
        assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_too_many_bad_samples_end_the_run_and_are_named(broken, kind, monkeypatch):
    with pytest.raises(UserError, match=r"1 sample does not decode, max_bad_samples 0 allows 0 of the 23 in") as error:
        list(load_broken(broken, kind, batch_size=1, max_bad_samples=0.0))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(quarantine, "FEWEST", 1)
    monkeypatch.setattr(quarantine, "NAMED", 2)
    with pytest.raises(
        UserError, match=r"4 samples do .* 0\.15 allows 3 of the 23 in .*: .* and 2 more \(all are named in"
    ):
        list(load_broken(broken, kind, batch_size=23, max_bad_samples=0.15))
    assert len(list(load_broken(broken, kind, batch_size=23, max_bad_samples=0.2))) == 1


def test_a_tenth_of_a_percent_but_at_least_ten_bad_samples_are_put_up_with():
    assert [quarantine.allowed(*case) for case in ((0.001, 100), (0.001, 10**6), (0.5, 40), (0.0, 10**6))] == [
        10,
        1000,
        20,
        0,
    ]


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_evaluation_replaces_nothing_unless_asked(broken, kind):
    loader = load_broken(broken, kind, batch_size=2, train=False)
    iterator = iter(loader)
    next(iterator)
    name = r"n2\.png \(.*set\.beton, sample 2\) does not decode" if kind == "ffcv" else r"004\.png cannot be read"
    with pytest.raises(UserError, match=name):
        next(iterator)
    loader.close()
    found = joined(list(load_broken(broken, kind, batch_size=2, train=False, max_bad_samples=1.0)))
    assert found.replaced.nonzero().flatten().tolist() == list(broken["bad"])


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_a_set_without_a_good_sample_is_an_error(tmp_path, kind):
    folder = image_folder(tmp_path / "folder", 4)
    source = prepare(folder, tmp_path / "set.beton") if kind == "ffcv" else folder
    loader = build_loader(source, batch_size=4, image_size=(8, 8), channels=3)
    for sample, path in enumerate(sorted(folder.rglob("*.png"))):
        if kind == "ffcv":
            break_sample(source, sample)
        else:
            path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"nor do 20 samples drawn in its place; .* is damaged"):
        list(loader)
    loader.close()
    if kind == "plain":
        with pytest.raises(UserError, match=r"000\.png cannot be read"):
            read_info(folder)


def test_a_jpeg_that_ends_early_is_no_image(tmp_path):
    """turbojpeg fills in grey and only warns."""
    out = prepare(image_folder(tmp_path / "folder", 4), tmp_path / "set.beton")
    break_sample(out, 1, keep=int(open_beton(out).lengths[1]) * 3 // 4)
    loader = build_loader(out, batch_size=4, image_size=(8, 8), channels=3)
    (batch,) = loader
    loader.close()
    assert [entry.sample for entry in loader.bad_samples()] == [1]
    assert 1 not in batch.ids


def test_a_file_that_changes_its_size_is_a_bad_sample(tmp_path):
    folder = image_folder(tmp_path / "folder", 4)
    loader = build_loader(folder, batch_size=4, image_size=(8, 8), channels=3)
    list(loader)
    picture(1, (8, 9)).save(folder / "ant" / "000.png")
    (batch,) = loader
    loader.close()
    assert batch.replaced.sum() == 1
    assert "another size" in loader.bad_samples()[0].why


# ------------------------------------------------------------------------------------------------------- processes
WITHOUT_FFCV = """
import sys
for name in ("ffcv", "numba", "llvmlite", "cv2"):
    sys.modules[name] = None
from fasthpm.data import build_loader
from fasthpm.errors import UserError
for source in sys.argv[2:]:
    assert len(list(build_loader(source, batch_size=4, image_size=(8, 8), channels=3))) == 5
try:
    build_loader(sys.argv[1], batch_size=4, image_size=(8, 8), channels=3)
except UserError as error:
    assert "needs numba and libturbojpeg" in str(error), error
else:
    raise SystemExit("a .beton without FFCV was not refused")
"""

INTERRUPTED = """
import os, signal, sys, threading, time, torch
from fasthpm.data import build_loader
from fasthpm.data.device import DeviceLoader
decoder = "dali" if sys.argv[2] == "dali" else "auto"
loader = build_loader(sys.argv[1], batch_size=4, image_size=(8, 8), channels=3, decoder=decoder)
if sys.argv[2] == "ahead":
    loader = DeviceLoader(loader, torch.device("cpu"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
while True:
    for batch in loader:
        time.sleep(0.01)
"""

FORKED = """
import gc, multiprocessing, sys
from fasthpm.data import build_loader
gc.disable()  # the loader is garbage, and still there when a process is forked
decoder = "dali" if sys.argv[2] == "dali" else "auto"
loader = build_loader(sys.argv[1], batch_size=4, image_size=(8, 8), channels=3, decoder=decoder, num_workers=2)
next(iter(loader))
loader.itself = loader
del loader
child = multiprocessing.get_context("fork").Process(target=gc.collect)
child.start()
child.join(30)
sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("kind", ["clips", "dali"])
def test_a_forked_process_survives_the_loaders_that_its_parent_left_as_garbage(sources, kind):
    command = [sys.executable, "-c", FORKED, sources[kind], kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_folders_and_synthetic_images_work_without_ffcv(sources):
    command = [sys.executable, "-c", WITHOUT_FFCV, sources["ffcv"], sources["plain"], sources["synthetic"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_ends_a_process_with_a_running_loader(sources, kind):
    command = [sys.executable, "-c", INTERRUPTED, sources[kind], kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (-2, 130, 1)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt"), done.stderr


def test_a_list_of_sets_may_be_longer_than_a_file_name() -> None:
    assert split_sources(",".join(["a" * 100 + ".beton"] * 100)) == ["a" * 100 + ".beton"] * 100
