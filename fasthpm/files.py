"""Files, the one place that knows how: written as a whole or not at all, hashed, and read without running what is in
them."""

import argparse
import contextlib
import datetime
import decimal
import fractions
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
METADATA = "fasthpm"  # key of our own torch files: what a safetensors file has as its metadata


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


def check_place(path: Path, flag: str, *, endings: Sequence[str] = (), sources: Iterable[Path | None] = ()) -> None:
    """Refuse the name of a file to write before the work that it is for.

    - `flag`: that names it; `endings`: those of what is written, in lower case with their dots
    - `sources`: what is read: none of these files, and no file inside one of these folders, may be overwritten

    **Raises:** `UserError` with what is in the way.
    """
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{flag} is {path}, expected a name that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{flag} is {path}, which is a folder; name a file")
    check_above(path, flag)
    place = path.resolve()
    for source in (one.resolve() for one in sources if one is not None):
        if place == source or (place.exists() and place.is_relative_to(source)):
            raise UserError(f"{flag} is {path}, and would overwrite what is read or was saved; choose another name")


def check_above(path: Path, flag: str) -> None:
    """**Raises:** `UserError` if a file stands where a folder above `path` has to be."""
    above = next((one for one in path.parents if one.exists()), None)
    if above is not None and not above.is_dir():
        raise UserError(f"{flag} is {path}, which would lie in {above}, and that is a file; choose another")


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write `path` as a whole or not at all; see `replacing`."""
    with replacing(path, durable=durable) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """The same of a JSON value, for people to read."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable=durable)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable to whom the umask says; its own writer makes a file for its owner alone.

    **Raises:** `OSError`, as other writers do, if the disk does not take it.
    """
    new = not path.exists()
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        if new:
            path.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def save_torch(content: dict[str, Any], path: Path) -> None:
    """Write a torch file. **Raises:** `OSError`, as other writers do, if the disk does not take it."""
    with path.open("wb") as file:  # torch's own way to a path has another error for a full disk
        torch.save(content, file)


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
_ARRAY = np.zeros(0).__reduce__()[0]


def _type_of(value: object) -> type:
    """Stands for `type`, by which pickle writes the type of None."""
    return type(value)


def _plain_dict(factory: object = None) -> dict[Any, Any]:
    """Stands for `defaultdict`, into which torch puts nothing."""
    return {}


_PLAIN = (bool, bytes, complex, dict, float, frozenset, int, list, range, set, slice, str, tuple)
HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (_plain_dict, "collections.defaultdict"),
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    np.dtype,
    np.ndarray,
    *((kind, f"{home}.{kind.__name__}") for kind in _PLAIN for home in ("builtins", "__builtin__")),
    (range, "__builtin__.xrange"),
    (_type_of, "builtins.type"),
    (_type_of, "__builtin__.type"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")),
    *(kind for kind in np.sctypeDict.values() if issubclass(kind, np.number | np.bool_ | np.str_)),
]
# How files begin that are something else: what they are, and what to do. None of them is a checkpoint.
FOREIGN = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch that with git lfs pull"),
    (
        rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body|\?xml)\b",
        "is a web page (HTML), not a checkpoint: the download led to a page, of a login perhaps; download it again",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "is a compressed archive; unpack it first"),
    (rb"\x89HDF\r\n", "is an HDF5 file, as Keras and TensorFlow write; expected a file of torch.save or safetensors"),
    (rb"\x93NUMPY", "is a NumPy array (.npy); expected a file of torch.save or safetensors"),
    (rb"GGUF", "is a GGUF file of quantised weights; expected a file of torch.save or safetensors"),
)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Content of a safetensors or torch file, and the text metadata of a safetensors file, or of a torch file that is
    ours; no code in it ever runs.

    **Raises:** `UserError` for what is missing, a folder, damaged, of another kind, or wants to run code.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder{_suggestion(path)}; give a checkpoint file")
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a checkpoint file") from error
    if problem := _foreign(path, start):
        raise UserError(f"{path} {problem}")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    content = _read_pickle(path)
    return content, _metadata(content)


def _metadata(content: dict[str, Any]) -> dict[str, str]:
    """The texts that our own torch files hold beside weights."""
    found = content.get(METADATA)
    texts = found.items() if isinstance(found, Mapping) else ()
    return {key: text for key, text in texts if isinstance(key, str) and isinstance(text, str)}


def _suggestion(folder: Path) -> str:
    """What in a folder the user may have meant."""
    if (folder / "checkpoints").is_dir() or (folder / "recipe.json").is_file():
        return " of FastHPM itself, which knn, visualize, export and --init_from read as it is"
    files = sorted(p.name for p in folder.glob("*") if p.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"))
    weights = [name for name in files if "optim" not in name] or files
    return f" (with {', '.join(weights[:LISTED])})" if weights else ""


def _foreign(path: Path, start: bytes) -> str:
    """What a file is, if it is something else than a checkpoint and says so; empty for a file that may be one."""
    if not start:
        return "is empty; copy or download it again"
    for beginning, problem in FOREIGN:
        if re.match(beginning, start, re.IGNORECASE | re.DOTALL):
            return problem
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "is a TorchScript program, which holds code; save the plain state_dict where it comes from"
        if not any(name.endswith("data.pkl") for name in names):
            return f"is a zip archive of {_some(names)}; unpack it, and give the checkpoint in it"
    elif start[257:262] == b"ustar" and tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            names = list(itertools.islice((member.name for member in tar), LISTED + 1))
        return f"is a tar archive of {_some(names)}; unpack it, and give the checkpoint in it"
    return ""


def _some(names: list[str]) -> str:
    return (", ".join(names[:LISTED]) + (" and more" if len(names) > LISTED else "")) or "nothing"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a plain pickle is told below, in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise UserError(f"{path} {_reason(str(error))}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary of weights")
    return dict(content)


def _reason(message: str) -> str:
    """Why `torch.load` refused, in one line."""
    found = re.search(r"(?:GLOBAL|class) ([A-Za-z_][\w.]*\w)", message)
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
