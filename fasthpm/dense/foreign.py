"""Networks that others fine-tuned, on their way into ours: mmseg's UPerNet on MAE, detectron2's ViTDet Mask R-CNN.

    found = foreign.read("upernet.pth")     # whose it is, sizes, and weights under our names
    network = foreign.network(found)        # every weight in its place and every place filled, or one line says not

`found.encoder` and `found.head` say what the network is built with. Names are transformers'
`UperNetForSemanticSegmentation` on a `BeitBackbone`, and torchvision's `MaskRCNN` with our backbone (`backbone.body`,
`backbone.pyramid`). Nothing is ignored: a name that has no place here is an error that tells it, and so is a value that
computes something else. What changes its form is in `found.notes`.

Names and forms are facts from reading mmseg 1.x (backbones/{mae,beit,vit}.py, necks/featurepyramid.py,
decode_heads/{uper,fcn,psp}_head.py) and detectron2 (modeling/backbone/vit.py, modeling/roi_heads/{box_head,mask_head,
fast_rcnn}.py, configs/common/models/mask_rcnn_{fpn,vitdet}.py). From memory: mmcv's ConvModule (`conv`, `bn`) and FFN
(`layers.0.0`, `layers.1`), mmseg's `conv_seg`, detectron2's `rpn_head.conv.convN`, and its norms' eps of 1e-6.

D is the width of the encoder, K the number of classes.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fasthpm.checkpoint.foreign import unusable
from fasthpm.data.statistics import PixelStatistics
from fasthpm.dense.pickles import read_arrays
from fasthpm.errors import UserError, about
from fasthpm.exchange.forms import library
from fasthpm.files import read_file
from fasthpm.layers import relative_index
from fasthpm.model import HPMViT

LISTED = 6  # names that a message tells
HEAD_WIDTH = 64  # of one head of the attention, where nothing in the file tells it: every ViT from S to L
ANCHOR_SCALE = 8.0  # side of detectron2's anchors in strides
RATIOS = (0.5, 1.0, 2.0)
VITDET_SIDE, VITDET_WINDOW = 1024, 14  # of its images in pixels, of its windows in patches
BGR_RED, BGR_BLUE = 123.675, 103.53  # of detectron2's pixel_mean

Rules = tuple[tuple[str, str], ...]  # (whole name as a regular expression, ours)
WEIGHTS = r"(weight|bias)"


@dataclass(frozen=True)
class Foreign:
    """A network of somebody else's, for one of ours.

    - `kind`: "segment" or "detect"; `state`: float32 weights under the names of our network
    - `encoder`: what `HPMViT` has to be made with, so that the network built on it fits; `heads_told`: whether the file
      tells the number of attention's heads, which else are those of 64 channels
    - `head`: for segment `num_classes`, `width`, `relative_positions`, `layer_scale`, `image_size` (the crop); for
      detect `num_classes`, `channels`, `rpn_convs`, `box_convs`, `mask_convs`, `box_width`, and of the backbone
      `relative`, `grid` (of an image's patches) and `window`: ViTDet's 1024 pixels and 14 where no table tells
    - `pixels`: by what images are normalised; ImageNet's where the file does not tell
    - `notes`: what was put into another form, a sentence each
    """

    kind: str
    state: dict[str, Tensor]
    encoder: dict[str, Any]
    head: dict[str, Any]
    heads_told: bool
    pixels: PixelStatistics
    notes: tuple[str, ...] = ()

    @property
    def input_size(self) -> str:
        """Of what the network sees, as the commands' flag has it."""
        side = int(self.encoder["patch_size"])
        height, width = self.head["image_size"] if self.kind == "segment" else (side * n for n in self.head["grid"])
        return f"{height}x{width}" if height != width else str(height)

    def model(self) -> HPMViT:
        """A pretraining model of the encoder's sizes, whose weights are nobody's: what networks are built on."""
        small = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 1, "predict_loss": "none"}
        return HPMViT(**self.encoder, **small)


def read(path: str | Path) -> Foreign:
    """The network in a file of mmseg's or detectron2's (`.pkl` too, as its model zoo has); no code in it runs.

    **Raises:** `UserError` for a file that is neither, and for names and values that have no place in our networks.
    """
    path = Path(path)
    content, said = (read_arrays(path), {}) if path.suffix == ".pkl" else read_file(path)
    with about(path):
        state = state_of(content)
        refuse_ours(path, state, said)
        if any(key.startswith("decode_head.") for key in state):
            return from_mmseg(state)
        if any(key.startswith("roi_heads.") for key in state):
            return from_detectron2(state)
        raise UserError(
            f"has neither mmseg's decode_head nor detectron2's roi_heads (its names: {some(state)}); an encoder alone "
            f"is taken by fasthpm import"
        )


def refuse_ours(path: Path, state: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
    """**Raises:** `UserError` for a network that our own command wrote: `said`, the file's metadata, has its notes."""
    if "notes" in said:
        command = "detect" if any(key.startswith("roi_heads.") for key in state) else "segment"
        run = json.loads(said["notes"]).get("run") or "RUN"
        raise UserError(
            f"is the network of a training of ours; test it with fasthpm {command} {run} --evaluate --output_dir "
            f"{path.parent}"
        )


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, wherever mmseg ("state_dict") and detectron2 ("model") keep them.

    **Raises:** `UserError` for values that are no weights to compute with.
    """
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    state = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    floats = {key: value for key, value in state.items() if value.is_floating_point()}
    for problem, keys in unusable(floats).items():
        if keys:
            raise UserError(f"{problem}: {some(keys)}; take an earlier checkpoint, or plain weights")
    return state


def fit(network: nn.Module, found: Foreign) -> None:
    """Load the weights, all or nothing.

    **Raises:** `UserError` that lists what is missing, left over or of another shape.
    """
    own, given = network.state_dict(), found.state
    problems = {
        "missing": [key for key in own if key not in given],
        "unknown": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
            for key in given
            if key in own and given[key].shape != own[key].shape
        ],
    }
    wrong = "; ".join(f"{what} {some(keys)}" for what, keys in problems.items() if keys)
    if wrong:
        raise UserError(f"the weights do not fit the network: {wrong}; build it with the sizes that the file has")
    network.load_state_dict(given)


def network(found: Foreign) -> Any:
    """Our `Segmenter` or `Detector` with the weights that were found. **Raises:** `UserError` if they do not fit it."""
    head = dict(found.head)
    if found.kind == "segment":
        from fasthpm.dense.segmentation.network import build_segmenter

        segmenter = build_segmenter(found.model(), **head)
        fit(segmenter.net, found)
        return segmenter
    library("torchvision", "torchvision")
    from fasthpm.dense.detection.network import Heads, build_detector
    from fasthpm.dense.detection.vitdet import Windows

    classes = head.pop("num_classes")
    windows = Windows(**{name: head.pop(name) for name in ("grid", "window", "relative")})
    detector = build_detector(found.model(), windows, Heads(**head), classes, seed=0)
    fit(detector, found)
    return detector


# -------------------------------------------------------------------------------------------------- mmseg
UPERNET: Rules = (
    (r"backbone\.cls_token", r"backbone.beit.embeddings.cls_token"),
    (r"backbone\.pos_embed", r"backbone.beit.embeddings.position_embeddings"),
    (rf"backbone\.patch_embed\.projection\.{WEIGHTS}", r"backbone.beit.embeddings.patch_embeddings.projection.\1"),
    (rf"backbone\.layers\.(\d+)\.ln1\.{WEIGHTS}", r"backbone.beit.layers.\1.layernorm_before.\2"),
    (rf"backbone\.layers\.(\d+)\.ln2\.{WEIGHTS}", r"backbone.beit.layers.\1.layernorm_after.\2"),
    (rf"backbone\.layers\.(\d+)\.attn\.proj\.{WEIGHTS}", r"backbone.beit.layers.\1.attention.o_proj.\2"),
    (r"backbone\.layers\.(\d+)\.attn\.q_bias", r"backbone.beit.layers.\1.attention.q_proj.bias"),
    (r"backbone\.layers\.(\d+)\.attn\.v_bias", r"backbone.beit.layers.\1.attention.v_proj.bias"),
    (rf"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.{WEIGHTS}", r"backbone.beit.layers.\1.mlp.fc1.\2"),
    (rf"backbone\.layers\.(\d+)\.ffn\.layers\.1\.{WEIGHTS}", r"backbone.beit.layers.\1.mlp.fc2.\2"),
    (r"backbone\.layers\.(\d+)\.gamma_([12])", r"backbone.beit.layers.\1.lambda_\2"),
    (
        r"backbone\.layers\.(\d+)\.attn\.relative_position_bias_table",
        r"backbone.beit.layers.\1.relative_position_bias.relative_position_bias_table",
    ),
    (rf"(?:neck\.upsample_4x|backbone\.fpn1)\.0\.{WEIGHTS}", r"backbone.fpn.fpn1.conv_transpose1.\1"),
    (r"(?:neck\.upsample_4x|backbone\.fpn1)\.1\.(\w+)", r"backbone.fpn.fpn1.normalization.\1"),
    (rf"(?:neck\.upsample_4x|backbone\.fpn1)\.3\.{WEIGHTS}", r"backbone.fpn.fpn1.conv_transpose2.\1"),
    (rf"(?:neck\.upsample_2x|backbone\.fpn2)\.0\.{WEIGHTS}", r"backbone.fpn.fpn2.\1"),
    (rf"(decode_head|auxiliary_head)\.conv_seg\.{WEIGHTS}", r"\1.classifier.\2"),
    (r"(decode_head\.(?:psp_modules\.\d+\.1|(?:lateral|fpn)_convs\.\d+|(?:fpn_)?bottleneck))\.conv\.weight",
     r"\1.conv.weight"),
    (r"(decode_head\.(?:psp_modules\.\d+\.1|(?:lateral|fpn)_convs\.\d+|(?:fpn_)?bottleneck))\.bn\.(\w+)",
     r"\1.batch_norm.\2"),
    (r"(auxiliary_head\.convs\.\d+)\.conv\.weight", r"\1.conv.weight"),
    (r"(auxiliary_head\.convs\.\d+)\.bn\.(\w+)", r"\1.batch_norm.\2"),
)  # fmt: skip
QKV = re.compile(r"backbone\.layers\.(\d+)\.attn\.qkv\.(weight|bias)")
BEIT_REPOSITORY: Rules = (  # BEiT's own code on mmseg, which its followers use, has timm's names in the blocks
    (r"backbone\.patch_embed\.proj\.(.+)", r"backbone.patch_embed.projection.\1"),
    (r"backbone\.blocks\.(\d+)\.norm([12])\.(.+)", r"backbone.layers.\1.ln\2.\3"),
    (r"backbone\.blocks\.(\d+)\.mlp\.fc1\.(.+)", r"backbone.layers.\1.ffn.layers.0.0.\2"),
    (r"backbone\.blocks\.(\d+)\.mlp\.fc2\.(.+)", r"backbone.layers.\1.ffn.layers.1.\2"),
    (r"backbone\.blocks\.(.+)", r"backbone.layers.\1"),
)
INDEX = ".attn.relative_position_index"


def from_mmseg(state: Mapping[str, Tensor]) -> Foreign:
    """mmseg's `EncoderDecoder` of MAE (or BEiT), Feature2Pyramid (or `backbone.fpn1`, `fpn2`), UPerHead and FCNHead as
    transformers' `UperNetForSemanticSegmentation`.

    The same function: relative positions stay tables of every block, BEiT's index of cls and patches being the same;
    gammas stay LayerScale. The bias of the keys, which softmax cannot see, has no place and is left out. Norms have
    mmseg's configured eps, 1e-6 in its MAE, which no file tells.

    **Raises:** `UserError` for names that have no place there (a norm after the last block, `ln1` or `norm`, among
    them), and an index that is not BEiT's.
    """
    state = {first(key, BEIT_REPOSITORY) or key: value for key, value in state.items()}
    need(state, "backbone.pos_embed", "backbone.patch_embed.projection.weight", "backbone.layers.0.attn.qkv.weight",
         "decode_head.conv_seg.weight")  # fmt: skip
    grid = square_grid(state["backbone.pos_embed"].shape[1] - 1)
    moved, unknown, dropped = dict[str, Tensor](), list[str](), list[str]()
    for key, value in state.items():
        if key.endswith(INDEX):
            check_index(key, value, grid)
        elif part := QKV.fullmatch(key):
            names = [f"backbone.beit.layers.{part[1]}.attention.{letter}_proj.{part[2]}" for letter in "qkv"]
            pieces = dict(zip(names, value.chunk(3), strict=True))
            if part[2] == "bias":
                del pieces[names[1]]
                dropped.append(key)
            moved |= pieces
        elif name := first(key, UPERNET):
            moved[name] = value
        else:
            unknown.append(key)
    refuse(unknown, "mmseg's UPerNet on MAE")
    table = state.get("backbone.layers.0.attn.relative_position_bias_table")
    encoder = encoder_sizes(state, "backbone.layers", "backbone.patch_embed.projection.weight", "ffn.layers.0.0", grid)
    told = table is not None
    encoder["num_heads"] = table.shape[1] if table is not None else heads_of(encoder["embed_dim"])
    head = {
        "num_classes": len(state["decode_head.conv_seg.weight"]),
        "width": state["decode_head.conv_seg.weight"].shape[1],
        "relative_positions": told,
        "layer_scale": float("backbone.layers.0.gamma_1" in state),
        "image_size": encoder["img_size"],
    }
    notes = [f"the biases of the keys were left out, which softmax ignores: {some(dropped)}"] if dropped else []
    pixels, said = PixelStatistics(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), tuple(notes)
    return Foreign("segment", ready(moved), encoder, head, told, pixels, said)


def check_index(key: str, index: Tensor, grid: tuple[int, int]) -> None:
    """**Raises:** `UserError` if relative positions are counted in another way than BEiT does."""
    expected = relative_index(*grid)
    if index.shape != expected.shape or not torch.equal(index.long(), expected):
        raise UserError(f"{key} is not BEiT's order of relative positions for a grid of {grid[0]} x {grid[1]} patches")


# -------------------------------------------------------------------------------------------------- detectron2
MASK_RCNN: Rules = (
    (r"backbone\.net\.(pos_embed|patch_embed\.proj\.(?:weight|bias))", r"backbone.body.\1"),
    (
        r"backbone\.net\.(blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))",
        r"backbone.body.\1",
    ),
    (r"backbone\.net\.(blocks\.\d+\.attn\.rel_pos_[hw])", r"backbone.body.\1"),
    (rf"proposal_generator\.rpn_head\.conv\.{WEIGHTS}", r"rpn.head.conv.0.0.\1"),
    (rf"proposal_generator\.rpn_head\.conv\.conv(\d+)\.{WEIGHTS}", r"rpn.head.conv.\1.0.\2"),
    (rf"proposal_generator\.rpn_head\.objectness_logits\.{WEIGHTS}", r"rpn.head.cls_logits.\1"),
    (rf"proposal_generator\.rpn_head\.anchor_deltas\.{WEIGHTS}", r"rpn.head.bbox_pred.\1"),
    (rf"roi_heads\.(box_predictor\.(?:cls_score|bbox_pred))\.{WEIGHTS}", r"roi_heads.\1.\2"),
    (rf"roi_heads\.mask_head\.deconv\.{WEIGHTS}", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (rf"roi_heads\.mask_head\.predictor\.{WEIGHTS}", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)
PYRAMID = re.compile(r"backbone\.simfp_(\d+)\.(\d+)\.(norm\.)?(weight|bias)")
CONVOLUTION = re.compile(r"roi_heads\.(box_head\.conv|mask_head\.mask_fcn)(\d+)\.(norm\.)?(weight|bias)")
LINEAR = re.compile(r"roi_heads\.box_head\.fc(\d+)\.(weight|bias)")
CELLS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.(\d+)")
FIRST_CONVOLUTION = (4, 1, 0, 1)  # of a level of the pyramid, behind what resizes: x 4, x 2, x 1, x 1/2


def from_detectron2(state: Mapping[str, Tensor]) -> Foreign:
    """detectron2's ViTDet Mask R-CNN as torchvision's, on our backbone.

    The same function but for the order of things: the position of cls, which ViTDet never reads, is cut off;
    torchvision has the background first where detectron2 has it last, and boxes and masks for it, which nothing reads:
    zeros. What holds for all classes alike is repeated for each.

    **Raises:** `UserError` for names that have no place there (a cascade's, or residual blocks in the backbone),
    anchors or an order of colours that are others.
    """
    kernel = "backbone.net.patch_embed.proj.weight"
    need(state, kernel, "backbone.net.pos_embed", "backbone.net.blocks.0.attn.qkv.weight",
         "roi_heads.box_predictor.cls_score.weight", "roi_heads.mask_head.deconv.weight")  # fmt: skip
    classes = len(state["roi_heads.box_predictor.cls_score.weight"]) - 1
    count = {name: counted(state, rf"roi_heads\.{name}(\d+)\.weight") for name in (r"box_head\.conv", r"box_head\.fc")}
    stages = sorted({int(part[1]) for key in state if (part := PYRAMID.fullmatch(key))})
    moved, unknown = dict[str, Tensor](), list[str]()
    for key, value in state.items():
        if key in ("pixel_mean", "pixel_std"):
            continue
        if part := CELLS.fullmatch(key):
            check_cells(key, value, state[kernel].shape[-1] / 4 * 2 ** int(part[1]))
        elif name := detectors_name(key, stages, count[r"box_head\.conv"]):
            moved[name] = value
        else:
            unknown.append(key)
    refuse(unknown, "detectron2's ViTDet Mask R-CNN")
    notes = regrouped(moved, classes)
    positions = state["backbone.net.pos_embed"]
    grid, with_cls = grid_with_cls(positions.shape[1])
    moved["backbone.body.pos_embed"] = positions[:, int(with_cls) :]
    encoder = encoder_sizes(state, "backbone.net.blocks", kernel, "mlp.fc1", grid)
    table = state.get("backbone.net.blocks.0.attn.rel_pos_h")
    width = encoder["embed_dim"]
    encoder["num_heads"] = heads_of(width) if table is None else width // table.shape[1]
    head = {
        "num_classes": classes,
        "channels": state["roi_heads.mask_head.deconv.weight"].shape[0],
        "rpn_convs": counted(state, r"proposal_generator\.rpn_head\.conv\.(?:conv(\d+)\.)?weight"),
        "box_convs": count[r"box_head\.conv"],
        "mask_convs": counted(state, r"roi_heads\.mask_head\.mask_fcn(\d+)\.weight"),
        "box_width": state["roi_heads.box_predictor.cls_score.weight"].shape[1],
        **windows_of(state, encoder["patch_size"]),
    }
    return Foreign("detect", ready(moved), encoder, head, table is not None, pixels_of(state), tuple(notes))


def windows_of(state: Mapping[str, Tensor], side: int) -> dict[str, Any]:
    """How patches of `side` pixels attend: tables [2n - 1, d] of relative positions tell n of windows and grid."""
    tables = {axis: [len(state[key]) for key in state if key.endswith(f".attn.rel_pos_{axis}")] for axis in "hw"}
    if not tables["h"] or not tables["w"]:
        return {"relative": False, "grid": (VITDET_SIDE // side,) * 2, "window": VITDET_WINDOW}
    grid = tuple((max(lengths) + 1) // 2 for lengths in tables.values())
    window = (min(tables["h"]) + 1) // 2
    return {"relative": True, "grid": grid, "window": window if window < max(grid) else 0}


def detectors_name(key: str, stages: list[int], box_convs: int) -> str:
    """Our detector's name of one of detectron2's tensors; empty if there is none.

    - `stages`: of the pyramid, the finest first; `box_convs`: convolutions in the box head
    """
    if part := PYRAMID.fullmatch(key):
        level, place = stages.index(int(part[1])), int(part[2])
        if level >= len(FIRST_CONVOLUTION):
            return ""
        start = FIRST_CONVOLUTION[level]
        behind = place - start
        if behind >= 0:  # a convolution with its norm is one module there and two here
            place = start + 2 * behind + bool(part[3])
        return f"backbone.pyramid.levels.{level}.{place}.{part[4]}"
    if part := CONVOLUTION.fullmatch(key):
        head = part[1].split(".")[0]
        return f"roi_heads.{head}.{int(part[2]) - 1}.{1 if part[3] else 0}.{part[4]}"
    if part := LINEAR.fullmatch(key):
        return f"roi_heads.box_head.{box_convs + 2 * int(part[1]) - 1}.{part[2]}"
    return first(key, MASK_RCNN)


def regrouped(moved: dict[str, Tensor], classes: int) -> list[str]:
    """Put the rows of the three predictors in torchvision's order, in place; what was done."""
    notes = ["the background comes first, as torchvision has it; its boxes and masks, which nothing reads, are zeros"]
    for kind in ("weight", "bias"):
        scores = f"roi_heads.box_predictor.cls_score.{kind}"
        if scores in moved:  # what is missing is told when the network is loaded
            moved[scores] = torch.cat([moved[scores][-1:], moved[scores][:-1]])
        for name, rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
            name = f"roi_heads.{name}.{kind}"
            if (given := moved.get(name)) is None:
                continue
            if len(given) == rows and classes > 1:
                given = given.repeat(classes, *[1] * (given.dim() - 1))
                notes.append(f"{name} is the same for all {classes} classes")
            moved[name] = torch.cat([torch.zeros_like(given[:rows]), given])
    return notes


def check_cells(key: str, cells: Tensor, stride: float) -> None:
    """**Raises:** `UserError` if the anchors of a level are not those that we have."""
    ratios = torch.tensor(RATIOS).sqrt()
    width, height = ANCHOR_SCALE * stride / ratios, ANCHOR_SCALE * stride * ratios
    expected = torch.stack([-width, -height, width, height], dim=1) / 2
    if cells.shape != expected.shape or not torch.allclose(cells.float(), expected, atol=0.01 * stride):
        raise UserError(f"{key} holds other anchors than squares of 8 strides and ratios 1:2 and 2:1")


def pixels_of(state: Mapping[str, Tensor]) -> PixelStatistics:
    """By what detectron2 normalised: as the file says, else ImageNet's. **Raises:** `UserError` for BGR."""
    if not {"pixel_mean", "pixel_std"} <= state.keys():
        return PixelStatistics(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = (state[name].double().flatten().tolist() for name in ("pixel_mean", "pixel_std"))
    if len(mean) == 3 and abs(mean[0] - BGR_BLUE) < 0.1 and abs(mean[2] - BGR_RED) < 0.1:
        raise UserError("pixel_mean is of images with blue first (BGR), and ours have red first")
    return PixelStatistics(tuple(value / 255 for value in mean), tuple(value / 255 for value in std))


# -------------------------------------------------------------------------------------------------- what they share
def encoder_sizes(
    state: Mapping[str, Tensor], blocks: str, kernel: str, hidden: str, grid: tuple[int, int]
) -> dict[str, Any]:
    """What `HPMViT` has to be made with, but for `num_heads`.

    - `blocks`, `kernel`, `hidden`: names of the blocks, the patch embedding's weight and an MLP's first layer there
    """
    weight = state[kernel]
    width, channels, side = weight.shape[:3]
    need(state, f"{blocks}.0.{hidden}.weight")
    return {
        "img_size": (grid[0] * side, grid[1] * side),
        "patch_size": side,
        "in_chans": channels,
        "embed_dim": width,
        "depth": counted(state, rf"{re.escape(blocks)}\.(\d+)\.attn\.qkv\.weight"),
        "mlp_ratio": len(state[f"{blocks}.0.{hidden}.weight"]) / width,
    }


def heads_of(width: int) -> int:
    """Heads of the attention where only convention tells them. **Raises:** `UserError` for a width without one."""
    if width % HEAD_WIDTH:
        raise UserError(f"nothing tells how many heads its attention has, and {width} is no multiple of {HEAD_WIDTH}")
    return width // HEAD_WIDTH


def first(key: str, rules: Rules) -> str:
    """Our name by the first rule that knows `key`; empty if none does."""
    for pattern, ours in rules:
        if part := re.fullmatch(pattern, key):
            return part.expand(ours)
    return ""


def counted(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many names match."""
    return sum(bool(re.fullmatch(pattern, key)) for key in state)


def square_grid(patches: int) -> tuple[int, int]:
    """(rows, columns) of a square grid. **Raises:** `UserError` if it is none."""
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise UserError(f"its positions are of {patches} patches, which make no square")
    return side, side


def grid_with_cls(positions: int) -> tuple[tuple[int, int], bool]:
    """The square grid of so many positions, and whether cls is one of them."""
    side = math.isqrt(positions)
    return ((side, side), False) if side * side == positions else (square_grid(positions - 1), True)


def need(state: Mapping[str, Tensor], *names: str) -> None:
    """**Raises:** `UserError` for names that are not there."""
    if missing := [name for name in names if name not in state]:
        raise UserError(f"has no {some(missing)}, without which nothing tells its sizes")


def refuse(unknown: list[str], whose: str) -> None:
    """**Raises:** `UserError` that lists the names that have no place here."""
    if unknown:
        raise UserError(
            f"{len(unknown)} names of the file are none of {whose} as we have it, and nothing is left out: "
            f"{some(unknown)}"
        )


def ready(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float32; counters stay whole numbers."""
    cast: Callable[[Tensor], Tensor] = lambda value: value.float() if value.is_floating_point() else value  # noqa: E731
    return {key: cast(value).clone() for key, value in state.items()}


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
