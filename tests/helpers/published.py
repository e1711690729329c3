"""Weights under the keys that others publish, a plain forward pass of them, and their import."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fasthpm import recipes
from fasthpm.__main__ import dispatch
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from tests.helpers import reference

WIDTH, DEPTH, HEADS = 128, 4, 4  # the registered size "nano"
PATCH, CHANNELS, GRID = 4, 3, (3, 3)
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 32, 2, 4
FLAGS = ["--decoder_heads", str(DECODER_HEADS)]


def published(
    *, predictor: bool = True, grid: tuple[int, int] = GRID, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the documented keys of HPM's checkpoints, or of MAE's (without `predictor`)."""
    generator = torch.Generator().manual_seed(seed)
    width, depth = sizes.get("width", WIDTH), sizes.get("depth", DEPTH)
    channels, values = sizes.get("channels", CHANNELS), sizes.get("channels", CHANNELS) * PATCH**2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, channels, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (DECODER_WIDTH, width),
        "decoder_embed.bias": (DECODER_WIDTH,),
        "mask_token": (1, 1, DECODER_WIDTH),
    }
    stacks = {"blocks": (depth, width)}
    for tail in ("", "_losspred") if predictor else ("",):
        stacks[f"decoder_blocks{tail}"] = (DECODER_DEPTH, DECODER_WIDTH)
        shapes[f"decoder_norm{tail}.weight"] = shapes[f"decoder_norm{tail}.bias"] = (DECODER_WIDTH,)
        shapes |= {f"decoder_pred{tail}.weight": (values, DECODER_WIDTH), f"decoder_pred{tail}.bias": (values,)}
    for name, (count, dim) in stacks.items():
        for i in range(count):
            shapes |= {f"{name}.{i}.{key}": shape for key, shape in block_shapes(dim).items()}
    state = {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state["pos_embed"] = reference.sincos(width, *grid).float()[None]
    state["decoder_pos_embed"] = reference.sincos(DECODER_WIDTH, *grid).float()[None]
    return {key: value + 1 if "norm" in key and key.endswith("weight") else value for key, value in state.items()}


def block_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"norm{n}.{kind}": (dim,) for n in (1, 2) for kind in ("weight", "bias")}
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for name, (rows, columns) in layers.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


class Published:
    """The published models' forward, from their state dict, written out for one image."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def layer(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def blocks(self, name: str, x: Tensor, heads: int) -> Tensor:
        for i in range(sum(key.startswith(f"{name}.") and key.endswith("norm1.bias") for key in self.state)):
            block = f"{name}.{i}"
            query, key, value = self.layer(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x)).chunk(3, dim=-1)
            parts = []
            for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
                parts.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
            x = x + self.layer(f"{block}.attn.proj", torch.cat(parts, -1))
            x = x + self.layer(
                f"{block}.mlp.fc2", F.gelu(self.layer(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x)))
            )
        return x

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        kernel, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        tokens = F.conv2d(image[None], kernel, bias, stride=kernel.shape[-1])[0].flatten(1).T
        tokens = (tokens + self.state["pos_embed"][0, 1:])[~mask]
        tokens = torch.cat([self.state["cls_token"][0] + self.state["pos_embed"][0, :1], tokens])
        return self.norm("norm", self.blocks("blocks", tokens, HEADS))

    def decode(self, latent: Tensor, mask: Tensor, tail: str = "") -> Tensor:
        """The masked patches' predictions [M, P*P*C]; `tail` "_losspred" is the loss predictor."""
        tokens, positions = self.layer("decoder_embed", latent), self.state["decoder_pos_embed"][0]
        masked = self.state["mask_token"][0] + positions[1:][mask]
        tokens = torch.cat([tokens[:1] + positions[:1], tokens[1:] + positions[1:][~mask], masked])
        tokens = self.norm(f"decoder_norm{tail}", self.blocks(f"decoder_blocks{tail}", tokens, DECODER_HEADS))
        return self.layer(f"decoder_pred{tail}", tokens[-int(mask.sum()) :])


def check_same(model: HPMViT, state: dict[str, Tensor], decoders: bool = True) -> None:
    """Our outputs against the published forward's, in float64."""
    plain, model = Published(state), model.double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, model.in_chans, *model.img_size, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, model.num_patches, generator=generator).argsort(1) < model.num_patches * 3 // 4
    with torch.no_grad():
        out, latents = model(images, masks), model.encode(images, masks)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        latent = plain.encode(image, mask)
        torch.testing.assert_close(latents[i], latent)
        if decoders:
            torch.testing.assert_close(out.reconstruction[i], plain.decode(latent, mask))
        if decoders and any("losspred" in key for key in state):
            difficulty = plain.decode(latent, mask, "_losspred").mean(-1)  # the published head's many rows, averaged
            torch.testing.assert_close(out.predicted_difficulty[i], difficulty)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def run_import(path: Path, output: Path, *flags: str) -> None:
    dispatch(["import", str(path), "-o", str(output), *flags])


def imported_debug(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None) -> Path:
    """A file with the debug recipe's model, its weights moved, made a run."""
    state = {key: value.clone() for key, value in model_of(recipes.debug()).state_dict().items()}
    state["cls_token"] += 1
    state["decoder_pred_losspred.bias"] += 1
    change(state)
    save_file(state, folder / "some.safetensors")
    run_import(folder / "some.safetensors", folder / "imported", "--decoder_heads", "4")
    return folder / "imported"
