"""Weights that other code wrote: where they lie in a file, and whether they fit."""

import pytest
import torch

from fasthpm import recipes
from fasthpm.checkpoint.foreign import find_weights, load_reference, strip_wrappers
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from tests.helpers.published import prefixed


def test_wrappers_are_stripped_only_where_all_keys_have_them() -> None:
    state = {"patch_embed.proj.weight": torch.ones(1), "model.x": torch.ones(1)}
    assert strip_wrappers({f"module._orig_mod.{key}": value for key, value in state.items()}) == state
    assert find_weights({"module": {"model": state}, "optimizer": {}}, "student") == state
    assert find_weights(state, "teacher") == {}


def test_load_reference_is_all_or_nothing() -> None:
    model = model_of(recipes.debug())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = {key: value + 1 for key, value in before.items()}
    with pytest.raises(UserError, match="missing"):
        load_reference(model, {key: value for key, value in given.items() if key != "norm.bias"}, "hpm")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    load_reference(model, prefixed(given), "hpm")
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"source is 'mea', expected one of .*; did you mean 'mae'"):
        load_reference(model, given, "mea")
