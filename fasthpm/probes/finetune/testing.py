"""Accuracy of a classifier on a test set, by one view or several."""

from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fasthpm import ranks
from fasthpm.data import Loader
from fasthpm.data.statistics import PixelStatistics
from fasthpm.probes import result
from fasthpm.tuning.run import normalised, seed_all


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
    top1, top5, loss, total = ranks.share(sums, launch.world_size).tolist()
    return {"accuracy": 100 * top1 / total, "accuracy_top5": 100 * top5 / total, "val_loss": loss / total}
