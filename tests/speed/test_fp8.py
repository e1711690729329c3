"""Linear layers in 8 bits."""

import dataclasses

import pytest
import torch

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.speed import fp8


def test_fp8_layers_are_rounded_linear_layers() -> None:
    torch.manual_seed(0)
    layer, tokens = torch.nn.Linear(64, 32), torch.randn(2, 5, 64)
    names, before = list(layer.state_dict()), layer(tokens)
    with torch.no_grad():
        twin = fp8.linear_plain(tokens, layer.weight, layer.bias)
        assert fp8.use_fp8(layer) == 1
        got = layer(tokens)
        torch.testing.assert_close(got, twin, rtol=0.01, atol=0.01)  # of bfloat16
        torch.testing.assert_close(got, before, rtol=0.2, atol=0.2)
        assert not torch.equal(got, before)
        with fp8.exact(layer):
            assert torch.equal(layer(tokens), before)
        assert list(layer.state_dict()) == names


def test_fp8_is_refused_without_it() -> None:
    with pytest.raises(UserError, match=r"teacher_precision is fp8, but this device \(cpu\) has no 8-bit matrix"):
        fp8.require_fp8(torch.device("cpu"))


def test_eight_bits_are_refused_on_older_gpus_and_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if capability == (9, 0):
            fp8.require_fp8(torch.device("cuda"))
        else:
            with pytest.raises(UserError, match=r"this device \(an A100, compute capability 8\.0\) has no 8-bit"):
                fp8.require_fp8(torch.device("cuda"))
    with pytest.raises(UserError, match="int8"):
        dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e"), teacher_precision="int8")
