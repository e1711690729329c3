"""Files, the one place that knows how: written as a whole or not at all, hashed, and read without running what is in
them."""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasthpm.errors import UserError

HASH_CHUNK = 1 << 22  # bytes
ASIDE = ".writing-"  # begins the name of what is not whole yet
LONGEST_NAME = 255  # bytes, of nearly every file system
LISTED = 6  # names that one message tells


# -------------------------------------------------------------------------------------------------- write
def aside_of(path: Path) -> Path:
    """Where a file or folder waits, beside its place, until it is whole."""
    name = f"{ASIDE}{path.name}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f"{ASIDE}{hashlib.sha256(os.fsencode(path.name)).hexdigest()}"
    return path.with_name(name)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A free name beside `path` to write a file or folder to, which takes the place of `path` if all goes well.

    - `durable`: wait until it is on the disk before that

    After an error nothing is left of it, and what was at `path` before is there still.
    """
    aside = aside_of(path)
    remove(aside)  # of a process that was killed
    try:
        yield aside
        if durable:
            fsync(aside)
        os.replace(aside, path)
    finally:
        remove(aside)


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """**Raises:** `UserError` with the one line that a user needs for every `OSError` inside.

    - `remedy`: what to do about it
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from error


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write `path` as a whole or not at all; see `replacing`."""
    with replacing(path, durable=durable) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """The same of a JSON value, for people to read."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable=durable)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. **Raises:** `OSError`, as other writers do, if the disk does not take it."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def size_text(count: float) -> str:
    """Bytes for people: three digits and the unit that fits."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(count).bit_length() - 1, 0) // 10, len(units) - 1)
    if count / 1024**power >= 999.5 and power < len(units) - 1:  # not 1e+03
        power += 1
    return f"{count / 1024**power:.3g} {units[power]}"


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------------------------- read
def file_hash(path: Path, advance: Callable[[int], Any] = lambda count: None) -> str:
    """sha256 of a file, as hexadecimal digits, in bounded memory; `advance` is told how many bytes were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is none to be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


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
