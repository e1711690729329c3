"""Things cut off their ground and pasted on another."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import pasting


def shape(*boxes: tuple[int, int, int, int], grey: int = 255) -> np.ndarray:
    """uint8 [28, 28] with boxes of (top, left, height, width)."""
    image = np.zeros((28, 28), np.uint8)
    for top, left, height, width in boxes:
        image[top : top + height, left : left + width] = grey
    return image


def test_small_dark_places_belong_to_a_thing_large_ones_and_specks_do_not() -> None:
    image = shape((2, 2, 20, 20))
    image[4:7, 4:7] = 0  # a print
    image[10:16, 10:16] = pasting.DARKEST - 1  # between the legs
    image[25, 25] = 255
    want = shape((2, 2, 20, 20)) > 0
    want[10:16, 10:16] = False
    assert np.array_equal(pasting.silhouette(image), want)


def test_the_edge_has_the_grey_of_the_inside() -> None:
    """Where a thing's outermost pixels are mixed with something else, none of that is left."""
    for mixed in (60, 250):
        image = shape((5, 3, 12, 9), grey=mixed)
        image[6:16, 4:11] = 200
        cutout = pasting.cut_out(image)
        assert cutout.inside.shape == (12, 9)
        assert cutout.inside.all()
        assert (cutout.grey == 200).all()
    thin = shape((5, 3, 1, 9), grey=60)  # has no inside, and keeps its own
    assert (pasting.cut_out(thin).grey == 60).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    boxes=st.lists(st.tuples(*[st.integers(0, 19)] * 2, *[st.integers(2, 9)] * 2), min_size=1, max_size=3),
    longest=st.integers(8, 90),
    mirrored=st.booleans(),
)
def test_a_mask_is_where_the_thing_hides_the_ground(
    seed: int, boxes: list[tuple[int, int, int, int]], longest: int, mirrored: bool
) -> None:
    """Measured on the pixels: how far each has gone from the ground's colour to the thing's."""
    grey, opacity = pasting.enlarge(pasting.cut_out(shape(*boxes)), longest, mirrored)
    height, width = grey.shape
    ground = np.random.default_rng(seed).integers(0, 100, (height + 5, width + 7, 3), dtype=np.uint8)
    canvas, tint = ground.copy(), np.array([1.0, 0.8, 0.9])
    mask = pasting.paste(canvas, grey, opacity, (2, 3), tint)
    gone = (canvas.astype(float) - ground)[:, :, 0] / (255.0 - ground[:, :, 0])
    unsure = np.abs(gone - 0.5) < 0.01  # a grey level at most
    assert np.array_equal(mask[~unsure], gone[~unsure] > 0.5)
    assert (canvas[mask].mean(0) > 120).all()
    assert np.array_equal(canvas[:2], ground[:2])
    outside = np.ones_like(mask)
    outside[2 : 2 + height, 3 : 3 + width] = opacity == 0
    assert np.array_equal(canvas[outside], ground[outside])
    if len(boxes) == 1:
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - longest) <= max(1, longest / 10)


def test_mirrored_things_are_mirrored() -> None:
    image = shape((4, 4, 16, 3), (16, 4, 4, 12))
    plain, mirrored = (pasting.enlarge(pasting.cut_out(image), 40, flag) for flag in (False, True))
    for one, other in zip(plain, mirrored, strict=True):
        assert np.array_equal(one[:, ::-1], other)
        assert not np.array_equal(one, other)


def test_an_edge_is_two_pixels_wide_at_any_size() -> None:
    for longest in (14, 28, 56, 224):
        _, opacity = pasting.enlarge(pasting.cut_out(shape((4, 4, 16, 16))), longest, False)
        soft = (opacity[len(opacity) // 2] > 0.02) & (opacity[len(opacity) // 2] < 0.98)
        assert soft.sum() <= 2 * 4
