"""mIoU and windows against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasthpm.data.statistics import PixelStatistics
from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.segmentation.testing import Windows, class_table, confusion, count_pixels, figures, predicted, starts
from fasthpm.dense.tuning import normalised
from fasthpm.ranks import Launch

CPU = torch.device("cpu")
PIXELS = PixelStatistics((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def labels(seed: int, size: tuple[int, ...], classes: int) -> Tensor:
    return torch.randint(0, classes, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def figures_by_loops(pairs: list[tuple[int, int]], classes: int) -> dict[str, float]:
    ious, accuracies = [], []
    for one in range(classes):
        both = sum(t == one and p == one for t, p in pairs)
        either = sum(one in (t, p) for t, p in pairs)
        truth = sum(t == one for t, _ in pairs)
        if either:
            ious.append(both / either)
        if truth:
            accuracies.append(both / truth)
    right = sum(t == p for t, p in pairs) / len(pairs)
    return {"miou": 100 * sum(ious) / len(ious), "macc": 100 * sum(accuracies) / len(accuracies), "aacc": 100 * right}


def test_figures_by_loops_over_pixels() -> None:
    truth, guess = labels(0, (9, 13), 4), labels(1, (9, 13), 5)  # class 4 is predicted and never there
    truth[2:4] = IGNORED
    counts = confusion(truth, guess, 6)  # class 5 is nowhere
    pairs = [(int(t), int(p)) for t, p in zip(truth.flatten(), guess.flatten(), strict=True) if int(t) != IGNORED]
    assert counts.dtype == torch.int64
    assert counts.sum() == len(pairs)
    for t in range(6):
        for p in range(6):
            assert counts[t, p] == pairs.count((t, p))
    assert figures(counts) == pytest.approx(figures_by_loops(pairs, 6), rel=1e-12)


def test_the_table_of_classes_says_what_is_missing() -> None:
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    rows = class_table(counts, ("a", "b", "c"))
    assert rows[0] == {"class": "a", "iou": 75.0, "accuracy": 75.0, "pixels": 4}
    assert rows[1] == {"class": "b", "iou": 0.0, "accuracy": None, "pixels": 0}  # predicted, never there
    assert rows[2] == {"class": "c", "iou": None, "accuracy": None, "pixels": 0}  # nowhere
    assert figures(counts) == {"miou": 37.5, "macc": 75.0, "aacc": 75.0}
    assert figures(torch.zeros(3, 3, dtype=torch.int64)) == {"miou": 0.0, "macc": 0.0, "aacc": 0.0}


@pytest.mark.parametrize(
    ("length", "crop", "stride"), [(512, 512, 341), (683, 512, 341), (2048, 512, 341), (40, 64, 9)]
)
def test_windows_cover_a_side_and_end_inside(length: int, crop: int, stride: int) -> None:
    found = starts(length, crop, stride)
    expected = [0]
    while expected[-1] + crop < length:
        expected.append(min(expected[-1] + stride, length - crop))
    assert found == expected
    assert starts(683, 512, 341) == [0, 171]


def network(images: Tensor) -> Tensor:
    """Logits of 3 classes that depend on the place in the window, so that windows differ."""
    place = torch.linspace(0, 1, images.shape[2])[:, None] + torch.linspace(0, 2, images.shape[3])
    return torch.stack([images.mean(1) + place, images[:, 0] * place, images[:, 1] - images[:, 2]], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_average_where_they_overlap(batch_size: int) -> None:
    images = [torch.randn(3, 20, 31), torch.randn(3, 8, 10), torch.randn(3, 12, 12)]
    windows = Windows(network, CPU, 3, (12, 12), (8, 8), batch_size=batch_size)
    for image, logits in zip(images, windows(images), strict=True):
        height, width = (max(length, 12) for length in image.shape[1:])
        filled = torch.zeros(3, height, width)
        filled[:, : image.shape[1], : image.shape[2]] = image
        total, seen = torch.zeros(3, height, width), torch.zeros(height, width)
        for row in starts(height, 12, 8):
            for column in starts(width, 12, 8):
                found = network(filled[None, :, row : row + 12, column : column + 12])[0]
                for y in range(12):
                    for x in range(12):
                        total[:, row + y, column + x] += found[:, y, x]
                        seen[row + y, column + x] += 1
        expected = (total / seen)[:, : image.shape[1], : image.shape[2]]
        torch.testing.assert_close(logits, expected)


def test_whole_images_are_filled_up_to_the_patches() -> None:
    seen: list[tuple[int, ...]] = []

    def forward(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return network(images)

    images = [torch.randn(3, 20, 31), torch.randn(3, 6, 16)]
    found = Windows(forward, CPU, 3, (16, 16), None, multiple=8)(images)
    assert seen == [(1, 3, 24, 32), (1, 3, 16, 16)]
    for image, logits in zip(images, found, strict=True):
        assert logits.shape == (3, *image.shape[1:])


def test_a_test_counts_every_pixel_at_the_masks_own_size() -> None:
    class Batch:
        def __init__(self, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            sizes = ((14, 20), (12, 12))
            self.images = [torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]
            self.targets = [labels(seed, (28, 40), 3), labels(seed, (12, 12), 3)]
            self.targets[0][:5] = IGNORED

    batches = [Batch(1), Batch(2)]
    windows = Windows(network, CPU, 3, (12, 12), (8, 8))
    counts = count_pixels(windows, batches, PIXELS, Launch(0, 0, 1, 1, CPU))
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for batch in batches:
        for image, truth in zip(batch.images, batch.targets, strict=True):
            normal = torch.stack([(image[c] / 255 - PIXELS.mean[c]) / PIXELS.std[c] for c in range(3)])
            torch.testing.assert_close(normalised(image, PIXELS), normal)
            logits = windows([normal])[0]
            if truth.shape != image.shape[1:]:
                logits = F.interpolate(logits[None], size=truth.shape, mode="bilinear")[0]
            for row in range(truth.shape[0]):
                for column in range(truth.shape[1]):
                    if truth[row, column] != IGNORED:
                        best = max(range(3), key=lambda k: float(logits[k, row, column]))
                        expected[int(truth[row, column]), best] += 1
    assert (counts == expected).all()
    assert math.isfinite(figures(counts)["miou"])
    assert predicted(torch.eye(3)[:, :, None], (3, 1)).tolist() == [[0], [1], [2]]
