"""Batches that are cut from blocks, and what storage hears of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.data import base
from fasthpm.data.ffcv import images as ffcv_images
from fasthpm.data.sampling import block_order, sample_order
from fasthpm.data.video import clips
from tests.helpers.loaders import N, innermost, joined, same


def keep_videos_together(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let blocks of videos hold `count` of them."""
    loader = innermost(make())
    if isinstance(loader, clips.ClipLoader):
        monkeypatch.setattr(clips, "BLOCK_BYTES", -(-count * len(loader.data.frames) // N))


def test_batches_lie_in_memory_that_is_used_again(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def empty(*asked: Any) -> torch.Tensor:
        tensor = real(*asked)
        given.append(tensor.data_ptr())
        return tensor

    real = base.Recycled.empty
    monkeypatch.setattr(base.Recycled, "empty", empty)
    kept = list(make(batch_size=2))
    places = [batch.images.data_ptr() for batch in kept]
    assert len(set(places)) == len(kept) > base.AHEAD + 2  # of what is held nothing is used again
    if not torch.cuda.is_available():  # pinned memory is torch's, which keeps it too
        assert set(places) <= set(given)


def test_blocks_are_cut_by_global_batch_and_resume(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK_SAMPLES", 3)
    monkeypatch.setattr(base, "WINDOW_BLOCKS", 2)
    stored = innermost(make())
    ffcv = isinstance(stored, ffcv_images.FfcvLoader)  # blocks of three samples, however large these are
    monkeypatch.setattr(ffcv_images, "BLOCK_BYTES", 3.5 * stored.data.lengths.mean() if ffcv else 0)
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
def test_storage_hears_of_samples_before_they_are_read(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, order: str, rank: int
) -> None:
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
