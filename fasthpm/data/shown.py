"""Which channels of an image a picture shows, and in which colours: pixels of any dtype become uint8 RGB.

Photographs are shown as they are. Of other pixels one channel is grey, two are red and green, three are red, green and
blue; each goes from black at the set's 2nd percentile to white at its 98th (`Values.low`, `high`).
"""

from dataclasses import dataclass

import numpy as np

from fasthpm.data.sampling import Array
from fasthpm.data.values import Values, are_photographs
from fasthpm.errors import UserError, nearest

NOTHING = (200, 60, 200)  # where a shown channel has no data
MIDDLE = 0.5  # what all values of a constant channel are, from 0 (black) to 1 (white)
COLOURS = ("red", "green", "blue")
PERCENTILES = (2, 98)  # black and white, where the set does not say them
EXAMPLE = "as in --show 3,2,1, or --show 3,2,1/8 for two pictures"

Group = tuple[int, ...]  # channels of one picture, counted from 0


@dataclass(frozen=True)
class Shown:
    """Callable: pixels [..., C] -> the pictures of every group, uint8 [..., 3] each.

    - `values`: what the pixels are; `groups`: one picture each, of 1 to 3 channels; `channels`: C
    """

    values: Values
    groups: tuple[Group, ...]
    channels: int

    @property
    def titles(self) -> tuple[str, ...]:
        """What to call the groups, by the names of bands or numbers from 1 on; empty where there is only one."""
        names = self.values.bands or [str(number + 1) for number in range(self.channels)]
        return tuple(",".join(names[k] for k in group) for group in self.groups) if len(self.groups) > 1 else ("",)

    @property
    def photographs(self) -> bool:
        """Whether pixels are colours already."""
        return are_photographs(self.values.dtype, self.channels)

    def __call__(self, pixels: Array, missing: Array | None = None) -> list[Array]:
        """`pixels`: as stored, or near that (a reconstruction) [..., C].

        - `missing`: where there is no data, bool [..., C]; None: where `pixels` say so (`lacking`)
        """
        levels = self.levels(pixels)
        missing = self.lacking(pixels) if missing is None else missing
        return [_painted(levels, missing, group) for group in self.groups]

    def first(self, pixels: Array) -> Array:
        """The picture of the first group."""
        return self(pixels)[0]

    def levels(self, pixels: Array) -> Array:
        """All channels as uint8 from black to white, [..., C]; what has no data is in the middle."""
        if self.photographs:
            return pixels if pixels.dtype == np.uint8 else pixels.round().clip(0, 255).astype(np.uint8)
        numbers = pixels.astype(np.float64)
        numbers[self.lacking(pixels)] = np.nan
        low, high = self._range(numbers)
        if self.values.log:
            with np.errstate(over="ignore"):  # a reconstruction may be far off
                numbers, low, high = (np.expm1(part) for part in (numbers, low, high))
        span = high - low
        usable = span > 0  # else the channel is constant, but for what its percentiles leave out
        scaled = np.where(usable, (numbers - low) / np.where(usable, span, 1), MIDDLE + np.sign(numbers - low) / 2)
        return np.rint(np.nan_to_num(scaled, nan=MIDDLE).clip(0, 1) * 255).astype(np.uint8)

    def lacking(self, pixels: Array) -> Array:
        """Where stored pixels have no data: bool [..., C]."""
        nodata = self.values.nodata
        missing = np.isnan(pixels) if pixels.dtype.kind == "f" else np.zeros(pixels.shape, np.bool_)
        if nodata is None or nodata != nodata:
            return missing
        return missing | (pixels == np.asarray(nodata).astype(pixels.dtype))

    def _range(self, numbers: Array) -> tuple[Array, Array]:
        """What is black and what is white: float64 [C] each."""
        if len(self.values.low) == len(self.values.high) == self.channels:
            return np.array(self.values.low, np.float64), np.array(self.values.high, np.float64)
        flat = numbers.reshape(-1, self.channels)
        known = flat[~np.isnan(flat).any(1)]
        found = np.percentile(known if len(known) else np.zeros((1, self.channels)), PERCENTILES, axis=0)
        return found[0], found[1]


def _painted(levels: Array, missing: Array, group: Group) -> Array:
    """uint8 [..., C] -> [..., 3]."""
    if len(group) == 1:
        picture = levels[..., group[0], None].repeat(3, axis=-1)
    else:
        picture = np.zeros((*levels.shape[:-1], 3), np.uint8)
        picture[..., : len(group)] = levels[..., group]
    picture[missing[..., group].any(-1)] = NOTHING
    return picture


def shown_of(values: Values, channels: int, show: str = "") -> Shown:
    """How pixels of a set are shown.

    - `show`: channels counted from 1, or names of bands, as "3,2,1"; several pictures as "3,2,1/8"; empty: the only
      channel, all three, the bands called red, green and blue, or the first three

    **Raises:** `UserError` for channels that are not there.
    """
    parts = show.split("/") if show else []
    groups = [tuple(_channel(name.strip(), values.bands, channels) for name in part.split(",")) for part in parts]
    for part, group in zip(parts, groups, strict=True):
        if len(group) > len(COLOURS):
            raise UserError(f"show {part!r} names {len(group)} channels, expected 1 to 3 of a picture, {EXAMPLE}")
    return Shown(values, tuple(groups) or (_usual(values.bands, channels),), channels)


def _usual(bands: tuple[str, ...], channels: int) -> Group:
    names = [band.lower() for band in bands]
    if channels > len(COLOURS) and set(COLOURS) <= set(names):
        return tuple(names.index(colour) for colour in COLOURS)
    return tuple(range(min(channels, len(COLOURS))))


def _channel(name: str, bands: tuple[str, ...], channels: int) -> int:
    """The channel that a name or a number means."""
    by_name = {band.lower(): number for number, band in reversed(list(enumerate(bands)))}.get(name.lower())
    by_number = int(name) - 1 if name.isdecimal() and 1 <= int(name) <= channels else None
    if by_name is not None and by_number is not None and by_name != by_number:
        raise UserError(
            f"show {name!r} is the name of channel {by_name + 1} and the number of another; rename the bands, or show "
            f"channels whose names are no numbers"
        )
    found = by_number if by_name is None else by_name
    if found is None:
        names = f", or {', '.join(bands)}" if bands else ""
        near = nearest(name, bands) if bands else ""
        raise UserError(f"show {name!r} is no channel{near}; expected 1 to {channels}{names}, {EXAMPLE}")
    return found
