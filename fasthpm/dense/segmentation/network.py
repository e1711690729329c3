"""UPerNet on a run's encoder: transformers' `UperNetForSemanticSegmentation` with a `BeitBackbone`, as in mmseg's MAE.

The encoder's blocks are BEiT's without LayerScale and without relative positions; tests hold the features of every
level to those of our own blocks. Two parts are ours, under transformers' names: the embeddings, because transformers
interpolates positions of square grids only, and the norms (`norms.SharedNorm`).
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.segmentation.norms import SharedNorm
from fasthpm.errors import UserError
from fasthpm.exchange.forms import encoder_of, levels, library
from fasthpm.layers import LAYER_NORM_EPS
from fasthpm.mask_loops import on_cpu
from fasthpm.model import HPMViT
from fasthpm.probes.classifier import resize_positions

AUXILIARY_WEIGHT, AUXILIARY_WIDTH = 0.4, 256  # [released code] mmseg's FCN head on the third level
DROPOUT = 0.1  # [released code] of whole channels, before both classifiers
CLASSIFIER_STD = 0.01  # [released code] of both classifiers at the start
LEVELS = 4
BLOCK_NAMES = (  # ours in a block, transformers'
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.o_proj."),
)
OTHER_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "layers."),
)
BACKBONE = "net.backbone.beit."


class Segmenter(nn.Module):
    """Images and masks in, losses out; without masks, logits.

    - `net`: transformers' UPerNet, of `build_segmenter`
    - `strides`: how tests go over an image with windows, down and across; None: they take it as a whole
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net
        self.strides: tuple[int, int] | None = None

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """float [B, C, H, W], normalised, and labels [B, H, W] -> {"loss_seg", "loss_aux"}, scalars; or -> logits,
        float32 [B, K, H, W]. H and W are multiples of the patch side.

        A loss is the mean over all pixels, ignored ones as 0, as in mmseg; over an image that is ignored as a whole it
        is 0, and over several ranks and micro-steps the mean of their losses is that of all pixels.
        """
        images = images.to(self.net.decode_head.classifier.weight.dtype)
        self._choose_attention(images)
        maps = self.net.backbone(images).feature_maps
        logits = self.net.decode_head(maps)
        if targets is None:
            return enlarged(logits, images)
        auxiliary = self.net.auxiliary_head(maps)
        return {
            "loss_seg": pixel_loss(enlarged(logits, images), targets),
            "loss_aux": AUXILIARY_WEIGHT * pixel_loss(enlarged(auxiliary, images), targets),
        }

    def _choose_attention(self, images: Tensor) -> None:
        """torch's fused attention, or on a CPU in bfloat16 plain matmuls, which are faster there (`layers.attend`)."""
        kind = "eager" if on_cpu(images) and images.dtype == torch.bfloat16 else "sdpa"
        if self.net.backbone.config._attn_implementation != kind:
            self.net.backbone.set_attn_implementation(kind)

    def features(self, images: Tensor) -> list[Tensor]:
        """The encoder's four levels before the pyramid: each [B, D, H / P, W / P]."""
        backbone = self.net.backbone
        hidden = backbone.beit(images, output_hidden_states=True).hidden_states
        grid = [length // backbone.config.patch_size for length in images.shape[-2:]]
        return [hidden[i][:, 1:].transpose(1, 2).unflatten(2, grid) for i in backbone.out_indices]

    def encoder_name(self, name: str) -> str:
        """timm's name of one of the encoder's parameters here (new ones of a block stand in it), "" of all others."""
        if not name.startswith(BACKBONE):
            return ""
        name = name.removeprefix(BACKBONE)
        for ours, theirs in (*OTHER_NAMES, *BLOCK_NAMES):
            name = name.replace(theirs, ours)
        return re.sub(r"attention\.([qkv])_proj\.", r"attn.\1_proj.", name)


def enlarged(logits: Tensor, images: Tensor) -> Tensor:
    """Logits [B, K, h, w] of any dtype, bilinear, at the size of the images: float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(wide, size=images.shape[-2:], mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K, H, W] and labels [B, H, W], over all pixels; `IGNORED` counts as 0."""
    return F.cross_entropy(logits, targets.long(), ignore_index=IGNORED, reduction="sum") / targets.numel()


class Embeddings(nn.Module):
    """Patches, cls token and positions, under the names of transformers' `BeitEmbeddings`, for grids of any shape.

    - `projection`: transformers' patch embedding; `grid`: (rows, columns) that the positions are of. Images of other
      sizes see them interpolated
    """

    def __init__(self, projection: nn.Module, dim: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embeddings = projection
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.patch_size, self.grid = patch_size, grid

    def forward(self, pixel_values: Tensor, bool_masked_pos: None = None) -> Tensor:
        """[B, C, H, W] -> [B, 1 + L, D]."""
        rows, columns = (length // self.patch_size for length in pixel_values.shape[-2:])
        table: Tensor = self.position_embeddings
        if (rows, columns) != self.grid:
            table = resize_positions(table, self.grid, (rows, columns))
        patches = self.patch_embeddings(pixel_values)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + table


class DroppingConv(nn.Conv2d):
    """A convolution that drops whole channels of what it reads while it trains (mmseg's `dropout_ratio`)."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, H, W]."""
        return super().forward(F.dropout2d(maps, DROPOUT, self.training))


# -------------------------------------------------------------------------------------------------- building
def build_segmenter(
    model: HPMViT,
    num_classes: int,
    *,
    image_size: tuple[int, int],
    width: int = 768,
    drop_path: float = 0.0,
    relative_positions: bool = False,
    layer_scale: float = 0.0,
    seed: int = 0,
) -> Segmenter:
    """UPerNet with the encoder of `model` and fresh heads of `num_classes` classes.

    - `image_size`: (height, width) of the crops; positions are interpolated to it (`resize_positions`) and trained
    - `width`: channels of the head; `drop_path`: stochastic depth, growing linearly to this
    - `relative_positions`: a bias per block and pair of places, from zero, as mmseg adds it; `layer_scale`: the start
      of a factor per block and channel (mmseg: 1.0), 0 = none. With zeros and ones the features stay what they were

    **Raises:** `UserError` for a model or sizes that UPerNet cannot take.
    """
    check(model, image_size, relative_positions)
    config = upernet_config(model, num_classes, image_size, width, drop_path, relative_positions, layer_scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = library("transformers").UperNetForSemanticSegmentation(config)
        start_heads(net)
    adapt(net)
    load_encoder(net, model, image_size)
    return Segmenter(net)


def check(model: HPMViT, image_size: tuple[int, int], relative_positions: bool) -> None:
    """**Raises:** `UserError` for a model or sizes that UPerNet cannot take."""
    side, depth = model.patch_size, len(model.blocks)
    if model.video:
        raise UserError("segment reads images, and this run was trained on video; give a run of images")
    if depth < LEVELS:
        raise UserError(f"UPerNet reads {LEVELS} levels, and this encoder has {depth} blocks; give a deeper one")
    if any(length % side or length < 2 * side for length in image_size):
        near = "x".join(str(max(2, round(length / side)) * side) for length in image_size)
        raise UserError(
            f"input_size is {image_size[0]}x{image_size[1]}, expected a multiple of patch_size {side}, at least twice; "
            f"use e.g. {near}"
        )
    if relative_positions and image_size[0] != image_size[1]:
        raise UserError(
            f"relative_positions needs square crops, and input_size is {image_size[0]}x{image_size[1]}; "
            f"leave one of them out"
        )


def upernet_config(
    model: HPMViT,
    num_classes: int,
    image_size: tuple[int, int],
    width: int,
    drop_path: float = 0.0,
    relative_positions: bool = False,
    layer_scale: float = 0.0,
) -> Any:
    """transformers' configuration of UPerNet on an encoder that computes what `model`'s does; see `build_segmenter`."""
    transformers = library("transformers")
    encoder = transformers.BeitConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.num_heads,
        intermediate_size=model.blocks[0].mlp.fc1.out_features,  # type: ignore[union-attr]
        layer_norm_eps=LAYER_NORM_EPS,
        image_size=list(image_size),
        patch_size=model.patch_size,
        num_channels=model.in_chans,
        use_mask_token=False,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=relative_positions,
        layer_scale_init_value=layer_scale,
        drop_path_rate=drop_path,
        use_mean_pooling=True,  # no norm after the last block: UPerNet reads the blocks' own outputs
        add_fpn=True,
        reshape_hidden_states=True,
        out_indices=levels(len(model.blocks)),
    )
    return transformers.UperNetConfig(
        backbone_config=encoder,
        hidden_size=width,
        auxiliary_in_channels=model.embed_dim,
        auxiliary_channels=min(AUXILIARY_WIDTH, width),
        auxiliary_loss_weight=AUXILIARY_WEIGHT,
        loss_ignore_index=IGNORED,
        num_labels=num_classes,
    )


def start_heads(net: Any) -> None:
    """mmseg's start of everything that is fresh: He's for convolutions, a small normal for classifiers, torch's own for
    the pyramid."""
    for module in [*net.decode_head.modules(), *net.auxiliary_head.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for head in (net.decode_head, net.auxiliary_head):
        nn.init.normal_(head.classifier.weight, std=CLASSIFIER_STD)
    for module in net.backbone.fpn.modules():
        if isinstance(module, nn.ConvTranspose2d):
            module.reset_parameters()


def adapt(net: Any) -> None:
    """Put our own parts in their places: embeddings, norms, and the dropout before the classifiers."""
    config, beit = net.backbone.config, net.backbone.beit
    grid = (config.image_size[0] // config.patch_size, config.image_size[1] // config.patch_size)
    old = beit.embeddings.patch_embeddings
    beit.embeddings = Embeddings(old, config.hidden_size, config.patch_size, grid)
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.BatchNorm2d:
                replace_child(parent, name, SharedNorm(module.num_features, module.eps, module.momentum))
    for head in (net.decode_head, net.auxiliary_head):
        plain = head.classifier
        head.classifier = DroppingConv(plain.in_channels, plain.out_channels, kernel_size=1)
        head.classifier.load_state_dict(plain.state_dict())


def replace_child(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Like `setattr`, where a module's name may be a number."""
    parent._modules[name] = module


def load_encoder(net: Any, model: HPMViT, image_size: tuple[int, int]) -> None:
    """Give `net` the weights of `model`'s encoder; its final norm and the bias of its keys have no place here.

    Softmax does not see that bias: it adds the same to all scores of a query.
    """
    state = {key: value for key, value in encoder_of(model).items() if not key.startswith("norm.")}
    grid = (image_size[0] // model.patch_size, image_size[1] // model.patch_size)
    state["pos_embed"] = resize_positions(state["pos_embed"], model.grid_size, grid)
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        theirs |= encoder_weight(key, value)
    left = net.backbone.beit.load_state_dict(theirs, strict=False)
    fresh = ("relative_position_bias", "lambda_")
    missing = [key for key in left.missing_keys if not any(word in key for word in fresh)]
    if missing or left.unexpected_keys:
        raise RuntimeError(f"transformers' BeitModel does not take this encoder: {missing}, {left.unexpected_keys}")


def encoder_weight(key: str, value: Tensor) -> dict[str, Tensor]:
    """One of our encoder's tensors under transformers' names; queries, keys and values apart."""
    for ours, theirs in (*OTHER_NAMES, *BLOCK_NAMES):
        key = key.replace(ours, theirs)
    if ".attn.qkv." not in key:
        return {key: value}
    names = [key.replace("attn.qkv", f"attention.{letter}_proj") for letter in "qkv"]
    parts = dict(zip(names, value.chunk(3), strict=True))
    if key.endswith("bias"):
        del parts[names[1]]
    return parts
