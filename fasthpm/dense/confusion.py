"""Tables of counts, truth by prediction, of patches: `segmentation.testing` reads figures from them."""

import torch
from torch import Tensor


def of_pixels(counts: Tensor, predicted: Tensor) -> Tensor:
    """How many pixels of each class (row) were taken for each (column), if all of a patch get its class: int64 [K, K].

    - `counts`: int64 [N, K + 1], pixels of every class in a patch, and ignored ones; `predicted`: int64 [N]
    """
    classes = counts.shape[1] - 1
    by_prediction = counts.new_zeros(classes, classes).index_add_(0, predicted, counts[:, :classes])
    return by_prediction.T


def by_chance(truth: Tensor, learned: Tensor) -> Tensor:
    """The table to be expected of guesses that are as frequent as classes were in training: float64 [K, K].

    - `truth`, `learned`: [K], how often each class occurs, and how often it occurred in training
    """
    return truth.double()[:, None] * (learned.double() / learned.sum())[None]


def frequencies(labels: Tensor, num_classes: int) -> Tensor:
    """How often each class occurs: int64 [K]; labels of K and more are left out."""
    return torch.bincount(labels[labels < num_classes], minlength=num_classes)
