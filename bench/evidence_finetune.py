"""The fine-tune column of `bench.evidence`: one short `fasthpm finetune` per finished run, on the probes' images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import say
from data_prep.encode import WriteOptions
from data_prep.fashion_mnist import Arrays
from data_prep.writer import write_beton
from fasthpm.data import build_loader
from fasthpm.data.ffcv.beton import read_sidecar
from fasthpm.errors import UserError

BATCH, LR = 64, 2e-3  # [ours] a short schedule needs larger steps than the preset's


def subset_path(folder: Path, count: int) -> Path:
    """Where `labelled_subset` keeps its set."""
    return folder / f"labelled-{count}.beton"


def labelled_subset(train: Path, count: int, folder: Path) -> Path:
    """A set of the first `count` stored images of `train`, which the probes learn from; made unless it is there."""
    out = subset_path(folder, count)
    if out.is_file():
        return out
    info = read_sidecar(train)
    size = (info["max_height"], info["max_width"])
    loader: Any = build_loader(
        train, batch_size=1, image_size=size, channels=info["channels"], train=False, num_workers=1
    )
    try:
        if count > loader.info.num_samples:
            raise UserError(f"bank is {count}, and {train} has {loader.info.num_samples} images; use fewer")
        ids = np.arange(count)
        pixels = [loader.stored(int(sample)) for sample in ids]
        labels, classes = loader.labels_of(ids), loader.info.classes
    finally:
        loader.close()
    lost = [sample for sample, image in enumerate(pixels) if image is None]
    if lost:
        raise UserError(f"{train}: sample {lost[0]} does not decode; copy or prepare it again")
    images = np.stack(pixels)
    if images.shape[3] == 1:
        images = images[..., 0]
    folder.mkdir(parents=True, exist_ok=True)
    options = WriteOptions(write_mode="raw")
    write_beton(Arrays(images, labels), out, classes, options=options, num_workers=1, overwrite=True)
    return out


def command(run: Path, train: Path, val: Path, out: Path, *, epochs: int, seed: int, from_scratch: bool) -> list[str]:
    """`fasthpm finetune`'s command line of one cell: the small preset."""
    flags = {
        "train_path": train,
        "val_path": val,
        "output_dir": out,
        "preset": "small",
        "epochs": epochs,
        "warmup_epochs": epochs / 10,
        "lr": LR,
        "batch_size": BATCH,
        "global_batch_size": BATCH,
        "eval_every": epochs,
        "save_every": epochs,
        "num_workers": 1,
        "seed": seed,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fasthpm", "finetune", str(run), *words, *["--from_scratch"] * from_scratch]


def place(run: Path, train: Path, epochs: int, *, from_scratch: bool = False) -> Path:
    """Where a fine-tuning is kept."""
    return run / f"{'scratch' if from_scratch else 'finetune'}-{train.stem}-{epochs}"


def done(out: Path) -> float | None:
    """Top-1 in percent of the fine-tuning in `out`; None if it has not ended."""
    path = out / "result.json"
    return float(json.loads(path.read_text())["accuracy"]) if path.is_file() else None


def finetuned(
    run: Path, train: Path, val: Path, *, epochs: int, seed: int, threads: int, from_scratch: bool = False
) -> float:
    """Top-1 in percent after fine-tuning `run`'s encoder; what is done already is read, not done again.

    **Raises:** `UserError` if the fine-tuning fails.
    """
    out = place(run, train, epochs, from_scratch=from_scratch)
    if done(out) is None:
        say(f"fine-tuning {run.name}{', from scratch' if from_scratch else ''}")
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONWARNINGS": "ignore"}
        words = command(run, train, val, out, epochs=epochs, seed=seed, from_scratch=from_scratch)
        with (run / "finetune.txt").open("ab") as log:
            status = subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode
        if status:
            raise UserError(f"fine-tuning {run} failed with status {status}; see {run / 'finetune.txt'}")
    accuracy = done(out)
    assert accuracy is not None
    return accuracy
