"""Plans: the batch that fits, figures that hang together, wrong input."""

import dataclasses
import json
from typing import Any

import pytest

from fasthpm import recipes
from fasthpm.commands import plan
from fasthpm.errors import UserError
from fasthpm.speed.gpus import GIB, GPUS

NUMBERS = ("num_samples", "batch_size", "global_batch_size", "epochs", "price", "gpus", "gpus_per_machine", "network")
DEBUG = ("debug", "--num_samples", "60000", "--global_batch_size", "1024")


def test_a_plan_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan.main([*DEBUG, "--gpus", "16", "--gpu", "h100", "--price", "2"])
    text = capsys.readouterr().out
    assert text.startswith("debug on 16 x h100 (zero1_bf16)\n")
    for part in ("64 per GPU x 16 GPUs x accum_iter 1 = 1024", "fits", "images/s per GPU", "GPU-hours", "at 2 each"):
        assert part in text
    assert "modelled, not measured" in text
    plan.main([*DEBUG, "--gpus", "16", "--gpu", "h100", "--json"])
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(found)
    assert found.samples_per_second == pytest.approx(1024 / found.step_seconds)
    epochs, updates = recipes.from_name("debug").epochs, 60000 // 1024
    assert found.epoch_seconds == pytest.approx(updates * found.step_seconds)
    assert found.gpu_hours == pytest.approx(16 * epochs * found.epoch_seconds / 3600)
    assert found.network_seconds == pytest.approx(found.network_bytes / 50e9)  # over machines


def test_the_largest_batch_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(recipes.from_name("debug"), global_batch_size=1024, batch_size=4)
    whole = plan.fitting_batch(recipe, GPUS["h100"], 2, 60000)
    assert whole.batch_size == 512
    found = plan.plan(whole, GPUS["h100"], 2, 60000, per_machine=8, network=1e9)
    assert found.fits
    small = dataclasses.replace(GPUS["h100"], memory=(found.memory - found.activations / 3) / plan.USABLE)
    less = plan.fitting_batch(recipe, small, 2, 60000)
    assert (less.batch_size, less.accum_iter) == (256, 0)
    assert plan.plan(less, small, 2, 60000, per_machine=8, network=1e9).fits
    assert not plan.plan(whole, small, 2, 60000, per_machine=8, network=1e9).fits
    with pytest.raises(UserError, match=r"debug does not fit a h100 of 0 GiB: .* take a GPU with more memory"):
        plan.fitting_batch(recipe, dataclasses.replace(small, memory=1e6), 2, 60000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debug", "--gpu", "h10"], "gpu is 'h10'; did you mean 'h100'?; expected one of a100"),
        ([*DEBUG, "--gpus", "0"], "gpus is 0, expected more than 0"),
        ([*DEBUG, "--gpus", "3"], "global_batch_size 1024 cannot be shared by 3 GPUs; take a number of GPUs"),
        ([*DEBUG, "--network", "nan"], "network is nan, expected a finite number"),
        (["hpm_demo"], "how many samples hpm_demo trains on is not known; give --num_samples or --data_path"),
        (["hpm_vit_bas", "--gpus", "1"], "did you mean 'hpm_vit_base_"),
        ([*DEBUG, "--batch_size", "100"], "100"),
        *((["debug", f"--{name}", "-5"], f"{name} is -5") for name in NUMBERS),
        ([*DEBUG, "--data_path", "/nowhere"], "--data_path has no effect here: --num_samples says"),
        ([*DEBUG, "--price", "2", "--json"], "--price has no effect here: --json prints"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        plan.main(arguments)
    assert message in str(raised.value)


def test_sets_are_known_by_the_names_of_recipes() -> None:
    sizes: dict[str, Any] = {
        name: plan.count_samples(recipes.from_name(name), 0) for name in recipes.RECIPES if "in1k" in name
    }
    assert set(sizes.values()) == {1_281_167}
    assert plan.count_samples(recipes.from_name("debug"), 7) == 7


def test_data_sheets_are_plausible() -> None:
    for gpu in GPUS.values():
        assert 20 * GIB < gpu.memory < 300 * GIB
        assert 50 < gpu.bf16 / gpu.bandwidth < 500  # operations per byte
        assert gpu.seconds(0, 0) < gpu.seconds(1e12, 0)
