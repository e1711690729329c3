"""Memory of batches, handed out again once nobody holds it."""

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from fasthpm.data.sampling import Array


class Recycled:
    """Uninitialised tensors on the CPU, of memory that the system has mapped before wherever some is free.

    Pages that a process touches for the first time are cleared one by one: of 12 channels that took two thirds of the
    time of decoding them (bench/LOG.md). Memory is free again when the tensor and all its views are gone, and not
    before.

    - `keep`: how many pieces are remembered; more can be handed out, and are the system's when they are dropped
    """

    def __init__(self, keep: int) -> None:
        self._keep, self._lock = keep, threading.Lock()
        self._pieces: list[tuple[Array, weakref.ref[Array]]] = []  # memory, and the view that its tensor holds

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that shares its memory with no other that lives."""
        wanted = np.dtype(str(dtype).removeprefix("torch."))
        with self._lock:
            free = [piece for piece, held in self._pieces if held() is None]
            piece = next((p for p in free if p.shape == shape and p.dtype == wanted), None)
            kept = [entry for entry in self._pieces if entry[0] is not piece]
            view = (np.empty(shape, wanted) if piece is None else piece).view()
            assert view.base is not None
            self._pieces = [*kept, (view.base, weakref.ref(view))][-self._keep :]
            return torch.from_numpy(view)

    def clear(self) -> None:
        """Forget all memory; what nobody holds is the system's again."""
        with self._lock:
            self._pieces = []
