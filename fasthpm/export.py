"""Write a run's encoder as safetensors that timm loads, and check that timm computes the same.

fasthpm export RUN [-o encoder.safetensors] [--weights student|teacher]
timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path="encoder.safetensors")
"""

from collections.abc import Sequence
from pathlib import Path

import timm.models
import torch
from safetensors.torch import load_file

from fasthpm.checkpoint import export_encoder, load_weights
from fasthpm.cli import Parser
from fasthpm.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm export`."""
    parser = Parser(prog="fasthpm export", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument("-o", "--output", type=Path, default=Path("encoder.safetensors"))
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"output {arguments.output} must end in .safetensors")
    model, recipe = load_weights(arguments.run, arguments.weights)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    keywords = export_encoder(model, recipe, {"weights": arguments.weights}, arguments.output)
    images = torch.randn(2, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(0))
    vit = timm.models.VisionTransformer(**keywords).eval()
    vit.load_state_dict(load_file(arguments.output))
    with torch.no_grad():
        difference = float((vit.forward_features(images) - model.encode(images)).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"timm's output differs from ours by {difference:.1e}")
    print(f"{arguments.output}: encoder of {arguments.run} ({arguments.weights}); timm agrees within {difference:.1e}")
