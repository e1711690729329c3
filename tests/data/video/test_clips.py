"""Clips of prepared videos; the contract of their loader is in `test_build.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import videos
from fasthpm.data import build_loader, read_info
from fasthpm.data.pixels import render
from fasthpm.data.sampling import sample_order
from fasthpm.data.video.prepared import open_videos
from fasthpm.data.video.sampling import clip_starts, segment_frames, view_segments
from fasthpm.errors import UserError
from tests.helpers.video_fixtures import FRAMES, pattern, prepare_videos
from tests.helpers.video_sets import SIZE, damaged, loader_of, stored_frame

NO_CHANGE = np.ones(3)


@pytest.mark.parametrize("decoder", ["turbojpeg", "dali"])
def test_pixels_and_frames_agree_with_pil(prepared: Path, decoder: str) -> None:
    """Every clip is the stored frames from one drawn start on, each cut, resized and flipped alike."""
    data, loader = open_videos(prepared), loader_of(prepared, decoder=decoder, sampling_rate=2)
    flips, starts = set(), set()
    for epoch in range(4):
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch.ids.tolist() == sample_order(5, epoch, 6).tolist()
        for clip, video, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.numpy(), strict=True):
            row = data.videos[video]
            first = int(clip_starts(5, epoch, np.array([video]), np.array([FRAMES]), 5)[0])
            starts.add(first)
            flips.add(int(crop[4]))
            for t, pixels in enumerate(clip):
                truth = render(stored_frame(data, int(row["first"]) + first + 2 * t), crop, SIZE, "bicubic", NO_CHANGE)
                difference = np.abs(pixels.astype(int) - truth)
                assert difference.mean() < 1.5
                assert np.quantile(difference, 0.99) <= 20
    loader.close()
    assert len(starts) > 3
    assert flips == {0, 1}
    unflipped = loader_of(prepared, decoder=decoder, flip=False)
    assert not next(iter(unflipped)).crops[:, 4].any()
    unflipped.close()


def test_views_are_rows_one_after_the_other(prepared: Path) -> None:
    data = open_videos(prepared)
    loader = loader_of(prepared, train=False, views=(2, 3), batch_size=4, num_frames=4)
    batches = list(loader)
    loader.close()
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.tolist() == [video for video in range(6) for _ in range(6)]
    assert batches[0].images.shape == (24, 4, *SIZE, 3)
    row, views = data.videos[0], batches[0].images[:6].numpy()
    for number, clip in enumerate(views):
        start, crop = (0, FRAMES - 4)[number // 3], batches[0].crops[number].numpy()
        for t in range(4):
            truth = render(stored_frame(data, int(row["first"]) + start + t), crop, SIZE, "bicubic", NO_CHANGE)
            assert np.abs(clip[t].astype(int) - truth).mean() < 1.5
    middle = loader_of(prepared, train=False, views=(1, 3), decoder="dali", num_frames=4)
    assert next(iter(middle)).crops[:3].tolist() == batches[0].crops[:3].tolist()
    middle.close()


def test_segments_reach_the_clip(prepared: Path) -> None:
    """The whole video in a clip, in training and in tests, from a set whose stride sampling_rate does not fit."""
    data, options = open_videos(prepared), {"frame_sampling": "segments", "num_frames": 4, "crop": "random_resized"}
    for train in (True, False):
        loader = loader_of(prepared, train=train, **options)
        batch = next(iter(loader))
        loader.close()
        video, crop, lengths = int(batch.ids[0]), batch.crops[0].numpy(), np.array([FRAMES])
        drawn = segment_frames(5, 0, batch.ids[:1].numpy(), lengths, 4)
        chosen = drawn if train else view_segments(lengths, 4, np.array([0]), 1)
        for pixels, frame in zip(batch.images[0].numpy(), chosen[0].tolist(), strict=True):
            truth = render(
                stored_frame(data, int(data.videos[video]["first"]) + frame), crop, SIZE, "bicubic", NO_CHANGE
            )
            assert np.abs(pixels.astype(int) - truth).mean() < 1.5


def test_training_views_are_draws_of_their_own(prepared: Path) -> None:
    twice, once = loader_of(prepared, views=(2, 1)), loader_of(prepared)
    (two,), (one,) = twice, once
    assert two.ids.tolist() == np.repeat(one.ids, 2).tolist()
    assert torch.equal(two.images[::2], one.images)
    assert not torch.equal(two.crops[::2], two.crops[1::2])
    resized = next(iter(loader_of(prepared, crop="random_resized", crop_min=0.1)))
    areas = resized.crops[:, 2] * resized.crops[:, 3]
    assert not torch.equal(areas, one.crops[:, 2] * one.crops[:, 3])


def test_one_frame_makes_images(prepared: Path) -> None:
    loader = loader_of(prepared, num_frames=1, sampling_rate=1)
    assert next(iter(loader)).images.shape == (6, *SIZE, 3)
    loader.close()


def test_grey_videos_have_one_channel(tmp_path: Path) -> None:
    pattern(tmp_path / "videos" / "a.mp4", "-vf", "format=gray,format=yuv420p", "-c:v", "libx264")
    out = prepare_videos(tmp_path / "videos", tmp_path / "set")
    assert read_info(out).channels == 1
    both = [loader_of(out, channels=1, batch_size=1, decoder=decoder) for decoder in ("turbojpeg", "dali")]
    ours, theirs = (next(iter(loader)).images for loader in both)
    assert ours.shape == (1, 3, *SIZE, 1)
    assert (ours.float() - theirs.float()).abs().mean() < 1
    for loader in both:
        loader.close()


@pytest.mark.parametrize("decoder", ["turbojpeg", "dali"])
def test_clips_with_damaged_frames_are_replaced_and_named(prepared: Path, tmp_path: Path, decoder: str) -> None:
    broken = damaged(prepared, tmp_path / "set", videos=(2,))
    loader = loader_of(broken, decoder=decoder, num_frames=FRAMES)
    (batch,) = loader
    (bad,) = loader.bad_samples()
    loader.close()
    assert bad.sample == 2
    assert open_videos(prepared).row(2)["path"] in bad.name
    assert int(batch.replaced.sum()) == 1
    assert 2 not in batch.ids
    again = loader_of(broken, decoder="turbojpeg", num_frames=FRAMES)
    assert next(iter(again)).ids.tolist() == batch.ids.tolist()
    again.close()
    with pytest.raises(UserError, match=r"video 2\) has frames that do not decode"):
        list(loader_of(broken, decoder=decoder, num_frames=FRAMES, train=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "nvdec"}, "decoder is nvdec, expected one of auto, turbojpeg, dali"),
        ({"crop": "corner"}, "crop is corner, expected one of auto, multi_scale"),
        ({"views": (2, 3)}, r"views is \(2, 3\), expected clips and crops"),
        ({"decoder": "dali", "interpolation": "area"}, "resizes bicubic and changes no colours; interpolation is area"),
    ],
)
def test_wrong_options_are_one_line(prepared: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        loader_of(prepared, **options)
    assert "\n" not in str(error.value)


def test_sampling_rates_that_the_set_does_not_hold_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    videos.main([str(source), str(out), "--num_workers", "2"])
    with pytest.raises(UserError, match=r"sampling_rate is 3, but .* holds every 2th frame; use a multiple of 2"):
        loader_of(out, sampling_rate=3)
    loader = loader_of(out, sampling_rate=4)
    assert next(iter(loader)).images.shape == (6, 3, *SIZE, 3)
    loader.close()


def test_clips_of_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds no prepared videos; use --num_frames 1 for images"):
        build_loader(tmp_path, batch_size=1, image_size=(8, 8), channels=3, num_frames=4)
