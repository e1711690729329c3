"""`fasthpm COMMAND …`, the same as `python -m fasthpm COMMAND …`."""

import importlib
import sys
from collections.abc import Sequence

from fasthpm.cli import run_rank
from fasthpm.errors import UserError, nearest

COMMANDS = {
    "pretrain": ("fasthpm.pretrain", "pretrain a model (one process; use deepspeed or torchrun for more)"),
    "knn": ("fasthpm.probes.knn", "k-NN accuracy of a run's encoder"),
    "linear": ("fasthpm.probes.linear", "linear probe of a run's encoder"),
    "finetune": ("fasthpm.probes.finetune", "fine-tune a run's encoder on labelled images"),
    "import": ("fasthpm.exchange.importing", "make a run of an HPM, MAE or AMT checkpoint"),
    "export": ("fasthpm.exchange.exporting", "write a run's weights for timm, torchvision or Hugging Face"),
    "visualize": ("fasthpm.pictures.visualize", "pictures: image, reconstruction, true and predicted loss, mask"),
    "maps": ("fasthpm.pictures.map_images", "difficulty maps of any images, and the images ranked by them"),
    "recipes": ("fasthpm.recipes.listing", "list the recipes, show one, compare two"),
    "report": ("fasthpm.pictures.report", "report.md and curves of a run"),
    "doctor": ("fasthpm.commands.doctor", "what this machine is, what is installed, and what bounds training"),
}


def dispatch(argv: Sequence[str] | None) -> None:
    """Run the command that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: fasthpm COMMAND [flags]\n\n"
            + "\n".join(f"  {k:10} {v[1]}" for k, v in COMMANDS.items())
            + "\n\nfasthpm COMMAND --help explains each"
        )
        return
    if arguments[0] not in COMMANDS:
        raise UserError(
            f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; expected one of {', '.join(COMMANDS)}"
        )
    importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


def main() -> None:
    """Entry point of the `fasthpm` script."""
    run_rank(dispatch)  # most commands may be one rank of several


if __name__ == "__main__":
    main()
