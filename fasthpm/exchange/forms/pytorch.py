"""Forms of the PyTorch libraries: timm, torchvision, and the checkpoint of MAE that all of them can read."""

import copy
import json
from pathlib import Path
from typing import Any

import timm.models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fasthpm.exchange.forms.base import (
    Form,
    Names,
    encoder_of,
    library,
    metadata_of,
    mlp_width,
    quoted,
    read_pth,
    renamed,
    size_name,
    square,
    timm_arguments,
    unmet,
    write_pth,
)
from fasthpm.files import METADATA, save_tensors
from fasthpm.layers import LAYER_NORM_EPS
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe

TORCHVISION: Names = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj", "conv_proj"),
    ("norm.", "encoder.ln."),
)
TORCHVISION_BLOCK: Names = (
    ("norm1", "ln_1"),
    ("norm2", "ln_2"),
    ("attn.qkv.", "self_attention.in_proj_"),
    ("attn.proj", "self_attention.out_proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.3"),
)
LOAD = "model.load_state_dict(safetensors.torch.load_file({}))"


# -------------------------------------------------------------------------------------------------- timm
class Timm(Form):
    """`timm.models.VisionTransformer`: our names are timm's; the metadata holds the arguments that build it."""

    name = "timm"
    library, summary = "timm", "encoder for timm (the default)"

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        save_tensors(encoder_of(model), path, {"timm": json.dumps(timm_arguments(model)), **metadata})

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        vit = timm.models.VisionTransformer(**metadata_of(path, "timm"))
        vit.load_state_dict(load_file(path))
        return vit.double().eval().forward_features(images)

    def usage(self, path: Path) -> str:
        arguments = metadata_of(path, "timm")
        if name := timm_name(arguments):
            return created(name, path)
        return (
            f"import timm, safetensors.torch; model = timm.models.VisionTransformer(**{arguments}); "
            f"{LOAD.format(quoted(path))}"
        )


class MAECheckpoint(Form):
    """MAE's own file, {"model": weights}, which MAE's fine-tuning, detectron2's ViTDet, timm and mmseg's beit2mmseg
    all take. Names are MAE's, hence timm's; positions [1, 1 + L, D], cls first.

    detectron2 strips cls and fits the names by itself (`train.init_checkpoint="mae.pth?matching_heuristics=True"`);
    it and MAE's fine-tuning interpolate positions of square grids alone, as their code has it. timm reads the file
    back here. A second entry, "fasthpm", holds what the metadata of the other files does, as texts.
    """

    name = "mae"
    library, summary = "timm", "encoder as MAE's {'model': …}, for MAE, ViTDet, timm and beit2mmseg (a .pth)"
    default = "encoder.pth"

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        write_pth(encoder_of(model), "model", {"timm": json.dumps(timm_arguments(model)), **metadata}, path)

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        vit = timm.models.VisionTransformer(**json.loads(read_pth(path)[METADATA]["timm"]))
        vit.load_state_dict(timm.models.load_state_dict(str(path), weights_only=True))
        return vit.double().eval().forward_features(images)

    def usage(self, path: Path) -> str:
        arguments = json.loads(read_pth(path)[METADATA]["timm"])
        if name := timm_name(arguments):
            return created(name, path)
        return (
            f"import timm; model = timm.models.VisionTransformer(**{arguments}); "
            f"model.load_state_dict(timm.models.load_state_dict({quoted(path)}, weights_only=True))"
        )


class TimmSAM(Form):
    """`timm.models.VisionTransformerSAM`, which is ViTDet's backbone: no cls token, positions [1, h, w, D].

    Two things are ours to say. (1) A LayerNorm's eps: the class takes 1e-5 by itself, ours have 1e-6; the arguments in
    the metadata say `norm_layer: null`, by which timm means 1e-6, and the line that loads it says it in full. (2) The
    final norm is the class's `neck` (`neck_chans` 0). What is compared, exactly, is global attention in all blocks
    (`window_size` 0) without relative positions, against our encoder run without its cls token. For ViTDet's windows
    give `window_size=14, global_attn_indexes=(2, 5, 8, 11)` instead, and any image size: the weights stay as they are.
    """

    name = "timm_samvit"
    library, summary = "timm", "encoder for timm's VisionTransformerSAM, ViTDet's layout without cls"
    default = "encoder_samvit.safetensors"

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        tensors = encoder_of(model)
        del tensors["cls_token"]
        for name in ("weight", "bias"):
            tensors[f"neck.{name}"] = tensors.pop(f"norm.{name}")
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:].unflatten(1, model.grid_size).clone()
        save_tensors(tensors, path, {"timm_samvit": json.dumps(samvit_arguments(model)), **metadata})

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        vit = timm.models.VisionTransformerSAM(**metadata_of(path, "timm_samvit"))
        vit.load_state_dict(load_file(path))
        return vit.double().eval().forward_features(images).flatten(2).transpose(1, 2)

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, L, D] of the encoder run without its cls token."""
        bare = copy.deepcopy(model)
        bare.num_prefix_tokens, bare.pos_embed = 0, model.pos_embed[:, 1:]
        return bare.encode(images)

    def usage(self, path: Path) -> str:
        arguments = {k: v for k, v in metadata_of(path, "timm_samvit").items() if k != "norm_layer"}
        return (
            f"import functools, timm, torch, safetensors.torch; "
            f"model = timm.models.VisionTransformerSAM(**{arguments}, "
            f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={LAYER_NORM_EPS})); {LOAD.format(quoted(path))}"
        )


def samvit_arguments(model: HPMViT) -> dict[str, Any]:
    """Arguments of `timm.models.VisionTransformerSAM` for this encoder."""
    shared = {key: value for key, value in timm_arguments(model).items() if key != "global_pool"}
    own = {"window_size": 0, "use_rel_pos": False, "neck_chans": 0, "global_pool": "", "norm_layer": None}
    return {**shared, **own}


def timm_name(arguments: dict[str, Any]) -> str:
    """timm's name of the encoder with these arguments; empty if it has none."""
    name = f"vit_{size_name(arguments)}_patch{arguments['patch_size']}_{arguments['img_size'][0]}"
    fits = timm.is_model(name) and arguments["in_chans"] == 3 and len(set(arguments["img_size"])) == 1
    return name if fits else ""


def created(name: str, path: Path) -> str:
    """The line that makes timm's model `name` with the weights of a file."""
    return f'import timm; model = timm.create_model("{name}", num_classes=0, checkpoint_path={quoted(path)})'


# -------------------------------------------------------------------------------------------------- torchvision
class Torchvision(Form):
    """`torchvision.models.VisionTransformer`, whose classifier's head is replaced by `torch.nn.Identity()`."""

    name = "torchvision"
    library, summary = "torchvision", "encoder for torchvision's VisionTransformer (square images, 3 channels)"
    default = "encoder_torchvision.safetensors"

    def refusal(self, model: HPMViT) -> str:
        return unmet({**square(model), f"3 channels, this model has {model.in_chans}": model.in_chans == 3})

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        tensors = {torchvision_name(key): value for key, value in encoder_of(model).items()}
        save_tensors(tensors, path, {"torchvision": json.dumps(torchvision_arguments(model)), **metadata})

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        models = library("torchvision.models", "torchvision")
        vit = models.VisionTransformer(**metadata_of(path, "torchvision"))
        vit.heads = nn.Identity()
        vit.load_state_dict(load_file(path))
        vit = vit.double().eval()
        tokens = torch.cat([vit.class_token.expand(len(images), -1, -1), vit._process_input(images)], dim=1)
        tokens = vit.encoder(tokens)
        if not torch.equal(vit(images), tokens[:, 0]):
            raise RuntimeError("torchvision's forward no longer returns the class token of its encoder")
        return tokens

    def usage(self, path: Path) -> str:
        arguments = ", ".join(f"{k}={v}" for k, v in metadata_of(path, "torchvision").items())
        return (
            f"import torch, torchvision, safetensors.torch; model = torchvision.models.VisionTransformer({arguments}); "
            f"model.heads = torch.nn.Identity(); {LOAD.format(quoted(path))}"
        )


def torchvision_name(key: str) -> str:
    """torchvision's name of one of the encoder's tensors."""
    if key.startswith("blocks."):
        _, index, rest = key.split(".", 2)
        return f"encoder.layers.encoder_layer_{index}.{renamed(rest, TORCHVISION_BLOCK)}"
    return renamed(key, TORCHVISION)


def torchvision_arguments(model: HPMViT) -> dict[str, Any]:
    """Arguments of `torchvision.models.VisionTransformer` for this encoder."""
    return {
        "image_size": model.img_size[0],
        "patch_size": model.patch_size,
        "num_layers": len(model.blocks),
        "num_heads": model.num_heads,
        "hidden_dim": model.embed_dim,
        "mlp_dim": mlp_width(model.blocks),
    }
