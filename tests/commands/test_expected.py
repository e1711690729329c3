"""What is predicted beside what is measured."""

import dataclasses
import re

import pytest
import torch

from fasthpm import recipes
from fasthpm.commands import expected, plan
from fasthpm.speed.gpus import GIB, GPUS
from fasthpm.speed.memory import CONTEXT

MEASURED = {"part": "step", "images_per_second": 100.0, "batch_size": 16, "memory_gib": 1.0}


@pytest.mark.parametrize(
    ("name", "memory", "said"),
    [
        (
            "NVIDIA H100 80GB HBM3",
            79,
            r"predicted  [\d.e+]+ images/s \(a model of h100, .*measured is \d+% of it; 0.\d GiB",
        ),
        ("Tesla T4", 15, r"predicted  0.\d GiB of GPU memory; measured .*: there is no data sheet of Tesla T4 here"),
    ],
)
def test_beside_what_is_measured_stands_what_is_predicted(
    name: str, memory: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a fake GPU."""
    size = memory * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    recipe = recipes.from_name("hpm_demo")
    line = expected.predict(recipe, MEASURED)
    assert re.search(said, line), line
    planned = plan.plan(dataclasses.replace(recipe, batch_size=16), GPUS["h100"], 1, 10**6, per_machine=1, network=1e9)
    share = round(100 * 1.0 / ((planned.memory - CONTEXT) / GIB))
    assert f"measured is {share}% of it" in line
