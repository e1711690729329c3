"""UPerNet on a run's encoder, by mmseg's protocol for MAE: all weights are trained, on images and masks.

    fasthpm segment RUN --data_path SCENES                    # SCENES/{train,val}/{images,masks}/, SCENES/classes.txt
    fasthpm segment RUN --data_path ADEChallengeData2016      # ADE20K as it is
    fasthpm segment RUN --train_images A --train_masks B --val_images C --val_masks D --classes FILE --background class
    deepspeed --module fasthpm.dense.segmentation RUN …       # the same flags; torchrun too
    fasthpm segment RUN … --from_scratch                      # the same network without pretraining
    fasthpm segment RUN … --evaluate                          # only test what is in the output folder
    fasthpm segment --evaluate upernet.pth --data_path ADEChallengeData2016  # a file of mmseg's

The network is transformers' UPerNet on its BEiT, which computes what the run's encoder does, the engine is DeepSpeed.
--recipe auto (the default) takes ADE20K's numbers for ViT-B or ViT-L, and for runs of small images (up to 128 pixels)
upernet_small, which is ours and takes minutes. Every number can be given; --steps N shortens the training. The same
command continues where a killed or interrupted one stopped.

Norms are over the images that are trained on at a time, --batch_size times devices; mmseg's are over 16.

RUN/segment/ receives result.json and result.md with mIoU, mAcc, aAcc and a row per class, pictures.png,
network.safetensors, metrics.jsonl and the checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm import ranks
from fasthpm.cli import Arguments, without_effect
from fasthpm.data.shown import Shown
from fasthpm.data.statistics import PixelStatistics
from fasthpm.data.values import Values, are_photographs
from fasthpm.dense import command
from fasthpm.dense.loader import Collate, DenseLoader, DenseSet, Transform
from fasthpm.dense.pairs import open_pairs
from fasthpm.dense.results import DenseResult
from fasthpm.dense.segmentation import pictures
from fasthpm.dense.segmentation.augment import FILL, Augmentation, Sample, for_test, resized_mask
from fasthpm.dense.segmentation.network import Segmenter, build_segmenter
from fasthpm.dense.segmentation.norms import world_size
from fasthpm.dense.segmentation.settings import RECIPES, SMALL, SMALL_SIDE, Segment
from fasthpm.dense.segmentation.testing import Windows, class_table, count_pixels, figures, predicted
from fasthpm.dense.task import Task, Tested
from fasthpm.dense.tuning import normalised
from fasthpm.dense.values import ground, shown_once
from fasthpm.errors import UserError, note_once
from fasthpm.files import read_json
from fasthpm.model import HPMViT
from fasthpm.ranks.deepspeed_json import find_config

SUMMARY = __doc__ or ""
FEW = 8  # images that norms are over: fewer are worth a word


@dataclass(frozen=True)
class TestImage:
    """Callable: an image and its mask as a test sees them; see `for_test`."""

    short_side: int
    nodata: float | None = None

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Without random numbers."""
        return for_test(sample, self.short_side, self.nodata)


def collate(samples: list[Sample]) -> tuple[Any, Any]:
    """Images [B, C, h, w], as stored, and masks uint8 [B, H, W]; lists of tensors where their sizes differ."""
    images, masks = ([torch.from_numpy(np.ascontiguousarray(sample[k])) for sample in samples] for k in (0, 1))
    alike = len({(image.shape, mask.shape) for image, mask in zip(images, masks, strict=True)}) == 1
    return (torch.stack(images), torch.stack(masks)) if alike else (images, masks)


class Segmentation(Task):
    """What `fasthpm segment` is made of."""

    name, what, best = "segment", "segmentation", "miou"
    summary = SUMMARY
    shown = ("miou", "macc", "aacc")
    settings = Segment
    recipes = RECIPES

    def recipe_for(self, model: HPMViT, given: Mapping[str, Any]) -> str:
        """By the size of the run's images and the width of its encoder."""
        if max(model.img_size) <= SMALL_SIDE:
            return SMALL
        return f"upernet_vit_{'large' if model.embed_dim >= 1024 else 'base'}_ade20k_160k"

    def open(self, settings: Segment, split: str, channels: int, values: Values) -> Any:
        """The pairs of a split."""
        return open_pairs(settings, split, channels=channels, values=values)

    def files(self, settings: Segment, data: Any) -> list[str]:
        """Images and masks."""
        return [str(path) for pair in data.pairs for path in (pair.image, pair.mask)]

    def transform(self, settings: Segment, split: str, pixels: PixelStatistics) -> Transform:
        """mmseg's augmentation, or the size of tests."""
        nodata, photographs = pixels.values.nodata, are_photographs(pixels.values.dtype, len(pixels.mean))
        if split == "val":
            return TestImage(settings.test_side, nodata)
        if settings.distort and not photographs:
            note_once("colours are not distorted: that is for photographs, and the model takes other pixels")
        return Augmentation(
            settings.image_size,
            settings.test_side,
            (settings.resize_min, settings.resize_max),
            settings.cat_max_ratio,
            settings.flip,
            settings.distort and photographs,
            ground(pixels, FILL),
            nodata,
        )

    def collate(self, settings: Segment) -> Collate:
        """One for training and tests."""
        return collate

    def network(self, model: HPMViT, settings: Segment, data: DenseSet) -> Segmenter:
        """UPerNet, with the windows that it is tested by."""
        if not settings.evaluate:
            check_training(settings, settings.batch_size * world_size())
        network = build_segmenter(
            model,
            len(data.classes),
            image_size=settings.image_size,
            width=settings.head_width,
            drop_path=settings.drop_path,
            relative_positions=settings.relative_positions,
            layer_scale=settings.layer_scale,
            seed=settings.seed,
        )
        self.settle(network, settings)
        return network

    def refuse_idle(self, given: Mapping[str, Any]) -> None:
        """Whole images have no windows."""
        if given.get("whole"):
            without_effect(["stride"], "--whole tests whole images, without windows", given)

    def settle(self, network: Segmenter, settings: Segment) -> None:
        """By windows, or whole images."""
        network.strides = settings.strides

    def test(self, forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch) -> Tested:
        """mIoU, mAcc, aAcc and the table of classes."""
        counts = count_pixels(windows_of(forward, loader, launch), loader, pixels, launch)
        return Tested(figures(counts), class_table(counts, loader.data.classes))

    def draw(
        self, forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch, path: Path, show: str
    ) -> None:
        """Images, masks and predictions."""
        windows, examples, shown = windows_of(forward, loader, launch), [], shown_once(pixels, show)
        for batch in loader:
            logits = windows([normalised(image.to(launch.device), pixels) for image in batch.images])
            for image, truth, found in zip(batch.images, batch.targets, logits, strict=True):
                examples.append(example(image, truth, found, shown))
        with ranks.in_agreement():
            if launch.rank == 0:
                pictures.save(examples, loader.data.classes, path)


def check_training(settings: Segment, together: int) -> None:
    """`together`: images that are trained on at a time. **Raises:** `UserError` for what would fail in an update."""
    if together < 2:
        raise UserError(
            "batch_size is 1 on one device, and UPerNet's norms need two images at a time; use --batch_size 2"
        )
    zero = read_json(find_config(settings.deepspeed_config)).get("zero_optimization", {})
    if settings.layer_scale and zero.get("stage") == 3:
        raise UserError(
            f"layer_scale does not train under ZeRO 3, which {settings.deepspeed_config} asks for; use "
            f"--deepspeed_config zero2_bf16, or leave one of them out"
        )
    if together < FEW:
        note_once(
            f"norms are over the {together} images that are trained on at a time, mmseg's over 16; --batch_size {FEW} "
            f"or more is steadier"
        )


def windows_of(forward: Any, loader: DenseLoader, launch: ranks.Launch) -> Windows:
    """How the network, or the engine around it, is tested."""
    network: Segmenter = getattr(forward, "module", forward)
    config = network.net.backbone.config
    return Windows(
        forward,
        launch.device,
        network.net.config.num_labels,
        tuple(config.image_size),
        network.strides,
        channels=config.num_channels,
        multiple=config.patch_size,
        batch_size=loader.batch_size,
    )


def example(image: Tensor, truth: Tensor, logits: Tensor, shown: Shown) -> pictures.Example:
    """What is drawn, all at the image's size: an image [C, h, w] as it is `shown`, its mask [H, W], and what its logits
    [K, h, w] say."""
    size = (image.shape[1], image.shape[2])
    mask = resized_mask(truth.numpy(), size, (0, 0), size)
    labels = predicted(logits, size).to(torch.uint8).cpu().numpy()
    return pictures.Example(shown.first(image.permute(1, 2, 0).numpy()), mask, labels)


TASK = Segmentation()


def main(argv: Arguments = None) -> DenseResult:
    """`fasthpm segment` and `fasthpm.segment`, once per rank."""
    return command.main(TASK, argv)
