"""The linear classifier on frozen features: its norm, its layer, and how the published protocols train them."""

import math

import torch
import torch.distributed as dist
from timm.optim import Lars
from torch import Tensor, nn

EPS = 1e-6  # of the BatchNorm (MAE)


class FeatureNorm(nn.Module):
    """BatchNorm without weights, over the batch of all ranks; the features that it sees are constants.

    (The published probes normalise each device's batch by itself; this one is the same for any number of ranks.)
    """

    mean: Tensor
    var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """float32 [B, D] -> [B, D]; in training by the batch's mean and variance, else by their running averages."""
        if not self.training:
            return (rows - self.mean) * (self.var + EPS).rsqrt()
        size = rows.shape[1]
        exact = rows.double()
        sums = torch.cat([exact.sum(0), (exact**2).sum(0), exact.new_full((1,), len(rows))])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        count = sums[-1]
        mean = sums[:size] / count
        var = (sums[size:-1] / count - mean**2).clamp_min(0)
        self.mean.lerp_(mean.float(), self.momentum)
        self.var.lerp_((var * count / (count - 1).clamp_min(1)).float(), self.momentum)
        return (rows - mean.float()) * (var.float() + EPS).rsqrt()


class LinearHead(nn.Module):
    """`FeatureNorm`, then a linear layer (weights N(0, 0.01), as MAE and MoCo v3)."""

    def __init__(self, dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm, self.linear = FeatureNorm(dim), nn.Linear(dim, num_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [B, D] -> logits [B, K]."""
        return self.linear(self.norm(rows))


def build_optimizer(head: nn.Module, protocol: str) -> torch.optim.Optimizer:
    """LARS as MAE's linear probe has it, or SGD; momentum 0.9, no weight decay.

    timm's LARS scales every tensor; MAE leaves 1-D ones (the bias) alone, hence two groups.
    """
    parameters = list(head.parameters())
    if protocol == "moco":
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "always_adapt": False},
    ]
    return Lars(groups, lr=1.0, momentum=0.9, weight_decay=0.0, trust_coeff=0.001)


def lr_at(epoch: float, lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up, then half a cosine to 0; `epoch` may be a fraction (MAE)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))
