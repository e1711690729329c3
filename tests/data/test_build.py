"""The contract of every loader (see `fasthpm.data.Loader`), over all kinds."""

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.video.prepared import open_videos
from fasthpm.errors import UserError
from tests.helpers.loaders import FIELDS, KINDS, SIZE, N, innermost, joined, refused, same


def frames(loader: Any) -> tuple[int, ...]:
    """What the shape of a batch has between B and the image's."""
    return innermost(loader).options.sample_shape[:-3]


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fasthpm")]


# ------------------------------------------------------------------------------------------------------- contract
def test_batches_have_the_promised_form(make: Callable[..., Any]) -> None:
    loader = make()
    batches = list(loader)
    assert len(batches) == len(loader) == N // 4
    assert loader.info.num_samples == N
    assert loader.batch_size == 4
    for batch in batches:
        assert batch.images.shape == (4, *frames(loader), *SIZE, 3)
        assert batch.images.dtype == (torch.uint16 if "arrays" in loader.source else torch.uint8)
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


def test_every_batch_is_memory_of_its_own(make: Callable[..., Any]) -> None:
    loader = make()
    batches = list(loader)
    assert len({batch.images.untyped_storage().data_ptr() for batch in batches}) == len(batches)
    kept = [batch.images.clone() for batch in batches]
    list(loader)
    assert all(torch.equal(a, b.images) for a, b in zip(kept, batches, strict=True))


def test_an_epoch_gives_no_sample_twice_and_epochs_differ(make: Callable[..., Any]) -> None:
    loader = make()
    first, second = joined(list(loader)), joined(list(loader))
    for epoch in (first, second):
        assert len(set(epoch.ids.tolist())) == 4 * (N // 4)
    assert first.ids.tolist() != second.ids.tolist()
    assert first.crops.tolist() != second.crops.tolist()


def test_seed_and_epoch_decide_everything_for_any_number_of_threads(make: Callable[..., Any]) -> None:
    reference = list(make())
    assert all(same(a, b) for a, b in zip(reference, make(num_workers=1), strict=True))
    assert not all(same(a, b) for a, b in zip(reference, make(seed=6), strict=True))
    again = make()
    list(again)
    again.set_epoch(0)
    assert all(same(a, b) for a, b in zip(reference, again, strict=True))


@pytest.mark.parametrize("given", range(6))
def test_resume_continues_at_the_batch_that_was_not_given(make: Callable[..., Any], given: int) -> None:
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


def test_a_loop_that_breaks_goes_on_where_it_was(make: Callable[..., Any]) -> None:
    reference = list(make())
    loader = make()
    for batch in loader:
        assert same(batch, reference[0])
        break
    assert same(next(iter(loader)), reference[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_global_batches(make: Callable[..., Any], world_size: int) -> None:
    whole = list(make(batch_size=6))
    ranks = [list(make(batch_size=6 // world_size, rank=r, world_size=world_size)) for r in range(world_size)]
    for reference, *parts in zip(whole, *ranks, strict=True):
        assert same(reference, joined(parts))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_each_sample_once_in_order(make: Callable[..., Any], world_size: int) -> None:
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


def test_labels_belong_to_their_images(make: Callable[..., Any], sources: dict[str, str]) -> None:
    loader = make(train=False)
    found = joined(list(loader))
    assert len(loader.info.classes) > found.labels.max()
    if innermost(loader).source == sources["ffcv"]:
        assert np.array_equal(found.labels, open_beton(Path(sources["ffcv"])).labels)
    elif innermost(loader).source == sources["arrays"]:
        assert np.array_equal(found.labels, open_beton(Path(sources["arrays"])).labels)
    elif innermost(loader).source == sources["shards"]:
        shards = [open_beton(path).labels for path in sorted(Path(sources["shards"]).parent.glob("many-*.beton"))]
        assert np.array_equal(found.labels, np.concatenate(shards))
    elif innermost(loader).source == sources["clips"]:
        assert np.array_equal(found.labels, open_videos(Path(sources["clips"])).videos["label"])
    elif innermost(loader).source == sources["plain"]:
        assert found.labels.tolist() == sorted(index % 2 for index in range(N))
    else:
        assert found.labels.tolist() == [index % 10 for index in range(N)]


def test_no_thread_outlives_its_loader(make: Callable[..., Any]) -> None:
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


def test_an_exception_in_the_loop_stops_the_thread(make: Callable[..., Any]) -> None:
    loader = make()

    def fails():
        for _ in loader:
            raise KeyError("of the consumer")

    with pytest.raises(KeyError):
        fails()
    loader.close()
    assert not our_threads()


def test_twenty_epochs_take_no_more_memory_than_a_few(make: Callable[..., Any]) -> None:
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


def test_moving_the_loader_ends_the_running_iteration(make: Callable[..., Any]) -> None:
    loader = make()
    iterator = iter(loader)
    next(iterator)
    loader.set_epoch(3)
    with pytest.raises(RuntimeError, match="ended"):
        next(iterator)
    assert loader.state_dict() == {"epoch": 3, "batch": 0}


def test_an_error_in_the_thread_reaches_the_consumer_once(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        ({"channels": 65}, "channels is 65"),
        ({"rotate90": True}, r"image_size is \(16, 24\), expected a square"),
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
def test_wrong_options_are_one_line(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_positions_outside_the_set_are_refused(make: Callable[..., Any]) -> None:
    loader = make()
    with pytest.raises(UserError, match="batch 6 is outside"):
        loader.load_state_dict({"epoch": 0, "batch": 6})


# ------------------------------------------------------------------------------------------------------- refusals
def test_missing_sources_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "no.beton", "no.beton does not exist")
    refused(tmp_path / "nothing", "nothing is not there")
    refused(tmp_path, "holds no image files")
    refused("", "data_path is empty")
    refused("synthetic:many", "expected synthetic:N")
    (tmp_path / "a.bin").write_bytes(b"x")
    refused(tmp_path / "a.bin", "no .beton")


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
def test_a_forked_process_survives_the_loaders_that_its_parent_left_as_garbage(
    sources: dict[str, str], kind: str
) -> None:
    command = [sys.executable, "-c", FORKED, sources[kind], kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_folders_and_synthetic_images_work_without_ffcv(sources: dict[str, str]) -> None:
    command = [sys.executable, "-c", WITHOUT_FFCV, sources["ffcv"], sources["plain"], sources["synthetic"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_ends_a_process_with_a_running_loader(sources: dict[str, str], kind: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, sources[kind], kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (-2, 130, 1)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt"), done.stderr
