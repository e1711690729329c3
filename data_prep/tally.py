"""What the values of a set add up to, per channel: counts of every value, from which mean, std and percentiles follow.

Of 8 and 16 bits every value has a count of its own (BINS of them at most), so that all statistics are exact. Of float32
a bin is the upper `KEPT_BITS` bits of the number: percentiles are those of the data to one part in 1000; smallest and
largest are exact, mean and std are summed in 64 bits, sample after sample, in the order of the set.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from data_prep import tally_kernel as kernel
from fasthpm.data.sampling import Array

PERCENTILES = ("0.1", "2", "50", "98", "99.9")
KEPT_BITS = 18  # of 32: sign, exponent, and 9 of the mantissa, which leaves steps of 1/512
SIGN = {2: 0x8000, 4: 0x80000000}  # by bytes of a float


class Tally:
    """Counts of the values of some samples."""

    def __init__(self, dtype: str, channels: int, nodata: float | None) -> None:
        self.dtype, self.channels, self.nodata = np.dtype(dtype), channels, nodata
        bins = 1 << (8 * self.dtype.itemsize if self.dtype.itemsize < 4 else KEPT_BITS)
        self.counts = np.zeros((channels, bins), np.int64)
        self.missing = np.zeros(channels, np.int64)
        self.pixels = 0  # of one channel, nodata too
        self.moments = np.zeros((channels, 3))  # float32: count, mean, sum of squared differences
        self.range = np.tile([math.inf, -math.inf], (channels, 1))  # float32
        self.parts: list[Array] = []  # `moments` of every sample, for `merge`

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: without the bins beyond the lowest and highest that are used, which are most of them."""
        used = np.flatnonzero(self.counts.any(0))
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return self.__dict__ | {"counts": (self.counts.shape, first, self.counts[:, first:last])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shape, first, counts = state["counts"]
        self.__dict__.update(state | {"counts": np.zeros(shape, np.int64)})
        self.counts[:, first : first + counts.shape[1]] = counts

    def add(self, values: Array) -> None:
        """A sample [h, w, C]."""
        self.pixels += values.shape[0] * values.shape[1]
        kind, size = self.dtype.kind, self.dtype.itemsize
        values = np.ascontiguousarray(values) if values.flags.writeable else values.copy()  # one type for the compiler
        bits = values.view(f"u{size}")
        if kind in "ui":
            kernel.count(bits, bits.dtype.type(1 << (8 * size - 1) if kind == "i" else 0), 0, self.counts)
        else:
            kernel.count_floats(bits, SIGN[size], 0 if size == 2 else 32 - KEPT_BITS, self.counts)
        missing = self._add_moments(values) if self.dtype == np.float32 else None
        if self.nodata is not None:
            self._set_aside(missing)

    def _add_moments(self, values: Array) -> Array:
        """How many values of each channel are nodata."""
        part, span = np.zeros((self.channels, 3)), np.tile([math.inf, -math.inf], (self.channels, 1))
        nodata = 0.0 if self.nodata is None else float(np.float32(self.nodata))
        missing = kernel.moments(values, nodata, self.nodata is not None, part, span)
        self.parts.append(part)
        self._join(part)
        self._widen(span)
        return missing

    def _set_aside(self, missing: Array | None) -> None:
        """Take nodata out of the counts. `missing`: of float32 how many there are, as others may share their bin."""
        assert self.nodata is not None
        if math.isnan(self.nodata):  # nothing else is above infinity, or below the negative one
            inside = [self._bin_of(value) for value in (-math.inf, math.inf)]
            self.missing += self.counts[:, : inside[0]].sum(1) + self.counts[:, inside[1] :].sum(1)
            self.counts[:, : inside[0]] = self.counts[:, inside[1] :] = 0
            return
        place = self._bin_of(self.nodata)
        taken = self.counts[:, place].copy() if missing is None else missing
        self.missing += taken
        self.counts[:, place] -= taken

    def _join(self, part: Array) -> None:
        """Chan's rule for two sets of numbers."""
        (n, mean, squares), (m, other, more) = self.moments.T, part.T
        total = np.maximum(n + m, 1)
        step = other - mean
        self.moments = np.stack([n + m, mean + step * m / total, squares + more + step**2 * n * m / total], 1)

    def merge(self, other: "Tally") -> None:
        """Those of samples that follow; sample after sample, so that how they are cut into pieces does not matter."""
        self.pixels += other.pixels
        self.counts += other.counts
        self.missing += other.missing
        for part in other.parts:
            self._join(part)
        self._widen(other.range)

    def combine(self, other: "Tally") -> None:
        """Those of another file, as a whole."""
        self.pixels += other.pixels
        self.counts += other.counts
        self.missing += other.missing
        self._join(other.moments)
        self._widen(other.range)

    def _widen(self, span: Array) -> None:
        low, high = np.minimum(self.range[:, 0], span[:, 0]), np.maximum(self.range[:, 1], span[:, 1])
        self.range = np.stack([low, high], 1)

    # ---- bins
    def _bin_of(self, value: float) -> int:
        """The bin of a value; bins are in rising order of the values."""
        kind, size = self.dtype.kind, self.dtype.itemsize
        if kind in "ui":
            return int(value) + (1 << (8 * size - 1) if kind == "i" else 0)
        bits = int(np.array(value + 0.0, self.dtype).view(f"u{size}"))  # -0 counts as 0
        key = 2 * SIGN[size] - 1 - bits if bits & SIGN[size] else bits | SIGN[size]
        return key >> (0 if size == 2 else 32 - KEPT_BITS)

    def _values(self) -> Array:
        """The value of every bin, float64: of float32 that in its middle."""
        kind, size, bins = self.dtype.kind, self.dtype.itemsize, np.arange(self.counts.shape[1])
        if kind in "ui":
            return (bins - (1 << (8 * size - 1) if kind == "i" else 0)).astype(np.float64)
        if size == 2:
            return _unordered(bins.astype(np.uint16)).astype(np.float64)
        first = bins.astype(np.uint32) << np.uint32(32 - KEPT_BITS)
        last = first | np.uint32((1 << (32 - KEPT_BITS)) - 1)
        with np.errstate(invalid="ignore", over="ignore"):
            return (_unordered(first).astype(np.float64) + _unordered(last).astype(np.float64)) / 2

    # ---- what comes of it
    def statistics(self) -> dict[str, Any]:
        """Entries of a sidecar: mean and std as `Values.unit` has them, the rest as stored. A channel in which there is
        nothing but nodata has zeros."""
        values = self._values()
        columns = [self._of_channel(channel, values) for channel in range(self.channels)]
        unit = 255.0 if self.dtype == np.uint8 else 1.0
        percentiles = [self._percentiles(channel, values) for channel in range(self.channels)]
        return {
            "mean": [mean / unit for mean, _, _, _ in columns],
            "std": [std / unit for _, std, _, _ in columns],
            "min": [low for _, _, low, _ in columns],
            "max": [high for _, _, _, high in columns],
            "percentiles": {name: [row[k] for row in percentiles] for k, name in enumerate(PERCENTILES)},
            "missing": self.missing.tolist(),
            "pixels": self.pixels,
        }

    def _of_channel(self, channel: int, values: Array) -> tuple[float, float, float, float]:
        """Mean, std, smallest and largest."""
        if self.dtype == np.float32:
            count, mean, squares = self.moments[channel].tolist()
            low, high = self.range[channel].tolist()
            return (mean, math.sqrt(squares / count), low, high) if count else (0.0, 0.0, 0.0, 0.0)
        used = np.flatnonzero(self.counts[channel])
        if not len(used):
            return 0.0, 0.0, 0.0, 0.0
        scale = 1 << 24 if self.dtype.kind == "f" else 1  # of which every float16 is a multiple
        numbers = [int(value * scale) for value in values[used].tolist()]
        counts = self.counts[channel, used].tolist()
        n = sum(counts)
        total = sum(count * number for count, number in zip(counts, numbers, strict=True))
        squares = sum(count * number * number for count, number in zip(counts, numbers, strict=True))
        variance = Fraction(n * squares - total * total, n * n * scale * scale)
        low, high = (float(values[k]) for k in (used[0], used[-1]))
        return float(Fraction(total, n * scale)), math.sqrt(variance), low, high

    def _percentiles(self, channel: int, values: Array) -> list[float]:
        return self.quantiles(channel, [Fraction(name) / 100 for name in PERCENTILES], values)

    def quantiles(self, channel: int, shares: list[Fraction], values: Array | None = None) -> list[float]:
        """The smallest value that at least such a share of the channel's values does not exceed, for each share."""
        values = self._values() if values is None else values
        below = np.cumsum(self.counts[channel])
        if not below[-1]:
            return [0.0] * len(shares)
        ranks = [max(math.ceil(share * int(below[-1])), 1) for share in shares]
        found = values[np.searchsorted(below, ranks)]
        if self.dtype == np.float32:
            found = np.clip(found, *self.range[channel])
        return [float(value) for value in found]

    @property
    def empty(self) -> list[int]:
        """Channels in which every pixel is nodata."""
        return np.flatnonzero(self.missing == self.pixels).tolist()


def _unordered(keys: Array) -> Array:
    """The floats of `Tally._bin_of`'s bits."""
    sign = keys.dtype.type(SIGN[keys.itemsize])
    return np.where(keys & sign, keys ^ sign, ~keys).astype(keys.dtype).view(f"f{keys.itemsize}")
