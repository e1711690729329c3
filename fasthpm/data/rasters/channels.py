"""Which channels of a raster are taken, what they are called, and what becomes of opacity."""

import os
from collections.abc import Sequence

import numpy as np

from fasthpm.data.rasters.raster import Raster
from fasthpm.data.sampling import Array

ALPHAS = ("white", "black", "keep")


def channels_of(raster: Raster, alpha: str) -> int:
    """Channels of what is read, its opacity laid over a ground or kept."""
    return raster.channels - (raster.alpha is not None and alpha != "keep")


def laid_over(values: Array, raster: Raster, alpha: str) -> Array:
    """[h, w, C] without its opacity, over white (the type's largest value, 1 of floats) or black; or as it is."""
    if raster.alpha is None or alpha == "keep":
        return values
    top = float(np.iinfo(values.dtype).max) if values.dtype.kind in "ui" else 1.0
    share = values[..., raster.alpha, None].astype(np.float64) / top
    colours = np.delete(values, raster.alpha, 2).astype(np.float64)
    ground = (1 - share) * (top if alpha == "white" else 0)
    mixed = (colours if raster.premultiplied else colours * share) + ground
    return (np.rint(mixed.clip(0, top)) if values.dtype.kind in "ui" else mixed).astype(values.dtype)


def bands_of(rasters: Sequence[Raster], endings: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of all channels, or none: of several files what their names end in, else what the file says."""
    if len(rasters) > 1:
        if any(raster.channels > 1 for raster in rasters):
            return ()
        names = [os.path.splitext(ending)[0].strip("_-. ") for ending in endings]
        return tuple(names) if all(names) and len({*names}) == len(names) else ()
    return rasters[0].bands


def numbers_of(chosen: Sequence[str], channels: int, names: Sequence[str]) -> list[int] | None:
    """Indices of the channels that `--bands` names; None for all.

    **Raises:** `ValueError` for one that is not there.
    """
    if not chosen:
        return None
    numbers = []
    for name in chosen:
        if name in names:
            numbers.append(list(names).index(name))
        elif name.isdigit() and 1 <= int(name) <= channels:
            numbers.append(int(name) - 1)
        else:
            known = f"1 to {channels}" + (f", or {', '.join(names)}" if names else "")
            raise ValueError(f"no band {name!r}; expected {known}")
    return numbers
