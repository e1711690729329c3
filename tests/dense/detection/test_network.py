"""Mask R-CNN: its float32 places against torchvision's and against loops; images without objects; bfloat16."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from fasthpm.dense.detection.network import SMALL, Anchors, Detector, Heads, RegionPool, build_detector
from fasthpm.dense.detection.pyramid import strides
from fasthpm.dense.detection.vitdet import Windows
from fasthpm.model import HPMViT
from fasthpm.probes.classifier import layer_scale

SIDE = 64
TINY = dataclasses.replace(SMALL, channels=16, box_width=32, before=(50, 50), after=(20, 20))
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture
def model() -> HPMViT:
    torch.manual_seed(0)
    return HPMViT(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_depth=1, decoder_num_heads=2
    ).eval()


@pytest.fixture
def net(model: HPMViT) -> Detector:
    return build_detector(model, Windows((SIDE // 8, SIDE // 8)), TINY, 3, seed=0)


def target(boxes: list[list[float]]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    labels = torch.arange(len(boxes)) % 3 + 1
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels, "masks": masks}


SOME = [[4.0, 8.0, 40.0, 44.0], [30.0, 30.0, 60.0, 62.0]]


def test_training_gives_five_losses_and_tests_detections(net: Detector) -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    losses = net.train()(images, [target(SOME), target(SOME[:1])])
    assert losses.keys() == LOSSES
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    net.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = net.eval()(images)
    assert len(found) == 2
    for each in found:
        count = len(each["scores"])
        assert 0 < count <= TINY.detections
        assert each["boxes"].shape == (count, 4)
        assert each["masks"].shape == (count, 1, 28, 28)
        assert 1 <= int(each["labels"].min()) <= int(each["labels"].max()) <= 3
        assert 0 <= float(each["boxes"].min()) <= float(each["boxes"].max()) <= SIDE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_without_objects_train_every_parameter(net: Detector, dtype: torch.dtype) -> None:
    """ZeRO waits for every rank's gradient of every parameter: all have one, if only of zeros."""
    net = net.to(dtype).train()
    losses = net(torch.randn(2, 3, SIDE, SIDE), [target([]), target([])])
    sum(losses.values()).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())
    assert float(losses["loss_mask"].detach()) == 0


def test_bfloat16_keeps_boxes_in_float32(net: Detector) -> None:
    """Anchors, proposals and losses are float32's; the weights' rounding alone changes the losses."""
    images, targets = torch.randn(2, 3, SIDE, SIDE), [target(SOME), target(SOME[:1])]
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        losses.append(net.to(dtype).train()(images, targets))
    for name in LOSSES:
        assert losses[1][name].dtype == torch.float32
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=0.1, atol=0.02)
    maps = {name: each.bfloat16() for name, each in net.backbone(images).items()}
    listed = ImageList(images, [(SIDE, SIDE)] * 2)
    assert net.rpn.anchor_generator(listed, list(maps.values()))[0].dtype == torch.float32
    net.roi_heads.score_thresh = 0.0
    assert net.eval()(images)[0]["boxes"].dtype == torch.float32


def test_anchors_are_torchvisions_where_nothing_is_rounded() -> None:
    """Ratio 1, even strides that divide the image; the others without rounding."""
    listed = ImageList(torch.zeros(2, 3, 128, 128), [(128, 128)] * 2)
    maps = [torch.zeros(2, 1, 128 // s, 128 // s, dtype=torch.bfloat16) for s in (4, 8, 16, 32, 64)]
    ours = Anchors(strides(16), 8.0)(listed, maps)
    theirs = AnchorGenerator(tuple((8 * s,) for s in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5)
    wanted = theirs(listed, [each.float() for each in maps])
    assert len(ours) == 2
    assert ours[0].shape == wanted[0].shape
    torch.testing.assert_close(ours[0][1::3], wanted[0][1::3], rtol=0, atol=0)
    torch.testing.assert_close(ours[0], wanted[0], rtol=0, atol=0.5)
    areas = (ours[0][:, 2:] - ours[0][:, :2]).prod(1)
    torch.testing.assert_close(areas.sqrt().round().unique(), torch.tensor([32.0, 64, 128, 256, 512]))


def test_anchors_keep_their_stride_on_odd_maps() -> None:
    """Of 3 x 3 maps max-pooling leaves 2 x 2: 64 pixels apart all the same (torchvision would say 48)."""
    listed = ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)])
    maps = [torch.zeros(1, 1, side, side) for side in (24, 12, 6, 3, 2)]
    last = Anchors(strides(16), 8.0)(listed, maps)[0][-12:]
    centres = (last[:, 2:] + last[:, :2]) / 2
    assert centres.unique().tolist() == [0.0, 64.0]


def boxes_of(count: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=made) * 100
    sizes = 2 ** (torch.rand(count, 2, generator=made) * 7 + 3)
    return torch.cat([corners, corners + sizes], dim=1)


def test_regions_are_torchvisions_half_a_cell_away() -> None:
    """Values and gradients: the shift of half a cell is boxes half a stride further up and left. Boxes of less than a
    cell, which torchvision enlarges, are left out."""
    maps = {str(k): torch.randn(2, 3, 64 >> k, 64 >> k, dtype=torch.float64, requires_grad=True) for k in range(4)}
    ours, theirs = RegionPool(7, strides(16), 2), MultiScaleRoIAlign(list(maps), 7, 2)
    boxes = [boxes_of(60).double(), boxes_of(40, 1).double()]
    cells = [2.0 ** (ours.levels_of(each) + 2)[:, None] for each in boxes]
    boxes = [each[(each[:, 2:] - each[:, :2] >= cell).all(1)] for each, cell in zip(boxes, cells, strict=True)]
    levels = ours.levels_of(torch.cat(boxes))
    assert levels.unique().tolist() == [0, 1, 2, 3]
    pooled = ours(maps, boxes)
    theirs(maps, boxes, [(256, 256)] * 2)  # finds its levels
    assert torch.equal(levels, theirs.map_levels(boxes))
    shifted = torch.cat(boxes) - (2.0 ** (levels + 2) / 2)[:, None]
    theirs.map_levels = lambda _: levels
    wanted = theirs(maps, list(shifted.split([len(each) for each in boxes])), [(256, 256)] * 2)
    torch.testing.assert_close(pooled, wanted)
    weight = torch.randn_like(pooled)
    grads = [torch.autograd.grad((each * weight).sum(), list(maps.values())) for each in (pooled, wanted)]
    for ours_, theirs_ in zip(*grads, strict=True):
        torch.testing.assert_close(ours_, theirs_)
    order = torch.randperm(len(boxes[0]))
    torch.testing.assert_close(ours(maps, [boxes[0][order], boxes[1][:0]]), pooled[order])


def test_published_sizes_are_vitdets(model: HPMViT) -> None:
    """Parameters of the heads by arithmetic: two RPN convolutions, four and one, four and the transposed one."""
    net = build_detector(model, Windows((8, 8)), Heads(), 80, seed=0)
    conv = 256 * 256 * 9

    def weights(module: Any, kind: type) -> list[int]:
        return [part.weight.numel() for part in module.modules() if isinstance(part, kind)]

    assert weights(net.rpn.head, torch.nn.Conv2d) == [conv, conv, 256 * 3, 256 * 12]
    assert weights(net.roi_heads.box_head, torch.nn.Conv2d) == [conv] * 4
    assert weights(net.roi_heads.box_head, torch.nn.Linear) == [256 * 49 * 1024]
    assert weights(net.roi_heads.mask_head, torch.nn.Conv2d) == [conv] * 4
    norms = [part for part in net.roi_heads.modules() if type(part).__name__ == "LayerNorm2d"]
    assert len(norms) == 8


def test_names_of_the_encoder_are_timms(net: Detector) -> None:
    """The learning rate per layer finds the blocks; the pyramid and the heads learn at the full rate."""
    names = {name: net.encoder_name(name) for name, _ in net.named_parameters()}
    assert names["backbone.body.blocks.1.attn.qkv.weight"] == "blocks.1.attn.qkv.weight"
    assert names["backbone.body.pos_embed"] == "pos_embed"
    assert {name for name in names if not names[name]} == {n for n in names if not n.startswith("backbone.body.")}
    assert layer_scale(names["backbone.body.blocks.0.norm1.weight"], 1, 2, 0.5, 0.1) == (0.25, 0.0)


def test_fresh_weights_are_the_seeds(model: HPMViT) -> None:
    windows = Windows((8, 8))
    once, again, other = (build_detector(model, windows, TINY, 3, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["rpn.head.cls_logits.weight"], other["rpn.head.cls_logits.weight"])
    assert torch.equal(once["backbone.body.blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)
