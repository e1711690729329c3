"""What may watch a run without touching it: asked after every update, read with the metrics, saved beside the run."""

from pathlib import Path
from typing import Protocol

from fasthpm.data import Batch


class Observer(Protocol):
    """Something that looks at a run. All of it is collective."""

    def after_update(self, done: int, batch: Batch) -> None:
        """Look at the last micro-batch of an update that was applied; `done`: updates."""

    def due(self, done: int) -> bool:
        """Whether it wants to be read now, at whatever interval the metrics are."""

    def read(self, done: int) -> dict[str, float]:
        """Figures since the last reading, and those that are due now."""

    def save(self, folder: Path, done: int) -> None:
        """Write its state beside the checkpoint of update `done` (rank 0). **Raises:** `OSError` for a full disk."""

    def load(self, folder: Path, done: int) -> None:
        """Take up the state that was saved after update `done`, if it is there."""
