"""Networks of mmseg and detectron2 in ours: the same outputs as their own computation, spelled out, or a refusal."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm.dense import foreign
from fasthpm.errors import UserError
from tests.helpers import openmmlab
from tests.helpers.openmmlab import CLASSES, DIM, WIDTH, drawn, upernet_state

State = dict[str, Tensor]


def transformers_upernet(found: foreign.Foreign) -> nn.Module:
    """transformers' own network of the sizes that were found."""
    import transformers

    backbone = transformers.BeitConfig(
        hidden_size=found.encoder["embed_dim"],
        num_hidden_layers=found.encoder["depth"],
        num_attention_heads=found.encoder["num_heads"],
        intermediate_size=round(found.encoder["mlp_ratio"] * found.encoder["embed_dim"]),
        image_size=found.encoder["img_size"][0],
        patch_size=found.encoder["patch_size"],
        layer_norm_eps=1e-6,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=found.head["relative_positions"],
        layer_scale_init_value=found.head["layer_scale"],
        add_fpn=True,
        out_indices=[1, 2, 3, 4],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=found.head["width"],
        num_labels=found.head["num_classes"],
        auxiliary_in_channels=DIM,
        auxiliary_channels=WIDTH,
    )
    return transformers.UperNetForSemanticSegmentation(config)


@torch.no_grad()
def test_mmsegs_upernet_is_transformers(tmp_path: Path) -> None:
    """Relative positions, LayerScale, biases of the keys, heads: all at work, all compared."""
    state = upernet_state()
    torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": state}, tmp_path / "upernet.pth")
    found = foreign.read(tmp_path / "upernet.pth")
    assert (found.kind, found.heads_told) == ("segment", True)
    assert found.head == {
        "num_classes": CLASSES,
        "width": WIDTH,
        "relative_positions": True,
        "layer_scale": 1.0,
        "image_size": (16, 16),
    }
    assert "biases of the keys" in found.notes[0]
    net: Any = transformers_upernet(found)
    foreign.fit(net, found)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    logits, auxiliary = openmmlab.upernet(wide, images, heads=2, levels=(0, 1, 2, 3))
    net = net.double().eval()
    maps = net.backbone(images).feature_maps
    torch.testing.assert_close(net.decode_head(maps), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.auxiliary_head(maps), auxiliary, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, openmmlab.upernet(wide, images.flip(3), heads=2, levels=(0, 1, 2, 3))[0])


def test_beits_own_names_and_separate_biases() -> None:
    """Its repository has timm's names in the blocks, a pyramid in the backbone, and no bias of the keys."""
    plain = foreign.from_mmseg(upernet_state())
    state = upernet_state()
    for n in range(4):
        bias = state.pop(f"backbone.layers.{n}.attn.qkv.bias").chunk(3)
        state |= {f"backbone.layers.{n}.attn.q_bias": bias[0], f"backbone.layers.{n}.attn.v_bias": bias[2]}
    names = (
        ("backbone.layers", "backbone.blocks"),
        (".ln1.", ".norm1."),
        (".ln2.", ".norm2."),
        ("ffn.layers.0.0", "mlp.fc1"),
        ("ffn.layers.1", "mlp.fc2"),
        ("patch_embed.projection", "patch_embed.proj"),
        ("neck.upsample_4x", "backbone.fpn1"),
        ("neck.upsample_2x", "backbone.fpn2"),
    )
    for ours, theirs in names:
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    found = foreign.from_mmseg(state)
    assert found.state.keys() == plain.state.keys()
    assert all(torch.equal(value, plain.state[key]) for key, value in found.state.items())
    assert not found.notes


Change = Callable[[State], Any]
REFUSED: dict[str, tuple[Change, str]] = {
    "a norm after the last block": (lambda s: s.update({"backbone.ln1.weight": torch.ones(DIM)}), r"backbone\.ln1\.w"),
    "one table for all blocks": (
        lambda s: s.update({"backbone.rel_pos_bias.relative_position_bias_table": torch.ones(52, 2)}),
        r"1 names of the file are none of mmseg's .*: backbone\.rel_pos_bias\.relative_position_bias_table",
    ),
    "another head": (lambda s: s.update({"auxiliary_head.conv_cat.conv.weight": torch.ones(1)}), "conv_cat"),
    "another index": (lambda s: s["backbone.layers.1.attn.relative_position_index"].add_(1), "not BEiT's order"),
    "no square": (lambda s: s.update({"backbone.pos_embed": torch.ones(1, 15, DIM)}), "14 patches, which make no sq"),
    "no positions": (lambda s: s.pop("backbone.pos_embed"), r"has no backbone\.pos_embed"),
    "not finite": (lambda s: s["decode_head.conv_seg.bias"].fill_(float("nan")), "not finite: decode_head.conv_seg"),
    "no head": (lambda s: [s.pop(k) for k in list(s) if "decode_head" in k], "neither mmseg's decode_head nor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    state = upernet_state()
    change(state)
    torch.save({"state_dict": state}, tmp_path / "upernet.pth")
    with pytest.raises(UserError, match=message) as found:
        foreign.read(tmp_path / "upernet.pth")
    assert "\n" not in str(found.value)
    assert str(found.value).startswith(str(tmp_path / "upernet.pth"))


def test_a_network_of_other_sizes_is_left_as_it_is() -> None:
    found = foreign.from_mmseg(upernet_state())
    del found.state["auxiliary_head.classifier.bias"]
    found.state["new"] = torch.ones(1)
    found.state["decode_head.classifier.bias"] = torch.ones(3)
    net = transformers_upernet(found)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    message = (
        r"do not fit the network: missing auxiliary_head\.classifier\.bias; unknown new; "
        r"of another shape decode_head\.classifier\.bias \(3,\) for \(5,\)"
    )
    with pytest.raises(UserError, match=message):
        foreign.fit(net, found)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# -------------------------------------------------------------------------------------------------- detectron2
CHANNELS, HIDDEN = 6, 10


def normed(name: str, inner: int, outer: int, side: int) -> dict[str, tuple[int, ...]]:
    """detectron2's Conv2d with "LN": no bias, and the norm inside."""
    return {
        f"{name}.weight": (outer, inner, side, side),
        f"{name}.norm.weight": (outer,),
        f"{name}.norm.bias": (outer,),
    }


def linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def mask_rcnn_state(agnostic: bool = False) -> State:
    """detectron2's ViTDet Mask R-CNN as a checkpoint holds it, names written down from its classes: images of 4 x 4
    patches, pretrained on 3 x 3; four blocks, all global."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.net.pos_embed": (1, 1 + 9, DIM)}
    shapes |= linear("backbone.net.patch_embed.proj", DIM, 3, 16, 16)
    for n in range(4):
        block = f"backbone.net.blocks.{n}"
        shapes |= linear(f"{block}.norm1", DIM) | linear(f"{block}.norm2", DIM)
        shapes |= linear(f"{block}.attn.qkv", 3 * DIM, DIM) | linear(f"{block}.attn.proj", DIM, DIM)
        shapes |= linear(f"{block}.mlp.fc1", 48, DIM) | linear(f"{block}.mlp.fc2", DIM, 48)
        shapes |= {f"{block}.attn.rel_pos_h": (7, 12), f"{block}.attn.rel_pos_w": (7, 12)}
    shapes |= linear("backbone.simfp_2.1", 12)
    for name, inner, outer in (("simfp_2.0", DIM, 12), ("simfp_2.3", 12, 6), ("simfp_3.0", DIM, 12)):
        shapes |= {f"backbone.{name}.weight": (inner, outer, 2, 2), f"backbone.{name}.bias": (outer,)}
    for stage, start, width in ((2, 4, 6), (3, 1, 12), (4, 0, DIM), (5, 1, DIM)):
        shapes |= normed(f"backbone.simfp_{stage}.{start}", width, CHANNELS, 1)
        shapes |= normed(f"backbone.simfp_{stage}.{start + 1}", CHANNELS, CHANNELS, 3)
    for n in range(2):
        shapes |= linear(f"proposal_generator.rpn_head.conv.conv{n}", CHANNELS, CHANNELS, 3, 3)
    shapes |= linear("proposal_generator.rpn_head.objectness_logits", 3, CHANNELS, 1, 1)
    shapes |= linear("proposal_generator.rpn_head.anchor_deltas", 12, CHANNELS, 1, 1)
    for n in range(4):
        shapes |= normed(f"roi_heads.box_head.conv{n + 1}", CHANNELS, CHANNELS, 3)
        shapes |= normed(f"roi_heads.mask_head.mask_fcn{n + 1}", CHANNELS, CHANNELS, 3)
    shapes |= linear("roi_heads.box_head.fc1", HIDDEN, CHANNELS * 49)
    shapes |= linear("roi_heads.box_predictor.cls_score", CLASSES + 1, HIDDEN)
    shapes |= linear("roi_heads.box_predictor.bbox_pred", 4 if agnostic else 4 * CLASSES, HIDDEN)
    shapes |= linear("roi_heads.mask_head.deconv", CHANNELS, CHANNELS, 2, 2)
    shapes |= linear("roi_heads.mask_head.predictor", 1 if agnostic else CLASSES, CHANNELS, 1, 1)
    return drawn(shapes)


def torchvision_heads() -> nn.ModuleDict:
    """torchvision's own heads under the names that they have in its detector."""
    from timm.layers import LayerNorm2d
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead

    four = [CHANNELS] * 4
    heads = {
        "box_head": FastRCNNConvFCHead((CHANNELS, 7, 7), four, [HIDDEN], norm_layer=LayerNorm2d),
        "box_predictor": FastRCNNPredictor(HIDDEN, CLASSES + 1),
        "mask_head": MaskRCNNHeads(CHANNELS, four, 1, norm_layer=LayerNorm2d),
        "mask_predictor": MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES + 1),
    }
    rpn = nn.ModuleDict({"head": RPNHead(CHANNELS, 3, conv_depth=2)})
    return nn.ModuleDict({"rpn": rpn, "roi_heads": nn.ModuleDict(heads)})


def layer_norm(maps: Tensor, own: State) -> Tensor:
    """detectron2's "LN": over the channels of every place."""
    centred = maps - maps.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * own["norm.weight"][:, None, None] + own["norm.bias"][:, None, None]


def convolved(state: State, name: str, maps: Tensor, active: bool = True) -> Tensor:
    own = openmmlab.part(state, f"{name}.")
    out = layer_norm(F.conv2d(maps, own["weight"], padding=own["weight"].shape[-1] // 2), own)
    return F.relu(out) if active else out


@torch.no_grad()
@pytest.mark.parametrize("agnostic", [False, True])
def test_detectron2s_heads_are_torchvisions(tmp_path: Path, agnostic: bool) -> None:
    """With the background first: classes, boxes and masks of every class are those that detectron2 computes."""
    state = mask_rcnn_state(agnostic)
    torch.save({"model": state, "iteration": 3}, tmp_path / "model_final.pth")
    found = foreign.read(tmp_path / "model_final.pth")
    sizes = {"channels": CHANNELS, "rpn_convs": 2, "box_convs": 4, "mask_convs": 4, "box_width": HIDDEN}
    assert found.head == {"num_classes": CLASSES, "relative": True, "grid": (4, 4), "window": 0, **sizes}
    assert (found.encoder["num_heads"], found.encoder["img_size"]) == (2, (48, 48))
    heads: Any = torchvision_heads()
    own = {key: value for key, value in found.state.items() if key.startswith(("rpn.", "roi_heads."))}
    heads.load_state_dict(own)
    maps, boxes = torch.randn(2, CHANNELS, 7, 7), torch.randn(3, CHANNELS, 7, 7)
    hidden = maps
    for n in range(2):
        name = f"proposal_generator.rpn_head.conv.conv{n}"
        hidden = F.relu(F.conv2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
    rpn = openmmlab.part(state, "proposal_generator.rpn_head.")
    scores, deltas = heads["rpn"]["head"]([maps])
    close(scores[0], F.conv2d(hidden, rpn["objectness_logits.weight"], rpn["objectness_logits.bias"]))
    close(deltas[0], F.conv2d(hidden, rpn["anchor_deltas.weight"], rpn["anchor_deltas.bias"]))
    roi = openmmlab.part(state, "roi_heads.")
    hidden = boxes
    for n in range(4):
        hidden = convolved(roi, f"box_head.conv{n + 1}", hidden)
    hidden = F.relu(F.linear(hidden.flatten(1), roi["box_head.fc1.weight"], roi["box_head.fc1.bias"]))
    logits = F.linear(hidden, roi["box_predictor.cls_score.weight"], roi["box_predictor.cls_score.bias"])
    moves = F.linear(hidden, roi["box_predictor.bbox_pred.weight"], roi["box_predictor.bbox_pred.bias"])
    theirs, offsets = heads["roi_heads"]["box_predictor"](heads["roi_heads"]["box_head"](boxes))
    close(theirs, torch.cat([logits[:, -1:], logits[:, :-1]], dim=1))
    close(offsets.unflatten(1, (CLASSES + 1, 4))[:, 1:], moves.unflatten(1, (-1, 4)).expand(-1, CLASSES, -1))
    hidden = boxes
    for n in range(4):
        hidden = convolved(roi, f"mask_head.mask_fcn{n + 1}", hidden)
    deconv, predictor = (openmmlab.part(roi, f"mask_head.{name}.") for name in ("deconv", "predictor"))
    hidden = F.relu(F.conv_transpose2d(hidden, deconv["weight"], deconv["bias"], stride=2))
    masks = F.conv2d(hidden, predictor["weight"], predictor["bias"])
    ours = heads["roi_heads"]["mask_predictor"](heads["roi_heads"]["mask_head"](boxes))
    close(ours[:, 1:], masks.expand(-1, CLASSES, -1, -1))
    assert len(found.notes) == (5 if agnostic else 1)


def close(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def vitdet(state: State, images: Tensor, heads: int) -> Tensor:
    """detectron2's `ViT` without windows, spelled out: [B, D, H, W]."""
    net = openmmlab.part(state, "backbone.net.")
    tokens = F.conv2d(images, net["patch_embed.proj.weight"], net["patch_embed.proj.bias"], stride=16)
    grid = tokens.shape[2:]
    table = net["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    tokens = tokens + F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    tokens = tokens.flatten(2).transpose(1, 2)
    for n in range(4):
        own = openmmlab.part(net, f"blocks.{n}.")
        cut = F.linear(layer_normed(tokens, own, "norm1"), own["attn.qkv.weight"], own["attn.qkv.bias"])
        query, key, value = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in cut.chunk(3, dim=2))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        for a in range(scores.shape[2]):  # query a, key b: a product with the row of each direction's distance
            for b in range(scores.shape[3]):
                down, right = a // grid[1] - b // grid[1] + 3, a % grid[1] - b % grid[1] + 3
                both = own["attn.rel_pos_h"][down] + own["attn.rel_pos_w"][right]
                scores[:, :, a, b] += query[:, :, a] @ both
        out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        tokens = tokens + F.linear(out, own["attn.proj.weight"], own["attn.proj.bias"])
        hidden = F.gelu(F.linear(layer_normed(tokens, own, "norm2"), own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        tokens = tokens + F.linear(hidden, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return tokens.transpose(1, 2).unflatten(2, grid)


def layer_normed(tokens: Tensor, own: State, name: str) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)


def pyramid(state: State, last: Tensor) -> list[Tensor]:
    """detectron2's `SimpleFeaturePyramid`, spelled out, and its last max-pooling."""
    own = openmmlab.part(state, "backbone.")
    four = F.conv_transpose2d(last, own["simfp_2.0.weight"], own["simfp_2.0.bias"], stride=2)
    four = layer_norm(four, {f"norm.{key}": own[f"simfp_2.1.{key}"] for key in ("weight", "bias")})
    four = F.conv_transpose2d(F.gelu(four), own["simfp_2.3.weight"], own["simfp_2.3.bias"], stride=2)
    two = F.conv_transpose2d(last, own["simfp_3.0.weight"], own["simfp_3.0.bias"], stride=2)
    maps = []
    for stage, start, each in ((2, 4, four), (3, 1, two), (4, 0, last), (5, 1, F.max_pool2d(last, 2))):
        for place in (start, start + 1):
            each = convolved(own, f"simfp_{stage}.{place}", each, active=False)
        maps.append(each)
    return [*maps, F.max_pool2d(maps[-1], 1, 2)]


@torch.no_grad()
def test_detectron2s_backbone_is_our_detectors() -> None:
    """Every name of the file has its place in the detector, and encoder and pyramid compute what detectron2's do."""
    state = mask_rcnn_state()
    found = foreign.from_detectron2(state)
    detector = foreign.network(found)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    wide = {key: value.double() for key, value in state.items()}
    maps = detector.double().eval().backbone(images)
    for ours, theirs in zip(maps.values(), pyramid(wide, vitdet(wide, images, heads=2)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # timm interpolates positions in float32


@torch.no_grad()
def test_mmsegs_upernet_is_our_segmenter() -> None:
    state = upernet_state()
    found = foreign.from_mmseg(state)
    segmenter = foreign.network(found)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    logits, _ = openmmlab.upernet(wide, images, heads=2, levels=(0, 1, 2, 3))
    expected = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(segmenter.double().eval()(images), expected, rtol=1e-9, atol=1e-9)


def test_windows_are_told_by_tables_of_relative_positions() -> None:
    tables = {"b.0.attn.rel_pos_h": 27, "b.0.attn.rel_pos_w": 27, "b.1.attn.rel_pos_h": 127, "b.1.attn.rel_pos_w": 79}
    state = {key: torch.ones(length, 64) for key, length in tables.items()}
    assert foreign.windows_of(state, 16) == {"relative": True, "grid": (64, 40), "window": 14}
    assert foreign.windows_of({}, 16) == {"relative": False, "grid": (64, 64), "window": 14}


CELLS = "proposal_generator.anchor_generator.cell_anchors.{}"


def cells(stride: float) -> Tensor:
    """detectron2's anchors of one level: squares of 8 strides, and ratios of height to width of 1:2 and 2:1."""
    area = (8 * stride) ** 2
    rows = []
    for ratio in (0.5, 1.0, 2.0):
        width = (area / ratio) ** 0.5
        rows.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
    return torch.tensor(rows)


def test_names_of_the_pyramid() -> None:
    """Two of ours for one of detectron2's, a convolution with its norm; what resizes keeps its place."""
    names = {
        "backbone.simfp_2.0.bias": "backbone.pyramid.levels.0.0.bias",
        "backbone.simfp_2.1.weight": "backbone.pyramid.levels.0.1.weight",
        "backbone.simfp_2.3.weight": "backbone.pyramid.levels.0.3.weight",
        "backbone.simfp_2.4.weight": "backbone.pyramid.levels.0.4.weight",
        "backbone.simfp_2.4.norm.weight": "backbone.pyramid.levels.0.5.weight",
        "backbone.simfp_2.5.norm.bias": "backbone.pyramid.levels.0.7.bias",
        "backbone.simfp_3.1.weight": "backbone.pyramid.levels.1.1.weight",
        "backbone.simfp_4.0.norm.bias": "backbone.pyramid.levels.2.1.bias",
        "backbone.simfp_4.1.weight": "backbone.pyramid.levels.2.2.weight",
        "backbone.simfp_5.2.norm.weight": "backbone.pyramid.levels.3.4.weight",
    }
    assert {key: foreign.detectors_name(key, [2, 3, 4, 5], box_convs=4) for key in names} == names


def test_anchors_and_pixels_in_the_file_are_checked_and_kept() -> None:
    state = mask_rcnn_state()
    state |= {CELLS.format(n): cells(4 * 2.0**n) for n in range(5)}
    state |= {"pixel_mean": torch.tensor([51.0, 102.0, 153.0]).view(3, 1, 1)}
    state |= {"pixel_std": torch.tensor([25.5, 51.0, 51.0]).view(3, 1, 1)}
    found = foreign.from_detectron2(state)
    assert found.state.keys() == foreign.from_detectron2(mask_rcnn_state()).state.keys()
    assert found.pixels.mean == pytest.approx((0.2, 0.4, 0.6))
    assert found.pixels.std == pytest.approx((0.1, 0.2, 0.2))
    state[CELLS.format(2)] = cells(8.0)
    with pytest.raises(UserError, match=r"cell_anchors\.2 holds other anchors"):
        foreign.from_detectron2(state)


def test_the_model_zoos_pickles(tmp_path: Path) -> None:
    state = mask_rcnn_state()
    content = {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "somebody"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content, protocol=2))
    found, plain = foreign.read(tmp_path / "model_final.pkl"), foreign.from_detectron2(state)
    assert all(torch.equal(value, plain.state[key]) for key, value in found.state.items())
    assert found.head == plain.head


DETECTORS: dict[str, tuple[Change, str]] = {
    "a cascade": (lambda s: s.update({"roi_heads.box_head.0.conv1.weight": torch.ones(1)}), r"box_head\.0\.conv1"),
    "residual blocks": (lambda s: s.update({"backbone.net.blocks.2.residual.conv1.weight": torch.ones(1)}), "residual"),
    "a level more": (lambda s: s.update({"backbone.simfp_6.0.weight": torch.ones(1)}), r"simfp_6\.0\.weight"),
    "no encoder": (lambda s: s.pop("backbone.net.pos_embed"), r"has no backbone\.net\.pos_embed"),
    "heads unknown": (lambda s: [s.pop(k) for k in list(s) if "rel_pos" in k], "nothing tells how many heads"),
    "blue first": (
        lambda s: s.update(pixel_mean=torch.tensor([103.53, 116.28, 123.675]), pixel_std=torch.ones(3)),
        "blue first",
    ),
}


@pytest.mark.parametrize("case", DETECTORS)
def test_what_has_no_place_in_the_detector_is_refused_by_name(case: str) -> None:
    change, message = DETECTORS[case]
    state = mask_rcnn_state()
    change(state)
    with pytest.raises(UserError, match=message) as found:
        foreign.from_detectron2(state)
    assert "\n" not in str(found.value)
