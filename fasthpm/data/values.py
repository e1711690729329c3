"""What the numbers of a set's pixels are: their type, the one that means nothing, and how pictures show them."""

import math
from dataclasses import dataclass
from typing import Any

DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
MAX_CHANNELS = 64
PHOTOGRAPH = ("uint8", (1, 3))  # what is stored as FFCV's images: 8 bits, grey or RGB; all else is arrays


@dataclass(frozen=True)
class Values:
    """Of the pixels of a set. Photographs are of 8 bits and have none of the rest.

    - `dtype`: one of `DTYPES`; batches have it until they are on the device
    - `nodata`: the number that says that nothing was measured there, NaN among floats; None: every pixel counts
    - `bands`: a name per channel, or none
    - `low`, `high`: per channel, the 2nd and the 98th percentile, which pictures show as black and white
    - `log`: whether they are log(1 + x) of what the files had, which pictures undo
    """

    dtype: str = "uint8"
    nodata: float | None = None
    bands: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    log: bool = False

    @property
    def unit(self) -> float:
        """What 1.0 is in means and deviations: 255 of 8 bits, which are scaled to 0..1; else they are as stored."""
        return 255.0 if self.dtype == "uint8" else 1.0


def are_photographs(dtype: str, channels: int) -> bool:
    """Whether pixels are of 8 bits, grey or RGB."""
    return dtype == PHOTOGRAPH[0] and channels in PHOTOGRAPH[1]


def values_of(sidecar: dict[str, Any]) -> Values:
    """What a sidecar says of them; of photographs, and of sets that are older than this, nothing."""
    percentiles = sidecar.get("percentiles") or {}
    nodata = sidecar.get("nodata")
    return Values(
        dtype=str(sidecar.get("dtype", "uint8")),
        nodata=math.nan if nodata == "nan" else nodata,  # JSON has no NaN
        bands=tuple(sidecar.get("bands") or ()),
        low=tuple(percentiles.get("2", ())),
        high=tuple(percentiles.get("98", ())),
        log=bool(sidecar.get("log", False)),
    )


def noted(values: Values) -> dict[str, Any]:
    """The keys of a sidecar that say the same, without percentiles; of photographs none."""
    usual, nodata = Values(), values.nodata
    found = {
        "dtype": values.dtype,
        "nodata": "nan" if nodata is not None and math.isnan(nodata) else nodata,
        "bands": list(values.bands),
        "log": values.log,
    }
    unsaid: dict[str, Any] = {"dtype": usual.dtype, "nodata": None, "bands": [], "log": False}
    return {name: value for name, value in found.items() if value != unsaid[name]}
