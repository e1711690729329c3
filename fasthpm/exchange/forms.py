"""The forms in which weights leave: for each library, how they are written and what it computes from what was written.

Only names, arguments and layouts live here; `fasthpm.exchange.exporting` compares outputs and decides.
"""

import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import timm.models
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fasthpm.checkpoint.foreign import EMBEDDED_RECIPE, ENCODER_PREFIXES
from fasthpm.difficulty import HEAD
from fasthpm.errors import UserError
from fasthpm.files import save_tensors, write_json
from fasthpm.layers import LAYER_NORM_EPS, Block
from fasthpm.model import SIZES, HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe, build_recipe, recipe_text

# Our names and theirs; every pair is applied, in this order.
Names = tuple[tuple[str, str], ...]
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
HUGGINGFACE: Names = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("norm.", "layernorm."),
)
# VideoMAE on the Hub has its own names for the biases, and none for the keys.
VIDEOMAE: Names = (("attention.query.bias", "attention.q_bias"), ("attention.value.bias", "attention.v_bias"))
HUGGINGFACE_BLOCK: Names = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


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

    @abstractmethod
    def usage(self, path: Path) -> str:
        """The line of Python that loads what was written."""


# -------------------------------------------------------------------------------------------------- timm, torchvision
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
        size = next((n for n, s in SIZES.items() if s.items() <= arguments.items()), "")
        name = f"vit_{size}_patch{arguments['patch_size']}_{arguments['img_size'][0]}"
        if timm.is_model(name) and arguments["in_chans"] == 3 and len(set(arguments["img_size"])) == 1:
            return f'timm.create_model("{name}", num_classes=0, checkpoint_path="{path}")'
        return f'vit = timm.models.VisionTransformer(**{arguments}); vit.load_state_dict(load_file("{path}"))'


class Torchvision(Form):
    """`torchvision.models.VisionTransformer`, whose classifier's head is replaced by `torch.nn.Identity()`."""

    name = "torchvision"
    library, summary = "torchvision", "encoder for torchvision's VisionTransformer (square images, 3 channels)"
    default = "encoder_torchvision.safetensors"

    def refusal(self, model: HPMViT) -> str:
        height, width = model.img_size
        return _needs(
            {
                f"square images, this model's are {height}x{width}": height == width,
                f"3 channels, this model has {model.in_chans}": model.in_chans == 3,
            }
        )

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
            f"vit = torchvision.models.VisionTransformer({arguments}); vit.heads = torch.nn.Identity(); "
            f'vit.load_state_dict(safetensors.torch.load_file("{path}"))'
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


# -------------------------------------------------------------------------------------------------- Hugging Face
class HuggingFaceViT(Form):
    """`transformers.ViTModel`, without its pooler; names as files on the Hub have them."""

    name = "hf_vit"
    library, summary = "transformers", "encoder for Hugging Face's ViTModel (a folder)"
    default, folder = "hf_vit", True
    architecture = "ViTModel"

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        path.mkdir()
        self.configuration(model, recipe).to_json_file(path / "config.json", use_diff=False)
        save_tensors(self.tensors(model), path / "model.safetensors", {"format": "pt", **metadata})
        if "mean" in metadata:
            write_json(path / "preprocessor_config.json", preprocessor(model, metadata))

    def configuration(self, model: HPMViT, recipe: Recipe) -> Any:
        """The `transformers` configuration of this model."""
        return library("transformers").ViTConfig(**huggingface_arguments(model), architectures=[self.architecture])

    def tensors(self, model: HPMViT) -> dict[str, Tensor]:
        """The weights under Hugging Face's names."""
        return huggingface_encoder(model)

    def load(self, path: Path, **options: Any) -> Any:
        """The library's model, every key of which must be in the file and the other way round."""
        transformers = library("transformers")
        transformers.utils.logging.disable_progress_bar()
        kind = getattr(transformers, self.architecture)
        model, info = kind.from_pretrained(path, output_loading_info=True, local_files_only=True, **options)
        wrong = {name: sorted(keys) for name, keys in info.items() if keys}
        if wrong:
            raise RuntimeError(f"transformers does not take the file as it is: {wrong}")
        return model.double().eval()

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        return self.load(path, add_pooling_layer=False)(images).last_hidden_state

    def usage(self, path: Path) -> str:
        return f'transformers.ViTModel.from_pretrained("{path}", add_pooling_layer=False)'


class HuggingFaceMAE(HuggingFaceViT):
    """`transformers.ViTMAEForPreTraining`: encoder and reconstructor; no loss predictor, no difficulty head."""

    name = "hf_vitmae"
    summary = "encoder and reconstructor for Hugging Face's ViTMAEForPreTraining (a folder, square images)"
    default, whole = "hf_vitmae", True
    architecture = "ViTMAEForPreTraining"

    def refusal(self, model: HPMViT) -> str:
        height, width = model.img_size
        return _needs(
            {
                f"square images, this model's are {height}x{width}": height == width,
                "MAE's decoder, which this model lacks": hasattr(model, "decoder_embed"),
                "self attention in the decoder, this one's is cross": model.decoder_attention == "self",
                "a reconstructor of pixels, this model's gives features": not model.target_dim,
            }
        )

    def configuration(self, model: HPMViT, recipe: Recipe) -> Any:
        decoder = model.decoder_blocks
        return library("transformers").ViTMAEConfig(
            **{**huggingface_arguments(model), "image_size": model.img_size[0]},
            architectures=[self.architecture],
            mask_ratio=recipe.mask_ratio,
            norm_pix_loss=model.norm_pix_loss,
            decoder_hidden_size=model.mask_token.shape[-1],
            decoder_num_hidden_layers=len(decoder),
            decoder_num_attention_heads=attention_heads(decoder),
            decoder_intermediate_size=mlp_width(decoder),
        )

    def tensors(self, model: HPMViT) -> dict[str, Tensor]:
        tensors = {f"vit.{key}": value for key, value in huggingface_encoder(model).items()}
        for key, value in model.state_dict().items():
            if key.startswith("decoder_blocks."):
                tensors |= huggingface_block(key.removeprefix("decoder_blocks."), value, "decoder.decoder_layers.")
            elif key.startswith(("decoder_", "mask_token")) and "losspred" not in key:
                tensors[f"decoder.{key}"] = value.clone()
        return tensors

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        order = mask.double() * mask.shape[1] + torch.arange(mask.shape[1])  # smallest noise = visible
        out = self.load(path)(images, noise=order)
        if not torch.equal(out.mask.bool(), mask):
            raise RuntimeError("transformers no longer masks where the noise is largest")
        return torch.cat([out.logits[mask].flatten(), out.loss[None]])

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        out = model(images, mask)
        return torch.cat([out.reconstruction.flatten(), out.reconstruction_loss[None]])

    def usage(self, path: Path) -> str:
        return f'transformers.ViTMAEForPreTraining.from_pretrained("{path}")'


class HuggingFaceVideoMAE(HuggingFaceViT):
    """`transformers.VideoMAEModel`: the encoder of a video model, with its final norm.

    It has no biases on the keys, which ours may have: softmax ignores them, so they are left out. Releases of
    transformers have loaded the others as zeros without a word; what counts is that the outputs agree.
    """

    name = "hf_videomae"
    summary = "encoder of a video model for Hugging Face's VideoMAEModel (a folder)"
    default, takes = "hf_videomae", ("video",)
    architecture = "VideoMAEModel"

    def configuration(self, model: HPMViT, recipe: Recipe) -> Any:
        return library("transformers").VideoMAEConfig(
            **huggingface_arguments(model),
            architectures=[self.architecture],
            num_frames=model.num_frames,
            tubelet_size=model.tubelet_size,
            use_mean_pooling=False,  # which would leave the final norm out
            qkv_bias=True,
        )

    def tensors(self, model: HPMViT) -> dict[str, Tensor]:
        tensors = huggingface_encoder(model)
        left_out = ("attention.key.bias", "position_embeddings")
        return {renamed(k, VIDEOMAE): value for k, value in tensors.items() if not k.endswith(left_out)}

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        return self.load(path)(images.transpose(1, 2)).last_hidden_state

    def usage(self, path: Path) -> str:
        return f'transformers.VideoMAEModel.from_pretrained("{path}"), which takes clips [B, T, C, H, W]'


def huggingface_arguments(model: HPMViT) -> dict[str, Any]:
    """What `ViTConfig` and `ViTMAEConfig` share."""
    height, width = model.img_size
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.num_heads,
        "intermediate_size": mlp_width(model.blocks),
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
    }


def huggingface_encoder(model: HPMViT) -> dict[str, Tensor]:
    """The encoder under the names that `ViTModel` files have."""
    tensors: dict[str, Tensor] = {}
    for key, value in encoder_of(model).items():
        block = key.startswith("blocks.")
        tensors |= (
            huggingface_block(key.removeprefix("blocks."), value) if block else {renamed(key, HUGGINGFACE): value}
        )
    return tensors


def huggingface_block(key: str, value: Tensor, prefix: str = "encoder.layer.") -> dict[str, Tensor]:
    """One tensor of a block, `key` = "INDEX.name", under Hugging Face's names; qkv becomes three."""
    key = renamed(key, HUGGINGFACE_BLOCK)
    if "attn.qkv" not in key:
        return {prefix + key: value.clone()}
    parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
    return {prefix + key.replace("attn.qkv", f"attention.attention.{name}"): part.clone() for name, part in parts}


def preprocessor(model: HPMViT, metadata: dict[str, str]) -> dict[str, Any]:
    """What Hugging Face's processor does to an image or a clip: the run's own size, mean and standard deviation."""
    return {
        "image_processor_type": "VideoMAEImageProcessor" if model.video else "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": model.img_size[0], "width": model.img_size[1]},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": json.loads(metadata["mean"]),
        "image_std": json.loads(metadata["std"]),
        **({"do_center_crop": False} if model.video else {}),
    }


# -------------------------------------------------------------------------------------------------- ourselves
class Plain(Form):
    """All tensors under our names, which are the published ones; `fasthpm import` takes the file."""

    name = "safetensors"
    library, summary, default, whole = "fasthpm", "everything, under our names", "model.safetensors", True
    takes = ("image", "video")

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        save_tensors(tensors, path, {EMBEDDED_RECIPE: recipe_text(recipe), **metadata})

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        model = model_of(build_recipe(metadata_of(path, EMBEDDED_RECIPE), source=str(path)))
        model.load_state_dict(load_file(path))
        return self.ours(model.double().eval(), images, mask)

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        out = model(images, mask)
        parts = [model.encode(images), out.reconstruction, out.predicted_difficulty, out.loss]
        if hasattr(model, HEAD):
            parts.append(model.predict_loss(images))
        return torch.cat([part.flatten() for part in parts])

    def usage(self, path: Path) -> str:
        return f'safetensors.torch.load_file("{path}"), or: fasthpm import {path} -o OUT_DIR'


FORMS: dict[str, Form] = {}


def register(form: Form) -> Form:
    """Make `form` known under its name. **Raises:** `ValueError` for a name that is taken, or empty."""
    if not form.name or form.name in FORMS:
        raise ValueError(f"there is a form {form.name!r} already, or it has no name; give the new one another")
    FORMS[form.name] = form
    return form


for _form in (Timm(), Torchvision(), HuggingFaceViT(), HuggingFaceMAE(), HuggingFaceVideoMAE(), Plain()):
    register(_form)


# -------------------------------------------------------------------------------------------------- what they share
def encoder_of(model: HPMViT) -> dict[str, Tensor]:
    """Copies of the encoder's tensors, float32, on the CPU."""
    state = model.state_dict()
    return {key: value.float().cpu().clone() for key, value in state.items() if key.startswith(ENCODER_PREFIXES)}


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


def metadata_of(path: Path, key: str) -> Any:
    """One JSON value of a safetensors file's metadata."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key])


def library(module: str, package: str = "transformers") -> Any:
    """An optional dependency. **Raises:** `UserError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = {"transformers": "hf", "torchvision": "demo"}[package]
        raise UserError(
            f"this format needs {package}, which does not import ({error}); install it: pip install 'fasthpm[{extra}]'"
        ) from error


def _needs(conditions: dict[str, bool]) -> str:
    return "; ".join(need for need, met in conditions.items() if not met)


def renamed(key: str, names: Names) -> str:
    """`key` under another library's name."""
    for old, new in names:
        key = key.replace(old, new)
    return key


def mlp_width(blocks: nn.ModuleList) -> int:
    """Hidden units of the blocks' MLPs."""
    return cast(Block, blocks[0]).mlp.fc1.out_features


def attention_heads(blocks: nn.ModuleList) -> int:
    """Heads of the blocks' attention."""
    return cast(Block, blocks[0]).attn.num_heads
