"""Which patches are masked. Batched on the device, exact counts for every sample, no host synchronisation.

Letters: B batch, L patches, M masked, V = L - M visible. A mask is bool [B, L], True = masked.
"""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def num_masked(num_patches: int, mask_ratio: float) -> int:
    """M = L - int(L(1 - mask_ratio)), truncated in floating point as the released code does it."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def easy_to_hard_mask(
    difficulty: Tensor,
    mask_ratio: float,
    alpha: float | Tensor,
    *,
    generator: torch.Generator | None = None,
    groups: int = 1,
    easiest: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """Mask the int(M·alpha) hardest patches of every sample, and M - int(M·alpha) others uniformly at random.

    CVPR 3.4 and Eq. 8. Ties in `difficulty` are broken at random, so a constant difficulty gives random masks.

    - `difficulty`: [B, L], higher is harder; ranked in float32
    - `alpha`: share of the mask chosen by difficulty, 0 (random masking) to 1; a 0-dim tensor avoids recompilation
    - `groups`: split L into this many equal slots (the frames of a video) and mask each on its own
    - `easiest`: choose the easiest instead of the hardest (the papers' argmin row)
    - `noise`: [2, B, L] uniform numbers in [0, 1) to use instead of `generator` (see `sample_noise`)

    **Returns:** bool [B, L], True = masked, exactly M per group. **Raises:** `ValueError` if L does not split into
    `groups`.
    """
    batch, length = difficulty.shape
    if length % groups:
        raise ValueError(f"{length} patches do not split into {groups} groups")
    slots = length // groups
    if noise is None:
        noise = torch.rand(2, batch, length, device=difficulty.device, generator=generator)
    tie_noise, rest_noise = noise.reshape(2, batch * groups, slots)
    scores = difficulty.float().reshape(batch * groups, slots)
    masked = num_masked(slots, mask_ratio)
    hard = _hardest(-scores if easiest else scores, _share(masked, alpha), tie_noise)
    # Noise is below 1, so hard patches come first and the others follow in uniformly random order.
    order = (rest_noise + hard).argsort(dim=1, descending=True)
    mask = torch.zeros_like(hard).scatter_(1, order[:, :masked], True)
    return mask.reshape(batch, length)


def random_mask(noise: Tensor, mask_ratio: float) -> Tensor:
    """MAE's mask: the int(L(1 - mask_ratio)) patches with the smallest `noise` [B, L] stay visible. bool [B, L]."""
    visible = noise.shape[1] - num_masked(noise.shape[1], mask_ratio)
    ids = noise.argsort(dim=1)[:, :visible]
    return torch.ones_like(noise, dtype=torch.bool).scatter_(1, ids, False)


def split_ids(mask: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Patch numbers of a mask [B, L] with `masked` True per row: (visible [B, V], masked [B, M]), each ascending."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : mask.shape[1] - masked], order[:, mask.shape[1] - masked :]


def sample_noise(seed: int, step: Tensor, ids: Tensor, num_patches: int, draws: int = 2) -> Tensor:
    """Uniform noise that depends on (seed, step, sample id, patch, draw) alone, so any number of ranks agrees.

    - `step`: int64 0-dim, the update; `ids`: int64 [B], each sample's number in the data set

    **Returns:** float32 [draws, B, num_patches] in [0, 1), with 24 random bits. A counter-based hash (Murmur3's
    32-bit finaliser, applied once per word), not a random stream: nothing to save, nothing to keep in step.
    """
    patch = torch.arange(draws * num_patches, device=ids.device).reshape(draws, 1, num_patches)
    key = _mix(_mix(_mix(torch.full_like(step, (seed ^ 0x9E3779B9) & _LOW_32)) ^ (step & _LOW_32)))
    per_sample = _mix(key ^ _mix(ids & _LOW_32))
    return (_mix(per_sample[None, :, None] ^ _mix(patch + 0x7F4A7C15)) >> 8).float() * 2.0**-24


def _share(masked: int, alpha: float | Tensor) -> int | Tensor:
    """int(M·alpha), computed in float64 on the host or on the device alike."""
    return (alpha.double() * masked).floor().long() if isinstance(alpha, Tensor) else int(masked * alpha)


def _hardest(scores: Tensor, count: int | Tensor, tie_noise: Tensor) -> Tensor:
    """bool [B, L]: the `count` highest scores of each row, ties in the order of `tie_noise`."""
    shuffled = tie_noise.argsort(dim=1)
    order = scores.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    chosen = (torch.arange(scores.shape[1], device=scores.device) < count).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, shuffled.gather(1, order), chosen)


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) in which every input bit moves every output bit."""
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _LOW_32
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _LOW_32
    return word ^ (word >> 16)
