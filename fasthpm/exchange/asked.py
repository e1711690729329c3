"""What an import is asked for: flags that the file has no use for and folders of something else are refused."""

from pathlib import Path
from typing import Any

from fasthpm.checkpoint.weights import OF_A_RUN
from fasthpm.cli import without_effect
from fasthpm.errors import UserError
from fasthpm.files import check_above

OF_CLIPS = ("num_frames", "sampling_rate")
OF_PIXELS = ("decoder_heads", "norm_pix_loss")  # of decoders that predict them


def check_given(given: dict[str, Any], *, video: bool, pixels: bool, encoder_only: bool) -> None:
    """Refuse recipe fields that would land in recipe.json and say nothing about the weights.

    - `given`: those that the user gave; `video`: whether the model takes clips
    - `pixels`: whether a decoder in the file predicts pixels or features; `encoder_only`: whether it is left out

    **Raises:** `UserError` that names the first of them.
    """
    reasons = dict.fromkeys(() if video else OF_CLIPS, "the file is of a model of images")
    reasons |= dict.fromkeys(() if pixels else OF_PIXELS, "the file has no decoder of pixels")
    reasons |= dict.fromkeys((*OF_PIXELS, "mask_ratio") if encoder_only else (), "the encoder alone is taken")
    for name, because in reasons.items():
        without_effect([name], because, given)


def check_folder(output_dir: Path) -> None:
    """Refuse an output_dir in which something is: checkpoints, or what a run, a tuning or a probe has begun.

    What evaluations of an import and a killed import have left there is no hindrance.

    **Raises:** `UserError` that names what is there.
    """
    if any((output_dir / "checkpoints").glob("step-*")):
        raise UserError(f"output {output_dir} holds checkpoints already; choose another --output")
    for name in OF_A_RUN:
        if (output_dir / name).is_file():
            raise UserError(f"output {output_dir} is of another run, whose {name} is there; choose another --output")
    if output_dir.is_file():
        raise UserError(f"output {output_dir} is a file, and a folder is written; choose another --output")
    check_above(output_dir, "--output")
