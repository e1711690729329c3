"""Mask R-CNN on a run's encoder, by ViTDet's protocol: all weights are trained, on images with boxes and masks.

    fasthpm detect RUN --data_path SCENES             # SCENES/{train,val}.json, SCENES/{train,val}/images/
    fasthpm detect RUN --data_path COCO               # COCO/annotations/, COCO/{train,val}2017/
    fasthpm detect RUN --train_json A.json --train_images A --val_json B.json --val_images B
    deepspeed --module fasthpm.dense.detection RUN …  # the same flags; torchrun too
    fasthpm detect RUN … --from_scratch               # the same network without pretraining
    fasthpm detect RUN … --evaluate                   # only test what is in the output folder
    fasthpm detect --evaluate vitdet.pkl --data_path COCO               # a file of detectron2's

The network is torchvision's Mask R-CNN on the encoder with windows and a simple feature pyramid, as ViTDet has it; the
engine is DeepSpeed. Files are of COCO's form, masks polygons or run lengths. --recipe auto (the default) takes the
papers' 12 epochs, of an LVIS file ViTDet's numbers for LVIS, and for runs of small images (up to 128 pixels)
maskrcnn_small, which is ours and takes minutes. Every number can be given; --steps N shortens the training. The same
command continues where a killed or interrupted one stopped.

RUN/detect/ receives result.json and result.md with box and mask AP and a row per class, pictures.png,
network.safetensors, metrics.jsonl and the checkpoints.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthpm import ranks
from fasthpm.cli import Arguments, without_effect
from fasthpm.data.rasters.files import reader_of
from fasthpm.data.shown import Shown
from fasthpm.data.statistics import PixelStatistics
from fasthpm.data.values import Values
from fasthpm.dense import command
from fasthpm.dense.detection import masks, pictures
from fasthpm.dense.detection.ap import FREQUENCIES, NAMES, Found, average_precision, described, gathered
from fasthpm.dense.detection.augment import Fit, Jitter, collate
from fasthpm.dense.detection.coco import CocoSet, find_split, open_set
from fasthpm.dense.detection.settings import RECIPES, SMALL, SMALL_SIDE, Detect
from fasthpm.dense.detection.vitdet import Windows
from fasthpm.dense.loader import Collate, DenseLoader, Transform
from fasthpm.dense.results import DenseResult
from fasthpm.dense.task import Task, Tested
from fasthpm.dense.tuning import normalised
from fasthpm.dense.values import ground, shown_once
from fasthpm.errors import UserError
from fasthpm.model import HPMViT

SUMMARY = __doc__ or ""


class Detection(Task):
    """What `fasthpm detect` is made of."""

    name, what, best = "detect", "detection", "mask_ap"
    summary = SUMMARY
    shown = tuple(f"{kind}_{name}" for name in (*NAMES, *FREQUENCIES.values()) for kind in ("mask", "box"))
    settings = Detect
    recipes = RECIPES

    def recipe_for(self, model: HPMViT, given: Mapping[str, Any]) -> str:
        """By the size of the run's images, and whether the data is LVIS."""
        if max(model.img_size) <= SMALL_SIDE:
            return SMALL
        file = Path(given.get("train_json", ""))
        if given.get("data_path"):
            file = find_split(Path(given["data_path"]), "val" if given.get("evaluate") else "train")[0]
        return "maskrcnn_vit_base_lvis" if "lvis" in file.name else "maskrcnn_vit_base_coco_12e"

    def open(self, settings: Detect, split: str, channels: int, values: Values) -> CocoSet:
        """The images and objects of a split."""
        masks.coco_library("mask")  # before the first step
        file, folder = where(settings, split)
        train = split == "train"
        data = open_set(file, folder, train=train, keep_empty=settings.keep_empty)
        data.channels, data.reader = channels, reader_of(values, channels)
        data.check_kind()
        if train and settings.repeat_threshold:
            from fasthpm.dense.detection.lvis import labels_of, repeat_factors

            data.repeated = repeat_factors(labels_of(data), len(data.classes), settings.repeat_threshold)
        return data

    def files(self, settings: Detect, data: Any) -> list[str]:
        """The file and its images."""
        return [data.source, *(data.name(sample) for sample in range(len(data)))]

    def transform(self, settings: Detect, split: str, pixels: PixelStatistics) -> Transform:
        """Large-scale jitter, or the whole image."""
        ways = ground(pixels, None), pixels.values.nodata
        if split == "val":
            return Fit(settings.side, *ways)
        scales = settings.scale_min, settings.scale_max
        return Jitter(settings.side, scales, settings.flip, settings.least_side, *ways)

    def collate(self, settings: Detect) -> Collate:
        """One for training and tests."""
        return collate

    def network(self, model: HPMViT, settings: Detect, data: Any) -> Any:
        """Mask R-CNN."""
        from fasthpm.dense.detection.network import build_detector, heads_of

        side, patch = settings.side, model.patch_size
        if side % patch:
            near = max(round(side / patch), 1) * patch
            raise UserError(f"input_size {side} is not a multiple of the run's patch_size {patch}; use e.g. {near}")
        windows = Windows(
            (side // patch, side // patch),
            settings.window,
            settings.relative_positions,
            settings.drop_path,
            settings.activation_checkpointing,
        )
        heads = heads_of(settings.heads, *settings.limits)
        network = build_detector(model, windows, heads, len(data.classes), settings.seed)
        if settings.loss == "federated":
            from fasthpm.dense.detection.lvis import FederatedHeads, image_counts, labels_of

            network.roi_heads = FederatedHeads(network.roi_heads, image_counts(labels_of(data), len(data.classes)))
        return network

    def refuse_idle(self, given: Mapping[str, Any]) -> None:
        """Files of one's own come before a data_path."""
        splits = ["val"] if given.get("evaluate") else ["train", "val"]
        if all(given.get(f"{split}_json") for split in splits):
            files = " and ".join(f"--{split}_json" for split in splits)
            without_effect(["data_path"], f"{files} name the files", given)

    def settle(self, network: Any, settings: Detect) -> None:
        """By what is asked of detections; else as they are tested where nothing is said."""
        heads = network.roi_heads
        heads.score_thresh = settings.score or heads.score_thresh
        heads.detections_per_img = settings.detections or heads.detections_per_img

    def test(self, forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch) -> Tested:
        """AP of boxes and masks, of all and of every class."""
        found, data = Found(), as_coco(loader)
        for predictions, batch in predicted(forward, loader, pixels, launch):
            found.add(predictions, batch.targets)
        whole = gathered(found)
        return ranks.by_first(lambda: Tested(*average_precision(data, whole)))

    def draw(
        self, forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch, path: Path, show: str
    ) -> None:
        """Images with true and detected objects."""
        examples, data, shown = [], as_coco(loader), shown_once(pixels, show)
        for predictions, batch in predicted(forward, loader, pixels, launch):
            examples += [example(data, *each, shown) for each in zip(predictions, batch.targets, strict=True)]
        with ranks.in_agreement():
            if launch.rank == 0:
                pictures.save(examples, data.classes, path)


# -------------------------------------------------------------------------------------------------- data
def where(settings: Detect, split: str) -> tuple[Path, Path]:
    """(file, folder of images) of a split. **Raises:** `UserError`."""
    file, folder = (getattr(settings, f"{split}_{name}") for name in ("json", "images"))
    if bool(file) != bool(folder):
        given, lacking = ("json", "images") if file else ("images", "json")
        raise UserError(f"--{split}_{given} is given without --{split}_{lacking}; give both")
    if file:
        return Path(file), Path(folder)
    if not settings.data_path:
        raise UserError(f"--data_path is missing; give it, or --{split}_json and --{split}_images")
    return find_split(Path(settings.data_path), split)


def as_coco(loader: DenseLoader) -> Any:
    """The loader's set: a `CocoSet`, or the first images of one."""
    return loader.data


# -------------------------------------------------------------------------------------------------- tests
def predicted(
    forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch
) -> Iterator[tuple[list[dict[str, Tensor]], Any]]:
    """Detections and batch, of every batch. A rank without images runs along: the others may need it to gather
    weights."""
    side = getattr(forward, "module", forward).side
    for batch in loader:
        if len(batch.images):
            images = normalised(batch.images.to(launch.device), pixels)
        else:
            images = torch.zeros(1, as_coco(loader).channels, side, side, device=launch.device)
        yield forward(images)[: len(batch.targets)], batch


def example(data: CocoSet, prediction: dict[str, Tensor], target: dict[str, Tensor], shown: Shown) -> pictures.Example:
    """What is drawn of an image, as it is `shown`."""
    sample = int(target["sample"])
    image, things = data.image(sample), data.things(sample)
    truth = [
        pictures.Shown(0 if thing.crowd else thing.label, None, corners(thing.box), mask)
        for thing, mask in zip(things, masks.decode([t.segmentation for t in things], *image[1:3]), strict=True)
    ]
    rows = described(prediction, sample, target["shown"], target["original"])
    decoded = masks.decode([row["segmentation"] for row in rows], *image[1:3])
    found = [
        pictures.Shown(row["category_id"], row["score"], corners(row["bbox"]), mask)
        for row, mask in zip(rows, decoded, strict=True)
    ]
    return pictures.Example(shown.first(data.pixels(sample)), truth, found)


def corners(box: Any) -> tuple[float, float, float, float]:
    """left, top, width, height -> left, top, right, bottom."""
    left, top, width, height = box
    return left, top, left + width, top + height


TASK = Detection()


def main(argv: Arguments = None) -> DenseResult:
    """`fasthpm detect` and `fasthpm.detect`, once per rank."""
    return command.main(TASK, argv)
