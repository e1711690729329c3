"""Write a run's weights for another library, and let that library prove that it computes the same.

    fasthpm export RUN [-o FILE] [--format NAME] [--weights student|teacher]

The written file is loaded back in its library, both models run in float64 on a fixed input, and only outputs
that agree within 1e-8 of their largest value make a success; otherwise nothing is written. (onnx computes in float32,
and may err as float32 does; mmseg is compared by names and shapes.) Decoders leave only with hf_vitmae (without the
loss predictor) and safetensors (everything, under our names).
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasthpm import files
from fasthpm.checkpoint.pixels import EXPORTED as EXPORTED
from fasthpm.checkpoint.weights import checkpoint_of, lacks_decoder, load_weights, saved_files
from fasthpm.cli import Arguments, Parser
from fasthpm.entry import Result
from fasthpm.errors import UserError, nearest
from fasthpm.exchange.forms import FORMS, Form
from fasthpm.exchange.forms import TOLERANCE as TOLERANCE
from fasthpm.mask import num_masked
from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe

IMAGES = 2  # of the fixed input


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """What was written."""

    path: Path
    format: str
    difference: float  # of the library's outputs from ours, over our largest
    usage: str  # the line of Python that loads it


def default_form(model: HPMViT) -> str:
    """timm's for images; timm's ViT has no clips and no relative positions: such a model is kept under our names."""
    return "safetensors" if is_kept_whole(model) else "timm"


def is_kept_whole(model: HPMViT) -> bool:
    """Whether the default form is the whole model under our names."""
    return model.video or model.positions == "relative"


def named_form(name: str) -> Form:
    """The form of that name. **Raises:** `UserError` naming the nearest."""
    if name not in FORMS:
        raise UserError(f"unknown format {name!r}{nearest(name, FORMS)}; expected one of {', '.join(FORMS)}")
    return FORMS[name]


def export_weights(
    model: HPMViT, recipe: Recipe, path: Path, form: str = "", info: dict[str, Any] | None = None
) -> float:
    """Write `model` to `path` in a form of `FORMS`, if its library computes what we compute.

    - `form`: its name; empty = `default_form`
    - `info`: goes into the file's metadata, each value as JSON ("mean" and "std": of the data, [C] each, of 0..1, or
      where "dtype" is not uint8 of what is stored)

    **Returns:** the largest difference of outputs, over the largest output.
    **Raises:** `UserError` for a model that the library lacks, for weights that are not finite and for a path that
    cannot be written. `RuntimeError` if the outputs differ; nothing is left at `path`.
    """
    chosen = named_form(form or default_form(model))
    _check(chosen, model, path)
    metadata = {"recipe": recipe.recipe, "model": recipe.model, **{k: json.dumps(v) for k, v in (info or {}).items()}}
    with files.writing(path, "choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as aside:
            chosen.write(model, recipe, metadata, aside)
            difference, allowed = compare(chosen, model, recipe, aside)
            if not difference <= allowed:
                raise RuntimeError(
                    f"{chosen.library}'s outputs differ from ours by {difference:.1e} (allowed: {allowed:.0e}); "
                    f"{path} was not written"
                )
    return difference


@torch.no_grad()
def compare(form: Form, model: HPMViT, recipe: Recipe, path: Path) -> tuple[float, float]:
    """Largest difference between the outputs of what was written and ours, over our largest output, in float64; and the
    largest that is allowed."""
    generator = torch.Generator().manual_seed(0)
    frames = (model.num_frames,) if model.video else ()
    size = (IMAGES, model.in_chans, *frames, *model.img_size)
    images = torch.randn(size, generator=generator, dtype=torch.float64)
    masked = num_masked(model.num_patches, recipe.mask_ratio)
    mask = torch.rand(IMAGES, model.num_patches, generator=generator).argsort(1) < masked
    exact = copy.deepcopy(model).double().eval()
    ours = form.ours(exact, images, mask)
    try:
        theirs = form.theirs(path, images, mask)
    except OSError as error:
        raise RuntimeError(f"{form.library} cannot read what was written for it ({error})") from error
    return float((theirs - ours).abs().max() / ours.abs().max()), form.allowed(exact, images, mask)


def _check(form: Form, model: HPMViT, path: Path) -> None:
    """Refuse what cannot become a file of this form, before anything is written."""
    if (kind := "video" if model.video else "image") not in form.takes:
        others = ", ".join(name for name, other in FORMS.items() if kind in other.takes)
        what = f"{form.library} has no video ViT like this one" if model.video else "this model takes images"
        raise UserError(f"--format {form.name} is not for {kind} models: {what}; use one of {others}")
    if model.positions == "relative" and not form.relative:
        others = ", ".join(name for name, other in FORMS.items() if other.relative)
        raise UserError(f"--format {form.name} has no relative positions, this model has; use one of {others}")
    if refusal := form.refusal(model):
        raise UserError(f"--format {form.name} needs {refusal}; use --format timm, which takes any")
    if not form.folder and path.suffix != (suffix := Path(form.default).suffix):
        raise UserError(f"output {path} must end in {suffix} for --format {form.name}")
    if path.is_dir() or (form.folder and path.exists()):
        raise UserError(f"output {path} is there already; remove it, or choose another --output")
    broken = [key for key, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(f"weights {broken[:3]} are not finite; export an earlier checkpoint")


def _refuse_missing_decoder(run: Path, model: HPMViT, form: Form) -> None:
    """An encoder that was imported alone has a decoder of random weights, which nobody wants to receive."""
    if form.whole and lacks_decoder(checkpoint_of(run)):
        kind = "video" if model.video else "image"
        others = ", ".join(name for name, other in FORMS.items() if kind in other.takes and not other.whole)
        raise UserError(
            f"{run} was imported without a decoder and --format {form.name} takes it along; use one of {others}"
        )


def main(argv: Arguments = None) -> ExportResult:
    """`fasthpm export` and `fasthpm.export`."""
    formats = "\n".join(f"  {name:12} {form.summary}" for name, form in FORMS.items())
    parser = Parser(prog="fasthpm export", description=__doc__, epilog=f"formats:\n{formats}")
    parser.add_argument("run", type=Path, help="output_dir of a run or an import, or one of its checkpoints")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument(
        "--format", choices=tuple(FORMS), default="", help="see below (default: timm, of a video model safetensors)"
    )
    parser.add_argument("-o", "--output", type=Path, help="file, or folder for hf_… (default: encoder.safetensors, …)")
    arguments = parser.parse_args(argv)
    if arguments.output and not arguments.output.is_dir():  # of a folder, the form tells more
        files.check_place(arguments.output, "output", sources=saved_files(arguments.run))
    model, recipe = load_weights(arguments.run, arguments.weights)
    form = named_form(arguments.format or default_form(model))
    path = arguments.output or Path(form.default)
    _refuse_missing_decoder(arguments.run, model, form)
    info = {"weights": arguments.weights, **(model.pixels.as_json() if model.pixels else {})}
    difference = export_weights(model, recipe, path, form.name, info)
    what = "model" if form.whole else "encoder"
    print(f"{path}: {what} of {arguments.run} ({arguments.weights}); {form.verdict(difference)}")
    print(f"load it with: {form.usage(path)}")
    if "mean" in info:
        dtype = info.get("dtype", "uint8")
        log = ", log(1 + x) of the files" if "log" in info else ""
        scale = "0..1" if dtype == "uint8" else f"as stored ({dtype}{log})"
        gaps = f"; nodata {info['nodata']} becomes 0 there" if "nodata" in info else ""
        print(f"images: {scale}, then mean {info['mean']}, std {info['std']}{gaps}")
    return ExportResult(path, form.name, difference, form.usage(path))
