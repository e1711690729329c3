"""The papers' pilot experiment (TPAMI, Tab. IX) at our scale: do hard patches tell more about the class?

    python -m bench.pilot --run runs/demo --train_path TRAIN.beton --val_path VAL.beton [--seeds 0 1 2]

A small ViT is trained from scratch on half the patches of every image, which a pretrained model's predicted difficulty
chooses: at random, the easiest, or the hardest; everything else is the same. One process per training; what is done
already is not done again, so that a killed bench goes on. Writes OUT/pilot.json and pilot.md.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.probes.finetune.settings import BY_DIFFICULTY
from fasthpm.probes.result import write_text
from fasthpm.probes.tokens import POLICIES

PAPER = {"easiest": 78.7, "random": 79.1, "hardest": 79.8}  # ViT-B/16, ImageNet-1K, 100 epochs


def command(args: Any, policy: str, seed: int, folder: Path) -> list[str]:
    """The command of one training."""
    flags = {
        "train_path": args.train_path,
        "val_path": args.val_path,
        "output_dir": folder,
        "token_policy": policy,
        "keep_tokens": args.keep_tokens,
        **({"difficulty_run": args.run} if policy in BY_DIFFICULTY else {}),
        "seed": seed,
        "epochs": args.epochs,
        "warmup_epochs": args.epochs / 10,
        "stop_after": 0,
        "eval_every": args.epochs,
        "save_every": args.epochs,
        "num_workers": 1,
        "batch_size": args.batch_size,
        "global_batch_size": args.batch_size,
        "log_every": 100,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fasthpm", "finetune", str(args.run), "--from_scratch", *words]


def measure(args: Any, policy: str, seed: int) -> float:
    """Top-1 accuracy in percent of one training, which an earlier call may have done."""
    folder = args.out / f"{policy}_{seed}"
    if not (folder / "result.json").is_file():
        print(f"training on the {policy} {args.keep_tokens:.0%}, seed {seed}", file=sys.stderr, flush=True)
        finished = subprocess.run(command(args, policy, seed, folder), stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            raise UserError(f"the training in {folder} failed with status {finished.returncode}, see above")
    return float(json.loads((folder / "result.json").read_text())["accuracy"])


def table(found: dict[str, list[float]]) -> str:
    """Markdown: mean, spread and single values per policy, beside the paper's."""
    rows = []
    for policy, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        single = ", ".join(f"{value:.2f}" for value in values)
        rows.append(f"| {policy} | {statistics.mean(values):.2f} | {spread:.2f} | {single} | {PAPER[policy]} |")
    head = "| tokens | top-1 | standard deviation | seeds | paper, ViT-B/16 on ImageNet |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table."""
    parser = Parser(prog="python -m bench.pilot", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="pretrained run with a loss predictor")
    parser.add_argument("--train_path", required=True)
    parser.add_argument("--val_path", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1, help="of every training (default: 1, of all images)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--keep_tokens", type=float, default=0.5)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/pilot"), help="folder (default: runs/pilot)")
    args = parser.parse_args(argv)
    found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for seed in args.seeds:
        for policy in POLICIES:
            found[policy].append(measure(args, policy, seed))
            done = {name: values for name, values in found.items() if values}
            write_text(args.out / "pilot.json", json.dumps({"seeds": args.seeds, "accuracy": done}, indent=2) + "\n")
            write_text(args.out / "pilot.md", table(done))
    print(table(found))


if __name__ == "__main__":
    run_command(main)
