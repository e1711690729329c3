"""mmseg's networks, spelled out over mmseg's own names: they do not install here, and these are the slow twins."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


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
