"""mmseg's networks, spelled out over mmseg's own names: they do not install here, and these are the slow twins."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthpm.exchange.forms.openmmlab import mmseg_shapes
from fasthpm.layers import relative_index

State = dict[str, Tensor]
SIZES = {"embed_dim": 24, "num_heads": 2, "patch_size": 4, "img_size": [16, 16], "in_chans": 3, "depth": 4}
WIDTH, CLASSES, DIM = 12, 5, 24


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    """Weights of these shapes, none of them at a neutral value."""
    generator = torch.Generator().manual_seed(3)
    state = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key, value in state.items():
        if key.endswith("running_var"):
            value.abs_().add_(0.5)
    return state


def convolution(name: str, inner: int, outer: int, side: int) -> dict[str, tuple[int, ...]]:
    """mmcv's ConvModule with SyncBN."""
    norm = {f"{name}.bn.{key}": (outer,) for key in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.conv.weight": (outer, inner, side, side), **norm}


def upernet_state() -> State:
    """mmseg's UPerNet on MAE as a checkpoint holds it, names written down from its classes."""
    shapes = {f"backbone.{key}": shape for key, shape in mmseg_shapes(SIZES, mlp=48).items() if "_index" not in key}
    for name, shape in {"0.weight": (DIM, DIM, 2, 2), "0.bias": (DIM,), "3.weight": (DIM, DIM, 2, 2)}.items():
        shapes[f"neck.upsample_4x.{name}"] = shape
    shapes |= {"neck.upsample_4x.3.bias": (DIM,), "neck.upsample_2x.0.weight": (DIM, DIM, 2, 2)}
    shapes |= {"neck.upsample_2x.0.bias": (DIM,)}
    shapes |= {f"neck.upsample_4x.1.{key}": (DIM,) for key in ("weight", "bias", "running_mean", "running_var")}
    for n in range(4):
        shapes |= convolution(f"decode_head.psp_modules.{n}.1", DIM, WIDTH, 1)
    shapes |= convolution("decode_head.bottleneck", DIM + 4 * WIDTH, WIDTH, 3)
    for n in range(3):
        shapes |= convolution(f"decode_head.lateral_convs.{n}", DIM, WIDTH, 1)
        shapes |= convolution(f"decode_head.fpn_convs.{n}", WIDTH, WIDTH, 3)
    shapes |= convolution("decode_head.fpn_bottleneck", 4 * WIDTH, WIDTH, 3)
    shapes |= convolution("auxiliary_head.convs.0", DIM, WIDTH, 3)
    for head in ("decode_head", "auxiliary_head"):
        shapes |= {f"{head}.conv_seg.weight": (CLASSES, WIDTH, 1, 1), f"{head}.conv_seg.bias": (CLASSES,)}
    state = drawn(shapes)
    for n in range(4):
        state[f"backbone.layers.{n}.attn.relative_position_index"] = relative_index(4, 4)
    norms = [key.removesuffix("running_mean") for key in state if key.endswith("running_mean")]
    return state | {f"{norm}num_batches_tracked": torch.tensor(7) for norm in norms}


def part(state: State, prefix: str) -> State:
    """What lies under a prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def attention(own: State, tokens: Tensor, heads: int) -> Tensor:
    """BEiT's: scores plus table[index]."""
    cut = F.linear(tokens, own["attn.qkv.weight"], own["attn.qkv.bias"])
    query, key, value = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in cut.chunk(3, dim=2))
    bias = own["attn.relative_position_bias_table"][own["attn.relative_position_index"]].permute(2, 0, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
    out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return F.linear(out, own["attn.proj.weight"], own["attn.proj.bias"])


def mae(state: State, images: Tensor, heads: int) -> list[Tensor]:
    """mmseg's `MAE`, names without "backbone.": outputs of all layers [B, 1 + L, D]."""
    kernel, outputs = state["patch_embed.projection.weight"], []
    patches = F.conv2d(images, kernel, state["patch_embed.projection.bias"], stride=kernel.shape[-1])
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(len(images), -1, -1), tokens], dim=1) + state["pos_embed"]
    for layer in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))):
        own = part(state, f"layers.{layer}.")
        normed = F.layer_norm(tokens, tokens.shape[-1:], own["ln1.weight"], own["ln1.bias"], 1e-6)
        tokens = tokens + own["gamma_1"] * attention(own, normed, heads)
        normed = F.layer_norm(tokens, tokens.shape[-1:], own["ln2.weight"], own["ln2.bias"], 1e-6)
        hidden = F.gelu(F.linear(normed, own["ffn.layers.0.0.weight"], own["ffn.layers.0.0.bias"]))
        tokens = tokens + own["gamma_2"] * F.linear(hidden, own["ffn.layers.1.weight"], own["ffn.layers.1.bias"])
        outputs.append(tokens)
    return outputs


def batch_norm(own: State, maps: Tensor) -> Tensor:
    return F.batch_norm(maps, own["running_mean"], own["running_var"], own["weight"], own["bias"], eps=1e-5)


def convolved(state: State, name: str, maps: Tensor) -> Tensor:
    """mmcv's ConvModule: convolution, norm, ReLU."""
    kernel = state[f"{name}.conv.weight"]
    return F.relu(batch_norm(part(state, f"{name}.bn."), F.conv2d(maps, kernel, padding=kernel.shape[-1] // 2)))


def sized(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)


def upernet(state: State, images: Tensor, heads: int, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """MAE, Feature2Pyramid, UPerHead and FCNHead (on the third level): logits of both [B, K, h, w].

    - `levels`: layers that are read, from 0
    """
    grid = [length // state["backbone.patch_embed.projection.weight"].shape[-1] for length in images.shape[2:]]
    outputs = mae(part(state, "backbone."), images, heads)
    maps = [outputs[level][:, 1:].transpose(1, 2).unflatten(2, grid) for level in levels]
    neck, head, other = (part(state, name) for name in ("neck.", "decode_head.", "auxiliary_head."))
    four = F.conv_transpose2d(maps[0], neck["upsample_4x.0.weight"], neck["upsample_4x.0.bias"], stride=2)
    four = F.gelu(batch_norm(part(neck, "upsample_4x.1."), four))
    maps[0] = F.conv_transpose2d(four, neck["upsample_4x.3.weight"], neck["upsample_4x.3.bias"], stride=2)
    maps[1] = F.conv_transpose2d(maps[1], neck["upsample_2x.0.weight"], neck["upsample_2x.0.bias"], stride=2)
    maps[3] = F.max_pool2d(maps[3], 2)
    pooled = [F.adaptive_avg_pool2d(maps[3], side) for side in (1, 2, 3, 6)]
    pooled = [sized(convolved(head, f"psp_modules.{n}.1", each), maps[3]) for n, each in enumerate(pooled)]
    sides = [convolved(head, f"lateral_convs.{n}", maps[n]) for n in range(3)]
    sides.append(convolved(head, "bottleneck", torch.cat([maps[3], *pooled], dim=1)))
    for n in (3, 2, 1):
        sides[n - 1] = sides[n - 1] + sized(sides[n], sides[n - 1])
    outs = [*(convolved(head, f"fpn_convs.{n}", sides[n]) for n in range(3)), sides[3]]
    joined = convolved(head, "fpn_bottleneck", torch.cat([sized(each, outs[0]) for each in outs], dim=1))
    logits = F.conv2d(joined, head["conv_seg.weight"], head["conv_seg.bias"])
    return logits, F.conv2d(convolved(other, "convs.0", maps[2]), other["conv_seg.weight"], other["conv_seg.bias"])
