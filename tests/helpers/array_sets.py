"""Prepared sets of arrays, written plainly, and the slow way to what their loader gives."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.ffcv.beton import ALLOCATION, ARRAY_FIELDS, ARRAY_ROW, DESCRIPTOR, HEADER, VERSION
from fasthpm.data.ffcv.codec import compress

PAGE = 1 << 23


def array_picture(index: int, size: tuple[int, int], channels: int, dtype: str) -> np.ndarray:
    """A smooth array [h, w, C] of a dtype, different for every index, over most of the type's range."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[: size[0], : size[1]] / 9
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-2, 2, (channels, 3))]
    values = np.stack(waves, -1) * 0.45 + 0.5 + rng.normal(0, 0.01, (*size, channels))
    if np.dtype(dtype).kind == "f":
        return (values * 40 - 7).astype(dtype)
    limits = np.iinfo(dtype)
    return (limits.min + values.clip(0, 1) * (limits.max - limits.min)).astype(dtype)


def arrays_of(
    count: int, channels: int = 3, dtype: str = "uint16", sizes: tuple[tuple[int, int], ...] = ((40, 48), (33, 20))
) -> list[np.ndarray]:
    """`count` of them, whose sizes take turns."""
    return [array_picture(index, sizes[index % len(sizes)], channels, dtype) for index in range(count)]


def is_nodata(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Where nothing was measured: bool, as `pixels`."""
    none = np.zeros(pixels.shape, bool) if nodata is None else pixels == np.array(nodata).astype(pixels.dtype)
    return none | (np.isnan(pixels) if pixels.dtype.kind == "f" and nodata is not None else False)


def write_arrays(
    path: Path,
    arrays: list[np.ndarray],
    labels: list[int] | None = None,
    *,
    codec: str = "raw",
    nodata: float | None = None,
    classes: tuple[str, ...] = ("ant", "bee"),
    **sidecar: Any,
) -> Path:
    """Write `path` (a .beton) and its sidecar of arrays [h, w, C] of one dtype; returns `path`."""
    labels = [index % len(classes) for index in range(len(arrays))] if labels is None else labels
    blobs, count = [compress(array, codec) for array in arrays], len(arrays)
    rows, table = np.zeros(count, ARRAY_ROW), np.zeros(count, ALLOCATION)
    start = HEADER.itemsize + len(ARRAY_FIELDS) * DESCRIPTOR.itemsize + rows.nbytes
    at = -(-start // PAGE) * PAGE
    body = bytearray(at - start)
    for k, (blob, array) in enumerate(zip(blobs, arrays, strict=True)):
        rows[k] = ((at, len(blob)), labels[k], *array.shape[:2])
        table[k] = (k, at, len(blob))
        body += blob
        at += len(blob)
    fields = np.zeros(len(ARRAY_FIELDS), DESCRIPTOR)
    for k, (name, kind) in enumerate(ARRAY_FIELDS):
        fields[k]["type_id"] = kind
        fields[k]["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(fields), PAGE, count, at)
    data = header.tobytes() + fields.tobytes() + rows.tobytes() + bytes(body) + table.tobytes()
    path.write_bytes(data)
    facts = facts_of(arrays, nodata)
    known = {
        "format": "ffcv",
        "num_samples": count,
        "classes": list(classes),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "codec": codec,
        "nodata": "nan" if nodata is not None and np.isnan(nodata) else nodata,
        "bands": [],
        "log": False,
    }
    path.with_suffix(".json").write_text(json.dumps(known | facts | sidecar))
    return path


def facts_of(arrays: list[np.ndarray], nodata: float | None) -> dict[str, Any]:
    """What a sidecar says of the values."""
    flat = np.concatenate([array.reshape(-1, array.shape[2]) for array in arrays])
    unit = 255 if flat.dtype == np.uint8 else 1
    kept = [flat[~is_nodata(flat, nodata)[:, c], c].astype(np.float64) for c in range(flat.shape[1])]
    return {
        "dtype": flat.dtype.name,
        "channels": flat.shape[1],
        "mean": [float(values.mean() / unit) for values in kept],
        "std": [float(values.std() / unit) for values in kept],
        "percentiles": {p: [float(np.percentile(values, float(p))) for values in kept] for p in ("2", "50", "98")},
        "pixels": len(flat),
        "missing": is_nodata(flat, nodata).sum(0).tolist(),
    }


# -------------------------------------------------------------------------------------------------- the slow way
def weight_matrix(length: int, out: int, interpolation: str) -> np.ndarray:
    """The weights of a resize, float64 [out, length]: PIL's bicubic, or the share of every pixel's area."""
    scale = length / out
    o, x = np.arange(out)[:, None], np.arange(length)[None, :]
    if interpolation == "area":
        weights = np.clip(np.minimum((o + 1) * scale, x + 1.0) - np.maximum(o * scale, x), 0, None)
    else:
        d = np.abs((x + 0.5 - (o + 0.5) * scale) / max(scale, 1.0))
        outer = ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
        weights = np.where(d < 1, (1.5 * d - 2.5) * d * d + 1.0, np.where(d < 2, outer, 0.0))
    weights[np.abs(weights) < 1e-10] = 0  # what only rounding makes of 0
    return weights / weights.sum(1, keepdims=True)


def turned(image: np.ndarray, code: int) -> np.ndarray:
    """[h, w, C] transposed (4), then mirrored (1) and upside down (2)."""
    image = image.swapaxes(0, 1) if code & 4 else image
    image = image[:, ::-1] if code & 1 else image
    return image[::-1] if code & 2 else image


def exact_crop(
    array: np.ndarray, crop: Any, size: tuple[int, int], interpolation: str, nodata: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A crop resized and turned, float64 [H, W, C] before it is rounded, and where it is nodata, bool."""
    top, left, height, width, code = (int(value) for value in crop)
    part = array[top : top + height, left : left + width]
    missing = is_nodata(part, nodata)
    down, across = (weight_matrix(n, out, interpolation) for n, out in zip((height, width), size, strict=True))
    exact = np.einsum("yh,hwc,xw->yxc", down, np.where(missing, 0, part).astype(np.float64), across)
    touched = np.einsum("yh,hwc,xw->yxc", (down != 0) * 1.0, missing * 1.0, (across != 0) * 1.0) > 0
    return turned(exact, code), turned(touched, code)
