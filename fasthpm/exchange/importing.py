"""Make a FastHPM run of somebody else's checkpoint: HPM's, MAE's, AMT's, VideoMAE's, BEiT's, iBOT's, or of an encoder
in one.

    fasthpm import CKPT -o OUT_DIR [--source hpm|mae|amt|videomae|beit|ibot] [--weights student|teacher] [--recipe NAME]

Then OUT_DIR is what a run is: `fasthpm knn|visualize|export OUT_DIR`, and `fasthpm pretrain --init_from OUT_DIR …`.
The file is never trusted with code: safetensors, or torch files that load with `weights_only`. Every weight of the
model must be in it, in its shape; what is converted or left out is listed, and kept in import.json.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

from fasthpm import checkpoint, files, recipes
from fasthpm.checkpoint.foreign import (
    COUNTER,
    EMBEDDED_RECIPE,
    IMPORT_NOTE,
    PATCHES_OWN,
    SOURCES,
    Architecture,
    KeyReport,
    all_names,
    check_source,
    detect_source,
    find_weights,
    foreign_layout,
    ibot_centres,
    infer_architecture,
    load_reference,
    our_names,
    stored_arguments,
)
from fasthpm.checkpoint.pixels import metadata_statistics
from fasthpm.cli import Parser
from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import UserError, about
from fasthpm.exchange.asked import check_folder, check_given
from fasthpm.model_names import SIZES, VIDEO_FRAMES, is_video, model_names
from fasthpm.patches import model_of, target_width
from fasthpm.recipe import Recipe, build_recipe

PUBLISHED_DECODER_HEADS = {512: 16}  # by width: MAE's and HPM's at every size
VIDEO_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}  # VideoMAE's
VIDEO_SIDE, VIDEO_MASK_RATIO = 224, 0.9
BEIT_MASK_RATIO = 0.38
IBOT_MASKS: dict[str, Any] = {"mask_ratio": 0.3, "mask_ratio_spread": 0.2, "unmasked_share": 0.5, "global_crops": 2}


@dataclasses.dataclass(frozen=True)
class Imported:
    """Weights on their way into a run folder."""

    recipe: Recipe
    states: dict[str, dict[str, Tensor]]  # "student", and "teacher" where there is one: float32, our form
    reports: dict[str, KeyReport]  # of the same
    source: str
    encoder_only: bool
    assumed: list[str]  # what the shapes do not tell and nobody said
    told: list[str] = dataclasses.field(default_factory=list)  # what the file's own arguments say
    pixels: PixelStatistics | None = None  # by what its pixels were normalised; None: nothing tells
    centres: Tensor | None = None  # of iBOT's teacher, float32 [2, prototypes]; None: not in the file


def import_weights(
    path: Path,
    *,
    source: str = "",
    weights: str = "",
    base: Recipe | None = None,
    given: dict[str, Any] | None = None,
    encoder_only: bool = False,
    ignore: Sequence[str] = (),
    pixels: PixelStatistics | None = None,
) -> Imported:
    """Read, recognise and convert a checkpoint; nothing is written.

    - `source`: see `foreign.SOURCES`; empty = recognised by its keys
    - `weights`: "student", "teacher" (the EMA, which becomes the student), or empty: both that there are
    - `base`: the recipe of the run, instead of one made from the file's shapes
    - `given`: recipe fields that shapes do not tell: input_size, decoder_heads, norm_pix_loss, sampling_rate …
    - `pixels`: mean and standard deviation by which it was trained; None: as the file says, or its publishers
    - `encoder_only`, `ignore`: see `foreign.load_reference`

    **Raises:** `UserError` for anything that is not a whole checkpoint of a model that we have.
    """
    content, metadata = files.read_file(path)
    with about(path):
        found = choose(content, weights, tuple(ignore))
        source = source or detect_source(found["student"])
        check_source(source)
        fields = {k: v for k, v in (given or {}).items() if v is not None}
        assumed, told = list[str](), list[str]()
        if base is None and EMBEDDED_RECIPE in metadata and not encoder_only:
            own = build_recipe(json.loads(metadata[EMBEDDED_RECIPE]), source="the recipe in it")
            decodes = not own.uses_views and own.target != "tokens"
            check_given(fields, video=is_video(own.model), pixels=decodes, encoder_only=False)
            recipe = dataclasses.replace(own, **fields)
        else:
            shape = measured(found["student"], encoder_only, source, target_width(base) if base else 0)
            video, decodes = bool(shape.tubelet_size), encoder_only or bool(shape.decoder_dim)
            check_given(fields, video=video, pixels=decodes, encoder_only=encoder_only)
            if base:
                recipe = dataclasses.replace(base, **fields)
                check_recipe(recipe, shape)
            else:
                stored = stored_arguments(content)
                recipe, assumed = recipe_for(shape, source, fields, stored)
                told = [f"{name} {value}" for name, value in told_by(stored, video).items() if name not in fields]
        states, reports = {}, {}
        for name, state in found.items():
            model = model_of(recipe)
            reports[name] = load_reference(model, state, source, encoder_only=encoder_only, ignore=ignore)
            for reason, keys in left_out(content, ignore).items():
                reports[name].ignored[reason] = [*keys, *reports[name].ignored.get(reason, [])]
            states[name] = checkpoint.cpu_state(model)
        if pixels is None:
            pixels = pixels_for(metadata, recipe, source)
        pixels = pixels and pixels.in_channels(recipe.channels)
    centres = ibot_centres(content) if recipe.uses_views else None
    centres = centres if centres is None or centres.shape[1] == recipe.prototypes else None
    return Imported(recipe, states, reports, source, encoder_only, assumed, told, pixels, centres)


def told_by(stored: dict[str, Any], video: bool) -> dict[str, Any]:
    """Recipe fields that the arguments stored in a file tell, beside those that go with shapes."""
    told: dict[str, Any] = {}
    rate, ratio = stored.get("sampling_rate"), stored.get("mask_ratio")
    if video and type(rate) is int and rate > 0:
        told["sampling_rate"] = rate
    if isinstance(ratio, float) and 0 < ratio < 1:
        told["mask_ratio"] = float(ratio)
    for name in ("norm_pix_loss", "normlize_target"):  # MAE's and VideoMAE's spelling
        if isinstance(stored.get(name), bool):
            told["norm_pix_loss"] = stored[name]
    return told


def left_out(content: dict[str, Any], ignore: Sequence[str]) -> dict[str, list[str]]:
    """Names in the file that were left out before any wrapper was looked for, by why."""
    names = sorted(set(all_names(content)))
    asked = [name for name in names if ignore and name.startswith(tuple(ignore))]
    reasons = {"as asked": asked, "how many weights were averaged": [name for name in names if name == COUNTER]}
    return {reason: keys for reason, keys in reasons.items() if keys}


def pixels_for(metadata: dict[str, str], recipe: Recipe, source: str = "") -> PixelStatistics | None:
    """By what a file's pixels were normalised: as it says, else by ImageNet's, as most trainers do with RGB; BEiT's has
    0.5 for both, unless told otherwise."""
    if (found := metadata_statistics(metadata)) is not None or EMBEDDED_RECIPE in metadata or recipe.channels != 3:
        return found
    if source == "beit":
        return PixelStatistics(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
    return PixelStatistics(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def choose(content: dict[str, Any], weights: str, ignore: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    """The state dicts to import, {"student": …} and perhaps {"teacher": …}; `ignore`: see `find_weights`.

    **Raises:** `UserError` if the file has no such weights.
    """
    found = {name: state for name in ("student", "teacher") if (state := find_weights(content, name, ignore))}
    if not found:
        raise UserError(_nothing_found(content))
    if weights and weights not in found:
        raise UserError(f"holds no {weights} weights, only {' and '.join(found)}; leave --weights out")
    if weights or "student" not in found:
        return {"student": found[weights or "teacher"]}
    return found


def _nothing_found(content: dict[str, Any]) -> str:
    if "optimizer_state_dict" in content or "ds_config" in content:
        return (
            "holds DeepSpeed's optimizer state, not weights; give mp_rank_00_model_states.pt, which lies beside it, "
            "or what DeepSpeed's zero_to_fp32.py makes of the folder"
        )
    if layout := foreign_layout(all_names(content)):
        return layout
    keys = ", ".join(str(key) for key in list(content)[:8])
    return f"holds no weights of a vision transformer (its keys: {keys}); expected patch_embed.proj.weight and the like"


# -------------------------------------------------------------------------------------------------- which model
def measured(state: dict[str, Tensor], encoder_only: bool, source: str, features: int = 0) -> Architecture:
    """The sizes in `state`, with what can't be imported refused.

    - `features`: width of what the decoder predicts, by the user's recipe; 0 = pixels
    """
    state = our_names(state, source)
    shape = infer_architecture(state, source)
    if encoder_only:
        return dataclasses.replace(shape, decoder_dim=0, decoder_depth=0, predictor_depth=0, tokens=0, prototypes=0)
    if any(key.startswith(PATCHES_OWN) for key in state):
        raise UserError(
            "has one last layer for cls and another for patches, and here they share one (iBOT's --shared_head); take "
            "its encoder with --encoder_only"
        )
    if shape.tokens or shape.prototypes:
        return shape
    if not shape.decoder_dim:
        kind = "a classifier" if any(key.startswith("head.") for key in state) else "an encoder alone"
        raise UserError(f"is {kind}, without the decoder that pretraining has; take its encoder with --encoder_only")
    values = len(state.get("decoder_pred.weight", ()))
    pixels = max(shape.tubelet_size, 1) * shape.patch_size**2 * shape.in_chans
    if values not in (0, features or pixels):
        what = f"the {features} features of the recipe's target" if features else f"the {pixels} pixels"
        raise UserError(
            f"its decoder predicts {values} values per patch, not {what}: the file does not say whose features they "
            f"are; name a --recipe with that target, or take its encoder with --encoder_only"
        )
    return shape


def recipe_for(
    shape: Architecture, source: str, fields: dict[str, Any], stored: dict[str, Any]
) -> tuple[Recipe, list[str]]:
    """A recipe for a model with these shapes, and what had to be assumed beyond them.

    - `fields`: what the user says; `stored`: the training arguments in the file

    **Raises:** `UserError` if no registered model has these shapes, or they leave a choice.
    """
    known: dict[str, Any] = {"model": _model_name(shape), "patch_size": shape.patch_size, "channels": shape.in_chans}
    guessed: dict[str, Any] = {}
    if shape.tubelet_size:
        known["tubelet_size"] = shape.tubelet_size
        clip = _clip(shape, {**stored, **fields})
        known, guessed = {**known, **clip[0]}, clip[1]
    else:
        known["input_size"] = fields.get("input_size") or _square(shape, 1)
    if shape.tokens:
        known |= {"target": "tokens", "target_dim": shape.tokens, "mask_ratio": BEIT_MASK_RATIO}
    if shape.prototypes:
        head = {"prototypes": shape.prototypes, "head_hidden": shape.head_hidden, "head_free_norm": shape.free_norm}
        known |= {"target": "distributions", "positions": "learned", **head, **IBOT_MASKS}
    if source == "beit":
        known |= {"positions": "relative" if shape.relative else "learned", "layer_scale": shape.layer_scale}
    if shape.decoder_dim:
        known |= {"decoder_dim": shape.decoder_dim, "decoder_depth": shape.decoder_depth}
        if shape.predictor_depth not in (0, shape.decoder_depth):
            known["predictor_depth"] = shape.predictor_depth
    if not shape.predictor_depth:
        policy = "tube" if shape.tubelet_size and _slots({**known, **guessed}) > 1 else "random"
        known |= {"mask_policy": policy, "predict_loss": "none", "clip_grad": 0.0}
    known |= told_by(stored, bool(shape.tubelet_size))
    conventions = {**guessed, **_conventions(shape, source)}
    assumed = {name: value for name, value in conventions.items() if name not in {**known, **fields}}
    if shape.decoder_dim and "decoder_heads" not in {**assumed, **fields}:
        raise UserError(
            f"its decoders are {shape.decoder_dim} wide, and shapes do not tell their number of heads; give "
            f"--decoder_heads"
        )
    whole = shape.decoder_dim or shape.tokens or shape.prototypes
    name = f"imported_{source}" if whole else "imported_encoder"
    recipe = Recipe(**{"recipe": name, **known, **assumed, **fields})
    check_recipe(recipe, shape)
    heads = SIZES[_size(shape)]["num_heads"]
    return recipe, [f"{heads} heads", *(f"{name} {value}" for name, value in assumed.items())]


def check_recipe(recipe: Recipe, shape: Architecture) -> None:
    """**Raises:** `UserError` listing every size in which the recipe's model differs from the file's."""
    pairs = {
        "model size": (recipe.model.split("_")[2], _size(shape)),
        "patch_size": (recipe.patch_size, shape.patch_size),
        "channels": (recipe.channels, shape.in_chans),
        "tubelet_size (0 = images)": (recipe.tubelet_size if is_video(recipe.model) else 0, shape.tubelet_size),
    }
    if shape.num_patches:
        pairs[f"patches of input_size {recipe.input_size}"] = (recipe.num_patches, shape.num_patches)
    if shape.decoder_dim:
        pairs["decoder_dim"] = (recipe.decoder_dim, shape.decoder_dim)
        pairs["decoder_depth"] = (recipe.decoder_depth, shape.decoder_depth)
        if shape.predictor_depth:
            pairs["predictor_depth"] = (recipe.predictor_depth or recipe.decoder_depth, shape.predictor_depth)
    wrong = [f"{name} {asked} (file: {has})" for name, (asked, has) in pairs.items() if asked != has]
    if wrong:
        raise UserError(f"the recipe {recipe.recipe} is of another model: {', '.join(wrong)}; name a recipe that fits")


def _size(shape: Architecture) -> str:
    for name, size in SIZES.items():
        if (size["embed_dim"], size["depth"]) == (shape.embed_dim, shape.depth):
            return name
    sizes = ", ".join(f"{size['embed_dim']} x {size['depth']} ({name})" for name, size in SIZES.items())
    raise UserError(f"its encoder is {shape.embed_dim} wide with {shape.depth} blocks; expected one of {sizes}")


def _model_name(shape: Architecture) -> str:
    """The registered name of this size; patch and image size are the recipe's to change."""
    method = "hpm" if shape.predictor_depth else "videomae" if shape.tubelet_size else "mae"
    method = "beit" if shape.tokens or shape.relative else "ibot" if shape.prototypes else method
    stem = f"{method}_vit_{_size(shape)}_patch"
    names = [n for n in model_names() if n.startswith(stem) and is_video(n) == bool(shape.tubelet_size)]
    if not names:
        raise UserError(
            f"its encoder is a ViT-{_size(shape)}, which has no {'video' if shape.tubelet_size else 'image'} model"
        )
    return next((name for name in names if name.startswith(f"{stem}{shape.patch_size}_")), names[0])


def _square(shape: Architecture, slots: int) -> str:
    side = math.isqrt(shape.num_patches // slots)
    if side * side * slots != shape.num_patches:
        raise UserError(f"its {shape.num_patches} patches make no square; give --input_size HEIGHTxWIDTH in pixels")
    return str(side * shape.patch_size)


def _slots(fields: dict[str, Any]) -> int:
    return int(fields["num_frames"]) // int(fields["tubelet_size"])


def _clip(shape: Architecture, said: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Length, size and mask ratio of a video model's clips: what file or user say, and what is guessed (VideoMAE's)."""
    known: dict[str, Any] = {"num_frames": int(said["num_frames"])} if said.get("num_frames") else {}
    guessed: dict[str, Any] = {} if known else {"num_frames": VIDEO_FRAMES}
    slots = _slots({"tubelet_size": shape.tubelet_size, **known, **guessed})
    if shape.num_patches and slots and not said.get("input_size"):
        known["input_size"] = _square(shape, slots)
    elif said.get("input_size"):
        known["input_size"] = str(said["input_size"])
    else:
        guessed["input_size"] = str(VIDEO_SIDE)
    return known, {**guessed, "mask_ratio": VIDEO_MASK_RATIO}


def _conventions(shape: Architecture, source: str) -> dict[str, Any]:
    """What neither shapes nor, often, the file tell, as the published scripts have it."""
    if not shape.decoder_dim:
        return {}
    video = bool(shape.tubelet_size)
    heads = (VIDEO_DECODER_HEADS if video else PUBLISHED_DECODER_HEADS).get(shape.decoder_dim)
    return {**({"decoder_heads": heads} if heads else {}), "norm_pix_loss": video or source != "hpm"}


# -------------------------------------------------------------------------------------------------- out
def write_run(output_dir: Path, imported: Imported, made_of: dict[str, Any]) -> Path:
    """A run folder with one checkpoint, of update 0. **Returns:** the checkpoint.

    - `made_of`: what import.json says about the file

    **Raises:** `UserError` if the folder is a run's already, or cannot be written.
    """
    check_folder(output_dir)
    with files.writing(output_dir, "choose another --output"):
        aside = checkpoint.begin(output_dir, 0, checkpoint.pixels_note(imported.pixels) if imported.pixels else None)
        try:
            for name, state in imported.states.items():
                files.save_tensors(state, aside / f"{name}.safetensors")
            if imported.centres is not None:
                files.save_tensors({"centres": imported.centres}, aside / checkpoint.BUFFERS)
            files.write_json(aside / IMPORT_NOTE, _note(imported, made_of))
            return checkpoint.commit(aside, imported.recipe, checkpoint.RunState(0, {}, 0, 1))
        finally:
            files.remove(aside)


def _note(imported: Imported, made_of: dict[str, Any]) -> dict[str, Any]:
    return {
        **made_of,
        "source": imported.source,
        "encoder_only": imported.encoder_only,
        "assumed": imported.assumed,
        "told": imported.told,
        "keys": {name: dataclasses.asdict(report) for name, report in imported.reports.items()},
    }


def summary(imported: Imported) -> list[str]:
    """What the user is told: the model, what was assumed, and what became of the keys."""
    recipe = imported.recipe
    height, width = recipe.image_size
    what = f"{imported.source} checkpoint: {recipe.model.split('_')[2]}, patches of {recipe.patch_size}"
    decoder = f", decoder {recipe.decoder_dim} x {recipe.decoder_depth}"
    if recipe.uses_views:
        decoder = f", {recipe.prototypes} prototypes behind layers of {recipe.head_hidden}"
    decoder = "" if imported.encoder_only else decoder
    frames = f"{recipe.num_frames} frames of " if is_video(recipe.model) else ""
    lines = [f"{what}, {frames or 'images '}{height}x{width}x{recipe.channels}{decoder}"]
    if recipe.uses_views:
        lines.append(f"  centres    {'kept' if imported.centres is not None else 'not in the file: zeros'}")
    if imported.assumed:
        lines.append(f"  assumed    {', '.join(imported.assumed)}: not told by the shapes")
    if imported.told:
        lines.append(f"  told       {', '.join(imported.told)}: by the arguments in the file")
    by = imported.pixels
    shown = " ".join(f"{value:.4g}" for value in (*by.mean, *by.std)) if by else ""
    lines.append(f"  pixels     {f'normalised by mean and std {shown}' if by else 'normalised by nobody knows what'}")
    for name, report in imported.reports.items():
        lines += [f"  {name}:", *(f"    {line}" for line in report.lines())]
    if imported.encoder_only:
        lines.append("  the decoder is untrained: knn and export are meaningful, visualize is not")
    return lines


def _parser() -> Parser:
    parser = Parser(prog="fasthpm import", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="file of torch.save, or .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, help="run folder to write")
    parser.add_argument("--source", choices=SOURCES, default="", help="whose checkpoint (default: by its keys)")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="",
        help="import these alone, as the student; teacher = the file's EMA (default: both, where the file has both)",
    )
    parser.add_argument("--recipe", default="", help="the run's recipe, or a recipe.json (default: made from the file)")
    parser.add_argument("--encoder_only", action="store_true", help="take the encoder and leave decoders and heads")
    parser.add_argument(
        "--ignore", nargs="+", default=(), metavar="PREFIX", help="leave out keys that begin with one of these"
    )
    parser.add_argument("--input_size", help="image side or HEIGHTxWIDTH, where the patches make no square")
    parser.add_argument(
        "--num_frames", type=int, help="frames of a video model's clips (default: as the file says, or 16)"
    )
    parser.add_argument(
        "--sampling_rate", type=int, help="a clip takes every how many-th frame (default: as the file says, or 1)"
    )
    parser.add_argument("--mask_ratio", type=float, help="share of patches that it masked (default: as the file says)")
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        help="of its pixels, 0..1, one or three (default: as the file says, or ImageNet's)",
    )
    parser.add_argument("--std", type=float, nargs="+", help="the same, their standard deviation")
    parser.add_argument("--decoder_heads", type=int, help="heads of the decoders, where they are not 512 wide")
    parser.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        help="whether targets were normalised per patch (default: as the file says, else MAE and videos yes, HPM no)",
    )
    return parser


def _pixels_given(arguments: argparse.Namespace) -> PixelStatistics | None:
    """--mean and --std. **Raises:** `UserError` for one of them alone, for two numbers, and out of range."""
    mean, std = arguments.mean, arguments.std
    if mean is None and std is None:
        return None
    good = bool(mean and std) and len(mean) == len(std) and len(mean) in (1, 3)
    if not (good and all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
        raise UserError(f"mean is {mean} and std {std}, expected both, of one or three numbers in 0..1, std above 0")
    return PixelStatistics(tuple(mean), tuple(std))


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm import`."""
    arguments = _parser().parse_args(argv)
    check_folder(arguments.output)  # before the file is read
    imported = import_weights(
        arguments.checkpoint,
        source=arguments.source,
        weights=arguments.weights,
        base=recipes.from_name(arguments.recipe) if arguments.recipe else None,
        given={
            name: getattr(arguments, name)
            for name in ("input_size", "num_frames", "sampling_rate", "mask_ratio", "decoder_heads", "norm_pix_loss")
        },
        encoder_only=arguments.encoder_only,
        ignore=arguments.ignore,
        pixels=_pixels_given(arguments),
    )
    made_of = {"file": arguments.checkpoint.name, "sha256": files.file_hash(arguments.checkpoint)}
    write_run(arguments.output, imported, made_of)
    print("\n".join(summary(imported)))
    print(f"written to {arguments.output}; e.g. fasthpm knn {arguments.output} --train_path … --val_path …")
