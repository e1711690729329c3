"""What may be done to the values of an image that are kept: nodata, clipping, logarithm.

Preparation does it as it is asked; what reads files for a model that exists does it as it was done (`values.Taken`).
"""

import math

import numpy as np

from fasthpm.data.sampling import Array


def absent(values: Array, nodata: float | None) -> Array | None:
    """Where nothing was measured: bool like `values`, or None if no value says so."""
    if nodata is None:
        return None
    return np.isnan(values) if math.isnan(nodata) else values == values.dtype.type(nodata)


def only_finite(values: Array, nodata: float | None) -> Array:
    """NaN and infinite values become nodata, if there is one. **Raises:** `ValueError` if there is none."""
    if values.dtype.kind != "f":
        return values
    bad = ~np.isfinite(values)
    if not bad.any():
        return values
    if nodata is None:
        raise ValueError(
            f"{int(bad.any(2).sum())} of {bad.shape[0] * bad.shape[1]} pixels are NaN or infinite; --nodata nan takes "
            f"such pixels as not measured"
        )
    return np.where(bad, values.dtype.type(nodata), values)


def clipped(values: Array, out: Array | None, limits: Array) -> Array:
    """Values between the limits of their channel; where `out` says so, they stay."""
    if values.dtype.kind in "ui":
        info = np.iinfo(values.dtype)
        low, high = np.ceil(limits[:, 0]).clip(info.min, info.max), np.floor(limits[:, 1]).clip(info.min, info.max)
    else:
        low, high = limits[:, 0], limits[:, 1]
    cut = np.clip(values, low.astype(values.dtype), high.astype(values.dtype))
    return cut if out is None else np.where(out, values, cut)


def logarithm(values: Array, out: Array | None, dtype: str) -> Array:
    """log(1 + x), computed in 64 bits; NaN where `out` says so. **Raises:** `ValueError` for values of -1 and less."""
    wide = values.astype(np.float64)
    if out is not None:
        wide[out] = np.nan
    below = int((wide <= -1).any(2).sum())
    if below:
        raise ValueError(f"{below} pixels of -1 or less, of which --log has no logarithm; --window 0 HIGH clips them")
    return np.log1p(wide).astype(dtype)
