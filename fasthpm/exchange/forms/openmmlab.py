"""The form of OpenMMLab's mmsegmentation, which does not install beside today's PyTorch: no program of its is run.

What its `MAE` backbone expects, every name and shape, stands here as data (`mmseg_shapes`), apart from the renaming.
From reading mmseg 1.x (mmseg/models/backbones/{mae,beit,vit}.py, tools/model_converters/beit2mmseg.py).
"""

import json
from pathlib import Path
from typing import Any

import timm.models
import torch
from torch import Tensor, nn

from fasthpm.exchange.forms.base import (
    Form,
    Names,
    block_outputs,
    encoder_of,
    quoted,
    read_pth,
    renamed,
    square,
    timm_arguments,
    unmet,
    write_pth,
)
from fasthpm.files import METADATA
from fasthpm.layers import relative_index
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe

MMSEG: Names = (("patch_embed.proj.", "patch_embed.projection."),)
MMSEG_BLOCK: Names = (
    ("blocks.", "layers."),
    ("norm1", "ln1"),
    ("norm2", "ln2"),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
)
GAMMAS, TABLE, INDEX = ("gamma_1", "gamma_2"), "attn.relative_position_bias_table", "attn.relative_position_index"


class MMSegmentation(Form):
    """{"state_dict": …} for mmseg's `MAE` backbone: `backbone=dict(type="MAE", init_cfg=dict(type="Pretrained",
    checkpoint="encoder_mmseg.pth"), norm_cfg=dict(type="LN", eps=1e-6), …)`.

    That loader takes what fits and says nothing of the rest, so that nothing may be missing: LayerScale's gammas are
    1, relative positions are zero, and names have no `backbone.`, with which it would load nothing at all
    (beit2mmseg.py writes it). There is no final norm, as in its configurations.

    The library cannot check the file here. Compared are all names and shapes with `mmseg_shapes`, and the outputs of
    the blocks after the way back to our names. To load at another grid, mmseg interpolates the tables with SciPy's
    interp2d, which SciPy 1.14 no longer has: its error says so, an older SciPy helps.
    """

    name = "mmseg"
    library, summary = "mmseg", "encoder for mmseg's MAE backbone (a .pth, square images; checked by names and shapes)"
    default = "encoder_mmseg.pth"

    def refusal(self, model: HPMViT) -> str:
        return unmet(square(model))

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        write_pth(mmseg_state(model), "state_dict", {"timm": json.dumps(timm_arguments(model)), **metadata}, path)

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        content = read_pth(path)
        state, arguments = content["state_dict"], json.loads(content[METADATA]["timm"])
        check_mmseg(state, mmseg_shapes(arguments, mlp=len(state["layers.0.ffn.layers.0.0.bias"])))
        vit = timm.models.VisionTransformer(**arguments)
        vit.norm = nn.Identity()
        vit.load_state_dict(ours_of_mmseg(state))
        return vit.double().eval().forward_features(images)

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, 1 + L, D] after the last block."""
        return block_outputs(model, images)[-2]

    def verdict(self, difference: float) -> str:
        return f"names and shapes are mmseg's, the outputs ours within {difference:.1e}; mmseg itself was not run"

    def usage(self, path: Path) -> str:
        loaded = f'import torch; model = torch.load({quoted(path)}, weights_only=True)["state_dict"]'
        return (
            f'{loaded}  # mmseg: backbone=dict(type="MAE", init_cfg=dict(type="Pretrained", checkpoint={quoted(path)}))'
        )


def mmseg_state(model: HPMViT) -> dict[str, Tensor]:
    """The encoder under mmseg's names, with what mmseg has and ours lacks set so that it changes nothing."""
    tensors = {mmseg_name(key): value for key, value in encoder_of(model).items() if not key.startswith("norm.")}
    rows, columns = model.grid_size
    for block in range(len(model.blocks)):
        for gamma in GAMMAS:
            tensors[f"layers.{block}.{gamma}"] = torch.ones(model.embed_dim)
        count = (2 * rows - 1) * (2 * columns - 1) + 3
        tensors[f"layers.{block}.{TABLE}"] = torch.zeros(count, model.num_heads)
        tensors[f"layers.{block}.{INDEX}"] = relative_index(rows, columns)
    return tensors


def mmseg_name(key: str) -> str:
    """mmseg's name of one of the encoder's tensors."""
    return renamed(key, MMSEG_BLOCK if key.startswith("blocks.") else MMSEG)


def ours_of_mmseg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: timm's names, which are ours; what changes nothing is left out."""
    layers, rest = (tuple((theirs, ours) for ours, theirs in reversed(names)) for names in (MMSEG_BLOCK, MMSEG))
    return {
        renamed(key, layers if key.startswith("layers.") else rest): value
        for key, value in state.items()
        if not key.endswith((*GAMMAS, TABLE, INDEX))
    }


def mmseg_shapes(arguments: dict[str, Any], mlp: int) -> dict[str, tuple[int, ...]]:
    """Every name that mmseg's `MAE` has, without `backbone.` and a final norm, and its shape.

    - `arguments`: timm's, of the same encoder; `mlp`: hidden units of its MLPs
    """
    width, heads, patch = arguments["embed_dim"], arguments["num_heads"], arguments["patch_size"]
    rows, columns = (length // patch for length in arguments["img_size"])
    tokens, distances = 1 + rows * columns, (2 * rows - 1) * (2 * columns - 1) + 3
    layer: dict[str, tuple[int, ...]] = {
        "gamma_1": (width,),
        "gamma_2": (width,),
        "ln1.weight": (width,),
        "ln1.bias": (width,),
        "attn.relative_position_bias_table": (distances, heads),
        "attn.relative_position_index": (tokens, tokens),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "ln2.weight": (width,),
        "ln2.bias": (width,),
        "ffn.layers.0.0.weight": (mlp, width),
        "ffn.layers.0.0.bias": (mlp,),
        "ffn.layers.1.weight": (width, mlp),
        "ffn.layers.1.bias": (width,),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.projection.weight": (width, arguments["in_chans"], patch, patch),
        "patch_embed.projection.bias": (width,),
        **{f"layers.{n}.{name}": shape for n in range(arguments["depth"]) for name, shape in layer.items()},
    }


def check_mmseg(state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """**Raises:** `RuntimeError` for a name or a shape that is not mmseg's, or values that change what is computed."""
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        wrong = sorted({key for key, _ in found.items() ^ expected.items()})
        raise RuntimeError(f"mmseg does not have these names or shapes: {wrong}")
    for key, value in state.items():
        neutral = 1 if key.endswith(GAMMAS) else 0
        if key.endswith((*GAMMAS, TABLE)) and not bool((value == neutral).all()):
            raise RuntimeError(f"{key} changes what the encoder computes")
