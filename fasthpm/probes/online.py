"""Online probe: how good the features are while pretraining runs. It never touches the training: no gradient, no random
numbers, no weights of the encoder.

Every `online_probe_every` updates the student encodes (all patches visible) some images of the batch that it has just
seen; a linear head is tested on their features and then learns from them. Every `online_knn_every` epochs a fixed part
of the training set, spread evenly over it, is classified by the nearest of the rest.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fasthpm import files, ranks
from fasthpm.data import Batch, DatasetInfo, build_loader
from fasthpm.errors import UserError
from fasthpm.probes import result
from fasthpm.probes.features import gather_rows
from fasthpm.probes.head import LinearHead
from fasthpm.probes.knn import knn_accuracy
from fasthpm.recipe import Recipe
from fasthpm.step import Step

IMAGES = 64  # of a rank's batch, at most, per step of the head
KNN_IMAGES, KNN_QUERIES = 2560, 5  # every fifth of these is classified by the others
KNN_BATCH, KNN_K = 128, 20
LR = 1e-3  # AdamW's
HEAD = "online_probe.safetensors"


def check(recipe: Recipe, info: DatasetInfo, config: dict[str, Any]) -> None:
    """Whether the online probe that the recipe asks for, if any, is possible; `config`: DeepSpeed's.

    **Raises:** `UserError` for data with one class only or unlabelled samples, for k-NN of video, and under ZeRO 3,
    whose weights no rank holds whole.
    """
    if not (recipe.online_probe_every or recipe.online_knn_every):
        return
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError("the online probe needs whole weights on every rank; use ZeRO 0, 1 or 2, or leave it out")
    if recipe.num_frames > 1 and recipe.online_knn_every:
        raise UserError("online_knn_every is for images; use 0, and fasthpm knn for video")
    if len(info.classes) < 2:
        raise UserError(
            f"{recipe.data_path} has {len(info.classes)} class, and an online probe needs labels of 2 or more; "
            f"leave online_probe_every and online_knn_every at 0"
        )
    if info.unlabelled:
        raise UserError(
            f"{info.unlabelled} of {info.num_samples} samples of {recipe.data_path} are unlabelled, and an online "
            f"probe needs labels; leave online_probe_every and online_knn_every at 0, or prepare it with --classes FILE"
        )


class OnlineProbe:
    """A linear head that learns beside the pretraining, and a k-NN test now and then. Collective.

    - `step`: the module that DeepSpeed wraps
    """

    def __init__(self, recipe: Recipe, step: Step, info: DatasetInfo, launch: ranks.Launch) -> None:
        self.recipe, self.step, self.launch, self.classes = recipe, step, launch, len(info.classes)
        with torch.random.fork_rng(devices=[]):
            head = LinearHead(step.student.embed_dim, self.classes, recipe.seed)
        self.head = head.to(launch.device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), LR, weight_decay=0.0)
        self._sums = torch.zeros(3, dtype=torch.float64, device=launch.device)  # hits, loss, images

    def after_update(self, done: int, batch: Batch) -> None:
        """Test the head on features of `batch` and train it on them, if it is its turn after update `done`."""
        if not self.recipe.online_probe_every or done % self.recipe.online_probe_every:
            return
        rows, labels = self.features(batch.images[:IMAGES]), batch.labels[:IMAGES].to(self.launch.device)
        self.head.train()
        logits = self.head(rows)
        loss = F.cross_entropy(logits, labels)
        hits = result.count_hits(logits.detach(), labels, 1)
        count = torch.full_like(hits, len(labels), dtype=torch.float64)
        self._sums = self._sums + torch.stack([hits.double(), loss.detach().double() * len(labels), count])
        self.optimizer.zero_grad()
        loss.backward()
        if self.launch.world_size > 1:
            for parameter in self.head.parameters():
                dist.all_reduce(parameter.grad)  # type: ignore[arg-type]
        self.optimizer.step()

    def due(self, done: int) -> bool:
        """Whether the k-NN test is to be made after update `done`: at the end of every so many epochs."""
        epoch, rest = divmod(done, self.recipe.steps_per_epoch)
        return self.recipe.online_knn_every > 0 and rest == 0 and epoch % self.recipe.online_knn_every == 0

    def read(self, done: int) -> dict[str, float]:
        """What the head has learned, and the k-NN test if it is due. Collective."""
        return self.learned() | (self.knn() if self.due(done) else {})

    def learned(self) -> dict[str, float]:
        """{"probe_accuracy", "probe_loss"} since the last reading, over all ranks; {} without a step. Collective."""
        sums = ranks.share(self._sums.clone(), self.launch.world_size)
        hits, loss, count = sums.tolist()
        self._sums.zero_()
        return {"probe_accuracy": 100 * hits / count, "probe_loss": loss / count} if count else {}

    def knn(self) -> dict[str, float]:
        """{"knn_accuracy"}: of a fixed fifth of `KNN_IMAGES` training images, the rest voting (k = 20). Collective."""
        rows, labels, places = self._knn_rows()
        rows, labels, places = (gather_rows(x, self.launch.world_size) for x in (rows, labels, places))
        asked = places % KNN_QUERIES == 0
        accuracy = knn_accuracy(
            rows[~asked], labels[~asked], rows[asked], labels[asked], self.classes, neighbours=[KNN_K]
        )
        return {"knn_accuracy": next(iter(accuracy.values()))}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, D]: the mean of the student's patch tokens, detached."""
        tokens = self.step.student.encode(self.step.normalized_patches(images.to(self.launch.device)))
        return tokens[:, self.step.student.num_prefix_tokens :].mean(dim=1).float()

    def _knn_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        recipe, launch = self.recipe, self.launch
        options = recipe.loader_options(batch_size=KNN_BATCH, train=False, max_bad_samples=1.0)
        loader: Any = build_loader(recipe.data_path, options)
        try:
            chosen = np.unique(np.linspace(0, loader.info.num_samples - 1, KNN_IMAGES).astype(np.int64))
            places = np.arange(launch.rank, len(chosen), launch.world_size)
            parts = [loader.take(0, chosen[part]) for part in np.array_split(places, -(-len(places) // KNN_BATCH))]
        finally:
            loader.close()
        rows = torch.cat([F.normalize(self.features(batch.images), dim=1) for batch in parts])
        labels = torch.cat([batch.labels for batch in parts]).to(launch.device)
        return rows, labels, torch.from_numpy(places).to(launch.device)

    # ---------------------------------------------------------------------------------------------- on disk
    def save(self, folder: Path, done: int) -> None:
        """Write the head as it is after update `done` (rank 0); its moments start afresh when it is read."""
        if self.launch.rank == 0:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
            with files.replacing(folder / HEAD) as aside:
                files.save_tensors(tensors, aside, {"step": json.dumps(done)})

    def load(self, folder: Path, done: int) -> None:
        """Take up the head that was saved after update `done`, if it is there."""
        try:
            with safe_open(folder / HEAD, "pt", device=str(self.launch.device)) as file:
                if json.loads(file.metadata()["step"]) == done:
                    self.head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError):  # a head less is no reason to stop
            return
