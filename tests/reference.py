"""The papers' equations as plain loops over numbers: the oracle that every fast path is compared with.

Eq. numbers are TPAMI's. Tensors are indexed one element at a time on purpose; autograd differentiates through them.
"""

import math

import torch
from torch import Tensor


def ema(teacher: Tensor, student: Tensor, momentum: float) -> Tensor:
    """Eq. 1."""
    return momentum * teacher + (1 - momentum) * student


def total(reconstruction: Tensor, prediction: Tensor) -> Tensor:
    """Eq. 2."""
    return reconstruction + prediction


def patch_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 3 per patch: mean of squared differences. [B, M, K] -> [B, M]."""
    rows = []
    for image_prediction, image_target in zip(prediction, target, strict=True):
        losses = []
        for p, t in zip(image_prediction, image_target, strict=True):
            losses.append(sum((p[k] - t[k]) ** 2 for k in range(len(p))) / len(p))
        rows.append(torch.stack(losses))
    return torch.stack(rows)


def normalised_patch(patch: Tensor) -> Tensor:
    """MAE's norm_pix_loss: unbiased variance, 1e-6 inside the root."""
    mean = sum(patch) / len(patch)
    variance = sum((x - mean) ** 2 for x in patch) / (len(patch) - 1)
    return torch.stack([(x - mean) / (variance + 1e-6) ** 0.5 for x in patch])


def absolute_loss(predicted: Tensor, actual: Tensor, standardize: bool) -> Tensor:
    """Eq. 4, and the standardisation of the released code."""
    terms = []
    for s, losses in zip(predicted, actual, strict=True):
        mean, scale = 0.0, 1.0
        if standardize:
            mean = sum(losses) / len(losses)
            variance = sum((x - mean) ** 2 for x in losses) / max(len(losses) - 1, 1)
            scale = (variance + 1e-6) ** 0.5
        terms += [(s[i] - (losses[i] - mean) / scale) ** 2 for i in range(len(losses))]
    return sum(terms) / len(terms)


def ranking_loss(predicted: Tensor, actual: Tensor) -> Tensor:
    """Eq. 5-7, averaged over the valid ordered pairs of the batch."""
    terms = []
    for s, losses in zip(predicted, actual, strict=True):
        for i in range(len(losses)):
            for j in range(len(losses)):
                difference = s[i] - s[j]
                if losses[i] > losses[j]:  # Eq. 6
                    terms.append(-torch.nn.functional.logsigmoid(difference))
                if losses[i] < losses[j]:  # Eq. 7
                    terms.append(-torch.nn.functional.logsigmoid(-difference))
    return sum(terms) / len(terms) if terms else predicted.sum() * 0


def alpha(epoch: int, epochs: int, start: float, end: float) -> float:
    """Eq. 8 with t = epoch + 1, as released."""
    return start + (epoch + 1) / epochs * (end - start)


def mask_counts(length: int, mask_ratio: float, share: float) -> tuple[int, int]:
    """(masked patches, of these chosen by difficulty), Alg. 1."""
    masked = length - int(length * (1 - mask_ratio))
    return masked, int(masked * share)


def spearman(predicted: Tensor, actual: Tensor) -> float:
    """Pearson correlation of ranks, averaged over images; for values without ties."""
    results = []
    for s, losses in zip(predicted.tolist(), actual.tolist(), strict=True):
        ranks = [[sorted(values).index(v) for v in values] for values in (s, losses)]
        mean = (len(s) - 1) / 2
        cov = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
        norm = [math.sqrt(sum((a - mean) ** 2 for a in r)) for r in ranks]
        results.append(cov / (norm[0] * norm[1]))
    return sum(results) / len(results)


def pair_accuracy(predicted: Tensor, actual: Tensor) -> float:
    """Share of the pairs with different losses that are predicted in the right order."""
    right, count = 0, 0
    for s, losses in zip(predicted.tolist(), actual.tolist(), strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                if losses[i] != losses[j]:
                    count += 1
                    right += (s[i] > s[j]) == (losses[i] > losses[j]) and s[i] != s[j]
    return right / count


def patches_of(image: Tensor, side: int) -> Tensor:
    """[C, H, W] -> [L, side*side*C]: raster order, each patch as (row, column, channel)."""
    channels, height, width = image.shape
    patches = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            patches.append(
                torch.stack(
                    [image[c, top + y, left + x] for y in range(side) for x in range(side) for c in range(channels)]
                )
            )
    return torch.stack(patches)


def sincos(dim: int, rows: int, columns: int) -> Tensor:
    """MAE's fixed positions, entry by entry; the first row is the cls token's."""
    quarter = dim // 4
    table = torch.zeros(1 + rows * columns, dim, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            for half, index in enumerate((c, r)):
                for k in range(quarter):
                    angle = index * 10000 ** (-k / quarter)
                    table[1 + r * columns + c, half * dim // 2 + k] = math.sin(angle)
                    table[1 + r * columns + c, half * dim // 2 + quarter + k] = math.cos(angle)
    return table


def lr(epoch: float, peak: float, low: float, warmup: float, epochs: float) -> float:
    """MAE's schedule at a fractional epoch."""
    if epoch < warmup:
        return peak * epoch / warmup
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
