"""Accuracy of a classifier on a test set, by one view or several."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fasthpm import ranks
from fasthpm.data import Loader
from fasthpm.data.statistics import PixelStatistics
from fasthpm.probes import result
from fasthpm.probes.finetune.building import ClassifierStep, FineTuning


# -------------------------------------------------------------------------------------------------- testing
def evaluate(run: FineTuning) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the loss on the test set, of the average if there is one. Collective.

    Of one view; the last test of videos is over all of them.
    """
    loader, views = run.val_loader, (1, 1)
    if run.done == run.recipe.total_steps:
        loader, views = run.last_loader, run.settings.views
    if run.teacher:
        forward = ClassifierStep(run.teacher.module, run.step.chooser)
        return test(forward, loader, run.pixels, run.launch, run.settings.seed, views)
    run.engine.eval()
    try:
        return test(run.engine, loader, run.pixels, run.launch, run.settings.seed, views)
    finally:
        run.engine.train()


@torch.no_grad()
def test(
    forward: Any, loader: Loader, pixels: PixelStatistics, launch: ranks.Launch, seed: int, views: tuple[int, int]
) -> dict[str, float]:
    """{"accuracy", "accuracy_top5", "val_loss"} over all ranks' shares of `loader`.

    - `forward`: images [B, C, (T,) H, W] -> logits [B, K]; `pixels`: by which they are normalised
    - `views`: (clips, crops) of every sample that `loader` gives as rows of a batch; their logits are averaged
      (VideoMAE's code averages the softmax of them)
    """
    rows = views[0] * views[1]
    sums = torch.zeros(4, dtype=torch.float64, device=launch.device)
    for number, batch in enumerate(tqdm(loader, desc="test", disable=launch.rank != 0, leave=False)):
        seed_all(seed, number, launch.rank)  # of randomly chosen tokens
        images, labels = normalised(batch.images.to(launch.device), pixels), batch.labels[::rows].to(launch.device)
        # A rank without samples runs along: the others may need it to gather weights.
        logits = forward(images if len(images) else images.new_zeros(rows, *images.shape[1:]))
        logits = logits.unflatten(0, (-1, rows)).mean(1)[: len(labels)]
        hits = [result.count_hits(logits, labels, k) for k in (1, 5)]
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        sums[:3] += torch.stack([*hits, loss]).double()
        sums[3] += len(labels)
    top1, top5, loss, total = result.share(sums, launch.world_size).tolist()
    return {"accuracy": 100 * top1 / total, "accuracy_top5": 100 * top5 / total, "val_loss": loss / total}


def normalised(images: Tensor, pixels: PixelStatistics) -> Tensor:
    """uint8 [B, (T,) H, W, C] -> float32 [B, C, (T,) H, W], normalised."""
    mean, std = (torch.tensor(values, device=images.device) for values in (pixels.mean, pixels.std))
    return ((images.float() / 255 - mean) / std).movedim(-1, 1)


def seed_all(*parts: int) -> None:
    """Seed what mixup (numpy) and drop path (torch, every device) draw from."""
    seed = result.torch_seed(*parts)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
