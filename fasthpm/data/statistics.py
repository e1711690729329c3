"""By what pixels are normalised, and in how many channels a set is read."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from fasthpm.data.types import DatasetInfo
from fasthpm.data.values import DTYPES, Values, are_photographs, noted, values_of
from fasthpm.errors import UserError, note_once

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, as PIL's "L" has them
LEAST_STD = 1e-3 / 255  # of a set of one colour


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation per channel, of pixels scaled to 0..1 or, where they have not 8 bits, as stored.

    `values`: what these are, and what none of them is.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    remark: str = field(default="", compare=False)  # what a user should know of where they come from
    values: Values = field(default=Values(), compare=False)

    def in_channels(self, channels: int) -> "PixelStatistics":
        """The same of pixels read in `channels` channels.

        Grey in three channels has the same in each. Of colours read as grey the mean is exact, and the deviation that
        of channels that vary together, as those of photographs nearly do.
        """
        mean, std = self.mean, self.std
        if not are_photographs(self.values.dtype, len(mean)):
            return self
        if len(mean) == 1:
            mean, std = mean * channels, std * channels
        elif channels == 1:
            mean, std = ((sum(w * v for w, v in zip(LUMA, values, strict=True)),) for values in (mean, std))
        least = tuple(max(value, LEAST_STD) for value in std)
        return dataclasses.replace(self, mean=mean, std=least)

    def as_json(self) -> dict[str, Any]:
        """{"mean", "std"}, for files; of other pixels than photographs' also "dtype", "nodata", "bands", "log" and
        "taken", as far as they have them."""
        return {"mean": list(self.mean), "std": list(self.std), **noted(self.values)}


def statistics_from(values: Any) -> PixelStatistics | None:
    """What `as_json` gave; None for anything else."""
    found = [values.get(name) for name in ("mean", "std")] if isinstance(values, dict) else []
    numbers = [tuple(map(float, row)) for row in found if isinstance(row, list | tuple) and row and _numbers(row)]
    if len(numbers) != 2 or len(numbers[0]) != len(numbers[1]):
        return None
    kind = values_of(values)
    return PixelStatistics(numbers[0], numbers[1], values=kind) if kind.dtype in DTYPES else None


def _numbers(row: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in row)


def measured(images: NDArray[Any]) -> PixelStatistics:
    """Those of some images or clips themselves, uint8 [..., C]."""
    values = images.reshape(-1, images.shape[-1]) / 255
    return PixelStatistics(tuple(values.mean(0).tolist()), tuple(values.std(0).tolist()))


def statistics_of(info: DatasetInfo) -> PixelStatistics:
    """Those of a data set itself."""
    return PixelStatistics(tuple(info.mean), tuple(info.std), values=info.values)


def as_read(info: DatasetInfo, channels: int, source: str) -> DatasetInfo:
    """`info` of a set that is read in `channels` channels, said once where it has others.

    **Raises:** `UserError` for a set that is no photographs, which are converted, and has others.
    """
    if info.channels == channels:
        return info
    if not (are_photographs(info.values.dtype, info.channels) and {info.channels, channels} == {1, 3}):
        raise UserError(
            f"{source} has {info.channels} channel{'s' if info.channels > 1 else ''} of {info.values.dtype}, and the "
            f"model takes {channels}: use --channels {info.channels} (only photographs of 8 bits are converted, "
            f"between grey and RGB)"
        )
    if channels == 3:
        note_once(f"{source} is grey and the model takes 3 channels: each gets the grey value")
    else:
        note_once(f"{source} is coloured and the model takes 1 channel: it gets the luminance")
    read = statistics_of(info).in_channels(channels)
    return dataclasses.replace(info, channels=channels, mean=read.mean, std=read.std)
