"""Pictures of what a video model sees, slot by slot: a contact sheet, and an animation.

A contact sheet has, for every clip, one row per name in `ROWS` and one column per frame slot (its first frame); the
animation shows the same five pictures of every clip side by side, frame by frame.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasthpm import mask as masks
from fasthpm.data import DatasetInfo
from fasthpm.files import replacing
from fasthpm.model import VIDEO_EPS, HPMViT
from fasthpm.recipe import Recipe
from fasthpm.step import Step

ROWS = ("clip", "reconstruction", "true loss", "predicted loss", "mask")
TRUE_LOSS_MASKS = 10  # as for images
MIN_SIDE = 56  # small frames are enlarged to at least this many pixels
GAP, HEADER = 4, 18
MILLISECONDS = 120  # that a frame of the animation is shown


@torch.no_grad()
def frames(model: HPMViT, recipe: Recipe, info: DatasetInfo, clips: Tensor, alpha: float) -> np.ndarray:
    """What the pictures are made of: uint8 [N, len(ROWS), T, H, W, 3].

    - `clips`: uint8 [N, T, H, W, C], or [N, H, W, C] where T = 1
    - `alpha`: share of the mask that the predicted difficulty chooses

    Visible patches are pasted back into the reconstruction, and `norm_pix_loss` is undone with the true patches'
    statistics. The true loss of a patch is averaged over random masks that hide it; heat is scaled clip by clip.
    Without a loss predictor its row stays empty.
    """
    step = Step(model, recipe, info)
    clips = clips[:, None] if clips.dim() == 4 else clips
    patches = step.normalized_patches(clips.to(model.mask_token.device))
    noise = _noise((2, len(patches), step.mask_plan.noise_size), recipe.seed, patches.device)
    predicted = model.predict_loss(patches) if recipe.predict_loss != "none" else torch.zeros_like(patches[:, :, 0])
    mask = masks.draw_mask(step.mask_plan, noise, predicted, alpha)
    rebuilt = _to_pixels(model, step, reconstruct(model, patches, mask))
    hidden = spread(model, mask)[..., None]
    true_loss = average_loss(model, step, patches, recipe.seed)
    heats = [_heat(spread(model, values)) for values in (true_loss, predicted)]
    original = clips.numpy()
    return np.stack([_rgb(original), _rgb(rebuilt), *heats, _rgb(np.where(hidden, np.uint8(127), original))], axis=1)


def reconstruct(model: HPMViT, patches: Tensor, mask: Tensor) -> Tensor:
    """Normalised patches [N, L, t*P*P*C] with the masked ones replaced by their reconstruction, in float32."""
    count = int(mask[0].sum())
    prediction = model(patches, mask, num_masked=count).reconstruction.float()
    ids = masks.split_ids(mask, count)[1][:, :, None].expand_as(prediction)
    if model.norm_pix_loss:
        values = patches.gather(1, ids).unflatten(-1, (-1, model.in_chans))
        std, mean = torch.std_mean(values, dim=-2, keepdim=True)
        prediction = (prediction.unflatten(-1, (-1, model.in_chans)) * (std + VIDEO_EPS) + mean).flatten(-2)
    return patches.scatter(1, ids, prediction)


def average_loss(model: HPMViT, step: Step, patches: Tensor, seed: int) -> Tensor:
    """Reconstruction loss of every patch, averaged over masks without a teacher that hide it: [N, L]."""
    total, count = torch.zeros_like(patches[:, :, 0]), torch.zeros_like(patches[:, :, 0])
    for number in range(TRUE_LOSS_MASKS):
        noise = _noise((2, len(patches), step.mask_plan.noise_size), seed + 1 + number, patches.device)
        mask = masks.draw_mask(step.mask_plan, noise, total, 0.0)
        output = model(patches, mask)
        ids = masks.split_ids(mask, output.per_patch_loss.shape[1])[1]
        total.scatter_add_(1, ids, output.per_patch_loss)
        count += mask
    return total / count.clamp_min(1)


# -------------------------------------------------------------------------------------------------- drawing
def sheet(pictures: np.ndarray, tubelet_size: int) -> np.ndarray:
    """The contact sheet of `frames`' output: uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw

    pictures = _enlarged(pictures[:, :, ::tubelet_size])
    clips, rows, slots, height, width, _ = pictures.shape
    size = (slots * (width + GAP) + GAP, clips * rows * (height + HEADER + GAP) + GAP)
    paper = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(paper)
    for clip in range(clips):
        for row, name in enumerate(ROWS):
            top = GAP + (clip * rows + row) * (height + HEADER + GAP)
            draw.text((GAP, top + 2), f"{name} {clip + 1}" if row == 0 else name, fill="black")
            for slot in range(slots):
                paper.paste(Image.fromarray(pictures[clip, row, slot]), (GAP + slot * (width + GAP), top + HEADER))
    return np.asarray(paper)


def animation(pictures: np.ndarray) -> bytes:
    """`frames`' output as an endless GIF: a row per clip, a column per name in `ROWS`."""
    from PIL import Image

    pictures = _enlarged(pictures)
    clips, rows, length, height, width, _ = pictures.shape
    canvas = np.full((length, clips * (height + GAP) + GAP, rows * (width + GAP) + GAP, 3), 255, np.uint8)
    for clip in range(clips):
        for row in range(rows):
            top, left = GAP + clip * (height + GAP), GAP + row * (width + GAP)
            canvas[:, top : top + height, left : left + width] = pictures[clip, row]
    first, *rest = [Image.fromarray(picture) for picture in canvas]
    file = io.BytesIO()
    first.save(file, format="gif", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)
    return file.getvalue()


def save(pictures: np.ndarray, tubelet_size: int, path: Path) -> None:
    """Write the animation to a .gif, the contact sheet to a .png, atomically."""
    from PIL import Image

    with replacing(path) as aside:
        if path.suffix.lower() == ".gif":
            aside.write_bytes(animation(pictures))
        else:
            Image.fromarray(sheet(pictures, tubelet_size)).save(aside, format="png")


def spread(model: HPMViT, values: Tensor) -> np.ndarray:
    """One value per patch [N, L] -> one per pixel [N, T, H, W]."""
    grid = values.reshape(len(values), model.slots, *model.grid_size).cpu().numpy()
    return grid.repeat(model.tubelet_size, axis=1).repeat(model.patch_size, axis=2).repeat(model.patch_size, axis=3)


def _to_pixels(model: HPMViT, step: Step, patches: Tensor) -> np.ndarray:
    """Normalised patches [N, L, t*P*P*C] -> uint8 [N, T, H, W, C]."""
    clips = model.unpatchify(patches)
    clips = clips[:, :, None] if clips.dim() == 4 else clips
    pixels = clips.permute(0, 2, 3, 4, 1) * step.normalized_patches.std + step.normalized_patches.mean
    return pixels.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _heat(values: np.ndarray) -> np.ndarray:
    """[N, T, H, W] -> colours uint8 [N, T, H, W, 3], scaled per clip from its lowest to its highest value."""
    from matplotlib import colormaps

    low, high = values.min(axis=(1, 2, 3), keepdims=True), values.max(axis=(1, 2, 3), keepdims=True)
    return (colormaps["inferno"]((values - low) / np.maximum(high - low, 1e-12))[..., :3] * 255).astype(np.uint8)


def _rgb(clips: np.ndarray) -> np.ndarray:
    """uint8 [..., C] -> [..., 3]; one channel becomes grey, further channels are left out."""
    return clips.repeat(3, axis=-1) if clips.shape[-1] == 1 else clips[..., :3]


def _enlarged(pictures: np.ndarray) -> np.ndarray:
    scale = max(1, -(-MIN_SIDE // pictures.shape[-2]))
    return pictures.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _noise(size: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).to(device)
