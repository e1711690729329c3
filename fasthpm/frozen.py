"""Frozen teachers, whose features are reconstruction targets: DINO's and CLIP's ViT (CVPR Tab. 1, TPAMI Tab. I).

A teacher is a timm `VisionTransformer`; weights come from a file, from timm, from a repository of Hugging Face
transformers or from open_clip. Published key names are translated to timm's, and every key has to fit.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_pretrained
from torch import Tensor, nn

from fasthpm.errors import UserError, about
from fasthpm.files import read_file
from fasthpm.fitting import misfits
from fasthpm.recipe import Recipe
from fasthpm.targets import TARGETS, Family
from fasthpm.tokenizers import build_tokenizer


class FrozenTeacher(nn.Module):
    """A pretrained ViT that gives features of every patch, from the same crop as the student's, with its own mean/std.

    - `vit`: a timm VisionTransformer; its features are those after the last norm (DINO) and, with
      `family.projected`, after its head (CLIP)
    """

    def __init__(self, vit: Any, family: Family) -> None:
        super().__init__()
        self.vit, self.projected = vit, family.projected
        # Plain attributes: a cast of the module to bfloat16 would round buffers.
        self._mean, self._std = torch.tensor(family.mean) * 255, torch.tensor(family.std) * 255
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> [B, L, D'] in the weights' dtype; one channel (grey) is read as three."""
        self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        pixels = ((images.float() - self._mean) / self._std).permute(0, 3, 1, 2)
        tokens = self.vit.forward_features(pixels.to(self.vit.patch_embed.proj.weight.dtype))
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return self.vit.head(patches) if self.projected else patches


def build_frozen(recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The module that gives `recipe.target` of images (see `Target.build`), or None if no frozen teacher does.

    **Raises:** `UserError` if its weights cannot be had or do not fit, or its patches are not the recipe's.
    """
    target = TARGETS[recipe.target]
    if target.tokenizers:
        return build_tokenizer(recipe, device, dtype)
    if target.build:
        return target.build(recipe, device, dtype)
    return None if target.family is None else pretrained_teacher(recipe, target.family).to(device=device, dtype=dtype)


def pretrained_teacher(recipe: Recipe, family: Family) -> FrozenTeacher:
    """A teacher of `family` with the weights that the recipe names, or the papers'. **Raises:** as `build_frozen`."""
    teacher = untrained_teacher(recipe, family)
    weights = recipe.target_weights or family.weights
    with about(Path(weights)):
        load_vit_weights(teacher.vit, weights)
    return teacher


def untrained_teacher(recipe: Recipe, family: Family) -> FrozenTeacher:
    """The same with random weights: what it costs. **Raises:** as `build_frozen`."""
    check_input(recipe)
    weights = recipe.target_weights or family.weights
    architecture = recipe.target_model or default_architecture(weights, family)
    return FrozenTeacher(create_vit(recipe, architecture, family), family)


def check_input(recipe: Recipe) -> None:
    """**Raises:** `UserError` for images that a teacher of photographs cannot read."""
    if recipe.channels not in (1, 3):
        raise UserError(
            f"target {recipe.target} has a teacher of colour images, and channels is {recipe.channels}; use 3 (or 1, "
            f"grey), or --target ema"
        )


def default_architecture(weights: str, family: Family) -> str:
    """The timm architecture that `weights` name, or the family's."""
    source, _, name = weights.partition(":")
    architecture, _, tag = name.partition(".")
    if source != "timm":
        return family.architecture
    # timm keeps OpenAI's weights under a name with the exact GELU too.
    return architecture.replace("_clip_224", "_clip_quickgelu_224") if tag == "openai" else architecture


def create_vit(recipe: Recipe, architecture: str, family: Family) -> Any:
    """The teacher's ViT for the recipe's images, with random weights.

    **Raises:** `UserError` for an unknown architecture, or one with other patches or features.
    """
    head = recipe.frozen_dim if family.projected else 0
    if not timm.is_model(architecture):
        raise UserError(f"target_model {architecture!r} is no timm model; expected one like vit_base_patch16_224")
    try:
        vit: Any = timm.create_model(architecture, img_size=recipe.image_size, num_classes=head)
        side, grid, width = vit.patch_embed.patch_size, vit.patch_embed.grid_size, head or vit.num_features
        vit.num_prefix_tokens, vit.pos_embed  # noqa: B018
    except (AttributeError, TypeError) as error:
        raise UserError(f"target_model {architecture} is no plain vision transformer ({error}); use one") from error
    if tuple(side) != (recipe.patch_size, recipe.patch_size) or tuple(grid) != recipe.grid_size:
        raise UserError(
            f"target_model {architecture} cuts an image of {recipe.input_size} into {grid[0]} x {grid[1]} patches of "
            f"{side[0]}, the student into {recipe.grid_size[0]} x {recipe.grid_size[1]} of {recipe.patch_size}; use "
            f"--patch_size {side[0]}, or another --target_model"
        )
    if width != recipe.frozen_dim:
        raise UserError(
            f"target_model {architecture} gives {width} features per patch, and {recipe.frozen_dim} are expected; use "
            f"--target_dim {width}"
        )
    return vit


# -------------------------------------------------------------------------------------------------- weights
def load_vit_weights(vit: Any, weights: str) -> None:
    """Load `weights` (a file or SOURCE:NAME) into a timm ViT, all of them or none.

    **Raises:** `UserError` that lists missing and unexpected keys and wrong shapes.
    """
    source, _, name = weights.partition(":")
    state = SOURCES[source](name, vit) if source in SOURCES else from_file(weights, vit)
    given, own = to_timm(state), vit.state_dict()
    if "head.weight" not in own:
        given = {key: value for key, value in given.items() if not key.startswith("head.")}
    if found := misfits(given, own):
        raise UserError(
            f"the weights do not fit the target's teacher: {found}; give weights of it, or the --target_model and "
            f"--input_size that they were trained with"
        )
    vit.load_state_dict(given)


def from_file(path: str, vit: Any) -> Mapping[str, Any]:
    """The state dict in a local file; no code in it ever runs."""
    content, _ = read_file(Path(path))
    for key in ("teacher", "state_dict", "model"):  # DINO's own checkpoints hold student and teacher
        content = content[key] if isinstance(content.get(key), Mapping) else content
    return content


def from_timm(name: str, vit: Any) -> Mapping[str, Any]:
    """The state dict of a pretrained timm model, downloaded if it is not there."""
    if not is_model_pretrained(name):  # timm would draw random ones
        raise UserError(f"timm has no weights named {name}; expected one like vit_base_patch16_224.dino")
    with _fetching("timm cannot download them"):
        state: Mapping[str, Any] = timm.create_model(name, pretrained=True).state_dict()
    return state


def from_transformers(name: str, vit: Any) -> Mapping[str, Any]:
    """The state dict of a folder or of a Hugging Face repository that transformers can read."""
    config = json.loads(_hub_file(name, "config.json").read_text())
    _check_activation(vit, config.get("vision_config", config).get("hidden_act", ""))
    try:
        path = _hub_file(name, "model.safetensors")
    except UserError:
        path = _hub_file(name, "pytorch_model.bin")
    return read_file(path)[0]


def from_open_clip(name: str, vit: Any) -> Mapping[str, Any]:
    """The state dict of an open_clip model, NAME/TAG as in ViT-B-16/laion2b_s34b_b88k."""
    try:
        open_clip = import_module("open_clip")
    except ImportError as error:
        raise UserError("open_clip is not installed; pip install open_clip_torch, or give a file") from error
    model, _, tag = name.partition("/")
    if not tag:  # open_clip would draw random ones
        raise UserError("no weights are named; give open_clip:NAME/TAG, as in open_clip:ViT-B-16/laion2b_s34b_b88k")
    with _fetching("open_clip cannot load them"):
        loaded = open_clip.create_model(model, pretrained=tag)
    quick = any(type(module).__name__ == "QuickGELU" for module in loaded.visual.modules())
    _check_activation(vit, "quick_gelu" if quick else "gelu")
    state: Mapping[str, Any] = loaded.state_dict()
    return state


SOURCES: dict[str, Callable[[str, Any], Mapping[str, Any]]] = {
    "timm": from_timm,
    "transformers": from_transformers,
    "open_clip": from_open_clip,
}


@contextlib.contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it fetches weights into one line."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} ({lines[0]}); give another --target_weights: a file needs no network") from error


def _hub_file(name: str, file: str) -> Path:
    """A file of a local folder or of a repository on the Hugging Face Hub."""
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise UserError(f"{name} has no {file}; expected a folder of save_pretrained")
        return Path(name) / file
    with _fetching(f"{file} of {name} cannot be downloaded"):
        return Path(import_module("huggingface_hub").hf_hub_download(name, file))


def _check_activation(vit: Any, activation: str) -> None:
    """Shapes do not tell the quick GELU from the exact one, and features differ."""
    quick = "quick" in type(vit.blocks[0].mlp.act).__name__.lower()
    if activation and quick != ("quick" in activation):
        raise UserError(
            f"the weights were trained with {activation}, the target_model has {'quick_gelu' if quick else 'gelu'}; "
            f"use --target_model vit_base_patch16_clip_{'' if quick else 'quickgelu_'}224 or the like"
        )


# -------------------------------------------------------------------------------------------------- key names
Names = tuple[tuple[str, str], ...]
OPENAI: Names = (  # OpenAI's and open_clip's, after "visual."
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSFORMERS_CLIP: Names = (
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^visual_projection\.", "head."),
    (r"^vision_model\.encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)
TRANSFORMERS_VIT: Names = (
    (r"^(vit\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(vit\.)?layernorm\.", "norm."),
    (r"^(vit\.)?encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.([qkv])[a-z]+\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# Of the same checkpoints, no part of the vision tower's features.
BESIDE = re.compile(
    r"^(text_model\.|text_projection|logit_scale|logit_bias|transformer\.|token_embedding\.|positional_embedding$"
    r"|ln_final\.|input_resolution$|context_length$|vocab_size$|vision_model\.embeddings\.position_ids$"
    r"|(vit\.)?pooler\.|classifier\.|head\.(mlp|last_layer)|.*attn_mask$)"
)


def to_timm(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published weights under timm's names, whoever published them; unknown names stay as they are.

    Left out: text towers, poolers, DINO's projection head.
    """
    tensors = {key: value.float() for key, value in state.items() if isinstance(value, Tensor)}
    tensors = {re.sub(r"^(module\.|backbone\.)+", "", key): value for key, value in tensors.items()}
    openai = "visual.class_embedding" in tensors
    timm_names = "patch_embed.proj.weight" in tensors
    kept = {
        key.removeprefix("visual.") if openai else key: value for key, value in tensors.items() if not BESIDE.match(key)
    }
    clip = "vision_model.embeddings.class_embedding" in kept
    names = OPENAI if openai else TRANSFORMERS_CLIP if clip else () if timm_names else TRANSFORMERS_VIT
    return _shaped(_joined({_renamed(key, names): value for key, value in kept.items()}), openai)


def _renamed(key: str, names: Names) -> str:
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate query, key and value become timm's qkv."""
    joined = dict(tensors)
    for key in [key for key in tensors if ".attn.q." in key]:
        parts = [joined.pop(key.replace(".attn.q.", f".attn.{letter}."), None) for letter in "qkv"]
        joined[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([part for part in parts if part is not None])
    return joined


def _shaped(tensors: dict[str, Tensor], openai: bool) -> dict[str, Tensor]:
    """timm's shapes of cls token, positions and head, whose bias CLIP lacks."""
    for key, dims in (("cls_token", 3), ("pos_embed", 3)):
        while key in tensors and tensors[key].dim() < dims:
            tensors[key] = tensors[key][None]
    if "head.weight" in tensors:
        weight = tensors["head.weight"].T if openai else tensors["head.weight"]
        tensors["head.weight"] = weight
        tensors.setdefault("head.bias", torch.zeros(len(weight)))
    return tensors
