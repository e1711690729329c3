"""Images in files for a model whose pixels are not 8-bit grey or RGB: read in the very numbers that it was trained on.

Images with masks or boxes come as files. What preparation did to the training's files (`values.Taken`: channels taken,
opacity, clipping, logarithm, nodata) is done to these, and what of them does not fit the model is refused.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fasthpm.data import decoding
from fasthpm.data.changing import absent, clipped, logarithm, only_finite
from fasthpm.data.pixels import IMAGES
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters.channels import laid_over, numbers_of
from fasthpm.data.rasters.containers import PICTURE, blob_of, container_of, kind_of, open_raster
from fasthpm.data.rasters.pictures import open_photograph
from fasthpm.data.rasters.raster import Raster, Reading, check_size
from fasthpm.data.sampling import Array
from fasthpm.data.values import Values, are_photographs

KIND_REMEDY = "give images as those of the training were before they were prepared"
DOUBLE = (".nii.gz", ".ome.tif", ".ome.tiff")  # endings of two parts


@dataclass(frozen=True)
class FileReader:
    """Callable: the path of a file -> its image [H, W, C] as a set of such `values` has it.

    - `values`: of the model's training; `channels`: C
    """

    values: Values
    channels: int

    @cached_property
    def reading(self) -> Reading:
        """Which of a file's pictures or arrays."""
        taken = self.values.taken
        return Reading(taken.pages, taken.level, taken.axes, taken.key)

    def __call__(self, path: Path) -> Array:
        """**Raises:** `ValueError`, or whatever a library raises, for a file that is damaged, or is no such image;
        `UserError` if the library that reads it is not installed."""
        taken = self.values.taken
        with quietly():
            raster = self._open(path)
            try:
                check_size(raster, self.reading, raster.whole())
                if raster.slices != 1:
                    raise ValueError(f"a file of {raster.slices} pictures, expected one")
                pixels = laid_over(raster.read(0, raster.whole()), raster, taken.alpha)
                chosen = numbers_of(taken.bands, pixels.shape[2], raster.bands)
            finally:
                raster.close()
        pixels = np.ascontiguousarray(pixels if chosen is None else pixels[..., chosen])
        self._check(pixels)
        return self._changed(pixels)

    def _open(self, path: Path) -> Raster:
        blob = blob_of(str(path))
        if self.values.dtype == "uint8" and container_of(blob) is PICTURE:
            return open_photograph(blob, self.reading, self.values.taken.alpha)
        return open_raster(blob, self.reading)

    def _check(self, pixels: Array) -> None:
        if wrong := self._unlike(pixels.dtype.name, pixels.shape[2]):
            raise ValueError(wrong)

    def _unlike(self, dtype: str, count: int) -> str:
        """What is wrong with an image of so many channels of such numbers; empty for none."""
        expected = self.values.taken.dtype or ("" if self.values.log else self.values.dtype)
        if count == self.channels and dtype == (expected or dtype):
            return ""
        what = f"{self.channels} of {expected}" if expected else str(self.channels)
        return f"{count} channel{'s' if count > 1 else ''} of {dtype}, and the model was trained on {what}"

    def _changed(self, pixels: Array) -> Array:
        """As preparation did it: nodata, clipping, logarithm."""
        values, taken = self.values, self.values.taken
        nodata = taken.nodata if taken.dtype else values.nodata
        pixels = only_finite(pixels, nodata)
        out = absent(pixels, nodata) if taken.limits or values.log else None
        if taken.limits:
            pixels = clipped(pixels, out, np.array(taken.limits))
        return logarithm(pixels, out, values.dtype) if values.log else pixels

    def look(self, path: Path) -> tuple[tuple[int, int], str]:
        """Height and width by the header, and what is wrong with its kind, if anything. **Raises:** as the call."""
        taken, blob = self.values.taken, blob_of(str(path))
        with quietly():
            found = kind_of(blob, self.reading)
        if found.size == (0, 0):  # of a photograph
            photograph = (4 if taken.alpha == "keep" else 3) if self.values.dtype == "uint8" else found.channels
            return decoding.size_of(str(path)), self._unlike(found.dtype, photograph)
        count = found.channels - (found.alpha and taken.alpha != "keep")
        try:
            chosen = numbers_of(taken.bands, count, found.bands)
        except ValueError:
            s = "s" if count > 1 else ""
            taken_of = ",".join(taken.bands)
            return found.size, f"{count} channel{s} of {found.dtype}, and the model was trained on channels {taken_of}"
        return found.size, self._unlike(found.dtype, count if chosen is None else len(chosen))


def reader_of(values: Values, channels: int) -> FileReader | None:
    """What reads the files of a model's images; None where they are photographs, which `decoding` reads."""
    return None if are_photographs(values.dtype, channels) else FileReader(values, channels)


def is_image(path: str) -> bool:
    """Whether a file is an image that a `FileReader` may read, by name or first bytes."""
    try:
        return IMAGES.holds(path) or container_of(blob_of(path)) is not PICTURE
    except OSError:
        return False


def stem_of(path: str) -> str:
    """A path without the file's ending."""
    lower = path.lower()
    double = next((ending for ending in DOUBLE if lower.endswith(ending)), "")
    return path[: -len(double)] if double else os.path.splitext(path)[0]
