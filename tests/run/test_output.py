"""The opening words of a run."""

import dataclasses

import pytest

from fasthpm import recipes
from fasthpm.run.output import lag_of_teacher


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {},
            "the teacher averages over about 10,000 updates of 800 and will lag behind the student; "
            "--ema_momentum_end 0.992 suits so short a run",
        ),
        ({"ema_momentum_end": 1.0}, "the teacher averages over all updates of 800 "),
        ({"ema_momentum_end": 0.992}, ""),
        ({"ema_momentum_end": 0.998}, "about 500 updates of 800 "),
        ({"ema_ramp_epochs": 1000}, "about 1,098 updates of 800 "),  # as far as the ramp comes
        ({"mask_policy": "random"}, ""),  # nobody asks the teacher
        ({"epochs": 12}, ""),  # 96 updates: a trial
        ({"epochs": 4000}, ""),
    ],
)
def test_a_teacher_that_remembers_most_of_the_run_is_named(fields: dict[str, object], expected: str) -> None:
    given = {"ema_momentum": 0.999, "ema_momentum_end": 0.9999, "ema_ramp_epochs": 1, "epochs": 100, **fields}
    recipe = dataclasses.replace(recipes.from_name("debug"), batch_size=8, **given).resolve(64, 1)
    found = lag_of_teacher(recipe)
    assert expected in found
    assert bool(found) == bool(expected)
