"""Attention kernels: which one is chosen, and that a pinned one is what computes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fasthpm import layers
from fasthpm.layers import Attended, Attention, CrossAttention, attend, attend_plain
from fasthpm.speed import attention

CPU = torch.device("cpu")
SELF = Attended((2, 3, 5, 8), (2, 3, 9, 8), torch.float32, training=True)
CROSS = Attended((2, 3, 9, 8), (2, 3, 5, 8), torch.float32, training=False)


@pytest.fixture(autouse=True)
def nothing_pinned() -> Iterator[None]:
    layers.PINNED.clear()
    yield
    layers.PINNED.clear()


def test_the_fastest_is_chosen_and_noise_does_not_decide() -> None:
    assert attention.fastest({}) == ""
    assert attention.fastest({"flash": 1.0, "cudnn": 0.98, "efficient": 0.99}) == "flash"
    assert attention.fastest({"flash": 1.0, "cudnn": 0.9, "efficient": 0.89}) == "cudnn"
    assert attention.fastest({"flash": 1.0, "cudnn": 0.9, "efficient": 0.5}) == "efficient"


def test_what_is_asked_for_is_chosen_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With times that were never taken: there is no GPU."""
    times = {(SELF, "flash"): 2.0, (SELF, "cudnn"): 1.0, (SELF, "efficient"): 3.0, (CROSS, "efficient"): 1.0}
    times |= {(SELF, "math"): 0.1, (CROSS, "math"): 0.1}
    monkeypatch.setattr(attention, "seconds_of", lambda shape, name, device: times.get((shape, name)))
    monkeypatch.setattr(attention, "torchs", lambda shape, device: "flash" if shape == SELF else "efficient")
    monkeypatch.setattr(attention, "allowed", lambda name: True)
    assert attention.choose("auto", [SELF, CROSS], CPU, {}) == {SELF: "cudnn", CROSS: "efficient"}
    assert attention.choose("math", [SELF, CROSS], CPU, {attention.name_of(SELF): "flash"}) == {
        SELF: "math",
        CROSS: "math",
    }
    assert capsys.readouterr().err == ""
    choice = attention.choose("cudnn", [SELF, CROSS], CPU, {})
    assert choice == {SELF: "cudnn", CROSS: "efficient"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "note: attention_backend cudnn cannot compute all shapes here; torch chooses for 2 x 3 x 9 of 5 x 8 float32 "
        "forward by efficient"
    )
    attention.pin(choice, CPU)
    assert layers.PINNED == {SELF: SDPBackend.CUDNN_ATTENTION}  # of the other torch thinks the same
    attention.pin({SELF: "flash"}, CPU)
    assert layers.PINNED == {}
    monkeypatch.setattr(attention, "allowed", lambda name: name != "cudnn")
    assert attention.choose("auto", [SELF], CPU, {}) == {SELF: "flash"}
    known = {attention.name_of(SELF): "efficient", attention.name_of(CROSS): "flash"}
    assert attention.choose("auto", [SELF, CROSS], CPU, known) == {SELF: "efficient", CROSS: "efficient"}


def test_a_pinned_kernel_computes_and_only_for_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = layers.sdpa_kernel
    monkeypatch.setattr(layers, "sdpa_kernel", lambda backend: used.append(backend) or real(backend))
    layers.PINNED[SELF] = SDPBackend.MATH
    for shape, pinned in ((SELF, [SDPBackend.MATH]), (CROSS, []), (SELF._replace(training=False), [])):
        leaves, inputs = attention.inputs_of(shape, CPU)
        fast, slow = attend(*inputs), attend_plain(*inputs)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
        if shape.training:
            gradients = [torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (fast, slow)]
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
        assert used == pinned
        used.clear()


def test_pinned_kernels_compile() -> None:
    layers.PINNED[SELF] = SDPBackend.MATH
    (qkv,), inputs = attention.inputs_of(SELF, CPU)

    def run(qkv: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        return attend(query[:, :, 4:], key, value)

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), attend_plain(*inputs), rtol=1e-5, atol=1e-6)


def test_what_is_timed_lies_in_memory_as_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(layers, "attend", lambda *inputs: given.append(inputs) or attend_plain(*inputs))
    Attention(24, 3)(torch.zeros(2, 9, 24), 5)
    with torch.no_grad():
        CrossAttention(24, 3)(torch.zeros(2, 9, 24), torch.zeros(2, 5, 24))
    for shape, inputs in zip((SELF, CROSS), given, strict=True):
        assert layers.attended(*inputs[:2]) == shape
        for ours, theirs in zip(attention.inputs_of(shape, CPU)[1], inputs[:3], strict=True):
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
            assert ours.requires_grad == theirs.requires_grad
