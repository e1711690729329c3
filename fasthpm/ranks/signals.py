"""SIGTERM and SIGUSR1, as SLURM and spot machines send them, and Ctrl-C: a stop that all ranks make at the same update.

One small all-reduce per update tells the ranks of each other's signals. Its result is read some updates later, so that
no rank ever waits for it; a signal therefore stops the run after at most `DELAY` + 1 further updates.
"""

import collections
import os
import signal
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm import ranks
from fasthpm.entry import EXIT_INTERRUPTED, FROM_PYTHON

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DELAY = 2


class StopSignals:
    """Catches the signals while it is open (`with`); `agreed` tells every rank the same. A second Ctrl-C ends at once
    (called from Python: with `KeyboardInterrupt`, as the process is not ours to end).

    Collective: all ranks make one, and call `agreed` after the same updates.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = False
        self._previous: dict[signal.Signals, Any] = {}
        # On GPUs too the ranks talk over gloo here: the signal is the host's, and must not queue behind the step.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=ranks.timeout()))
        self._pending: collections.deque[tuple[Tensor, Any]] = collections.deque()

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank had received a signal `DELAY` calls ago; the same on all ranks."""
        flag = torch.tensor([int(self.received)], dtype=torch.int32)
        self._pending.append((flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)))
        if len(self._pending) <= DELAY:
            return False
        flag, work = self._pending.popleft()
        work.wait()
        return bool(flag)

    def drain(self) -> None:
        """Let the exchanges under way end, before the ranks part."""
        while self._pending:
            self._pending.popleft()[1].wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.interrupted:
            if FROM_PYTHON.get():
                raise KeyboardInterrupt
            os._exit(EXIT_INTERRUPTED)
        self.received = True
        self.interrupted |= number == signal.SIGINT
