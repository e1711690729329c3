"""Forms of Hugging Face's transformers: folders of config.json, model.safetensors and preprocessor_config.json."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthpm.exchange.forms.base import (
    Form,
    Names,
    attention_heads,
    blank_target,
    block_outputs,
    encoder_of,
    library,
    mlp_width,
    quoted,
    renamed,
    square,
    unmet,
)
from fasthpm.files import save_tensors, write_json
from fasthpm.layers import LAYER_NORM_EPS
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe

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
    ("gamma_", "lambda_"),
)
BEIT_MIM: Names = (
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embed.proj", "beit.embeddings.patch_embeddings.projection"),
    ("rel_pos_bias.", "beit.encoder.relative_position_bias."),
    ("decoder_pred.", "lm_head."),
)
IMPORT = "import transformers; model ="


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
        return f"{IMPORT} transformers.ViTModel.from_pretrained({quoted(path)}, add_pooling_layer=False)"


class HuggingFaceMAE(HuggingFaceViT):
    """`transformers.ViTMAEForPreTraining`: encoder and reconstructor; no loss predictor, no difficulty head."""

    name = "hf_vitmae"
    summary = "encoder and reconstructor for Hugging Face's ViTMAEForPreTraining (a folder, square images)"
    default, whole = "hf_vitmae", True
    architecture = "ViTMAEForPreTraining"

    def refusal(self, model: HPMViT) -> str:
        return unmet(
            {
                **square(model),
                "MAE's decoder, which this model lacks": hasattr(model, "decoder_embed"),
                "self attention in the decoder, this one's is cross": model.decoder_attention == "self",
                f"a reconstructor of pixels, this model's gives {model.objective.name}": not model.objective.width,
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
        return f"{IMPORT} transformers.ViTMAEForPreTraining.from_pretrained({quoted(path)})"


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
        loaded = f"{IMPORT} transformers.VideoMAEModel.from_pretrained({quoted(path)})"
        return f"{loaded}  # takes clips [B, T, C, H, W]"


class HuggingFaceBEiT(HuggingFaceViT):
    """`transformers.BeitBackbone`, on which UperNet and others there can be built. (`AutoBackbone` knows it too, but
    looks for it on the Hub alone, not in a folder.)

    Our encoder is a BEiT with absolute positions, without relative ones and LayerScale. BEiT has no biases on the
    keys, which softmax cannot see, so they are left out. Feature maps are those after the blocks of `levels`, without
    a norm, as mmseg's MAE takes them (its blocks counted from 0, here from 1); the final norm goes along for
    `AutoModel`, which uses it. Both are compared. UperNet wants the maps at four scales: `add_fpn=True` in the line
    that loads it makes BeitBackbone scale them, with layers that are new and trained with the head (docs/own_images.md
    has the lines). Positions are interpolated for other image sizes, by transformers, from a square grid.
    """

    name = "hf_beit"
    summary = "encoder for Hugging Face's BeitBackbone, as UperNet takes (a folder, square images)"
    default, architecture = "hf_beit", "BeitBackbone"

    def refusal(self, model: HPMViT) -> str:
        depth = len(model.blocks)
        return unmet({**square(model), f"4 levels, this model has {depth} blocks": len(set(levels(depth))) == 4})

    def configuration(self, model: HPMViT, recipe: Recipe) -> Any:
        return library("transformers").BeitConfig(
            **huggingface_arguments(model),
            architectures=[self.architecture],
            use_absolute_position_embeddings=True,
            use_relative_position_bias=False,
            use_shared_relative_position_bias=False,
            layer_scale_init_value=0.0,  # none
            use_mask_token=False,
            use_mean_pooling=False,  # which would leave the final norm out
            drop_path_rate=0.0,
            add_fpn=False,
            reshape_hidden_states=True,
            out_indices=levels(len(model.blocks)),
        )

    def tensors(self, model: HPMViT) -> dict[str, Tensor]:
        tensors = huggingface_encoder(model).items()
        return {f"beit.{key}": value for key, value in tensors if not key.endswith("attention.key.bias")}

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        backbone = self.load(path)
        maps = [each.flatten(2).transpose(1, 2) for each in backbone(images).feature_maps]
        return torch.cat([*maps, backbone.beit(images).last_hidden_state], dim=1)

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        outputs = block_outputs(model, images)
        return torch.cat([*(outputs[level - 1][:, 1:] for level in levels(len(model.blocks))), outputs[-1]], dim=1)

    def usage(self, path: Path) -> str:
        loaded = f"{IMPORT} transformers.BeitBackbone.from_pretrained({quoted(path)})"
        return f"{loaded}  # for UperNet: add_fpn=True"


class HuggingFaceBEiTMIM(HuggingFaceViT):
    """`transformers.BeitForMaskedImageModeling`: encoder, mask token and the head of a model that predicts tokens, with
    learned or relative positions and LayerScale as they are; no loss predictor, no difficulty head."""

    name = "hf_beit_mim"
    summary = "the whole BEiT for Hugging Face's BeitForMaskedImageModeling (a folder, square images)"
    default, whole, relative = "hf_beit_mim", True, True
    architecture = "BeitForMaskedImageModeling"

    def refusal(self, model: HPMViT) -> str:
        return unmet(
            {
                **square(model),
                "mask tokens in the encoder (beit_… or simmim_…)": model.encoder_mask_tokens,
                f"a head of tokens, this model's is of {model.objective.name}": model.objective.ids,
            }
        )

    def configuration(self, model: HPMViT, recipe: Recipe) -> Any:
        relative = model.positions == "relative"
        return library("transformers").BeitConfig(
            **{**huggingface_arguments(model), "image_size": model.img_size[0]},
            architectures=[self.architecture],
            vocab_size=model.objective.width,
            use_mask_token=True,
            use_absolute_position_embeddings=not relative,
            use_relative_position_bias=False,
            use_shared_relative_position_bias=relative,
            layer_scale_init_value=model.layer_scale,
            use_mean_pooling=True,  # the final norm then stands before the head
            drop_path_rate=0.0,
        )

    def tensors(self, model: HPMViT) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for key, value in model.state_dict().items():
            if key.startswith("blocks."):
                block = huggingface_block(key.removeprefix("blocks."), value.float().cpu(), "beit.encoder.layer.")
                tensors |= {name: part for name, part in block.items() if not name.endswith("attention.key.bias")}
            elif key.startswith("norm."):
                tensors[f"layer{key}"] = value.float().cpu().clone()
            elif (name := renamed(key, BEIT_MIM)) != key:
                tensors[name] = value.float().cpu().clone()
        return tensors

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        return self.load(path)(images, bool_masked_pos=mask).logits[mask]

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        return model(images, mask, target=blank_target(model, len(images))).reconstruction.flatten(0, 1)

    def usage(self, path: Path) -> str:
        return f"{IMPORT} transformers.BeitForMaskedImageModeling.from_pretrained({quoted(path)})"


def levels(depth: int) -> list[int]:
    """The blocks, counted from 1, whose outputs a segmentation head reads: a third, half, two thirds and all of them.

    [released code] 4, 6, 8, 12 of 12 (mmseg's MAE: 3, 5, 7, 11 from 0) and 8, 12, 16, 24 of 24 (BEiT-L: 7, 11, 15, 23).
    [ours] for other depths: the first two are rounded down, the third up.
    """
    return [depth // 3, depth // 2, -(-2 * depth // 3), depth]


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
    """What Hugging Face's processor does to an image or a clip: the run's own size, mean and standard deviation.

    Pixels of 8 bits are scaled to 0..1 first, others are taken as they are stored.
    """
    scaled = json.loads(metadata.get("dtype", '"uint8"')) == "uint8"
    return {
        "image_processor_type": "VideoMAEImageProcessor" if model.video else "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": model.img_size[0], "width": model.img_size[1]},
        "resample": 3,
        "do_rescale": scaled,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": json.loads(metadata["mean"]),
        "image_std": json.loads(metadata["std"]),
        **({"do_center_crop": False} if model.video else {}),
    }
