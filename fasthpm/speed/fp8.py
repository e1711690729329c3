"""The teacher's matrix products in 8-bit floating point, on GPUs that have them (compute capability 8.9 and up).

Only the order of difficulties matters to the masks, so its products may be coarser than the student's. Scales are
taken anew in every call, one for the weights and one for the inputs; `linear_plain` is the slow twin.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
CAPABILITY = (8, 9)
MULTIPLE = 16  # sides of the matrices that the kernel takes


class Fp8Linear(nn.Linear):
    """`nn.Linear` in 8 bits: the same parameters, forward only."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., D']."""
        (inputs, scale), (weight, weight_scale) = quantize(tokens.flatten(0, -2)), quantize(self.weight)
        out = torch._scaled_mm(
            inputs,
            weight.t(),
            scale_a=scale,
            scale_b=weight_scale,
            bias=self.bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
        )
        return out.unflatten(0, tokens.shape[:-1]).to(tokens.dtype)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit values and the float32 number that they are to be multiplied with."""
    scale = values.abs().amax().float().clamp_min(1e-12) / LARGEST
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def linear_plain(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`Fp8Linear` in float32 arithmetic on the same rounded values."""
    (inputs, scale), (rounded, weight_scale) = quantize(tokens), quantize(weight)
    return F.linear(inputs.float() * scale, rounded.float() * weight_scale, bias.float())


def use_fp8(module: nn.Module) -> int:
    """Let the plain linear layers of `module` compute in 8 bits; parameters stay where they are.

    **Returns:** how many do; layers whose sides are no multiples of 16, and all others, stay as they are.
    """
    found = [layer for layer in module.modules() if type(layer) is nn.Linear and _fits(layer)]
    for layer in found:
        layer.__class__ = Fp8Linear
    return len(found)


@contextmanager
def exact(module: nn.Module) -> Iterator[None]:
    """Let the layers that `use_fp8` changed compute as they did before."""
    changed = [layer for layer in module.modules() if type(layer) is Fp8Linear]
    for layer in changed:
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in changed:
            layer.__class__ = Fp8Linear


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0 and layer.bias is not None


def require_fp8(device: torch.device) -> None:
    """**Raises:** `UserError` on a device without 8-bit matrix products."""
    found = str(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
    raise UserError(
        f"teacher_precision is fp8, but this device ({found}) has no 8-bit matrix products, expected a GPU of compute "
        f"capability {CAPABILITY[0]}.{CAPABILITY[1]} or more; use --teacher_precision model"
    )
