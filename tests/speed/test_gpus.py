"""Which data sheet belongs to the GPU that is here."""

import pytest
import torch

from fasthpm.speed import gpus
from fasthpm.speed.gpus import GIB
from fasthpm.speed.memory import CONTEXT


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, None),  # less of everything
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8, None),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA B200", 178.4, "b200"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA RTX A6000", 47.5, "a6000"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA GeForce RTX 4090 D", 23.5, None),
        ("Tesla T4", 14.6, None),
    ],
)
def test_a_gpu_is_known_by_the_name_and_memory_that_its_driver_says(
    name: str, gib: float, expected: str | None
) -> None:
    found = gpus.known_as(name, gib * GIB)
    assert (found and found.name) == expected


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "Something Else"])
def test_of_a_gpu_that_others_use_too_the_rest_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake GPU of 80 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 79 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu, known = gpus.installed(torch.device("cuda", 0))
    assert gpu.memory == 40 * GIB + CONTEXT
    assert known == (gpu.name == "h100")
    assert gpu.seconds(1e12, 1e9) == pytest.approx(max(gpu.seconds(1e12, 0), gpu.seconds(0, 1e9)))
    assert known or gpu.seconds(1e15, 1e12) == gpus.LAUNCH
