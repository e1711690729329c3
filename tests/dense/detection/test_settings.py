"""Recipes of detection: the published numbers, and what is refused."""

from typing import Any

import pytest

from fasthpm.dense.detection.settings import RECIPES, Detect
from fasthpm.errors import UserError


def test_recipes_say_where_their_numbers_are_from() -> None:
    for name, recipe in RECIPES.items():
        made = recipe()
        text = recipe.__doc__ or ""
        assert isinstance(made, Detect)
        assert "Ours: not yet run" in text or "ours: see docs/dense.md" in text, name
        assert "[ours]" in text or "[released code]" in text
        assert made.global_batch_size % made.batch_size == 0


def test_vitdets_schedule() -> None:
    """184,375 updates of 64, a tenth at 163,889 and 177,546 (detectron2)."""
    long = RECIPES["maskrcnn_vit_base_coco_100e"]()
    assert (long.steps, long.global_batch_size, long.lr) == (184_375, 64, 1e-4)
    assert abs(long.drops[0] - 163_889) < 10
    assert abs(long.drops[1] - 177_546) < 10
    assert long.lr_at(0) == pytest.approx(1e-7)
    assert long.lr_at(250) == long.lr_at(160_000) == 1e-4
    assert long.lr_at(170_000) == pytest.approx(1e-5)
    assert long.lr_at(180_000) == pytest.approx(1e-6)
    assert (long.window, long.side, long.layer_decay, long.weight_decay, long.drop_path) == (14, 1024, 0.7, 0.1, 0.1)


def test_the_papers_schedule_is_twelve_epochs() -> None:
    short = RECIPES["maskrcnn_vit_base_coco_12e"]()
    assert (short.steps, short.global_batch_size, short.lr) == (88_500, 16, 4e-5)
    lvis = RECIPES["maskrcnn_vit_base_lvis"]()
    assert (lvis.loss, lvis.repeat_threshold, lvis.limits) == ("federated", 0.001, (0.02, 300))
    assert short.limits == (0.05, 100)
    assert Detect(score=0.3, detections=7).limits == (0.3, 7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"input_size": "96x128"}, "give one side"),
        ({"scale_min": 2.5}, "at most scale_max 2"),
        ({"loss": "sigmoid"}, "expected one of softmax, federated"),
        ({"heads": "large"}, "expected one of vitdet, small"),
        ({"score": 1.0}, "less than 1"),
        ({"window": -1}, "0 or more"),
    ],
)
def test_wrong_values_are_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Detect(**values)
