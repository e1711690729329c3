"""Average precision of boxes and masks, as COCO and LVIS count it, of detections gathered from all ranks.

faster_coco_eval computes it; tests hold it to pycocotools. Figures are in percent. Where nothing was detected it is 0;
of a size or a class that has no object in the images there is none.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm.data.sampling import Array
from fasthpm.dense.detection.coco import CocoSet
from fasthpm.dense.detection.masks import coco_library, encode, paste
from fasthpm.ranks.agreement import PATIENCE

KINDS = {"mask": "segm", "box": "bbox"}
SHOWN = ("AP_all", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large")
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
FREQUENCIES = {"APr": "ap_rare", "APc": "ap_common", "APf": "ap_frequent"}  # LVIS's
LVIS_MOST = 300  # detections of an image that are looked at; COCO's 100 are the library's


@dataclass
class Found:
    """Detections of some images in their own pixels, in COCO's form: image n is sample n, category k the label k."""

    samples: set[int] = field(default_factory=set)  # that were looked at
    detections: list[dict[str, Any]] = field(default_factory=list)

    def add(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        """Take in a batch: what `Detector` gives, and `Fit`'s targets of the same images."""
        for prediction, target in zip(predictions, targets, strict=True):
            sample = int(target["sample"])
            if sample not in self.samples:  # else it stood in for another one
                self.samples.add(sample)
                self.detections += described(prediction, sample, target["shown"], target["original"])


def described(prediction: dict[str, Tensor], sample: int, shown: Tensor, original: Tensor) -> list[dict[str, Any]]:
    """Detections of an image in COCO's form; those outside it are left out.

    - `prediction`: one of `Detector`'s; `shown`, `original`: see `augment.Fit`
    """
    height, width = (int(length) for length in original)
    boxes = in_original(prediction["boxes"].float().cpu(), shown.cpu(), original.cpu())
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, scores, labels = (each[kept] for each in (boxes, prediction["scores"].cpu(), prediction["labels"].cpu()))
    lengths = encode(paste(prediction["masks"].cpu()[kept], boxes, height, width))
    rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), lengths, strict=True)
    return [
        {
            "image_id": sample,
            "category_id": label,
            "score": score,
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": mask,
        }
        for (left, top, right, bottom), score, label, mask in rows
    ]


def in_original(boxes: Tensor, shown: Tensor, original: Tensor) -> Tensor:
    """Boxes [N, 4] of the network's input in the image's own pixels, cut at its border."""
    scale = (original / shown).flip(0).repeat(2)  # width, height, width, height
    limits = original.flip(0).repeat(2)
    return torch.minimum((boxes * scale).clamp_min(0), limits.to(boxes.dtype))


# -------------------------------------------------------------------------------------------------- gathering
def gathered(found: Found) -> Found:
    """All ranks' detections on rank 0, each image once; on the others what they had. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _once([found])
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    first = dist.get_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(found, parts, group=group)
    return _once(parts) if parts else found


def _once(parts: Sequence[Found]) -> Found:
    """Of an image that several ranks saw, or that stood in for another, the first."""
    whole = Found()
    for part in parts:
        fresh = part.samples - whole.samples
        whole.samples |= fresh
        whole.detections += [row for row in part.detections if row["image_id"] in fresh]
    return whole


# -------------------------------------------------------------------------------------------------- measuring
def average_precision(data: CocoSet, found: Found) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures in percent of the images that were looked at, `mask_ap`, `mask_ap50`, …, `box_ap_large`, and of LVIS
    `mask_ap_rare` and so on; and a row per class with its `mask_ap` and `box_ap`, None where it has no object.

    - `found`: gathered
    """
    figures: dict[str, float] = {}
    table: list[dict[str, Any]] = [{"class": name} for name in data.classes]
    for kind in KINDS:
        of_all, by_class = measure(data, found, kind)
        figures |= of_all
        for row, value in zip(table, by_class, strict=True):
            row[f"{kind}_ap"] = None if value is None else round(value, 4)
    return figures, table


def measure(data: CocoSet, found: Found, kind: str) -> tuple[dict[str, float], list[float | None]]:
    """Figures of boxes or masks, "box" or "mask", and the AP of every class, None where it has no object."""
    lvis = is_lvis(data)
    api, left_out = coco_library("coco"), {"box": "segmentation", "mask": "bbox"}[kind]  # of masks the area counts
    content = data.truth(sorted(found.samples))
    rows = only_known(content, found.detections) if lvis else found.detections
    told = [{key: value for key, value in row.items() if key != left_out} for row in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = api.COCO(content)
        counter = coco_library("faster_eval_api").COCOeval_faster(
            truth, truth.loadRes(told), KINDS[kind], lvis_style=lvis, print_function=lambda *_: None
        )
        if lvis:
            counter.params.maxDets = [LVIS_MOST]
        counter.run()
    stats = counter.stats_as_dict
    names = dict(zip(SHOWN, NAMES, strict=True)) | (FREQUENCIES if lvis else {})
    figures = {f"{kind}_{ours}": percent(stats[theirs]) for theirs, ours in names.items()}
    precision = counter.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes]
    by_class = [percent(mean_of(precision[:, :, number])) for number in range(len(data.classes))]
    return {f"{kind}_ap": 0.0} | {name: value for name, value in figures.items() if value is not None}, by_class


def is_lvis(data: CocoSet) -> bool:
    """Whether the set says which classes an image was searched for."""
    return all("frequency" in category for category in data.categories) and "neg_category_ids" in data.image(0).more


def only_known(truth: dict[str, Any], detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS: detections of classes that the image was searched for. The library leaves out the others too, but fails
    where an image has no object."""
    known = {(row["image_id"], row["category_id"]) for row in truth["annotations"]}
    known |= {(image["id"], label) for image in truth["images"] for label in image["neg_category_ids"]}
    return [row for row in detections if (row["image_id"], row["category_id"]) in known]


def mean_of(precision: Array) -> float:
    """Mean of the values that there are (-1: none), -1 if there is none."""
    values = precision[precision > -1]
    return float(values.mean()) if values.size else -1.0


def percent(value: float) -> float | None:
    """0..1 as percent; -1, which is COCO's "no such object", as None."""
    return 100 * float(value) if value > -1 else None
