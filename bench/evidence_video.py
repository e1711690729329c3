"""Does the mask matter on video? HPM against tube and random masks on moving garments: equal updates, several seeds.

    python -m bench.evidence_video --data data/moving_fashion --work runs/evidence_video [--seeds 3] [--epochs 20]
        [-o bench/results/evidence_video.json]

One process per run, through the public training path with the video demo's recipe; seeds take turns with methods, so
that a table stopped early is still fair. Finished runs are kept under --work and skipped when the command is given
again; an interrupted one resumes. The JSON and the Markdown beside it are rewritten after every run.

Probes: clips from the middle of the videos, mean of the patch tokens; the training clips vote (k-NN of DINO, best k) or
train a multinomial logistic regression on standardised features.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import fast_config, json_file, machine, table, write_json
from bench.evidence import (
    PAPERS,
    RESULT,
    check_complete,
    fill_table,
    last_metrics,
    linear_accuracy,
    ran_one,
    require_positive,
    start,
    summarise,
    write_both,
)
from fasthpm.checkpoint.weights import load_weights
from fasthpm.cli import Parser, run_command
from fasthpm.data import build_loader
from fasthpm.errors import UserError
from fasthpm.patches import patches_for
from fasthpm.probes import knn

METHODS: dict[str, dict[str, Any]] = {
    "videomae": {"model": "videomae_vit_nano_patch8_32", "mask_policy": "tube", "predict_loss": "none"},
    "tube": {"mask_policy": "tube"},
    "random": {"mask_policy": "random"},
    "hpm": {},
    "hpm_tube": {"mask_policy": "hpm_tube"},
}
TITLES = {
    "untrained": "untrained encoder",
    "videomae": "VideoMAE: tubes, no loss predictor",
    "tube": "tubes + difficulty loss",
    "random": "random + difficulty loss",
    "hpm": "HPM, every slot on its own",
    "hpm_tube": "HPM in tubes",
}
PROBES = ("knn", "linear")
BASELINE = "random"  # what the paired differences are taken against; its runs probe the untrained encoder, too
SETTINGS = ("epochs", "steps_per_epoch", "batch_size", "extra")
ENCODE_BATCH = 100


# ------------------------------------------------------------------------------------------------------ one run
def train_flags(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> list[str]:
    """`fasthpm pretrain`'s command line for one cell of the table."""
    pairs = {
        "epochs": arguments.epochs,
        "steps_per_epoch": arguments.steps_per_epoch,
        "ema_ramp_epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "global_batch_size": arguments.batch_size,
        "save_every": arguments.epochs,
        "panel_every": 0,
        "data_path": arguments.data / "train",
        "output_dir": out,
        "seed": seed,
        "num_workers": 1,
        "deepspeed_config": arguments.deepspeed_config,
        **PAPERS,
        **METHODS[method],
    }
    flags = [part for name, value in pairs.items() for part in (f"--{name}", str(value))]
    return ["--recipe", "hpm_video_demo", *flags, *arguments.extra.split()]


def run_one(arguments: argparse.Namespace, method: str, seed: int, out: Path) -> None:
    """Train and probe one cell in this process, and write its figures to OUT/evidence.json last of all."""
    from fasthpm import pretrain

    begin = time.perf_counter()
    pretrain.main(train_flags(arguments, method, seed, out))
    check_complete(arguments, out)
    result = {
        "method": method,
        "seed": seed,
        "settings": settings_of(arguments),
        "probes": probe(arguments, out, "student"),
        "seconds": time.perf_counter() - begin,
        "last": last_metrics(out),
    }
    if method == BASELINE:
        result["untrained"] = probe(arguments, out, "untrained")
    write_json(out / RESULT, result)


def probe(arguments: argparse.Namespace, out: Path, weights: str) -> dict[str, float]:
    """Every accuracy of `PROBES`, in percent."""
    bank, bank_labels = encode(arguments.data / "train", out, weights)
    queries, labels = encode(arguments.data / "val", out, weights)
    rows = [F.normalize(side, dim=1) for side in (bank, queries)]
    votes = knn.knn_accuracy(rows[0], bank_labels, rows[1], labels, int(bank_labels.max()) + 1)
    return {"knn": max(votes.values()), "linear": linear_accuracy(bank, bank_labels, queries, labels)}


@torch.no_grad()
def encode(path: Path, out: Path, weights: str) -> tuple[Tensor, Tensor]:
    """Mean of the patch tokens of every clip, float32 [N, D], and labels [N]."""
    model, recipe = load_weights(out, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    loader = build_loader(path, recipe.loader_options(batch_size=ENCODE_BATCH, train=False, num_workers=1))
    patches_of = patches_for(model, recipe, loader)
    rows, labels = [], []
    try:
        for batch in loader:
            rows.append(model.encode(patches_of(batch.images.to(device))).float().mean(dim=1))
            labels.append(batch.labels.to(device))
    finally:
        loader.close()
    return torch.cat(rows), torch.cat(labels)


# ------------------------------------------------------------------------------------------------------ the table
def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every run of a table shares."""
    return {name: getattr(arguments, name) for name in SETTINGS}


def markdown(result: dict[str, Any]) -> str:
    """The table, as it stands in `results/`."""
    settings, rows = result["settings"], []
    for method, row in result["summary"].items():
        cells = [f"{row[p]['mean']:.1f} ± {row[p]['std']:.1f}" for p in PROBES]
        gains = [
            f"{row['gain'][p]['mean']:+.1f} ± {row['gain'][p]['std']:.1f}" if "gain" in row else "" for p in PROBES
        ]
        rows.append([TITLES[method], str(len(row["seeds"])), *cells, *gains])
    heads = ("masks", "seeds", "k-NN", "linear", f"k-NN, less {BASELINE}", f"linear, less {BASELINE}")
    updates = settings["epochs"] * settings["steps_per_epoch"]
    about = (
        f"Top-1 in percent on classes of motion, mean ± standard deviation over seeds; {updates:,} updates of "
        f"{settings['batch_size']} clips, the video demo's nano ViT, moving Fashion-MNIST. The paper, ViT-B on SSv2, "
        f"400 epochs, fine-tuned: VideoMAE 66.86 < HPM 68.02."
    )
    return "\n\n".join(["# Masks compared on moving garments", about, table(heads, rows)]) + "\n"


def write_tables(arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """JSON and Markdown of the runs that are there, each replaced as a whole."""
    made = json.loads((arguments.data / "made.json").read_text()) if (arguments.data / "made.json").is_file() else {}
    result = {
        "settings": settings_of(arguments),
        "machine": machine(),
        "data": made,
        "summary": summarise(runs, TITLES, PROBES, BASELINE),
        "runs": list(runs),
    }
    write_both(arguments.output, result, markdown(result))


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="bench.evidence_video", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/moving_fashion"), help="has the sets train and val")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence_video"), help="where the runs are kept")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["tube", "random", "hpm"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=20, help="of steps_per_epoch updates each")
    parser.add_argument("--steps_per_epoch", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--extra", default="", help="further flags of every run, as one string")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in a run")
    parser.add_argument("--deepspeed_config", default=fast_config())
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # METHOD:SEED, in the process started for it
    parser.add_argument("-o", "--output", type=json_file, default=Path("bench/results/evidence_video.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence_video`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(given)
    if ran_one(arguments, run_one):
        return
    require_positive(arguments, ("seeds", "epochs", "steps_per_epoch", "batch_size", "threads"))
    if not (arguments.data / "val" / "info.json").is_file():
        raise UserError(f"{arguments.data} has no prepared set val; make it with python -m data_prep.moving_fashion")
    fill_table(
        arguments,
        settings_of(arguments),
        start_one=lambda method, seed: start(arguments, given, method, seed, "bench.evidence_video"),
        write=lambda runs: write_tables(arguments, runs),
    )


if __name__ == "__main__":
    run_command(main)
