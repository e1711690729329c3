"""Batch normalisation that all ranks share, and whose statistics stay in float32 under DeepSpeed.

mmseg normalises with SyncBN. torch's knows GPUs only, so there is one here that runs wherever the ranks can talk; a
test holds it to plain batch normalisation of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SharedNorm(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over the batches of all ranks together.

    It computes in float32 at least and keeps its running statistics so: where DeepSpeed casts a module to bfloat16,
    a running mean that moves by a tenth of the difference would soon stand still.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], of the same dtype."""
        mean: Any = self.running_mean
        variance: Any = self.running_var
        scale, shift = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        step = self.momentum or 0.0
        if not self.training or world_size() == 1:
            return F.batch_norm(maps, mean, variance, scale, shift, self.training, step, self.eps)
        out, seen_mean, seen_variance = _Shared.apply(maps, scale, shift, self.eps)
        mean.lerp_(seen_mean, step)
        variance.lerp_(seen_variance, step)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharedNorm":
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.is_floating_point() and after.dtype.itemsize < 4:
                self._buffers[name] = before.to(after.device)
        return self


class _Shared(torch.autograd.Function):
    """Batch normalisation by mean and variance over all ranks: one small all-reduce each way.

    Gradients of scale and shift are those of the rank's own maps, as those of all other weights: the engine averages
    them over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = maps.to(scale.dtype)
        count, mean, squares = _combine(*_own_moments(wide))
        inverse = (squares / count + eps).rsqrt()
        out = (wide - _spread(mean)) * _spread(inverse * scale) + _spread(shift)
        ctx.save_for_backward(maps, scale, mean, inverse, count)
        variance = squares / (count - 1)
        ctx.mark_non_differentiable(mean, variance)
        return out.to(maps.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        maps, scale, mean, inverse, count = ctx.saved_tensors
        wide = grad.to(scale.dtype)
        normal = (maps.to(scale.dtype) - _spread(mean)) * _spread(inverse)
        own = torch.stack([wide.sum((0, 2, 3)), (wide * normal).sum((0, 2, 3))])
        everyone = own.clone()
        dist.all_reduce(everyone)
        of_shift, of_scale = everyone / count
        found = (wide - _spread(of_shift) - normal * _spread(of_scale)) * _spread(inverse * scale)
        return found.to(maps.dtype), own[1], own[0], None


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _own_moments(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values per channel (the same number in all), their mean and squared deviations from it: each [C]."""
    mean = maps.mean((0, 2, 3))
    squares = (maps - _spread(mean)).square().sum((0, 2, 3))
    return torch.full_like(mean, maps.numel() // maps.shape[1]), mean, squares


def _combine(*own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_own_moments` of all ranks as those of all their values (Chan et al.)."""
    table = torch.zeros(world_size(), *torch.stack(own).shape, dtype=own[0].dtype, device=own[0].device)
    table[dist.get_rank()] = torch.stack(own)
    dist.all_reduce(table)
    counts, means, squares = table.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return count, mean, (squares + counts * (means - mean).square()).sum(0)


def _spread(channels: Tensor) -> Tensor:
    return channels[:, None, None]
