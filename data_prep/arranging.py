"""What a set is made of and how it is stored: photographs or arrays, by the flags and a look at some files.

`--values auto` looks at up to `LOOKED_AT` files. If none of them is a photograph (8 bits, grey or colour), and all have
one type, or one number of channels, values are kept as they are; else pixels become 8-bit RGB.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_prep.array_form import CHUNK_BYTES
from data_prep.changes import CODECS, LOGS, ArrayOptions
from data_prep.cuts import Cuts, Cutting, own_reader
from data_prep.encode import WRITE_MODES
from data_prep.samples import Files, SingleFile, Source
from fasthpm.cli import without_effect
from fasthpm.data.ffcv.codec import compress
from fasthpm.data.labels import number_labels
from fasthpm.data.rasters.channels import ALPHAS, bands_of, channels_of, numbers_of
from fasthpm.data.rasters.containers import ARRAYS, Kind, blob_of, container_of, kind_of
from fasthpm.data.rasters.raster import PAGES, AmbiguousPages, Blob, Reading
from fasthpm.data.rasters.stores import read_array
from fasthpm.data.sampling import Array
from fasthpm.data.values import are_photographs
from fasthpm.errors import UserError

LOOKED_AT = 64
VALUES = ("auto", "keep", "8bit")
MOST = 32  # samples that a process makes at a time
FOR_VALUES = ("clip_percentiles", "log", "nodata", "bands", "band_files")
USERS = {  # containers that a flag of reading is for, and names by which such files are found among many others
    "axes": (("npy", "npz", "HDF5", "zarr"), (".npy", ".npz", ".h5", ".hdf5", ".zarr")),
    "key": (("npz", "HDF5", "zarr"), (".npz", ".h5", ".hdf5", ".zarr")),
    "level": (("TIFF",), (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".btf")),
}
FOR_PHOTOGRAPHS = ("jpeg_quality", "keep_jpeg", "grey", "channels")


# ------------------------------------------------------------------------------------------------------- flags
def add_value_flags(parser: argparse._ArgumentGroup) -> None:
    """Those of images that are not 8-bit RGB, and of big ones."""
    parser.add_argument("--values", choices=VALUES, default="auto", help="keep them, or make 8 bits (default auto)")
    parser.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="clip values; of 8bit: to 0..255"
    )
    parser.add_argument(
        "--clip_percentiles",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="clip each channel to these percentiles of the set; reads everything once more",
    )
    parser.add_argument(
        "--log", nargs="?", const=LOGS[0], default="", choices=LOGS, metavar="TYPE", help="store log(1+x) as float32/16"
    )
    parser.add_argument(
        "--nodata", metavar="VALUE", help="number, or nan, of pixels that were not measured (default: what TIFFs say)"
    )
    parser.add_argument("--bands", metavar="3,2,1", help="channels to take, by number from 1 or name (default all)")
    parser.add_argument(
        "--band_files", metavar="ENDINGS", help='a sample is all files of one name with these: "_B02.tif,_B03.tif"'
    )
    parser.add_argument("--alpha", choices=ALPHAS, default="white", help="ground of transparent pixels (default white)")
    parser.add_argument("--pages", choices=PAGES, default="", help="what pages of a TIFF, slices and frames are")
    parser.add_argument(
        "--axes", default="", metavar="YXC", help="axes of .npy, HDF5 and zarr arrays (default: guessed)"
    )
    parser.add_argument("--key", default="", metavar="NAME", help="which array of .npz, HDF5 and zarr files")
    parser.add_argument(
        "--level", type=int, default=0, metavar="N", help="of a slide's pyramid (default 0, the largest)"
    )
    parser.add_argument("--tile", type=int, default=0, metavar="PIXELS", help="cut pictures into such squares")
    parser.add_argument("--stride", type=int, default=0, metavar="PIXELS", help="from tile to tile (default: a tile)")
    parser.add_argument(
        "--min_content",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out tiles in which fewer pixels are measured and differ from a neighbour (right, below)",
    )


def _cutting(args: argparse.Namespace) -> Cutting:
    for name in ("level", "tile", "stride"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} is negative, expected 0 or more")
    if not args.tile and (args.stride or args.min_content):
        raise UserError("--stride and --min_content are for tiles; give --tile PIXELS as well")
    if not 0 <= args.min_content <= 1:
        raise UserError(f"--min_content {args.min_content:g} is no share, expected 0 to 1")
    return Cutting(
        Reading(args.pages, args.level, args.axes.upper(), args.key, max_pixels=args.max_pixels),
        band_files=_listed(args.band_files),
        bands=_listed(args.bands),
        alpha=args.alpha,
        tile=args.tile,
        stride=args.stride or args.tile,
        min_content=args.min_content,
    )


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _number(text: str | None) -> float | str | None:
    """`--nodata` as options have it."""
    if text is None or text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--nodata {text} is no number; expected one, or nan") from None
    if math.isinf(value):
        raise UserError("--nodata inf: infinite pixels are nodata with --nodata nan")
    return "nan" if math.isnan(value) else int(value) if value == int(value) else value


# ------------------------------------------------------------------------------------------------------- the look
@dataclass(frozen=True)
class Looked:
    """A sample that was looked at."""

    name: str
    kind: Kind


def look(source: Source, cutting: Cutting) -> list[Looked]:
    """What evenly spaced samples are, by their headers; those that cannot be read are left out.

    **Raises:** `UserError` if a library is missing, or if it is open what all of their pages are.
    """
    units = None
    if cutting.band_files:
        units = Cuts(source, replace(cutting, tile=0, kept=True, reading=replace(cutting.reading, pages="first")))
    indices = np.flatnonzero(source.chosen if units is None else units.chosen)
    some = indices[np.unique(np.linspace(0, len(indices) - 1, min(LOOKED_AT, len(indices))).astype(int))]
    found, open_question = [], ""
    for index in some.tolist():
        try:
            if units is not None:
                found.append(Looked(units.name(index), _kind_of_files(units, index, cutting)))
            else:
                found.append(Looked(source.name(index), _kind(source, index, cutting)))
        except UserError:
            raise
        except AmbiguousPages as error:
            open_question = open_question or f"{source.where(index)}: {error}"
        except Exception:  # preparing it says why
            continue
    if open_question and not found:
        raise UserError(open_question)
    return found


def _kind(source: Source, index: int, cutting: Cutting) -> Kind:
    return kind_of(_blob(source, index), cutting.reading)


def _blob(source: Source, index: int) -> Blob:
    return blob_of(source.where(index), None if isinstance(source, Files) else source.sample(index)[0])


def _kind_of_files(units: Cuts, index: int, cutting: Cutting) -> Kind:
    """Of a sample in several files: that of each, but for the channels' names."""
    rasters = units.open_unit(int(units.table[index, 0]))
    first, total = rasters[0], sum(channels_of(raster, cutting.alpha) for raster in rasters)
    for raster in rasters:
        raster.close()
    photograph = are_photographs(first.dtype, total)
    own, names = (first.height, first.width), bands_of(rasters, cutting.band_files)
    return Kind(first.dtype, first.channels, photograph, first.nodata, names, own, first.alpha is not None)


def keeps_values(asked: str, looked: Sequence[Looked]) -> bool:
    """Whether values are kept: asked for, or of files that are no photographs and alike."""
    if asked != "auto" or not looked:
        return asked == "keep"
    kinds = [one.kind for one in looked]
    if any(kind.photograph for kind in kinds):
        return False
    return len({kind.dtype for kind in kinds}) == 1 or len({kind.channels for kind in kinds}) == 1


def majority(looked: Sequence[Looked]) -> tuple[Looked, str]:
    """A sample of the type and channels that most have, and a line about others.

    **Raises:** `UserError` if no kind is that of more than half.
    """
    counts = Counter((one.kind.dtype, one.kind.channels) for one in looked)
    first = {(one.kind.dtype, one.kind.channels): one for one in reversed(looked)}
    ranked = counts.most_common()
    told = "; ".join(f"{kind[1]} channels of {kind[0]} ({count}, such as {first[kind].name})" for kind, count in ranked)
    if ranked[0][1] * 2 <= len(looked):
        raise UserError(
            f"the files differ, and no kind is that of most: {told}; put each kind into a folder of its own"
        )
    return first[ranked[0][0]], f"mixed: {told}; only the first kind is taken" if len(ranked) > 1 else ""


# ------------------------------------------------------------------------------------------------------- arranging
def arrange(source: Source, args: argparse.Namespace) -> tuple[Source, ArrayOptions | None, list[str]]:
    """The samples of a source, how arrays are stored (None: they are photographs), and what is to be said.

    **Raises:** `UserError` for flags that contradict the files, or each other.
    """
    cutting = _cutting(args)
    _refuse_idle(source, cutting.reading)
    if isinstance(source, SingleFile):
        cutting = _of_array(source, args, cutting)
    looked = look(source, cutting) if args.values != "8bit" else []
    if args.alpha == "keep" and args.values != "8bit" and looked and all(one.kind.photograph for one in looked):
        rgba = Looked(looked[0].name, Kind("uint8", 4, False))
        return _arrays(source, args, replace(cutting, rgba=True), [rgba])
    if keeps_values(args.values, looked):
        if not looked:
            raise UserError(f"no file of {args.source} can be read, so that it is open what there is to keep")
        return _arrays(source, args, cutting, looked)
    return _photographs(source, args, cutting, looked)


def _refuse_idle(source: Source, reading: Reading) -> None:
    """**Raises:** `UserError` for --axes, --key or --level if no file of the source can use it, by names and looks."""
    given = [flag for flag in USERS if getattr(reading, flag)]
    if not given:
        return
    families = {_family(source, index) for index in _evenly(source)}
    for flag in given:
        known, endings = USERS[flag]
        named = any(source.where(index).lower().endswith(endings) for index in range(len(source)))
        if not (named or families & {*known, ""}):
            without_effect(
                [flag], f"it is for {', '.join(known)}, and the files are of {', '.join(sorted(families))}", given
            )
    if reading.key and isinstance(source, SingleFile) and _blob(source, 0).key:
        raise UserError(f"--key has no effect here: {source.names[0]} names the array; leave one of them out")


def _family(source: Source, index: int) -> str:
    """The name of a sample's container; empty if it cannot be read."""
    try:
        return container_of(_blob(source, index)).name
    except Exception:  # preparing it says why
        return ""


def _evenly(source: Source) -> list[int]:
    """Evenly spaced samples of a source, `LOOKED_AT` at most."""
    return np.unique(np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int)).tolist()


def _of_array(source: Files, args: argparse.Namespace, cutting: Cutting) -> Cutting:
    """A single file that is an array numbers its samples along the first axis."""
    blob = blob_of(source.where(0))
    if container_of(blob).name not in {container.name for container in ARRAYS[:4]} or args.pages:
        return cutting
    return replace(cutting, reading=replace(cutting.reading, pages="samples", numbered=True))


def _photographs(
    source: Source, args: argparse.Namespace, cutting: Cutting, looked: Sequence[Looked]
) -> tuple[Source, None, list[str]]:
    given = [name for name in FOR_VALUES if getattr(args, name) and name not in ("bands", "band_files")]
    given += ["window"] if args.window and args.values != "8bit" else []
    if given:
        raise UserError(
            f"--{given[0]} is for values that are kept, and these are photographs; --values keep keeps them"
        )
    if args.write_mode == "lz4":
        raise UserError(f"--write_mode lz4 is for values that are kept; photographs have {', '.join(WRITE_MODES)}")
    if args.alpha == "keep":
        raise UserError("--alpha keep keeps values; it does not go with --values 8bit, nor with files that differ")
    cutting = replace(cutting, window=tuple(args.window) if args.window else None)
    plain = not (cutting.enumerates or cutting.window or cutting.band_files or cutting.bands or cutting.reading.pages)
    if plain and cutting.alpha == "white" and not _needs_reader(source, cutting):
        unread = [flag for flag in USERS if getattr(cutting.reading, flag)]
        unread += ["label_column"] if args.label_column and isinstance(source, Files) else []
        without_effect(unread, "these photographs are read as they are", given=unread)
        return source, None, []
    cuts = Cuts(source, cutting)
    _label(cuts, args)
    return cuts, None, []


def _needs_reader(source: Source, cutting: Cutting) -> bool:
    """Whether some files are of kinds that Pillow does not read, by names and first bytes."""
    if not isinstance(source, Files):
        return False
    for index in _evenly(source):
        try:
            if own_reader(blob_of(source.where(index)), cutting):
                return True
        except OSError:  # preparing it says why
            continue
    return False


def _arrays(
    source: Source, args: argparse.Namespace, cutting: Cutting, looked: Sequence[Looked]
) -> tuple[Source, ArrayOptions, list[str]]:
    _refuse_photographs(args)
    best, mixed = majority(looked)
    kind = best.kind
    files = max(len(cutting.band_files), 1)
    own = kind.channels - (kind.alpha and args.alpha != "keep")
    chosen = _numbers(cutting.bands, own * files, kind.bands)
    channels = own * files if chosen is None else len(chosen)
    nodata = _nodata(args, looked, kind)
    names = kind.bands if chosen is None else tuple(kind.bands[k] for k in chosen) if kind.bands else ()
    cutting = replace(cutting, kept=True, expected=(kind.dtype, own, best.name), nodata=nodata)
    cuts = Cuts(source, cutting)
    _label(cuts, args)
    side = args.tile or max(kind.size)
    size = max(min(side, 1 << 14) ** 2 * channels * np.dtype(kind.dtype).itemsize, 1)
    options = ArrayOptions(
        kind.dtype,
        channels,
        codec=args.write_mode or CODECS[0],
        nodata=nodata,
        window=tuple(args.window) if args.window else None,
        clip_percentiles=tuple(args.clip_percentiles) if args.clip_percentiles else None,
        log=args.log,
        bands=names,
        max_resolution=args.max_resolution or 0,
        seed=args.seed,
        chunk=int(np.clip(CHUNK_BYTES // size, 1, MOST)),
        preparation=_preparation(args, cutting, kind),
    )
    compress(np.zeros((1, 1, channels), options.stored_dtype), options.codec)  # its library may be missing
    return cuts, options, _words(args, options, kind, mixed)


def _words(args: argparse.Namespace, options: ArrayOptions, kind: Kind, mixed: str) -> list[str]:
    stored = f", stored as log(1+x) of {options.log}" if options.log else ""
    s = "s" if options.channels > 1 else ""
    kept = f"values are kept: {options.channels} channel{s} of {kind.dtype}{stored}, {options.codec}"
    words = [kept + ("; --values 8bit makes photographs of them" if args.values == "auto" else "")]
    if args.nodata is None and options.nodata is not None:
        words.append(f"nodata is {options.nodata}, as the files say")
    return [*words, *([mixed] if mixed else [])]


def _refuse_photographs(args: argparse.Namespace) -> None:
    given = next((name for name in FOR_PHOTOGRAPHS if getattr(args, name)), None)
    if given:
        raise UserError(f"--{given} is for photographs, and these values are kept; leave it out, or say --values 8bit")
    if args.write_mode not in (None, *CODECS):
        raise UserError(f"--write_mode {args.write_mode} is for photographs; values are kept {' or '.join(CODECS)}")


def _numbers(bands: Sequence[str], channels: int, names: Sequence[str]) -> list[int] | None:
    try:
        return numbers_of(bands, channels, names)
    except ValueError as error:
        raise UserError(f"--bands {','.join(bands)}: {error}") from error


def _nodata(args: argparse.Namespace, looked: Sequence[Looked], kind: Kind) -> float | str | None:
    """What was asked for, else what the files agree on."""
    if args.nodata is not None:
        return _number(args.nodata)
    said = {repr(one.kind.nodata): one.kind.nodata for one in looked if one.kind.nodata is not None}
    if len(said) > 1:
        raise UserError(f"the files say nodata {' and '.join(said)}; say one by --nodata VALUE, or --nodata none")
    value = next(iter(said.values()), None)
    if value is None or (kind.dtype[0] in "ui" and not _holds(kind.dtype, value)):
        return None
    return _number(repr(value))


def _holds(dtype: str, value: float) -> bool:
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def _preparation(args: argparse.Namespace, cutting: Cutting, kind: Kind) -> dict[str, Any]:
    """What changed values, for the sidecar."""
    made = {
        "window": args.window,
        "clip_percentiles": args.clip_percentiles,
        "log": args.log or None,
        "bands": list(cutting.bands) or None,
        "alpha": args.alpha if args.alpha != "white" else None,
        "max_resolution": args.max_resolution or None,
        "source_dtype": kind.dtype,
    }
    return {name: value for name, value in made.items() if value is not None}


def _label(cuts: Cuts, args: argparse.Namespace) -> None:
    """Labels out of an array beside that of the samples, which `--label_column` names."""
    if not args.label_column or len(cuts.inner) != 1:
        return
    labels = _labels_beside(cuts.inner.where(0), args.label_column)
    if labels.shape != (len(cuts),):
        raise UserError(
            f"--label_column {args.label_column} has the shape {labels.shape}, and there are {len(cuts)} samples"
        )
    cuts.labels, classes = number_labels([str(value) for value in labels.tolist()], lambda k: f"sample {k}")
    cuts.classes = tuple(classes)


def _labels_beside(path: str, key: str) -> Array:
    try:
        return read_array(blob_of(path), key)
    except Exception as error:
        raise UserError(f"--label_column {key} of {path} cannot be read ({error})") from error
