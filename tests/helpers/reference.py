"""The papers' equations as plain loops over numbers: the oracle that every fast path is compared with.

Eq. numbers are TPAMI's. Tensors are indexed one element at a time on purpose; autograd differentiates through them.
"""

import math
from typing import Any

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


def tubelets_of(clip: Tensor, frames: int, side: int) -> Tensor:
    """[C, T, H, W] -> [L, frames*side*side*C]: slot by slot in raster order, each as (frame, row, column, channel)."""
    channels, length, height, width = clip.shape
    patches = []
    for first in range(0, length, frames):
        for top in range(0, height, side):
            for left in range(0, width, side):
                values = []
                for t in range(frames):
                    for y in range(side):
                        for x in range(side):
                            values += [clip[c, first + t, top + y, left + x] for c in range(channels)]
                patches.append(torch.stack(values))
    return torch.stack(patches)


def normalised_tubelet(patch: Tensor, channels: int, eps: float) -> Tensor:
    """VideoMAE's target: every channel on its own, unbiased, eps outside the root."""
    out = [patch[0]] * len(patch)
    for c in range(channels):
        values = [patch[i] for i in range(c, len(patch), channels)]
        mean = sum(values) / len(values)
        std = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
        for k, x in enumerate(values):
            out[k * channels + c] = (x - mean) / (std + eps)
    return torch.stack(out)


def sinusoid(dim: int, count: int) -> Tensor:
    """VideoMAE's fixed positions, entry by entry."""
    table = torch.zeros(count, dim, dtype=torch.float64)
    for index in range(count):
        for channel in range(dim):
            angle = index / 10000 ** (2 * (channel // 2) / dim)
            table[index, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    return table


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


# -------------------------------------------------------------------------------------------------- masks, one sample
# Each takes the same noise as its fast twin, as lists of floats, and gives the set of masked patches. Where keys are
# equal the higher patch number is masked first.
def highest(keys: list, count: int) -> set[int]:
    """The `count` patches with the highest keys."""
    return set(sorted(range(len(keys)), key=lambda i: (keys[i], i), reverse=True)[:count])


def single(value: float) -> float:
    """Rounded to float32, as scores are before they are ranked."""
    return torch.tensor(value, dtype=torch.float32).item()


def murmur(word: int) -> int:
    """Murmur3's 32-bit finaliser."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def hash_noise(seed: int, step: int, sample: int, number: int) -> float:
    """The noise of one patch, draw * L + patch = `number`."""
    key = murmur(murmur(murmur((seed ^ 0x9E3779B9) % 2**32) ^ (step % 2**32)))
    own = murmur(key ^ murmur(sample % 2**32))
    return (murmur(own ^ murmur(number + 0x7F4A7C15)) >> 8) / 2**24


def random_mask(noise: list[float], mask_ratio: float) -> set[int]:
    """MAE: the smallest noise stays visible."""
    return highest(noise, mask_counts(len(noise), mask_ratio, 0)[0])


def easy_to_hard_mask(
    difficulty: list[float], mask_ratio: float, share: float, ties: list[float], rest: list[float], easiest: bool
) -> set[int]:
    """Alg. 1: the hardest (or easiest) int(M·share), then others at random."""
    masked, hard = mask_counts(len(difficulty), mask_ratio, share)
    sign = -1 if easiest else 1
    chosen = highest([(sign * d, tie) for d, tie in zip(difficulty, ties, strict=True)], hard)
    return highest([(i in chosen, rest[i]) for i in range(len(rest))], masked)


def aspect(number: float) -> float:
    """BEiT's aspect ratio: log-uniform between 0.3 and 1/0.3."""
    return math.exp(math.log(0.3) + number * (math.log(1 / 0.3) - math.log(0.3)))


def block_distances(row: float, column: float, shape: float, rows: int, columns: int) -> list[float]:
    """Distance of every patch's centre from a point, in a metric whose circles are rectangles of aspect `shape`."""
    return [
        max(abs(r + 0.5 - row * rows) / math.sqrt(shape), abs(c + 0.5 - column * columns) * math.sqrt(shape))
        for r in range(rows)
        for c in range(columns)
    ]


def block_mask(noise: list[float], rows: int, columns: int, mask_ratio: float) -> set[int]:
    """The patches nearest to a random point."""
    size = rows * columns
    row, column, number = noise[size : size + 3]
    distances = block_distances(row, column, aspect(number), rows, columns)
    keys = [(single(-d), tie) for d, tie in zip(distances, noise, strict=False)]
    return highest(keys, mask_counts(size, mask_ratio, 0)[0])


def blockwise_mask(noise: list[float], rows: int, columns: int, mask_ratio: float, proposals: int) -> set[int]:
    """BEiT: blocks that add something and not too much, one after the other; then what is nearest to a point."""
    size = rows * columns
    numbers, mask = noise[size:], set()
    missing = mask_counts(size, mask_ratio, 0)[0]
    for proposal in range(proposals):
        how_large, how_tall, top, left = numbers[4 * proposal : 4 * proposal + 4]
        smallest = max(1, size * 16 // 196)
        area = smallest + how_large * (missing - smallest)
        height, width = round(math.sqrt(area * aspect(how_tall))), round(math.sqrt(area / aspect(how_tall)))
        if height >= rows or width >= columns:
            continue
        first = math.floor(top * (rows - height + 1)), math.floor(left * (columns - width + 1))
        block = {r * columns + c for r in range(first[0], first[0] + height) for c in range(first[1], first[1] + width)}
        if 0 < len(block - mask) <= missing:
            missing -= len(block - mask)
            mask |= block
    row, column = numbers[4 * proposals : 4 * proposals + 2]
    distances = block_distances(row, column, 1.0, rows, columns)
    keys = [(single(-1e9 if i in mask else -distances[i]), noise[i]) for i in range(size)]
    return mask | highest(keys, missing)


def uniform_mask(noise: list[float], rows: int, columns: int) -> set[int]:
    """UM-MAE: one visible patch in every 2 x 2."""
    visible, cell = set(), 0
    for r in range(0, rows, 2):
        for c in range(0, columns, 2):
            corner = int(noise[cell] * 4)
            visible.add((r + corner // 2) * columns + c + corner % 2)
            cell += 1
    return set(range(rows * columns)) - visible


def tube_mask(noise: list[float], slots: int, mask_ratio: float) -> set[int]:
    """VideoMAE: int(ratio·R·C) patches of a frame, the same in every slot."""
    frame = highest(noise, int(mask_ratio * len(noise)))
    return {slot * len(noise) + patch for slot in range(slots) for patch in frame}


def in_units(units: set[int], rows: int, columns: int, side: int) -> set[int]:
    """Patches of the masked units of one frame."""
    return {
        r * columns + c
        for r in range(rows)
        for c in range(columns)
        if r // side * (columns // side) + c // side in units
    }


def unit_means(values: list[float], rows: int, columns: int, side: int) -> list[float]:
    """Mean difficulty of every unit."""
    means = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            inside = [values[(top + y) * columns + left + x] for y in range(side) for x in range(side)]
            means.append(sum(inside) / len(inside))
    return means


def attention_mask(
    weights: list[float], mask_ratio: float, throw_ratio: float, noise: list[float], round_up: bool = False
) -> tuple[set[int], set[int]]:
    """AMT: an exponential race of rate `weight`, which is drawing one after the other in proportion to weight."""
    length = len(weights)
    times = [-math.log(u + 2.0**-25) / w if w else math.inf for w, u in zip(weights, noise, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: (times[i], -noise[i]))
    masked, gone = int(length * mask_ratio), int(length * (mask_ratio + throw_ratio))
    if round_up:
        masked = math.ceil(length * mask_ratio)
        gone = masked + math.ceil(length * throw_ratio)
    return set(order[:masked]), set(order[masked:gone])


def crop_map(
    values: list[list[float]], crop: tuple[int, int, int, int, int], size: tuple[int, int], rows: int, columns: int
) -> list[float]:
    """AMT: the map of the whole image at the centre of every patch of a crop, between the centres of its cells."""
    top, left, height, width, flipped = crop
    out = []
    for r in range(rows):
        for c in range(columns):
            column = columns - 1 - c if flipped else c
            y = (top + height * (r + 0.5) / rows) / size[0] * len(values) - 0.5
            x = (left + width * (column + 0.5) / columns) / size[1] * len(values[0]) - 0.5
            out.append(between(values, y, x))
    return out


def between(values: list[list[float]], y: float, x: float) -> float:
    """Bilinear, constant beyond the outermost values."""
    y, x = min(max(y, 0.0), len(values) - 1.0), min(max(x, 0.0), len(values[0]) - 1.0)
    i, j = min(int(y), len(values) - 2), min(int(x), len(values[0]) - 2)
    upper = values[i][j] + (values[i][j + 1] - values[i][j]) * (x - j)
    lower = values[i + 1][j] + (values[i + 1][j + 1] - values[i + 1][j]) * (x - j)
    return upper + (lower - upper) * (y - i)


def released_crop_map(
    values: list[list[float]],
    crop: tuple[int, int, int, int, int],
    size: tuple[int, int],
    rows: int,
    columns: int,
    side: int,
) -> list[float]:
    """AMT's released code: the top left cells, enlarged to the crop's pixels, averaged over every patch."""
    top, left, height, width, flipped = crop
    cells = [row[: (left + width) // size[1] + 2] for row in values[: (top + height) // size[0] + 2]]
    high, wide = rows * side, columns * side
    pixels = [
        [
            between(cells, (y + 0.5) * len(cells) / high - 0.5, (x + 0.5) * len(cells[0]) / wide - 0.5)
            for x in range(wide)
        ]
        for y in range(high)
    ]
    if flipped:
        pixels = [row[::-1] for row in pixels]
    return [
        sum(pixels[r * side + y][c * side + x] for y in range(side) for x in range(side)) / side**2
        for r in range(rows)
        for c in range(columns)
    ]


def draw_probability(weights: list[float], order: tuple[int, ...]) -> float:
    """Probability that drawing without replacement, in proportion to weight, begins with `order`."""
    probability, left = 1.0, sum(weights)
    for patch in order:
        probability *= weights[patch] / left
        left -= weights[patch]
    return probability


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """-log of the softmax of each patch's own token, patch by patch: float64 [B, M]."""
    found = torch.zeros(ids.shape, dtype=torch.float64)
    for row, places in enumerate(ids.tolist()):
        for patch, token in enumerate(places):
            values = logits[row, patch].double()
            found[row, patch] = values.exp().sum().log() - values[token]
    return found


def distribution_losses(logits: Tensor, shares: Tensor) -> Tensor:
    """Each token's loss, weighted by its share: float64 [B, M]."""
    tokens = [token_losses(logits, torch.full(logits.shape[:2], k)) for k in range(logits.shape[2])]
    return torch.stack([share.double() * each for share, each in zip(shares.unbind(2), tokens, strict=True)]).sum(0)


def feature_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of two features after L2 normalisation, per patch. [B, M, D] -> [B, M]."""
    rows = []
    for image_prediction, image_target in zip(prediction, target, strict=True):
        losses = []
        for p, t in zip(image_prediction, image_target, strict=True):
            lengths = [sum(x[k] ** 2 for k in range(len(x))) ** 0.5 for x in (p, t)]
            losses.append(sum((p[k] / lengths[0] - t[k] / lengths[1]) ** 2 for k in range(len(p))))
        rows.append(torch.stack(losses))
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------- probes
def lars_step(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: float
) -> tuple[list[Tensor], list[Tensor]]:
    """LARS as MAE's linear probe uses it (no weight decay): a tensor with two or more dimensions takes its gradient
    times 0.001 * |w| / |g|; then momentum 0.9, then the step."""
    moved, kept = [], []
    for weight, grad, momentum in zip(weights, grads, momenta, strict=True):
        if weight.ndim > 1:
            grad = grad * (0.001 * math.sqrt(float((weight**2).sum())) / math.sqrt(float((grad**2).sum())))
        momentum = 0.9 * momentum + grad
        moved.append(weight - lr * momentum)
        kept.append(momentum)
    return moved, kept


def layer_normalised_pool(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """MAE's global pool: the mean of the patch tokens [B, L, D], then LayerNorm with eps 1e-6: [B, D]."""
    rows = []
    for sample in tokens:
        mean = sum(sample) / len(sample)
        centred = mean - mean.mean()
        rows.append(centred / torch.sqrt((centred**2).mean() + 1e-6) * weight + bias)
    return torch.stack(rows)


def selected_patches(difficulty: list[float], count: int, policy: str) -> list[int]:
    """The `count` hardest or easiest patches of one image, ascending; the first of equals wins."""
    sign = -1 if policy == "hardest" else 1
    return sorted(sorted(range(len(difficulty)), key=lambda i: (sign * difficulty[i], i))[:count])


# -------------------------------------------------------------------------------------------------- fast modes
def layer_norm(values: Tensor, norm: Any) -> Tensor:
    """Zero mean, unit variance (biased, eps inside the root), scaled and shifted."""
    mean = values.mean()
    return (values - mean) / ((values - mean) ** 2).mean().add(norm.eps).sqrt() * norm.weight + norm.bias


def cross_block(tokens: Tensor, context: Tensor, block: Any) -> Tensor:
    """A decoder block in which every token attends to the context alone, token by token and head by head."""
    heads, dim = block.attn.num_heads, tokens.shape[1]
    size = dim // heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    known = [layer_norm(row, block.norm1) for row in context]
    out = []
    for token in tokens:
        query = weight[:dim] @ layer_norm(token, block.norm1) + bias[:dim]
        seen = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            keys = [(weight[dim : 2 * dim] @ row + bias[dim : 2 * dim])[part] for row in known]
            values = [(weight[2 * dim :] @ row + bias[2 * dim :])[part] for row in known]
            scores = torch.stack([(query[part] * key).sum() / size**0.5 for key in keys])
            chances = scores.exp() / scores.exp().sum()
            seen.append(torch.stack([chance * value for chance, value in zip(chances, values, strict=True)]).sum(0))
        token = token + block.attn.proj(torch.cat(seen))
        out.append(token + block.mlp(layer_norm(token, block.norm2)))
    return torch.stack(out)
