"""Prepared sets on disk: FFCV's `.beton` file format, read with numpy alone, and the JSON sidecar beside it.

The format (ffcv 1.0.2, version 2, little endian): header | field descriptors | one metadata row per sample | pages of
pixels | allocation table (sample, position, bytes). Of photographs (8 bits, grey or RGB) a file has two fields, `image`
(RGB) and `label` (integer). Other pixels FFCV's images cannot hold: there `image` is its field of bytes, `height` and
`width` are integers beside `label`, and the sidecar has `dtype`, `channels` and `codec` (`ARRAY_FIELDS`). FFCV's own
loader reads these bytes too.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.listing import FILES
from fasthpm.data.sampling import Array
from fasthpm.data.types import DatasetInfo
from fasthpm.data.values import DTYPES, MAX_CHANNELS, are_photographs, values_of
from fasthpm.errors import UserError

VERSION, JPEG, RAW = 2, 0, 1
ARRAY, LZ4 = 2, 3  # what the table says of samples whose bytes are no image of FFCV's, as `codec` wrote them
CODEC_MODES = {"raw": ARRAY, "lz4": LZ4}
MAX_SIDE = 65535
FIELDS = (("image", 2), ("label", 1))  # name and FFCV's type id
ARRAY_FIELDS = (("image", 3), ("label", 1), ("height", 1), ("width", 1))
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ROW = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
BYTES = np.dtype([("data_ptr", "<u8"), ("size", "<u8")])
ARRAY_ROW = np.dtype([("image", BYTES), ("label", "<i8"), ("height", "<i8"), ("width", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
INFO_TYPES = {"num_samples": int, "channels": int, "mean": list, "std": list, "classes": list}
SIDECAR_TYPES = INFO_TYPES | {"bytes": int, "sha256": str}
INDEX_TYPES = INFO_TYPES | {"shards": list}
INDEX_FORMAT = "ffcv-shards"  # of the JSON that stands for a set in several files
AGAIN = "prepare it again with python -m data_prep.images"


@dataclass(frozen=True)
class Beton:
    """The table of a prepared set. N samples."""

    path: Path
    info: DatasetInfo
    sidecar: dict[str, Any]
    positions: Array  # uint64 [N], where a sample's pixels start in the file
    lengths: Array  # uint64 [N], how many bytes they take
    modes: Array  # uint8 [N], JPEG or RAW; of arrays ARRAY or LZ4
    heights: Array  # uint16 [N], of arrays int64
    widths: Array  # the same
    labels: Array  # int64 [N]


def sidecar_path(path: Path) -> Path:
    """`OUT.json` of `OUT.beton`."""
    return path.with_suffix(".json")


def files_path(path: Path) -> Path:
    """`OUT.files.csv` of `OUT.beton`: the source file of every sample."""
    return path.with_suffix(FILES)


def read_sidecar(path: Path) -> dict[str, Any]:
    """The JSON beside a `.beton`.

    **Raises:** `UserError` if it is missing, is not JSON, or lacks what training needs.
    """
    return _read_json(path, SIDECAR_TYPES)


def read_index(path: Path) -> dict[str, Any] | None:
    """The JSON that lists the shards of `OUT.beton`, or None where there is none (or `OUT.beton` itself is there).

    **Raises:** `UserError` if it lacks what training needs.
    """
    if path.exists() or not sidecar_path(path).is_file():
        return None
    try:
        values = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("format") != INDEX_FORMAT:
        return None
    values = _read_json(path, INDEX_TYPES)
    if not values["shards"] or not all(isinstance(name, str) and name for name in values["shards"]):
        raise UserError(f"{sidecar_path(path)} lists no shards: {AGAIN}")
    strange = [name for name in values["shards"] if Path(name).name != name or name == ".."]
    if strange:  # an index comes with the data: it must not lead to other files of this machine
        raise UserError(f"{sidecar_path(path)} lists {strange[0]!r}, expected names of files beside it: {AGAIN}")
    return values


def _read_json(path: Path, types: dict[str, type]) -> dict[str, Any]:
    sidecar = sidecar_path(path)
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{sidecar} cannot be read ({_reason(error)}); it belongs beside {path}: {AGAIN}") from error
    values = values if isinstance(values, dict) else {}
    for name, kind in types.items():
        if not isinstance(values.get(name), kind):
            raise UserError(
                f"{sidecar} has no {kind.__name__} named {name!r}; it is not the sidecar of {path}: {AGAIN}"
            )
    if values["num_samples"] < 1 or not len(values["mean"]) == len(values["std"]) == values["channels"]:
        raise UserError(
            f"{sidecar} contradicts itself (num_samples {values['num_samples']}, channels "
            f"{values['channels']}, {len(values['mean'])} means, {len(values['std'])} stds): {AGAIN}"
        )
    return values


def info_of(sidecar: dict[str, Any]) -> DatasetInfo:
    """What loaders and models need of a sidecar."""
    unlabelled = sidecar.get("num_unlabelled")  # older sets have none
    return DatasetInfo(
        num_samples=sidecar["num_samples"],
        channels=sidecar["channels"],
        mean=tuple(sidecar["mean"]),
        std=tuple(sidecar["std"]),
        classes=tuple(sidecar["classes"]),
        unlabelled=unlabelled if isinstance(unlabelled, int) else 0,
        values=values_of(sidecar),
    )


def open_beton(path: Path) -> Beton:
    """Read and check the table of a prepared set: sizes, header, bounds. Pixels are not read (`data_prep.verify` does).

    **Raises:** `UserError` for a file that is missing, truncated, foreign or does not belong to its sidecar.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a prepared set, a .beton file")
    if not path.is_file():
        raise UserError(f"{path} does not exist; give --data_path a prepared .beton, an image folder, or synthetic:N")
    sidecar = read_sidecar(path)
    size = os.path.getsize(path)
    if size != sidecar["bytes"]:
        raise UserError(
            f"{path} has {size} bytes, its sidecar says {sidecar['bytes']}; it is truncated or belongs to "
            f"another sidecar: copy it again or {AGAIN}"
        )
    arrays = stores_arrays(sidecar)
    layout = _Layout(ARRAY_FIELDS, ARRAY_ROW) if arrays else _Layout(FIELDS, ROW)
    if arrays:
        check_values(path, sidecar)
    header = _read_header(path, size, sidecar["num_samples"], layout)
    rows = np.fromfile(path, layout.row, sidecar["num_samples"], offset=layout.rows_at)
    table = np.fromfile(path, ALLOCATION, offset=int(header["alloc_table_ptr"]))
    start, end = layout.rows_at + rows.nbytes, int(header["alloc_table_ptr"])
    image, table = rows["image"], table[np.argsort(table["sample_id"], kind="stable")]
    fits = _arrays_fit(rows, table, sidecar) if arrays else _photographs_fit(rows, table)
    _check_table(path, image["data_ptr"], table, (start, end), fits)
    lengths = table["size"]
    if arrays:
        modes = np.full(len(rows), CODEC_MODES[sidecar["codec"]], np.uint8)
        columns = (image["data_ptr"], lengths, modes, rows["height"], rows["width"], rows["label"])
    else:
        columns = (image["data_ptr"], lengths, image["mode"], image["height"], image["width"], rows["label"])
    return Beton(path, info_of(sidecar), sidecar, *(np.ascontiguousarray(column) for column in columns))


@dataclass(frozen=True)
class _Layout:
    """What a file's fields are, and what of a sample stands in its row."""

    fields: tuple[tuple[str, int], ...]
    row: np.dtype[Any]

    @property
    def rows_at(self) -> int:
        return HEADER.itemsize + len(self.fields) * DESCRIPTOR.itemsize


def stores_arrays(sidecar: dict[str, Any]) -> bool:
    """Whether a set's samples are arrays, no images of FFCV's."""
    return not are_photographs(str(sidecar.get("dtype", "uint8")), sidecar["channels"])


def check_values(path: Path, sidecar: dict[str, Any]) -> None:
    """**Raises:** `UserError` if a sidecar of arrays says what no set can have."""
    channels, nodata = sidecar["channels"], sidecar.get("nodata")
    percentiles = sidecar.get("percentiles") or {}
    good = {
        "dtype": sidecar.get("dtype", "uint8") in DTYPES,
        "codec": sidecar.get("codec") in CODEC_MODES,
        "channels": 1 <= channels <= MAX_CHANNELS,
        "nodata": nodata is None or nodata == "nan" or type(nodata) in (int, float),
        "bands": len(sidecar.get("bands") or range(channels)) == channels,
        "percentiles": all(len(percentiles.get(name, range(channels))) == channels for name in ("2", "98")),
    }
    for name in (name for name, is_good in good.items() if not is_good):
        raise UserError(
            f"{sidecar_path(path)} has {name} {sidecar.get(name)!r}, which this version cannot read: update FastHPM or "
            f"{AGAIN}"
        )


def _read_header(path: Path, size: int, num_samples: int, layout: _Layout) -> Any:
    expected = ", ".join(name for name, _ in layout.fields[:-1]) + f" and {layout.fields[-1][0]}"
    smallest = layout.rows_at + num_samples * (layout.row.itemsize + ALLOCATION.itemsize)
    header = np.fromfile(path, HEADER, 1)[0] if size >= smallest else None
    if header is None or header["version"] != VERSION or header["num_fields"] != len(layout.fields):
        raise UserError(f"{path} is not an FFCV file of version {VERSION} with fields {expected}: {AGAIN}")
    fields = np.fromfile(path, DESCRIPTOR, len(layout.fields), offset=HEADER.itemsize)
    names = [bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace") for field in fields]
    if list(zip(names, fields["type_id"].tolist(), strict=True)) != list(layout.fields):
        kinds = "bytes and integers" if layout.fields == ARRAY_FIELDS else "RGB and integer"
        raise UserError(f"{path} has the fields {', '.join(names)}; expected {expected} ({kinds}): {AGAIN}")
    if header["num_samples"] != num_samples:
        raise UserError(f"{path} holds {header['num_samples']} samples, its sidecar says {num_samples}: {AGAIN}")
    if int(header["alloc_table_ptr"]) + num_samples * ALLOCATION.itemsize != size:
        raise UserError(f"{path} is incomplete: its allocation table should end the file: copy it again or {AGAIN}")
    return header


def _photographs_fit(rows: Array, table: Array) -> Array:
    """Whether each sample has as many bytes as its image takes, as far as that is known: bool [N]."""
    image = rows["image"]
    raw_bytes = image["height"].astype(np.uint64) * image["width"] * np.uint64(3)
    known = (image["mode"] == JPEG) | ((image["mode"] == RAW) & (table["size"] == raw_bytes))
    return known & (raw_bytes > 0)


def _arrays_fit(rows: Array, table: Array, sidecar: dict[str, Any]) -> Array:
    """The same of arrays."""
    height, width = rows["height"], rows["width"]
    sane = (height >= 1) & (height <= MAX_SIDE) & (width >= 1) & (width <= MAX_SIDE)
    pixel = sidecar["channels"] * np.dtype(sidecar["dtype"]).itemsize
    raw_bytes = (np.where(sane, height, 0) * np.where(sane, width, 0) * pixel).astype(np.uint64)
    known = table["size"] == raw_bytes if sidecar["codec"] == "raw" else table["size"] <= raw_bytes * np.uint64(2) + 64
    return sane & known & (rows["image"]["size"] == table["size"])


def _check_table(path: Path, pointers: Array, table: Array, inside: tuple[int, int], fits: Array) -> None:
    """Every sample lies between the bytes `inside` of the file, is where its row says, and `fits`."""
    ends = table["ptr"] + table["size"]
    good = (
        (table["sample_id"] == np.arange(len(pointers), dtype=np.uint64))
        & (table["ptr"] == pointers)
        & (table["ptr"] >= inside[0])
        & (ends > table["ptr"])
        & (ends <= inside[1])
        & fits
    )
    if not good.all():
        raise UserError(
            f"{path} is damaged: {int((~good).sum())} of {len(pointers)} samples, the first of them "
            f"{int(good.argmin())}, lie outside the file or disagree with the table: copy it again or {AGAIN}"
        )


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
