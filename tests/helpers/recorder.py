"""A fake of CUDA graphs for the CPU, which shows what a real one would do wrong.

It records every operation that torch dispatches while a function runs, with its arguments, and runs the list again on
the same memory: a number of the host's stays what it was, an input that was not copied in stays the old one. Unlike a
real recording, its own does the work (which the first run then leaves out). What asks the host for a value fails.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasthpm import mask_loops

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


class Recording(TorchDispatchMode):
    """While entered: every operation, to be run again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        if name in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **kwargs)
        inputs, made = {storage(value) for value in tensors((args, kwargs))}, tensors(result)
        if function._schema.is_mutable or any(storage(value) not in inputs for value in made):  # no mere view
            self.operations.append((function, args, kwargs, [] if function._schema.is_mutable else made))
        return result

    def again(self) -> None:
        """Everything once more, into the same memory."""
        with torch.no_grad():
            for function, args, kwargs, made in self.operations:
                result = function(*args, **kwargs)
                if made:
                    for old, new in zip(made, tensors(result), strict=True):
                        old.detach().copy_(new)


class FakeRecorder:
    """In the place of `fasthpm.speed.graph.CudaRecorder`; `made` graphs, `runs` of all of them; `engines`: a test's."""

    def __init__(self) -> None:
        self.made, self.runs, self.engines = 0, 0, list[Any]()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recording, first = Recording(), [True]
        with recording:
            result = function()
        self.made += 1

        def run() -> None:
            self.runs += 1
            if not first[0]:
                recording.again()
            first[0] = False

        return run, result


def tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, Tensor)]


def storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have masks drawn by torch, as on a GPU: what numpy does is not recorded."""
    monkeypatch.setattr(mask_loops, "numpy_is_faster", lambda values: False)
