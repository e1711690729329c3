"""The papers' pilot experiment (TPAMI, Tab. IX) at our scale: do hard patches tell more about the class?

    python -m bench.pilot --run runs/demo --train_path TRAIN.beton --val_path VAL.beton [--seeds 0 1 2]

A small ViT is trained from scratch on half the patches of every image, which a pretrained model's predicted difficulty
chooses: at random, the easiest, or the hardest; everything else is the same. One process per training; what is done
already with the same settings is not done again, so that a killed bench goes on. Writes OUT/pilot.json and pilot.md.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError
from fasthpm.files import check_above, read_json
from fasthpm.probes.finetune.settings import BY_DIFFICULTY
from fasthpm.probes.result import write_text
from fasthpm.probes.tokens import POLICIES

PAPER = {"easiest": 78.7, "random": 79.1, "hardest": 79.8}  # ViT-B/16, ImageNet-1K, 100 epochs


def settings_of(args: Any, policy: str, seed: int) -> dict[str, Any]:
    """What one training is asked for, by the names of `fasthpm finetune`'s flags; all but where it writes."""
    return {
        "train_path": args.train_path,
        "val_path": args.val_path,
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


def command(args: Any, policy: str, seed: int, folder: Path) -> list[str]:
    """The command of one training."""
    flags = {**settings_of(args, policy, seed), "output_dir": folder}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fasthpm", "finetune", str(args.run), "--from_scratch", *words]


def finished(args: Any, policy: str, seed: int) -> float | None:
    """Top-1 accuracy in percent of a training that an earlier call did; None if it has to run.

    **Raises:** `UserError` if its result is of other settings, or does not say of which.
    """
    path = args.out / f"{policy}_{seed}" / "result.json"
    if not path.is_file():
        return None
    result = read_json(path)
    made = result.get("settings", {})
    for name, value in {**settings_of(args, policy, seed), "from_scratch": True}.items():
        if not _same(made.get(name), value):
            raise UserError(
                f"{path} was made with {name} {made.get(name, '(it does not say which)')}, not {value}; use "
                f"another --out, or the same settings"
            )
    return float(result["accuracy"])


def _same(made: Any, asked: Any) -> bool:
    """Whether two settings are equal; a path is, however it was spelled."""
    if isinstance(made, str) and isinstance(asked, str | Path):
        return made == str(asked) or os.path.realpath(made) == os.path.realpath(asked)
    return bool(made == asked)


def measure(args: Any, policy: str, seed: int) -> float:
    """Top-1 accuracy in percent of one training, which an earlier call may have done."""
    folder = args.out / f"{policy}_{seed}"
    if (accuracy := finished(args, policy, seed)) is None:
        print(f"training on the {policy} {args.keep_tokens:.0%}, seed {seed}", file=sys.stderr, flush=True)
        status = subprocess.run(command(args, policy, seed, folder), stdout=subprocess.DEVNULL, check=False).returncode
        accuracy = finished(args, policy, seed)
        if status or accuracy is None:
            raise UserError(f"the training in {folder} failed with status {status}, see above")
    return accuracy


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
    if args.out.is_file():
        raise UserError(f"--out is {args.out}, which is a file, and a folder is written; choose another")
    check_above(args.out, "--out")
    cells = [(seed, policy) for seed in args.seeds for policy in POLICIES]
    for seed, policy in cells:  # results of other settings are refused before hours are spent on the rest
        finished(args, policy, seed)
    found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for seed, policy in cells:
        found[policy].append(measure(args, policy, seed))
        done = {name: values for name, values in found.items() if values}
        write_text(args.out / "pilot.json", json.dumps({"seeds": args.seeds, "accuracy": done}, indent=2) + "\n")
        write_text(args.out / "pilot.md", table(done))
    print(table(found))


if __name__ == "__main__":
    run_command(main)
