"""Do 16 bits matter? Garments that are fainter than a step of 8 bits: k-NN on the values as they are, and on 8 bits.

    python -m bench.evidence_sixteen_bits [--source DIR] [--work runs/sixteen_bits] [--train 3000] [--val 1000]
        [--epochs 3] [-o bench/results/sixteen_bits.json]

Every picture is a 16-bit PNG of 28 x 28 pixels: an even ground of 99, 100 or 101 steps of 257, drawn for each, and on
it a garment of Fashion-MNIST at half its strength, 0 to 127. A step of 8 bits is 257, so that 8 bits keep the ground
and nothing else. The same files become a set of 16 bits and, by `--values 8bit`, one of 8; each gets a pretraining by
`hpm_demo`'s recipe and k-NN, before and after. Chance is 10 %.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.common import cpu_seconds, json_file, machine, say, table
from bench.evidence import require_positive, write_both
from data_prep import fashion_mnist, images
from fasthpm import pretrain
from fasthpm.cli import Parser, run_command
from fasthpm.data.sampling import Array
from fasthpm.probes import knn

STEP = 257  # of 16 bits, that are one of 8
GROUNDS = (99, 100, 101)  # of 8 bits
BATCH = 64
BITS = {"16": (), "8": ("--values", "8bit")}
WEIGHTS = ("untrained", "student")


def picture(garment: Array, rng: np.random.Generator) -> Array:
    """A garment, uint8 [h, w], on a ground of its own: uint16 [h, w]."""
    return np.uint16(STEP * int(rng.choice(GROUNDS))) + (garment // 2).astype(np.uint16)


def write_files(source: Path, split: str, count: int, folder: Path) -> None:
    """`count` pictures of a split as PNG files in class folders."""
    garments, labels = fashion_mnist.read_split(split, source)
    rng = np.random.default_rng(0 if split == "train" else 1)
    for number in range(count):
        path = folder / f"class{labels[number]}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(garments[number], rng)).save(path)


def prepare(arguments: argparse.Namespace) -> None:
    """Files and sets, unless they are there."""
    for split in ("train", "val"):
        folder = arguments.work / split
        if not folder.is_dir():
            write_files(arguments.source, split, getattr(arguments, split), folder)
        for bits, flags in BITS.items():
            out = arguments.work / f"{split}{bits}.beton"
            if not out.is_file():
                images.main([str(folder), str(out), "--write_mode", "raw", "--num_workers", "1", *flags])


def measure(arguments: argparse.Namespace, bits: str) -> dict[str, Any]:
    """k-NN of the set of so many bits, before and after a pretraining."""
    begin, work = cpu_seconds(), arguments.work
    run, train, val = work / f"run{bits}", work / f"train{bits}.beton", work / f"val{bits}.beton"
    flags = {"data_path": train, "output_dir": run, "epochs": arguments.epochs, "steps_per_epoch": 0, "seed": 0}
    flags |= {"batch_size": BATCH, "global_batch_size": BATCH, "num_workers": 1, "panel_every": arguments.epochs}
    flags["deepspeed_config"] = "zero1_fp32"
    say(f"{bits} bits")
    pretrain.main({"recipe": "hpm_demo", **flags})
    found = knn.main(
        {"run": run, "train_path": train, "val_path": val, "weights": WEIGHTS, "pool": "mean", "num_workers": 1}
    )
    best = {name: max(accuracy.values()) for (name, _), accuracy in found.accuracies.items()}
    return {"bits": int(bits), **best, "cpu_seconds": cpu_seconds() - begin}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, as it stands in `results/`."""
    cells = [[str(row["bits"]), *(f"{row[name]:.1f}" for name in WEIGHTS)] for row in rows]
    about = "Garments below the 8-bit step, k-NN top-1 in percent (best k, mean of the patches); chance is 10."
    return "\n\n".join(["# Sixteen bits", about, table(("bits", *WEIGHTS), cells)]) + "\n"


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="bench.evidence_sixteen_bits", description=__doc__)
    parser.add_argument("--source", type=Path, default=fashion_mnist.DEBIAN, help="folder of Fashion-MNIST's files")
    parser.add_argument("--work", type=Path, default=Path("runs/sixteen_bits"), help="where sets and runs are kept")
    parser.add_argument("--train", type=int, default=3000, help="pictures to train on, which vote")
    parser.add_argument("--val", type=int, default=1000, help="pictures that are classified")
    parser.add_argument("--epochs", type=int, default=3, help="of the pretrainings")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("-o", "--output", type=json_file, default=Path("bench/results/sixteen_bits.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.evidence_sixteen_bits`."""
    arguments = build_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    require_positive(arguments, ("train", "val", "epochs", "threads"))
    torch.set_num_threads(arguments.threads)
    begin = time.perf_counter()
    prepare(arguments)
    rows = [measure(arguments, bits) for bits in BITS]
    settings = {name: getattr(arguments, name) for name in ("train", "val", "epochs")}
    result = {"settings": settings, "machine": machine(), "rows": rows, "seconds": time.perf_counter() - begin}
    write_both(arguments.output, result, markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    run_command(main)
