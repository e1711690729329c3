"""The two classifiers of frozen patch features: the vote of the nearest, and logistic regression."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (1, 3, 10, 30)
INVERSE_PENALTIES = (1e-4, 1e-2, 1.0, 1e2)  # scikit-learn's C: the weight of the losses beside |W|^2 / 2
ITERATIONS, HISTORY = 100, 5  # of L-BFGS
SIMILARITIES = 1 << 24  # that are in memory at a time


class Scaler(NamedTuple):
    """Standardises features by the mean and deviation of those that a classifier learns from (scikit-learn's)."""

    mean: Tensor
    std: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 [N, D]."""
        return (rows - self.mean) / self.std


def scaler_of(rows: Tensor) -> Scaler:
    """The one that gives `rows`, [N, D], zero mean and unit variance; a feature that never varies becomes 0."""
    exact = rows.double()
    std = exact.std(0, unbiased=False)
    return Scaler(exact.mean(0).float(), torch.where(std > 0, std, 1.0).float())


# -------------------------------------------------------------------------------------------------- k-NN
def nearest_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, neighbours: Sequence[int] = NEIGHBOURS
) -> dict[int, Tensor]:
    """The class of most of the k nearest by cosine similarity, of several the first, for every k that the bank has.

    - `bank`: [N, D], `labels`: int64 [N]; `queries`: [Q, D]

    **Returns:** int64 [Q] for each k.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    largest = min(max(neighbours), len(bank))
    kept = [k for k in neighbours if k <= largest] or [largest]
    found: dict[int, list[Tensor]] = {k: [] for k in kept}
    for chunk in queries.split(max(SIMILARITIES // len(bank), 1)):
        near = labels[(chunk @ bank.T).topk(largest, dim=1).indices]
        for k, parts in found.items():
            votes = torch.zeros(len(chunk), num_classes, device=bank.device)
            votes.scatter_add_(1, near[:, :k], torch.ones_like(near[:, :k], dtype=votes.dtype))
            parts.append(votes.argmax(1))
    return {k: torch.cat(parts) for k, parts in found.items()}


# -------------------------------------------------------------------------------------------------- linear
class Linear(NamedTuple):
    """A linear classifier."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, D] -> int64 [N]."""
        return F.linear(rows, self.weight, self.bias).argmax(1)


def fit_logistic(
    rows: Tensor, labels: Tensor, num_classes: int, inverse_penalty: float, start: Linear | None = None
) -> Linear:
    """Multinomial logistic regression: |W|^2 / 2 + C x the sum of the cross entropies is least, by L-BFGS.

    - `rows`: [N, D], `labels`: int64 [N]; `start`: weights to begin with, zero by default
    """
    weight, bias = start or Linear(rows.new_zeros(num_classes, rows.shape[1]), rows.new_zeros(num_classes))
    weight, bias = (value.clone().requires_grad_() for value in (weight, bias))
    penalty = 0.5 / (inverse_penalty * len(rows))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=HISTORY,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(rows, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(weight.detach(), bias.detach())


def fit_all(
    rows: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float] = INVERSE_PENALTIES
) -> dict[float, Linear]:
    """A regression for each C, from the strongest penalty on; each begins where the last one ended."""
    found: dict[float, Linear] = {}
    last = None
    for penalty in sorted(penalties):
        last = found[penalty] = fit_logistic(rows, labels, num_classes, penalty, last)
    return found
