"""torch.compile with a way back: where it fails, the same function runs eagerly, after one warning.

Of a step not all is compiled, but regions of it, methods that hold what is worth fusing: blocks, which have one code
and compile once for each shape, take a fraction of the time that one graph of the whole takes. What lies between them
stays as it is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fasthpm.errors import warn

LONGEST = 160  # characters of a reason
MOST_SHAPES = 64  # that one region has: depths, widths, numbers of tokens, with and without gradients

Region = tuple[Any, str]  # an object and the name of its method


class Compiled:
    """`function`, or regions of it, compiled as graphs of fixed shapes; or as it is, from the moment that this fails.

    - `name`: what it is, for the warning; `backend`: of torch.compile
    - `regions`: asked at every call, and each compiled there and nowhere else; None: the whole function is

    Memory that runs out is no failure of the compiler and is raised.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        backend: str | Callable[..., Any] = "inductor",
        regions: Callable[[], Iterable[Region]] | None = None,
    ) -> None:
        self.eager, self.name, self._regions = function, name, regions or tuple
        self.failure = ""  # the reason, once it has failed
        self._compile = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        self._function = function if regions else self._compile(function)
        self._codes: dict[Any, Any] = {}  # function -> compiled, which all objects that have it share
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)

    def __call__(self, *arguments: Any) -> Any:
        if not self.failure:
            try:
                with self._in_place():
                    return self._function(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.give_up(error)
        return self.eager(*arguments)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The compiled methods in the place of the others."""
        kept = []
        for owner, name in self._regions():
            method, mine = getattr(owner, name), owner.__dict__
            kept.append((mine, name, mine.get(name)))
            mine[name] = self._compiled(method)
        try:
            yield
        finally:
            for mine, name, before in reversed(kept):
                if before is None:
                    del mine[name]
                else:
                    mine[name] = before

    def _compiled(self, method: Any) -> Callable[..., Any]:
        owner, code = getattr(method, "__self__", method), getattr(method, "__func__", type(method).__call__)
        if code not in self._codes:
            self._codes[code] = self._compile(code)
        return partial(self._codes[code], owner)

    def give_up(self, error: Exception) -> None:
        """Run eagerly from now on, and say why."""
        self.failure = reason(error)
        warn(f"torch.compile of {self.name} failed ({self.failure}); it runs eagerly")


def reason(error: BaseException) -> str:
    """The first telling line of an error, or of the one that caused it."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [type(inner).__name__]
    return f"{type(inner).__name__}: {lines[0]}"[:LONGEST]
