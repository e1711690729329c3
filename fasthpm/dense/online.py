"""The dense probe beside a pretraining: an observer that classifies patches by the nearest, now and then.

Every `dense_every` epochs the student encodes the same few images of `dense_path`, all patches visible, and the classes
of the test images' patches are voted by the nearest patches of the training images (`fasthpm dense` says how; here
k = 10 and nothing is chosen). It never touches the training: no gradient, no random numbers, no weights.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthpm.data import Batch
from fasthpm.data.values import Values
from fasthpm.dense.classifiers import nearest_votes, scaler_of
from fasthpm.dense.pairs import IGNORED, PairFiles, PairSet, open_pairs
from fasthpm.dense.patchwise import CHUNK, count_pixels, majority, read_resized
from fasthpm.dense.segmentation import testing
from fasthpm.errors import UserError
from fasthpm.probes.features import gather_rows
from fasthpm.ranks import Launch
from fasthpm.recipe import Recipe
from fasthpm.step import Step

IMAGES = {"train": 256, "val": 64}  # over all ranks
MOST = {"train": 16384, "val": 4096}  # labelled patches of these that vote and that are classified, at most
K = 10


def check(recipe: Recipe, config: dict[str, Any], values: Values | None = None) -> None:
    """Whether the dense probe that the recipe asks for, if any, is possible.

    - `config`: DeepSpeed's; `values`: what the pixels are that are trained on; None: photographs

    **Raises:** `UserError` for videos, under ZeRO 3, whose weights no rank holds whole, and for what `open_pairs`
    refuses.
    """
    if not recipe.dense_path:
        return
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError("dense_path needs whole weights on every rank; use ZeRO 0, 1 or 2, or leave it out")
    if recipe.num_frames > 1:
        raise UserError("dense_path is for images, and this recipe is of videos; leave it out")
    for split in IMAGES:
        open_set(recipe, split, values)


def open_set(recipe: Recipe, split: str, values: Values | None = None) -> PairSet:
    """The few images that are looked at; `values`: what those are that are trained on."""
    files = PairFiles(recipe.dense_path)
    return open_pairs(files, split, channels=recipe.channels, limit=IMAGES[split], values=values)


class Share(NamedTuple):
    """One rank's share of a split."""

    images: Tensor  # [B, H, W, C], of photographs uint8
    labels: Tensor  # int64 [B * L]
    places: Tensor  # int64 [B * L], of every patch among those of all ranks


class OnlineDenseProbe:
    """Measures `dense_knn_miou` and `dense_knn_accuracy`, in percent over patches. Collective.

    - `step`: the module that DeepSpeed wraps; `values`: what the pixels are that it is trained on
    """

    def __init__(self, recipe: Recipe, step: Step, launch: Launch, values: Values | None = None) -> None:
        self.recipe, self.step, self.launch = recipe, step, launch
        sets = {split: open_set(recipe, split, values) for split in IMAGES}
        self.classes = len(sets["train"].classes)
        self._shares = {split: self._share(pairs) for split, pairs in sets.items()}

    def _share(self, pairs: PairSet) -> Share:
        recipe, launch = self.recipe, self.launch
        samples = range(launch.rank, len(pairs), launch.world_size)
        if not samples:
            raise UserError(f"{pairs.source} has {len(pairs)} images, fewer than ranks ({launch.world_size}); add some")
        images, labels = map(torch.from_numpy, read_resized(pairs, samples, recipe.image_size))
        counts = count_pixels(labels, recipe.patch_size, len(pairs.classes))
        first = torch.tensor(list(samples))[:, None] * recipe.num_patches
        places = first + torch.arange(recipe.num_patches)
        return Share(images, majority(counts), places.flatten())

    def after_update(self, done: int, batch: Batch) -> None:
        """Nothing: it looks when it is due."""

    def due(self, done: int) -> bool:
        """At the end of every so many epochs."""
        epoch, rest = divmod(done, self.recipe.steps_per_epoch)
        return rest == 0 and epoch % self.recipe.dense_every == 0

    def read(self, done: int) -> dict[str, float]:
        """{"dense_knn_miou", "dense_knn_accuracy"} if they are due; {} else. Collective."""
        if not self.due(done):
            return {}
        (bank, labels), (queries, truth) = (self._patches(split) for split in IMAGES)
        if not len(labels) or not len(truth):
            return {}
        scaled = scaler_of(bank)
        votes = nearest_votes(scaled(bank), labels, scaled(queries), self.classes, [K])
        found = testing.figures(testing.confusion(truth, next(iter(votes.values())), self.classes))
        return {"dense_knn_miou": found["miou"], "dense_knn_accuracy": found["aacc"]}

    def _patches(self, split: str) -> tuple[Tensor, Tensor]:
        """Features and labels of labelled patches, the same on all ranks, however many there are."""
        share, size = self._shares[split], self.launch.world_size
        rows = torch.cat([self._features(images) for images in share.images.split(CHUNK)])
        device = rows.device
        columns = [gather_rows(column, size) for column in (rows, share.labels.to(device), share.places.to(device))]
        order = columns[2].argsort()
        rows, labels = (column[order] for column in columns[:2])
        known = (labels != IGNORED).nonzero().flatten()
        some = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: MOST[split]]
        known = known[some.sort().values.to(device)]
        return rows[known], labels[known]

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """[B, H, W, C], as stored -> float32 [B * L, D]."""
        student = self.step.student
        tokens = student.encode(self.step.normalized_patches(images.to(self.launch.device)))
        return tokens[:, student.num_prefix_tokens :].flatten(0, 1).float()

    def save(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""

    def load(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""
