"""Weights of photographs for models of other channels."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fasthpm import recipes
from fasthpm.checkpoint import channels, weights
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe
from tests.helpers.array_sets import arrays_of, write_arrays
from tests.helpers.runs import run_of

READS = "patch_embed.proj.weight"


def started(run: Path, count: int, how: str, **changes: object) -> dict[str, torch.Tensor]:
    recipe = dataclasses.replace(recipes.debug(), channels=count, init_from=str(run), init_channels=how, **changes)
    return weights.initial_model(recipe).state_dict()


@pytest.fixture
def photographs(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    folder, model = run_of(tmp_path / "run", Recipe(**{**vars(recipes.debug()), "channels": 3}))
    return folder, model.state_dict()


@pytest.mark.parametrize("count", [1, 2, 4, 12, 64])
@pytest.mark.parametrize("how", ["repeat", "2,4,1"])
def test_the_response_to_what_is_the_same_in_all_channels_is_kept(
    photographs: tuple[Path, dict[str, torch.Tensor]], count: int, how: str
) -> None:
    folder, theirs = photographs
    if how != "repeat" and count < 4:
        with pytest.raises(UserError, match=r"init_channels names '[24]', expected repeat, a number from 1 to"):
            started(folder, count, how)
        return
    ours = started(folder, count, how)
    torch.testing.assert_close(ours[READS].sum(1), theirs[READS].sum(1))
    rows = ours["decoder_pred.weight"].unflatten(0, (-1, count))
    source = theirs["decoder_pred.weight"].unflatten(0, (-1, 3))
    for channel in range(count):
        if how == "repeat" and count >= 3:
            expected = source[:, channel % 3]
            scale = sum(1 for k in range(count) if k % 3 == channel % 3)
            torch.testing.assert_close(ours[READS][:, channel], theirs[READS][:, channel % 3] / scale)
        elif how == "repeat":
            expected = source[:, channel::count].mean(1)
        else:
            place = {1: 0, 3: 1, 0: 2}.get(channel)
            expected = source.mean(1) if place is None else source[:, place]
            each = theirs[READS].mean(1) if place is None else theirs[READS][:, place]
            torch.testing.assert_close(ours[READS][:, channel], each * 3 / count)
        torch.testing.assert_close(rows[:, channel], expected)
    others = [name for name in theirs if name not in (READS, "decoder_pred.weight", "decoder_pred.bias")]
    assert all(torch.equal(ours[name], theirs[name]) for name in others)


def test_bands_are_named_as_the_set_names_them(
    photographs: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    bands = ["B01", "Blue", "Green", "Red"]
    data = write_arrays(tmp_path / "a.beton", arrays_of(2, 4), bands=bands)
    ours = started(photographs[0], 4, "red, green, blue", data_path=str(data))
    assert all(torch.equal(ours[name], started(photographs[0], 4, "4,3,2")[name]) for name in ours)
    with pytest.raises(UserError, match=r"names 'Reed', .* the bands are B01, Blue, Green, Red.*Red"):
        started(photographs[0], 4, "Reed,Green,Blue", data_path=str(data))


def test_what_does_not_fit_is_said(photographs: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run has 3 channels, and channels is 5; use --init_channels repeat"):
        started(photographs[0], 5, "")
    for text in ("1,2", "1,1,2", "1,2,3,4"):
        with pytest.raises(UserError, match="expected repeat, or three different channels"):
            channels.places(text, 5, ())
    grey, _ = run_of(tmp_path / "grey", recipes.debug())
    with pytest.raises(UserError, match="has 1 channels, not red, green and blue; use --init_channels repeat"):
        started(grey, 5, "1,2,3")
    assert started(grey, 5, "repeat")[READS].shape[1] == 5
    with pytest.raises(UserError, match="init_channels repeat is of the weights of init_from"):
        dataclasses.replace(recipes.debug(), init_channels="repeat")
