"""What a form of the weights is, the list of them, and what several of them share."""

import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fasthpm.checkpoint.foreign import ENCODER_PREFIXES
from fasthpm.errors import UserError
from fasthpm.files import METADATA, save_torch
from fasthpm.layers import Block
from fasthpm.model import HPMViT
from fasthpm.model_names import SIZES
from fasthpm.recipe import Recipe

GAMMA_OF = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}  # the layer that ends the branch
GAMMAS = tuple(GAMMA_OF)
ROUNDED = 1e-6  # the same, where weights were multiplied before they were stored in float32
TOLERANCE = 1e-8  # of the largest output, in float64: tells even a LayerNorm's eps of 1e-6 from 1e-5
Names = tuple[tuple[str, str], ...]  # ours and theirs; every pair is applied, in this order
EXTRAS = {"transformers": "hf", "torchvision": "demo", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}


class Form(ABC):
    """One form of the weights: how it is written, and what its library computes from what was written.

    `register` makes it a --format.

    - `name`: as in --format; `library`: whose model it is; `summary`: one line for the help
    - `default`: file or folder that is written unless --output says another; `folder`: whether it is a folder
    - `path` is that file or folder; `images` float64 [B, C, (T,) H, W]; `mask` bool [B, L]
    """

    name = ""
    library = ""
    summary = ""
    default = "encoder.safetensors"
    folder = False
    whole = False  # takes the decoder too
    relative = False  # takes relative positions
    takes: tuple[str, ...] = ("image",)  # models

    def refusal(self, model: HPMViT) -> str:
        """Why the library has no such model, or an empty string."""
        return ""

    @abstractmethod
    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        """Write the file or the folder."""

    @abstractmethod
    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        """Outputs of the library's model, in float64, with the weights that were written."""

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        """The same outputs of our model: here the encoder's tokens [B, 1 + L, D]."""
        return model.encode(images)

    def allowed(self, model: HPMViT, images: Tensor, mask: Tensor) -> float:
        """Largest difference of outputs, over the largest output, with which a file is good; `model` in float64."""
        return ROUNDED if model.layer_scale else TOLERANCE

    def verdict(self, difference: float) -> str:
        """What was proved, for people; `difference` of outputs, over the largest."""
        return f"{self.library} agrees within {difference:.1e}"

    @abstractmethod
    def usage(self, path: Path) -> str:
        """Python that loads what was written, in one line that runs as it is and names the result `model`."""


FORMS: dict[str, Form] = {}


def register(form: Form) -> Form:
    """Make `form` known under its name. **Raises:** `ValueError` for a name that is taken, or empty."""
    if not form.name or form.name in FORMS:
        raise ValueError(f"there is a form {form.name!r} already, or it has no name; give the new one another")
    FORMS[form.name] = form
    return form


# -------------------------------------------------------------------------------------------------- the encoder
def encoder_of(model: HPMViT) -> dict[str, Tensor]:
    """Copies of the encoder's tensors, float32, on the CPU, for a plain ViT: LayerScale's weights are multiplied into
    the layers before them, which is the same function.

    **Raises:** `UserError` for relative positions, which a plain ViT has not.
    """
    if model.positions == "relative":
        raise UserError(
            "this model has relative positions, which plain vision transformers lack; export it as safetensors or "
            "hf_beit_mim, or pretrain with --positions learned"
        )
    state = {key: value for key, value in model.state_dict().items() if key.startswith(ENCODER_PREFIXES)}
    tensors = {key: value.float().cpu().clone() for key, value in state.items() if not key.endswith(GAMMAS)}
    for key, gamma in state.items():
        if key.endswith(GAMMAS):
            layer = f"{key.rpartition('.')[0]}.{GAMMA_OF[key.rpartition('.')[2]]}"
            for name, scale in ((f"{layer}.weight", gamma[:, None]), (f"{layer}.bias", gamma)):
                tensors[name] = (state[name].double() * scale.double()).float().cpu()
    return tensors


def blank_target(model: HPMViT, count: int) -> Tensor | None:
    """Some targets of `count` images, for a model whose objective is not pixels."""
    objective = model.objective
    if not objective.width:
        return None
    if objective.ids:
        return torch.zeros(count, model.num_patches, dtype=torch.int64)
    return torch.full((count, model.num_patches, objective.width), 1 / objective.width, dtype=torch.float64)


def timm_arguments(model: HPMViT) -> dict[str, Any]:
    """Arguments of `timm.models.VisionTransformer` for this encoder."""
    return {
        "img_size": list(model.img_size),
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.num_heads,
        "num_classes": 0,
        "global_pool": "token",
    }


def block_outputs(model: HPMViT, images: Tensor) -> list[Tensor]:
    """What every block gives when `model` encodes `images`, and last the encoder's output: [B, 1 + L, D] each."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, inputs, out: found.append(out)) for block in model.blocks]
    try:
        found.append(model.encode(images))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def size_name(arguments: dict[str, Any]) -> str:
    """ "base" and the like for timm's arguments of an encoder; empty for sizes without a name."""
    return next((name for name, size in SIZES.items() if size.items() <= arguments.items()), "")


def mlp_width(blocks: nn.ModuleList) -> int:
    """Hidden units of the blocks' MLPs."""
    return cast(Block, blocks[0]).mlp.fc1.out_features


def attention_heads(blocks: nn.ModuleList) -> int:
    """Heads of the blocks' attention."""
    return cast(Block, blocks[0]).attn.num_heads


# -------------------------------------------------------------------------------------------------- files
def metadata_of(path: Path, key: str) -> Any:
    """One JSON value of a safetensors file's metadata."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key])


def write_pth(state: dict[str, Tensor], wrapper: str, metadata: dict[str, str], path: Path) -> None:
    """A torch file {`wrapper`: the weights, "fasthpm": texts of JSON}, of tensors and plain types alone."""
    save_torch({wrapper: state, METADATA: metadata}, path)


def read_pth(path: Path) -> dict[str, Any]:
    """What `write_pth` wrote."""
    return torch.load(path, map_location="cpu", weights_only=True)


def quoted(path: Path) -> str:
    """A path as Python writes it between double quotes."""
    return json.dumps(str(path), ensure_ascii=False)


# -------------------------------------------------------------------------------------------------- names
def library(module: str, package: str = "transformers") -> Any:
    """An optional dependency. **Raises:** `UserError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"fasthpm[{EXTRAS[package]}]" if package in EXTRAS else package
        raise UserError(
            f"this needs {package}, which does not import ({error}); install it: pip install '{wanted}'"
        ) from error


def unmet(conditions: dict[str, bool]) -> str:
    """The conditions that are not met, for `Form.refusal`."""
    return "; ".join(need for need, met in conditions.items() if not met)


def square(model: HPMViT) -> dict[str, bool]:
    """The condition that images are square, for `unmet`."""
    height, width = model.img_size
    return {f"square images, this model's are {height}x{width}": height == width}


def renamed(key: str, names: Names) -> str:
    """`key` under another library's name."""
    for old, new in names:
        key = key.replace(old, new)
    return key
