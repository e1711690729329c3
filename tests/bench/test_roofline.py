"""The roofline's work is that of the models."""

import dataclasses

import pytest
import torch

from bench import roofline
from fasthpm import recipes
from fasthpm.patches import model_of
from fasthpm.speed import flops


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_rooflines_work_is_that_of_the_models(name: str) -> None:
    for method, recipe in (
        ("mae", "mae_vit_base_in1k_200e"),
        ("hpm", "hpm_vit_base_in1k_200e"),
        ("hpm_fast", "hpm_vit_base_in1k_200e_fast"),
    ):
        base = recipes.from_name(recipe)
        made = dataclasses.replace(base, model=base.model.replace("base", name))
        with torch.device("meta"):
            wanted = flops.step_flops(model_of(made), made)
        assert roofline.work(roofline.SHAPES[name], method) == pytest.approx(wanted, rel=1e-6)


def test_the_rooflines_video_is_that_of_the_model() -> None:
    made = recipes.from_name("hpm_video_vit_base_ssv2_800e")
    with torch.device("meta"):
        wanted = flops.step_flops(model_of(made), made)
    shape = dataclasses.replace(roofline.SHAPES["video_base"], masked=made.num_masked)
    assert roofline.work(shape, "hpm") == pytest.approx(wanted, rel=1e-6)
