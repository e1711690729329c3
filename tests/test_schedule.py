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
