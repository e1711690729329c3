"""Which frames a clip has, and where it is cropped."""

from collections import Counter

import numpy as np

from fasthpm.data.video.sampling import (
    POSITIONS,
    SCALES,
    clip_frames,
    clip_starts,
    multi_scale_crops,
    segment_frames,
    view_crops,
    view_segments,
    view_starts,
)


def test_clips_begin_anywhere_and_short_videos_are_looped() -> None:
    ids, frames = np.arange(20_000), np.full(20_000, 10)
    starts = clip_starts(1, 0, ids, frames, 7)
    counts = Counter(starts.tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 4700
    assert clip_frames(np.array([8, 0]), np.array([10, 3]), 4, 2).tolist() == [[8, 0, 2, 4], [0, 2, 1, 0]]
    assert set(clip_starts(1, 0, ids, np.full(20_000, 4), 7).tolist()) == {0, 1, 2, 3}
    assert view_starts(np.array([10, 10, 4]), 4, np.array([0, 1, 1]), 2).tolist() == [0, 6, 0]
    assert view_starts(np.array([10]), 4, np.array([0]), 1).tolist() == [3]


def test_segments_are_videomaes() -> None:
    """A frame drawn in each of T stretches, shorter videos too; in tests of two clips, their starts and middles."""
    ids, lengths = np.arange(2000), np.tile([20, 16, 6, 1], 500)
    drawn = segment_frames(1, 0, ids, lengths, 8)
    for row, length in zip(drawn.tolist(), lengths.tolist(), strict=True):
        for k, frame in enumerate(row):
            assert int(k * length / 8) <= frame <= min((k + 1) * length / 8, length - 1)
    assert {frame for row in drawn[lengths == 16].tolist() for frame in row} == set(range(16))
    assert not np.array_equal(drawn, segment_frames(1, 1, ids, lengths, 8))
    for number, shift in ((0, 0.0), (1, 0.5)):
        want = [int((k + shift) * 20 / 8) for k in range(8)]
        assert view_segments(np.array([20]), 8, np.array([number]), 2).tolist() == [want]
    assert view_segments(np.array([20]), 8, np.array([0]), 1).tolist() == [want]


def test_multi_scale_crops_are_videomaes() -> None:
    """Against the rule one video at a time: sides of the four scales, at most one step apart, at the 13 places."""
    sizes = np.tile([[240, 320]], (4000, 1))
    crops = multi_scale_crops(0, 3, np.arange(4000), sizes, (224, 224), True)
    sides = [int(240 * scale) for scale in SCALES]
    pairs = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert {(int(h), int(w)) for _, _, h, w, _ in crops} == pairs
    places = {tuple(place) for place in POSITIONS.tolist()}
    assert len(places) == 13
    for top, left, height, width, _ in crops.tolist():
        down, right = (240 - height) // 4, (320 - width) // 4
        assert (top // down if down else 0, left // right) in {(y if down else 0, x) for y, x in places}
    assert 0.45 < crops[:, 4].mean() < 0.55
    snapped = multi_scale_crops(0, 0, np.arange(200), np.tile([[226, 300]], (200, 1)), (224, 224), False)
    assert set(snapped[:, 2].tolist()) == {224, int(226 * 0.875), int(226 * 0.75), int(226 * 0.66)}
    assert not snapped[:, 4].any()
    small = multi_scale_crops(0, 0, np.arange(200), np.tile([[223, 300]], (200, 1)), (224, 224), False)
    assert small[:, 2].max() == 223
    assert view_crops(np.array([[240, 320]] * 3), (224, 224), np.arange(3), 3)[:, :4].tolist() == [
        [0, 0, 240, 240],
        [0, 40, 240, 240],
        [0, 80, 240, 240],
    ]


IDS, FRAMES, SIZES = np.arange(4000), np.full(4000, 300), np.tile([[240, 320]], (4000, 1))


def test_every_draw_follows_seed_and_epoch() -> None:
    for draw in (
        lambda seed, epoch: clip_starts(seed, epoch, IDS, FRAMES, 32),
        lambda seed, epoch: segment_frames(seed, epoch, IDS, FRAMES, 8),
        lambda seed, epoch: multi_scale_crops(seed, epoch, IDS, SIZES, (224, 224), True),
    ):
        assert np.array_equal(draw(3, 0), draw(3, 0))
        for other in (draw(3, 1), draw(4, 0)):
            assert (draw(3, 0) != other).mean() > 0.3


def test_where_a_clip_begins_tells_nothing_of_its_crop() -> None:
    drawn = np.column_stack([clip_starts(0, 0, IDS, FRAMES, 32), multi_scale_crops(0, 0, IDS, SIZES, (224, 224), True)])
    assert np.abs(np.corrcoef(drawn.T)[0, 1:]).max() < 0.08
    assert np.abs(np.corrcoef(drawn[:, [3, 5]].T)[0, 1]) < 0.08
