"""Pixels of any dtype become colours: the right channels, stretched as the set says, nodata apart."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm import recipes
from fasthpm.data import DatasetInfo
from fasthpm.data.sampling import Array
from fasthpm.data.shown import NOTHING, shown_of
from fasthpm.data.values import Values
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.pictures import panels

BANDS = ("blue", "green", "red", "nir")


def twin(values: Values, pixels: Array, group: tuple[int, ...]) -> Array:
    """A picture, number by number."""
    out = np.zeros((*pixels.shape[:-1], 3), np.uint8)
    for place in np.ndindex(*pixels.shape[:-1]):
        levels = []
        for channel in group:
            value, low, high = float(pixels[place][channel]), values.low[channel], values.high[channel]
            if math.isnan(value) or value == values.nodata:
                levels = []
                break
            if values.log:
                value, low, high = math.expm1(value), math.expm1(low), math.expm1(high)
            share = (value - low) / (high - low) if high > low else 0.5 + np.sign(value - low) / 2
            levels.append(round(255 * min(max(share, 0.0), 1.0)))
        if not levels:
            out[place] = NOTHING
        elif len(levels) == 1:
            out[place] = levels[0]
        else:
            out[place][: len(levels)] = levels
    return out


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
@pytest.mark.parametrize("group", [(2,), (3, 0), (2, 1, 0)])
def test_colours_are_the_percentiles_stretch_of_the_channels(dtype: str, group: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 200, (2, 5, 6, 4)).astype(dtype)
    pixels[0, 1, 2, group[0]] = 7
    log = dtype == "float32"
    pixels = np.log1p(pixels).astype(dtype) if log else pixels
    nodata = math.nan if dtype == "float16" else float(pixels[0, 1, 2, group[0]])
    if dtype == "float16":
        pixels[0, 3, 3, group[0]] = np.nan
    values = Values(dtype, nodata, BANDS, (1.0, 0.5, 2.0, 3.0), (4.0, 5.0, 3.0, 6.0) if log else (90.0,) * 4, log)
    show = ",".join(str(channel + 1) for channel in group)
    (picture,) = shown_of(values, 4, show)(pixels)
    np.testing.assert_array_equal(picture, twin(values, pixels, group))
    assert (picture == NOTHING).all(-1).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_shown_as_they_are(channels: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 4, 4, channels)).astype(np.uint8)
    shown = shown_of(Values(), channels)
    assert np.array_equal(shown.first(pixels), pixels.repeat(3, -1) if channels == 1 else pixels)
    near = pixels.astype(np.float32) + np.float32(0.4)
    near[0, 0, 0] = (-30.0,) * channels
    want = pixels.copy()
    want[0, 0, 0] = 0
    assert np.array_equal(shown.first(near)[..., :channels], want)


@pytest.mark.parametrize(
    ("channels", "bands", "show", "want"),
    [
        (1, (), "", [(0,)]),
        (2, (), "", [(0, 1)]),
        (3, (), "", [(0, 1, 2)]),
        (4, BANDS, "", [(2, 1, 0)]),
        (12, (), "", [(0, 1, 2)]),
        (4, BANDS, "NIR, 3,2/1", [(3, 2, 1), (0,)]),
        (2, ("1", "B2"), "b2/1", [(1,), (0,)]),
    ],
)
def test_channels_are_chosen_by_number_or_name(channels: int, bands: Any, show: str, want: list[Any]) -> None:
    shown = shown_of(Values("uint16", bands=bands), channels, show)
    assert list(shown.groups) == want
    assert len(shown.titles) == len(want)


def test_titles_are_of_several_groups_only() -> None:
    assert shown_of(Values(bands=BANDS), 4).titles == ("",)
    assert shown_of(Values(bands=BANDS), 4, "4,3,2/1").titles == ("nir,red,green", "blue")
    assert shown_of(Values(), 12, "12/1,2").titles == ("12", "1,2")


@pytest.mark.parametrize(
    ("show", "message"),
    [
        ("5", "'5' is no channel; expected 1 to 4, or blue, green, red, nir"),
        ("rad", "'rad' is no channel; did you mean 'red'"),
        ("0", "'0' is no channel"),
        ("1,2,3,4", "names 4 channels, expected 1 to 3"),
        ("1/", "'' is no channel"),
    ],
)
def test_channels_that_are_not_there_are_refused(show: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shown_of(Values("uint16", bands=BANDS), 4, show)
    with pytest.raises(UserError, match="is the name of channel 1 and the number of another"):
        shown_of(Values("uint16", bands=("2", "1")), 2, "2")


def test_a_constant_channel_is_grey_and_what_stands_out_of_it_is_seen() -> None:
    pixels = np.full((1, 3, 3, 1), 500, np.uint16)
    pixels[0, 0, 0], pixels[0, 2, 2] = 501, 499
    shown = shown_of(Values("uint16", None, (), (500.0,), (500.0,)), 1)
    picture = shown.first(pixels)[0, ..., 0]
    assert (picture[0, 0], picture[1, 1], picture[2, 2]) == (255, 128, 0)


def test_without_percentiles_the_pictures_own_are_taken() -> None:
    pixels = np.linspace(1000, 1100, 101).reshape(1, 1, 101, 1).astype(np.float32)
    pixels[0, 0, 50] = np.nan
    picture = shown_of(Values("float32", math.nan), 1).first(pixels)[0, 0]
    assert (picture[0, 0], picture[-1, 0]) == (0, 255)
    assert tuple(picture[50]) == NOTHING
    assert 60 < picture[25, 0] < 66


def test_a_panel_has_a_picture_of_every_group_and_reconstructs_in_stored_values() -> None:
    """A model that predicts the mean everywhere: masked patches show it, visible ones the pixels, both stretched."""
    recipe = dataclasses.replace(recipes.debug(), channels=4, input_size="12", difficulty="paper")
    model = model_of(recipe).eval()
    torch.nn.init.zeros_(model.decoder_pred.weight)
    torch.nn.init.zeros_(model.decoder_pred.bias)
    values = Values("uint16", None, BANDS, (0.0,) * 4, (4000.0,) * 4)
    info = DatasetInfo(9, 4, (1000.0, 2000.0, 3000.0, 500.0), (10.0,) * 4, ("a",), 0, values)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 4001, (2, 12, 12, 4)).astype(np.uint16))
    shown = shown_of(values, 4, "red,green,blue/nir")
    drawn = panels.pictures(model, recipe, info, images, 0.5, shown=shown)
    assert list(drawn) == [
        "image (red,green,blue)",
        "image (nir)",
        "reconstruction (red,green,blue)",
        "reconstruction (nir)",
        "true loss",
        "predicted loss",
        "mask",
    ]
    hidden = (drawn["mask"] == panels.GREY).all(-1)
    seen, rebuilt = drawn["image (red,green,blue)"], drawn["reconstruction (red,green,blue)"]
    assert (abs(seen[~hidden].astype(int) - rebuilt[~hidden]) <= 1).all()
    assert (rebuilt[hidden] == np.rint(np.array([3000, 2000, 1000]) * 255 / 4000)).all()
    assert np.array_equal(seen[..., 0], np.rint(images[..., 2].numpy() * (255 / 4000)).reshape(seen.shape[:-1]))


def test_patches_without_data_have_no_heat() -> None:
    recipe = dataclasses.replace(recipes.debug(), channels=4, input_size="12", difficulty="paper", mask_ratio=0.5)
    values = Values("uint16", 0, BANDS, (0.0,) * 4, (4000.0,) * 4)
    info = DatasetInfo(9, 4, (2000.0,) * 4, (1000.0,) * 4, ("a",), 0, values)
    pixels = np.random.default_rng(0).integers(1, 4001, (2, 12, 12, 4)).astype(np.uint16)
    pixels[0, :5, :3, 1] = 0  # two patches
    shown = shown_of(values, 4)
    model, images = model_of(recipe).eval(), torch.from_numpy(pixels)
    names = ("image", "true_loss", "predicted_loss", "hardest")
    drawn = panels.pictures(model, recipe, info, images, 0.5, names=names, shown=shown)
    empty = (drawn["true loss"][:, 0] == NOTHING).all(-1).reshape(2, 3, 4, 3, 4).all((2, 4))
    assert np.argwhere(empty).tolist() == [[0, 0, 0], [0, 1, 0]]
    assert np.array_equal(*((drawn[name] == NOTHING).all(-1) for name in ("true loss", "predicted loss")))
    assert (drawn["image"] == NOTHING).all(-1).sum() == 15
    assert not (drawn["hardest"][0, 0, :8, :4] == panels.GREY).all(-1).any()
