"""Pictures of what a model sees: image, reconstruction, true loss, predicted loss, mask; of videos, slot by slot.

fasthpm visualize RUN --data_path X.beton [--num_images 8] [-o panel.png]
fasthpm visualize RUN --images a.jpg b.png --columns image true_loss predicted_loss hardest reconstruction
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fasthpm import mask as masks
from fasthpm.checkpoint.weights import load_weights
from fasthpm.cli import Parser
from fasthpm.data import DatasetInfo, build_loader, read_info
from fasthpm.data.pixels import render
from fasthpm.data.plain import read_pixels
from fasthpm.errors import UserError
from fasthpm.files import replacing, writing
from fasthpm.frozen import FrozenTeacher, build_frozen
from fasthpm.loss import EPS
from fasthpm.maps.attention import attention_weights, cls_attention
from fasthpm.model import HPMViT
from fasthpm.pictures import clips
from fasthpm.recipe import Recipe
from fasthpm.step import Step

COLUMNS = ("image", "reconstruction", "true_loss", "predicted_loss", "mask")
FEATURE_COLUMNS = tuple(name for name in COLUMNS if name != "reconstruction")  # of features there is no picture
MORE_COLUMNS = ("hardest", "attention")  # the hardest share of patches masked; what the cls token attends to
TRUE_LOSS_MASKS = 10  # as in the papers' figures
MIN_SIDE = 112  # small images are enlarged to at least this many pixels
GAP, HEADER = 4, 18


def fixed_images(recipe: Recipe, count: int) -> tuple[Tensor, DatasetInfo]:
    """The first `count` images or clips of the recipe's data, as in evaluation: uint8 [count, (T,) H, W, C]."""
    options = recipe.loader_options(
        batch_size=count,
        train=False,
        num_workers=1,
        max_bad_samples=1.0,  # a picture needs some images, not these
    )
    loader = build_loader(recipe.data_path, options)
    try:
        return next(iter(loader)).images, loader.info
    finally:
        loader.close()


def chosen_images(recipe: Recipe, arguments: argparse.Namespace) -> tuple[Tensor, DatasetInfo]:
    """What the command line asks for: files, or the first images of a data set; uint8 [N, H, W, C]."""
    if not arguments.images:
        recipe = recipe if not arguments.data_path else recipe.with_data(arguments.data_path)
        return fixed_images(recipe, arguments.num_images)
    pictures = []
    for name in arguments.images:
        pixels = read_pixels(name)
        if recipe.channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
        crop = np.array([0, 0, *pixels.shape[:2], 0])
        pictures.append(render(pixels, crop, recipe.image_size, recipe.interpolation, np.ones(3, np.float32)))
    return torch.from_numpy(np.stack(pictures)), read_info(recipe.data_path)


@torch.no_grad()
def panel(
    model: HPMViT,
    recipe: Recipe,
    info: DatasetInfo,
    images: Tensor,
    alpha: float,
    frozen: FrozenTeacher | None = None,
    columns: Sequence[str] = (),
) -> np.ndarray:
    """One row per image, one column per name in `columns` (none: `columns_of(recipe)`); uint8 [height, width, 3].

    - `images`: uint8 [N, H, W, C]; `alpha`: share of the mask that the predicted difficulty chooses
    - `frozen`: the target's teacher, for targets dino and clip; with target ema, the true loss is that of the model's
      own features
    - `columns`: of `COLUMNS` and `MORE_COLUMNS`; "hardest" masks the recipe's share of patches, hardest first

    Visible patches are pasted back into the reconstruction, and `norm_pix_loss` is undone with the true patches'
    statistics. The true loss of a patch is averaged over the random masks that hide it. Without a loss predictor its
    column stays empty.
    """
    step = Step(model, recipe, info)
    images = images.to(model.cls_token.device)
    patches = step.normalized_patches(images)
    target = frozen(images) if frozen else model.encode(patches)[:, 1:] if recipe.target_teacher == "ema" else None
    size = (2, len(patches), step.mask_plan.noise_size)
    noise = torch.rand(size, generator=torch.Generator().manual_seed(recipe.seed)).to(patches.device)
    predicted = model.predict_loss(patches) if recipe.predict_loss != "none" else torch.zeros_like(patches[:, :, 0])
    mask = masks.draw_mask(step.mask_plan, noise, predicted, alpha)
    original = images.cpu().numpy()

    def true_loss() -> Tensor:
        return average_loss(model, patches, recipe.mask_ratio, recipe.seed, target=target)

    draw: dict[str, Callable[[], np.ndarray]] = {
        "image": lambda: as_rgb(original),
        "reconstruction": lambda: as_rgb(_to_pixels(model, step, reconstruct(model, patches, mask))),
        "true_loss": lambda: heat(_spread(model, true_loss())),
        "predicted_loss": lambda: heat(_spread(model, predicted)),
        "mask": lambda: as_rgb(_hidden(model, original, mask)),
        "hardest": lambda: as_rgb(
            _hidden(model, original, masks.easy_to_hard_mask(predicted, recipe.mask_ratio, 1.0, noise=noise))
        ),
        "attention": lambda: heat(_spread(model, attention_weights(cls_attention(model, patches)))),
    }
    return _sheet({name.replace("_", " "): draw[name]() for name in columns or columns_of(recipe)})


def columns_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of a panel's columns."""
    return FEATURE_COLUMNS if recipe.target_teacher else COLUMNS


def _hidden(model: HPMViT, images: np.ndarray, mask: Tensor) -> np.ndarray:
    """uint8 [N, H, W, C] with the masked patches grey."""
    return np.where(_spread(model, mask)[..., None], 127, images).astype(np.uint8)


def reconstruct(model: HPMViT, patches: Tensor, mask: Tensor) -> Tensor:
    """Normalised patches [N, L, P*P*C] with the masked ones replaced by their reconstruction, in float32."""
    count = int(mask[0].sum())
    prediction = model(patches, mask, num_masked=count).reconstruction.float()
    ids = masks.split_ids(mask, count)[1][:, :, None].expand_as(prediction)
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(patches.gather(1, ids), dim=-1, keepdim=True)
        prediction = prediction * (variance + EPS).sqrt() + mean
    return patches.scatter(1, ids, prediction)


def average_loss(
    model: HPMViT,
    patches: Tensor,
    mask_ratio: float,
    seed: int,
    count_masks: int = TRUE_LOSS_MASKS,
    target: Tensor | None = None,
) -> Tensor:
    """Reconstruction loss of every patch, averaged over those of `count_masks` random masks that hide it: [N, L].

    `target`: features of all patches, if those are what the model predicts.
    """
    generator = torch.Generator().manual_seed(seed)
    total, count = torch.zeros_like(patches[:, :, 0]), torch.zeros_like(patches[:, :, 0])
    for _ in range(count_masks):
        mask = masks.random_mask(torch.rand(patches.shape[:2], generator=generator).to(patches.device), mask_ratio)
        output = model(patches, mask, target=target)
        ids = masks.split_ids(mask, output.per_patch_loss.shape[1])[1]
        total.scatter_add_(1, ids, output.per_patch_loss)
        count += mask
    return total / count.clamp_min(1)


# -------------------------------------------------------------------------------------------------- drawing
def _to_pixels(model: HPMViT, step: Step, patches: Tensor) -> np.ndarray:
    """Normalised patches [N, L, P*P*C] -> uint8 [N, H, W, C]."""
    images = model.unpatchify(patches).permute(0, 2, 3, 1) * step.normalized_patches.std + step.normalized_patches.mean
    return images.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _spread(model: HPMViT, values: Tensor) -> np.ndarray:
    """One value per patch [N, L] -> one per pixel [N, H, W]."""
    grid = values.reshape(len(values), *model.grid_size).cpu().numpy()
    return grid.repeat(model.patch_size, axis=1).repeat(model.patch_size, axis=2)


def heat(values: np.ndarray) -> np.ndarray:
    """[N, H, W] -> colours uint8 [N, H, W, 3], scaled per image from its lowest to its highest value."""
    from matplotlib import colormaps

    low, high = values.min(axis=(1, 2), keepdims=True), values.max(axis=(1, 2), keepdims=True)
    return (colormaps["inferno"]((values - low) / np.maximum(high - low, 1e-12))[..., :3] * 255).astype(np.uint8)


def as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] -> [N, H, W, 3]; one channel becomes grey, further channels are left out."""
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images[..., :3]


def _sheet(named: dict[str, np.ndarray]) -> np.ndarray:
    """Columns of [N, H, W, 3] pictures side by side, under their names."""
    scale = max(1, -(-MIN_SIDE // next(iter(named.values())).shape[2]))
    columns = [column.repeat(scale, axis=1).repeat(scale, axis=2) for column in named.values()]
    rows, height, width, _ = columns[0].shape
    size = (len(columns) * (width + GAP) + GAP, rows * (height + GAP) + GAP + HEADER)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, (name, column) in enumerate(zip(named, columns, strict=True)):
        left = GAP + x * (width + GAP)
        draw.text((left, 3), name, fill="black")
        for y, picture in enumerate(column):
            sheet.paste(Image.fromarray(picture), (left, HEADER + GAP + y * (height + GAP)))
    return np.asarray(sheet)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    with replacing(path) as aside:
        Image.fromarray(picture).save(aside, format="png")


@contextmanager
def _output(path: Path) -> Iterator[None]:
    """For writing `path`, in a folder that is made if need be. **Raises:** `UserError` if that can't be."""
    with writing(path, "make room, or choose another -o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm visualize`."""
    parser = Parser(prog="fasthpm visualize", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--data_path", default="", help="prepared set or image folder (default: the run's own)")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="these image files, whole")
    parser.add_argument("--columns", nargs="+", choices=(*COLUMNS, *MORE_COLUMNS), default=[])
    parser.add_argument("--attention", action="store_true", help="a further column: where the cls token attends to")
    parser.add_argument("--num_images", type=int, default=8, help="rows of the picture")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument(
        "--alpha",
        type=float,
        default=-1.0,
        help="share of the mask chosen by difficulty (default: the recipe's alpha_end)",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="PNG, or GIF of a video model")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if arguments.num_images < 1:
        raise UserError(f"num_images is {arguments.num_images}, expected 1 or more")
    model, recipe = load_weights(arguments.run, arguments.weights)
    if arguments.output.suffix.lower() == ".gif" and not model.video:
        raise UserError(f"output {arguments.output}: animations are of videos, and this model takes images; use a .png")
    if arguments.images and arguments.data_path:
        raise UserError("--images and --data_path both say what to draw; leave one of them out")
    if model.video and arguments.images:
        raise UserError("--images are pictures, and this model takes videos; give a prepared set with --data_path")
    images, info = chosen_images(recipe, arguments)
    alpha = recipe.alpha_end if arguments.alpha < 0 else arguments.alpha
    columns = [*(arguments.columns or columns_of(recipe)), *(["attention"] if arguments.attention else [])]
    if model.video:
        pictures = clips.frames(model, recipe, info, images, alpha)
        with _output(arguments.output):
            clips.save(pictures, recipe.tubelet_size, arguments.output)
        print(f"{len(images)} clips written to {arguments.output}")
        return
    if recipe.target_teacher and "reconstruction" in columns:
        raise UserError(
            f"this run reconstructs {recipe.target} features, of which there is no picture; leave out the "
            f"column reconstruction"
        )
    frozen = build_frozen(recipe, torch.device("cpu"), torch.float32)
    picture = panel(model, recipe, info, images, alpha, frozen, columns)
    with _output(arguments.output):
        save_png(picture, arguments.output)
    print(f"{len(images)} images ({', '.join(columns)}) written to {arguments.output}")
