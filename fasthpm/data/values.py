"""What the numbers of a set's pixels are: their type, the one that means nothing, and how pictures show them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
MAX_CHANNELS = 64
CUT = ("bands", "alpha", "pages", "axes", "key", "level")  # fields of `Taken` that are about parts of files
PHOTOGRAPH = ("uint8", (1, 3))  # what is stored as FFCV's images: 8 bits, grey or RGB; all else is arrays


@dataclass(frozen=True)
class Taken:
    """How a set's pixels were taken from files: by this other files are read, those of images with masks for instance.

    - `dtype`: of the files; "": as stored; `nodata`: what marks it in them
    - `limits`: (lowest, highest) of each channel, between which values were clipped, or none
    - `bands`: which of the files' channels, by number from 1 or by name; none: all; `alpha`: what became of opacity
    - `pages`, `axes`, `key`, `level`: which of several pictures or arrays of a file
    """

    dtype: str = ""
    nodata: float | None = None
    limits: tuple[tuple[float, float], ...] = ()
    bands: tuple[str, ...] = ()
    alpha: str = "white"
    pages: str = ""
    axes: str = ""
    key: str = ""
    level: int = 0


@dataclass(frozen=True)
class Values:
    """Of the pixels of a set. Photographs are of 8 bits and have none of the rest.

    - `dtype`: one of `DTYPES`; batches have it until they are on the device
    - `nodata`: the number that says that nothing was measured there, NaN among floats; None: every pixel counts
    - `bands`: a name per channel, or none
    - `low`, `high`: per channel, the 2nd and the 98th percentile, which pictures show as black and white
    - `log`: whether they are log(1 + x) of what the files had, which pictures undo
    - `taken`: what else was done to them
    """

    dtype: str = "uint8"
    nodata: float | None = None
    bands: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    log: bool = False
    taken: Taken = Taken()

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
    return Values(
        dtype=str(sidecar.get("dtype", "uint8")),
        nodata=_number(sidecar.get("nodata")),
        bands=tuple(sidecar.get("bands") or ()),
        low=tuple(percentiles.get("2", ())),
        high=tuple(percentiles.get("98", ())),
        log=bool(sidecar.get("log", False)),
        taken=_taken(sidecar["taken"] if isinstance(sidecar.get("taken"), dict) else _as_prepared(sidecar)),
    )


def noted(values: Values) -> dict[str, Any]:
    """The keys of a sidecar that say the same, without percentiles; of photographs none."""
    usual, nodata = Values(), values.nodata
    found = {
        "dtype": values.dtype,
        "nodata": _said(nodata),
        "bands": list(values.bands),
        "log": values.log,
        "taken": _unusual(values.taken),
    }
    unsaid: dict[str, Any] = {"dtype": usual.dtype, "nodata": None, "bands": [], "log": False, "taken": {}}
    return {name: value for name, value in found.items() if value != unsaid[name]}


def _number(nodata: Any) -> Any:
    return math.nan if nodata == "nan" else nodata  # JSON has no NaN


def _said(nodata: float | None) -> Any:
    return "nan" if nodata is not None and math.isnan(nodata) else nodata


def _taken(said: dict[str, Any]) -> Taken:
    """What `_unusual` gave. Entries that are none of its are left out: they may be a later version's."""
    usual = asdict(Taken())
    known = {name: said.get(name, value) for name, value in usual.items()}
    known |= {"nodata": _number(known["nodata"]), "bands": tuple(map(str, known["bands"]))}
    known["limits"] = tuple((float(low), float(high)) for low, high in known["limits"])
    return Taken(**known)


def _unusual(taken: Taken) -> dict[str, Any]:
    usual, said = asdict(Taken()), asdict(taken) | {"nodata": _said(taken.nodata)}
    said |= {"limits": [list(pair) for pair in taken.limits], "bands": list(taken.bands)}
    return {name: value for name, value in said.items() if value not in ([], usual[name])}


def _as_prepared(sidecar: dict[str, Any]) -> dict[str, Any]:
    """The same out of what `data_prep` writes into a sidecar of arrays."""
    parts = (sidecar.get(name) for name in ("options", "preparation", "cutting"))
    options, preparation, cutting = (part if isinstance(part, dict) else {} for part in parts)
    if "codec" not in sidecar:  # photographs
        return {}
    window = options.get("window")
    limits = preparation.get("limits") or ([window] * sidecar.get("channels", 0) if window else [])
    own = {"dtype": options.get("dtype", ""), "nodata": options.get("nodata"), "limits": limits}
    return own | {
        name: cutting[name] for name in ("bands", "alpha", "pages", "axes", "key", "level") if name in cutting
    }
