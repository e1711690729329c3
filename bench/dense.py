"""Training steps of segmentation and detection against the same models in a plain library loop, interleaved.

    python -m bench.dense [--tasks segment …] [--size nano] [--batch_size 8] [--precision fp32 bf16] [--rounds 5]
        [-o bench/results/dense_step.json]

Ours is the step of `fasthpm segment` and `fasthpm detect`: normalisation, network and losses, backward and AdamW with
rates per layer, through the DeepSpeed engine. Plain is the library's model as it comes, with the same encoder in it,
its own losses and `torch.optim.AdamW`; in bf16 all its weights are bfloat16, which leaves out the float32 masters that
ours keeps. Both take turns within a round on the same batch; a ratio is the median of the rounds' ratios.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from bench.common import json_file, machine, ratios, say, show, spread, table, write_json
from bench.step import CONFIGS, INFO, Update, measure
from fasthpm import ranks, recipes
from fasthpm.cli import Parser, run_command
from fasthpm.data.statistics import PixelStatistics, statistics_of
from fasthpm.dense.detection.command import TASK as DETECT
from fasthpm.dense.detection.network import RATIOS, heads_of
from fasthpm.dense.detection.pyramid import LEVELS, strides
from fasthpm.dense.detection.vitdet import ViTDet
from fasthpm.dense.segmentation.command import TASK as SEGMENT
from fasthpm.dense.segmentation.network import load_encoder, upernet_config
from fasthpm.dense.task import Task
from fasthpm.dense.tuning import normalised, parameter_groups, plan_of
from fasthpm.errors import UserError
from fasthpm.exchange.forms import library
from fasthpm.layers import LAYER_NORM_EPS
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe

SIZES: dict[str, dict[str, Any]] = {  # the encoder, and the side of its crops
    "nano": {"model": "mae_vit_nano_patch4_28", "patch_size": 8, "input_size": "96"},
    "small": {"model": "mae_vit_small_patch16_224", "input_size": "224"},
    "base": {"model": "mae_vit_base_patch16_224", "input_size": "512"},
}
CLASSES = tuple(f"class {number}" for number in range(11))
Loss = Callable[[nn.Module, Any, Any], Tensor]  # the library's model, images as it takes them, targets -> its loss


@dataclass(frozen=True)
class Case:
    """One task.

    - `settings`: of the small recipe or the published one, for the bench's arguments
    - `batch`: images uint8 and targets as the task's `collate` makes them, fixed
    - `plain`: the library's model with the same encoder; `loss`: what it trains
    - `precisions`: that the library's model trains in (torchvision pools no regions in bfloat16)
    """

    task: Task
    settings: Callable[[argparse.Namespace], Any]
    batch: Callable[[argparse.Namespace, Any], tuple[Any, Any]]
    plain: Callable[[HPMViT, Any], nn.Module]
    loss: Loss
    precisions: tuple[str, ...] = tuple(CONFIGS)


class Classes:
    """What a network asks of a data set."""

    source, classes = "random images", CLASSES


# -------------------------------------------------------------------------------------------------- segmentation
def segment_settings(arguments: argparse.Namespace) -> Any:
    """The small recipe for small crops, the published one for large ones."""
    base = SEGMENT.recipes["upernet_small" if arguments.size == "nano" else "upernet_vit_base_ade20k_160k"]()
    return dataclasses.replace(base, input_size=SIZES[arguments.size]["input_size"])


def segment_batch(arguments: argparse.Namespace, settings: Any) -> tuple[Tensor, Tensor]:
    """Random pixels and labels."""
    random, (height, width) = torch.Generator().manual_seed(0), settings.image_size
    images = torch.randint(0, 256, (arguments.batch_size, 3, height, width), dtype=torch.uint8, generator=random)
    masks = torch.randint(0, len(CLASSES), (arguments.batch_size, height, width), dtype=torch.uint8, generator=random)
    return images, masks


def plain_segment(model: HPMViT, settings: Any) -> nn.Module:
    """transformers' UPerNet without our parts."""
    config = upernet_config(model, len(CLASSES), settings.image_size, settings.head_width, settings.drop_path)
    net: nn.Module = library("transformers").UperNetForSemanticSegmentation(config)
    load_encoder(net, model, settings.image_size)
    return net


def segment_loss(net: Any, images: Tensor, masks: Tensor) -> Tensor:
    """Of both heads."""
    loss: Tensor = net(pixel_values=images, labels=masks.long()).loss
    return loss


# -------------------------------------------------------------------------------------------------- detection
def detect_settings(arguments: argparse.Namespace) -> Any:
    """The small recipe for small crops, the published one, without relative positions, for large ones."""
    name = "maskrcnn_small" if arguments.size == "nano" else "maskrcnn_vit_base_coco_12e"
    size = SIZES[arguments.size]["input_size"]
    return dataclasses.replace(DETECT.recipes[name](), input_size=size, relative_positions=False)


def detect_batch(arguments: argparse.Namespace, settings: Any) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Random pixels, and three rectangles in every image."""
    random, side = torch.Generator().manual_seed(0), settings.side
    images = torch.randint(0, 256, (arguments.batch_size, 3, side, side), dtype=torch.uint8, generator=random)
    targets = []
    for _ in range(arguments.batch_size):
        corners = (torch.rand(3, 2, generator=random) * 0.6 * side).floor()
        boxes = torch.cat([corners, corners + 0.35 * side], dim=1)
        masks = torch.zeros(3, side, side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, len(CLASSES) + 1, (3,), generator=random)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets


def plain_detect(model: HPMViT, settings: Any) -> nn.Module:
    """torchvision's Mask R-CNN of as many layers as ours, as its parts come, on timm's ViTDet encoder."""
    ours: Any = DETECT.network(model, settings, Classes())
    heads, steps, side = heads_of(settings.heads, *settings.limits), strides(model.patch_size), settings.side
    channels, convs = heads.channels, [heads.channels] * heads.box_convs
    body = plain_encoder(ours.backbone.body)
    net: nn.Module = MaskRCNN(
        PlainBackbone(body, ours.backbone.pyramid, channels),
        min_size=side,
        max_size=side,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(tuple((step * heads.anchor,) for step in steps), (RATIOS,) * len(steps)),
        rpn_head=RPNHead(channels, len(RATIOS), heads.rpn_convs),
        rpn_pre_nms_top_n_train=heads.before[0],
        rpn_post_nms_top_n_train=heads.after[0],
        rpn_batch_size_per_image=heads.rpn_batch,
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS), 7, heads.samples),
        box_head=FastRCNNConvFCHead((channels, 7, 7), convs, [heads.box_width], norm_layer=LayerNorm2d),
        box_predictor=FastRCNNPredictor(heads.box_width, len(CLASSES) + 1),
        box_batch_size_per_image=heads.roi_batch,
        mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), 14, heads.samples),
        mask_head=MaskRCNNHeads(channels, [channels] * heads.mask_convs, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, len(CLASSES) + 1),
    )
    return net


def plain_encoder(ours: ViTDet) -> nn.Module:
    """timm's ViTDet with the weights of ours; positions are interpolated once, and trained as they are then."""
    rows, columns = ours.windows.grid
    blocks: list[Any] = list(ours.blocks)
    windows = [block.window for block in blocks]
    body = VisionTransformerSAM(
        img_size=(rows * ours.patch_size, columns * ours.patch_size),
        patch_size=ours.patch_size,
        embed_dim=ours.embed_dim,
        depth=len(windows),
        num_heads=blocks[0].attn.num_heads,
        num_classes=0,
        neck_chans=0,
        norm_layer=functools.partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
        window_size=max(windows),
        global_attn_indexes=tuple(number for number, window in enumerate(windows) if not window),
        drop_path_rate=ours.windows.drop_path,
    )
    state = {**ours.state_dict(), "pos_embed": ours._positions(ours.windows.grid).detach()}
    missing = body.load_state_dict(state, strict=False)
    if missing.unexpected_keys or any(key.startswith("blocks") for key in missing.missing_keys):
        raise RuntimeError(f"timm's ViTDet does not take this encoder: {missing}")
    body.neck = nn.Identity()
    return body


class PlainBackbone(nn.Module):
    """timm's encoder and a pyramid, as torchvision's detectors want it."""

    def __init__(self, body: Any, pyramid: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.pyramid, self.out_channels = body, pyramid, channels

    def forward(self, images: Tensor) -> Any:
        """[B, C, S, S] -> maps by name."""
        return self.pyramid(self.body.forward_features(images))


def detect_loss(net: Any, images: Tensor, targets: Any) -> Tensor:
    """All five."""
    loss: Tensor = torch.stack(list(net(list(images), targets).values())).sum()
    return loss


CASES = {
    "segment": Case(SEGMENT, segment_settings, segment_batch, plain_segment, segment_loss),
    "detect": Case(DETECT, detect_settings, detect_batch, plain_detect, detect_loss, ("fp32",)),
}


# -------------------------------------------------------------------------------------------------- both sides
def recipe_of(arguments: argparse.Namespace, folder: Path) -> Recipe:
    """Of a run that the encoder could come from."""
    base = dataclasses.replace(recipes.from_name("mae_vit_base_in1k_200e"), **SIZES[arguments.size])
    if arguments.size == "nano":
        base = dataclasses.replace(base, decoder_dim=64, decoder_depth=1, decoder_heads=4)
    return dataclasses.replace(base, output_dir=str(folder))


def ours(case: Case, recipe: Recipe, arguments: argparse.Namespace, precision: str, launch: ranks.Launch) -> Update:
    """A whole update of the command."""
    settings = dataclasses.replace(
        case.settings(arguments),
        batch_size=arguments.batch_size,
        global_batch_size=arguments.batch_size,
        output_dir=recipe.output_dir,
        deepspeed_config=CONFIGS[precision],
    )
    model, pixels = model_of(recipe), statistics_of(INFO)
    network: Any = case.task.network(model, settings, Classes())  # type: ignore[arg-type]
    plan = plan_of(recipe, settings, 1)
    groups = parameter_groups(network, len(model.blocks), settings.layer_decay, settings.weight_decay)
    config = ranks.merge_config(plan.deepspeed_config, plan, 1)
    engine = ranks.build_engine(network, plan, config, launch, groups)
    images, targets = on(case.batch(arguments, settings), launch.device)

    def update(number: int) -> None:
        ranks.set_lr(engine, settings.lr_at(number % settings.steps))
        losses = engine(normalised(images, pixels), targets)
        engine.backward(torch.stack([value.float() for value in losses.values()]).sum())
        engine.step()

    return update


def plain(case: Case, recipe: Recipe, arguments: argparse.Namespace, precision: str, launch: ranks.Launch) -> Update:
    """A whole update of the library's model."""
    settings, pixels = case.settings(arguments), PixelStatistics(INFO.mean, INFO.std)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net = case.plain(model_of(recipe), settings).to(launch.device, dtype).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    images, targets = on(case.batch(arguments, settings), launch.device)

    def update(number: int) -> None:
        loss = case.loss(net, cast(normalised(images, pixels), dtype), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def on(value: Any, device: torch.device) -> Any:
    """Every tensor in it on `device`."""
    return each(value, lambda tensor: tensor.to(device))


def cast(images: Any, dtype: torch.dtype) -> Any:
    """Images, or a list of them, as `dtype`."""
    return each(images, lambda tensor: tensor.to(dtype))


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each(one, change) for name, one in value.items()}
    return type(value)(each(one, change) for one in value)


# -------------------------------------------------------------------------------------------------- the bench
def one_cell(task: str, precision: str, arguments: argparse.Namespace, launch: ranks.Launch) -> dict[str, Any]:
    """Both sides of a task at one precision."""
    case = CASES[task]
    with tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as folder:
        recipe = recipe_of(arguments, Path(folder))
        sides = {"ours": ours, "plain": plain}
        updates = {name: side(case, recipe, arguments, precision, launch) for name, side in sides.items()}
        seconds, cpu_seconds = measure(updates, arguments.rounds, arguments.repeats, launch.device)
    return {
        "task": task,
        "precision": precision,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": ratios(seconds["ours"], seconds["plain"]),
        "cpu_ratio": ratios(cpu_seconds["ours"], cpu_seconds["plain"]),
        "raw_seconds": seconds,
        "raw_cpu_seconds": cpu_seconds,
    }


def report(result: dict[str, Any]) -> str:
    """A row per task and precision."""
    rows = [
        [
            one["task"],
            one["precision"],
            *(f"{one['seconds'][side]['median']:.3f}" for side in ("ours", "plain")),
            show(one["ratio"]),
            show(one["cpu_ratio"]),
        ]
        for one in result["cells"]
    ]
    return table(("task", "precision", "ours, s", "plain, s", "ratio of time", "of processor time"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.dense`."""
    parser = Parser(prog="python -m bench.dense", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--size", choices=tuple(SIZES), default="nano")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--precision", nargs="+", choices=tuple(CONFIGS), default=["fp32"])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--repeats", type=int, default=2, help="updates per round and side")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on the CPU (0: all cores)")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 2 or arguments.rounds < 1 or arguments.repeats < 1:
        raise UserError("rounds and repeats must be 1 or more, batch_size 2 or more")
    with ranks.session() as launch:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        cells = []
        for task in arguments.tasks:
            for precision in [one for one in arguments.precision if one in CASES[task].precisions]:
                say(f"{task}, {precision}")
                cells.append(one_cell(task, precision, arguments, launch))
        sizes = {name: getattr(arguments, name) for name in ("size", "batch_size", "rounds", "repeats")}
        result = {"bench": "dense", **sizes, "threads": torch.get_num_threads(), "cells": cells, "machine": machine()}
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
