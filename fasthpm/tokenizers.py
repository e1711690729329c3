"""Tokenizers: images in, one id per patch out, which BEiT predicts where a patch is masked.

- `kmeans:FILE`: nearest of the patches that `python -m data_prep.codebook` found in the user's own data
- `dvae:FOLDER`: DALL-E's, as transformers' FlavaImageCodebook stores it
- `vqkd:FILE`: BEiT v2's VQ-KD, a ViT with a small head and a codebook

Each reads the same crop as the student, once per step, without gradients. One that reads every patch by itself
(`by_patch`: k-means) is asked about the masked ones alone, unless the masks depend on all of them. Weights are read
without running what is in the files, and every key has to fit.

Letters: B batch, L patches, P patch side, C channels, K tokens, D width of a code.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasthpm.errors import UserError, about
from fasthpm.files import read_file, read_json, save_tensors
from fasthpm.fitting import misfits
from fasthpm.recipe import Recipe

SOFTENING = 0.01  # added to the variance of a patch, in variances of the data: what is nearly flat stays so
BLOCK_ELEMENTS = 1 << 25  # similarities of patches and codes that are held at a time
MAP_EDGE = 0.1  # DALL-E's pixels x in 0..1 enter as (1 - 2 * 0.1) x + 0.1
DVAE_STRIDE = 8  # pixels of DALL-E's input per token
VQKD_MODEL, VQKD_DIM = "vit_base_patch16_224", 32
NEEDED = (
    "target tokens needs a tokenizer, and target_weights names none; expected kmeans:FILE (python -m "
    "data_prep.codebook makes one of your own images), dvae:FOLDER or vqkd:FILE"
)


def build_tokenizer(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The tokenizer that `recipe.target_weights` names: uint8 images [B, H, W, C] -> ids, int64 [B, L].

    **Raises:** `UserError` if it cannot be read, or its grid, channels or number of tokens are not the recipe's.
    """
    kind, _, place = recipe.target_weights.partition(":")
    if not place:
        raise UserError(NEEDED)
    with about(Path(place)):
        return KINDS[kind](recipe, Path(place), dtype).to(device)


def untrained_tokenizer(recipe: Recipe, dtype: torch.dtype) -> nn.Module | None:
    """One of the same kind and size with random weights: what it costs; None where the recipe names none, or one of
    next to no cost."""
    kind = recipe.target_weights.partition(":")[0]
    if kind == "dvae":
        return DVAE(recipe, codebook_model(recipe.frozen_dim).to(dtype))
    return VQKD(recipe, create_encoder(recipe).to(dtype), recipe.frozen_dim, VQKD_DIM) if kind == "vqkd" else None


def tokens_fit(found: int, recipe: Recipe) -> None:
    """**Raises:** `UserError` for a codebook of another size than the model predicts."""
    if found != recipe.frozen_dim:
        raise UserError(
            f"the tokenizer has {found} tokens, and the model predicts {recipe.frozen_dim}; use --target_dim {found}"
        )


def nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Number of the code nearest to each row, the first of several: int64 [N] from [N, D] and [K, D]."""
    half = codes.square().sum(dim=1) / 2
    size = max(1, BLOCK_ELEMENTS // len(codes))
    return torch.cat([torch.addmm(-half, block, codes.T).argmax(dim=1) for block in rows.split(size)])


# -------------------------------------------------------------------------------------------------- k-means
class Codebook(nn.Module):
    """The nearest of K patches, all of them without their own mean and contrast.

    - `codes`: float32 [K, P*P*C], as `normalised` gives patches; `mean`, `std`: of each channel, 0..1
    """

    codes: Tensor
    by_patch = True  # `ids` of some patches are those that `forward` gives of them

    def __init__(self, codes: Tensor, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.patch_size, self.mean, self.std = patch_size, mean, std
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> ids, int64 [B, L]."""
        return self.ids(self.cut(images))

    def cut(self, images: Tensor) -> Tensor:
        """[B, H, W, C] -> patches as they are stored, [B, L, P*P*C]."""
        batch, height, width, channels = images.shape
        side = self.patch_size
        cut = images.reshape(batch, height // side, side, width // side, side, channels).permute(0, 1, 3, 2, 4, 5)
        return cut.reshape(batch, -1, side * side * channels)

    @torch.no_grad()
    def ids(self, patches: Tensor) -> Tensor:
        """uint8 [B, N, P*P*C], any patches of images -> int64 [B, N]."""
        rows = self.normalised(patches)
        return nearest(rows.flatten(0, 1), self.codes).unflatten(0, rows.shape[:2])

    def normalised(self, patches: Tensor) -> Tensor:
        """uint8 [B, N, P*P*C] -> float32 of the same shape, each patch of zero mean and a variance of at most 1."""
        scale = [torch.tensor(values, device=patches.device) * 255 for values in (self.mean, self.std)]
        patches = ((patches.unflatten(-1, (-1, len(self.mean))).float() - scale[0]) / scale[1]).flatten(-2)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) * (variance + SOFTENING).rsqrt()

    def pictures(self, ids: Tensor, patches: Tensor) -> Tensor:
        """The codes of `ids` [B, N], with mean and contrast of the true patches: [B, N, P*P*C] as `patches` are."""
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return self.codes[ids] * (variance + SOFTENING).sqrt() + mean

    def flops(self, patches: int) -> float:
        """Of one image of so many patches."""
        return 2.0 * patches * self.codes.numel()


def save_codebook(book: Codebook, path: Path, notes: Mapping[str, Any]) -> None:
    """Write a codebook as `kmeans:PATH` reads it; `notes`: what else the file says of itself."""
    facts = {"kind": "kmeans", "patch_size": book.patch_size, "mean": book.mean, "std": book.std, **notes}
    save_tensors({"codes": book.codes.contiguous()}, path, {"fasthpm_codebook": json.dumps(facts)})


def load_codebook(path: Path) -> Codebook:
    """Read what `save_codebook` wrote. **Raises:** `UserError` for any other file."""
    content, metadata = read_file(path)
    try:
        facts, codes = json.loads(metadata["fasthpm_codebook"]), content["codes"].float()
        side, mean, std = int(facts["patch_size"]), tuple(map(float, facts["mean"])), tuple(map(float, facts["std"]))
        whole = codes.dim() == 2 and codes.shape[1] == side * side * len(mean) and len(mean) == len(std)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("is no codebook; expected what python -m data_prep.codebook writes") from error
    if not whole or not bool(codes.isfinite().all()) or not all(value > 0 for value in std):
        raise UserError(f"its codes are {tuple(codes.shape)} of {side} x {side} patches or not finite; make it anew")
    return Codebook(codes, side, mean, std)


def kmeans(recipe: Recipe, path: Path, dtype: torch.dtype) -> Codebook:
    """The codebook of a file, in float32 whatever `dtype`: distances tell near codes apart. **Raises:** as
    `build_tokenizer`."""
    if not path.is_file():
        raise UserError("there is no such file; python -m data_prep.codebook makes one of your own images")
    book = load_codebook(path)
    if (book.patch_size, len(book.mean)) != (recipe.patch_size, recipe.channels):
        raise UserError(
            f"its codes are of {book.patch_size} x {book.patch_size} pixels in {len(book.mean)} channels, and the "
            f"recipe's patches of {recipe.patch_size} x {recipe.patch_size} in {recipe.channels}; make one with "
            f"python -m data_prep.codebook … --patch_size {recipe.patch_size} --channels {recipe.channels}"
        )
    tokens_fit(len(book.codes), recipe)
    return book


# -------------------------------------------------------------------------------------------------- DALL-E
class DVAE(nn.Module):
    """DALL-E's encoder, which sees the image at 8 pixels per token: a half of it where patches have 16.

    - `model`: transformers' FlavaImageCodebook. The image is made smaller by an antialiased bicubic filter (BEiT: a
      second, Lanczos resize of the same crop)
    """

    def __init__(self, recipe: Recipe, model: Any) -> None:
        super().__init__()
        if model.config.input_channels != 3 or recipe.channels not in (1, 3):
            raise UserError(f"DALL-E's tokenizer reads colour images, and channels is {recipe.channels}; use 3 (or 1)")
        self.model = model.eval().requires_grad_(False)
        self.size = [DVAE_STRIDE * length for length in recipe.grid_size]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> ids, int64 [B, L]; one channel (grey) is read as three."""
        pixels = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
        if list(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        mapped = (1 - 2 * MAP_EDGE) * pixels / 255 + MAP_EDGE
        return self.model.get_codebook_indices(mapped.to(next(self.model.parameters()).dtype)).flatten(1)

    def flops(self, patches: int) -> float:
        """Of one image."""
        model = codebook_model(like=self.model.config, device="meta")
        with FlopCounterMode(display=False) as counter:
            model.blocks(torch.empty(1, 3, *self.size, device="meta"))
        return float(counter.get_total_flops())


def codebook_model(tokens: int = 0, like: Any = None, device: str = "cpu") -> Any:
    """transformers' FlavaImageCodebook with random weights, of DALL-E's size or of a configuration."""
    transformers = import_module("transformers")
    with torch.device(device):
        return transformers.FlavaImageCodebook(like or transformers.FlavaImageCodebookConfig(vocab_size=tokens))


def dvae(recipe: Recipe, folder: Path, dtype: torch.dtype) -> DVAE:
    """DALL-E's encoder from a folder of save_pretrained. **Raises:** as `build_tokenizer`."""
    weights = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()), None)
    config = read_json(folder / "config.json")
    if weights is None or not config:
        lacking = "weights in it" if config else "config.json in it that says its sizes"
        raise UserError(
            f"there is no folder with {lacking}; expected config.json and model.safetensors or pytorch_model.bin, as "
            f"save_pretrained of transformers' FlavaImageCodebook writes (OpenAI's own encoder.pkl is a program, which "
            f"is never run)"
        )
    transformers = import_module("transformers")
    try:
        model = codebook_model(like=transformers.FlavaImageCodebookConfig.from_dict(config))
    except Exception as error:  # transformers checks values with errors of its own
        raise UserError(f"its config.json is not of a FlavaImageCodebook ({str(error).splitlines()[0]})") from error
    state = {k: v.float() for k, v in read_file(weights)[0].items() if isinstance(v, Tensor)}
    state = {key.removeprefix("image_codebook."): value for key, value in state.items()}
    if found := misfits(state, model.state_dict()):
        raise UserError(f"the weights do not fit its config.json: {found}; save the folder again")
    model.load_state_dict(state)
    tokens_fit(model.config.vocab_size, recipe)
    return DVAE(recipe, model.to(dtype))


# -------------------------------------------------------------------------------------------------- BEiT v2
class VQKD(nn.Module):
    """BEiT v2's tokenizer: a ViT, Linear, Tanh, Linear, and the code of the nearest direction.

    - `vit`: a timm VisionTransformer; `tokens`, `dim`: of the codebook [K, D]
    """

    def __init__(self, recipe: Recipe, vit: Any, tokens: int, dim: int) -> None:
        super().__init__()
        if recipe.channels not in (1, 3):
            raise UserError(f"BEiT v2's tokenizer reads colour images, and channels is {recipe.channels}; use 3 (or 1)")
        self.vit = vit
        self.projected = False
        width = vit.num_features
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
        self.codes = nn.Parameter(torch.randn(tokens, dim))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> ids, int64 [B, L]; one channel (grey) is read as three. Head and codes are in
        float32."""
        pixels = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 127.5 - 1
        tokens = self.vit.forward_features(pixels.to(self.vit.patch_embed.proj.weight.dtype))
        patches = self.vit.fc_norm(tokens[:, self.vit.num_prefix_tokens :])  # the encoder's last norm
        found = F.normalize(self.head(patches.float()), dim=-1)
        return nearest(found.flatten(0, 1), F.normalize(self.codes, dim=-1)).unflatten(0, found.shape[:2])


def create_encoder(recipe: Recipe) -> Any:
    """The ViT of a VQ-KD with random weights. **Raises:** `UserError` if it has other patches than the recipe."""
    name = recipe.target_model or VQKD_MODEL
    if not timm.is_model(name):
        raise UserError(f"target_model {name!r} is no timm model; expected one like {VQKD_MODEL}")
    vit: Any = timm.create_model(name, img_size=recipe.image_size, num_classes=0, global_pool="avg")
    side, grid = vit.patch_embed.patch_size, vit.patch_embed.grid_size
    if tuple(side) != (recipe.patch_size, recipe.patch_size) or tuple(grid) != recipe.grid_size:
        raise UserError(
            f"its encoder {name} cuts an image of {recipe.input_size} into {grid[0]} x {grid[1]} patches of {side[0]}, "
            f"the student into {recipe.grid_size[0]} x {recipe.grid_size[1]} of {recipe.patch_size}; use "
            f"--patch_size {side[0]}, or another --target_model"
        )
    return vit


VQKD_NAMES = (  # beginnings of BEiT v2's names and ours
    (r"^encoder\.", "vit."),
    (r"^encode_task_layer\.", "head."),
    (r"^quantize\.embedding\.weight$", "codes"),
)


def vqkd(recipe: Recipe, path: Path, dtype: torch.dtype) -> VQKD:
    """BEiT v2's tokenizer from its .pth. **Raises:** as `build_tokenizer`."""
    state = vqkd_state(read_file(path)[0])
    codes = state.get("codes")
    if codes is None or codes.dim() != 2:
        raise UserError("has no quantize.embedding.weight [tokens, width]; expected a VQ-KD of BEiT v2")
    model = VQKD(recipe, create_encoder(recipe), *codes.shape)
    if found := misfits(state, model.state_dict()):
        raise UserError(
            f"the weights are not of a VQ-KD with the encoder {recipe.target_model or VQKD_MODEL}: {found}; give "
            f"another --target_model, or the --input_size that it was trained with"
        )
    model.load_state_dict(state)
    tokens_fit(len(codes), recipe)
    model.vit.to(dtype)
    return model


def vqkd_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """BEiT v2's weights under our names; its attention has no biases of the keys, which become zeros."""
    for key in ("model", "state_dict"):
        content = content[key] if isinstance(content.get(key), Mapping) else content
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        for pattern, name in VQKD_NAMES:
            if isinstance(value, Tensor) and re.match(pattern, key):
                state[re.sub(pattern, name, key)] = value.float()
    for key in [key for key in state if key.endswith(".q_bias")]:
        query, stem = state.pop(key), key.removesuffix("q_bias")
        value = state.pop(f"{stem}v_bias", None)
        if value is not None:
            state[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return state


KINDS: dict[str, Callable[[Recipe, Path, torch.dtype], nn.Module]] = {"kmeans": kmeans, "dvae": dvae, "vqkd": vqkd}
