"""Features of any images or videos, as NumPy arrays: of a run, of an exported encoder, of a timm model.

    fasthpm embed RUN --data_path photos/ -o features.npz
    fasthpm embed encoder.safetensors --data_path val.beton -o features.npz         # written by fasthpm export
    fasthpm embed vit.safetensors --timm vit_base_patch16_224 --data_path val.beton -o features.npz
    fasthpm embed RUN --data_path train.beton --features patches --dtype float16 -o patches.npy

features.npz holds features [N, D] (patches: [N, L, D]) in the set's order, labels and ids [N], classes, names (the
files, where the set knows them), and info, a JSON text: which weights, how pooled, normalised and read. A .npy holds
the features alone, to be opened without reading it (np.load(…, mmap_mode="r")); the rest is beside it in .info.npz.
Both are written while they are computed, so that a larger set needs no more memory.

Images are resized and cropped as for fasthpm knn: 224/256 of the short side, or whole where they are stored at the
model's size; of a video, the clip in its middle. Features are not L2-normalised. --normalize: by mean and std of what
the model was trained on, as the probes do (the default, where they are known), or of the data itself. One process, one
GPU.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fasthpm import files
from fasthpm.checkpoint import saved_files
from fasthpm.cli import Arguments, Parser
from fasthpm.data import DatasetInfo, Loader, build_loader
from fasthpm.data.names import known_names, stored_in
from fasthpm.entry import Result
from fasthpm.errors import UserError
from fasthpm.probes import encoders
from fasthpm.probes.encoders import Encoder
from fasthpm.probes.features import pooled
from fasthpm.run.versions import versions

FEATURES = ("cls", "mean", "patches")
ARCHIVE, ARRAY = ".npz", ".npy"


@dataclass(frozen=True, repr=False)
class EmbedResult(Result):
    """What was written."""

    path: Path
    shape: tuple[int, ...]  # [N, D], or [N, L, D]
    dtype: str
    features: str  # cls, mean or patches
    info: Path  # where labels, ids, classes and names are
    usage: str  # the line of Python that loads the features


# -------------------------------------------------------------------------------------------------- computing
@torch.inference_mode()
def feature_batches(
    encoder: Encoder, loader: Loader, info: DatasetInfo, features: str, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(features float32 [B, D] or [B, L, D], labels [B], ids [B]) of a whole set in order, on the CPU."""
    with tqdm(total=info.num_samples, desc=f"{features} features", unit="sample", mininterval=0.5) as progress:
        for batch in loader:
            rows = pooled(encoder.tokens(batch.images.to(device), info), features, encoder.prefix)
            rows = (encoder.norm_of_mean(rows) if features == "mean" else rows).float().cpu()
            yield rows, batch.labels.cpu(), batch.ids.cpu()
            progress.update(len(rows))


def features_of(encoder: Encoder, asked: str) -> str:
    """What is taken of the tokens. **Raises:** `UserError` for a cls token that is not there."""
    if asked == "cls" and not encoder.has_cls:
        raise UserError(f"--features cls: {encoder.name} has no cls token; use --features mean, its default")
    return asked or encoder.default


# -------------------------------------------------------------------------------------------------- writing
class Columns:
    """Writes the rows that pass and keeps what goes beside them."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.labels: list[NDArray[Any]] = []
        self.ids: list[NDArray[Any]] = []

    def write(self, file: IO[bytes], shape: tuple[int, ...], batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        """The features as .npy, batch by batch.

        **Raises:** `UserError` for features that are not finite; `RuntimeError` for samples out of order.
        """
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows, labels, ids in batches:
            with np.errstate(over="ignore"):
                values = rows.numpy().astype(self.dtype)
            if not np.isfinite(values).all():
                raise UserError(
                    f"features of samples {int(ids.min())} to {int(ids.max())} are not finite in {self.dtype}; use "
                    f"--dtype float32, or an earlier checkpoint"
                )
            file.write(values.tobytes())
            self.labels.append(labels.numpy())
            self.ids.append(ids.numpy())
        if not np.array_equal(np.concatenate(self.ids), np.arange(shape[0])):
            raise RuntimeError("the loader gave samples twice, not at all, or out of order")

    def beside(self, info: DatasetInfo, names: list[str], made_with: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """What goes with the features."""
        found = {
            "labels": np.concatenate(self.labels),
            "ids": np.concatenate(self.ids),
            "classes": np.array(info.classes, dtype=np.str_),
            "info": np.array(json.dumps(made_with)),
        }
        return {**found, "names": np.array(names)} if names else found


def write_arrays(archive: zipfile.ZipFile, arrays: dict[str, NDArray[Any]]) -> None:
    """Further arrays of a .npz."""
    for name, array in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)


def info_path(path: Path) -> Path:
    """Where labels and the like are."""
    return path if path.suffix == ARCHIVE else path.with_suffix(".info.npz")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its name at the end, or goes.

    **Raises:** `UserError` if the disk does not take it.
    """
    with files.writing(path, "choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as aside:
            yield aside


# -------------------------------------------------------------------------------------------------- command
def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """What is asked for. **Raises:** `UserError` for values that do not go together."""
    parser = Parser(prog="fasthpm embed", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run or an import, a checkpoint, or a file of weights")
    parser.add_argument("--data_path", required=True, help="image folder, .txt list, prepared set, or synthetic:N")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".npz, or .npy for more than memory holds")
    parser.add_argument(
        "--features", choices=FEATURES, default="", help="cls token (default), mean of the patches, or every patch"
    )
    parser.add_argument("--weights", choices=("student", "teacher", "untrained"), default="", help="of a run: which")
    parser.add_argument("--timm", default="", metavar="NAME", help="RUN is a file with the weights of this timm model")
    parser.add_argument("--normalize", choices=("data", "model"), default="", help="by whose mean and std; see above")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is written")
    parser.add_argument("--batch_size", type=int, default=256, help="images per forward")
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads; 0 = all cores")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in (ARCHIVE, ARRAY):
        raise UserError(f"output is {arguments.output}, expected a name that ends in {ARCHIVE} or {ARRAY}")
    kept = [arguments.run] if arguments.run.is_file() else saved_files(arguments.run)
    for path in {arguments.output, info_path(arguments.output)}:
        files.check_place(path, "output", sources=[*kept, *stored_in(arguments.data_path, path)])
    if arguments.timm and not arguments.run.is_file():
        raise UserError(f"--timm {arguments.timm} needs its weights, and {arguments.run} is no file; give a checkpoint")
    if arguments.weights and arguments.run.is_file():
        raise UserError(f"--weights {arguments.weights} is for runs, and {arguments.run} is a file; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("fasthpm embed is one process; start it without deepspeed or torchrun")
    return arguments


def encoder_of(arguments: argparse.Namespace, device: torch.device) -> Encoder:
    """The encoder that is asked for."""
    if arguments.run.is_file():
        return encoders.of_file(arguments.run, arguments.timm, device)
    return encoders.of_run(arguments.run, arguments.weights or "student", device)


def main(argv: Arguments = None) -> EmbedResult:
    """`fasthpm embed` and `fasthpm.embed`."""
    arguments = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder_of(arguments, device)
    features = features_of(encoder, arguments.features)
    by = arguments.normalize or ("model" if encoder.statistics else "data")
    loader = build_loader(
        arguments.data_path,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        train=False,
        **encoder.reading,
    )
    try:
        info = encoders.normalized_by(encoder, loader.info, by)
        made_with = {
            "model": encoder.name,
            **encoder.made_of,
            "features": features,
            "grid": encoder.grid,
            "normalize": by,
            "mean": info.mean,
            "std": info.std,
            **encoder.reading,
            "data_path": arguments.data_path,
            "versions": versions(device, 1),
        }
        shape = (info.num_samples, *([math.prod(encoder.grid)] if features == "patches" else []), encoder.width)
        write(arguments, shape, feature_batches(encoder, loader, info, features, device), info, made_with)
    finally:
        loader.close()
    return told(arguments, shape, features, by)


def write(
    arguments: argparse.Namespace,
    shape: tuple[int, ...],
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    info: DatasetInfo,
    made_with: dict[str, Any],
) -> None:
    """One .npz, or a .npy and what goes with it."""
    path, columns = arguments.output, Columns(arguments.dtype)
    names = known_names(arguments.data_path, info.num_samples)
    if path.suffix == ARCHIVE:
        with _aside(path) as aside, zipfile.ZipFile(aside, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as file:
                columns.write(file, shape, batches)
            write_arrays(archive, columns.beside(info, names, made_with))
        return
    with _aside(path) as aside:
        with aside.open("wb") as file:
            columns.write(file, shape, batches)
        with _aside(info_path(path)) as beside, zipfile.ZipFile(beside, "w") as archive:
            write_arrays(archive, columns.beside(info, names, made_with))


def told(arguments: argparse.Namespace, shape: tuple[int, ...], features: str, by: str) -> EmbedResult:
    """Say what was written and how to load it."""
    path, beside = arguments.output, info_path(arguments.output)
    usage = f'np.load("{path}")["features"]' if path == beside else f'np.load("{path}", mmap_mode="r")'
    size = path.stat().st_size / 1e6
    print(f"{path}: {features} features {list(shape)} {arguments.dtype}, {size:.1f} MB, normalised by the {by}'s mean")
    print(f"load it with: {usage}")
    if path != beside:
        print(f"labels, ids, classes and names: {beside}", file=sys.stderr)
    return EmbedResult(path, shape, arguments.dtype, features, beside, usage)
