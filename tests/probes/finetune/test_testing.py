"""Accuracy and loss of a classifier, against one sample at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthpm.data import DatasetInfo
from fasthpm.probes.finetune import testing
from fasthpm.probes.finetune.building import FineTuning
from fasthpm.ranks.launch import Launch

LAUNCH = Launch(0, 0, 1, 1, torch.device("cpu"))
INFO = DatasetInfo(23, 1, (0.3,), (0.2,), tuple("abcdefgh"))


def batches(count: int, size: int, rows: int = 1) -> list[Any]:
    """`count` samples of `rows` views in batches of `size` samples, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count * rows, 2, 4, 1), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 8, (count,), generator=generator).repeat_interleave(rows)
    parts = zip(images.split(size * rows), labels.split(size * rows), strict=True)
    return [SimpleNamespace(images=part, labels=names) for part, names in parts]


def logits_of(images: Tensor) -> Tensor:
    return images.flatten(1) * 3


@pytest.mark.parametrize("views", [(1, 1), (2, 3)])
def test_figures_are_means_over_samples_whatever_the_batches(views: tuple[int, int]) -> None:
    rows, losses, hits = views[0] * views[1], [], {1: 0, 5: 0}
    for batch in batches(23, 1, rows):
        outputs = [logits_of(testing.normalised(image[None], INFO))[0] for image in batch.images]
        mean, label = torch.stack(outputs).mean(0), int(batch.labels[0])
        losses.append(float(torch.logsumexp(mean, 0) - mean[label]))
        for k in hits:
            hits[k] += label in mean.argsort(descending=True)[:k].tolist()
    for size in (23, 5):
        found = testing.test(logits_of, batches(23, size, rows), INFO, LAUNCH, 0, views)  # type: ignore[arg-type]
        assert found["accuracy"] == pytest.approx(100 * hits[1] / 23)
        assert found["accuracy_top5"] == pytest.approx(100 * hits[5] / 23)
        assert found["val_loss"] == pytest.approx(sum(losses) / 23)
    assert 0 < hits[1] < hits[5] < 23


def test_a_network_is_tested_at_rest_and_trains_on() -> None:
    """Drop path and its kind are off in a test, and on again after it, also one that fails."""

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            modes.append(self.training)
            return logits_of(images)

    modes: list[bool] = []
    network = Network().train()
    run: Any = SimpleNamespace(
        val_loader=batches(7, 4),
        last_loader=None,
        done=1,
        recipe=SimpleNamespace(total_steps=2),
        settings=SimpleNamespace(seed=0, views=(1, 1)),
        teacher=None,
        engine=network,
        info=INFO,
        pixels=INFO,
        launch=LAUNCH,
    )
    FineTuning.test(run)
    assert modes == [False, False]
    assert network.training
    run.val_loader = [None]
    with pytest.raises(AttributeError):
        FineTuning.test(run)
    assert network.training
