"""Numbers gone wrong: updates whose loss or gradient is not finite, and losses that jump.

Both are seen at a reading of the metrics, by all ranks together, in the all-reduce that the metrics need anyway.
"""

import collections
import math
import statistics
from collections.abc import Sequence

from fasthpm.errors import AgreedError

SPIKE_WINDOW, SPIKE_LEAST = 200, 50  # updates that a loss is compared with: at most, at least
SPIKE_DEVIATIONS, SPIKE_RATIO = 8.0, 1.1  # a spike is so many deviations above the median, and by this ratio
NORMAL_SCALE = 1.4826  # median absolute deviation -> standard deviation of a normal distribution


class NotFinite(AgreedError):
    """Raised by all ranks: the update `first` (from 0) is the first that is not finite."""

    def __init__(self, message: str, first: int, *, printed_elsewhere: bool) -> None:
        super().__init__(message, printed_elsewhere=printed_elsewhere)
        self.first = first


def first_not_finite(steps: Sequence[int], values: Sequence[float], norms: dict[int, float]) -> int | None:
    """The first update with a value or a gradient norm that is not finite (DeepSpeed writes -1 for some), or None.

    - `steps`, `values`: update and a value of every micro-step; `norms`: gradient norm of every update
    """
    bad = {step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)}
    bad |= {step for step, norm in norms.items() if not (math.isfinite(norm) and norm >= 0)}
    return min(bad, default=None)


class SpikeDetector:
    """Tells which losses stand out from those of the updates before. It reports and changes nothing."""

    def __init__(self) -> None:
        self._before: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)

    def spikes(self, losses: Sequence[float]) -> dict[int, float]:
        """Take in the losses of the next updates; those that stand out: place in `losses` -> the median before it."""
        found = {}
        for place, loss in enumerate(losses):
            median = statistics.median(self._before) if len(self._before) >= SPIKE_LEAST else loss
            if self._stands_out(loss, median):
                found[place] = median
            self._before.append(loss)
        return found

    def _stands_out(self, loss: float, median: float) -> bool:
        if loss <= median:
            return False
        deviation = NORMAL_SCALE * statistics.median(abs(value - median) for value in self._before)
        return loss > median + SPIKE_DEVIATIONS * deviation and loss > median + (SPIKE_RATIO - 1) * abs(median)
