"""Encoders of any origin, each as one function from pixels to tokens: of runs, of exported files, of timm."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fasthpm import checkpoint
from fasthpm.checkpoint.foreign import EMBEDDED_RECIPE, find_weights, foreign_layout, unusable
from fasthpm.checkpoint.pixels import metadata_statistics
from fasthpm.data import DatasetInfo
from fasthpm.data.statistics import PixelStatistics, statistics_from, statistics_of
from fasthpm.errors import UserError, about, nearest, note_once
from fasthpm.files import LISTED, file_hash, read_file
from fasthpm.model import HPMViT
from fasthpm.patches import NormalizedPatches, is_nodata, model_of, pixel_statistics, suited
from fasthpm.probes.classifier import build_vit
from fasthpm.recipe import Recipe, build_recipe


@dataclass(frozen=True)
class Encoder:
    """K tokens that are no patches (cls first, if there is one) and L patches, of width D."""

    tokens: Callable[[Tensor, DatasetInfo], Tensor]  # pixels [B, (T,) H, W, C], normalised by the info -> [B, K + L, D]
    name: str
    width: int  # D
    prefix: int  # K
    grid: tuple[int, ...]  # slots, rows, columns of the patches; their product is L
    has_cls: bool
    default: str  # how features are pooled, unless asked otherwise
    reading: dict[str, Any]  # how a loader has to read samples for it
    statistics: PixelStatistics | None  # of the data that it was trained on; None if they are not known
    norm_of_mean: nn.Module  # what follows the mean of the patches
    made_of: dict[str, Any]  # which weights these are


def of_run(run: Path, weights: str, device: torch.device) -> Encoder:
    """The encoder of a run, an import or a checkpoint.

    **Raises:** `UserError` if there is none, or not with these weights.
    """
    folder = checkpoint.checkpoint_of(run)
    model, recipe = checkpoint.load_weights(folder, weights)
    manifest = folder / checkpoint.MANIFEST
    digest = file_hash(manifest) if manifest.is_file() else ""
    made_of = {"weights": weights, "checkpoint": str(folder), "checkpoint_hash": digest}
    return _of_model(model.to(device), recipe, model.pixels, made_of)


def of_file(path: Path, name: str, device: torch.device) -> Encoder:
    """The encoder in a file: what `fasthpm export` and `finetune` write, or, with `name`, weights of that timm model.

    **Raises:** `UserError` for a file that holds something else; no code in it ever runs.
    """
    content, metadata = read_file(path)
    made_of = {"file": str(path), "sha256": file_hash(path)}
    known = metadata_statistics(metadata)
    with about(path):
        if not name and EMBEDDED_RECIPE in metadata:
            recipe = build_recipe(json.loads(metadata[EMBEDDED_RECIPE]), source="the recipe in it")
            model = model_of(recipe).eval()
            _load(model, content)
            return _of_model(model.to(device), recipe, known, made_of)
        if name:
            vit = _named(name, find_weights(content, "student"))
            return _of_timm(vit.to(device), name, statistics_from(vit.pretrained_cfg), made_of)
        if "timm" not in metadata:
            raise UserError("does not say which network it belongs to; name it with --timm, like vit_base_patch16_224")
        arguments = json.loads(metadata["timm"])
        if "num_frames" in arguments:
            raise UserError("is a classifier of videos; give the run that it comes from")
        vit = build_vit(arguments)
        _load(vit, content)
    return _of_timm(vit.to(device), metadata.get("model", "classifier"), known, made_of)


def _of_model(model: HPMViT, recipe: Recipe, statistics: PixelStatistics | None, made_of: dict[str, Any]) -> Encoder:
    model.requires_grad_(False)

    def tokens(images: Tensor, info: DatasetInfo) -> Tensor:
        return model.encode(NormalizedPatches(recipe, info)(images))

    return Encoder(
        tokens,
        recipe.model,
        model.embed_dim,
        model.num_prefix_tokens,
        (recipe.slots, *recipe.grid_size),
        has_cls=model.num_prefix_tokens > 0,
        default="cls" if model.num_prefix_tokens else "mean",
        reading={
            "image_size": recipe.image_size,
            "channels": recipe.channels,
            "num_frames": recipe.num_frames,
            "sampling_rate": recipe.sampling_rate,
        },
        statistics=statistics,
        norm_of_mean=nn.Identity(),
        made_of=made_of,
    )


def _of_timm(vit: Any, name: str, statistics: PixelStatistics | None, made_of: dict[str, Any]) -> Encoder:
    vit.eval().requires_grad_(False)
    embed = vit.patch_embed

    def tokens(images: Tensor, info: DatasetInfo) -> Tensor:
        mean, std = (value.to(images.device) for value in pixel_statistics(info, images.shape[-1]))
        pixels, nodata = images.float(), info.values.nodata
        scaled = (pixels - mean) / std
        scaled = scaled if nodata is None else scaled.masked_fill(is_nodata(pixels, nodata), 0)
        return vit.forward_features(scaled.permute(0, 3, 1, 2))

    return Encoder(
        tokens,
        name,
        vit.embed_dim,
        vit.num_prefix_tokens,
        (1, *embed.grid_size),
        has_cls=vit.cls_token is not None,
        default="cls" if vit.cls_token is not None and vit.global_pool != "avg" else "mean",
        reading={"image_size": tuple(embed.img_size), "channels": embed.proj.in_channels},
        statistics=statistics,
        norm_of_mean=vit.fc_norm,
        made_of=made_of,
    )


def _named(name: str, state: dict[str, Tensor]) -> Any:
    """timm's model of this name with these weights, without its head."""
    if not timm.is_model(name):
        raise UserError(f"--timm {name} is no model of timm {timm.__version__}{nearest(name, timm.list_models())}")
    projection = state.get("patch_embed.proj.weight")
    if projection is None:
        if layout := foreign_layout(state):
            raise UserError(layout)
        raise UserError("holds no weights of a vision transformer; expected patch_embed.proj.weight and the like")
    vit = timm.create_model(name, pretrained=False, num_classes=0, in_chans=projection.shape[1])
    if not isinstance(vit, timm.models.VisionTransformer):
        raise UserError(f"--timm {name} is a {type(vit).__name__}, expected a VisionTransformer, like vit_… and deit_…")
    _load(vit, {key: value for key, value in state.items() if not key.startswith("head")})
    return vit


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take over `state`, all of it. **Raises:** `UserError` naming what is missing, left over, or of another shape."""
    ours = model.state_dict()
    problems = {
        "lacks": [key for key in ours if key not in state],
        "has no place for": [key for key in state if key not in ours],
        "has another shape of": [key for key in ours if key in state and ours[key].shape != state[key].shape],
    }
    for what, keys in unusable({key: state[key] for key in ours if key in state}).items():
        if keys:
            raise UserError(f"holds weights that are {what}: {', '.join(keys[:LISTED])}; give another file")
    for what, keys in problems.items():
        if keys:
            listed = ", ".join(keys[:LISTED])
            raise UserError(f"is of another network: it {what} {listed}; another patch or image size, or name?")
    model.load_state_dict(state)


def normalized_by(encoder: Encoder, info: DatasetInfo, by: str) -> DatasetInfo:
    """`info` with the mean and standard deviation to normalise by: of the "data" itself, or of the "model"'s data.

    **Raises:** `UserError` if the latter are not known, or are of pixels on another scale.
    """
    found = statistics_of(info) if by == "data" else encoder.statistics
    if found is None:
        raise UserError("mean and std of the model's own data are not known; use --normalize data")
    if found.remark:
        note_once(found.remark)
    found = suited(found, info, "the set").in_channels(encoder.reading["channels"])
    return dataclasses.replace(info, mean=found.mean, std=found.std)
