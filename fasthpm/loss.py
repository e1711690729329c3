"""Patch targets, reconstruction loss and the two difficulty losses. B batch, M masked patches.

All in float32 whatever the forward pass ran in (and in float64 if it did).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


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


def patch_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Reconstruction loss of every patch (Eq. 3): mean squared difference, [B, M] from two [B, M, P*P*C]."""
    return (full_precision(prediction) - target).square().mean(dim=-1)


def ranking_loss(predicted: Tensor, actual: Tensor) -> Tensor:
    """Relative difficulty loss (Eq. 5-7): is patch i of an image harder than patch j?

    Binary cross-entropy with logits predicted_i - predicted_j against [actual_i > actual_j], averaged over all
    pairs of all images whose actual losses differ; 0 where there is no such pair. The gradient reaches `predicted`
    only. The released code computes log(sigmoid(x) + 1e-6), which caps a pair at 13.8 and loses the gradient of
    badly ordered pairs; here it is the exact log-sigmoid.

    - `predicted`, `actual`: [B, M]

    **Returns:** a scalar.
    """
    predicted, actual = full_precision(predicted), full_precision(actual.detach())
    # (i, j) and (j, i) say the same, so the sign folds Eq. 5's two terms into one.
    sign = torch.sign(actual[:, :, None] - actual[:, None, :])
    margin = sign * (predicted[:, :, None] - predicted[:, None, :])
    valid = sign != 0
    return (F.softplus(-margin) * valid).sum() / valid.sum().clamp_min(1)


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


def difficulty_loss(kind: str, predicted: Tensor, actual: Tensor) -> Tensor:
    """The recipe's `predict_loss`: "relative" or "absolute"."""
    return ranking_loss(predicted, actual) if kind == "relative" else absolute_loss(predicted, actual)


def spearman(predicted: Tensor, actual: Tensor) -> Tensor:
    """Rank correlation of predicted and actual difficulty, averaged over images; [B, M] each, ties in index order."""
    ranks = [x.detach().float().argsort(dim=1).argsort(dim=1).float() for x in (predicted, actual)]
    count = predicted.shape[1]
    distance = (ranks[0] - ranks[1]).square().sum(dim=1)
    return (1 - 6 * distance / max(count * (count**2 - 1), 1)).mean()


def pair_accuracy(predicted: Tensor, actual: Tensor) -> Tensor:
    """Share of patch pairs of an image that `predicted` puts in the actual order (0.5 = chance); [B, M] each."""
    actual, predicted = actual.detach().float(), predicted.detach().float()
    sign = torch.sign(actual[:, :, None] - actual[:, None, :])
    right = torch.sign(predicted[:, :, None] - predicted[:, None, :]) == sign
    valid = sign != 0
    return (right & valid).sum() / valid.sum().clamp_min(1)
