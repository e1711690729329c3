"""What LVIS's long tail of 1,203 classes needs: repeated images, and a loss over some of the classes.

LVIS (Gupta et al. 2019) is annotated in a federated way: of an image, some classes are known to be there, some known
not to be, and nothing is known of the others. ViTDet trains on it with repeat-factor sampling, sigmoids instead of a
softmax, and a loss over the classes of the batch and as many others as make fifty (detectron2) [released code].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.ops import batched_nms
from torchvision.ops import boxes as box_ops

from fasthpm.data.sampling import Array
from fasthpm.dense.detection.coco import CocoSet

CLASSES_OF_LOSS = 50  # those of the batch's objects among them
POWER = 0.5  # of a class's number of images, by which the others are drawn
PRIOR = 0.01  # probability of every class at the start


def labels_of(data: CocoSet) -> list[list[int]]:
    """The labels, from 1, of every image's objects, each once."""
    return [sorted({thing.label for thing in data.things(sample)}) for sample in range(len(data))]


def image_counts(labels: Sequence[Sequence[int]], num_classes: int) -> Array:
    """In how many images each class is: int64 [K]."""
    flat = np.array([label - 1 for row in labels for label in row], np.int64)
    return np.bincount(flat, minlength=num_classes)


def repeat_factors(labels: Sequence[Sequence[int]], num_classes: int, threshold: float) -> Array:
    """How often an image comes in an epoch: float64 [N], 1 or more.

    The largest of its classes' sqrt(threshold / share of the images with that class) (LVIS, section 4).
    """
    share = image_counts(labels, num_classes) / max(len(labels), 1)
    of_class = np.maximum(np.sqrt(threshold / np.maximum(share, 1e-12)), 1.0)
    return np.array([max((of_class[label - 1] for label in row), default=1.0) for row in labels])


class FederatedHeads(RoIHeads):
    """torchvision's heads with sigmoids and the federated loss; column 0 of the scores, the ground's, is not used.

    - `given`: the heads whose parts these take; `counts`: int64 [K], images of each class
    """

    def __init__(self, given: RoIHeads, counts: Array) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(given))
        self.weights = tuple((counts.astype(float) ** POWER).tolist())  # no buffer, which DeepSpeed would round
        nn.init.constant_(self.box_predictor.cls_score.bias, float(-np.log((1 - PRIOR) / PRIOR)))

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Any, targets: Any = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """As torchvision's, but for the loss of the classes."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        scores, boxes = self.box_predictor(pooled)
        _, box_loss = fastrcnn_loss(scores.detach(), boxes, labels, regression)
        positive = [torch.where(each > 0)[0] for each in labels]
        masked = [each[kept] for each, kept in zip(proposals, positive, strict=True)]
        numbers = [each[kept] for each, kept in zip(matched, positive, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, masked, image_shapes)))
        masks, truth = [each["masks"] for each in targets], [each["labels"] for each in targets]
        return [], {
            "loss_classifier": federated_loss(scores, torch.cat(labels), scores.new_tensor(self.weights)),
            "loss_box_reg": box_loss,
            "loss_mask": maskrcnn_loss(logits, masked, masks, truth, numbers),
        }

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As torchvision's, of sigmoids: boxes, scores and labels of every image."""
        counts = [len(each) for each in proposals]
        boxes = self.box_coder.decode(box_regression, proposals).split(counts)
        scores = class_logits.sigmoid().split(counts)
        kept = [self._keep(*each) for each in zip(boxes, scores, image_shapes, strict=True)]
        return tuple(list(each) for each in zip(*kept, strict=True))  # type: ignore[return-value]

    def _keep(self, boxes: Tensor, scores: Tensor, shape: Any) -> tuple[Tensor, Tensor, Tensor]:
        regions, labels = torch.where(scores[:, 1:] > self.score_thresh)
        boxes = box_ops.clip_boxes_to_image(boxes[regions, labels + 1], shape)
        scores, labels = scores[regions, labels + 1], labels + 1
        large = box_ops.remove_small_boxes(boxes, 1e-2)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        best = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return boxes[best], scores[best], labels[best]


def federated_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sigmoid cross-entropy over `classes_of_loss`, summed over them and averaged over the regions.

    - `scores`: [N, 1 + K], column 0 is not used; `labels`: int64 [N], 0 = ground; `weights`: [K]
    """
    truth = F.one_hot(labels, scores.shape[1]).to(scores.dtype)[:, 1:]
    losses = F.binary_cross_entropy_with_logits(scores[:, 1:], truth, reduction="none")
    return (losses * classes_of_loss(labels, weights)).sum() / max(len(labels), 1)


def classes_of_loss(labels: Tensor, weights: Tensor) -> Tensor:
    """Which classes a batch is trained on: float [K], 1 for those of its objects and for others, drawn by their weights
    without replacement from torch's generator, until there are `CLASSES_OF_LOSS`."""
    chosen = torch.zeros_like(weights)
    chosen[labels[labels > 0] - 1] = 1
    others = weights * (1 - chosen)
    lacking = min(CLASSES_OF_LOSS - int(chosen.sum()), int((others > 0).sum()))
    if lacking > 0:
        chosen[torch.multinomial(others, lacking, replacement=False)] = 1
    return chosen
