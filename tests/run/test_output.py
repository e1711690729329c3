"""The opening words of a run."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasthpm import machine, recipes
from fasthpm.run.output import announce, emulation, lag_of_teacher, prepare_output


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


@pytest.mark.parametrize("kernels", [{}, {"8 x 4 x 13 x 32 bfloat16 training": "cudnn"}])
def test_the_kernels_of_attention_are_named(
    kernels: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there was a choice: on a GPU."""
    recipe = dataclasses.replace(recipes.debug(), output_dir=str(tmp_path)).resolve(64, 1)
    launch = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    step = SimpleNamespace(student=torch.nn.Linear(1, 1))
    run: Any = SimpleNamespace(recipe=recipe, launch=launch, step=step, attention=kernels, num_parameters=1)
    prepare_output(run)
    announce(run)
    assert json.loads((tmp_path / "versions.json").read_text()).get("attention", {}) == kernels
    assert ("attention: 8 x 4 x 13 x 32 bfloat16 training cudnn\n" in capsys.readouterr().err) is bool(kernels)


CPU, GPU = torch.device("cpu"), torch.device("cuda")
WITH, WITHOUT = "flags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", "flags\t\t: fpu avx avx2\n"


@pytest.mark.parametrize(
    ("device", "dtype", "processor", "said"),
    [
        (CPU, torch.bfloat16, WITHOUT, True),
        (CPU, torch.bfloat16, WITH, False),
        (CPU, torch.bfloat16, "Features\t: fp asimd sve bf16\n", False),  # ARM's name
        (CPU, torch.float32, WITHOUT, False),
        (GPU, torch.bfloat16, WITHOUT, False),
    ],
)
def test_a_cpu_that_emulates_bf16_is_said(
    device: torch.device, dtype: torch.dtype, processor: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpuinfo", lambda: processor)
    assert ("--deepspeed_config zero1_fp32 is fast here" in emulation(device, dtype)) is said
    assert bool(emulation(device, dtype)) is said


def test_a_run_says_so_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, of the weights that it trains, whatever the preset's name is."""
    monkeypatch.setattr(machine, "cpuinfo", lambda: WITHOUT)
    recipe = dataclasses.replace(recipes.debug(), output_dir=str(tmp_path)).resolve(64, 1)
    launch = SimpleNamespace(device=CPU, world_size=1)
    for dtype, times in ((torch.float32, 0), (torch.bfloat16, 1)):
        step = SimpleNamespace(student=torch.nn.Linear(1, 1, dtype=dtype))
        announce(SimpleNamespace(recipe=recipe, launch=launch, step=step, attention={}))  # type: ignore[arg-type]
        assert capsys.readouterr().err.count("emulates them, many times slower") == times
