"""Files, the one place that knows how: hashed, waited for, and read without running what is in them."""

import argparse
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fasthpm.errors import UserError

HASH_CHUNK = 1 << 22
LISTED = 6  # names that one message tells


def file_hash(path: Path) -> str:
    """sha256 of a file, in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Beyond tensors and plain containers: what trainers store beside weights, none of which runs code when rebuilt.
_SCALAR = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 keep it in different places
HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    np.dtypes.BoolDType,
]


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Content of a safetensors or torch file, and the text metadata of a safetensors file; no code in it ever runs.

    **Raises:** `UserError` for what is missing, a folder, damaged, of another kind, or wants to run code.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder{_suggestion(path)}; give a checkpoint file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a checkpoint file") from error
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return _read_pickle(path), {}


def _suggestion(folder: Path) -> str:
    """What in a folder the user may have meant."""
    if (folder / "checkpoints").is_dir() or (folder / "recipe.json").is_file():
        return " of FastHPM itself, which knn, visualize, export and --init_from read as it is"
    files = sorted(p.name for p in folder.glob("*") if p.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"))
    weights = [name for name in files if "optim" not in name] or files
    return f" (with {', '.join(weights[:LISTED])})" if weights else ""


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise UserError(f"{path} {_reason(str(error))}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary of weights")
    return dict(content)


def _reason(message: str) -> str:
    """Why `torch.load` refused, in one line."""
    found = re.search(r"(?:GLOBAL|class) ([\w.]+\.[\w.]+)", message)
    if found and found[1].startswith("deepspeed."):
        return (
            "is DeepSpeed's optimizer state, not weights; give mp_rank_00_model_states.pt, which lies beside it, or "
            "what DeepSpeed's zero_to_fp32.py makes of the folder"
        )
    if found:
        return (
            f"needs Python code to load ({found[1]}) and could run anything, so it was not loaded; save the plain "
            f"state_dict, or convert it to safetensors, where the file comes from"
        )
    return (
        "is damaged, or not a file of torch.save or safetensors (plain pickles are never loaded); copy or download "
        "it again"
    )
