"""The roofline's work is that of the models."""

import dataclasses

import pytest
import torch

from bench import roofline
from bench.methods import METHODS
from fasthpm import recipes
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed import flops, traffic


def compare(shape: roofline.Shape, name: str, recipe: Recipe) -> None:
    """The roofline's arithmetic against the formulas, which walk through the model."""
    with torch.device("meta"):
        model = model_of(recipe)
    assert roofline.work(shape, name) == pytest.approx(flops.step_flops(model, recipe), rel=1e-6)
    assert roofline.traffic(shape, name) == pytest.approx(traffic.step_bytes(model, recipe)["total"], rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_rooflines_work_is_that_of_the_models(name: str) -> None:
    kind = "hpm" if METHODS[name].difficulty else "mae"
    base = recipes.from_name(f"{kind}_vit_base_in1k_200e")
    large = dataclasses.replace(base, model=base.model.replace("base", "large"), **METHODS[name].fields)
    compare(roofline.SHAPES["large"], name, large)
    huge = dataclasses.replace(large, model=base.model.replace("base_patch16", "huge_patch14"), patch_size=14)
    compare(roofline.SHAPES["huge"], name, huge)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if not one.maps])
def test_the_rooflines_video_is_that_of_the_model(name: str) -> None:
    """At a mask ratio that masks as many in every frame slot as in the whole, which the teacher's looks see."""
    kind = "hpm_video" if METHODS[name].difficulty else "videomae"
    for size in ("base", "large"):
        made = recipes.from_name(f"{kind}_vit_{size}_ssv2_800e")
        made = dataclasses.replace(made, mask_ratio=0.75, **METHODS[name].fields)
        compare(dataclasses.replace(roofline.SHAPES[f"video_{size}"], masked=1176), name, made)


def test_the_roofline_prints_flops_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-B/16, by hand: MAE's three passes, 50 tokens of 768 in 12 blocks and 197 of 512 in 8, at 38 bytes."""
    roofline.main([])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    head, found = rows[0], {tuple(row[:2]): row[2:] for row in rows if len(row) == len(rows[0])}
    assert head[2:4] == ["GFLOP", "MB"]
    assert {name for _, name in found} >= set(METHODS)
    assert found["base", "mae"][1] == f"{3 * 38 * (50 * 768 * 12 + 197 * 512 * 8) / 1e6:.0f}"
    over = {name: found["base", name][head.index("over MAE, FLOPs") - 2] for name in METHODS}
    asked, kept, fast = (over[f"measured_{form}"] for form in ("alone", "maps", "fast"))
    assert (over["hpm"], asked, kept, fast) == ("2.34", "1.57", "1.06", "0.86")
