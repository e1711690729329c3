"""Masks whose count is drawn anew for every image (iBOT): none for some images, a random share for the others.

No host synchronisation: the numbers of masked patches stay on the device, and whoever needs the patches takes the
largest number that there can be, with a mark of which are meant.

Letters: B images, L patches, N the most that can be masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fasthpm.mask import MaskPlan, blockwise_mask
from fasthpm.mask_loops import highest

COUNTED_POLICIES = ("random", "blockwise", "hpm", "hpm_easiest")  # those that can mask any number


@dataclass(frozen=True)
class CountPlan:
    """How counts are drawn: 0 with a chance of `unmasked_share`, else a share uniform in `ratio` ± `spread` of the
    patches, rounded down."""

    ratio: float
    spread: float
    unmasked_share: float
    num_patches: int

    @property
    def most(self) -> int:
        """N."""
        return int(self.num_patches * (self.ratio + self.spread) + 1e-9)

    def draw(self, numbers: Tensor) -> Tensor:
        """Counts, int64 [B, 1], from two uniform numbers of every image, [B, 2]."""
        share = self.ratio + self.spread * (2 * numbers[:, 1:].double() - 1)
        count = (self.num_patches * share + 1e-9).floor().long().clamp_max(self.most)
        return torch.where(numbers[:, :1] < self.unmasked_share, 0, count)


def counted_mask(plan: MaskPlan, counts: Tensor, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Tensor:
    """One mask per image with `counts` [B, 1] patches, drawn as the plan's policy draws: bool [B, L].

    - `noise`: [2, B, plan.noise_size] in [0, 1); `scores`: [B, L], difficulty for the policies that follow it
    - `alpha`: the share of each image's count that follows the difficulty, rounded down
    """
    length = plan.num_patches
    if plan.policy == "random":
        return highest(noise[0, :, :length], counts)
    if plan.policy == "blockwise":
        return blockwise_mask(noise[0], plan.grid_size, counts)
    asked = (counts.double() * alpha).floor().long()
    hard = highest(-scores if plan.policy == "hpm_easiest" else scores, asked, noise[0, :, :length])
    return highest(hard, counts, noise[1, :, :length])


def masked_places(mask: Tensor, most: int) -> Tensor:
    """Patch numbers of the masked patches in ascending order, then of others: int64 [B, most]."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def ranking_loss_of(predicted: Tensor, actual: Tensor, valid: Tensor) -> Tensor:
    """`loss.ranking_loss` over the patches that are `valid`, bool [B, N]; the other arguments are [B, N] too."""
    predicted, actual = predicted.float(), actual.detach().float()
    harder = (actual[:, :, None] > actual[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    margin = predicted[:, :, None] - predicted[:, None, :]
    return (torch.nn.functional.softplus(-margin) * harder).sum() / harder.sum().clamp_min(1)


@torch.no_grad()
def spearman_of(predicted: Tensor, actual: Tensor, valid: Tensor) -> Tensor:
    """`loss.spearman` over the `valid` patches, images with fewer than two left out; [B, N] each."""
    last = [values.float().masked_fill(~valid, torch.inf) for values in (predicted, actual)]
    ranks = [values.argsort(dim=1).argsort(dim=1).float() for values in last]
    count = valid.sum(dim=1)
    distance = ((ranks[0] - ranks[1]).square() * valid).sum(dim=1)
    each = 1 - 6 * distance / (count * (count**2 - 1)).clamp_min(1)
    some = count > 1
    return (each * some).sum() / some.sum().clamp_min(1)
