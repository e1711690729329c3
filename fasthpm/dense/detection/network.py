"""torchvision's Mask R-CNN on the encoder, with ViTDet's heads.

torchvision's parts are used as they are wherever they can be; what differs here makes them what ViTDet trains
(detectron2 `projects/ViTDet`) and lets them run in bfloat16:

- anchors and regions of interest are float32 whatever the maps are: bfloat16 has 8 bits, a box at 1,000 pixels needs 12
- anchors are not rounded to pixels, and the strides are the levels' own (torchvision infers them from the maps' sizes)
- regions are pooled with the half pixel's shift and as many samples as they need (detectron2's `ROIAlignV2`, ratio 0)
- levels of regions follow the patch size, so that patches of 14 pixels and of 4 work too

Not as there: torchvision's box losses are smooth L1 with beta 1/9, detectron2's L1.

B images, C channels, S their side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align

from fasthpm.dense.detection.pyramid import LEVELS, Backbone, strides
from fasthpm.dense.detection.vitdet import ViTDet, Windows
from fasthpm.loss import full_precision
from fasthpm.model import HPMViT

BOX_SIDE, MASK_SIDE = 7, 14  # of a pooled region; a mask has twice the side
RATIOS = (0.5, 1.0, 2.0)  # of the anchors
CANONICAL, CANONICAL_LEVEL = 56.0, 2  # a region of 56 finest strides (224 pixels) belongs to level 2 (FPN, eq. 1)
BODY = "backbone.body."  # how the names of the encoder's parameters begin


@dataclass(frozen=True)
class Heads:
    """What stands on the encoder. Defaults are ViTDet's [released code]; `SMALL` has ours for small images.

    - `channels`: of the pyramid and the convolutions; `rpn_convs`, `box_convs`, `mask_convs`: how many
    - `box_width`: hidden units of the box head
    - `anchor`: side of an anchor in strides of its level
    - `rpn_batch`, `roi_batch`: anchors and regions of an image that are trained
    - `before`, `after`: proposals of a level before non-maximum suppression and of an image after it, in training
      and in tests
    - `samples`: of a pooled region's cell, per side; 0 = as many as its size asks for
    - `score`, `detections`: detections below that score are left out, and of an image so many are kept
    """

    channels: int = 256
    rpn_convs: int = 2
    box_convs: int = 4
    mask_convs: int = 4
    box_width: int = 1024
    anchor: float = 8.0
    rpn_batch: int = 256
    roi_batch: int = 512
    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (1000, 1000)
    samples: int = 0
    score: float = 0.05
    detections: int = 100


SMALL = Heads(
    channels=64,
    rpn_convs=1,
    box_convs=1,
    mask_convs=2,
    box_width=256,
    anchor=6.0,
    rpn_batch=64,
    roi_batch=32,
    before=(200, 200),
    after=(100, 100),
    samples=2,
)


def heads_of(name: str, score: float, detections: int) -> Heads:
    """Heads by name, "vitdet" or "small", with these limits of tests."""
    return replace({"vitdet": Heads(), "small": SMALL}[name], score=score, detections=detections)


class Detector(MaskRCNN):
    """Encoder, pyramid, proposals, boxes and masks.

    - `forward(images, targets)`, training: a dict of five losses, scalars
    - `forward(images)`, evaluation: per image a dict of float32 `boxes` [N, 4] (left, top, right, bottom in the input's
      pixels), `labels` int64 [N] from 1, `scores` [N], `masks` [N, 1, 28, 28], probabilities within the box
    - `images`: float [B, C, S, S], normalised
    - `targets`: per image `boxes` float32 [N, 4], `labels` int64 [N] from 1, `masks` uint8 [N, S, S]; N may be 0
    """

    def __init__(self, backbone: Backbone, num_classes: int, heads: Heads) -> None:
        channels, side = backbone.out_channels, backbone.body.patch_size
        norm = LayerNorm2d
        super().__init__(
            backbone,
            rpn_anchor_generator=Anchors(strides(side), heads.anchor),
            rpn_head=ProposalHead(channels, len(RATIOS), heads.rpn_convs),
            rpn_pre_nms_top_n_train=heads.before[0],
            rpn_pre_nms_top_n_test=heads.before[1],
            rpn_post_nms_top_n_train=heads.after[0],
            rpn_post_nms_top_n_test=heads.after[1],
            rpn_batch_size_per_image=heads.rpn_batch,
            box_roi_pool=RegionPool(BOX_SIDE, strides(side), heads.samples),
            box_head=FastRCNNConvFCHead(
                (channels, BOX_SIDE, BOX_SIDE), [channels] * heads.box_convs, [heads.box_width], norm_layer=norm
            ),
            box_predictor=BoxPredictor(heads.box_width, num_classes + 1),
            box_score_thresh=heads.score,
            box_detections_per_img=heads.detections,
            box_batch_size_per_image=heads.roi_batch,
            mask_roi_pool=RegionPool(MASK_SIDE, strides(side), heads.samples),
            mask_head=MaskRCNNHeads(channels, [channels] * heads.mask_convs, 1, norm_layer=norm),
            mask_predictor=MaskPredictor(channels, channels, num_classes + 1),
        )
        self.transform = Unchanged()
        self.side = backbone.body.windows.grid[0] * side  # S

    def encoder_name(self, name: str) -> str:
        """timm's name of a parameter of the encoder, "" for one of the rest: what the learning rate per layer asks."""
        return name.removeprefix(BODY) if name.startswith(BODY) else ""


def build_detector(model: HPMViT, windows: Windows, heads: Heads, num_classes: int, seed: int) -> Detector:
    """The detector of a pretrained `model` for `num_classes` classes; what is fresh is drawn from `seed` alone.

    **Raises:** `UserError` for a video model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(Backbone(ViTDet(model, windows), heads.channels), num_classes, heads)


class Unchanged(nn.Module):
    """The place of torchvision's transform: images come normalised, of one size, and boxes stay in their pixels."""

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        """Images [B, C, S, S] as torchvision's list of them."""
        return ImageList(images, [tuple(images.shape[-2:])] * len(images)), targets

    def postprocess(self, result: Any, shapes: Any, original: Any) -> Any:
        """Detections as they are."""
        return result


# -------------------------------------------------------------------------------------------------- float32 places
class Anchors(AnchorGenerator):
    """Anchors of all levels in float32, not rounded; computed once per size of the maps.

    - `steps`: stride of each level in pixels; `scale`: an anchor's side in strides
    """

    def __init__(self, steps: Sequence[float], scale: float) -> None:
        super().__init__(tuple((step * scale,) for step in steps), (RATIOS,) * len(steps))
        self.steps = tuple(steps)
        self._known: dict[Any, Tensor] = {}

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *_: Any) -> Tensor:
        """Centred anchors [ratios, 4], height / width = ratio, not rounded."""
        size, ratio = torch.tensor(scales, dtype=torch.float32), torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
        width, height = size / ratio, size * ratio
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """float32 [A, 4] for every image, the same."""
        device = feature_maps[0].device
        grids = tuple(tuple(each.shape[-2:]) for each in feature_maps)
        if (grids, device) not in self._known:
            self.set_cell_anchors(torch.float32, device)
            steps = [[torch.tensor(step, device=device)] * 2 for step in self.steps]
            self._known[grids, device] = torch.cat(self.grid_anchors(grids, steps))
        return [self._known[grids, device]] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's, whose scores and boxes leave in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, h, w] -> scores [B, A, h, w] and boxes [B, 4 A, h, w] of each."""
        scores, boxes = super().forward(x)
        return [full_precision(each) for each in scores], [full_precision(each) for each in boxes]


class RegionPool(MultiScaleRoIAlign):
    """Regions of interest from the level of their size: detectron2's `ROIPooler` with `ROIAlignV2`.

    - `side`: of what is pooled; `steps`: stride of each level in pixels; `samples`: see `Heads`
    """

    def __init__(self, side: int, steps: Sequence[float], samples: int = 0) -> None:
        super().__init__(list(LEVELS), side, samples)
        self.steps = tuple(steps)

    def levels_of(self, boxes: Tensor) -> Tensor:
        """int64 [N]: the number of the level for boxes [N, 4], 0 the finest."""
        sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        levels = CANONICAL_LEVEL + torch.log2(sizes / (CANONICAL * self.steps[0]) + 1e-8)
        return levels.floor().clamp(0, len(LEVELS) - 1).long()

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any = None) -> Tensor:
        """Maps by name and boxes [N, 4] per image -> [all N, C, side, side], of the maps' dtype."""
        dtype, every = x[LEVELS[0]].dtype, torch.cat(boxes)
        numbers = torch.cat([each.new_full((len(each), 1), number) for number, each in enumerate(boxes)])
        regions, levels = torch.cat([numbers, every], dim=1), self.levels_of(every)
        pooled, places = [], []
        for number, (name, step) in enumerate(zip(LEVELS, self.steps, strict=False)):
            chosen = torch.where(levels == number)[0]
            maps = full_precision(x[name])
            cut = regions[chosen].to(maps.dtype)
            pooled.append(roi_align(maps, cut, self.output_size, 1 / step, self.sampling_ratio, True))
            places.append(chosen)
        order = torch.argsort(torch.cat(places))
        return torch.cat(pooled)[order].to(dtype)


class BoxPredictor(FastRCNNPredictor):
    """torchvision's with detectron2's initial weights; scores and boxes leave in float32."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, width] -> scores [N, K] and boxes [N, 4 K]."""
        scores, boxes = super().forward(x)
        return full_precision(scores), full_precision(boxes)


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's, whose scores leave in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, 14, 14] -> [N, K, 28, 28]."""
        return full_precision(super().forward(x))
