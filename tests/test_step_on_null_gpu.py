"""What an update asks of a GPU: waits, launches, memory. On a fake that counts and does nothing (tests/nullgpu)."""

import json
from typing import Any

import pytest

from tests.helpers.budgets import BUDGETS
from tests.helpers.null_gpu import run_on_null_gpu

ZERO = {  # presets whose update must not wait, in every way that it may be made
    f"{preset}, {accum_iter} micro-steps": {"recipe": "debug", "deepspeed_config": preset, "accum_iter": accum_iter}
    for preset in ("zero1_bf16", "zero2_bf16")
    for accum_iter in (1, 2)
}
WAITS: dict[str, Any] = {"zero0_bf16": {"recipe": "debug", "deepspeed_config": "zero0_bf16"}}  # one that does


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """By case: what its third update asked of the GPU."""
    cases = WAITS | {name: {"recipe": name} for name in BUDGETS} | ZERO  # what looks at values first, while they are 0
    found = run_on_null_gpu("tests.nullgpu.update", json.dumps(list(cases.values())))
    return dict(zip(cases, found["cases"], strict=True))


@pytest.mark.parametrize("case", [*BUDGETS, *ZERO])
def test_no_update_waits(asked: dict[str, Any], case: str) -> None:
    """Neither for the device nor for a stream nor for an event; and nothing is copied between host and device."""
    assert asked[case]["who"] == {}
    assert sum(asked[case]["waits"].values()) == 0
    assert set(asked[case]["copies"]) <= {"cudaMemcpyAsync device>device"}


def test_waits_are_seen(asked: dict[str, Any]) -> None:
    """And who waits."""
    assert asked["zero0_bf16"]["waits"]["stream"] > 0
    assert all("deepspeed/" in place for place in asked["zero0_bf16"]["who"])


@pytest.mark.parametrize("recipe", BUDGETS)
def test_launches_stay_within_the_budget(asked: dict[str, Any], recipe: str) -> None:
    assert 0.9 * BUDGETS[recipe].launches <= asked[recipe]["launches"] <= BUDGETS[recipe].launches


@pytest.mark.parametrize("recipe", BUDGETS)
def test_memory_is_as_in_the_budget(asked: dict[str, Any], recipe: str) -> None:
    """With which tests/commands/test_dry_run.py compares what `fasthpm plan` says."""
    assert asked[recipe]["peak"] / 2**30 == pytest.approx(BUDGETS[recipe].gib, rel=0.01)


def test_a_micro_step_more_launches_no_update_more(asked: dict[str, Any]) -> None:
    for preset in ("zero1_bf16", "zero2_bf16"):
        one, two = (asked[f"{preset}, {count} micro-steps"] for count in (1, 2))
        assert two["phases"]["step"] == one["phases"]["step"] < 40
        assert two["launches"] < 2 * one["launches"]
