"""Patch targets, reconstruction loss and the two difficulty losses. B batch, M masked patches.

All in float32 whatever the forward pass ran in (and in float64 if it did).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthpm.kernels import launched
from fasthpm.mask_loops import on_cpu

EPS = 1e-6
# Pairs that `pair_blocks` holds at a time: 1 MiB of float32 on a CPU (about a core's cache), fewer launches elsewhere.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 25  # 128 MiB: two or three blocks for a batch of clips, one for images


def full_precision(values: Tensor) -> Tensor:
    """`values` in float32, or as they are if they have more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pixel_target(patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """Targets [B, M, P*P*C] from normalised pixels of the same shape.

    `norm_pix_loss`: (x - mean)/sqrt(unbiased variance + 1e-6) of each patch over all its values (MAE).
    """
    patches = full_precision(patches)
    if not norm_pix_loss:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + EPS).rsqrt()


def channelwise_target(patches: Tensor, channels: int, eps: float = EPS) -> Tensor:
    """Targets [B, M, t*P*P*C] of VideoMAE: (x - mean)/(std + eps) of each patch over its values of each channel.

    - `patches`: normalised pixels, the last index the channel; `eps`: on their scale
    """
    values = full_precision(patches).unflatten(-1, (-1, channels))
    std, mean = torch.std_mean(values, dim=-2, keepdim=True)
    return ((values - mean) / (std + eps)).flatten(-2)


def patch_loss(prediction: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Reconstruction loss of every patch (Eq. 3): [B, M] from two [B, M, P*P*C].

    `kind`: "mse", the mean squared difference (MAE, HPM), or "l1", the mean absolute difference (SimMIM).
    """
    difference = full_precision(prediction) - target
    return (difference.square() if kind == "mse" else difference.abs()).mean(dim=-1)


def feature_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Reconstruction loss of every patch's features: [B, M] from two [B, M, D'].

    The squared distance of both after L2 normalisation, which is 2 - 2·cos (CVPR 4.2; released code: no centring, no
    LayerNorm) unless a vector is all zeros, which stays what it is: 1 from any direction. The gradient reaches
    `prediction` only.
    """
    directions = (F.normalize(full_precision(values), dim=-1) for values in (prediction, target.detach()))
    return (next(directions) - next(directions)).square().sum(dim=-1)


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every patch's token (BEiT): [B, M] from logits [B, M, K] and ids, int64 [B, M] in 0..K-1."""
    found = F.cross_entropy(full_precision(logits).flatten(0, 1), ids.flatten(), reduction="none")
    return found.unflatten(0, ids.shape)


def distribution_loss(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy of every patch against a distribution (iBOT): [B, M] from two [B, M, K].

    The gradient reaches `logits` only.
    """
    return -(full_precision(probabilities.detach()) * full_precision(logits).log_softmax(dim=-1)).sum(dim=-1)


def ranking_loss(predicted: Tensor, actual: Tensor) -> Tensor:
    """Relative difficulty loss (Eq. 5-7): is patch i of an image harder than patch j?

    Binary cross-entropy with logits predicted_i - predicted_j against [actual_i > actual_j], averaged over all
    pairs of all images whose actual losses differ; 0 where there is no such pair. The gradient reaches `predicted`
    only. The released code computes log(sigmoid(x) + 1e-6), which caps a pair at 13.8 and loses the gradient of
    badly ordered pairs; here it is the exact log-sigmoid.

    Nothing of size [B, M, M] is stored: see `pair_blocks`.

    - `predicted`, `actual`: [B, M]

    **Returns:** a scalar.
    """
    return _RankingLoss.apply(full_precision(predicted), full_precision(actual.detach()))


def ranking_loss_plain(predicted: Tensor, actual: Tensor) -> Tensor:
    """`ranking_loss` as written, in some ten tensors of [B, M, M]."""
    predicted, actual = full_precision(predicted), full_precision(actual.detach())
    # (i, j) and (j, i) say the same, so the sign folds Eq. 5's two terms into one.
    sign = torch.sign(actual[:, :, None] - actual[:, None, :])
    margin = sign * (predicted[:, :, None] - predicted[:, None, :])
    valid = sign != 0
    return (F.softplus(-margin) * valid).sum() / valid.sum().clamp_min(1)


def pair_blocks(predicted: Tensor, actual: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """All pairs of patches of an image, each once, in blocks of bounded size.

    - `predicted`, `actual`: [B, M], every row sorted by descending `actual`

    **Yields:** rows i, columns j, margin = predicted_i - predicted_j and valid = [actual_i > actual_j], both
    [B, rows, columns]. i = j and pairs of equal losses are not valid.
    """
    batch, count = predicted.shape
    elements = BLOCK_ELEMENTS["cpu"] if on_cpu(predicted) else BLOCK_ELEMENTS_ELSEWHERE
    height = max(1, min(count, elements // max(batch * count, 1)))
    for first in range(0, count - 1, height):
        rows, columns = slice(first, min(first + height, count)), slice(first, count)
        margin = predicted[:, rows, None] - predicted[:, None, columns]
        yield rows, columns, margin, actual[:, rows, None] > actual[:, None, columns]


class _RankingLoss(torch.autograd.Function):
    """Value and gradient in one pass over the pairs, so that the backward pass is a product with a number."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, actual: Tensor) -> Tensor:
        value, slope = (_ranking_blocks if on_cpu(predicted) else _ranking)(predicted, actual)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


def _ranking_blocks(predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """`ranking_loss` and its derivatives [B, M] by `predicted`, a block of pairs at a time."""
    ordered, ids = actual.sort(dim=1, descending=True)
    scores = predicted.gather(1, ids)
    slope = torch.zeros_like(scores)
    total = scores.new_zeros((), dtype=torch.float64)
    pairs = torch.zeros((), dtype=torch.int64, device=scores.device)
    for rows, columns, margin, valid in pair_blocks(scores, ordered):
        total += F.softplus(-margin).mul_(valid).sum()
        pairs += valid.sum()
        push = torch.sigmoid_(margin.neg_()).mul_(valid)
        slope[:, rows] -= push.sum(dim=2)
        slope[:, columns] += push.sum(dim=1)
    pairs = pairs.clamp_min(1)
    return (total / pairs).to(scores.dtype), torch.empty_like(slope).scatter_(1, ids, slope / pairs)


@torch.library.custom_op("fasthpm::ranking", mutates_args=())
def _ranking(predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """`_ranking_blocks` in one kernel, where there is one. An operation of its own: compilers don't look into it."""
    fits = predicted.dtype == torch.float32 and predicted.shape[0] > 0 and predicted.shape[1] > 1
    return (launched("ranking", predicted, actual) if fits else None) or _ranking_blocks(predicted, actual)


@_ranking.register_fake
def _(predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    return predicted.new_empty(()), torch.empty_like(predicted, memory_format=torch.contiguous_format)


def absolute_loss(predicted: Tensor, actual: Tensor, *, standardize: bool = True) -> Tensor:
    """Absolute difficulty loss (Eq. 4): mean squared difference of predicted and actual loss, [B, M] each.

    `standardize`: compare with (actual - mean)/sqrt(unbiased variance + 1e-6) of each image, as the released code
    does and the formula does not. The gradient reaches `predicted` only.
    """
    predicted, actual = full_precision(predicted), full_precision(actual.detach())
    if standardize:
        variance, mean = torch.var_mean(actual, dim=1, keepdim=True, correction=min(1, actual.shape[1] - 1))
        actual = (actual - mean) * (variance + EPS).rsqrt()
    return (predicted - actual).square().mean()


def difficulty_loss(kind: str, predicted: Tensor, actual: Tensor, *, standardize: bool = True) -> Tensor:
    """The recipe's `predict_loss`: "relative" or "absolute" (`standardize`: its targets)."""
    if kind == "relative":
        return ranking_loss(predicted, actual)
    return absolute_loss(predicted, actual, standardize=standardize)


def spearman(predicted: Tensor, actual: Tensor) -> Tensor:
    """Rank correlation of predicted and actual difficulty, averaged over images; [B, M] each, ties in index order."""
    ranks = [x.detach().float().argsort(dim=1).argsort(dim=1).float() for x in (predicted, actual)]
    count = predicted.shape[1]
    distance = (ranks[0] - ranks[1]).square().sum(dim=1)
    return (1 - 6 * distance / max(count * (count**2 - 1), 1)).mean()


def hardest_auc(predicted: Tensor, actual: Tensor, share: float = 0.25) -> Tensor:
    """Area under the ROC curve of `predicted` for the hardest `share` of an image's patches, averaged over images.

    The chance that one of the hardest has a higher prediction than one of the others; [B, L] each. Ties count half.
    """
    hard = max(1, int(share * actual.shape[1]))
    order = actual.detach().float().argsort(dim=1, descending=True)
    scores = predicted.detach().float().gather(1, order)
    inside, outside = scores[:, :hard].contiguous(), scores[:, hard:].sort(dim=1).values
    below = torch.searchsorted(outside, inside) + torch.searchsorted(outside, inside, right=True)
    return (below.float() / (2 * max(1, outside.shape[1]))).mean()


def pair_accuracy(predicted: Tensor, actual: Tensor) -> Tensor:
    """Share of patch pairs of an image that `predicted` puts in the actual order (0.5 = chance); [B, M] each."""
    ordered, ids = actual.detach().float().sort(dim=1, descending=True)
    scores = predicted.detach().float().gather(1, ids)
    counts = torch.zeros(2, dtype=torch.int64, device=scores.device)
    for _, _, margin, valid in pair_blocks(scores, ordered):
        counts += torch.stack([((margin > 0) & valid).sum(), valid.sum()])
    return counts[0] / counts[1].clamp_min(1)


def health(predicted: Tensor, actual: Tensor, seen: Tensor) -> Tensor:
    """How well a step's difficulties are learnt, float32 [3] from [N, M] each.

    (`spearman` of `predicted`, `pair_accuracy` of `predicted`, `spearman` of `seen`, the teacher's difficulty)
    """
    return (_health_plain if on_cpu(predicted) else _health)(predicted.detach(), actual.detach(), seen.detach())


def _health_plain(predicted: Tensor, actual: Tensor, seen: Tensor) -> Tensor:
    values = (spearman(predicted, actual), pair_accuracy(predicted, actual), spearman(seen, actual))
    return torch.stack([value.float() for value in values])


@torch.library.custom_op("fasthpm::health", mutates_args=())
def _health(predicted: Tensor, actual: Tensor, seen: Tensor) -> Tensor:
    """`_health_plain` in one kernel, where there is one."""
    found = launched("health", predicted, actual, seen) if predicted.shape[0] > 0 and predicted.shape[1] > 1 else None
    return _health_plain(predicted, actual, seen) if found is None else found


@_health.register_fake
def _(predicted: Tensor, actual: Tensor, seen: Tensor) -> Tensor:
    return predicted.new_empty(3, dtype=torch.float32)
