"""Learning rate, momentum and the share of hard patches against `reference.py` and published grids."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasthpm import schedule
from fasthpm.recipe import Recipe
from tests.helpers import reference


def resolved(**changes: object) -> Recipe:
    """A recipe with 100 updates per epoch."""
    return dataclasses.replace(Recipe(batch_size=8), **changes).resolve(800, 1)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(step=st.integers(0, 19999), start=st.floats(0, 1), end=st.floats(0, 1))
def test_schedules_are_the_equations(step: int, start: float, end: float) -> None:
    recipe = resolved(alpha_start=start, alpha_end=end, lr=1e-3, min_lr=1e-5)
    epoch = step // 100
    assert schedule.alpha_at(recipe, step) == pytest.approx(reference.alpha(epoch, 200, start, end))
    for kind, share in (("paper", epoch / 200), ("step", step / 20_000)):
        other = dataclasses.replace(recipe, alpha_schedule=kind)
        assert schedule.alpha_at(other, step) == pytest.approx(start + share * (end - start))
    assert schedule.lr_at(recipe, step) == pytest.approx(reference.lr(step / 100, 1e-3, 1e-5, 40, 200), rel=1e-12)
    want = 0.999 + epoch / 100 * (0.9999 - 0.999) if epoch < 100 else 0.9999
    assert schedule.ema_momentum_at(recipe, step) == pytest.approx(want, rel=1e-12)


def test_lr_matches_the_published_grids() -> None:
    cases = json.loads((Path(__file__).parent / "golden" / "manifest.json").read_text())["cases"]
    grids = next(case for case in cases if case["name"] == "mae_schedules")["lr_schedules"]
    for name in ("pretrain_mae_800", "pretrain_hpm_200"):
        grid = grids[name]
        recipe = dataclasses.replace(
            Recipe(),
            lr=grid["lr"],
            min_lr=grid["min_lr"],
            warmup_epochs=float(grid["warmup_epochs"]),
            epochs=grid["epochs"],
            steps_per_epoch=1000,
        )
        for epoch, want, _ in grid["points"]:
            assert schedule.lr_at(recipe, round(epoch * 1000)) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_without_a_ramp_the_momentum_is_the_last_one_from_the_start() -> None:
    recipe = resolved(ema_momentum=0.9, ema_momentum_end=0.99, ema_ramp_epochs=0)
    assert [schedule.ema_momentum_at(recipe, step) for step in (0, 150, 19999)] == [pytest.approx(0.99)] * 3


def test_rates_by_cosine_go_from_the_first_value_to_the_last() -> None:
    """DINO's and iBOT's: half a cosine over all updates; without an end the weight decay stays."""
    changes = {"ema_schedule": "cosine", "ema_momentum": 0.996, "ema_momentum_end": 1.0}
    recipe = resolved(**changes, weight_decay=0.04, weight_decay_end=0.4)
    last = recipe.total_steps
    for share, momentum, decay in ((0, 0.996, 0.04), (0.25, 0.996586, 0.092721), (0.5, 0.998, 0.22), (1, 1.0, 0.4)):
        assert schedule.ema_momentum_at(recipe, int(share * last)) == pytest.approx(momentum, abs=1e-6)
        assert schedule.weight_decay_at(recipe, int(share * last)) == pytest.approx(decay, abs=1e-6)
    assert {schedule.weight_decay_at(resolved(), step) for step in (0, 9999, 19999)} == {0.05}
