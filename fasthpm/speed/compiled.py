"""torch.compile with a way back: where it fails, the same function runs eagerly, after one warning."""

import sys
from collections.abc import Callable
from typing import Any

import torch

LONGEST = 160  # characters of a reason


class Compiled:
    """`function` compiled as one graph of fixed shapes, or as it is from the moment that this fails.

    - `name`: what it is, for the warning; `backend`: of torch.compile

    Memory that runs out is no failure of the compiler and is raised.
    """

    def __init__(self, function: Callable[..., Any], name: str, backend: str | Callable[..., Any] = "inductor") -> None:
        self.eager, self.name = function, name
        self.failure = ""  # the reason, once it has failed
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, *arguments: Any) -> Any:
        if not self.failure:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.give_up(error)
        return self.eager(*arguments)

    def give_up(self, error: Exception) -> None:
        """Run eagerly from now on, and say why."""
        self.failure = reason(error)
        print(f"warning: torch.compile of {self.name} failed ({self.failure}); it runs eagerly", file=sys.stderr)


def reason(error: BaseException) -> str:
    """The first telling line of an error, or of the one that caused it."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [type(inner).__name__]
    return f"{type(inner).__name__}: {lines[0]}"[:LONGEST]
