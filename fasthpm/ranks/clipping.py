"""Clipping the gradient of every parameter by its own norm (DINO, iBOT), whatever share of it a rank holds."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm.ranks.zero import CLIP_EPS, Group, MasterLayout


def clip_each(engine: Any, limit: float) -> None:
    """Have every update of `engine` scale each parameter's gradient down to a norm of `limit` at most.

    In float32, on the masters' gradients, right before the optimizer's step. Parameters that are sharded have the norm
    of all their parts (collective). Nothing waits for the device.
    """
    layout = MasterLayout(engine)
    groups = {id(group.master): group for group in layout.groups}

    @torch.no_grad()
    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for master in [master for group in optimizer.param_groups for master in group["params"]]:
            if master.grad is not None:
                _clip(groups[id(master)], master.grad, limit, layout.process_group)

    layout.optimizer.register_step_pre_hook(clip)


def _clip(group: Group, gradient: Tensor, limit: float, ranks: dist.ProcessGroup) -> None:
    flat = gradient.view(-1)
    parts = [flat[group.span(slot)] for slot in group.slots]
    squares = torch.stack(torch._foreach_norm(parts)).square()  # an empty part has norm 0
    if group.shards > 1:
        dist.all_reduce(squares, group=ranks)
    factors = (limit / (squares.sqrt() + CLIP_EPS)).clamp_max(1.0)
    torch._foreach_mul_(parts, list(factors.unbind()))
